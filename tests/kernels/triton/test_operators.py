"""The operators of the triton backend under PyTorch's own checks, without a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux only")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "interpreted"),
    [
        ("test_a_launch_has_a_size", "1"),
        ("test_opcheck", "1"),
        ("test_compiled_through_the_door", "1"),
        ("test_fake_tensors_on_a_gpu", "0"),
    ],
)
def test_operators(name: str, interpreted: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "interpreted_operators.py", name],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpreted}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"passed {name}"]
