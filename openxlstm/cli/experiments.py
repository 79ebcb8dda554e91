"""`xlstm eval EXPERIMENT`, `xlstm eval list` and `xlstm eval report`: the experiments of the papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from openxlstm.cli.common import show_json, show_table
from openxlstm.experiments import choice, contestants, grid, results
from openxlstm.experiments.catalogue import EXPERIMENTS
from openxlstm.experiments.plans import PROFILES, Experiment
from openxlstm.experiments.results import Line
from openxlstm.models.checks import did_you_mean

RESULTS = Path("runs/eval/results.jsonl")
ALL = "all"


def is_experiment(word: str) -> bool:
    """Whether the word is an experiment and no path of a model."""
    return word == ALL or word in EXPERIMENTS


def refuse(word: str) -> str:
    """What to say of a word that is neither an experiment nor a path."""
    near = did_you_mean(word, [*EXPERIMENTS, ALL, "list", "report"])
    return f"{word!r} is neither a file or folder nor an experiment{near or '; see xlstm eval list'}"


@click.command("list", short_help="The experiments, and the runs of their profiles.")
def list_() -> None:
    """Show every experiment, what it asks, and of how many runs each of its profiles is made."""
    rows = [
        (name, *(len(grid.runs(one, profile)) if profile in one.profiles else "" for profile in PROFILES), one.title)
        for name, one in EXPERIMENTS.items()
    ]
    show_table("Experiments, and the runs of their profiles", ("experiment", *PROFILES, ""), rows, numbers=(1, 2, 3, 4))


@click.command(short_help="Rerun an experiment of the papers. `xlstm eval EXPERIMENT`")
@click.argument("name")
@click.option("--profile", type=click.Choice(PROFILES), required=True,
              help="How much: smoke, a minute; cpu, two cores for an hour; gpu; paper, as published.")  # fmt: skip
@click.option("--models", help="Only these contestants, with commas between them.")
@click.option("--results", "file", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True,
              help="The file that runs are appended to; what is in it is not run again.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), help="Runs side by side.  [default: one per core; on a GPU 1]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; what happens goes to the error output.")
def experiment(name: str, profile: str, models: str | None, file: Path, jobs: int | None, as_json: bool) -> None:
    """Run what is missing of the experiment NAME (`all`: of all that have the profile), and show what came out.

    \b
      xlstm eval parity --profile smoke
      xlstm eval mqar-64-4 --profile cpu --models mm,llama --results results.jsonl
    """
    if not is_experiment(name):
        raise ValueError(refuse(name))
    chosen = list(EXPERIMENTS.values()) if name == ALL else [EXPERIMENTS[name]]
    having = [one for one in chosen if profile in one.profiles]
    if not having:
        raise ValueError(f"{name} has no profile {profile!r}; it has {', '.join(_profiles(chosen))}")
    only = [model for model in (models or "").split(",") if model]
    for model in only:
        contestants.find(model)
    jobs = jobs or (1 if torch.cuda.is_available() else torch.get_num_threads())
    answer = {}
    for one in having:
        click.echo(f"{one.name}: {one.title}, {profile}", err=as_json)
        lines = grid.go(
            grid.runs(one, profile, only), file, jobs=jobs, show=lambda said: click.echo(f"  {said}", err=as_json)
        )
        said = choice.verdict(one, profile, lines)
        answer[one.name] = {"verdict": said, "results": str(file), "models": _models(lines)}
        if not as_json:
            _show(one, profile, lines, said)
    if as_json:
        show_json(answer)


@click.command(short_help="Write a page of results: tables, pictures, verdicts.")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--write", type=click.Path(path_type=Path, dir_okay=False), default=Path("reproduction.md"),
              show_default=True, help="The page; its pictures go into images/ beside it.")  # fmt: skip
def report(files: tuple[Path, ...], write: Path) -> None:
    """Write a page of the results in FILES (default: runs/eval/results.jsonl): per experiment what is published, a
    table, a picture, and a verdict by rule."""
    from openxlstm.experiments import report as pages

    chosen = list(files) or [RESULTS]
    lines = results.read(chosen)
    if not lines:
        raise ValueError(f"no results in {', '.join(map(str, chosen))}; xlstm eval parity --profile smoke makes some")
    command = f"xlstm eval report {' '.join(map(str, chosen))} --write {write}"
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
