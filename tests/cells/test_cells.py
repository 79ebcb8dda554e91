"""The definition against the papers' literal equations, and against the theory it must obey."""

import inspect
import math

import pytest
import torch
from support import (
    LENGTHS,
    B,
    H,
    K,
    V,
    assert_equal,
    mlstm_inputs,
    mlstm_results,
    mlstm_state,
    normal,
    random_flags,
    slstm_inputs,
    slstm_state,
    storages,
    unchanged,
)
from torch import Tensor

from openxlstm.cells import mlstm, mLSTMState, slstm, sLSTMState
from openxlstm.cells.mlstm import INPUT_GATES

GATES = [("exp", "sigmoid"), ("exp", "exp"), ("sigmoid", "sigmoid"), ("sigmoid_normalized", "sigmoid")]


def sigmoid_or_exp(name: str, x: Tensor) -> Tensor:
    return torch.sigmoid(x) if name == "sigmoid" else torch.exp(x)


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_mlstm_is_the_papers_equations_without_stabiliser(forget_gate: str) -> None:
    """arXiv:2405.04517 (19)-(27), literally: keys scaled when written, C as V x K, no m, no eps."""
    T = 21
    q, k, v, i, f = (x.detach() for x in mlstm_inputs(T))
    h, end = mlstm.recurrent(q, k, v, i, f, forget_gate=forget_gate, eps=0.0)
    C, n = torch.zeros(B, H, V, K, dtype=torch.float64), torch.zeros(B, H, K, dtype=torch.float64)
    for t in range(T):
        key = k[:, t] / math.sqrt(K)  # (23)
        i_t = torch.exp(i[:, t])  # (25)
        f_t = sigmoid_or_exp(forget_gate, f[:, t])  # (26)
        C = f_t[..., None, None] * C + i_t[..., None, None] * v[:, t, :, :, None] * key[:, :, None, :]  # (19)
        n = f_t[..., None] * n + i_t[..., None] * key  # (20)
        numerator = (C @ q[:, t, :, :, None])[..., 0]
        denominator = (n * q[:, t]).sum(-1).abs().clamp(min=1.0)
        torch.testing.assert_close(h[:, t], numerator / denominator[..., None], rtol=1e-12, atol=1e-12)  # (21)
    memory = end.C * torch.exp(end.m)[..., None, None]
    torch.testing.assert_close(memory, C.mT * math.sqrt(K), rtol=1e-12, atol=1e-12)


