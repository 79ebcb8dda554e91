"""What belongs to one sitting of a run and to none of its results: the clock, and wishes to stop."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# Ctrl-C; what a scheduler or torchrun sends; what Slurm sends some time before it (--signal=USR1@120)
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
PATIENCE = 1.0  # seconds in which a second signal is the echo of the first: a launcher passes on what came to all


@dataclass(slots=True)
class Clock:
    """Seconds of training in this sitting and in all of them, and the pace."""

    before: float  # seconds of earlier sittings
    first: int  # the step this sitting began at
    began: float

    @classmethod
    def start(cls, elapsed: float, step: int) -> "Clock":
        """Begin to count, `elapsed` seconds and `step` steps into the run."""
        return cls(elapsed, step, time.perf_counter())

    def elapsed(self) -> float:
        """Seconds over all sittings."""
        return self.before + time.perf_counter() - self.began

    def pace(self, step: int) -> float:
        """Seconds per step in this sitting, measurements and saves included; 0 before its first step is done."""
        return (self.elapsed() - self.before) / max(1, step - self.first)


class Stop:
    """Set by a signal: the run saves after the step it is in. A second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._when = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        now = time.monotonic()
        if self.asked and number == signal.SIGINT and now - self._when > PATIENCE:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._when = True, now


@contextmanager
def wishes() -> Iterator[Stop]:
    """Turn signals into a wish that the loop grants after its step. Outside the main thread: no wishes."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
