"""The pictures of the page: accuracy over the length of the sample, validation over steps. Needs matplotlib.

A line is a contestant at its chosen rate, the mean over its seeds; the band is from the worst seed to the best. Later
lines of accuracies are thinner, so that those beneath them are seen where several are perfect. Bits per byte have a
second panel where some contestants are so far off that the others cannot be told apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openxlstm.experiments.choice import Entry

Points = dict[int, list[float]]  # x: what each seed has there
FAR = 1.25  # a contestant that ends at so many times the bits of the best is left to the first panel
HEADROOM = 1.2  # of the second panel, over the worst end in it
INK, GREY, FAINT = "#1f2933", "#7b8794", "#d9dee3"
COLOURS = (
    "#d1495b", "#edae49", "#8d6a9f", "#3d7ea6", "#66a182", "#5c6b73", "#b07d62", "#00798c", "#2b2d42", "#a3b18a",
)  # fmt: skip


def over_length(title: str, found: Sequence[Entry], tests: Sequence[str], chance: float, under: str) -> Figure:
    """Accuracy on the test samples by their length, in powers of two."""
    figure, axes = _empty(title, "tokens of the sample, up to", under)
    axes.set_xscale("log", base=2)
    points = [{upper: at for test in tests for upper, at in _by_length(entry, test).items()} for entry in found]
    _bands(axes, found, points)
    ticks = sorted(set().union(*points))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    _accuracy(axes, chance)
    return figure


def over_positions(title: str, found: Sequence[Entry], under: str) -> Figure:
    """Bits per byte by the position in a window, in powers of two."""
    points = [_by_length(entry, "positions") for entry in found]
    figure, panels = _of_bits(title, "position in the window, up to", under, found, points)
    ticks = sorted(set().union(*points))
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.tick_params(axis="x", labelsize=8, which="both")
    return figure


def over_tokens(title: str, found: Sequence[Entry], under: str) -> Figure:
    """Milliseconds of a token by how many were generated before it, from zero."""
    figure, axes = _empty(title, "tokens generated", under)
    _bands(axes, found, [_by_tokens(entry) for entry in found], even=True)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_ylabel("ms a token", color=GREY)
    _legend(axes)
    return figure


def over_steps(title: str, found: Sequence[Entry], unit: str, chance: float, under: str) -> Figure:
    """What validation said during training, in the plan's unit."""
    points = [_by_step(entry) for entry in found]
    if unit == "bits per byte":
        figure, panels = _of_bits(title, "steps", under, found, points)
        for axes in panels:
            axes.set_xlim(left=0)
        return figure
    figure, axes = _empty(title, "steps", under)
    _bands(axes, found, points)
    axes.set_xlim(left=0)
    if unit == "accuracy":
        _accuracy(axes, chance)
        return figure
    axes.set_ylabel(unit, color=GREY)
    axes.set_yscale("log")
    _line(axes, chance, "a constant")
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG for pages and as SVG for print, the same bytes for the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        for kind in (".png", ".svg"):
            figure.savefig(path.with_suffix(kind), metadata={"Date": None} if kind == ".svg" else None)


def _by_length(entry: Entry, test: str) -> Points:
    return _by_name(entry, re.escape(test) + r", to (\d+)")


def _by_tokens(entry: Entry) -> Points:
    return _by_name(entry, r"ms at ([\d,]+)")


def _by_name(entry: Entry, pattern: str) -> Points:
    """The metrics that have a number in their names."""
    found: Points = {}
    for line in entry.lines:
        for name, metric in line.metrics.items():
            if match := re.fullmatch(pattern, name):
                found.setdefault(int(match[1].replace(",", "")), []).append(metric.value)
    return found


def _by_step(entry: Entry) -> Points:
    found: Points = {}
    for line in entry.lines:
        if validation := line.curve.get("validation"):
            for step, value in zip(line.curve["step"], validation, strict=True):
                found.setdefault(int(step), []).append(value)
    return found


def _bands(axes: Axes, found: Sequence[Entry], points: Sequence[Points], *, even: bool = False) -> None:
    """All contestants; `even`: lines of one width, since none lies on another."""
    for colour, entry, mine in zip(cycle(COLOURS), found, points, strict=False):
        if not mine:
            continue
        x = sorted(mine)
        means = [_mean(mine[at]) for at in x]
        said = f"{entry.label} {entry.model}" if not set(entry.model) - set("ms") else entry.label
        width = 1.8 if even else max(5.5 - 0.8 * len(axes.lines), 1.3)
        axes.plot(x, means, color=colour, marker="o", markersize=width + 1.7, linewidth=width, label=said)
        if max(map(len, mine.values())) > 1:
            low, high = [min(mine[at]) for at in x], [max(mine[at]) for at in x]
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _of_bits(
    title: str, below: str, under: str, found: Sequence[Entry], points: Sequence[Points]
) -> tuple[Figure, list[Axes]]:
    """Lower is better; beside all of them those that end near the best, if some do not."""
    ends = [_mean(mine[max(mine)]) for mine in points if mine]
    near = [end for end in ends if end <= FAR * min(ends)]
    apart = 1 < len(near) < len(ends)
    figure = Figure(figsize=(9 if apart else 7, 3.8), layout="constrained", dpi=130)
    panels = list(figure.subplots(1, 2 if apart else 1, squeeze=False).flat)
    for axes in panels:
        _bands(axes, found, points, even=True)
        _dress(axes, below)
    panels[0].set_ylabel("bits per byte", color=GREY)
    if apart:
        panels[1].set_title("those that end near the best", loc="left", fontsize=9, color=GREY)
        lowest = min(min(map(min, mine.values())) for mine in points if mine)
        panels[1].set_ylim(0.98 * lowest, HEADROOM * max(near))
    _legend(panels[-1])
    _name(figure, title, under)
    return figure, panels


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _empty(title: str, below: str, under: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 3.8), layout="constrained", dpi=130)
    axes = figure.subplots()
    _dress(axes, below)
    _name(figure, title, under)
    return figure, axes


def _dress(axes: Axes, below: str) -> None:
    axes.set_xlabel(below, color=GREY, fontsize=8.5)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=GREY, length=0)


def _name(figure: Figure, title: str, under: str) -> None:
    """Above what the picture shows, below how to make its numbers again."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    figure.supxlabel(under, color=GREY, fontsize=8.5)


def _accuracy(axes: Axes, chance: float) -> None:
    axes.set_ylabel("accuracy", color=GREY)
    axes.set_ylim(0, 1.04)
    _line(axes, chance, "chance")


def _line(axes: Axes, at: float, label: str) -> None:
    axes.axhline(at, color=GREY, linewidth=0.9, linestyle=":")
    axes.annotate(label, (1, at), xycoords=("axes fraction", "data"), xytext=(-4, 3), ha="right",
                  textcoords="offset points", color=GREY, fontsize=8)  # fmt: skip
    _legend(axes)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
