"""Cross-entropy of a linear readout, a few thousand tokens at a time: no tensor of all logits ever exists.

N tokens, D width, W vocabulary. h hidden states, y targets, c soft cap, λ weight of the z-loss, v 1 where a target
counts and 0 elsewhere:

    z = h Wᵀ        a = c tanh(z / c)        ℓ = logsumexp(a)        total = Σ v (ℓ - a_y + λ ℓ²)
    da_j = v (p_j (1 + 2 λ ℓ) - [j = y]),  p = exp(a - ℓ)            dz = da (1 - (a / c)²)
    dh = dz W                                                        dW = Σ over chunks of dzᵀ h

For 65,536 tokens and 50,304 entries all logits in fp32 take 13.2 GB, a chunk of 2,048 tokens 0.4 GB. The gradients are
formed in the forward pass while the logits of a chunk are at hand, and scaled in the backward pass: three products
with the readout, as without chunks. In between dW is held unsharded in fp32, 0.8 GB at 7B; `recompute` forms it in the
backward pass instead, for one more product.

Products run in autocast's dtype, or else in that of h; whatever is computed from the logits runs in fp32 (fp64 for
fp64), and dW is summed in that. On a GPU the logits of 16-bit products come out of the product in fp32; a CPU rounds
them once, as `model.logits` does.

Under torch.compile this is a break in the graph: the trainer compiles block by block, and there is nothing to fuse
around three large products that the in-place operations here do not do. Differentiable once.

z-loss: Chowdhery et al. 2022, arXiv:2204.02311, Sec. 5. Soft cap: arXiv:2503.13427 (13).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


class Entropy(NamedTuple):
    """What the readout's loss consists of."""

    total: Float[Tensor, ""]  # nats and z-loss over the targets that count: what to call backward on
    nats: Float[Tensor, " N"]  # of each target, 0 where it does not count; without a gradient
    z: Float[Tensor, ""]  # the z-loss within `total`; without a gradient


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "W D"],
    targets: Int[Tensor, " N"],
    valid: Bool[Tensor, " N"],
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    chunk: int = 2048,
    recompute: bool = False,
) -> Entropy:
    """The loss of every target under the readout `weight`, with exact gradients for `hidden` and `weight`.

    Args:
        targets: where `valid` is false they may be any number, and nothing there has a gradient.
        z_loss: weight of the squared logsumexp, which keeps logits from drifting; 0 in every published recipe.
        chunk: tokens whose logits exist at once.
        recompute: form the gradients in the backward pass; less memory in between, one more product.
    """
    device = hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    settings = _Settings(soft_cap, z_loss, chunk, recompute, product)
    with torch.autocast(device, enabled=False):
        return Entropy(*_run(hidden, weight, torch.where(valid, targets, 0), valid, settings))


class _Settings(NamedTuple):
    soft_cap: float | None
    z_loss: float
    chunk: int
    recompute: bool
    product: torch.dtype


@torch.compiler.disable
def _run(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor]:
    return _LinearCrossEntropy.apply(hidden, weight, targets, valid, settings)


@final
class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.settings, ctx.gradients = settings, None
        wanted = ctx.needs_input_grad[:2]
        early = any(wanted) and not settings.recompute
        if any(wanted) and settings.recompute:
            ctx.save_for_backward(hidden, weight, targets, valid)
        nats, z, gradients = _pass(hidden, weight, targets, valid, settings, wanted if early else (False, False))
        ctx.gradients = gradients if early else None
        ctx.mark_non_differentiable(nats, z)
        return nats.sum() + z, nats, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.settings.recompute:
            hidden, weight, targets, valid = ctx.saved_tensors
            formed = _pass(hidden, weight, targets, valid, ctx.settings, ctx.needs_input_grad[:2])[2]
        else:
            formed, ctx.gradients = ctx.gradients, None  # let go of, so that they become .grad without a copy
            if formed is None:
                raise RuntimeError(
                    "the gradients of this cross-entropy were formed once and are used up; for several backward passes"
                    " through one graph set loss.recompute = true"
                )
        dh, dW = (None if part is None else part.mul_(factor) for part in formed)
        return dh, dW, None, None, None


def _pass(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, settings: _Settings, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Nats of each target, the z-loss, and the wanted gradients of their sum, for hidden and weight.

    Every tensor of the size of a chunk's logits is made once and used by all chunks: fresh memory for each would cost
    more than the arithmetic on it.
    """
    exact = torch.promote_types(settings.product, torch.float32)
    rows = min(settings.chunk, max(1, len(hidden)))
    W = weight.to(settings.product)
    logits = hidden.new_empty(rows, len(weight), dtype=exact)
    narrow = logits if settings.product == exact else hidden.new_empty(rows, len(weight), dtype=settings.product)
    slope = torch.empty_like(logits) if settings.soft_cap is not None and any(wanted) else None
    nats = hidden.new_zeros(len(hidden), dtype=exact)
    z = hidden.new_zeros((), dtype=exact)
    dh = torch.empty_like(hidden) if wanted[0] else None
    dW = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
    for part in _spans(len(hidden), rows):
        size = part.stop - part.start
        h, y, v = hidden[part].to(settings.product), targets[part, None], valid[part, None].to(exact)
        a = _scores(h, W, logits[:size], narrow[:size])
        t = None if slope is None else slope[:size]
        if settings.soft_cap is not None:
            a.div_(settings.soft_cap).tanh_()
            if t is not None:
                torch.addcmul(torch.ones((), dtype=exact, device=a.device), a, a, value=-1, out=t)  # 1 - (a / c)²
            a.mul_(settings.soft_cap)
        a_y, highest = a.gather(1, y), a.amax(dim=1, keepdim=True)
        total = a.sub_(highest).exp_().sum(dim=1, keepdim=True)
        lse = total.log() + highest
        nats[part] = ((lse - a_y) * v)[:, 0]
        z += settings.z_loss * (lse.square() * v).sum()
        if not any(wanted):
            continue
        dz = a.mul_(v * (1 + 2 * settings.z_loss * lse) / total).scatter_add_(1, y, -v)
        if t is not None:
            dz.mul_(t)
        if dz.dtype != settings.product:
            dz = narrow[:size].copy_(dz)
        if dh is not None:
            dh[part] = dz @ W
        if dW is not None:
            _add_product(dW, dz.t(), h)
    return nats, z, (dh, None if dW is None else dW.to(weight.dtype))


def _scores(h: Tensor, W: Tensor, logits: Tensor, narrow: Tensor) -> Tensor:
    """`logits`, filled with h Wᵀ."""
    if h.dtype == logits.dtype:
        return torch.mm(h, W.t(), out=logits)
    if h.is_cuda:
        return torch.mm(h, W.t(), out_dtype=logits.dtype, out=logits)
    return logits.copy_(torch.mm(h, W.t(), out=narrow))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total += a @ b


def _spans(length: int, size: int) -> Iterator[slice]:
    """0..length in slices of `size`, the last one shorter."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
