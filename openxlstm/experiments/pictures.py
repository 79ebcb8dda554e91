"""The pictures of the page: accuracy over the length of the sample, validation over steps. Needs matplotlib.

A line is a contestant at its chosen rate, the mean over its seeds; the band is from the worst seed to the best. Later
lines are thinner, so that those beneath them are seen where several are perfect.
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

INK, GREY, FAINT = "#1f2933", "#7b8794", "#d9dee3"
COLOURS = (
    "#d1495b", "#edae49", "#8d6a9f", "#3d7ea6", "#66a182", "#5c6b73", "#b07d62", "#00798c", "#2b2d42", "#a3b18a",
)  # fmt: skip


def over_length(title: str, found: Sequence[Entry], tests: Sequence[str], chance: float, under: str) -> Figure:
    """Accuracy on the test samples by their length, in powers of two."""
    figure, axes = _empty(title, "tokens of the sample, up to", under)
    axes.set_xscale("log", base=2)
    ticks: set[int] = set()
    for colour, entry in zip(cycle(COLOURS), found, strict=False):
        points = {upper: values for test in tests for upper, values in _by_length(entry, test).items()}
        ticks |= set(points)
        _band(axes, sorted(points), [points[upper] for upper in sorted(points)], colour, entry.label, entry.model)
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    _accuracy(axes, chance)
    return figure


def over_positions(title: str, found: Sequence[Entry], under: str) -> Figure:
    """Bits per byte by the position in a window, in powers of two."""
    figure, axes = _empty(title, "position in the window, up to", under)
    axes.set_xscale("log", base=2)
    ticks: set[int] = set()
    for colour, entry in zip(cycle(COLOURS), found, strict=False):
        points = _by_length(entry, "positions")
        ticks |= set(points)
        _band(axes, sorted(points), [points[upper] for upper in sorted(points)], colour, entry.label, entry.model)
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    axes.set_ylabel("bits per byte", color=GREY)
    _legend(axes)
    return figure


def over_tokens(title: str, found: Sequence[Entry], under: str) -> Figure:
    """Milliseconds of a token by how many were generated before it, from zero."""
    figure, axes = _empty(title, "tokens generated", under)
    for colour, entry in zip(cycle(COLOURS), found, strict=False):
        points: dict[int, list[float]] = {}
        for line in entry.lines:
            for name, metric in line.metrics.items():
                if match := re.fullmatch(r"ms at ([\d,]+)", name):
                    points.setdefault(int(match[1].replace(",", "")), []).append(metric.value)
        _band(axes, sorted(points), [points[n] for n in sorted(points)], colour, entry.label, entry.model)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_ylabel("ms a token", color=GREY)
    _legend(axes)
    return figure


def over_steps(title: str, found: Sequence[Entry], unit: str, chance: float, under: str) -> Figure:
    """What validation said during training, in the plan's unit."""
    figure, axes = _empty(title, "steps", under)
    for colour, entry in zip(cycle(COLOURS), found, strict=False):
        curves = [line.curve["validation"] for line in entry.lines if line.curve.get("validation")]
        if curves:
            steps = [int(step) for step in entry.lines[0].curve["step"]]
            _band(axes, steps, [list(at) for at in zip(*curves, strict=True)], colour, entry.label, entry.model)
    axes.set_xlim(left=0)
    if unit == "accuracy":
        _accuracy(axes, chance)
        return figure
    axes.set_ylabel(unit, color=GREY)
    if unit == "squared error":
        axes.set_yscale("log")
        _line(axes, chance, "a constant")
    else:
        _legend(axes)
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG for pages and as SVG for print, the same bytes for the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        for kind in (".png", ".svg"):
            figure.savefig(path.with_suffix(kind), metadata={"Date": None} if kind == ".svg" else None)


def _by_length(entry: Entry, test: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for line in entry.lines:
        for name, metric in line.metrics.items():
            if match := re.fullmatch(re.escape(test) + r", to (\d+)", name):
                found.setdefault(int(match[1]), []).append(metric.value)
    return found


def _band(axes: Axes, x: Sequence[int], values: Sequence[Sequence[float]], colour: str, label: str, model: str) -> None:
    if not x:
        return
    means = [sum(at) / len(at) for at in values]
    said = f"{label} {model}" if not set(model) - set("ms") else label
    width = max(5.5 - 0.8 * len(axes.lines), 1.3)
    axes.plot(x, means, color=colour, marker="o", markersize=width + 1.7, linewidth=width, label=said)
    if max(map(len, values)) > 1:
        axes.fill_between(
            x, [min(at) for at in values], [max(at) for at in values], color=colour, alpha=0.15, linewidth=0
        )


def _empty(title: str, below: str, under: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 3.8), layout="constrained", dpi=130)
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(f"{below}\n{under}", color=GREY, fontsize=8.5)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=GREY, length=0)
    return figure, axes


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
