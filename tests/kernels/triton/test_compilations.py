"""One compilation serves every length and batch: keys of Triton's own cache, counted without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux only")
MLSTM = {
    "gates": 1,
    "sweep": 3,
    "output": 1,
    "row_dot": 1,
    "dq": 1,
    "dk": 1,
    "dv": 1,
    "dgates": 1,
}  # sweep: forth, forth again for the backward, back
EXPECTED = {
    "canary": {"canary": 3},
    "mlstm": MLSTM,
    "slstm": {"forward_resident": 1, "backward_resident": 1},
    "step": {"step": 1},
}


def test_no_length_and_no_batch_compiles_anew() -> None:
    done = subprocess.run(
        [sys.executable, HERE / "counted_compilations.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 1 + 3 * 2 * (4 + 2 + 1)
    for case in found:
        assert case["keys"] == EXPECTED[case["case"].split()[0]], case
        assert case["sizes"] > 20
