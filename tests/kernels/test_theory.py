"""What must be true of the operations whatever computes them: composition, causality, isolation, finiteness."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    B,
    H,
    K,
    V,
    assert_equal,
    error,
    gradients,
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

from openxlstm import kernels
from openxlstm.cells import State, mlstm, mLSTMState, slstm


def run(op: str, x: list[Tensor], state: State | None, **flags: Tensor) -> tuple[Tensor, State]:
    """Either operation on x = the tensors with a time axis (and, for the sLSTM, R and b at the end)."""
    return getattr(kernels, op)(*x, state, **flags)


def problem(op: str, T: int) -> tuple[list[Tensor], State]:
    return (mlstm_inputs(T), mlstm_state()) if op == "mlstm" else (slstm_inputs(T), slstm_state())


def cut(op: str, x: list[Tensor], steps: slice, rows: slice = slice(None)) -> list[Tensor]:
    timed = 5 if op == "mlstm" else 1
    return [p[rows, steps] for p in x[:timed]] + x[timed:]


BOTH = pytest.mark.parametrize("op", ["mlstm", "slstm"])


@BOTH
@settings(max_examples=20, deadline=None)
@given(T=st.integers(2, 150), share=st.floats(0, 1), flagged=st.booleans())
def test_prefix_and_state_are_the_whole(op: str, T: int, share: float, flagged: bool) -> None:
    """One call equals two calls chained by state, at any cut: values, final state and every gradient."""
    middle = round(share * T)
    (x, state), flags = problem(op, T), random_flags(T) if flagged else {}
    h, end = run(op, x, state, **flags)
    first, between = run(op, cut(op, x, slice(0, middle)), state, **{k: f[:, :middle] for k, f in flags.items()})
    second, last = run(op, cut(op, x, slice(middle, T)), between, **{k: f[:, middle:] for k, f in flags.items()})
    outputs = [h, *end.tensors()[:-1]], [torch.cat((first, second), 1), *last.tensors()[:-1]]
    inputs = [*x, *state.tensors()[:-1]]
    names = [str(n) for n in range(len(outputs[0]) + len(inputs))]
    whole, parts = ([*output, *gradients(output, inputs)] for output in outputs)
    assert_equal(dict(zip(names, parts)), dict(zip(names, whole)), 1e-10, f"{op}, T={T}, cut at {middle}")


@BOTH
def test_packed_documents_are_the_documents_alone(op: str) -> None:
    lengths = (1, 40, 17, 2, 70)
    T = sum(lengths)
    x, _ = problem(op, T)
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, starts] = True
    packed, end = run(op, x, problem(op, 1)[1], reset=reset)  # the incoming state must not matter either
    alone = [run(op, cut(op, x, slice(s, s + n)), None) for s, n in zip(starts, lengths)]
    assert error(packed, torch.cat([h for h, _ in alone], 1)) < 1e-12
    for got, want in zip(end.tensors(), alone[-1][1].tensors()):
        assert error(got, want) < 1e-12
    grads = gradients([packed], x), gradients([torch.cat([h for h, _ in alone], 1)], x)
    for got, want in zip(*grads):
        assert error(got, want) < 1e-10


@BOTH
@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_padding_changes_nothing(op: str, where: str) -> None:
    """Padding full of NaN reaches no output, state or gradient; a padded step's own gradient is 0."""
    T, pad = 37, 9
    x, state = problem(op, T)
    at = {"left": 0, "right": T, "middle": 21}[where]
    mask = torch.ones(B, T + pad, dtype=torch.bool)
    mask[:, at : at + pad] = False
    timed = 5 if op == "mlstm" else 1
    padded = [torch.full((B, T + pad, *p.shape[2:]), torch.nan, dtype=p.dtype) for p in x[:timed]]
    for p, real in zip(padded, x):
        p[mask] = real.detach().flatten(0, 1)
        p.requires_grad_()
    h, end = run(op, x, state)
    padded_h, padded_end = run(op, [*padded, *x[timed:]], state, mask=mask)
    assert error(padded_h[mask], h.flatten(0, 1)) < 1e-12
    assert not padded_h[~mask].any()
    for got, want in zip(padded_end.tensors(), end.tensors()):
        assert error(got, want) < 1e-12
    weight = normal(*h.shape)
    outside = torch.full_like(padded_h, 3.0)  # a loss that looks at padded steps must not see them either
    outside[mask] = weight.flatten(0, 1)
    others = [*x[timed:], *state.tensors()[:-1]]
    want = torch.autograd.grad((h * weight).sum() + end.tensors()[0].sum(), [*x[:timed], *others])
    got = torch.autograd.grad((padded_h * outside).sum() + padded_end.tensors()[0].sum(), [*padded, *others])
    for g, w in zip(got[:timed], want):
        assert error(g[mask], w.flatten(0, 1)) < 1e-10
        assert not g[~mask].any()
    for g, w in zip(got[timed:], want[timed:]):
        assert error(g, w) < 1e-10


