"""Every backend against the definition: outputs, states and each gradient, by name.

Error is rms(result - reference) / rms(reference) per tensor, the reference in float64 from the same rounded inputs, no
norm in the loss. The limits are one table for all backends and machines. An input-gate bias of +5 has its own row: the
lower bound of the denominator then hardly ever acts, the query's product with n passes near zero, and everything is
ill-conditioned even in fp32. It never loosens the other rows.
"""

import importlib

import pytest
import torch
from support import (
    LENGTHS,
    B,
    H,
    assert_equal,
    error,
    gradients,
    mlstm_inputs,
    mlstm_results,
    mlstm_state,
    normal,
    random_flags,
    slstm_inputs,
    slstm_results,
    slstm_state,
)

from openxlstm import kernels
from openxlstm.cells import mlstm, mLSTMState, slstm, sLSTMState
from openxlstm.kernels.dispatch import BACKENDS, Call

GATES = [("exp", "sigmoid"), ("exp", "exp"), ("sigmoid", "sigmoid"), ("sigmoid_normalized", "sigmoid")]
NAMES = [backend.name for backend in BACKENDS]

VALUES, GRADIENTS, FORGET = ("h", "C", "n", "m"), ("dq", "dk", "dv", "di", "dC0", "dn0"), ("df",)
LIMITS = {  # (dtype, input-gate bias is large) -> values, gradients, df
    (torch.float64, False): (1e-12, 1e-10, 1e-10),
    (torch.float32, False): (1e-5, 4e-5, 4e-5),
    (torch.float32, True): (1e-3, 4e-3, 4e-3),
    (torch.float16, False): (2e-3, 3e-3, 6e-3),
    (torch.bfloat16, False): (5e-3, 7e-3, 1.2e-2),
    (torch.bfloat16, True): (6e-3, 2.5e-2, 2.5e-2),
}


def limits(dtype: torch.dtype, large: bool = False) -> dict[str, float]:
    groups = zip((VALUES, GRADIENTS, FORGET), LIMITS[dtype, large], strict=True)
    return {name: limit for names, limit in groups for name in names}


def serves(backend: str, **facts: object) -> bool:
    """A backend either agrees with the definition or says why it does not serve; there is no third case."""
    call = Call(**{"op": "mlstm", "device": "cpu", "dtype": torch.float64, "K": 5, "V": 7, "needs_grad": True, **facts})
    reason = next(b for b in BACKENDS if b.name == backend).refuses(call)
    assert reason is None or (isinstance(reason, str) and len(reason) > 10)
    return reason is None


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(("input_gate", "forget_gate"), GATES)
def test_mlstm_in_float64(backend: str, T: int, input_gate: str, forget_gate: str) -> None:
    if not serves(backend, input_gate=input_gate, forget_gate=forget_gate):
        return
    x, state = mlstm_inputs(T), mlstm_state(stabilised=input_gate == "exp")
    if input_gate == "sigmoid":
        state = mLSTMState(state.C, torch.zeros_like(state.n).requires_grad_(), state.m)
    options = dict(input_gate=input_gate, forget_gate=forget_gate, eps=0.0 if forget_gate == "exp" else 1e-6)
    for flags in ({}, random_flags(T), {"reset": torch.ones(B, T, dtype=torch.bool)}):
        want = mlstm_results(mlstm.recurrent, x, state, **options, **flags)
        for chunk in (None, 1, 5, 16, 64):
            got = mlstm_results(kernels.mlstm, x, state, **options, **flags, chunk=chunk, backend=backend)
            assert_equal(got, want, limits(torch.float64), f"{backend}, T={T}, chunk={chunk}, {list(flags)}")


