"""Run by test_recurrent.py in a process of its own: Triton decides at import whether kernels are interpreted.

The sLSTM's sweeps and both steps, on CPU tensors, against the definition in float64 from the same rounded inputs:
every output and every gradient, no norm in the loss.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from support import (
    B,
    H,
    assert_equal,
    mlstm_inputs,
    mlstm_state,
    random_flags,
    slstm_inputs,
    slstm_results,
    slstm_state,
    unchanged,
)  # fmt: skip

import openxlstm as ox
from openxlstm.cells import mlstm, mLSTMState, slstm, sLSTMState
from openxlstm.infer.graph import GraphDecoder
from openxlstm.kernels.triton import recurrent, recurrent_ops
from openxlstm.kernels.triton import slstm as sweeps
from openxlstm.kernels.triton.mlstm_step import step_in_place

LIMIT = 1e-4


def door(gates, R, b, state=None, *, reset=None, mask=None, forget_gate="sigmoid"):
    state = sLSTMState.empty(gates.shape[0], *gates.shape[-2:]) if state is None else state
    return recurrent.slstm(gates, R, b, state, reset=reset, mask=mask, forget_gate=forget_gate)


def double(x):
    return x.detach().double().requires_grad_(x.requires_grad)


def check_slstm(K: int, T: int, forget_gate: str, flags: dict, dtype: torch.dtype, limit: float) -> None:
    x = slstm_inputs(T, K=K, dtype=dtype)
    with torch.no_grad():
        x[1] *= min(1.0, (8 / K) ** 0.5)  # R as large as a model's: chaos would measure the problem, not the kernel
        x[0][:, :, 1] -= 2.0 if forget_gate == "exp" else 0.0
        if "mask" in flags:
            x[0][~flags["mask"]] = torch.nan  # what does not exist may hold anything
    state = slstm_state(K=K, dtype=torch.float32)
    want = slstm_results(slstm.recurrent, [double(p) for p in x], state.map(double), forget_gate=forget_gate, **flags)
    with unchanged(*x, *state.tensors()):
        got = slstm_results(door, x, state, forget_gate=forget_gate, **flags)
    assert got["y"].dtype == got["dgates"].dtype == dtype
    assert got["c"].dtype == got["dc0"].dtype == torch.float32
    assert_equal(got, want, limit, f"K={K}, T={T}, {forget_gate}, {list(flags)}, {dtype}")


def test_slstm() -> None:
    for T in (1, 2, 17):
        for forget_gate, flagged in itertools.product(("sigmoid", "exp"), (False, True)):
            check_slstm(5, T, forget_gate, random_flags(T) if flagged else {}, torch.float32, LIMIT)
    everywhere = {"reset": torch.ones(B, 7, dtype=torch.bool), "mask": torch.zeros(B, 7, dtype=torch.bool)}
    check_slstm(5, 7, "sigmoid", everywhere, torch.float32, LIMIT)
    for K in (16, 48, 64, 65, 192, 256):
        check_slstm(K, 3, "sigmoid", random_flags(3), torch.float32, LIMIT)
    for K in (20, 80):
        check_slstm(K, 5, "sigmoid", random_flags(5), torch.float16, 6e-3)


def test_spans_and_blocks_of_the_batch() -> None:
    sweeps.SPAN = 4
    for K in (7, 70):
        gates, R, b = (torch.randn(*shape) for shape in ((19, 11, 4, 2, K), (2, K, 4, K), (4, 2, K)))
        R *= (4 / K) ** 0.5
        x = [part.requires_grad_() for part in (gates, R, b)]
        state = sLSTMState.empty(19, 2, K).map(lambda part: part.requires_grad_())
        flags = {"reset": torch.rand(19, 11) < 0.2, "mask": torch.rand(19, 11) > 0.25}
        want = slstm_results(slstm.recurrent, [double(p) for p in x], state.map(double), **flags)
        assert_equal(slstm_results(door, x, state, **flags), want, LIMIT, f"19 rows, K={K}")
    sweeps.SPAN = 1024


def test_strided_gates_and_part_gradients() -> None:
    gates = torch.randn(2, 6, 3, 5, 4).permute(0, 1, 4, 2, 3).requires_grad_()  # [B,T,4,H,K], no two axes in order
    R, b = torch.randn(3, 5, 4, 5).mul_(0.5).requires_grad_(), torch.randn(4, 3, 5).requires_grad_()
    for name in "hcn":
        _, end = door(gates, R, b)
        _, exact = slstm.recurrent(gates.double(), R.double(), b.double())
        got, want = (torch.autograd.grad(getattr(s, name).sum(), (gates, R, b)) for s in (end, exact))
        for part, x, y in zip("gates R b".split(), got, want, strict=True):  # noqa: SIM905
            assert_equal({part: x}, {part: y}, LIMIT, f"only the final {name}")
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(torch.autograd.grad(door(gates, R, b)[0].sum(), gates, create_graph=True)[0].sum(), gates)
    h, end = door(torch.empty(0, 3, 4, 3, 5), R, b)
    assert h.shape == (0, 3, 3, 5)
    assert end.h.shape == (0, 3, 5)


def test_mlstm_step() -> None:
    gates = (("exp", "sigmoid"), ("exp", "exp"), ("sigmoid", "sigmoid"), ("sigmoid_normalized", "sigmoid"))
    for (input_gate, forget_gate), (K, V), flagged in itertools.product(
        gates, ((5, 7), (48, 33), (64, 96)), (False, True)
    ):
        given = [part.detach()[:, 0] for part in mlstm_inputs(1, K=K, V=V, dtype=torch.float32)]
        state = mlstm_state(K=K, V=V, dtype=torch.float32, stabilised=input_gate == "exp").map(torch.Tensor.detach)
        options = dict(input_gate=input_gate, forget_gate=forget_gate, eps=0.0 if forget_gate == "exp" else 1e-6)
        for reset, mask in itertools.product((True, False), repeat=2) if flagged else (("none", "none"),):
            flags, x = {"reset": None, "mask": None}, given
            if flagged:
                flags = {"reset": torch.tensor([reset, False]), "mask": torch.tensor([mask, True])}
                x = [torch.where(flags["mask"].view(-1, *[1] * (p.ndim - 1)), p, torch.nan) for p in given]
            want, after = mlstm.step(*(p.double() for p in x), state.map(torch.Tensor.double), **options, **flags)
            with unchanged(*x, *state.tensors()):
                got, end = recurrent.mlstm_step(*x, state, **options, **flags)
            names = ("h", "C", "n", "m")
            assert_equal(
                dict(zip(names, (got, *end.tensors()), strict=True)),
                dict(zip(names, (want, *after.tensors()), strict=True)),
                LIMIT, f"{options}, K={K}, V={V}, {flags}",
            )  # fmt: skip
            mine = state.clone()
            addresses = [part.data_ptr() for part in mine.tensors()]
            h = step_in_place(*x, *mine.tensors(), **flags, **options)
            for a, b_ in zip((h, *mine.tensors()), (got, *end.tensors()), strict=True):
                torch.testing.assert_close(a, b_, rtol=0, atol=0)
            assert addresses == [part.data_ptr() for part in mine.tensors()]


def test_mlstm_step_over_keys_wider_than_a_tile() -> None:
    x = [part.detach()[:, 0] for part in mlstm_inputs(1, K=300, V=40, dtype=torch.float32)]
    state = mLSTMState.empty(B, H, 300, 40)
    exact = state.map(torch.Tensor.double)
    options = dict(reset=None, mask=None, input_gate="exp", forget_gate="sigmoid", eps=1e-6)
    for _ in range(4):
        h, state = recurrent.mlstm_step(*x, state, **options)
        want, exact = mlstm.step(*(p.double() for p in x), exact)
        assert_equal({"h": h, "C": state.C, "n": state.n}, {"h": want, "C": exact.C, "n": exact.n}, LIMIT, "K=300")
    with pytest.raises(ValueError, match="contiguous"):
        step_in_place(*x, state.C.mT.contiguous().mT, state.n, state.m)


def test_the_graph_decoder_updates_the_memory_where_it_lies() -> None:
    ox.kernels.trust("triton")
    for model in (
        ox.xLSTM(ox.xLSTMConfig(vocab_size=23, width=32, heads=2, pattern="ms")),
        ox.xLSTMLarge(ox.xLSTMLargeConfig(vocab_size=23, width=32, heads=2, blocks=2)),
    ):
        model.eval()
        prompt = torch.randint(23, (3, 5))
        with torch.no_grad():
            state = model(prompt)[1]
            kept = state.clone()
            decoder = GraphDecoder(model, state, lambda step: step)
            calls = Counted()
            with calls:
                for _ in range(4):
                    tokens = torch.randint(23, (3,))
                    got = decoder.step(tokens)
                    assert calls.count == 0, "a step made a second memory"
                    want, state = model(tokens[:, None], state)
                    assert calls.count > 0  # a state that somebody keeps is not written to
                    calls.count = 0
                    torch.testing.assert_close(got, want[:, 0], rtol=1e-5, atol=1e-5)
            for a, b in zip(decoder.state.tensors(), state.tensors(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            again = model(prompt)[1]
        for a, b in zip(kept.tensors(), again.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


class Counted(TorchDispatchMode):
    """Counts steps that return another memory than the one they were given."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.openxlstm_triton.mlstm_step.default
        return function(*args, **(kwargs or {}))


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty is NaN
    assert recurrent_ops is not None
    for name, test in sorted(globals().items()):
        if name.startswith("test_") and (len(sys.argv) < 2 or name in sys.argv[1:]):
            torch.manual_seed(0)
            test()
            print("passed", name, flush=True)


if __name__ == "__main__":
    main()
