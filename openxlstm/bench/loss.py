"""The chunked loss of the readout beside the plain one: memory, time, equality. `python -m openxlstm.bench.loss`.

W = 50,304 entries, 8,192 tokens, D = 1,024 unless told otherwise; fp32, forward and backward, from hidden states.

Memory: each side in a process of its own, the highest resident size less what the process had before. Time: both sides
in one process in turn, medians. Neither is printed before losses and gradients have been compared, run by run.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openxlstm.nn.functional import soft_cap
from openxlstm.train.cross_entropy import linear_cross_entropy

LIMIT = 2e-6  # relative rms difference of the gradients in fp32: rounding in another order
SIDES = ("plain", "chunked", "chunked, recompute")


@click.command()
@click.option("--tokens", default=8192, show_default=True, help="Targets in the batch.")
@click.option("--vocabulary", default=50_304, show_default=True, help="Entries of the readout.")
@click.option("--width", default=1024, show_default=True, help="Width of the hidden states.")
@click.option("--chunk", default=2048, show_default=True, help="Tokens whose logits exist at one time.")
@click.option("--cap", default=0.0, show_default=True, help="Soft cap of the logits; 0 for none.")
@click.option("--recompute", is_flag=True, help="Also the form that recomputes the logits in the backward pass.")
@click.option("--runs", default=2, show_default=True, help="Timed runs of each side; the median counts.")
@click.option("--threads", default=0, help="Threads; 0 for PyTorch's default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write every number to this file.")
@click.option("--peak-of", type=click.Choice(SIDES), hidden=True, help="Print the peak of one side, in bytes.")
def main(
    tokens: int,
    vocabulary: int,
    width: int,
    chunk: int,
    cap: float,
    recompute: bool,
    runs: int,
    threads: int,
    json_file: Path | None,
    peak_of: str | None,
) -> None:
    """Compare the chunked cross-entropy with the plain one: gradients, peak memory, time."""
    if threads:
        torch.set_num_threads(threads)
    sides = _sides(tokens, vocabulary, width, chunk, cap or None, recompute)
    if peak_of is not None:
        click.echo(_peak(sides[peak_of]))
        return
    peaks = {name: _peak_elsewhere(name) for name in sides}
    differences, times = _compare(sides, runs)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("loss", "difference", "peak MB", "of plain", "seconds", "of plain"):
        table.add_column(column, justify="left" if column == "loss" else "right", no_wrap=True)
    rows = []
    for name in sides:
        row = {
            "loss": name,
            "difference": differences[name],
            "peak_bytes": peaks[name],
            "peak_of_plain": peaks[name] / peaks["plain"],
            "seconds": times[name],
            "time_of_plain": times[name] / times["plain"],
        }
        rows.append(row)
        table.add_row(
            name,
            f"{differences[name]:.0e}",
            f"{peaks[name] / 1e6:,.0f}",
            f"{row['peak_of_plain']:.2f}",
            f"{times[name]:.2f}",
            f"{row['time_of_plain']:.2f}",
        )
    console = Console(soft_wrap=True)
    console.print(
        f"{tokens:,} tokens, W = {vocabulary:,}, D = {width:,}, chunk {chunk:,}, fp32, median of {runs}; {machine}"
    )
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _sides(
    tokens: int, vocabulary: int, width: int, chunk: int, cap: float | None, recompute: bool
) -> dict[str, Callable[[], list[Tensor]]]:
    """Name to a function that returns loss, dh and dW."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul_(width**-0.5).requires_grad_()  # without a copy,
    # which would raise the highest resident size before anything is measured
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    valid = torch.rand(tokens, generator=generator) < 0.95

    def plain() -> list[Tensor]:
        logits = F.linear(hidden, weight)
        if cap is not None:
            logits = soft_cap(logits, cap)
        loss = F.cross_entropy(logits, torch.where(valid, targets, -100), reduction="sum")
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    def chunked(again: bool) -> list[Tensor]:
        loss = linear_cross_entropy(hidden, weight, targets, valid, soft_cap=cap, chunk=chunk, recompute=again).total
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    sides = {"plain": plain, "chunked": lambda: chunked(False)}
    return sides | ({SIDES[2]: lambda: chunked(True)} if recompute else {})


def _peak(side: Callable[[], list[Tensor]]) -> int:
    """Bytes by which the resident size of this process grew at most while `side` ran; inputs were there before."""
    torch.ones(8, 8) @ torch.ones(8, 8)  # libraries load on first use
    before = _highest()
    side()
    return _highest() - before


def _highest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_elsewhere(name: str) -> int:
    """The same command again, in a process that does nothing but this side."""
    command = [sys.executable, "-m", "openxlstm.bench.loss", *sys.argv[1:], "--peak-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _compare(sides: dict[str, Callable[[], list[Tensor]]], runs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Largest relative rms difference of loss, dh and dW from the plain ones, and median seconds; sides in turn."""
    differences: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    want: list[Tensor] = []
    for _ in range(runs):
        for name, side in sides.items():
            began = time.perf_counter()
            got = side()
            seconds[name].append(time.perf_counter() - began)
            want = got if name == "plain" else want
            differences[name] = max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))
            if not differences[name] <= LIMIT:
                raise click.ClickException(
                    f"{name} differs by {differences[name]:.1e}: no figure is printed for a wrong result"
                )
    return differences, {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