@pytest.mark.parametrize(("chunk", "i_mean"), [(7, 0.0), (32, -10.0), (128, 5.0)])
def test_mlstm_in_many_blocks_and_one_row_at_a_time(chunk: int, i_mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What long sequences and large batches do: several saved states, several chunks to each, rows in turn."""
    backend = importlib.import_module("openxlstm.kernels.torch.mlstm")
    monkeypatch.setattr(backend, "BLOCK", 64)
    monkeypatch.setattr(backend, "CACHE", 1)
    x, state = mlstm_inputs(300, i_mean=i_mean), mlstm_state()
    for flags in ({}, random_flags(300)):
        want = mlstm_results(mlstm.chunkwise, x, state, **flags, chunk=100)
        got = mlstm_results(kernels.mlstm, x, state, **flags, chunk=chunk, backend="torch")
        assert_equal(got, want, limits(torch.float64), f"chunk={chunk}, {list(flags)}")


@pytest.mark.parametrize("input_gate", ["sigmoid", "sigmoid_normalized"])
@pytest.mark.parametrize("T", [1, 70])
def test_a_state_that_another_gate_left_counts_with_its_exponent(input_gate: str, T: int) -> None:
    x, state = mlstm_inputs(T), mlstm_state(stabilised=True)
    got, want = (mlstm_results(form, x, state, input_gate=input_gate) for form in (kernels.mlstm, mlstm.recurrent))
    assert_equal(got, want, limits(torch.float64), f"{input_gate}, T={T}")


def test_one_state_is_saved_for_every_block() -> None:
    backend = importlib.import_module("openxlstm.kernels.torch.mlstm")
    for chunk in (1, 7, 64, 100, 512, 600):
        for T in (*range(1, 200), *range(500, 530), 1024, 1100, 1200):
            assert backend.saved_states(T, chunk) == len(list(backend.blocks(T, chunk))), (T, chunk)


@pytest.mark.parametrize(("B", "H", "K", "V"), [(1, 1, 1, 1), (1, 2, 1, 3), (3, 1, 4, 1), (0, 2, 3, 4)])
@pytest.mark.parametrize("T", [1, 70])
def test_mlstm_of_the_smallest_sizes(B: int, H: int, K: int, V: int, T: int) -> None:
    x = [normal(*shape).requires_grad_() for shape in ((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H))]
    state = mLSTMState.empty(B, H, K, V, dtype=torch.float64).map(lambda part: part.requires_grad_())
    flags = {"reset": torch.rand(B, T) < 0.2, "mask": torch.rand(B, T) > 0.2}
    got, want = (mlstm_results(form, x, state, **flags) for form in (kernels.mlstm, mlstm.recurrent))
    if B:
        assert_equal(got, want, limits(torch.float64), f"{B, H, K, V, T}")


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("i_mean", [0.0, -10.0, 5.0])
@pytest.mark.parametrize("f_mean", [0.0, 3.0, 6.0])
def test_mlstm_in_reduced_precision(backend: str, dtype: torch.dtype, i_mean: float, f_mean: float) -> None:
    large = i_mean > 0
    if (dtype, large) not in LIMITS or not serves(backend, dtype=dtype):
        return
    for T, K, V in ((130, 16, 48), (500, 60, 64), (65, 96, 16)):
        x = mlstm_inputs(T, K=K, V=V, i_mean=i_mean, f_mean=f_mean, dtype=dtype)
        state = mlstm_state(K=K, V=V, dtype=torch.float32)
        reference = [p.detach().double().requires_grad_() for p in x], state.map(_double)
        flags = random_flags(T) if T != 500 else {}
        want = mlstm_results(mlstm.chunkwise, *reference, **flags, chunk=65)
        got = mlstm_results(kernels.mlstm, x, state, **flags, backend=backend)
        assert got["h"].dtype == got["dq"].dtype == dtype
        assert got["C"].dtype == got["dC0"].dtype == torch.float32
        assert_equal(got, want, limits(dtype, large), f"{backend}, {dtype}, T={T}, K={K}, V={V}")


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("T", [*LENGTHS, 300])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_slstm_in_float64(backend: str, T: int, forget_gate: str) -> None:
    if not serves(backend, op="slstm" if T > 1 else "slstm_step"):
        return
    x, state = slstm_inputs(T), slstm_state()
    with torch.no_grad():
        x[0][:, :, 1] -= 2.0 if forget_gate == "exp" else 0.0  # or exp(m) of the true cell overflows float64
    for flags in ({}, random_flags(T), {"reset": torch.ones(B, T, dtype=torch.bool)}):
        want = slstm_results(slstm.recurrent, x, state, forget_gate=forget_gate, **flags)
        got = slstm_results(kernels.slstm, x, state, forget_gate=forget_gate, **flags, backend=backend)
        values = {name: 1e-12 if name in "yhcnm" else 1e-10 for name in want}
        assert_equal(got, want, values, f"{backend}, T={T}, {list(flags)}")


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slstm_in_reduced_precision(backend: str, dtype: torch.dtype) -> None:
    limit = {torch.float32: 4e-5, torch.float16: 6e-3, torch.bfloat16: 1.2e-2}[dtype]
    if not serves(backend, op="slstm", dtype=dtype):
        return
    for T, K in ((130, 16), (65, 48), (40, 5), (33, 100)):
        x, state, flags = slstm_inputs(T, K=K, dtype=dtype), slstm_state(K=K, dtype=torch.float32), random_flags(T)
        with torch.no_grad():
            x[1] *= 0.3  # memory mixing with a spectral radius above 1 amplifies any rounding without bound
        want = slstm_results(
            slstm.recurrent, [p.detach().double().requires_grad_() for p in x], state.map(_double), **flags
        )
        got = slstm_results(kernels.slstm, x, state, **flags, backend=backend)
        assert got["y"].dtype == got["dgates"].dtype == got["dR"].dtype == dtype
        assert got["c"].dtype == torch.float32
        assert_equal(got, want, limit, f"{backend}, {dtype}, T={T}, K={K}")


def test_gradcheck_at_eps_zero() -> None:
    """Numerical derivatives of h and of the true memory, exp(m) C and exp(m) n: exact where eps is 0."""
    T = 4
    flags = {"reset": torch.tensor([[0, 0, 1, 0], [0, 1, 0, 1]]).bool(), "mask": torch.rand(B, T) > 0.3}

    def true_memory(q, k, v, i, f, C, n):
        h, end = kernels.mlstm(q, k, v, i, f, mLSTMState(C, n, m), eps=0.0, chunk=2, **flags)
        scale = torch.exp(end.m)
        return h, end.C * scale[..., None, None], end.n * scale[..., None]

    x, state = mlstm_inputs(T, K=2, V=3), mlstm_state(K=2, V=3)
    m = state.m
    assert torch.autograd.gradcheck(true_memory, (*x, state.C, state.n))

    def true_cell(gates, R, b, h, c, n):
        y, end = kernels.slstm(gates, R, b, sLSTMState(h, c, n, m_slstm), **flags)
        return y, end.h, end.c * torch.exp(end.m), end.n * torch.exp(end.m)

    x, start = slstm_inputs(T, K=2), slstm_state(K=2)
    m_slstm = start.m
    assert torch.autograd.gradcheck(true_cell, (*x, start.h, start.c, start.n))


def test_one_step_is_the_sequence_of_length_one() -> None:
    x, state = mlstm_inputs(1), mlstm_state()
    h, end = kernels.mlstm(*x, state)
    h_step, end_step = kernels.mlstm_step(*(p[:, 0] for p in x), state)
    assert error(h_step, h[:, 0]) < 1e-14
    assert error(end_step.C, end.C) < 1e-14
    gates, R, b = slstm_inputs(1)
    start = slstm_state()
    y, last = kernels.slstm(gates, R, b, start)
    y_step, last_step = kernels.slstm_step(gates[:, 0], R, b, start)
    assert error(y_step, y[:, 0]) < 1e-14
    assert error(last_step.c, last.c) < 1e-14


def test_strided_inputs_are_read_in_place() -> None:
    """[B, H, T, *] storage, as other libraries keep it, gives the same numbers."""
    x, state = [p.detach() for p in mlstm_inputs(70)], mlstm_state().detach()
    strided = [p.transpose(1, 2).contiguous().transpose(1, 2) for p in x]
    torch.testing.assert_close(kernels.mlstm(*strided, state)[0], kernels.mlstm(*x, state)[0], rtol=0, atol=0)
    gates, R, b = (p.detach() for p in slstm_inputs(9))
    strided_gates = normal(B, 9, 4, H, 10)
    strided_gates[..., ::2] = gates
    assert torch.equal(kernels.slstm(strided_gates[..., ::2], R, b)[0], kernels.slstm(gates, R, b)[0])


@pytest.mark.parametrize("op", ["mlstm", "slstm"])
def test_overlapping_inputs_and_cotangents(op: str) -> None:
    """expand() makes tensors whose elements share memory; so does the gradient of a sum."""
    form = {"mlstm": mlstm.recurrent, "slstm": slstm.recurrent}[op]
    if op == "mlstm":
        shapes = {(1, 1, 1, 5): (B, 70, H, 5), (1, 1, H, 5): (B, 70, H, 5), (1, 70, 1, 1): (B, 70, H, 7)}
        shapes |= {(1, 70, 1): (B, 70, H), (B, 1, H): (B, 70, H)}
    else:
        shapes = {(1, 1, 4, 1, 5): (B, 9, 4, H, 5), (1, 5, 1, 5): (H, 5, 4, 5), (4, 1, 1): (4, H, 5)}
    x = [normal(*shape, std=0.5).requires_grad_() for shape in shapes]
    results = []
    for function in (getattr(kernels, op), form):
        h, end = function(*(part.expand(shape) for part, shape in zip(x, shapes.values())))
        results.append([h, *torch.autograd.grad(h.sum() + end.tensors()[0].sum(), x)])
    for got, want in zip(*results):
        assert error(got, want) < 1e-10


@pytest.mark.parametrize("part", ["h", "C", "n"])
def test_a_loss_on_one_output_alone(part: str) -> None:
    """The others' cotangents are missing, not zero; and only the state asks for gradients."""
    x, state = [p.detach() for p in mlstm_inputs(70)], mlstm_state()
    results = []
    for function in (kernels.mlstm, mlstm.recurrent):
        h, end = function(*x, state)
        results.append(gradients([h if part == "h" else getattr(end, part)], [state.C, state.n]))
    for got, want in zip(*results):
        assert error(got, want) < 1e-10


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().requires_grad_()
