"""The in-tree xLSTM of transformers before and after `accelerate`: `python -m openxlstm.bench.takeover`.

Two copies of one model in one process, one of them taken over. Prefill of several lengths, and a token of decoding from
a state that has read 64, in fp32 and bf16. The sides run in turn, medians count. No number is printed before logits
agree: in fp32 with each other, in bf16 both with the fp32 run, ours no further from it.

transformers runs another implementation of the same model if the package `xlstm` is installed; `--without-xlstm` hides
that package, so that both can be measured on one machine.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

SIZES = {"small": (256, 4, 4), "medium": (768, 12, 4)}  # width, blocks, heads
LENGTHS = (63, 64, 65, 512)
BATCHES = (1, 8)
READ = 64  # tokens in the state that decoding starts from
LIMIT = 1e-4  # relative rms difference of fp32 logits: rounding in another order


@click.command()
@click.option("--size", type=click.Choice(sorted(SIZES)), default="small", show_default=True)
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--runs", default=7, show_default=True, help="Timed runs of each side; the median counts.")
@click.option("--threads", default=0, help="Threads; 0 for PyTorch's default.")
@click.option("--without-xlstm", is_flag=True, help="Hide the package `xlstm` from transformers.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write every number to this file.")
def main(size: str, dtype: str, runs: int, threads: int, without_xlstm: bool, json_file: Path | None) -> None:
    """Compare prefill and decoding of the in-tree model with the same model taken over."""
    if threads:
        torch.set_num_threads(threads)
    if without_xlstm:
        hide("xlstm")
    theirs, ours = pair(size)
    implementation = "without the package xlstm" if without_xlstm else "as transformers chooses"
    if dtype == "bf16":
        want = copy.deepcopy(ours)
        theirs, ours = theirs.bfloat16(), ours.bfloat16()
        check_half(theirs, ours, want)
    else:
        check_full(theirs, ours)
    rows = measure(theirs, ours, runs)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("work", "in-tree ms", "ours ms", "times faster"):
        table.add_column(column, justify="left" if column == "work" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["work"],
            f"{row['in_tree'] * 1e3:.2f}",
            f"{row['ours'] * 1e3:.2f}",
            f"{row['times_faster']:.2f}",
        )
    console = Console(soft_wrap=True)
    console.print(f"{size}, {dtype}, in-tree {implementation}, median of {runs}; {machine}")
    console.print(table)
    if json_file is not None:
        text = json.dumps({"machine": machine, "size": size, "dtype": dtype, "rows": rows}, indent=1) + "\n"
        json_file.write_text(text, encoding="utf-8")


def hide(package: str) -> None:
    """Let transformers find no such package; it asks once, when it is imported."""
    assert "transformers" not in sys.modules, "too late"
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: None if name == package else find(name, *more)  # type: ignore[assignment]


def pair(size: str) -> tuple[nn.Module, nn.Module]:
    """The in-tree model with lively weights, and a copy that is taken over."""
    from openxlstm.hf import accelerate, in_tree

    width, blocks, heads = SIZES[size]
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": width, "num_hidden_layers": blocks, "num_heads": heads}
    theirs = in_tree.fresh_model(sizes).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return theirs, accelerate(copy.deepcopy(theirs))


def tokens(batch: int, length: int) -> torch.Tensor:
    """The same ids at every call."""
    return torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def check_full(theirs: nn.Module, ours: nn.Module) -> None:
    """Refuse to go on unless both sides say the same, at once and token by token."""
    for length in LENGTHS:
        x = tokens(1, length)
        first, second = (decoded(model, x, 2) for model in (theirs, ours))
        if (gap := difference(second, first)) > LIMIT:
            raise SystemExit(
                f"logits of {length} tokens differ by {gap:.1e}, more than {LIMIT:.0e}: nothing was measured"
            )


@torch.no_grad()
def check_half(theirs: nn.Module, ours: nn.Module, want: nn.Module) -> None:
    """Refuse to go on if ours is further from the fp32 run than the in-tree model is."""
    for length in LENGTHS:
        x = tokens(1, length)
        first, second, exact = (decoded(model, x, 2) for model in (theirs, ours, want))
        if difference(second, exact) > 1.1 * difference(first, exact):
            raise SystemExit(
                f"logits of {length} tokens are {difference(second, exact):.1e} from the fp32 run, and those of the "
                f"in-tree model {difference(first, exact):.1e}: nothing was measured"
            )


def decoded(model: nn.Module, x: torch.Tensor, steps: int) -> torch.Tensor:
    """Logits [1, T, W] of all but the last `steps` tokens at once, and of those one at a time."""
    out = model(x[:, :-steps], use_cache=True)
    logits = [out.logits]
    for t in range(x.shape[1] - steps, x.shape[1]):
        out = model(x[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1).float()


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative rms."""
    return float((got - want).norm() / want.norm())


@torch.no_grad()
def measure(theirs: nn.Module, ours: nn.Module, runs: int) -> list[dict[str, Any]]:
    """Median seconds of both sides for every kind of work."""
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        x = tokens(1, length)
        row = turns(prefill(theirs, x), prefill(ours, x), runs, 1)
        rows.append({"work": f"prefill of {length}"} | row)
    for batch in BATCHES:
        row = turns(decode(theirs, batch), decode(ours, batch), runs, 10)
        rows.append({"work": f"a token, batch {batch}"} | row)
    return rows


def prefill(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Read a prompt, keeping the state."""
    return lambda: model(x, use_cache=True)


def decode(model: nn.Module, batch: int) -> Callable[[], object]:
    """Read one token more; the state moves on."""
    cache = model(tokens(batch, READ), use_cache=True).cache_params
    one = tokens(batch, 1)
    return lambda: model(one, cache_params=cache, use_cache=True)


def turns(theirs: Callable[[], object], ours: Callable[[], object], runs: int, repeat: int) -> dict[str, float]:
    """Both in turn, `runs` times each after one that does not count; a run is the mean of `repeat` calls.

    The ratio is the median over turns of theirs by ours: a machine that changes its speed changes both.
    """
    seconds: dict[str, list[float]] = {"in_tree": [], "ours": []}
    for run in range(runs + 1):
        for name, call in (("in_tree", theirs), ("ours", ours)):
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            if run:
                seconds[name].append((time.perf_counter() - start) / repeat)
    ratios = [first / second for first, second in zip(seconds["in_tree"], seconds["ours"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians | {"times_faster": statistics.median(ratios)}


if __name__ == "__main__":
    main()
