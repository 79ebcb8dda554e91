"""Worker processes that end with the one that started them, however that ends: an exception, Ctrl-C, SIGTERM, SIGKILL.

`ProcessPoolExecutor` waits for what its workers are in the middle of, and if it is killed they go on without it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Literal


@contextlib.contextmanager
def pool(
    count: int, method: Literal["spawn", "forkserver"], begin: Callable[[], None]
) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` workers. An exception that leaves the block ends them in the middle of what they do.

    Args:
        method: how workers are started. By fork each would hold the lines of those before it open.
        begin: what a worker does first.

    Raises:
        BrokenProcessPool: by what was submitted, if a worker was killed.
    """
    context = get_context(method)
    theirs, ours = context.Pipe(duplex=False)
    with theirs, ours, ProcessPoolExecutor(count, context, initializer=_begin, initargs=(begin, theirs)) as executor:
        try:
            yield executor
        except BaseException:
            ours.close()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(begin: Callable[[], None], line: Connection) -> None:
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    begin()


def _end_with(line: Connection) -> None:
    """Nothing is ever sent: what comes is the end of the line, which the system cuts for whoever was killed."""
    with contextlib.suppress(EOFError, OSError):
        line.recv_bytes()
    os._exit(1)
