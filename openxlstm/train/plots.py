"""The pictures of a run: bits per byte beside the yardsticks, loss, rate and gradient norm, context, gates, states.

Needs matplotlib. Only what was recorded is drawn.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

INK, GREY, FAINT = "#1f2933", "#7b8794", "#d9dee3"
TRAIN, VALID = "#3d7ea6", "#d1495b"
OTHERS = ("#66a182", "#edae49", "#8d6a9f", "#5c6b73")  # further validation sets, in turn
PANELS = (  # of gates.png: figure in the journal, title
    ("forget_mean", "share kept per step, mean of φ(f)"),
    ("forgetful", "share of gates that forget within 2 tokens"),
    ("input_max", "largest |i|"),
    ("m", "exponent m, lowest and highest"),
    ("state_log10", "log10 of the largest memory's norm"),
    ("floor", "share at the denominator's floor"),
)
Line = Mapping[str, Any]


def draw(
    folder: Path,
    lines: Sequence[Line],
    yardsticks: Mapping[str, float],
    held_out: float | None,
    events: Sequence[Line] = (),
    context: int | None = None,
) -> list[str]:
    """Write NAME.png into `folder` for all there is to see; returns the names, in the order to show them.

    Args:
        lines, events: of train.jsonl and events.jsonl; at least one step with a loss.
        yardsticks, held_out: bits per byte on the test split; None where there is none.
        context: tokens per row of the training.
    """
    steps = [line for line in lines if line.get("loss") is not None and line.get("grad_norm", 0.0) is not None]
    measured = [line for line in lines if "valid_loss" in line]
    pictures = {
        "bits_per_byte": _bits_per_byte(steps, measured, yardsticks, held_out),
        "loss": _loss(steps, measured),
        "learning_rate": _rate(steps),
    }
    if any("grad_norm" in line for line in steps):
        pictures["gradient_norm"] = _norm(steps, events)
    if any("lengths" in line for line in measured):
        pictures["context"] = _context([line for line in measured if "lengths" in line], context)
    if looks := [line for line in lines if line.get("gates")]:
        pictures["gates"] = _gates(looks)
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png")
    return list(pictures)


def _bits_per_byte(
    steps: Sequence[Line], measured: Sequence[Line], yardsticks: Mapping[str, float], held_out: float | None
) -> Figure:
    figure, axes = _canvas("Bits per byte", height=4.6)
    last = steps[-1]["step"]
    axes.grid(visible=False)  # the yardsticks are the grid
    _course(axes, steps, measured, "bits_per_byte", "valid_bits_per_byte")
    sets = sorted({name for line in measured for name in line.get("sets", {})})
    for name, colour in zip(sets, OTHERS * len(sets), strict=False):
        points = [(line["step"], line["sets"][name]["bits_per_byte"]) for line in measured if name in line["sets"]]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, marker="o", markersize=3, label=name)
    if sets:
        axes.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=INK)
    values = [line["bits_per_byte"] for line in steps]
    ends = values[-1:] if held_out is None else [held_out]
    bottom = 0.9 * min(*values, *ends, *yardsticks.values())
    top = min(max(values), max(4.0, 1.25 * ends[0]))  # the first steps fall from 8 bits and would flatten the rest
    axes.set_ylim(bottom, max(top, 1.05 * bottom))
    shown = {name: bits for name, bits in yardsticks.items() if bits < top}
    for bits in shown.values():
        axes.axhline(bits, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    labels = {f"{name.replace('byte n-gram, order', 'n-gram')}  {bits:.2f}": bits for name, bits in shown.items()}
    if held_out is not None:
        axes.plot(last, held_out, marker="D", markersize=7, color=INK, zorder=5, clip_on=False)
        labels[f"this model, held out  {held_out:.2f}"] = held_out
    if labels:
        _label_right(axes, labels, emphasised=held_out)
        figure.subplots_adjust(right=0.74)
    return figure


def _loss(steps: Sequence[Line], measured: Sequence[Line]) -> Figure:
    figure, axes = _canvas("Loss, nats per token")
    _course(axes, steps, measured, "loss", "valid_loss")
    return figure


def _rate(steps: Sequence[Line]) -> Figure:
    figure, axes = _canvas("Learning rate", height=2.6)
    taken = [line for line in steps if "skipped" not in line]
    axes.plot([line["step"] for line in taken], [line["lr"] for line in taken], color=TRAIN, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    return figure


def _norm(steps: Sequence[Line], events: Sequence[Line]) -> Figure:
    """The gradient norm before clipping, and where the guard had something to say."""
    figure, axes = _canvas("Gradient norm, before clipping", height=2.6)
    x, y = np.array([line["step"] for line in steps]), np.array([line["grad_norm"] for line in steps])
    axes.plot(x, y, color=TRAIN, linewidth=0.8, alpha=0.5)
    axes.plot(x, _running_mean(y), color=TRAIN, linewidth=1.8)
    if y.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    for name, colour in (("spike", OTHERS[1]), ("skip", VALID), ("rollback", INK)):
        at = [event["step"] for event in events if event.get("event") == name]
        for index, step in enumerate(at):
            label = None if index else f"{name} ({len(at)})"
            axes.axvline(step, color=colour, linewidth=1.0, alpha=0.6, label=label, zorder=1)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", fontsize=9, labelcolor=INK, edgecolor="none", framealpha=0.9)
    return figure


def _context(measured: Sequence[Line], trained: int | None) -> Figure:
    """Left: the same targets with more and more context. Right: targets by how much came before them in their row."""
    figure = Figure(figsize=(9, 3.8), dpi=144, facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.075, right=0.97, top=0.87, bottom=0.15, wspace=0.08)
    _dress(left, "Bits per byte, by length of context", "tokens in a row, each row from an empty state")
    _dress(right, "Bits per byte, by position", "tokens before the target in the longest row")
    shades = colormaps["Blues"](np.linspace(0.25, 0.95, len(measured)))
    for line, shade in zip(measured, shades, strict=True):
        style = {"color": shade, "linewidth": 1.8 if line is measured[-1] else 0.9, "marker": "o", "markersize": 3}
        rows, places = line["lengths"], line["positions"]
        left.plot([row["length"] for row in rows], [row["bits_per_byte"] for row in rows], **style)
        middle = [(row["from"] + row["to"]) / 2 for row in places]
        right.plot(middle, [row["bits_per_byte"] for row in places], **style, label=f"step {line['step']:,}")
    if trained is not None:
        for axes in (left, right):
            axes.axvline(trained, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        top = left.get_ylim()[1]
        left.text(trained, top, "  trained at", color=GREY, fontsize=8, va="top", ha="left")
    for axes, marks in ((left, [row["length"] for row in measured[-1]["lengths"]]), (right, [])):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if marks:
            axes.xaxis.set_major_locator(FixedLocator(marks))
    handles, names = right.get_legend_handles_labels()
    right.legend(
        handles[:: max(1, len(handles) - 1)], names[:: max(1, len(names) - 1)], loc="upper right", frameon=False,
        fontsize=9, labelcolor=INK,
    )  # fmt: skip
    return figure


def _gates(looks: Sequence[Line]) -> Figure:
    """A panel per figure, a line per layer: the first layers light, the last ones dark; sLSTM layers dashed."""
    figure = Figure(figsize=(9, 6.6), dpi=144, facecolor="white")
    grid = figure.subplots(3, 2)
    figure.subplots_adjust(left=0.075, right=0.865, top=0.945, bottom=0.075, hspace=0.5, wspace=0.16)
    x = [line["step"] for line in looks]
    layers = looks[-1]["gates"]
    shades = colormaps["viridis_r"](np.linspace(0.08, 0.95, len(layers)))
    for axes, (figure_name, title) in zip(grid.flat, PANELS, strict=True):
        _dress(axes, title, "step" if axes in grid[-1] else "")
        for index, (layer, shade) in enumerate(zip(layers, shades, strict=True)):
            style = {"color": shade, "linewidth": 1.3, "linestyle": "-" if layer["kind"] == "m" else (0, (4, 2))}
            for name in ("m_min", "m_max") if figure_name == "m" else (figure_name,):
                y = [line["gates"][index][name] for line in looks]
                label = f"{index} {layer['kind']}LSTM" if name == PANELS[0][0] else None
                axes.plot(x, [math.nan if value is None else value for value in y], **style, label=label, marker=".")
    handles, names = grid.flat[0].get_legend_handles_labels()
    every = max(1, len(handles) // 16)
    figure.legend(handles[::every], names[::every], loc="center right", frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _canvas(title: str, height: float = 3.6) -> tuple[Figure, Axes]:
    """An empty picture in the house style. A Figure of its own: no global state, no window system."""
    figure = Figure(figsize=(9, height), dpi=144, facecolor="white")
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.075, right=0.97, top=1 - 0.42 / height, bottom=0.52 / height)
    _dress(axes, title, "step", size=12)
    return figure, axes


def _dress(axes: Axes, title: str, below: str, size: int = 10) -> None:
    """The house style: a title at the left, a faint grid, no frame."""
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold", color=INK, pad=10 if size > 10 else 6)
    axes.set_xlabel(below, color=GREY, fontsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(which="both", colors=GREY, labelsize=9, length=0)
    axes.margins(x=0.01 if size > 10 else 0.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _course(axes: Axes, steps: Sequence[Line], measured: Sequence[Line], trained: str, validated: str) -> None:
    """The training value, every step faint and their running mean strong, and the validations."""
    x, y = np.array([line["step"] for line in steps]), np.array([line[trained] for line in steps])
    axes.plot(x, y, color=TRAIN, alpha=0.22, linewidth=0.8)
    axes.plot(x, _running_mean(y), color=TRAIN, linewidth=1.8, label="training, running mean")
    if measured:
        valid_x, valid_y = [line["step"] for line in measured], [line[validated] for line in measured]
        axes.plot(valid_x, valid_y, color=VALID, linewidth=1.4, marker="o", markersize=4, label="validation", zorder=4)
    axes.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=INK)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a thirtieth of the run; the window shrinks at both ends instead of inventing values."""
    half = len(values) // 60
    sums = np.concatenate(([0.0], np.cumsum(values)))
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _label_right(axes: Axes, labels: dict[str, float], emphasised: float | None) -> None:
    """Names at the right end of their values, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    ordered = sorted(labels.items(), key=lambda item: item[1])
    places = _apart(np.array([value for _, value in ordered]), 0.054 * (top - bottom))
    for (text, value), place in zip(ordered, places, strict=True):
        strong = value == emphasised
        axes.annotate(
            text,
            xy=(1.0, value),
            xytext=(1.04, float(place)),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            color=INK if strong else GREY,
            fontweight="bold" if strong else "normal",
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": INK if strong else GREY,
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 2,
            },
        )


def _apart(values: np.ndarray, distance: float) -> np.ndarray:
    """Places near the sorted `values`, each at least `distance` above the one below, moved as little as possible.

    Least squares under that rule, by pooling neighbours that collide.
    """
    pools: list[tuple[float, int]] = []  # mean and number of values, each lowered by its rank times the distance
    for rank, value in enumerate(values.tolist()):
        mean, count = value - rank * distance, 1
        while pools and pools[-1][0] >= mean:
            below, many = pools.pop()
            mean, count = (mean * count + below * many) / (count + many), count + many
        pools.append((mean, count))
    lowered = np.repeat([mean for mean, _ in pools], [count for _, count in pools])
    return lowered + distance * np.arange(len(values))
