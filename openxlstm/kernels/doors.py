"""mlstm(), mlstm_step(), slstm(), slstm_step(): check the arguments, choose a backend, call it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from openxlstm.cells import mLSTMState, sLSTMState
from openxlstm.cells.mlstm import check_gates
from openxlstm.cells.slstm import check_gate
from openxlstm.kernels.dispatch import Call, resolve


def mlstm(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    i: Float[Tensor, "B T H"],
    f: Float[Tensor, "B T H"],
    state: mLSTMState | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    input_gate: str = "exp",
    forget_gate: str = "sigmoid",
    eps: float = 1e-6,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], mLSTMState]:
    """The mLSTM over a sequence (arXiv:2405.04517, Sec. 2.3), in parallel inside chunks. Any T, 0 and 1 included.

    Args:
        q, k, v: queries and keys [B,T,H,K], values [B,T,H,V], in bf16, fp16, fp32 or fp64; any strides.
        i, f: pre-activations of input and forget gate; computed in fp32 (fp64 if q is fp64).
        state: what came before; None is the empty state. Always fp32 (fp64 if q is fp64).
        reset: True where a new sequence starts: that step begins from the empty state.
        mask: False where there is no step (padding): the state passes through, h is 0, gradients are 0.
        input_gate: "exp", or without normaliser "sigmoid" (arXiv:2503.14376), or with one "sigmoid_normalized".
        forget_gate: "sigmoid" or "exp"; the latter needs an exponential input gate, whose stabiliser bounds it, and
            eps = 0, which otherwise grows with the empty state.
        eps: added to the denominator, outside its maximum. 0 in the paper, 1e-6 in every published checkpoint.
        chunk: steps computed in parallel, None for the backend's choice. Changes speed and rounding, nothing else.
        backend: "auto", or the name of one, which is then used or refused with a sentence.

    Returns:
        h [B,T,H,V] in q's dtype, and the state after the last step. Both are differentiable, and so are q, k, v, i, f
        and the incoming C and n; m is an exponent and carries no gradient.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an option that does not exist.
    """
    check_gates(input_gate, forget_gate, eps)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 (or None for the backend's choice)")
    state = _mlstm_state(q, k, v, i, f, state, dims=4)
    _check_flags(q.shape[:2], reset=reset, mask=mask)
    if q.shape[1] == 0:
        return torch.zeros_like(v, dtype=q.dtype), state.clone()
    if q.shape[1] == 1:  # decoding through the same door: nothing to be parallel over
        reset, mask = (None if flag is None else flag[:, 0] for flag in (reset, mask))
        q, k, v, i, f = (x[:, 0] for x in (q, k, v, i, f))
        call = _mlstm_call("mlstm_step", q, k, v, i, f, state, reset, mask, input_gate, forget_gate)
        h, state = resolve(call, backend).mlstm_step(
            q, k, v, i, f, state, reset=reset, mask=mask, input_gate=input_gate, forget_gate=forget_gate, eps=eps
        )
        return h[:, None], state
    call = _mlstm_call("mlstm", q, k, v, i, f, state, reset, mask, input_gate, forget_gate)
    return resolve(call, backend).mlstm(
        q, k, v, i, f, state,
        reset=reset, mask=mask, input_gate=input_gate, forget_gate=forget_gate, eps=eps, chunk=chunk,
    )  # fmt: skip


def mlstm_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    i: Float[Tensor, "B H"],
    f: Float[Tensor, "B H"],
    state: mLSTMState | None = None,
    *,
    reset: Bool[Tensor, "B"] | None = None,
    mask: Bool[Tensor, "B"] | None = None,
    input_gate: str = "exp",
    forget_gate: str = "sigmoid",
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B H V"], mLSTMState]:
    """One step of `mlstm`: the same arguments without the time axis, the same errors."""
    check_gates(input_gate, forget_gate, eps)
    state = _mlstm_state(q, k, v, i, f, state, dims=3)
    _check_flags(q.shape[:1], reset=reset, mask=mask)
    call = _mlstm_call("mlstm_step", q, k, v, i, f, state, reset, mask, input_gate, forget_gate)
    return resolve(call, backend).mlstm_step(
        q, k, v, i, f, state, reset=reset, mask=mask, input_gate=input_gate, forget_gate=forget_gate, eps=eps
    )  # fmt: skip


def slstm(
    gates: Float[Tensor, "B T 4 H K"],
    R: Float[Tensor, "H K 4 K"],
    b: Float[Tensor, "4 H K"],
    state: sLSTMState | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    forget_gate: str = "sigmoid",
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H K"], sLSTMState]:
    """The sLSTM over a sequence (arXiv:2405.04517, Sec. 2.2). Any T, 0 and 1 included.

    Args:
        gates: the input's share W x of the pre-activations, in the order i, f, z, o.
        R: memory mixing, R[head, input unit, gate, output unit]; b: biases.
        state: what came before; None is the empty state. Always fp32 (fp64 if the gates are fp64).
        reset: True where a new sequence starts: that step begins from the empty state.
        mask: False where there is no step (padding): the state passes through, h is 0, gradients are 0.
        forget_gate: "sigmoid" or "exp".
        backend: "auto", or the name of one, which is then used or refused with a sentence.

    Returns:
        h [B,T,H,K] in the gates' dtype, and the state after the last step. Both are differentiable, and so are gates,
        R, b and the incoming h, c and n; m is an exponent and carries no gradient.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an option that does not exist.
    """
    state = _slstm_state(gates, R, b, state, forget_gate, dims=5)
    _check_flags(gates.shape[:2], reset=reset, mask=mask)
    if gates.shape[1] == 0:
        return gates[:, :, 0].clone(), state.clone()
    if gates.shape[1] == 1:
        h, state = slstm_step(
            gates[:, 0], R, b, state,
            reset=None if reset is None else reset[:, 0], mask=None if mask is None else mask[:, 0],
            forget_gate=forget_gate, backend=backend,
        )  # fmt: skip
        return h[:, None], state
    call = _slstm_call("slstm", gates, R, b, state, reset, mask, forget_gate)
    return resolve(call, backend).slstm(gates, R, b, state, reset=reset, mask=mask, forget_gate=forget_gate)


def slstm_step(
    gates: Float[Tensor, "B 4 H K"],
    R: Float[Tensor, "H K 4 K"],
    b: Float[Tensor, "4 H K"],
    state: sLSTMState | None = None,
    *,
    reset: Bool[Tensor, "B"] | None = None,
    mask: Bool[Tensor, "B"] | None = None,
    forget_gate: str = "sigmoid",
    backend: str = "auto",
) -> tuple[Float[Tensor, "B H K"], sLSTMState]:
    """One step of `slstm`: the same arguments without the time axis, the same errors."""
    state = _slstm_state(gates, R, b, state, forget_gate, dims=4)
    _check_flags(gates.shape[:1], reset=reset, mask=mask)
    call = _slstm_call("slstm_step", gates, R, b, state, reset, mask, forget_gate)
    return resolve(call, backend).slstm_step(gates, R, b, state, reset=reset, mask=mask, forget_gate=forget_gate)


def _check_flags(shape: torch.Size, **flags: Tensor | None) -> None:
    for name, flag in flags.items():
        if flag is not None and (flag.shape != shape or flag.dtype != torch.bool):
            raise ValueError(f"{name} must be bool {list(shape)}, given {flag.dtype} {list(flag.shape)}")


def _check_tensors(expected: dict[str, tuple[Tensor, list[int]]]) -> None:
    """Shapes, and floating-point numbers: integers would be computed with, and the result cut to integers."""
    for name, (tensor, shape) in expected.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be bf16, fp16, fp32 or fp64, given {tensor.dtype}; use {name}.float()")
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, given {list(tensor.shape)}")


def _check_state(state: mLSTMState | sLSTMState, shapes: dict[str, list[int]], like: Tensor) -> None:
    dtype = torch.promote_types(like.dtype, torch.float32)
    for name, tensor in state.named_tensors():
        if list(tensor.shape) != shapes[name]:
            raise ValueError(f"state.{name} must have shape {shapes[name]}, given {list(tensor.shape)}")
        if tensor.dtype != dtype:
            raise ValueError(
                f"state.{name} must be {dtype} for inputs in {like.dtype}, given {tensor.dtype}: a state kept in lower "
                "precision drifts; state.to(dtype) converts it if you must"
            )
        if tensor.device != like.device:
            raise ValueError(
                f"state.{name} is on {tensor.device}, the inputs are on {like.device}; use state.to(device)"
            )


def _mlstm_state(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: mLSTMState | None, dims: int
) -> mLSTMState:
    if q.ndim != dims:
        raise ValueError(
            f"q must have {dims} axes, {'[B, T, H, K]' if dims == 4 else '[B, H, K]'}, given {list(q.shape)}"
        )
    *front, K = q.shape
    V = v.shape[-1]
    _check_tensors(
        {"q": (q, [*front, K]), "k": (k, [*front, K]), "v": (v, [*front, V]), "i": (i, front), "f": (f, front)}
    )
    B, H = front[0], front[-1]
    if state is None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        return mLSTMState.empty(B, H, K, V, device=q.device, dtype=dtype)
    _check_state(state, {"C": [B, H, K, V], "n": [B, H, K], "m": [B, H]}, q)
    return state


def _slstm_state(
    gates: Tensor, R: Tensor, b: Tensor, state: sLSTMState | None, forget_gate: str, dims: int
) -> sLSTMState:
    check_gate(forget_gate)
    if gates.ndim != dims or gates.shape[-3] != 4:
        wanted = "[B, T, 4, H, K]" if dims == 5 else "[B, 4, H, K]"
        raise ValueError(f"gates must be {wanted} (gates in the order i, f, z, o), given {list(gates.shape)}")
    B, H, K = gates.shape[0], *gates.shape[-2:]
    _check_tensors({"gates": (gates, list(gates.shape)), "R": (R, [H, K, 4, K]), "b": (b, [4, H, K])})
    if state is None:
        dtype = torch.promote_types(gates.dtype, torch.float32)
        return sLSTMState.empty(B, H, K, device=gates.device, dtype=dtype)
    _check_state(state, {name: [B, H, K] for name in "hcnm"}, gates)
    return state


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _mlstm_call(
    op: str, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: mLSTMState,
    reset: Tensor | None, mask: Tensor | None, input_gate: str, forget_gate: str,
) -> Call:  # fmt: skip
    return Call(
        op=op, device=q.device.type, dtype=q.dtype, K=q.shape[-1], V=v.shape[-1],
        needs_grad=_needs_grad(q, k, v, i, f, state.C, state.n), reset=reset is not None, mask=mask is not None,
        input_gate=input_gate, forget_gate=forget_gate,
    )  # fmt: skip


def _slstm_call(
    op: str, gates: Tensor, R: Tensor, b: Tensor, state: sLSTMState,
    reset: Tensor | None, mask: Tensor | None, forget_gate: str,
) -> Call:  # fmt: skip
    return Call(
        op=op, device=gates.device.type, dtype=gates.dtype, K=gates.shape[-1], V=gates.shape[-1],
        needs_grad=_needs_grad(gates, R, b, state.h, state.c, state.n), reset=reset is not None, mask=mask is not None,
        forget_gate=forget_gate,
    )  # fmt: skip
