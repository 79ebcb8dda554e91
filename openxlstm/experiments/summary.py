"""What README shows of the results: a row per experiment, between two marks, written and never typed.

A row has the metric that its question is about, of the first contestant and of those that everybody knows, at the rate
that validation chose: no best of several, nothing that a reader would have to look for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from openxlstm.experiments import choice
from openxlstm.experiments.choice import FLOOR, Entry
from openxlstm.experiments.plans import Experiment
from openxlstm.experiments.report import lines_of
from openxlstm.experiments.results import Line

BEGIN, END = "<!-- experiments: written by `xlstm eval report --readme` -->", "<!-- experiments: end -->"
BESIDE = {FLOOR: "no model", "lstm": "LSTM", "lstm-block": "LSTM (Block)", "llama": "Llama"}


def table(experiments: Mapping[str, Experiment], lines: Sequence[Line]) -> str:
    """A row for every experiment of which the `cpu`, `gpu` or `paper` profile has been run, if only in part."""
    rows = list(_rows(experiments, lines))
    if not rows:
        return "Nothing has been run yet.\n"
    head = ["", "", "xLSTM", *BESIDE.values(), "verdict"]
    marked = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([marked[0], "|---" * len(head) + "|", *marked[1:]]) + "\n"


def replace(file: Path, text: str) -> None:
    """Put `text` between the marks of a file.

    Raises:
        ValueError: the file does not have one pair of them, in this order.
    """
    old = file.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(END) < old.index(BEGIN):
        raise ValueError(f"{file} must have the line {BEGIN} once and the line {END} once below it")
    before, rest = old.split(BEGIN)
    file.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def part(text: str) -> str | None:
    """What stands between the marks; None where there are none."""
    return text.split(BEGIN)[1].split(END)[0].strip() + "\n" if BEGIN in text else None


def _rows(experiments: Mapping[str, Experiment], lines: Sequence[Line]) -> Iterator[list[str]]:
    for name, experiment in experiments.items():
        for profile, plan in experiment.profiles.items():
            mine = lines_of(experiment, profile, lines)
            if profile == "smoke" or all(line.model == FLOOR for line in mine):
                continue
            found = {entry.model: entry for entry in choice.entries(mine)}
            ours = next((model for model in (*reversed(experiment.order), *plan.models) if model in found), None)
            headline = experiment.headline(profile)
            values = [_value(found.get(model or ""), headline) for model in (ours, *BESIDE)]
            said = choice.said(experiment, profile, mine)
            plain = plan.unit in ("ms", headline)  # a ratio has no unit, and "accuracy" is its own
            asked = headline if plain else f"{headline}, {plan.unit}"
            yield [f"[{name}](docs/reproduction.md#{name}), {profile}", asked, *values, said]


def _value(entry: Entry | None, metric: str) -> str:
    """Mean over seeds, and of how many."""
    mean = None if entry is None else entry.mean(metric)
    if entry is None or mean is None:
        return "–"
    return f"{mean:z.3f}" if entry.is_floor else f"{mean:z.3f} ({len(entry.lines)})"
