"""What `xlstm eval` does when it is given an experiment: run a profile of it, list them all, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from openxlstm.cli.common import show_json, show_table
from openxlstm.experiments import choice, grid, results
from openxlstm.experiments.catalogue import EXPERIMENTS
from openxlstm.experiments.plans import PROFILES, Experiment
from openxlstm.experiments.results import Line
from openxlstm.models.checks import did_you_mean

WORDS = ("all", "list", "report")
RESULTS = Path("runs/eval/results.jsonl")


def is_experiment(word: str) -> bool:
    """Whether the first word after `xlstm eval` is one of ours, and not the path of a model."""
    return word in WORDS or word in EXPERIMENTS


def refuse(word: str) -> str:
    """What to say of a word that is neither an experiment nor a path."""
    return f"{word!r} is neither a model nor an experiment{did_you_mean(word, [*EXPERIMENTS, *WORDS])}; xlstm eval list"


def show_list() -> None:
    """Every experiment, and how many runs each profile has."""
    rows = [
        (name, *(len(grid.runs(one, profile)) if profile in one.profiles else "" for profile in PROFILES), one.title)
        for name, one in EXPERIMENTS.items()
    ]
    show_table("Experiments, and the runs of their profiles", ("experiment", *PROFILES, ""), rows, numbers=(1, 2, 3, 4))


def run(word: str, profile: str | None, models: Sequence[str], file: Path, jobs: int | None, as_json: bool) -> None:
    """Run what is missing of an experiment, or of all that have the profile, and show what came out.

    Raises:
        ValueError: no profile was named, or the experiment has not got it.
    """
    chosen = list(EXPERIMENTS.values()) if word == "all" else [EXPERIMENTS[word]]
    if profile is None:
        raise ValueError(f"{word}: say how much with --profile, one of {', '.join(_profiles(chosen))}")
    having = [one for one in chosen if profile in one.profiles]
    if not having:
        raise ValueError(f"{word} has no profile {profile!r}; it has {', '.join(_profiles(chosen))}")
    jobs = jobs or (1 if torch.cuda.is_available() else torch.get_num_threads())
    answer = {}
    for one in having:
        click.echo(f"{one.name}: {one.title}, {profile}", err=as_json)
        lines = grid.go(
            grid.runs(one, profile, models), file, jobs=jobs, show=lambda said: click.echo(f"  {said}", err=as_json)
        )
        said = choice.verdict(one, profile, lines)
        answer[one.name] = {"verdict": said, "results": str(file), "models": _models(lines)}
        if not as_json:
            _show(one, profile, lines, said)
    if as_json:
        show_json(answer)


def report(files: Sequence[Path], write: Path) -> None:
    """Write the page of these files of lines.

    Raises:
        ValueError: there are no lines in them.
    """
    from openxlstm.experiments import report as pages

    files = files or [RESULTS]
    lines = results.read(files)
    if not lines:
        raise ValueError(f"no results in {', '.join(map(str, files))}; xlstm eval parity --profile smoke makes some")
    command = f"xlstm eval report {' '.join(map(str, files))} --write {write}"
    write.parent.mkdir(parents=True, exist_ok=True)
    write.write_text(pages.page(EXPERIMENTS, lines, write.parent / "images", command), encoding="utf-8")
    click.echo(f"{len(lines)} runs: {write}")


def _profiles(experiments: Sequence[Experiment]) -> list[str]:
    return [profile for profile in PROFILES if any(profile in one.profiles for one in experiments)]


def _show(experiment: Experiment, profile: str, lines: Sequence[Line], said: str) -> None:
    tests = experiment.profiles[profile].metrics
    rows = [
        (entry.label, entry.model, *(("", "", "") if entry.is_floor else _facts(entry)),
         *(_number(entry, test) for test in tests))
        for entry in choice.entries(lines)
    ]  # fmt: skip
    columns = ("", "model", "parameters", "rate", "seeds", *tests)
    show_table(f"{experiment.title}, {profile}: {said}", columns, rows, numbers=range(2, len(columns)))


def _facts(entry: choice.Entry) -> tuple[object, ...]:
    return f"{entry.lines[0].parameters:,}", f"{entry.rate:g}", len(entry.lines)


def _models(lines: Sequence[Line]) -> dict[str, dict[str, object]]:
    return {
        entry.model: {
            "label": entry.label, "rate": entry.rate, "seeds": len(entry.lines),
            "metrics": {name: entry.mean(name) for name in (entry.lines[0].metrics if entry.lines else ())},
        }
        for entry in choice.entries(lines)
    }  # fmt: skip


def _number(entry: choice.Entry, metric: str) -> str:
    mean = entry.mean(metric)
    return "–" if mean is None else f"{mean:.3f}"
