"""The closed forms at their corners, against numbers that others published or that a hand can compute."""

import math

import pytest

from openxlstm.train import budget
from openxlstm.train.schedules import Schedule


def close(value: float, wanted: float) -> None:
    assert math.isclose(value, wanted, rel_tol=1e-12, abs_tol=1e-15), f"{value} is not {wanted}"


def test_warm_up_starts_above_zero_and_arrives() -> None:
    schedule = Schedule(kind="cosine", end=100, warmup=10)
    close(schedule.factor(0), 0.1)
    close(schedule.factor(9), 1.0)
    close(schedule.factor(10), 1.0)


@pytest.mark.parametrize(
    ("kind", "half_way"), [("cosine", 0.55), ("exponential", math.sqrt(0.1)), ("linear", 0.55), ("constant", 1.0)]
)
def test_every_course_goes_from_the_peak_to_its_floor(kind: str, half_way: float) -> None:
    schedule = Schedule(kind=kind, end=1010, warmup=10, floor=0.1)
    close(schedule.factor(10), 1.0)
    close(schedule.factor(510), half_way)
    close(schedule.factor(1010), 1.0 if kind == "constant" else 0.1)
    if kind != "exponential":
        close(schedule.factor(5000), schedule.factor(1010))


def test_the_7b_run() -> None:
    """arXiv:2503.13427: exponential to a tenth over 495,000 steps after 3,000 of warm-up."""
    schedule = Schedule(kind="exponential", end=550_000, warmup=3_000, cooldown=7_000, floor=0.1, span=498_000)
    close(schedule.factor(498_000), 0.1)
    assert round(schedule.factor(500_000), 4) == 0.0991
    assert round(schedule.factor(543_000), 4) == 0.0811  # where the released cool-down begins
    close(schedule.factor(549_999), schedule.factor(543_000) / 7_000)


def test_a_cosine_stopped_before_its_end() -> None:
    """arXiv:2405.04517: 28,170 steps of a cosine over 30,000, which ends at 0.109 of the peak."""
    schedule = Schedule(kind="cosine", end=28_170, warmup=750, floor=0.1, span=30_000)
    assert abs(schedule.factor(28_169) - 0.109) < 5e-4


def test_the_cool_down_is_a_straight_line_to_zero() -> None:
    schedule = Schedule(kind="constant", end=100, cooldown=20)
    close(schedule.factor(79), 1.0)
    close(schedule.factor(80), 1.0)
    close(schedule.factor(90), 0.5)
    close(schedule.factor(99), 1 / 20)


def test_the_cool_down_may_be_a_root() -> None:
    """1 - sqrt(x): falls fast at first. At its ends it is the straight line."""
    schedule = Schedule(kind="constant", end=100, warmup=10, cooldown=64, shape="root")
    close(schedule.factor(36), 1.0)
    close(schedule.factor(37), 1 - 1 / 8)
    close(schedule.factor(52), 0.5)
    close(schedule.factor(99), 1 - math.sqrt(63 / 64))
    shorter = schedule.cool_down_from(36)
    assert (shorter.shape, shorter.end) == ("root", 100)


def test_the_scaling_law_runs() -> None:
    """arXiv:2510.02228: a cosine that is at its floor where a cool-down of 1,000 steps to zero begins."""
    schedule = Schedule(kind="cosine", end=10_000, warmup=750, cooldown=1_000, floor=0.1)
    close(schedule.factor(0), 1 / 750)
    close(schedule.factor(749), 1.0)
    close(schedule.factor(9_000), 0.1)
    close(schedule.factor(9_500), 0.05)
    close(schedule.factor(9_999), 0.0001)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="warmup=80 and cooldown=30 must fit into the 100 steps"):
        Schedule(kind="constant", end=100, warmup=80, cooldown=30)
    with pytest.raises(ValueError, match="span=70 must be above warmup=70"):
        Schedule(kind="cosine", end=100, warmup=70, span=70)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "exponential"])
def test_an_early_cool_down_changes_nothing_that_has_been(kind: str) -> None:
    schedule = Schedule(kind=kind, end=1000, warmup=50, cooldown=250)
    shorter = schedule.cool_down_from(300)
    assert [shorter.factor(step) for step in range(300)] == [schedule.factor(step) for step in range(300)]
    assert (shorter.end, shorter.cooldown) == (400, 100)  # a quarter of the run, as asked for
    close(shorter.factor(300), schedule.factor(300))
    close(shorter.factor(350), schedule.factor(300) / 2)


def test_the_clock_decides_once_and_in_time() -> None:
    """Steps of 2 s against a limit of 1,000 s: 500 steps fit, a quarter of them cools down."""
    schedule = Schedule(kind="constant", end=1000, warmup=50, cooldown=250)
    cut = [step for step in range(1000) if budget.shortened(schedule, step, 1000.0 - 2 * step, 2.0) is not None]
    shorter = schedule.cool_down_from(cut[0])
    assert 485 <= shorter.end <= 500
    assert budget.shortened(shorter, cut[0] + 1, 1000.0 - 2 * (cut[0] + 1), 2.0) is None, "decided twice"


def test_a_machine_that_is_fast_enough_is_left_alone() -> None:
    schedule = Schedule(kind="constant", end=1000, warmup=50, cooldown=250)
    assert not any(budget.shortened(schedule, step, 1000.0 - 0.9 * step, 0.9) for step in range(1000))


def test_a_course_without_cool_down_is_never_bent() -> None:
    schedule = Schedule(kind="cosine", end=1000, warmup=50)
    assert not any(budget.shortened(schedule, step, 1.0, 2.0) for step in range(1000))


def test_the_plan_is_kept_and_belongs_to_its_limit(tmp_path) -> None:
    schedule = Schedule(kind="cosine", end=1000, warmup=50, cooldown=250)
    shorter = schedule.cool_down_from(300)
    assert budget.read_plan(tmp_path, schedule, 1000, 5.0) == schedule
    budget.write_plan(tmp_path, shorter, 1000, 5.0)
    assert budget.read_plan(tmp_path, schedule, 1000, 5.0) == shorter
    assert budget.read_plan(tmp_path, schedule, 1000, 7.0) == schedule  # another limit: another decision
    assert budget.read_plan(tmp_path, schedule, 1000, None) == schedule
