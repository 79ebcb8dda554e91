"""The native mLSTM over a sequence as operators of PyTorch's dispatcher, as those of `ops.py` are.

For a backward pass the forward operator keeps a, the query's product with n, and the state at every border of chunks;
everything else is computed again. Without a gradient to come it keeps nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openxlstm.kernels.cpu.library import MlstmBackward, MlstmForward, Native, native, pointer, slot, threads
from openxlstm.kernels.cpu.ops import _fp32, _lib, _library, _plain
from openxlstm.kernels.torch.ops import once

_FOUND = native()
_TILES = (
    isinstance(_FOUND, Native) and _FOUND.name == "amx"
)  # products are cheap then, and what is left costs by the chunk
INPUT_GATES = ("exp", "sigmoid", "sigmoid_normalized")  # by number, as csrc/openxlstm.h has them

_lib.define(
    "mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor C, Tensor n, Tensor m, Tensor? reset, Tensor? mask,"
    " str input_gate, float eps, int chunk, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "mlstm_backward(Tensor? dh, Tensor? dC, Tensor? dn, Tensor q, Tensor k, Tensor v, Tensor i, Tensor f,"
    " Tensor? reset, Tensor? mask, Tensor a, Tensor states, Tensor stabilisers, str input_gate, float eps, int chunk)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def best_chunk(K: int, V: int, dtype: torch.dtype) -> int:
    """The chunk length that was fastest (docs/log.md): scores cost L (K + V) a step, reading and writing C K V / L."""
    large = K * V > 128 * 256
    if _TILES and dtype == torch.bfloat16:
        return 256 if large else 128
    return 128 if large else 64


def _rows(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor,
    reset: Tensor | None, mask: Tensor | None, input_gate: str, eps: float, chunk: int, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, T, H, K = q.shape
    V, chunks = v.shape[-1], -(-T // chunk)
    q, k, v = _rows(q, k, v)
    read = [_fp32(i), _fp32(f), _plain(reset), _plain(mask), C.contiguous(), n.contiguous(), m.contiguous()]
    written = [q.new_empty(B, T, H, V), C.new_empty(B, H, K, V), n.new_empty(B, H, K), m.new_empty(B, H)]
    kept = [C.new_empty(B, T, H), C.new_empty(B, H, chunks + 1, slot(K, V)), C.new_empty(B, H, chunks)]
    if not save:
        kept = [C.new_empty(0) for _ in kept]
    if B:
        call = MlstmForward(
            B, T, H, K, V, threads(), q.dtype == torch.bfloat16, INPUT_GATES.index(input_gate), chunk,
            *(x.stride()[:3] for x in (q, k, v)), eps,
            *(pointer(x) for x in (q, k, v, *read, *written)), *(pointer(x) if save else None for x in kept),
        )  # fmt: skip
        _library().mlstm_forward(call)
    return *written, *kept


def _mlstm_backward(
    dh: Tensor | None, dC: Tensor | None, dn: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, reset: Tensor | None, mask: Tensor | None,
    a: Tensor, states: Tensor, stabilisers: Tensor, input_gate: str, eps: float, chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, T, H, K = q.shape
    V = v.shape[-1]
    q, k, v = _rows(q, k, v)
    cotangents = [_plain(x) for x in (dh, dC, dn)]
    read = [_fp32(i), _fp32(f), _plain(reset), _plain(mask), a, states, stabilisers]  # alive until the sweep is done
    gradients = [q.new_empty(B, T, H, width) for width in (K, K, V)]
    gates = [a.new_empty(B, T, H) for _ in range(2)]
    starts = [a.new_empty(B, H, K, V), a.new_empty(B, H, K)]
    if B:
        call = MlstmBackward(
            B, T, H, K, V, threads(), q.dtype == torch.bfloat16, INPUT_GATES.index(input_gate), chunk,
            *(x.stride()[:3] for x in (q, k, v)), eps,
            *(pointer(x) for x in (*cotangents, q, k, v, *read, *gradients, *gates, *starts)),
        )  # fmt: skip
        _library().mlstm_backward(call)
    return *gradients, gates[0].to(i.dtype), gates[1].to(f.dtype), *starts


def _mlstm_fake(q: Any, k: Any, v: Any, i: Any, f: Any, C: Any, n: Any, m: Any, *rest: Any) -> tuple[Tensor, ...]:
    B, T, H, K = q.shape
    V = v.shape[-1]
    chunk, save = rest[-2:]
    written = q.new_empty(B, T, H, V), C.new_empty(C.shape), n.new_empty(n.shape), m.new_empty(m.shape)
    if not save:
        return *written, *(C.new_empty(0) for _ in range(3))
    chunks = -(-T // chunk)
    kept = C.new_empty(B, T, H), C.new_empty(B, H, chunks + 1, slot(K, V)), C.new_empty(B, H, chunks)
    return *written, *kept


def _mlstm_backward_fake(dh: Any, dC: Any, dn: Any, *rest: Any) -> tuple[Tensor, ...]:
    q, k, v, i, f, _reset, _mask, a = rest[:8]
    B, _, H, K = q.shape
    V = v.shape[-1]
    plain = [x.new_empty(x.shape) for x in (q, k, v, i, f)]
    return *plain, a.new_empty(B, H, K, V), a.new_empty(B, H, K)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, i, f, _C, _n, _m, reset, mask, *options, _save = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, i, f, reset, mask, *output[4:])
    ctx.options = options


def _gradient(ctx: Any, dh: Any, dC: Any, dn: Any, *rest: Any) -> tuple[Any, ...]:
    gradients = torch.ops.openxlstm_cpu.mlstm_backward(dh, dC, dn, *ctx.saved_tensors, *ctx.options)
    return *gradients, *([None] * 7)


for _name, _body, _fake in (
    ("mlstm", _mlstm, _mlstm_fake),
    ("mlstm_backward", _mlstm_backward, _mlstm_backward_fake),
):
    _lib.impl(_name, _body, "CPU")
    torch.library.register_fake(f"openxlstm_cpu::{_name}", _fake, lib=_lib)
torch.library.register_autograd("openxlstm_cpu::mlstm", _gradient, setup_context=_save, lib=_lib)
torch.library.register_autograd("openxlstm_cpu::mlstm_backward", once, lib=_lib)
