"""`xlstm eval EXPERIMENT`, `xlstm eval list` and `xlstm eval report`: the experiments of the papers."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import torch

from openxlstm.cli.common import show_json, show_table
from openxlstm.experiments import choice, contestants, grid, results
from openxlstm.experiments.catalogue import EXPERIMENTS
from openxlstm.experiments.plans import PROFILES, Experiment, Plan
from openxlstm.experiments.results import Line
from openxlstm.models.checks import did_you_mean

RESULTS = Path("runs/eval/results.jsonl")
ALL = "all"
QUIET = {  # some contestants are of transformers, whose bars and notes would stand between the lines of the runs
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


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
        (name, *(len(grid.runs(one, profile)) if profile in one.profiles else "" for profile in PROFILES), _what(one))
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
@click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where the files are that cifar10 and retrieval read.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), help="Runs side by side.  [default: one per core; on a GPU 1]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; what happens goes to the error output.")
def experiment(
    name: str, profile: str, models: str | None, file: Path, data: Path | None, jobs: int | None, as_json: bool
) -> None:
    """Run what is missing of the experiment NAME (`all`: of all that have the profile), and show what came out.

    With the profile smoke, a rule that does not hold makes the command fail.

    \b
      xlstm eval parity --profile smoke
      xlstm eval all --profile smoke
      xlstm eval mqar-64-4 --profile cpu --models mm,llama --results results.jsonl
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    having, absent = _chosen(name, profile, data)
    only = [model for model in (models or "").split(",") if model]
    for model in only:
        contestants.find(model)

    def show(said: str) -> None:
        click.echo(said, err=as_json)

    for one in having:
        show(f"{one.name}: {one.title}, {profile}")
    for absentee, why in absent.items():
        show(f"{absentee}: skipped: {why}")
    began = time.monotonic()
    wanted = {run.key: run for one in having for run in grid.runs(one, profile, only)}  # some look at the same runs
    jobs = jobs or (1 if torch.cuda.is_available() else torch.get_num_threads())
    lines = {
        line.key: line for line in grid.go(list(wanted.values()), file, jobs=jobs, show=lambda said: show("  " + said))
    }
    answer: dict[str, dict[str, object]] = {one: {"verdict": "skipped", "reason": why} for one, why in absent.items()}
    for one in having:
        mine = [lines[run.key] for run in grid.runs(one, profile, only)]
        said = choice.said(one, profile, mine)
        answer[one.name] = {"verdict": said, "results": str(file), "models": _models(mine)}
        if not as_json:
            _show(one, profile, mine, said)
    if as_json:
        show_json(answer)
    elif len(answer) > 1:
        click.echo(_total(answer, len(wanted), time.monotonic() - began))
    missed = [one for one, said in answer.items() if said["verdict"] in ("partly", "not")]
    if profile == "smoke" and missed and not only:
        raise ValueError(f"rules of {', '.join(missed)} do not hold")


def _chosen(name: str, profile: str, data: Path | None) -> tuple[list[Experiment], dict[str, str]]:
    """The experiments that can be run, and why others cannot: of `all` they are left out, one alone is refused."""
    if not is_experiment(name):
        raise ValueError(refuse(name))
    if data is not None and name == ALL:
        raise ValueError(f"--data {data} is for one experiment; name it")
    chosen = list(EXPERIMENTS.values()) if name == ALL else [EXPERIMENTS[name]]
    having = [one for one in chosen if profile in one.profiles]
    if not having:
        raise ValueError(f"{name} has no profile {profile!r}; it has {', '.join(_profiles(chosen))}")
    if data is not None:
        having = [one.reading(profile, str(data)) for one in having]
    absent = {one.name: why for one in having if (why := one.profiles[profile].lacking)}
    if absent and name != ALL:
        plan = having[0].profiles[profile]
        raise ValueError(absent[name] + (" (--data)" if isinstance(plan, Plan) and plan.reads_files else ""))
    return [one for one in having if one.name not in absent], absent


def _total(answer: Mapping[str, Mapping[str, object]], runs: int, seconds: float) -> str:
    """How many of which verdict, and what it took."""
    counts = Counter(str(one["verdict"]) for one in answer.values())
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    return f"{len(answer)} experiments ({said}), {runs} runs: {seconds / 60:.1f} min"


@click.command(short_help="Write a page of results: tables, pictures, verdicts.")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--write", type=click.Path(path_type=Path, dir_okay=False), default=Path("reproduction.md"),
              show_default=True, help="The page; its pictures go into images/ beside it.")  # fmt: skip
@click.option("--readme", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="A file that gets a row per experiment, between its two marks, instead of a page.")  # fmt: skip
def report(files: tuple[Path, ...], write: Path, readme: Path | None) -> None:
    """Write a page of the results in FILES (default: runs/eval/results.jsonl): per experiment what is published, a
    table, a picture, and a verdict by rule."""
    from openxlstm.experiments import report as pages
    from openxlstm.experiments import summary

    chosen = list(files) or [RESULTS]
    lines = results.read(chosen)
    if not lines:
        raise ValueError(f"no results in {', '.join(map(str, chosen))}; xlstm eval parity --profile smoke makes some")
    if readme is not None:
        summary.replace(readme, summary.table(EXPERIMENTS, lines))
        click.echo(f"{len(lines)} runs: {readme}")
        return
    command = f"xlstm eval report {' '.join(map(str, chosen))} --write {write}"
    write.parent.mkdir(parents=True, exist_ok=True)
    write.write_text(pages.page(EXPERIMENTS, lines, write.parent / "images", command), encoding="utf-8")
    click.echo(f"{len(lines)} runs: {write}")


def _what(experiment: Experiment) -> str:
    reads = any(isinstance(plan, Plan) and plan.reads_files for plan in experiment.profiles.values())
    return experiment.title + (" (your files: --data)" if reads else "")


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
    return "–" if mean is None else f"{mean:z.3f}"