@BOTH
def test_a_masked_reset_still_empties_the_state(op: str) -> None:
    x, state = problem(op, 3)
    reset, mask = torch.zeros(B, 3, dtype=torch.bool), torch.ones(B, 3, dtype=torch.bool)
    reset[:, 0], mask[:, 0] = True, False
    h, end = run(op, x, state, reset=reset, mask=mask)
    fresh, fresh_end = run(op, cut(op, x, slice(1, 3)), None)
    assert error(h[:, 1:], fresh) < 1e-12
    for got, want in zip(end.tensors(), fresh_end.tensors()):
        assert error(got, want) < 1e-12
    nothing = torch.zeros(B, 3, dtype=torch.bool)
    _, emptied = run(op, x, state, reset=reset, mask=nothing)
    assert all(not part.any() for part in emptied.tensors())
    _, kept = run(op, x, state, mask=nothing)
    for got, want in zip(kept.tensors(), state.tensors()):
        assert torch.equal(got, want)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_future_does_not_leak_by_a_single_bit(op: str, dtype: torch.dtype) -> None:
    T = 150
    x, _ = problem(op, T)
    x = [p.detach().to(dtype) for p in x]
    h, _ = run(op, x, None)
    for t in (0, 63, 64, 149):
        changed = [p.clone() for p in x]
        for p in changed[: 5 if op == "mlstm" else 1]:
            p[:, t] += 1.0
        later, _ = run(op, changed, None)
        assert torch.equal(later[:, :t], h[:, :t])
        assert not torch.equal(later[:, t], h[:, t])


@BOTH
def test_one_state_serves_two_continuations(op: str) -> None:
    x, state = problem(op, 20)
    other, _ = problem(op, 33)
    flags = random_flags(20)
    with unchanged(*x, *state.tensors(), *flags.values()):
        first, end = run(op, x, state, **flags)
        run(op, [*other[: 5 if op == "mlstm" else 1], *x[5 if op == "mlstm" else 1 :]], state)
        again, end_again = run(op, x, state, **flags)
        gradients([first, *end.tensors()[:-1]], x)
    assert torch.equal(first, again)
    for a, b in zip(end.tensors(), end_again.tensors()):
        assert torch.equal(a, b)
    assert not storages(*end.tensors()) & storages(*x, *state.tensors())


@BOTH
def test_rows_of_a_batch_do_not_meet(op: str) -> None:
    x, state = problem(op, 70)
    flags = random_flags(70)
    h, _ = run(op, x, state, **flags)
    alone, _ = run(
        op,
        cut(op, x, slice(None), slice(0, 1)),
        state.select(torch.tensor([0])),
        **{k: f[:1] for k, f in flags.items()},
    )
    assert error(alone, h[:1]) < 1e-13


@BOTH
def test_no_steps_leave_the_state_as_it_was(op: str) -> None:
    x, state = problem(op, 4)
    h, end = run(op, cut(op, x, slice(0, 0)), state)
    assert h.shape[1] == 0
    for got, want in zip(end.tensors(), state.tensors()):
        assert torch.equal(got, want)
    assert not storages(*end.tensors()) & storages(*state.tensors())


