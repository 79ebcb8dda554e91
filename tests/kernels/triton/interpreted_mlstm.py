"""Run by test_mlstm.py in a process of its own: Triton decides at import whether kernels are interpreted.

The mLSTM over a sequence, through the door, on CPU tensors, against the definition in float64 from the same rounded
inputs: every output and every gradient, no norm in the loss, fresh memory full of NaN.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from support import B, assert_equal, mlstm_inputs, mlstm_results, mlstm_state, random_flags, unchanged

from openxlstm import kernels
from openxlstm.cells import mlstm, mLSTMState

LIMIT = 1e-4


def double(x):
    return x.detach().double().requires_grad_(x.requires_grad)


def check(
    T: int, K: int, V: int, gate: str, flags: dict, chunk=None, dtype=torch.float32, limit=LIMIT, **means
) -> None:
    x = mlstm_inputs(T, K=K, V=V, dtype=dtype, **means)
    if "mask" in flags:
        with torch.no_grad():
            for part in x:
                part[~flags["mask"]] = torch.nan  # what does not exist may hold anything
    state = mlstm_state(K=K, V=V, dtype=torch.float32, stabilised=gate == "exp")
    if gate == "sigmoid":
        state = mLSTMState(state.C, torch.zeros_like(state.n).requires_grad_(), state.m)
    want = mlstm_results(mlstm.recurrent, [double(p) for p in x], state.map(double), input_gate=gate, **flags)
    door = partial(kernels.mlstm, backend="triton", chunk=chunk)
    with unchanged(*x, *state.tensors()):
        got = mlstm_results(door, x, state, input_gate=gate, **flags)
    assert got["h"].dtype == got["dq"].dtype == dtype
    assert got["C"].dtype == got["dC0"].dtype == torch.float32
    assert_equal(got, want, limit, f"T={T}, K={K}, V={V}, {gate}, {list(flags)}, chunk={chunk}, {dtype}, {means}")


def test_gates_and_flags() -> None:
    for gate in ("exp", "sigmoid", "sigmoid_normalized"):
        check(17, 5, 7, gate, {}, chunk=16)
        check(17, 20, 5, gate, random_flags(17), chunk=16)


def test_lengths() -> None:
    for T in (2, 15, 63, 64, 65, 130):
        check(T, 5, 7, "exp", random_flags(T))
    check(65, 5, 7, "exp", {"reset": torch.ones(B, 65, dtype=torch.bool), "mask": torch.zeros(B, 65, dtype=torch.bool)})


def test_chunks_and_gate_biases() -> None:
    for chunk, i_mean in ((16, -10.0), (32, 0.0), (64, -10.0), (1, 0.0), (1000, -10.0)):
        check(70, 16, 33, "exp", random_flags(70), chunk=chunk, i_mean=i_mean, f_mean=3.0)


def test_widths() -> None:
    for K, V in ((48, 60), (96, 40), (60, 192), (16, 256)):
        check(34, K, V, "exp", random_flags(34))


def test_float16() -> None:
    check(70, 20, 48, "exp", random_flags(70), dtype=torch.float16, limit=6e-3)


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty is NaN
    for name in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[name]()
        print("passed", name, flush=True)


if __name__ == "__main__":
    main()
