"""The experiments: one loop that learns and says when it cannot, contestants of equal size, lines that survive."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from copy_task import EXPERIMENT, PLAN, Copy, line

from openxlstm.experiments import choice, contestants, grid, numbers, pictures, report, results, solve, summary
from openxlstm.experiments.catalogue import EXPERIMENTS
from openxlstm.experiments.plans import Plan, Rule
from openxlstm.experiments.results import Line, Metric
from openxlstm.tasks.base import NOT_ASKED, answered, batch, collate, generator, scaled
from openxlstm.tasks.formal import Formal
from openxlstm.tasks.matching import non_embedding_parameters

SIZES = contestants.Sizes(width=16, blocks=2, heads=2, vocab_size=4)


# --- samples


def test_what_is_asked_stands_one_before_its_answer() -> None:
    sample = answered([5, 6, 7], [1, 2])
    assert sample.inputs.tolist() == [5, 6, 7, 0]
    assert sample.targets.tolist() == [NOT_ASKED, NOT_ASKED, 1, 2]


def test_a_batch_is_padded_on_the_right_and_asks_for_nothing_there() -> None:
    found = collate([answered([1, 2, 3], [1]), answered([2], [3])])
    assert found.inputs.tolist() == [[1, 2, 3], [2, 0, 0]]
    assert found.exists.tolist() == [[True, True, True], [True, False, False]]
    assert found.asked.tolist() == [[False, False, True], [True, False, False]]


def test_a_sample_depends_on_its_number_alone() -> None:
    alone = Copy().sample("train", 0, 7)
    among = [Copy().sample("train", 0, index) for index in (9, 7, 3)][1]
    assert alone.inputs.tolist() == among.inputs.tolist()
    draws = {
        (split, seed): generator("copy", split, seed, 7).random() for split in ("train", "test") for seed in (0, 1)
    }
    assert len(set(draws.values())) == 4
    with pytest.raises(ValueError, match="split='dev' must be one of train, validation, test"):
        generator("copy", "dev", 0, 0)


# --- numbers


def test_intervals_by_hand() -> None:
    # mean 2, standard deviation 1, t = 4.3027 with two degrees of freedom
    assert numbers.over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5))
    assert numbers.over_seeds([1.0]) is None
    assert scaled(0.6, 0.2) == pytest.approx(0.5)


def test_an_interval_over_seeds_holds_the_mean_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    draws = torch.randn(4000, 5, dtype=torch.float64).tolist()
    held = sum(low <= 0 <= high for low, high in (numbers.over_seeds(one) or (1, -1) for one in draws))
    assert held / len(draws) == pytest.approx(0.95, abs=0.015)


# --- contestants


@pytest.mark.parametrize("name", ["sm", "mm", *contestants.FAMILIES])
def test_contestants_have_the_size_of_the_first_one(name: str) -> None:
    sizes = replace(SIZES, width=64, heads=2)
    _, _, reference = contestants.enter("ss", sizes, "ss", 0)
    model, _, size = contestants.enter(name, sizes, "ss", 0)
    assert abs(size / reference - 1) <= 0.02
    ends = 2 * sizes.vocab_size * model.config.width
    assert size == sum(weight.numel() for weight in model.parameters()) - ends


@pytest.mark.parametrize("name", ["ss", "mm", "lstm", "lstm-block", "llama"])
def test_contestants_for_numbers_have_equal_sizes_too(name: str) -> None:
    sizes = replace(SIZES, width=64, heads=2, features=3, vocab_size=1)
    reference, size = (contestants.enter(one, sizes, "ss", 0)[2] for one in ("ss", name))
    assert abs(size / reference - 1) <= 0.02
    with pytest.raises(ValueError, match="RWKV-4 is there for tokens only"):
        contestants.enter("rwkv4", sizes, "ss", 0)


def test_a_contestant_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="no contestant 'lama'; did you mean 'llama'"):
        contestants.find("lama")


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    first, again, other = (contestants.enter("ms", SIZES, "ss", seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# --- the loop


def test_the_loss_is_what_one_sample_after_the_other_gives() -> None:
    model = contestants.enter("sm", SIZES, "ss", 0)[0].double()
    found = batch(Copy(), "train", 0, range(5))
    together = solve._loss(model, found)
    apart = sum(solve._loss(model, batch(Copy(), "train", 0, [index])) for index in range(5))
    assert together.item() == pytest.approx(apart.item(), rel=1e-10)


@pytest.mark.parametrize("name", ["cycle-nav", "reverse-string"])
def test_portions_of_a_batch_train_as_the_whole_would(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64. Reverse-string asks as often as a sample is long, so a mean of means would be another loss."""
    task, ends = Formal(name, (3, 20)), {}
    sizes = replace(SIZES, vocab_size=task.vocab_size)
    for at_once in (10_000, 100, 1):
        monkeypatch.setattr(solve, "LEARNED_AT_ONCE", at_once)
        model = contestants.enter("sm", sizes, "ss", 0)[0].double()
        done = solve.train(model, task, solve.Budget(steps=4, batch=16), 1e-2)
        ends[at_once] = [*done.curve["loss"], *(part.sum().item() for part in model.parameters()), done.tokens]
    assert ends[100] == pytest.approx(ends[10_000], rel=1e-8)
    assert ends[1] == pytest.approx(ends[10_000], rel=1e-8)


