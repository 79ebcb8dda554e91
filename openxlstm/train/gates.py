"""Gates and states, layer by layer: an xLSTM goes wrong here before the loss shows it.

`measure` runs one forward pass of its own, without gradients, and looks at what every cell is given. It draws no random
number and writes to nothing, so the training it looks at is the same with it and without. The figures of a layer are
over all positions of the rows that the pass reads, over all heads, and, in an sLSTM, over all units:

    forget_mean    mean of φ(f): the share of the memory that a step keeps; φ is the model's forget gate
    forgetful      share of gates with φ(f) < 1/2. At such a gate a memory lasts 1 / (1 - φ(f)) < 2 tokens: it forgets
                   as a convolution does, and a layer near 1 has stopped being recurrent
    input_max      largest |i|; i is the pre-activation of the input gate, exp(i) the weight of what is written
    m_min, m_max   range of the exponent m, which the stabiliser subtracts; far from 0 it says that gates drift
    state_log10    log10 of the largest Frobenius norm, over rows and heads, of the true memory after the last position:
                   exp(m) C of an mLSTM, exp(m) c of an sLSTM; None for a memory of zeros
    floor          mLSTM with a normaliser only: share of positions and heads where the denominator max(|q.n|, exp(-m))
                   is its floor, to one part in a thousand: there the query finds less than the floor, and the
                   normaliser has no gradient

and `logit_max` is the largest |logit| that the head gives (behind its soft cap, if it has one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from openxlstm import kernels
from openxlstm.cells import mLSTMState, sLSTMState

FLOOR = 1 - 1e-3  # |q.n| / denominator below this: the floor decides, and rounding does not
POSITIONS = 1024  # whose logits exist at once


def measure(model: Any, forward: Callable[[], object]) -> dict[str, Any]:
    """Run `forward` once and say what the cells of `model` did in it.

    Args:
        model: a LanguageModel that is an nn.Module; its training mode is as before afterwards.
        forward: one forward pass of `model`, or of what wraps it, on rows of the caller's choice.

    Returns:
        {"gates": one dict per block, first to last, "logit_max": a number}; every figure as in the page's head.
    """
    layers: list[dict[str, Any]] = []
    logits: list[float] = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), _watched(model, layers, logits):
            forward()
    finally:
        model.train(training)
    assert len(logits) == 1, f"`forward` must be one forward pass of the model; the head was called {len(logits)} times"
    named = [{"layer": index, **layer} for index, layer in enumerate(layers)]
    return {"gates": named, "logit_max": max(logits)}


@contextmanager
def _watched(model: Any, layers: list[dict[str, Any]], logits: list[float]) -> Iterator[None]:
    """Stand in the doors for a while. Blocks call them once each, in order, so the n-th call is the n-th block's.

    The head is called inside the model's own forward pass, because that is where sharded weights are whole.
    """
    mlstm, slstm, features = kernels.mlstm, kernels.slstm, model.features

    def seen_mlstm(*args: Any, **options: Any) -> tuple[Tensor, mLSTMState]:
        h, state = mlstm(*args, **options)
        layers.append(_of_mlstm(mlstm, *args, after=state, **options))
        return h, state

    def seen_slstm(*args: Any, **options: Any) -> tuple[Tensor, sLSTMState]:
        h, state = slstm(*args, **options)
        layers.append(_of_slstm(*args, h=h, after=state, **options))
        return h, state

    def seen_features(*args: Any, **options: Any) -> tuple[Tensor, Any]:
        hidden, state = features(*args, **options)
        parts = hidden.flatten(0, 1).split(POSITIONS)
        logits.append(max((model.logits(part).abs().max().item() for part in parts), default=0.0))
        return hidden, state

    kernels.mlstm, kernels.slstm, model.features = seen_mlstm, seen_slstm, seen_features
    try:
        yield
    finally:
        kernels.mlstm, kernels.slstm = mlstm, slstm
        del model.features  # the instance's; the method of the class is there again


def _of_mlstm(
    door: Callable[..., tuple[Tensor, mLSTMState]],
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    i: Float[Tensor, "B T H"],
    f: Float[Tensor, "B T H"],
    state: mLSTMState | None = None,
    *,
    after: mLSTMState,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    input_gate: str = "exp",
    forget_gate: str = "sigmoid",
    eps: float = 1e-6,
) -> dict[str, Any]:
    i, f = i.float(), f.float()
    m = i.new_zeros(()) if state is None else state.m[:, None]
    stabilised = input_gate == "exp"
    exponents = _running_max(_log_keep(f, forget_gate), i, m, reset) if stabilised else i.new_zeros(())
    floor = None
    if input_gate != "sigmoid":
        # The cell itself, asked to remember ones: it reads q.n / max(|q.n|, exp(-m)), of size 1 above the floor.
        ones = torch.ones_like(v[..., :1], dtype=torch.float32)
        before = None if state is None else mLSTMState(state.n[..., None], state.n, state.m)
        gates = {"input_gate": input_gate, "forget_gate": forget_gate}
        read, _ = door(q.float(), k.float(), ones, i, f, before, reset=reset, mask=mask, eps=0.0, **gates)
        floor = _share(read.abs() < FLOOR)
    norms = after.C.double().square().sum((-2, -1)).sqrt().log10() + after.m.double() / math.log(10)
    return {"kind": "m", **_of_gates(i, f, forget_gate, exponents), "state_log10": _largest(norms), "floor": floor}


def _of_slstm(
    gates: Float[Tensor, "B T 4 H K"],
    R: Float[Tensor, "H K 4 K"],
    b: Float[Tensor, "4 H K"],
    state: sLSTMState | None = None,
    *,
    h: Float[Tensor, "B T H K"],
    after: sLSTMState,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    forget_gate: str = "sigmoid",
) -> dict[str, Any]:
    gates, R, b = gates.float(), R.float(), b.float()
    first = torch.zeros_like(h[:, :1]) if state is None else state.h[:, None].to(h.dtype)
    before = torch.cat((first, h[:, :-1]), dim=1).float()  # the output that each step mixes in
    if reset is not None:
        before = torch.where(reset[..., None, None], 0.0, before)
    i, f = ((gates + torch.einsum("bthd,hdge->btghe", before, R) + b)[:, :, gate] for gate in (0, 1))
    # An element that has seen nothing takes m from its input gate alone: it arrives with an exponent of -inf.
    empty = i.new_full((), -math.inf)
    m = empty if state is None else torch.where(state.n == 0, empty, state.m)[:, None]
    exponents = _running_max(_log_keep(f, forget_gate), i, m, reset, emptied=-math.inf)
    norms = after.c.double().mul(after.m.double().exp()).square().sum(-1).sqrt().log10()
    return {"kind": "s", **_of_gates(i, f, forget_gate, exponents), "state_log10": _largest(norms), "floor": None}


def _of_gates(i: Tensor, f: Tensor, forget_gate: str, m: Tensor) -> dict[str, float]:
    keep = _log_keep(f, forget_gate).exp()
    return {
        "forget_mean": keep.mean().item(),
        "forgetful": _share(keep < 0.5),
        "input_max": i.abs().max().item(),
        "m_min": m.min().item(),
        "m_max": m.max().item(),
    }


def _log_keep(f: Tensor, forget_gate: str) -> Tensor:
    return F.logsigmoid(f) if forget_gate == "sigmoid" else f


def _running_max(
    log_f: Float[Tensor, "B T *any"],
    i: Float[Tensor, "B T *any"],
    m: Tensor,
    reset: Bool[Tensor, "B T"] | None,
    emptied: float = 0.0,
) -> Float[Tensor, "B T *any"]:
    """m_t = max(log_f_t + m_{t-1}, i_t), eq. (15), at every t, from m; a reset puts `emptied` in the place of m_{t-1}.

    A step is the function x -> max(a + x, b), and the composition of two is of that form again: log2(T) doublings.
    """
    a, b = log_f, i
    if reset is not None:
        flag = reset.reshape(reset.shape + (1,) * (i.ndim - 2))
        b = torch.where(flag, torch.maximum(log_f + emptied, i), i)
        a = torch.where(flag, -math.inf, log_f)
    reach = 1
    while reach < i.shape[1]:
        far = torch.maximum(a[:, reach:] + b[:, :-reach], b[:, reach:])
        a = torch.cat((a[:, :reach], a[:, reach:] + a[:, :-reach]), dim=1)
        b = torch.cat((b[:, :reach], far), dim=1)
        reach *= 2
    return torch.maximum(a + m, b)


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


def _largest(logarithms: Tensor) -> float | None:
    """The largest, or None where everything is the logarithm of 0."""
    value = logarithms.max().item()
    return None if value == -math.inf else value
