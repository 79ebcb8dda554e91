"""The mLSTM, forward and backward, beside the peers that are installed: `python -m openxlstm.bench.kernels`.

One process, one harness, both sides in turn, each with the layout it prefers; medians. First every result is compared
with the definition in float64: no time is printed for a wrong one. (The peers' kernels drop the gradient through the
normaliser, so only their outputs are compared.)
"""

from __future__ import annotations

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
from torch import Tensor

from openxlstm import kernels
from openxlstm.bench.peers import native_mlstm_kernels
from openxlstm.cells import mlstm as definition
from openxlstm.cells import mLSTMState

SHAPES = ((4, 4, 512, 64, 128), (1, 4, 2048, 64, 128), (1, 8, 2048, 256, 512))  # B, H, T, K, V
LIMIT = 4e-5  # relative rms error of ours against float64, fp32; the tests' own limit
PEER_LIMIT = 1e-3  # theirs, outputs only


@click.command()
@click.option("--runs", default=7, show_default=True, help="Timed runs of each side; the median counts.")
@click.option("--threads", default=0, help="Threads; 0 for PyTorch's default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write every number to this file.")
def main(runs: int, threads: int, json_file: Path | None) -> None:
    """Time the mLSTM's forward and backward pass against the installed peers, after checking both."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    peers = native_mlstm_kernels()
    if not peers:
        console.print("No peer is installed: pip install --no-deps mlstm_kernels==2.0.6 einops")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(f"mLSTM forward + backward, fp32, median of {runs} in ms; {machine}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("B H T K V", "kernel", "error", "median", "fastest", "ours / it"):
        table.add_column(column, justify="left" if column in ("B H T K V", "kernel") else "right", no_wrap=True)
    rows = []
    for shape in SHAPES:
        for row in compare(shape, peers, runs):
            rows.append(row)
            ours = row["kernel"] == "openxlstm"
            table.add_row(
                " ".join(map(str, shape)) if ours else "",
                row["kernel"],
                f"{row['error']:.0e}",
                f"{row['median_ms']:.1f}",
                f"{row['fastest_ms']:.1f}",
                "" if ours else f"{row['ours_over_it']:.2f}",
            )
        table.add_section()
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def compare(shape: tuple[int, ...], peers: dict[str, Callable[..., Tensor]], runs: int) -> list[dict[str, Any]]:
    """One row per kernel: error, median and fastest time, and the ratio of our median to its own."""
    B, H, T, K, V = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(*size, generator=generator) + mean).requires_grad_()

    inputs = [normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), normal(B, T, H), normal(B, T, H, mean=3.0)]
    cotangent = torch.randn(B, T, H, V, generator=generator)
    head_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth, _ = _chunkwise(exact)
    truth_gradients = torch.autograd.grad(truth, exact, cotangent.double())

    def ours() -> tuple[Tensor, ...]:
        h, _ = _ours(inputs)
        return h, *torch.autograd.grad(h, inputs, cotangent)

    def peer(kernel: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        theirs = cotangent.transpose(1, 2).contiguous()

        def run() -> tuple[Tensor, ...]:
            h = kernel(*head_first)
            return h, *torch.autograd.grad(h, head_first, theirs)

        return run

    errors = {"openxlstm": max(_error(a, b) for a, b in zip(ours(), (truth, *truth_gradients), strict=True))}
    sides = {"openxlstm": ours}
    for name, kernel in peers.items():
        sides[name] = peer(kernel)
        errors[name] = _error(sides[name]()[0].transpose(1, 2), truth)
    for name, found in errors.items():
        if not found <= (LIMIT if name == "openxlstm" else PEER_LIMIT):
            raise click.ClickException(
                f"{name} at {shape} is off by {found:.1e}: no time is printed for a wrong result"
            )
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
            "kernel": name,
            "error": errors[name],
            "median_ms": median[name],
            "fastest_ms": min(times[name]),
            "ours_over_it": median["openxlstm"] / median[name],
        }
        for name in sides
    ]


def _ours(x: list[Tensor]) -> tuple[Tensor, mLSTMState]:
    q, k, v, i, f = x
    return kernels.mlstm(q, k, v, i, f)


def _chunkwise(x: list[Tensor]) -> tuple[Tensor, mLSTMState]:
    q, k, v, i, f = x
    return definition.chunkwise(q, k, v, i, f, chunk=128)


def _error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach(), want.detach()
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


if __name__ == "__main__":
    main()