def test_a_portion_holds_every_sample_once_and_those_of_like_length() -> None:
    samples = [Formal("parity", (3, 40)).sample("train", 0, index) for index in range(50)]
    for at_once, count in ((10_000, 1), (1_000, 2), (1, 50)):
        portions = solve._portions(samples, at_once)
        assert len(portions) == count
        lengths = torch.cat([found.exists.sum(1) for found in portions]).tolist()
        assert lengths == sorted((len(one.inputs) for one in samples), reverse=True)


def test_training_repeats_bit_for_bit() -> None:
    budget = solve.Budget(steps=5, batch=8)
    curves = [solve.train(contestants.enter("ss", SIZES, "ss", 3)[0], Copy(), budget, 1e-2).curve for _ in range(2)]
    assert curves[0] == curves[1]


def test_a_loss_that_is_no_number_is_a_result_with_a_reason(tmp_path: Path) -> None:
    plan = replace(PLAN, budget=solve.Budget(steps=20, batch=8, clip=1e30), models=("mm",))
    found = grid.once(grid.Run("copy", "smoke", plan, "mm", 1e18, 1), tmp_path)
    assert found.skipped is not None
    assert found.skipped.startswith("diverged at step")
    assert not found.metrics


def test_a_tally_by_hand() -> None:
    class Oracle(torch.nn.Module):
        """Says the first token where the sample has at most four, and 3 elsewhere."""

        def __init__(self) -> None:
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def features(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
            short = (tokens != 0).sum(1, keepdim=True) <= 4
            said = torch.where(short, tokens[:, :1], 3).expand_as(tokens)
            return torch.nn.functional.one_hot(said, 4).float() * 50, None

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    tally = solve.examine(Oracle(), Copy(), "test", 300)
    samples = [Copy().sample("test", 0, index) for index in range(300)]
    short = [one for one in samples if len(one.inputs) <= 4]
    lucky = [one for one in samples if len(one.inputs) > 4 and one.inputs[0] == 3]
    assert (tally.asked, tally.right) == (300, len(short) + len(lucky))
    assert set(tally.by_length) == {2, 4, 8}
    assert tally.by_length[2][0] == tally.by_length[2][1] == sum(len(one.inputs) == 2 for one in samples)


# --- lines


def test_a_grid_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, made = tmp_path / "lines.jsonl", []

    def make(run: grid.Run, work: Path) -> Line:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(run.key)
        return line(model=run.model, seed=run.seed, rate=run.rate)

    monkeypatch.setattr(grid, "once", make)
    wanted = grid.runs(EXPERIMENT, "smoke")
    assert [run.model for run in wanted] == ["floor", "ss", "mm", "ss", "mm"]
    with pytest.raises(KeyboardInterrupt):
        grid.go(wanted, file, jobs=1, show=lambda said: None)
    assert len(results.read([file])) == 2
    monkeypatch.setattr(grid, "once", lambda run, work: line(model=run.model, seed=run.seed, rate=run.rate))
    assert {found.key for found in grid.go(wanted, file, jobs=1, show=lambda said: None)} == {one.key for one in wanted}
    assert len(file.read_text().splitlines()) == 5


def test_a_line_survives_a_cut_and_its_newest_version_counts(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    results.append(file, line())
    with file.open("a") as out:
        out.write('{"experiment": "co')  # the power went
    results.append(file, line(seed=2))
    results.append(file, line(choice=0.05))
    assert [(found.seed, found.choice) for found in results.read([file])] == [(2, 0.1), (1, 0.05)]
    file.write_text(json.dumps({"experiment": "copy"}) + "\n")
    with pytest.raises(ValueError, match="lines.jsonl:1 is not a result"):
        results.read([file])


def test_a_plan_that_changed_is_another_plan_and_one_that_grew_is_not() -> None:
    assert replace(PLAN, budget=solve.Budget(steps=61, batch=32)).fingerprint != PLAN.fingerprint
    assert replace(PLAN, tests={"short": Copy(), "longer": Copy((7, 13))}).fingerprint != PLAN.fingerprint
    assert replace(PLAN, seeds=(1, 2, 3), models=("ss", "mm", "llama")).fingerprint == PLAN.fingerprint
    with pytest.raises(ValueError, match="has 3 blocks, but blocks=2"):
        replace(PLAN, models=("sss",))


# --- verdicts and the page


def test_the_rate_is_the_one_with_the_best_validation_and_a_diverged_one_loses() -> None:
    tried = [line(rate=1e-2, seed=seed, choice=0.2) for seed in (1, 2)]
    tried += [line(rate=1e-3, seed=1, choice=0.1), line(rate=1e-3, seed=2, choice=None, skipped="diverged", metrics={})]
    tried += [line(rate=3e-3, seed=seed, choice=0.15) for seed in (1, 2)]
    (entry,) = choice.entries(tried)
    assert entry.rate == 3e-3
    assert len(entry.tried) == 6


@pytest.mark.parametrize(
    ("values", "said"),
    [((0.95, 0.92), "reproduced"), ((0.95, 0.5), "not"), ((0.95,), "not attempted"), ((), "not attempted")],
)
def test_a_verdict_is_what_the_rules_say(values: tuple[float, ...], said: str) -> None:
    lines = [line(seed=seed, metrics={"short": Metric(value, 9)}) for seed, value in enumerate(values)]
    assert choice.verdict(EXPERIMENT, "smoke", lines) == said


@pytest.mark.parametrize(
    ("able", "unable", "said"), [(0.96, 0.2, "reproduced"), (0.5, 0.2, "not"), (0.96, 0.9, "partly"), (0.5, 0.9, "not")]
)
def test_that_nobody_learns_a_task_confirms_nothing(able: float, unable: float, said: str) -> None:
    rules = Rule(model="ss", metric="short", at_least=0.9), Rule(model="mm", metric="short", at_most=0.3, scaled=True)
    lines = [line(seed=seed, metrics={"short": Metric(able, 9)}) for seed in range(2)]
    lines += [line(model="mm", seed=seed, metrics={"short": Metric(unable, 9)}) for seed in range(2)]
    assert choice.verdict(replace(EXPERIMENT, rules={"smoke": rules}), "smoke", lines) == said


def test_an_error_below_its_bound_is_something_learned() -> None:
    rules = Rule(model="ss", metric="short", at_most=0.1), Rule(model="mm", metric="short", at_most=0.1)
    lines = [
        line(model=model, seed=seed, metrics={"short": Metric(value, 9)})
        for model, value in (("ss", 0.05), ("mm", 0.2))
        for seed in range(2)
    ]
    assert choice.verdict(replace(EXPERIMENT, rules={"smoke": rules}), "smoke", lines) == "partly"


def test_the_page_has_every_number_from_a_line_and_says_what_was_not_attempted(tmp_path: Path) -> None:
    lines = [line(seed=1), line(seed=2, metrics={"short": Metric(0.7, 100)}), line(plan="another")]
    other = replace(EXPERIMENT, name="never")
    said = report.page({"copy": EXPERIMENT, "never": other}, lines, tmp_path / "images", "the command")
    assert "| [copy](#copy) | smoke | 2 | not |" in said
    assert "| never | | 0 | not attempted |" in said
    assert "0.800 (" in said
    assert "* Not met: `ss` reaches *short* of at least 0.9 in 2 seeds or more.\n" in said
    assert "1 further lines are of plans that have changed" in said
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"copy-smoke.png", "copy-smoke.svg"}


def test_a_table_begins_with_the_first_contestant_of_the_plan_whoever_ended_first(tmp_path: Path) -> None:
    lines = [line(model=model, label="of") for model in ("llama", "mm", "ss", "floor")]
    said = report.page({"copy": EXPERIMENT}, lines, tmp_path / "images", "the command").splitlines()
    rows = [row.split(" | ")[0] for row in said if row.startswith(("| of", "| *no model"))]
    assert rows == ["| *no model: of*", "| of `ss`", "| of `mm`", "| of `llama`"]


def test_the_page_adds_up_what_the_runs_took_and_counts_those_in_two_tables_once(tmp_path: Path) -> None:
    lines = [line(seed=seed, wall_s=5400.0, cpu_s=3600.0) for seed in (1, 2)] + [line(model="floor", cpu_s=3600.0)]
    views = {"copy": EXPERIMENT, "view": replace(EXPERIMENT, name="view", runs_of="copy")}
    said = report.page(views, lines, tmp_path / "images", "the command")
    assert "Profile smoke, all together: 2 runs, 2.0 hours of one core (3.0 by the clock, added up)." in said


def test_the_metric_that_a_question_is_about_comes_first_on_the_page_and_stands_in_readme(tmp_path: Path) -> None:
    lines = [line(metrics={"short": Metric(0.25, 9), "longer": Metric(0.75, 9)})]
    plan = replace(PLAN, tests={"short": Copy(), "longer": Copy((7, 13))})
    lines = [replace(one, profile="cpu", plan=plan.fingerprint) for one in lines]
    views = {"copy": replace(EXPERIMENT, profiles={"cpu": plan})}
    assert "| seeds | short | longer |" in report.page(views, lines, tmp_path, "the command")
    assert "| short, accuracy | 0.250 (1) |" in summary.table(views, lines)
    views = {"copy": replace(views["copy"], asks="longer")}
    assert "| seeds | longer | short |" in report.page(views, lines, tmp_path, "the command")
    assert "| longer, accuracy | 0.750 (1) |" in summary.table(views, lines)


def test_a_picture_has_every_contestant_and_is_the_same_when_made_again(tmp_path: Path) -> None:
    models = ["m" * count for count in range(1, 13)]
    lines = [line(model=model, metrics={"short, to 4": Metric(0.5, 9)}) for model in models]
    for name in ("a", "b"):
        figure = pictures.over_length("Copy", choice.entries(lines), ["short"], 0.1, "the command")
        assert len(figure.axes[0].get_legend_handles_labels()[1]) == len(models)
        pictures.save(figure, tmp_path / name / "copy")
    assert (tmp_path / "a" / "copy.svg").read_bytes() == (tmp_path / "b" / "copy.svg").read_bytes()


@pytest.mark.parametrize(("ends", "panels"), [((1.7, 1.8, 4.4), 2), ((1.7, 1.8), 1), ((1.7, 4.4), 1), ((1.7,), 1)])
def test_bits_get_a_second_panel_where_one_is_so_far_off_that_the_others_are_one_line(
    ends: tuple[float, ...], panels: int
) -> None:
    models = ["m" * count for count in range(1, len(ends) + 1)]
    lines = [
        line(
            model=model,
            curve={"step": [10.0, 20.0], "validation": [end + 1, end]},
            metrics={"positions, to 32": Metric(end, 9)},
        )
        for model, end in zip(models, ends, strict=True)
    ]
    found = choice.entries(lines)
    for figure in (
        pictures.over_steps("Text", found, "bits per byte", 8.0, "the command"),
        pictures.over_positions("Text", found, "the command"),
    ):
        assert len(figure.axes) == panels
        assert all(len(axes.lines) == len(ends) for axes in figure.axes)
        low, high = figure.axes[-1].get_ylim()
        assert low < 1.7 <= max(end for end in ends if panels == 1 or end < 2) < high
        assert panels == 1 or high < 4.4


def test_a_rule_of_a_difference_needs_an_interval_below_zero() -> None:
    rule = Rule(model="mm", metric="short", below="ss")
    experiment = replace(EXPERIMENT, rules={"smoke": (rule,)})

    def lines(ours: list[float], theirs: list[float]) -> list[Line]:
        return [
            line(model=model, seed=seed, metrics={"short": Metric(value, 9)})
            for model, values in (("mm", ours), ("ss", theirs))
            for seed, value in enumerate(values)
        ]

    assert choice.verdict(experiment, "smoke", lines([1.0, 2.0, 3.0], [1.1, 2.1, 3.1])) == "reproduced"
    assert choice.verdict(experiment, "smoke", lines([1.0, 2.0, 3.0], [1.1, 1.9, 3.1])) == "not"  # lower on average
    assert choice.verdict(experiment, "smoke", lines([1.0], [2.0])) == "not attempted"  # of one seed nothing is sure


def test_the_first_seeds_do_not_answer_for_all() -> None:
    every, below = Rule(model="ss", metric="short", at_least=0.9), Rule(model="ss", metric="short", below="mm")
    plan = replace(PLAN, seeds=(0, 1, 2))

    def said(rule: Rule, *values: float) -> str:
        lines = [line(seed=seed, metrics={"short": Metric(value, 9)}) for seed, value in enumerate(values)]
        lines += [line(model="mm", seed=seed, metrics={"short": Metric(2.0 + seed / 99, 9)}) for seed in range(3)]
        return choice.verdict(replace(EXPERIMENT, profiles={"smoke": plan}, rules={"smoke": (rule,)}), "smoke", lines)

    assert said(every, 0.95, 0.96) == "not attempted"
    assert said(every, 0.95, 0.8) == "not"  # whatever the third will say
    assert said(every, 0.95, 0.96, 0.97) == "reproduced"
    assert said(below, 0.95, 0.96) == "not attempted"
    assert said(below, 0.95, 0.96, 0.97) == "reproduced"


def test_a_rule_above_the_floor_is_about_the_floor_that_was_measured() -> None:
    experiment = replace(EXPERIMENT, rules={"smoke": (Rule(model="ss", metric="short", above_floor=0.1),)})
    runs = [line(seed=seed, metrics={"short": Metric(value, 9)}) for seed, value in enumerate((0.75, 0.8))]
    floors = [line(model="floor", rate=0.0, seed=0, metrics={"short": Metric(value, 9)}) for value in (0.64, 0.66)]
    assert choice.verdict(experiment, "smoke", [*runs, floors[0]]) == "reproduced"
    assert choice.verdict(experiment, "smoke", [*runs, floors[1]]) == "not"  # 0.75 is less than 0.76
    assert choice.verdict(experiment, "smoke", runs) == "not attempted"
    assert choice.said(replace(experiment, rules={}), "smoke", runs) == "reported"
    with pytest.raises(ValueError, match="above_floor is a bound of its own"):
        Rule(model="ss", metric="short", above_floor=0.0, at_least=0.3)
    assert "0.1 more than the best rule without a model" in report._rule(experiment.rules["smoke"][0])


def test_every_experiment_has_a_smoke_profile_and_rules_of_profiles_that_it_has() -> None:
    for name, one in EXPERIMENTS.items():
        assert "smoke" in one.profiles, name
        assert set(one.rules) <= set(one.profiles), name
        assert one.rules.get("smoke") or name in UNJUDGED, f"{name} has no rule that can fail"


UNJUDGED = (
    "mqar-256-16",
    "pathfinder",
    "cifar10",
    "cifar10-colour",
    "retrieval",
    "generation",
)  # seconds only show that they run


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_models_that_exist_and_equal_sizes(name: str) -> None:
    source = EXPERIMENTS[EXPERIMENTS[name].runs_of or name]
    for profile, plan in EXPERIMENTS[name].profiles.items():
        assert all(contestants.find(model) for model in plan.models)
        assert profile in source.profiles
        assert plan.fingerprint == source.profiles[profile].fingerprint
        if profile in ("smoke", "cpu") and name == source.name:
            sizes = [
                non_embedding_parameters(contestants.config(one, plan.sizes, plan.models[0])) for one in plan.models
            ]
            assert max(abs(size / sizes[0] - 1) for size in sizes) <= 0.02
        if isinstance(plan, Plan) and not plan.reads_files:
            assert all(len(task.sample("test", 0, 0).inputs) for task in plan.tasks)
        assert {rule.model for rule in EXPERIMENTS[name].rules.get(profile, ())} <= set(plan.models)


KINDS = ("cycle-nav", "mqar-64-4", "nns", "listops", "pathfinder", "digits", "duplicates")
PLANS = [  # of samples that are generated; texts and files of the user have tests of their own
    (name, profile)
    for name, experiment in EXPERIMENTS.items()
    for profile in ("cpu" if name in KINDS else "smoke",)
    if isinstance(plan := experiment.profiles[profile], Plan) and not plan.reads_files
]


@pytest.mark.parametrize(("name", "profile"), PLANS)
def test_every_contestant_makes_a_step(name: str, profile: str) -> None:
    plan = EXPERIMENTS[name].profiles[profile]
    assert isinstance(plan, Plan), "chosen so"
    for model in plan.models:
        entered, _, _ = contestants.enter(model, plan.sizes, plan.models[0], 1)
        before = [weight.detach().clone() for weight in entered.parameters()]
        done = solve.train(entered, plan.task, solve.Budget(steps=1, batch=2), 1e-3, looks=1)
        if plan.task.vocab_size:  # at the start it knows nothing
            assert done.curve["loss"][0] == pytest.approx(np.log(plan.task.vocab_size), abs=1.5)
        assert any(not torch.equal(old, new) for old, new in zip(before, entered.parameters(), strict=True))