def test_mlstm_with_sigmoid_input_gate_is_gated_linear_attention() -> None:
    """arXiv:2503.14376, mLSTMsig: no stabiliser and no normaliser; the normalised variant divides by max(|q n|, 1)."""
    T = 13
    q, k, v, i, f = (x.detach() for x in mlstm_inputs(T))
    plain, end = mlstm.recurrent(q, k, v, i, f, input_gate="sigmoid")
    normalised, _ = mlstm.recurrent(q, k, v, i, f, input_gate="sigmoid_normalized", eps=0.0)
    C, n = torch.zeros(B, H, K, V, dtype=torch.float64), torch.zeros(B, H, K, dtype=torch.float64)
    for t in range(T):
        write, keep = torch.sigmoid(i[:, t]), torch.sigmoid(f[:, t])
        C = keep[..., None, None] * C + write[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        n = keep[..., None] * n + write[..., None] * k[:, t]
        read = torch.einsum("bhk,bhkv->bhv", q[:, t] / math.sqrt(K), C)
        a = (n * q[:, t]).sum(-1).abs() / math.sqrt(K)
        torch.testing.assert_close(plain[:, t], read, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(normalised[:, t], read / a.clamp(min=1.0)[..., None], rtol=1e-12, atol=1e-12)
    assert not end.n.any()
    assert not end.m.any()


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_slstm_is_the_papers_equations_without_stabiliser(forget_gate: str) -> None:
    """arXiv:2405.04517 (8)-(14), literally: no m."""
    T = 21
    gates, R, b = (x.detach() for x in slstm_inputs(T))
    h, end = slstm.recurrent(gates, R, b, forget_gate=forget_gate)
    out, c, n = (torch.zeros(B, H, K, dtype=torch.float64) for _ in range(3))
    for t in range(T):
        i, f, z, o = (gates[:, t, g] + torch.einsum("bhd,hde->bhe", out, R[:, :, g]) + b[g] for g in range(4))
        i, f, z, o = torch.exp(i), sigmoid_or_exp(forget_gate, f), torch.tanh(z), torch.sigmoid(o)  # (11)-(14)
        c = f * c + i * z  # (8)
        n = f * n + i  # (9)
        out = o * c / n  # (10)
        torch.testing.assert_close(h[:, t], out, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(end.c * torch.exp(end.m), c, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(("input_gate", "forget_gate"), GATES)
def test_chunkwise_is_recurrent(T: int, input_gate: str, forget_gate: str) -> None:
    x, state = mlstm_inputs(T), mlstm_state(stabilised=input_gate == "exp")
    if input_gate == "sigmoid":
        state = mLSTMState(state.C, torch.zeros_like(state.n).requires_grad_(), state.m)
    options = dict(input_gate=input_gate, forget_gate=forget_gate, eps=0.0 if forget_gate == "exp" else 1e-6)
    for flags in ({}, random_flags(T)):
        want = mlstm_results(mlstm.recurrent, x, state, **options, **flags)
        for chunk in (1, 16, T):
            got = mlstm_results(mlstm.chunkwise, x, state, **options, **flags, chunk=chunk)
            assert_equal(got, want, 1e-10, f"T={T}, chunk={chunk}")


def test_the_stabiliser_is_invisible() -> None:
    """The same memory in another frame (arXiv:2405.04517, App. A.2) gives the same outputs."""
    c = 1.7
    x, state = [p.detach() for p in mlstm_inputs(17)], mlstm_state().detach()
    moved = mLSTMState(state.C * math.exp(c), state.n * math.exp(c), state.m - c)
    torch.testing.assert_close(
        mlstm.recurrent(*x, moved, eps=0.0)[0], mlstm.recurrent(*x, state, eps=0.0)[0], rtol=1e-12, atol=1e-12
    )
    x, state = [p.detach() for p in slstm_inputs(17)], slstm_state().detach()
    moved = sLSTMState(state.h, state.c * math.exp(c), state.n * math.exp(c), state.m - c)
    torch.testing.assert_close(slstm.recurrent(*x, moved)[0], slstm.recurrent(*x, state)[0], rtol=1e-12, atol=1e-12)


def test_an_empty_slstm_ignores_its_stored_exponent_element_by_element() -> None:
    gates, R, b = (x.detach() for x in slstm_inputs(5))
    empty = sLSTMState.empty(B, H, K, dtype=torch.float64)
    odd = sLSTMState(empty.h, empty.c, empty.n, empty.m + 300.0)
    torch.testing.assert_close(slstm.recurrent(gates, R, b, odd)[0], slstm.recurrent(gates, R, b)[0])
    gates = gates.clone().requires_grad_()
    with torch.no_grad():
        gates[:, :, 0] -= 120.0  # a fresh row beside a running one, with the input gate all but shut
    running = slstm_state().detach()
    mixed = running.map(lambda x: torch.cat((torch.zeros_like(x[:1]), x[1:])))
    h, end = slstm.recurrent(gates, R, b, mixed)
    (gradient,) = torch.autograd.grad(h.sum() + end.c.sum(), gates)
    assert torch.isfinite(h).all()
    assert torch.isfinite(gradient).all()


def test_all_forms_share_one_signature() -> None:
    for module, forms in (
        (mlstm, (mlstm.recurrent, mlstm.chunkwise, mlstm.step)),
        (slstm, (slstm.recurrent, slstm.step)),
    ):
        first = list(inspect.signature(forms[0]).parameters)
        for form in forms[1:]:
            assert list(inspect.signature(form).parameters)[: len(first)] == first, module.__name__


@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_nothing_passed_in_is_changed_or_aliased(input_gate: str) -> None:
    x, state, flags = mlstm_inputs(9), mlstm_state(stabilised=input_gate == "exp"), random_flags(9)
    with unchanged(*x, *state.tensors(), *flags.values()):
        _, end = mlstm.recurrent(*x, state, **flags, input_gate=input_gate)
    assert not storages(*end.tensors()) & storages(*x, *state.tensors())


def test_a_state_moves_selects_and_counts_its_bytes() -> None:
    state = mLSTMState.empty(4, 3, 5, 7)
    assert state.nbytes == 4 * 4 * 3 * (5 * 7 + 5 + 1)  # fp32: model-spec, 4 B H (K V + K + 1)
    assert sLSTMState.empty(4, 3, 5).nbytes == 16 * 4 * 3 * 5
    assert [name for name, _ in state.named_tensors()] == ["C", "n", "m"]
    state = mLSTMState(normal(4, 3, 5, 7), normal(4, 3, 5), normal(4, 3))
    forked = state.select(torch.tensor([2, 2, 0]))
    torch.testing.assert_close(forked.C, torch.stack((state.C[2], state.C[2], state.C[0])))
    assert state.to(torch.float32).m.dtype == torch.float32
    assert not storages(*state.clone().tensors()) & storages(*state.tensors())
    with pytest.raises(AttributeError):
        state.m = state.m + 1  # type: ignore[misc]
