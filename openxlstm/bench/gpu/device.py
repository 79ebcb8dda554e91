"""The device of a run: its clock, its ceilings, and the sizes that suit it.

A call on a GPU is timed by two events. A write of 1 GB stands before each: it empties the second-level cache, and while
the GPU is busy with it the host comes far enough ahead that launching is not what is measured.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

FLUSH = 1 << 30  # bytes written before a call: many times a second-level cache
EDGE = 8192  # of the square matrices whose product is the ceiling of arithmetic
COPY = 1 << 30  # bytes of the copy that is the ceiling of memory; read and written


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a stage runs and until when. On a CPU everything is tiny and in fp32, which the interpreter can do."""

    device: str
    until: float  # of time.monotonic()
    shard: tuple[int, int] = (0, 1)  # this share of the stage's cases

    @property
    def small(self) -> bool:
        """Sizes for a test of the program."""
        return self.device == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """What is timed."""
        return torch.float32 if self.small else torch.bfloat16

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def randn(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers that depend on the seed alone, and on the kind of device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(dtype or self.dtype)

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.small:
            torch.cuda.synchronize()

    def timer(self, call: Callable[[], object], often: int) -> float:
        """Milliseconds of a call, the mean of `often`, each from a cold cache."""
        if self.small:
            call()
            return 1.0  # an interpreter's time means nothing: no number of it is ever written
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(often)]
        for begin, end in pairs:
            _dirt().zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / often

    def replayed(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as one CUDA graph: what is short is not measured together with its launch."""
        if self.small:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def product(self) -> tuple[Callable[[], object], float]:
        """PyTorch's product of two large square matrices, and its TFLOP."""
        edge = 32 if self.small else EDGE
        a, b = self.randn(edge, edge, seed=1), self.randn(edge, edge, seed=2)
        return lambda: a @ b, 2e-12 * edge**3

    def copy(self) -> tuple[Callable[[], object], float]:
        """A copy beyond the caches, and the GB that it reads and writes."""
        source = torch.empty(64 if self.small else COPY, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2e-9 * source.nbytes


@cache
def _dirt() -> Tensor:
    return torch.empty(FLUSH, dtype=torch.uint8, device="cuda")


def missing() -> str | None:
    """Why nothing can be measured here, in a sentence."""
    if not torch.cuda.is_available():
        return f"No GPU is here: torch {torch.__version__} finds no CUDA device, so nothing was run."
    return None


def describe(device: str) -> dict[str, Any]:
    """The device and the versions, for people."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy", "transformers"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    if device == "cpu":
        return {"device": "Triton's interpreter on a CPU", **facts}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_GB": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        **facts,
    }
