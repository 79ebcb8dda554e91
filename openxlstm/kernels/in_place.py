"""Whether a step may write the new state where the old one lies.

The operations are functional: what comes in stays what it was, so states can be forked and kept. A decoder that owns
its buffers and has no use for the old state says so around a step; a backend that can saves itself a second memory,
and any other ignores it. Per thread and task, for others may be computing with states that they keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ALLOWED: ContextVar[bool] = ContextVar("openxlstm_states_may_be_overwritten", default=False)


@contextmanager
def states_may_be_overwritten() -> Iterator[None]:
    """Within: single steps without gradients may update the state that they are given, and return it."""
    token = _ALLOWED.set(True)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def may_overwrite() -> bool:
    """Whether that was said here. Never while a graph is traced: a compiled function would keep the answer."""
    return not torch.compiler.is_compiling() and _ALLOWED.get()
