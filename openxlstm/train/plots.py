"""The pictures of a run: loss, bits per byte beside the yardsticks, learning rate. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

NAMES = ("bits_per_byte", "loss", "learning_rate")

INK, GREY, FAINT = "#1f2933", "#7b8794", "#d9dee3"
TRAIN, VALID = "#3d7ea6", "#d1495b"


def draw(folder: Path, lines: Sequence[dict[str, Any]], yardsticks: dict[str, float], held_out: float) -> None:
    """Write NAME.png for every name in `NAMES` into `folder`."""
    steps = [line for line in lines if "loss" in line]
    measured = [line for line in lines if "valid_loss" in line]
    _bits_per_byte(steps, measured, yardsticks, held_out).savefig(folder / "bits_per_byte.png")
    _loss(steps, measured).savefig(folder / "loss.png")
    _learning_rate(steps).savefig(folder / "learning_rate.png")


def _bits_per_byte(
    steps: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]], yardsticks: dict[str, float], held_out: float
) -> Figure:
    figure, axes = _canvas("Bits per byte", height=4.6)
    last = steps[-1]["step"]
    axes.grid(visible=False)  # the yardsticks are the grid
    _course(axes, steps, measured, "bits_per_byte", "valid_bits_per_byte")
    axes.plot(last, held_out, marker="D", markersize=7, color=INK, zorder=5, clip_on=False)
    values = [line["bits_per_byte"] for line in steps]
    bottom = 0.9 * min(*values, held_out, *yardsticks.values())
    top = min(max(values), max(4.0, 1.25 * held_out))  # the first steps fall from 8 bits and would flatten the rest
    axes.set_ylim(bottom, max(top, 1.05 * bottom))
    shown = {name: bits for name, bits in yardsticks.items() if bits < top}
    for bits in shown.values():
        axes.axhline(bits, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    labels = {f"{name.replace('byte n-gram, order', 'n-gram')}  {bits:.2f}": bits for name, bits in shown.items()}
    labels[f"this model, held out  {held_out:.2f}"] = held_out
    _label_right(axes, labels, emphasised=held_out)
    figure.subplots_adjust(right=0.74)
    return figure


def _loss(steps: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> Figure:
    figure, axes = _canvas("Loss, nats per token")
    _course(axes, steps, measured, "loss", "valid_loss")
    return figure


def _learning_rate(steps: Sequence[dict[str, Any]]) -> Figure:
    figure, axes = _canvas("Learning rate", height=2.6)
    axes.plot([line["step"] for line in steps], [line["lr"] for line in steps], color=TRAIN, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    return figure


def _canvas(title: str, height: float = 3.6) -> tuple[Figure, Axes]:
    """An empty picture in the house style. A Figure of its own: no global state, no window system."""
    figure = Figure(figsize=(9, height), dpi=144, facecolor="white")
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.075, right=0.97, top=1 - 0.42 / height, bottom=0.52 / height)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel("step", color=GREY, fontsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=9, length=0)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure, axes


def _course(
    axes: Axes, steps: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]], trained: str, validated: str
) -> None:
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


def _label_right(axes: Axes, labels: dict[str, float], emphasised: float) -> None:
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
