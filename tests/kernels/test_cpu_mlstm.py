"""The native mLSTM over a sequence: every instruction set, strides, company, threads, extreme gates."""

from __future__ import annotations

import pytest
import torch
from support import B, H, assert_equal, error, mlstm_inputs, mlstm_results, mlstm_state, normal, random_flags, unchanged
from test_cpu import isas, needs_library

from openxlstm import kernels
from openxlstm.cells import mlstm, mLSTMState
from openxlstm.kernels.cpu import library, mlstm_ops

SIZES = [(1, 1), (3, 18), (16, 48), (48, 16), (60, 97), (192, 33)]  # K, V: below, at and beyond whole vectors and tiles


def doubled(x: list[torch.Tensor], state: mLSTMState) -> tuple[list[torch.Tensor], mLSTMState]:
    def double(p: torch.Tensor) -> torch.Tensor:
        return p.detach().double().requires_grad_(p.requires_grad)

    return [double(p) for p in x], state.map(double)


@isas
@pytest.mark.parametrize(("K", "V"), SIZES)
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid", "sigmoid_normalized"])
def test_every_instruction_set_is_the_definition(
    isa: library.Native, K: int, V: int, input_gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlstm_ops, "_library", lambda: isa)
    for T in (6, 15, 67):
        x = mlstm_inputs(T, K=K, V=V, dtype=torch.float32)
        state = mlstm_state(K=K, V=V, dtype=torch.float32, stabilised=input_gate == "exp")
        if input_gate == "sigmoid":
            state = mLSTMState(state.C, torch.zeros_like(state.n).requires_grad_(), state.m)
        double, state64 = doubled(x, state)
        for flags in ({}, random_flags(T), {"reset": torch.ones(B, T, dtype=torch.bool)}):
            want = mlstm_results(mlstm.chunkwise, double, state64, input_gate=input_gate, **flags)
            for chunk in (None, 16):
                got = mlstm_results(kernels.mlstm, x, state, input_gate=input_gate, **flags, chunk=chunk, backend="cpu")
                assert_equal(got, want, 4e-5, f"{isa.name}, T={T}, K={K}, V={V}, chunk={chunk}, {list(flags)}")


@isas
@pytest.mark.parametrize(("K", "V"), [(1, 1), (3, 18), (60, 97)])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid", "sigmoid_normalized"])
def test_every_instruction_set_is_the_definition_in_bf16(
    isa: library.Native, K: int, V: int, input_gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same rounded inputs: states are those of fp32, and h is rounded once, by at most 2^-9. Gradients on AMX
    are made of weighted scores and states that are rounded for the products that they enter."""
    monkeypatch.setattr(mlstm_ops, "_library", lambda: isa)
    for T in (5, 130):
        x = mlstm_inputs(T, K=K, V=V, dtype=torch.float32)
        x[:3] = [p.detach().bfloat16().requires_grad_() for p in x[:3]]
        state = mlstm_state(K=K, V=V, dtype=torch.float32, stabilised=input_gate == "exp")
        if input_gate == "sigmoid":
            state = mLSTMState(state.C, torch.zeros_like(state.n).requires_grad_(), state.m)
        double, state64 = doubled(x, state)
        for flags in ({}, random_flags(T), {"reset": torch.ones(B, T, dtype=torch.bool)}):
            want = mlstm_results(mlstm.chunkwise, double, state64, input_gate=input_gate, **flags)
            for chunk in (None, 48):
                got = mlstm_results(kernels.mlstm, x, state, input_gate=input_gate, **flags, chunk=chunk, backend="cpu")
                where = f"{isa.name}, T={T}, K={K}, V={V}, chunk={chunk}, {list(flags)}"
                assert_equal(got, want, 1e-2, where)
                assert_equal({name: got[name] for name in "Cn"}, {name: want[name] for name in "Cn"}, 1e-5, where)
                assert_equal({"h": got["h"]}, {"h": want["h"]}, 2.1e-3, where)


@needs_library
@pytest.mark.parametrize(("i_mean", "f_mean"), [(0.0, 0.0), (0.0, 6.0), (-10.0, 6.0)])
def test_long_sequences_in_bf16(i_mean: float, f_mean: float) -> None:
    """Rounding the state for its products does not add up: the state itself is fp32."""
    x = mlstm_inputs(900, K=64, V=48, i_mean=i_mean, f_mean=f_mean, dtype=torch.float32)
    x[:3] = [p.detach().bfloat16().requires_grad_() for p in x[:3]]
    state = mlstm_state(K=64, V=48, dtype=torch.float32)
    double, state64 = doubled(x, state)
    want = mlstm_results(mlstm.chunkwise, double, state64, chunk=128)
    for chunk in (64, 128):
        got = mlstm_results(kernels.mlstm, x, state, chunk=chunk, backend="cpu")
        assert_equal(got, want, 1e-2, f"chunk={chunk}")
        assert_equal({name: got[name] for name in "Cn"}, {name: want[name] for name in "Cn"}, 1e-5, f"chunk={chunk}")


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_task_leaves_nothing_behind_for_the_next(
    isa: library.Native, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread has one working memory for all its heads: a NaN in the first may not show in those that follow."""
    monkeypatch.setattr(mlstm_ops, "_library", lambda: isa)
    monkeypatch.setattr(mlstm_ops, "threads", lambda: 1)
    for number in range(5):
        x = [p.detach() for p in mlstm_inputs(21, K=5, V=7, dtype=torch.float32)]
        x[:3] = [p.to(dtype) for p in x[:3]]
        clean = [p.clone().requires_grad_() for p in x]
        x[number][0] = torch.nan
        dirty = [p.requires_grad_() for p in x]
        results = []
        for part in (clean, dirty):
            h, end = kernels.mlstm(*part, chunk=16, backend="cpu")
            results.append([h, end.C, end.n, *torch.autograd.grad(h.float().sum() + end.C.sum(), part)])
        assert results[1][0][0].isnan().any()
        assert all(torch.equal(a[1], b[1]) for a, b in zip(*results, strict=True)), f"input {number}"


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_notice_its_company_nor_the_threads(
    isa: library.Native, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlstm_ops, "_library", lambda: isa)
    rows, T, K, V = 5, 70, 40, 24
    x = [normal(rows, T, H, width).to(dtype).requires_grad_() for width in (K, K, V)]
    x += [normal(rows, T, H).float().requires_grad_() for _ in range(2)]

    def results(part: list[torch.Tensor]) -> list[torch.Tensor]:
        h, state = kernels.mlstm(*part, backend="cpu")
        loss = h.float().square().sum() + state.C.square().sum()
        return [h, state.C, *torch.autograd.grad(loss, part)]

    whole = results(x)
    for count in (1, 2, 4):
        part = results([p.detach()[:count].clone().requires_grad_() for p in x])
        assert all(torch.equal(a, b[:count]) for a, b in zip(part, whole, strict=True)), count
    for threads in (2, 3, 16):
        monkeypatch.setattr(mlstm_ops, "threads", lambda threads=threads: threads)
        assert all(torch.equal(a, b) for a, b in zip(results(x), whole, strict=True)), threads


@needs_library
def test_views_are_read_where_they_lie() -> None:
    """q, k, v out of one projection, time in front of the batch, a head axis that is a view: the bits of copies."""
    T, K, V = 21, 16, 32
    together = normal(T, B, H, 2 * K + V).float()
    q, k, v = together.transpose(0, 1).split((K, K, V), dim=-1)
    i, f = normal(H, B, T).float().permute(1, 2, 0), normal(B, T, 2 * H).float()[..., ::2]
    state = mlstm_state(K=K, V=V, dtype=torch.float32).detach()
    with unchanged(together, *state.tensors()):
        got, end = kernels.mlstm(q, k, v, i, f, state, backend="cpu")
    want, same = kernels.mlstm(*(x.contiguous() for x in (q, k, v, i, f)), state, backend="cpu")
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(end.tensors(), same.tensors(), strict=True))


