"""The mLSTM's Triton kernels without a GPU: interpreted for their numbers, compiled for their size."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openxlstm.kernels import gpu
from openxlstm.kernels.dispatch import Call, resolve

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux only")
SPILLED = {
    (80, "sweep"): 32,
    (100, "row_dot"): 8,
}  # the latter in Triton 3.9; bytes of stack: known exceptions of bf16, by target and kernel (docs/log.md)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may use


def run(script: str, *arguments: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["test_gates_and_flags", "test_lengths", "test_chunks_and_gate_biases", "test_widths", "test_float16"]
)
def test_interpreted(name: str) -> None:
    assert run("interpreted_mlstm.py", name, TRITON_INTERPRET="1") == [f"passed {name}"]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_ahead_of_time(arch: int, tmp_path: Path) -> None:
    lines = run("compiled_mlstm.py", str(arch), "128x256", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    found = [json.loads(line) for line in lines]
    assert len(found) == 2 * 9  # dtypes x kernels
    for built in found:
        assert built["shared"] <= SHARED[arch], built
        if built["dtype"] == "bf16":
            assert built["stack"] <= SPILLED.get((arch, built["kernel"]), 0), f"spilled registers: {built}"
            products = built["kernel"] in ("sweep", "output", "dq", "dk", "dv")
            assert built["wgmma"] == (arch == 90 and products), built


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_MISSING", None)
    facts = dict(op="mlstm", device="cuda", dtype=torch.bfloat16, K=64, V=128, needs_grad=True)
    assert gpu.refuses(Call(**facts)) is None
    assert resolve(Call(**facts)).__name__ != gpu.__name__  # not before its gradients were tested on the hardware
    assert resolve(Call(**facts), "triton") is gpu
    for change, sentence in (
        ({"device": "cpu"}, "the tensors are on cpu"),
        ({"dtype": torch.float64}, "float64 is served by torch"),
        ({"K": 768}, "K=768 exceeds 512"),
        ({"op": "mlstm_step"}, "one step with gradients"),
        ({"forget_gate": "exp"}, "exponential forget gate"),
    ):
        assert sentence in (gpu.refuses(Call(**{**facts, **change})) or ""), change
    monkeypatch.setattr(gpu, "_MISSING", "Triton is not installed")
    with pytest.raises(ValueError, match="Triton is not installed"):
        resolve(Call(**facts), "triton")
