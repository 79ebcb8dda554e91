"""One stage of `make gpu`, in a process of its own: a peer that crashes or hangs costs its stage and nothing else.

Every finding is a JSON line on standard output, of a kind: row, parity, curve, missing, failed, left, fact.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from openxlstm.bench.gpu.device import Setting
from openxlstm.bench.harness import Row

STAGES = {  # by importance: name -> module and function
    "parity": ("parity", "run"),
    "mlstm": ("kernels", "mlstm"),
    "step": ("kernels", "step"),
    "slstm": ("kernels", "slstm"),
    "train": ("models", "train"),
    "decode": ("models", "decode"),
    "compilations": ("kernels", "compilations"),
    "curve": ("models", "curve"),
}


def emit(kind: str, **facts: Any) -> None:
    """Say what was found."""
    print(json.dumps({"kind": kind, **facts}), flush=True)


def rows(suite: str, found: list[Row]) -> None:
    """Say what a case took."""
    for row in found:
        emit("row", suite=suite, row=asdict(row))


def case(setting: Setting, name: str, seconds: float, run: Callable[[], None]) -> None:
    """Run a case if it can be expected to end in time. What fails is said, and the next case runs."""
    if setting.left < seconds and not setting.small:
        emit("left", case=name, reason=f"{setting.left:.0f} s were left of the stage, it may take {seconds:.0f}")
        return
    try:
        run()
    except Exception as error:  # said in the report, which then is not green
        emit("failed", case=name, reason=sentence(error))


def sentence(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main(name: str, device: str, seconds: str, shard: str = "0/1") -> None:
    """Run a stage."""
    first, count = map(int, shard.split("/"))
    module, function = STAGES[name]
    setting = Setting(device, time.monotonic() + float(seconds), (first, count))
    getattr(importlib.import_module(f"openxlstm.bench.gpu.{module}"), function)(setting)
    emit("fact", done=name)


if __name__ == "__main__":
    main(*sys.argv[1:])