@BOTH
@pytest.mark.parametrize("size", [200.0, 1e4])
def test_extreme_gates_stay_finite(op: str, size: float) -> None:
    """|i|, |f| far beyond what exp(fp32) holds: values and gradients stay finite, forward and backward."""
    T = 64
    for i_sign in (-1, 1):
        for f_sign in (-1, 1):
            x, _ = problem(op, T)
            x = [p.detach().float() for p in x]
            i, f = (x[3], x[4]) if op == "mlstm" else (x[0][:, :, 0], x[0][:, :, 1])
            i += i_sign * size
            f += f_sign * size
            x = [p.requires_grad_() for p in x]
            for eps, flags in itertools.product((0.0, 1e-6) if op == "mlstm" else (None,), ({}, random_flags(T))):
                h, end = getattr(kernels, op)(*x, **({} if eps is None else {"eps": eps}), **flags)
                everything = [
                    h,
                    *end.tensors(),
                    *torch.autograd.grad(h.sum() + end.tensors()[0].sum(), x, allow_unused=True),
                ]
                assert all(torch.isfinite(p).all() for p in everything if p is not None), (i_sign, f_sign, eps)


def test_drift_over_4096_steps_of_bf16_inputs_is_bounded(record_property: Callable[[str, object], None]) -> None:
    """fp32 state, bf16 inputs, one sequence and 4,096 single calls carried by state, against float64."""
    T, width = 4096, 32
    x = [normal(1, T, 2, width, dtype=torch.bfloat16) for _ in range(3)]
    x += [normal(1, T, 2, dtype=torch.bfloat16, mean=mean, std=0.5) for mean in (0.0, 6.0)]
    want, want_end = mlstm.chunkwise(*(p.double() for p in x), chunk=128)
    got, end = kernels.mlstm(*x)
    carried, state = [], None
    for t in range(T):
        h, state = kernels.mlstm_step(*(p[:, t] for p in x), state)
        carried.append(h)
    drift = {
        "sequence h": error(got, want),
        "sequence C": error(end.C, want_end.C),
        "last 64 of sequence": error(got[:, -64:], want[:, -64:]),
        "last 64 of 4,096 carried steps": error(torch.stack(carried[-64:], 1), want[:, -64:]),
        "C of 4,096 carried steps": error(state.C, want_end.C),
    }
    record_property(
        "measured", "drift against float64, " + ", ".join(f"{name} {value:.1e}" for name, value in drift.items())
    )
    assert drift["sequence C"] < 1e-5  # a state kept in bf16 is off by 0.39 after 1,024 steps
    assert drift["C of 4,096 carried steps"] < 1e-5
    assert all(value < 2e-3 for value in drift.values())  # h is rounded to bf16, which alone is 1.65e-3