@needs_library
def test_gates_may_have_a_dtype_of_their_own() -> None:
    x = [p.detach() for p in mlstm_inputs(9, dtype=torch.float32)]
    for dtype in (torch.bfloat16, torch.float64):
        gates = [p.to(dtype).requires_grad_() for p in x[3:]]
        h, _ = kernels.mlstm(*x[:3], *gates, backend="cpu")
        want, _ = kernels.mlstm(*x[:3], *(p.detach().float() for p in gates), backend="cpu")
        assert torch.equal(h, want)
        assert [g.dtype for g in torch.autograd.grad(h.sum(), gates)] == [dtype, dtype]


@needs_library
def test_extreme_gates_stay_finite_and_nan_stays_visible() -> None:
    for size in (200.0, 1e4):
        x = mlstm_inputs(40, dtype=torch.float32)
        gates = [torch.empty(B, 40, H).uniform_(-size, size).requires_grad_() for _ in range(2)]
        h, end = kernels.mlstm(*x[:3], *gates, chunk=16, backend="cpu")
        assert torch.isfinite(h).all()
        assert all(torch.isfinite(part).all() for part in end.tensors())
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(h.sum(), [*x[:3], *gates]))
    for number in range(5):
        x = [p.detach() for p in mlstm_inputs(3, dtype=torch.float32)]
        x[number][0, 1, 0] = torch.nan
        h, end = kernels.mlstm(*x, backend="cpu")
        assert h[0, 1, 0].isnan().all(), f"input {number}"
        assert torch.isfinite(h[1]).all()
        assert torch.isfinite(h[0, :, 1:]).all()
        assert number == 0 or end.C[0, 0].isnan().any()
        masked, end = kernels.mlstm(*x, mask=torch.tensor([[True, False, True]] * B), backend="cpu")
        assert torch.isfinite(masked).all()
        assert torch.isfinite(end.C).all()


@needs_library
def test_an_empty_batch_and_an_absurd_chunk() -> None:
    x = [p.detach()[:0] for p in mlstm_inputs(5, dtype=torch.float32)]
    h, state = kernels.mlstm(*x, backend="cpu")
    assert h.shape[0] == state.C.shape[0] == 0
    x = [p.detach() for p in mlstm_inputs(300, dtype=torch.float32)]
    want, _ = mlstm.chunkwise(*(p.double() for p in x))
    assert error(kernels.mlstm(*x, chunk=10**6, backend="cpu")[0], want) <= 1e-5


@needs_library
def test_second_derivatives_are_refused() -> None:
    q, k, v, i, f = mlstm_inputs(4, dtype=torch.float32)
    h, _ = kernels.mlstm(q, k, v, i, f, backend="cpu")
    (first,) = torch.autograd.grad(h.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()
