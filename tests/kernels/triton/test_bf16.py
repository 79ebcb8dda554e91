"""bf16 without a GPU: every rounding of the kernels, by the cases, the bound and the definition of `make gpu`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux only")


@pytest.mark.slow
@pytest.mark.parametrize(("which", "count"), [("mlstm", 3), ("more", 5)])
def test_every_output_and_gradient_within_the_bound(which: str, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "interpreted_bf16.py", which],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == count
    for case in found:
        assert case["green"], case
        assert case["limit"] == 1e-2
