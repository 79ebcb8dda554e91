"""A program for test_checkpoints.py: kills itself at every point inside a save, and looks at what is left.

    python killed_saves.py FOLDER once|asynchronous

A point is a touch of the file system (what Python audits: open, mkdir, rename, remove, rmdir, listdir; and fsync) or a
limit on how many bytes a file may have, which kills in the middle of a write. Every try is a fork of this process: it
saves step 2 beside a complete step 1, and dies by SIGKILL at its point. After it, here: the newest complete checkpoint
must load, its tensors must be those of its step, and the next save must clear away whatever was left.

Prints one line of JSON: how many points there were, and how often step 2 was already complete.
"""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from openxlstm.train import checkpoints
from openxlstm.train.checkpoints import Progress
from openxlstm.train.ema import EMA
from openxlstm.train.recipe import CheckpointRecipe

AUDITED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}
BYTES = (0, 1, 100, 1_000, 3_000, 10_000)
KEEP = CheckpointRecipe(keep_last=1)


class Run:
    """A small model whose every number says at which step it was saved."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3))
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.ema = EMA(self.model, 0.9)

    def save(self, folder: Path, step: int, asynchronous: bool) -> None:
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.fill_(step)
        pending = checkpoints.save(
            folder, self.model, self.optimiser, Progress(step=step), {}, ema=self.ema,
            extra={"lanes": torch.full((4,), float(step))}, keep=KEEP, asynchronous=asynchronous,
        )  # fmt: skip
        pending.wait()

    def check(self, folder: Path) -> int:
        """The step of the newest complete checkpoint, which must be whole."""
        path = checkpoints.latest(folder)
        assert path is not None, "no checkpoint at all"
        step = checkpoints.load(path, self.model, self.optimiser, ema=self.ema).step
        assert all(bool((weight == step).all()) for weight in self.model.parameters()), "tensors of another step"
        assert checkpoints.read_tensors(path, "extra")["lanes"].tolist() == [float(step)] * 4
        return step


def die_at_touch(point: int) -> None:
    """Arm this process: at its `point`-th touch of the file system it is gone."""
    touched = 0

    def touch(event: str, _: object = None) -> None:
        nonlocal touched
        if event in AUDITED:
            touched += 1
            if touched == point:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync

    def watched(descriptor: int) -> None:
        touch("open")
        fsync(descriptor)

    os.fsync = watched
    sys.addaudithook(touch)


def die_at_size(size: int) -> None:
    """Arm this process: the write that makes a file longer than `size` bytes is its last."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def main(folder: Path, asynchronous: bool) -> None:
    run, points, complete = Run(), 0, 0

    def survived(arm: Callable[[], None]) -> bool:
        """One save in a fork that `arm` has armed; then everything that must hold. Whether the fork lived."""
        nonlocal points, complete
        shutil.rmtree(folder, ignore_errors=True)
        run.save(folder, 1, False)
        child = os.fork()
        if not child:
            arm()
            run.save(folder, 2, asynchronous)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        step = run.check(folder)
        if os.WIFSIGNALED(status):
            points += 1
            complete += step == 2
        else:
            assert (os.WEXITSTATUS(status), step) == (0, 2), f"a save that was not killed failed: {status}"
        run.save(folder, 3, False)
        assert run.check(folder) == 3
        left = sorted(path.name for path in folder.iterdir())
        assert left == ["step-00000003"], f"leftovers: {left}"
        return not os.WIFSIGNALED(status)

    point = 1
    while not survived(partial(die_at_touch, point)):
        point += 1
    for size in BYTES:
        assert not survived(partial(die_at_size, size)), f"no file of the save is longer than {size} bytes"
    print(json.dumps({"points": points, "complete": complete}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2] == "asynchronous")
