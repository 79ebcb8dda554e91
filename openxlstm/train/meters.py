"""What a run costs: tokens per second, share of the device's peak, memory, and where the time of a step goes.

The loop says when a part of a step begins and ends (`time`) and when a step is over (`step`); `line` says what happened
since the last line and begins a new window. Time spent on evaluation and saving is not training: it is kept out of
every rate and reported apart.

    tokens_per_second    valid targets of all processes / seconds of training in the window
    mfu                  3 x forward FLOPs of the tokens computed / seconds / peak of all devices; masked positions are
                         computed too, so they count; left out where the peak is not known
    utilisation          valid targets / positions computed
    data_wait            share of the training time that the loop waited for data
    step_p50, step_p95   seconds per step: the median, and what one step in twenty exceeds
    memory               bytes: on a GPU the peaks of what tensors held and of what PyTorch reserved, since the window
                         began; on a CPU the largest resident size of this process so far
    seconds_left         (last step - this step) x median step, and the same share of evaluation and saving as so far
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from openxlstm.train.gpus import peak_flops

Part = Literal["data", "forward", "backward", "optimiser", "evaluate", "save", "gates"]
NOT_TRAINING: tuple[Part, ...] = ("evaluate", "save", "gates")


class Meters:
    """Counters of one sitting. Only clocks are read: nothing here waits for a device."""

    def __init__(
        self,
        flops_per_token: int,
        device: torch.device,
        *,
        ranks: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            flops_per_token: of a forward pass (`models.accounting.flops_per_token`).
            ranks: processes with a device like this one each, whose tokens `step` counts together.
            clock: seconds, rising.
        """
        self._flops, self._device, self._ranks, self._clock = flops_per_token, device, ranks, clock
        peak = peak_flops(device)
        self._peak = None if peak is None else peak * ranks
        self._apart_total = self._stepping_total = 0.0
        self.start()

    def start(self) -> None:
        """Begin a window here: what was before is not counted."""
        self._parts: dict[str, float] = {}
        self._steps: list[float] = []
        self._tokens = self._slots = 0
        self._last = self._clock()
        self._apart = 0.0  # seconds of NOT_TRAINING since the last step
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    @contextmanager
    def time(self, part: Part) -> Iterator[None]:
        """Count the block's seconds as `part`. On a GPU the calls are counted, which return before the work is done."""
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            self._parts[part] = self._parts.get(part, 0.0) + seconds
            if part in NOT_TRAINING:
                self._apart += seconds

    def step(self, tokens: int, slots: int) -> None:
        """A step is over: `tokens` valid targets of `slots` positions, in all processes together."""
        now = self._clock()
        seconds = now - self._last - self._apart
        self._steps.append(seconds)
        self._apart_total += self._apart
        self._stepping_total += seconds
        self._last, self._apart = now, 0.0
        self._tokens += tokens
        self._slots += slots

    @property
    def since_line(self) -> int:
        """Steps in this window."""
        return len(self._steps)

    def line(self, step: int, end: int) -> dict[str, Any]:
        """The figures of this window, for the journal, at `step` of `end`; then a new window begins."""
        assert self._steps, "a window without a step has no figures"
        training = sum(self._steps)
        rate = self._tokens / training
        found: dict[str, Any] = {
            "tokens_per_second": round(rate, 1),
            "utilisation": round(self._tokens / self._slots, 4),
            "data_wait": round(min(1.0, self._parts.get("data", 0.0) / training), 4),
            "step_p50": round(quantile(self._steps, 0.5), 6),
            "step_p95": round(quantile(self._steps, 0.95), 6),
            "memory": self._memory(),
            "seconds_left": round(self._left(step, end), 1),
        }
        if self._ranks > 1:
            found["tokens_per_second_per_device"] = round(rate / self._ranks, 1)
        if self._peak is not None:
            found["mfu"] = round(3 * self._flops * self._slots / training / self._peak, 4)
        for part in NOT_TRAINING:
            if part in self._parts:
                found[f"{part}_seconds"] = round(self._parts[part], 3)
        self._parts, self._steps, self._tokens, self._slots = {}, [], 0, 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return found

    def _left(self, step: int, end: int) -> float:
        around = self._apart_total / self._stepping_total if self._stepping_total else 0.0
        return max(0, end - step) * quantile(self._steps, 0.5) * (1 + around)

    def _memory(self) -> dict[str, int]:
        if self._device.type == "cuda":
            return {
                "allocated": torch.cuda.max_memory_allocated(self._device),
                "reserved": torch.cuda.max_memory_reserved(self._device),
            }
        return {"resident": peak_resident()}


def peak_resident() -> int:
    """Bytes that this process has held in memory at most, from its start on."""
    unit = 1 if sys.platform == "darwin" else 1024  # the one thing on which the systems disagree
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed: always one that was measured."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
