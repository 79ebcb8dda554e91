"""What surrounds the cells as operators of PyTorch's dispatcher, as those of `ops.py` are.

`project` is convolution, block-diagonal maps and gates in one pass; `gate` norm, skip and output gate; `norm` a
LayerNorm that reads one dtype and writes another. Nothing is kept for a backward pass but inputs and outputs: what lies
between is computed again.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from openxlstm.kernels.cpu.glue_calls import (
    GateBackward,
    GateForward,
    NormBackward,
    NormForward,
    ProjectBackward,
    ProjectForward,
)
from openxlstm.kernels.cpu.library import pointer, threads
from openxlstm.kernels.cpu.ops import _fp32, _lib, _library, _plain
from openxlstm.kernels.torch.ops import once

_lib.define(
    "project(Tensor x, Tensor w, Tensor b, Tensor? q_map, Tensor? k_map, Tensor? v_map, Tensor? gate_w, Tensor? gate_b,"
    " Tensor past, Tensor? reset, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "project_backward(Tensor? dc, Tensor? dq, Tensor? dk, Tensor? dv, Tensor? draw, Tensor? dlast, Tensor x, Tensor w,"
    " Tensor b, Tensor? q_map, Tensor? k_map, Tensor? v_map, Tensor? gate_w, Tensor? gate_b, Tensor past,"
    " Tensor? reset, Tensor? mask, Tensor c, Tensor q, Tensor k, Tensor v)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define("gate(Tensor h, Tensor c, Tensor z, Tensor weight, Tensor skip, float eps) -> Tensor")
_lib.define(
    "gate_backward(Tensor dy, Tensor h, Tensor c, Tensor z, Tensor weight, Tensor skip, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define("norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> Tensor")
_lib.define("norm_backward(Tensor dy, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")


def _pointers(*tensors: Tensor | None) -> Any:
    return (c_void_p * 3)(*(pointer(x) for x in tensors))


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _inner(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _project(
    x: Tensor, w: Tensor, b: Tensor, q_map: Tensor | None, k_map: Tensor | None, v_map: Tensor | None,
    gate_w: Tensor | None, gate_b: Tensor | None, past: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, T, U = x.shape
    J, G = w.shape[1], 0 if gate_w is None else gate_w.shape[0]
    x = _inner(x)
    maps = [_fp32(part) for part in (q_map, k_map, v_map)]
    read = [_fp32(part) for part in (w, b, gate_w, gate_b, past)]
    flags = [_plain(reset), _plain(mask)]
    written = [x.new_empty(B, T, U)] + [x.new_empty(B, T, U) if q_map is not None else x.new_empty(0) for _ in maps]
    raw, last = past.new_empty(B, T, G), past.new_empty(past.shape)
    call = ProjectForward(
        B, T, U, J, G, threads(), _is_bf16(x), (c_int64 * 2)(*x.stride()[:2]),
        *(pointer(part) for part in (x, *read[:2])), _pointers(*maps),
        *(pointer(part) for part in (*read[2:], *flags, written[0])), _pointers(*written[1:]),
        pointer(raw), pointer(last),
    )  # fmt: skip
    _library().run("project_forward", call)
    return *written, raw, last


def _project_backward(
    dc: Tensor | None, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, draw: Tensor | None,
    dlast: Tensor | None, x: Tensor, w: Tensor, b: Tensor, q_map: Tensor | None, k_map: Tensor | None,
    v_map: Tensor | None, gate_w: Tensor | None, gate_b: Tensor | None, past: Tensor, reset: Tensor | None,
    mask: Tensor | None, c: Tensor, q: Tensor, k: Tensor, v: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, T, U = x.shape
    J, G = w.shape[1], 0 if gate_w is None else gate_w.shape[0]
    x = _inner(x)
    maps = [_fp32(part) for part in (q_map, k_map, v_map)]
    read = [_fp32(part) for part in (w, b, gate_w, past)]
    flags = [_plain(reset), _plain(mask)]
    draw = past.new_zeros(B, T, G) if draw is None else _plain(draw)
    cotangents = [_plain(part) for part in (dc, dq, dk, dv)]
    dlast = _plain(dlast)
    dx, dpast = x.new_empty(B, T, U), past.new_empty(past.shape)
    dw, db = (past.new_empty(part.shape) for part in (w, b))
    dmaps = [past.new_empty(U // 4, 4, 4) if q_map is not None else past.new_empty(0) for _ in maps]
    dgate_w, dgate_b = past.new_empty(G, 3 * U), past.new_empty(G)
    call = ProjectBackward(
        B, T, U, J, G, threads(), _is_bf16(x), (c_int64 * 2)(*x.stride()[:2]),
        *(pointer(part) for part in (x, *read[:2])), _pointers(*maps),
        *(pointer(part) for part in (*read[2:], *flags, c)), _pointers(q, k, v),
        pointer(cotangents[0]), _pointers(*cotangents[1:]),
        *(pointer(part) for part in (draw, dlast, dx, dw, db)), _pointers(*dmaps),
        *(pointer(part) for part in (dgate_w, dgate_b, dpast)),
    )  # fmt: skip
    _library().run("project_backward", call)
    weights = zip((dw, db, *dmaps, dgate_w, dgate_b), (w, b, q_map, k_map, v_map, gate_w, gate_b), strict=True)
    return dx, *(gradient if of is None else gradient.to(of.dtype) for gradient, of in weights), dpast


def _rows(x: Tensor) -> Tensor:
    """x as [rows, U] with any distance between the rows, without a copy where that can be."""
    return _inner(x.flatten(0, -2) if x.ndim > 1 else x[None])


def _gate(h: Tensor, c: Tensor, z: Tensor, weight: Tensor, skip: Tensor, eps: float) -> Tensor:
    *_, H, V = h.shape
    h, c, z = h.contiguous(), c.contiguous(), _rows(z)
    weight32, skip32 = _fp32(weight), _fp32(skip)
    y = c.new_empty(c.shape)
    call = GateForward(
        z.shape[0], H, V, threads(), _is_bf16(h), z.stride(0), eps,
        *(pointer(part) for part in (h, c, z, weight32, skip32, y)),
    )  # fmt: skip
    _library().run("gate_forward", call)
    return y


def _gate_backward(
    dy: Tensor, h: Tensor, c: Tensor, z: Tensor, weight: Tensor, skip: Tensor, eps: float
) -> tuple[Tensor, ...]:
    *_, H, V = h.shape
    dy, h, c = dy.contiguous(), h.contiguous(), c.contiguous()
    z_rows = _rows(z)
    weight32, skip32 = _fp32(weight), _fp32(skip)
    dh, dc, dz = h.new_empty(h.shape), c.new_empty(c.shape), z.new_empty(z.shape)
    dweight, dskip = (h.new_empty(H * V, dtype=torch.float32) for _ in range(2))
    call = GateBackward(
        z_rows.shape[0], H, V, threads(), _is_bf16(h), z_rows.stride(0), eps,
        *(pointer(part) for part in (dy, h, c, z_rows, weight32, skip32, dh, dc, dz, dweight, dskip)),
    )  # fmt: skip
    _library().run("gate_backward", call)
    return dh, dc, dz, dweight.to(weight.dtype), dskip.to(skip.dtype)


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    x, weight32 = x.contiguous(), _fp32(weight)
    y = x.new_empty(x.shape, dtype=dtype)
    D = x.shape[-1]
    call = NormForward(
        x.numel() // D, D, threads(), _is_bf16(x), _is_bf16(y), eps, *(pointer(part) for part in (x, weight32, y))
    )
    _library().run("norm_forward", call)
    return y


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    dy, x, weight32 = dy.contiguous(), x.contiguous(), _fp32(weight)
    dx, dweight = x.new_empty(x.shape), x.new_empty(weight.shape, dtype=torch.float32)
    D = x.shape[-1]
    call = NormBackward(
        x.numel() // D, D, threads(), _is_bf16(x), _is_bf16(dy), eps,
        *(pointer(part) for part in (dy, x, weight32, dx, dweight)),
    )  # fmt: skip
    _library().run("norm_backward", call)
    return dx, dweight.to(weight.dtype)


def _project_fake(
    x: Any, w: Any, b: Any, q_map: Any, k: Any, v: Any, gate_w: Any, gate_b: Any, past: Any, *_: Any
) -> Any:
    shape = x.shape
    mapped = [x.new_empty(shape) if q_map is not None else x.new_empty(0) for _ in range(3)]
    G = 0 if gate_w is None else gate_w.shape[0]
    return x.new_empty(shape), *mapped, past.new_empty(*shape[:2], G), past.new_empty(past.shape)


def _project_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, w, b, q_map, k_map, v_map, gate_w, gate_b, past = args[6:15]
    empty = [past.new_empty(0)] * 3 + [past.new_empty(0, 3 * x.shape[2]), past.new_empty(0)]
    parts = zip((q_map, k_map, v_map, gate_w, gate_b), empty, strict=True)
    weights = [none if part is None else part.new_empty(part.shape) for part, none in parts]
    return *(part.new_empty(part.shape) for part in (x, w, b)), *weights, past.new_empty(past.shape)


def _gate_fake(h: Any, c: Any, *_: Any) -> Tensor:
    return c.new_empty(c.shape)


def _gate_backward_fake(dy: Any, h: Any, c: Any, z: Any, weight: Any, skip: Any, eps: float) -> tuple[Tensor, ...]:
    return tuple(part.new_empty(part.shape) for part in (h, c, z, weight, skip))


def _norm_fake(x: Any, weight: Any, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _norm_backward_fake(dy: Any, x: Any, weight: Any, eps: float) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _project_save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[:4])


def _project_gradient(ctx: Any, dc: Any, dq: Any, dk: Any, dv: Any, draw: Any, dlast: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    dq, dk, dv = (None if saved[3] is None else d for d in (dq, dk, dv))  # gradients of empty tensors say nothing
    dx, *weights, dpast = torch.ops.openxlstm_cpu.project_backward(dc, dq, dk, dv, draw, dlast, *saved)
    weights = [None if of is None else gradient for gradient, of in zip(weights, saved[1:8], strict=True)]
    return dx, *weights, dpast, None, None


def _gate_save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gate_gradient(ctx: Any, dy: Any) -> tuple[Any, ...]:
    return *torch.ops.openxlstm_cpu.gate_backward(dy, *ctx.saved_tensors, ctx.eps), None


def _norm_save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, ctx.eps, _dtype = inputs
    ctx.save_for_backward(x, weight)


def _norm_gradient(ctx: Any, dy: Any) -> tuple[Any, ...]:
    return *torch.ops.openxlstm_cpu.norm_backward(dy, *ctx.saved_tensors, ctx.eps), None, None


for _name, _body, _fake in (
    ("project", _project, _project_fake),
    ("project_backward", _project_backward, _project_backward_fake),
    ("gate", _gate, _gate_fake),
    ("gate_backward", _gate_backward, _gate_backward_fake),
    ("norm", _norm, _norm_fake),
    ("norm_backward", _norm_backward, _norm_backward_fake),
):
    _lib.impl(_name, _body, "CPU")
    torch.library.register_fake(f"openxlstm_cpu::{_name}", _fake, lib=_lib)
for _name, _save, _gradient in (
    ("project", _project_save, _project_gradient),
    ("gate", _gate_save, _gate_gradient),
    ("norm", _norm_save, _norm_gradient),
):
    torch.library.register_autograd(f"openxlstm_cpu::{_name}", _gradient, setup_context=_save, lib=_lib)
    torch.library.register_autograd(f"openxlstm_cpu::{_name}_backward", once, lib=_lib)