def test_second_derivatives_are_refused_with_a_sentence() -> None:
    for op in ("mlstm", "slstm"):
        x, _ = problem(op, 4)
        h, _ = run(op, x, None)
        (gradient,) = torch.autograd.grad(h.sum(), x[0], create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiated once.*openxlstm\.cells"):
            torch.autograd.grad(gradient.sum(), x[0])


@BOTH
def test_forward_mode_is_refused_not_answered_with_zeros(op: str) -> None:
    x = [p.detach() for p in problem(op, 4)[0]]
    with pytest.raises(RuntimeError, match=r"no forward-mode derivatives.*openxlstm\.cells"):
        torch.func.jvp(lambda first: run(op, [first, *x[1:]], None)[0], (x[0],), (x[0],))


def test_a_state_can_be_learned_and_cut() -> None:
    """Full and truncated back-propagation: the gradient of the second half reaches the first, or is cut."""
    x, _ = problem("mlstm", 20)
    _, between = kernels.mlstm(*(p[:, :10] for p in x))
    h, _ = kernels.mlstm(*(p[:, 10:] for p in x), between)
    assert torch.autograd.grad(h.sum(), x[1], retain_graph=True)[0][:, :10].abs().sum() > 0
    h, _ = kernels.mlstm(*(p[:, 10:] for p in x), between.detach())
    assert torch.autograd.grad(h.sum(), x[1])[0][:, :10].abs().sum() == 0


@BOTH
@pytest.mark.parametrize("T", [1, 70])
def test_autocast_does_not_round_inside(op: str, T: int) -> None:
    """Not in a step either: a token read alone would differ from the same token in a sequence."""
    x, state = problem(op, T)
    x, state = [p.detach().float() for p in x], state.detach().to(torch.float32)
    plain, end = run(op, x, state)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_end = run(op, x, state)
    assert torch.equal(plain, cast)
    for got, want in zip(cast_end.tensors(), end.tensors()):
        assert torch.equal(got, want)


@BOTH
@pytest.mark.parametrize("T", [1, 2])
def test_the_exponent_carries_no_gradient_in_any_form(op: str, T: int) -> None:
    x, state = problem(op, T)
    *others, m = state.tensors()
    m = m.clone().requires_grad_()
    forms = [getattr(kernels, op), *((mlstm.recurrent, mlstm.chunkwise) if op == "mlstm" else (slstm.recurrent,))]
    for form in forms:
        h, end = form(*x, type(state)(*others, m))
        assert not end.m.requires_grad
        (gradient,) = torch.autograd.grad(h.sum() + end.tensors()[0].sum(), m, allow_unused=True)
        assert gradient is None, form


def test_what_stands_behind_a_mask_weighs_nothing() -> None:
    """Not even among input gates far below zero, where anything finite would become the maximum."""
    x, state, flags = mlstm_inputs(70, i_mean=-200.0, f_mean=-10.0), mlstm_state(), random_flags(70)
    want = mlstm_results(mlstm.recurrent, x, state, **flags)
    for form in (mlstm.chunkwise, kernels.mlstm):
        for chunk in (16, 70):
            got = mlstm_results(form, x, state, **flags, chunk=chunk)
            assert_equal(got, want, 1e-10, f"{form.__module__}, chunk={chunk}")


@BOTH
def test_a_forget_gate_at_a_reset_may_hold_anything(op: str) -> None:
    """Minus infinity included: what it would keep is not there."""
    T = 70
    reset = torch.rand(B, T) < 0.2
    x, state = problem(op, T)
    results = []
    for gate in (-torch.inf, -3.0):
        with torch.no_grad():
            (x[4] if op == "mlstm" else x[0][:, :, 1])[reset] = gate
        h, end = run(op, x, state, reset=reset)
        slopes = gradients([h, *end.tensors()[:-1]], x)
        assert not (slopes[4] if op == "mlstm" else slopes[0][:, :, 1])[reset].any()
        results.append([h, *end.tensors(), *slopes])
    for got, want in zip(*results):
        assert error(got, want) < 1e-12


@pytest.mark.parametrize("T", [1, 5])
def test_a_query_that_asks_nothing_reads_nothing(T: int) -> None:
    """Without eps the denominator is exp(-m), which underflows: 0 / 0, were it not bounded."""
    q, k, v, i, f = (p.detach().float() for p in mlstm_inputs(T, i_mean=200.0))
    q = torch.zeros_like(q).requires_grad_()
    for form in (kernels.mlstm, mlstm.chunkwise):
        h, _ = form(q, k, v, i, f, eps=0.0)
        assert not h.any()
        assert torch.autograd.grad(h.sum(), q)[0].isfinite().all()


def test_the_shapes_of_a_state_are_what_the_operations_expect() -> None:
    state = mLSTMState.empty(B, H, K, V, dtype=torch.float64)
    h, end = kernels.mlstm(*mlstm_inputs(3), state)
    assert [tuple(p.shape) for p in end.tensors()] == [tuple(p.shape) for p in state.tensors()]
    assert h.shape == (B, 3, H, V)
