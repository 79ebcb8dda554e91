"""What the guard decides: a pure function of the numbers before, so every process and every resumption agrees."""

from __future__ import annotations

import math
import random

import pytest

from openxlstm.train.guard import Guard, Verdict
from openxlstm.train.recipe import GuardRecipe

NAN, INF = math.nan, math.inf


def calm(count: int = 100, seed: int = 0) -> list[tuple[float, float]]:
    """Loss and norm of an uneventful run: falling, with noise."""
    draw = random.Random(seed)
    return [(3 - 0.002 * step + draw.gauss(0, 0.05), 1 + draw.gauss(0, 0.1)) for step in range(count)]


def lines(numbers: list[tuple[float, float]]) -> list[dict]:
    """As they stand in train.jsonl, a validation among them."""
    steps = [{"step": step, "loss": loss, "grad_norm": norm} for step, (loss, norm) in enumerate(numbers, start=1)]
    return [*steps, {"step": len(steps), "valid_loss": 2.5}]


def after_calm(**said) -> Guard:
    return Guard(GuardRecipe(**said), lines(calm()))


def actions(guard: Guard, numbers: list[tuple[float, float]]) -> list[str]:
    return [guard.judge(step, *pair).action for step, pair in enumerate(numbers, start=1)]


def test_an_uneventful_run_is_left_alone() -> None:
    for seed in range(20):
        assert set(actions(Guard(GuardRecipe()), calm(400, seed))) == {"ok"}


@pytest.mark.parametrize("policy", ["skip", "rollback", "stop"])
@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [
        (NAN, 1.0, "loss is nan"),
        (2.8, NAN, "gradient norm is nan"),
        (INF, 1.0, "loss is inf"),
        (2.8, INF, "norm is inf"),
    ],
)
def test_what_is_not_finite_follows_its_policy_from_the_first_step_on(policy, loss, norm, said) -> None:
    for guard in (Guard(GuardRecipe(nonfinite=policy)), after_calm(nonfinite=policy)):
        verdict = guard.judge(7, loss, norm)
        assert verdict.action == policy
        assert verdict.reason.startswith("step 7: ")
        assert said in verdict.reason


@pytest.mark.parametrize("policy", ["log", "skip", "rollback", "stop"])
@pytest.mark.parametrize(("loss", "norm", "name"), [(9.0, 1.0, "loss 9 "), (2.8, 30.0, "gradient norm 30 ")])
def test_a_spike_follows_its_policy(policy, loss, norm, name) -> None:
    verdict = after_calm(spike=policy).judge(101, loss, norm)
    assert verdict.action == policy
    assert f"the {name}is " in verdict.reason
    assert "robust deviations above the median" in verdict.reason
    assert "of the last 100 steps" in verdict.reason


def test_the_threshold_is_the_stated_one() -> None:
    """Losses 1, 2, 3 in turn: median 2, MAD 1 (two thirds are one away)."""
    numbers = [(1.0 + step % 3, 1.0) for step in range(99)]
    limit = 2 + 4 * 1.4826
    for value, action in ((limit - 1e-9, "ok"), (limit + 1e-9, "log")):
        assert Guard(GuardRecipe(deviations=4.0), lines(numbers)).judge(100, value, 1.0).action == action


def test_a_drop_is_no_spike_and_neither_is_the_noise_of_a_constant() -> None:
    assert after_calm().judge(101, 0.1, 0.001) == Verdict("ok")
    still = Guard(GuardRecipe(), lines([(2.0, 1.0)] * 100))
    assert still.judge(101, 2.0 + 1e-6, 1.0) == Verdict("ok")
    assert still.judge(102, 2.03, 1.0).action == "log"
    assert Guard(GuardRecipe(), lines([(0.0, 0.0)] * 100)).judge(101, 1.0, 0.0).action == "log"


def test_a_start_is_no_spike() -> None:
    guard = Guard(GuardRecipe())
    assert actions(guard, [(2.0, 1.0)] * 19 + [(50.0, 50.0)]) == ["ok"] * 20
    assert guard.judge(21, 5000.0, 1.0).action == "log"


def test_a_spike_in_memory_does_not_hide_the_next_and_a_new_level_becomes_normal() -> None:
    guard = after_calm()
    assert actions(guard, [(50.0, 1.0), (2.8, 1.0), (50.0, 1.0)]) == ["log", "ok", "log"]
    new_level = actions(guard, [(20.0, 1.0)] * 200)
    assert set(new_level[:40]) == {"log"}
    assert set(new_level[-90:]) == {"ok"}


def test_skipped_steps_are_counted_in_a_row_and_in_all() -> None:
    guard = Guard(GuardRecipe(most_in_a_row=3, most=5))
    assert actions(guard, [(NAN, 1.0)] * 3 + [(2.0, 1.0)]) == ["skip", "skip", "skip", "ok"]
    assert actions(guard, [(NAN, 1.0)] * 2) == ["skip", "skip"]
    verdict = guard.judge(9, NAN, 1.0)
    assert verdict.action == "stop"
    assert "5 steps were skipped already, and guard.most = 5" in verdict.reason
    in_a_row = Guard(GuardRecipe(most_in_a_row=3))
    assert actions(in_a_row, [(NAN, 1.0)] * 4) == ["skip", "skip", "skip", "stop"]
    assert actions(Guard(GuardRecipe(most=0)), [(NAN, 1.0)]) == ["stop"]


def test_a_loss_that_stays_above_is_not_skipped_for_ever() -> None:
    guard = after_calm(spike="skip", most_in_a_row=10)
    assert actions(guard, [(50.0, 1.0)] * 11) == ["skip"] * 10 + ["stop"]


def test_rollbacks_are_counted_by_the_run() -> None:
    said = GuardRecipe(nonfinite="rollback", most_rollbacks=3)
    assert Guard(said, rollbacks=2).judge(5, NAN, 1.0).action == "rollback"
    verdict = Guard(said, rollbacks=3).judge(5, NAN, 1.0)
    assert verdict.action == "stop"
    assert "3 rollbacks were made already, and guard.most_rollbacks = 3" in verdict.reason


@pytest.mark.parametrize("spike", ["log", "skip"])
def test_a_resumed_run_decides_as_one_that_never_stopped(spike: str) -> None:
    """Cut anywhere, with the state rebuilt from what train.jsonl says."""
    draw = random.Random(1)
    numbers = [
        (NAN, 1.0) if draw.random() < 0.05 else (90.0, 1.0) if draw.random() < 0.05 else pair for pair in calm(200)
    ]
    said = GuardRecipe(spike=spike, memory=30, most=200)
    whole, written, want = Guard(said), [], []
    for step, (loss, norm) in enumerate(numbers, start=1):
        verdict = whole.judge(step, loss, norm)
        want.append(verdict)
        line = {"step": step, "loss": loss if math.isfinite(loss) else None, "grad_norm": norm}
        written.append(line | ({"skipped": verdict.reason} if verdict.action == "skip" else {}))
    assert {verdict.action for verdict in want} == {"ok", "skip", spike}
    for cut in (0, 1, 29, 30, 31, 120, 199):
        resumed = Guard(said, written[:cut])
        got = [resumed.judge(step, *numbers[step - 1]) for step in range(cut + 1, len(numbers) + 1)]
        assert got == want[cut:]
