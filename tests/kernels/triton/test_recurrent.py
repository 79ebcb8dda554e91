"""The sLSTM's kernels and the mLSTM's step without a GPU: interpreted for their numbers, compiled for their size."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux only")
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may use
STACK = 136  # bytes per thread, 128 before Triton 3.9; all of it is spilled registers: docs/log.md has the list


def run(script: str, *arguments: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_interpreted() -> None:
    name = "test_strided_gates_and_part_gradients"
    assert run("interpreted_recurrent.py", name, TRITON_INTERPRET="1") == [f"passed {name}"]


@pytest.mark.slow
def test_interpreted_over_all_widths() -> None:
    names = [
        "test_mlstm_step",
        "test_mlstm_step_over_keys_wider_than_a_tile",
        "test_slstm",
        "test_spans_and_blocks_of_the_batch",
    ]
    assert run("interpreted_recurrent.py", *names, TRITON_INTERPRET="1") == [f"passed {name}" for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_ahead_of_time(arch: int, tmp_path: Path) -> None:
    lines = run("compiled_recurrent.py", str(arch), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    found = [json.loads(line) for line in lines]
    assert len(found) == (4 + 2) * 2 + 2  # widths in bf16 and fp32, forward and backward; a step of each dtype
    for built in found:
        assert built["shared"] <= SHARED[arch], built
        assert built["registers"] <= 255, built
        assert built["stack"] <= STACK, built
