"""One harness for every comparison: sides in turn, medians, a ceiling in the same turn, no time for a wrong result.

The speed of a shared machine drifts by the minute, so nothing is compared across runs: every side of a case takes its
turn in every round, and so does the ceiling, a large matrix product or a read of memory beyond the caches. What ran
before a side shows in its time (10 to 15 % behind a large product), so the order changes from round to round until
everybody has followed everybody equally often.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openxlstm.kernels.cpu.library import native

PEERS = ("xlstm", "mlstm_kernels", "transformers", "xllamacpp", "gguf")
OURS = "openxlstm"
EDGE = 1536  # of the square matrices whose product is the ceiling of arithmetic
SPREAD = 1 << 30  # bytes of the read that is the ceiling of memory: more than three times a large L3


@dataclass(frozen=True, slots=True)
class Side:
    """One way to do the work of a case. `error` was found before any time was taken; None where nothing compares."""

    name: str
    call: Callable[[], object]
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What one side of a case took, in ms a call; `of_ceiling` is its share of the ceiling, in the same rounds."""

    case: str
    side: str
    error: float | None
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    its_over_ours: float
    rate: float | None = None  # of what the case counts, a second
    unit: str | None = None
    of_ceiling: float | None = None


def measure(
    case: str,
    sides: Sequence[Side],
    runs: int,
    *,
    work: float | None = None,
    unit: str | None = None,
    ceiling: tuple[Callable[[], object], float] | None = None,
    repeat: int = 1,
    timer: Callable[[Callable[[], object], int], float] | None = None,
) -> list[Row]:
    """Rows of one case, ours first.

    Args:
        case: what is done, in a line.
        sides: the first is ours, which says nothing about its turn. Each is called once before the first round.
        runs: rounds; every side and the ceiling take one turn in each, in an order of its own.
        work: what one call does, in GFLOP or GB, and its `unit` per second.
        ceiling: a call, and the work it does in the same unit; its row is not in the result.
        repeat: calls in a turn, for those below a millisecond.
        timer: milliseconds of a call, given it and how often to repeat it; None for the host's clock.
    """
    assert sides[0].name == OURS, "ratios are to our side, which stands first"
    calls = {side.name: side.call for side in sides}
    if ceiling is not None:
        calls["ceiling"] = ceiling[0]
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for round_ in range(runs + 1):
        for name in (names[turn] for turn in turns(len(names), round_)):
            often = 1 if name == "ceiling" else repeat
            taken = (timer or by_the_clock)(calls[name], often)
            if round_:
                times[name].append(taken)
    median = {name: statistics.median(values) for name, values in times.items()}
    top = None if ceiling is None else ceiling[1] / median["ceiling"] * 1e3
    rows = []
    for side in sides:
        rate = None if work is None else work / median[side.name] * 1e3
        rows.append(
            Row(
                case, side.name, side.error, median[side.name], min(times[side.name]), max(times[side.name]),
                median[side.name] / median[OURS], rate, unit, None if rate is None or top is None else rate / top,
            )
        )  # fmt: skip
    return rows


def turns(count: int, round_: int) -> list[int]:
    """The order of a round: a Latin square in which over `count` rounds, or two times as many if `count` is odd,
    everybody takes every place and follows everybody else equally often (Williams 1949).
    """
    zigzag = [(turn + 1) // 2 if turn % 2 else count - turn // 2 for turn in range(count)]  # 0, 1, -1, 2, -2, ...
    order = [(place + round_) % count for place in zigzag]
    return order[::-1] if count % 2 and round_ // count % 2 else order


def by_the_clock(call: Callable[[], object], often: int) -> float:
    """Milliseconds of a call on this processor."""
    began = time.perf_counter()
    for _ in range(often):
        call()
    return 1e3 * (time.perf_counter() - began) / often


def gemm(dtype: torch.dtype = torch.float32) -> tuple[Callable[[], object], float]:
    """PyTorch's product of two large square matrices, and its GFLOP."""
    a, b = (torch.randn(EDGE, EDGE).to(dtype) for _ in range(2))
    return lambda: a @ b, 2e-9 * EDGE**3


def reading() -> tuple[Callable[[], object], float]:
    """A matrix-vector product beyond the caches, which does nothing but read, and its GB. PyTorch's own, in fp32."""
    matrix, x = torch.ones(SPREAD // 4 // 16384, 16384), torch.ones(16384)
    return lambda: matrix @ x, matrix.nbytes / 1e9


def check(side: str, case: str, error: float, limit: float) -> None:
    """Refuse to time what is wrong.

    Raises:
        ValueError: the error is above the limit, or NaN.
    """
    if not error <= limit:
        raise ValueError(f"{side}, {case}: off by {error:.1e}, allowed {limit:.0e}; no time is printed for it")


def relative(got: Tensor, want: Tensor) -> float:
    """Relative rms difference, in fp64."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def versions() -> dict[str, str | None]:
    """Of what is compared; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("openxlstm", *PEERS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """Processor, threads, instruction set of the native kernels, and the load of the minute before."""
    found = native()
    load = os.getloadavg()[0]
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native": found if isinstance(found, str) else found.name,
        "load_before": round(load, 2),
    }


def as_json(suites: dict[str, list[Row]], runs: int) -> dict[str, Any]:
    """Everything a reader needs to repeat and to judge it."""
    return {
        "machine": machine(),
        "versions": versions(),
        "runs": runs,
        "suites": {name: [asdict(row) for row in rows] for name, rows in suites.items()},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
