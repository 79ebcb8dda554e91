"""Reading data, beside the training that waits for it: `python -m openxlstm.bench.data`.

A token file of 10 GB (sparse, so it costs no disk; its index is real) is read in each kind of window, in the order of
training: tokens per second in the calling thread, and what the memory of the process grew by at most. In the same run
the smallest models that this project trains on a CPU take steps on rows of the same shape; the fastest of them is what
the ratio is taken with. First every kind of window is counted on a small folder: no number is printed for a reader
that loses or repeats a token.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from openxlstm.data.feed import WINDOWS, Feed
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import Shard, TokenFolder
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.train import optim
from openxlstm.train.loss import Rows
from openxlstm.train.objective import Objective
from openxlstm.train.recipe import OptimRecipe

CONTEXT, BATCH = 128, 16  # of recipes/stdlib-tiny.toml
MODELS = {  # name: (width, heads, pattern)
    "stdlib-tiny": (64, 4, "ms"),
    "m blocks only": (64, 4, "mm"),
}
MEAN_DOCUMENT = 1000  # tokens; lengths are log-normal, as those of texts are
_STATUS = Path("/proc/self/status")


@click.command()
@click.option("--gigabytes", default=10.0, show_default=True, help="Size of the token file, at 2 bytes a token.")
@click.option("--seconds", default=8.0, show_default=True, help="Reading time of each kind of window.")
@click.option("--threads", default=0, help="Threads of the training; 0 for PyTorch's default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write every number to this file.")
def main(gigabytes: float, seconds: float, threads: int, json_file: Path | None) -> None:
    """Time reading from a large token file against the fastest training on this machine."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    for window in WINDOWS:
        _count(window)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(f"rows of {CONTEXT} tokens, {BATCH} a step; {gigabytes:g} GB of tokens; {machine}")
    training = {name: _trained_per_second(*shape) for name, shape in MODELS.items()}
    fastest = max(training.values())
    with tempfile.TemporaryDirectory(prefix="openxlstm-bench-") as place:
        folder = _large_folder(Path(place), int(gigabytes * 1e9) // 2)
        reading = [_read(folder, window, seconds) for window in WINDOWS]

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "tokens/s", "ratio", "opened", "memory", "mapped"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, speed in training.items():
        table.add_row(f"training, {name}", f"{speed:,.0f}", "", "", "", "")
    table.add_section()
    for row in reading:
        table.add_row(
            f"reading, {row.window}",
            f"{row.per_second:,.0f}",
            f"{row.per_second / fastest:,.0f}",
            f"{row.opening:.1f} s",
            f"{row.grown / 1e6:.0f} MB",
            f"{row.mapped / 1e6:.0f} MB",
        )
    console.print(table)
    console.print(
        "ratio: to the fastest training. memory: most that the process's own grew by. mapped: the same for"
        " pages of files (tokens, index, plan), which the system takes back when it needs room.",
        soft_wrap=True,
    )
    if json_file is not None:
        rows: list[dict[str, Any]] = [{"training": name, "per_second": speed} for name, speed in training.items()]
        rows += [{name: getattr(row, name) for name in Reading.__slots__} for row in reading]
        facts = {"machine": machine, "gigabytes": gigabytes, "context": CONTEXT, "batch": BATCH, "rows": rows}
        json_file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Reading:
    """How fast one kind of window is read: tokens that count per second; seconds to open; bytes of memory grown by."""

    window: str
    per_second: float
    opening: float
    grown: int
    mapped: int
    steps: int


def _read(folder: TokenFolder, window: str, seconds: float) -> Reading:
    """Read steps of training, a hundred here and a hundred there, until the time is up."""
    began = time.perf_counter()
    feed = Feed.open([(folder, 1)], seed=1, window=window, context=CONTEXT, batch=BATCH, cache=folder.path)
    opening = time.perf_counter() - began
    steps = feed.epochs[0] // BATCH
    feed.portions(0)
    before, most = _memory(), (0, 0)
    tokens = done = 0
    spent = 0.0
    while spent < seconds:
        first = done * 7919 % steps  # a prime: all over the epoch
        began = time.perf_counter()
        for step in range(first, first + 100):
            for batch in feed.portions(step):
                tokens += int(batch.valid.sum())
        spent += time.perf_counter() - began
        done += 100
        own, mapped = _memory()
        most = max(most[0], own - before[0]), max(most[1], mapped - before[1])
    return Reading(window, tokens / spent, opening, *most, done)


def _trained_per_second(width: int, heads: int, pattern: str) -> float:
    """Tokens per second of whole steps: forward, loss, backward, optimiser. The fastest of 30, to our disadvantage."""
    tokenizer = Tokenizer.bytes()
    torch.manual_seed(0)
    model = xLSTM(xLSTMConfig(vocab_size=tokenizer.vocab_size, width=width, heads=heads, pattern=pattern))
    objective, optimiser = Objective(model), optim.build(model, OptimRecipe(lr=1e-3))
    feed = Feed.open([(_small_folder(), 1)], seed=1, window="stream", context=CONTEXT, batch=BATCH)
    bytes_of = torch.from_numpy(tokenizer.bytes_of.copy())
    times = []
    for step in range(33):
        rows = Rows.of(feed.portions(step)[0], torch.device("cpu"))
        scale = torch.tensor(1 / float(rows.valid.sum()), dtype=torch.float64)
        began = time.perf_counter()
        loss, _, _ = objective(rows.tokens, rows.targets, rows.reset, rows.valid, bytes_of, scale)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        times.append((time.perf_counter() - began) / BATCH / CONTEXT)
    return 1 / min(times[3:])


def _count(window: str) -> None:
    """Every token a target once per epoch, or no measurement."""
    folder = _small_folder()
    feed = Feed.open([(folder, 1)], seed=1, window=window, context=CONTEXT, batch=BATCH)
    batch = feed.rows(feed.samples(0, feed.epochs[0]))
    found = np.bincount(batch.targets[batch.valid], minlength=folder.tokenizer.vocab_size)
    if not np.array_equal(found, np.bincount(folder.shards[0].tokens, minlength=folder.tokenizer.vocab_size)):
        raise click.ClickException(f"{window}: an epoch is not the corpus; nothing is measured")


def _small_folder() -> TokenFolder:
    """Random bytes in documents of all lengths, in memory."""
    random = np.random.default_rng(0)
    ends = np.cumsum(_lengths(300))
    return _folder(Path("small"), random.integers(0, 256, ends[-1]).astype(np.uint16), ends)


def _large_folder(place: Path, tokens: int) -> TokenFolder:
    """A file of so many tokens, all 0, without blocks on the disk; its index is written and mapped."""
    ends = np.cumsum(_lengths(tokens // MEAN_DOCUMENT))
    ends = np.append(ends[ends < tokens], tokens)
    (place / "000_large.ds.index").write_bytes(ends.astype("<i8").tobytes())
    with open(place / "000_large.ds", "wb") as stream:
        stream.truncate(2 * tokens)
    return _folder(
        place,
        np.memmap(place / "000_large.ds", dtype="<u2", mode="r"),
        np.memmap(place / "000_large.ds.index", dtype="<i8", mode="r"),
    )


def _folder(path: Path, tokens: np.ndarray, ends: np.ndarray) -> TokenFolder:
    shard = Shard("000_large.ds", tokens, ends, len(tokens), "")
    return TokenFolder(path, Tokenizer.bytes(), 256, True, str(path), (shard,))


def _lengths(count: int) -> np.ndarray:
    spread = 1.2  # of the logarithm
    lengths = np.random.default_rng(1).lognormal(np.log(MEAN_DOCUMENT) - spread**2 / 2, spread, count)
    return np.maximum(lengths, 1).astype(np.int64)


def _memory() -> tuple[int, int]:
    """Bytes of this process in memory now: its own, and pages of mapped files. Linux only; elsewhere 0."""
    if not _STATUS.exists():
        return 0, 0
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    own, mapped = (int(lines[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))
    return own, mapped


if __name__ == "__main__":
    main()
