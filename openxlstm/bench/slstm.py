"""The sLSTM, forward and backward, beside the vanilla cell of `xlstm` and `nn.LSTM`: `python -m openxlstm.bench.slstm`.

One process, all sides in turn, medians. First our outputs and the peer's are compared with the definition in float64:
no time is printed for a wrong one. `nn.LSTM` is another cell of equal width, with one head, so it multiplies more; it
is here because it is what people have.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from openxlstm import kernels
from openxlstm.bench.peers import vanilla_slstm
from openxlstm.cells import slstm as definition

SHAPES = ((4, 512, 256, 4), (16, 256, 512, 4), (1, 512, 768, 4))  # B, T, D, H
LIMIT = 4e-5  # relative rms error against float64, fp32; the tests' own limit


@click.command()
@click.option("--runs", default=5, show_default=True, help="Timed runs of each side; the median counts.")
@click.option("--threads", default=0, help="Threads; 0 for PyTorch's default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write every number to this file.")
def main(runs: int, threads: int, json_file: Path | None) -> None:
    """Time the sLSTM's forward and backward pass against what is installed, after checking it."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    if importlib.util.find_spec("xlstm") is None:
        console.print("The peer is not installed: pip install --no-deps xlstm==2.0.6 (see PEERS in the Makefile)")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(f"sLSTM forward + backward, fp32, median of {runs} in ms; {machine}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("B T D H", "side", "error", "median", "fastest", "x ours"):
        table.add_column(column, justify="left" if column in ("B T D H", "side") else "right", no_wrap=True)
    rows = []
    for shape in SHAPES:
        for index, row in enumerate(compare(shape, runs)):
            rows.append(row)
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            times = f"{row['median_ms']:.1f}", f"{row['fastest_ms']:.1f}", f"{row['its_over_ours']:.2f}"
            table.add_row(" ".join(map(str, shape)) if index == 0 else "", row["side"], error, *times)
        table.add_section()
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def compare(shape: tuple[int, int, int, int], runs: int) -> list[dict[str, Any]]:
    """One row per side: error (None for another cell), median and fastest time, and the ratio of its median to ours."""
    B, T, D, H = shape
    K = D // H
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(B, T, 4, H, K, generator=generator).requires_grad_()
    R = (torch.randn(H, K, 4, K, generator=generator) * 0.3 / K**0.5).requires_grad_()
    b = torch.zeros(4, H, K).requires_grad_()
    cotangent = torch.randn(B, T, H, K, generator=generator)
    with torch.no_grad():
        truth, _ = definition.recurrent(gates[:1].double(), R.double(), b.double())

    def by(backend: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            h, _ = kernels.slstm(gates, R, b, backend=backend)
            torch.autograd.grad(h, (gates, R, b), cotangent)
            return h

        return run

    sides: dict[str, Callable[[], Tensor]] = {"openxlstm": by("auto"), "openxlstm, torch": by("torch")}
    if (vanilla := vanilla_slstm(gates, R, b)) is not None:
        forward, leaves = vanilla

        def peer() -> Tensor:
            h = forward()
            torch.autograd.grad(h, leaves, cotangent)
            return h

        sides["xlstm, vanilla"] = peer
    lstm, x = nn.LSTM(D, D, batch_first=True), torch.randn(B, T, D, generator=generator).requires_grad_()

    def other() -> Tensor:
        h, _ = lstm(x)
        torch.autograd.grad(h, [x, *lstm.parameters()], cotangent.flatten(2))
        return h

    errors: dict[str, float | None] = {name: _error(side()[:1], truth) for name, side in sides.items()}
    for name, found in errors.items():
        if found is None or not found <= LIMIT:
            raise click.ClickException(f"{name} at {shape} is off by {found}: no time is printed for a wrong result")
    sides["nn.LSTM"], errors["nn.LSTM"] = other, None
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            times[name].append(1e3 * (time.perf_counter() - began))
    median = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "shape": list(shape),
            "side": name,
            "error": errors[name],
            "median_ms": median[name],
            "fastest_ms": min(times[name]),
            "its_over_ours": median[name] / median["openxlstm"],
        }
        for name in sides
    ]


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want).square().mean().sqrt() / want.square().mean().sqrt())


if __name__ == "__main__":
    main()
