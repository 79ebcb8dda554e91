"""mLSTM, chunkwise, in plain PyTorch with a hand-written backward: any device, any dtype, any length.

The equations are those of `cells/mlstm.py` (arXiv:2405.04517, Sec. 2.3), unrolled inside chunks of L steps. With s =
K**-0.5, d_j the denominator of (21), u_j = dh_j / d_j and GC the gradient at a chunk's end state:

    S_jl = s (q_j . k_l) w_jl              dS_jl = (u_j . v_l) w_jl
    h_j  = (S v + s g_j C^T q_j) / d_j     dq_j  = s (dS k + g_j C u_j)
    C'   = decay C + sum_l write_l k_l v_l^T     GC_prev = decay GC + s sum_j g_j q_j u_j^T
                                           dk_l  = s dS^T q + write_l GC v_l     dv_l = S^T u + write_l GC^T k_l

The normaliser needs no line of its own: n is one more column of C and 1 one more column of v, so its product with q,
a_j, is one more column of the numerator, and its gradient da_j = -sign(a_j) (dh_j . h_j) / d_j one more column of u
(0 where the floor of the denominator acts). Everything is fp32, or fp64; reduced-precision inputs are cast as they are
read, so sums and normaliser are never rounded.

Gates: with p_l = k_l . dk_l, di_l = p_l, and the gradient of the log forget gate at t is the sum over j >= t of
q_j . dq_j - p_j, inside the chunk, plus <GC, C'> at its end: one running sum over the sequence would lose precision.
m is an exponent and carries no gradient.

Saved for backward: the inputs, a, and C at every block of chunks, not even h; the rest is computed again. Work
proceeds in blocks of about BLOCK steps and as many sequences as fit the cache: big enough to hide the cost of a call,
small enough that memory grows with the inputs alone.

Z = rows of the batch x heads; G chunks in a block; X = V, or V + 1 rounded up to 8 where there is a normaliser.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from openxlstm.cells.mlstm import denominator
from openxlstm.kernels.torch.gates import GatePass, from_chunks, gate_pass

BLOCK = 512  # steps between two saved states
CACHE = 8 << 20  # bytes that one block's working set should not exceed


@dataclass(frozen=True, slots=True)
class Block:
    """G consecutive chunks of L steps (the last block of a sequence may be a single, shorter chunk)."""

    index: int
    chunks: slice
    steps: slice
    G: int
    L: int

    def saved(self, rows: slice, B: int, H: int) -> slice:
        """Where the state before this block is kept for these rows of a batch of B."""
        return slice((self.index * B + rows.start) * H, (self.index * B + rows.stop) * H)


def blocks(T: int, chunk: int) -> Iterator[Block]:
    """Cut [0, T) into blocks of whole chunks and at most one shorter chunk at the end."""
    full, per_block, index = T // chunk, max(1, BLOCK // chunk), 0
    for first in range(0, full, per_block):
        last = min(first + per_block, full)
        yield Block(index, slice(first, last), slice(first * chunk, last * chunk), last - first, chunk)
        index += 1
    if T % chunk:
        yield Block(index, slice(full, full + 1), slice(full * chunk, T), 1, T % chunk)


def saved_states(T: int, chunk: int) -> int:
    """How many states the forward pass keeps: one per block, counted without a branch on T, which may be symbolic."""
    full, per_block = T // chunk, max(1, BLOCK // chunk)
    return -(-full // per_block) + (-(-T // chunk) - full)


def best_chunk(K: int, V: int) -> int:
    """The chunk length that was fastest on a CPU (docs/log.md): scores cost L (K + V) per step, states K V / L."""
    return 32 if K * V <= 32 * 32 else 64 if K * V <= 128 * 256 else 128


def width(V: int, input_gate: str) -> int:
    """X: columns of the memory, with the normaliser's. Rounded up to 8, which matrix products like."""
    return V if input_gate == "sigmoid" else -(-(V + 1) // 8) * 8


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C: Tensor,
    n: Tensor,
    m: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    input_gate: str,
    forget_gate: str,
    eps: float,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h [B,T,H,V]; C, n, m after the last step; a [B,T,H]; states [P B H, K, X], P = 0 unless `save`. T >= 1.

    P, B and H share an axis: a compiler takes an axis of length 1 for a constant, and P = 1 would compile anew.
    """
    B, T, H, K = q.shape
    V, X = v.shape[-1], width(v.shape[-1], input_gate)
    gates = gate_pass(i, f, m, reset, mask, input_gate=input_gate, forget_gate=forget_gate, chunk=chunk)
    h, a = v.new_empty(B, T, H, V, dtype=q.dtype), C.new_zeros(B, T, H)
    states = C.new_empty(saved_states(T, chunk) * B * H if save else 0, K, X)
    end = C.new_empty(B, H, K, X)
    for rows in _batches(B, H * min(T, BLOCK) * (3 * K + 2 * X + 2 * chunk) * C.element_size()):
        memory = _join(C[rows], n[rows], X)
        for block in blocks(T, chunk):
            if save:
                states[block.saved(rows, B, H)] = memory
            part = _Part.read(q, k, v, gates, mask, rows, block, X)
            path = part.states(memory)
            memory = path[-1]
            y = torch.bmm(part.q.flatten(0, 1), path[:-1].flatten(0, 1)).view(block.G, -1, block.L, X)
            y.mul_(part.enter[..., None])
            y.flatten(0, 1).baddbmm_(part.scores().flatten(0, 1), part.v.flatten(0, 1))
            if input_gate != "sigmoid":
                y_a = y[..., V]
                part.write(a[..., None], y_a[..., None])
                y = y.div_(denominator(y_a, part.m, eps)[..., None])
            if part.mask is not None:
                y.masked_fill_(~part.mask, 0.0)
            part.write(h, y[..., :V])
        end[rows] = memory.view(-1, H, K, X)
    last_n = n.new_zeros(n.shape) if input_gate == "sigmoid" else end[..., V].contiguous()
    return h, end[..., :V].contiguous(), last_n, gates.m_out, a, states


def backward(
    dh: Tensor | None,
    dC: Tensor | None,
    dn: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    m: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    a: Tensor,
    states: Tensor,
    input_gate: str,
    forget_gate: str,
    eps: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, i, f and of the initial C and n, for cotangents of h and of the final C and n."""
    B, T, H, K = q.shape
    V, X = v.shape[-1], states.shape[-1]
    gates = gate_pass(i, f, m, reset, mask, input_gate=input_gate, forget_gate=forget_gate, chunk=chunk)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dC0, dn0 = states.new_empty(B, H, K, V), states.new_empty(B, H, K)
    p_all, r_all = (torch.zeros_like(gates.key) for _ in range(2))
    dC = states.new_zeros(1).expand(B, H, K, V) if dC is None else dC
    dn = states.new_zeros(1).expand(B, H, K) if dn is None or input_gate == "sigmoid" else dn
    for rows in _batches(B, H * min(T, BLOCK) * (6 * K + 4 * X + 4 * chunk) * states.element_size()):
        grad = _join(dC[rows], dn[rows], X)
        for block in reversed(list(blocks(T, chunk))):
            part = _Part.read(q, k, v, gates, mask, rows, block, X)
            path = part.states(states[block.saved(rows, B, H)])
            weight = part.weights().flatten(0, 1)
            S = torch.bmm(part.q.flatten(0, 1), part.k.flatten(0, 1).mT).mul_(weight)
            u = part.cotangents(dh, a, eps, normalised=input_gate != "sigmoid")
            dS = torch.bmm(u.flatten(0, 1), part.v.flatten(0, 1).mT)
            part_dq = torch.bmm(u.flatten(0, 1), path[:-1].flatten(0, 1).mT)
            if input_gate != "sigmoid":
                e = (S * dS).sum(-1) + part.enter.flatten(0, 1) * (part.q.flatten(0, 1) * part_dq).sum(-1)
                da = part.normaliser_gradient(e.view(block.G, -1, block.L), a, eps)
                u[..., V] = da
                da = da.flatten(0, 1)[..., None]
                dS.add_(da)
                part_dq.addcmul_(da, path[:-1, ..., V].flatten(0, 1)[:, None])
            dS.mul_(weight)
            grads = part.gradients(grad, u)
            grad = grads[0]

            part_dq.mul_(part.enter.flatten(0, 1)[..., None]).baddbmm_(dS, part.k.flatten(0, 1))
            part_dk = torch.bmm(part.v.flatten(0, 1), grads[1:].flatten(0, 1).mT)
            part_dk.mul_(part.into_end.flatten(0, 1)[..., None]).baddbmm_(dS.mT, part.q.flatten(0, 1))
            part_dv = torch.bmm(part.k.flatten(0, 1), grads[1:].flatten(0, 1))
            part_dv.mul_(part.into_end.flatten(0, 1)[..., None]).baddbmm_(S.mT, u.flatten(0, 1))

            p = (part.k.flatten(0, 1) * part_dk).sum(-1)
            x = (part.q.flatten(0, 1) * part_dq).sum(-1).sub_(p)  # part.q carries s, so part_dq does not yet
            rho = (grads[1:] * path[1:]).sum((-2, -1))
            here = (block.chunks, rows, slice(None), slice(0, block.L))
            p_all[here] = p.view(block.G, -1, H, block.L)
            r_all[here] = part.sum_from(x.view(block.G, -1, block.L), rho).view(block.G, -1, H, block.L)
            shape = (block.G, -1, block.L)
            part.write(dq, part_dq.mul_(K**-0.5).view(*shape, K))
            part.write(dk, part_dk.view(*shape, K))
            part.write(dv, part_dv.view(*shape, X)[..., :V])
        grad = grad.view(-1, H, K, X)
        dC0[rows] = grad[..., :V]
        dn0[rows] = grad[..., V] if input_gate != "sigmoid" else 0.0
    di, df = from_chunks(p_all, T), from_chunks(r_all, T)
    if input_gate != "exp":
        di = di * torch.sigmoid(-i.to(di.dtype))
    if forget_gate == "sigmoid":
        df = df * torch.sigmoid(-f.to(df.dtype))
    if mask is not None:  # their gates may hold NaN
        di, df = (torch.where(mask[..., None], x, 0.0) for x in (di, df))
    if reset is not None:
        df = torch.where(reset[..., None], 0.0, df)  # what it would have kept was emptied
    di, df = (x.to(gate.dtype).contiguous() for x, gate in ((di, i), (df, f)))  # as register_fake promises
    return dq, dk, dv, di, df, dC0, dn0


@dataclass(frozen=True, slots=True)
class _Part:
    """One block of some rows of the batch, in the layout of the matrix products: [G, Z, L, *], contiguous."""

    q: Tensor  # times s
    k: Tensor
    v: Tensor  # with the normaliser's column of ones
    key: Tensor  # [G, Z, L], and so on: see gates.py
    row: Tensor
    m: Tensor
    enter: Tensor
    into_end: Tensor
    same: Tensor | None  # [G, B', 1, L, L]: both steps in one segment
    mask: Tensor | None  # [G, Z, L, 1]
    rows: slice
    block: Block

    @classmethod
    def read(
        cls, q: Tensor, k: Tensor, v: Tensor, gates: GatePass, mask: Tensor | None, rows: slice, block: Block, X: int
    ) -> _Part:
        H, K, V, G, L = q.shape[2], q.shape[3], v.shape[3], block.G, block.L
        dtype = gates.key.dtype
        real = None
        if mask is not None:
            real = mask[rows, block.steps].view(-1, G, L).transpose(0, 1)[:, :, None, :, None]
            real = real.expand(-1, -1, H, -1, -1).reshape(G, -1, L, 1)

        def gather(x: Tensor, columns: int) -> Tensor:
            x_GBHL = _view(x[rows, block.steps], G, L)
            out = torch.empty(*x_GBHL.shape[:-1], columns, dtype=dtype, device=x.device)
            out[..., : x.shape[-1]] = x_GBHL
            out = out.flatten(1, 2)
            return out if real is None else out.masked_fill_(~real, 0.0)  # 0 * NaN is NaN

        q_part, k_part, v_part = gather(q, K).mul_(K**-0.5), gather(k, K), gather(v, X)
        if X > V:
            v_part[..., V] = 1.0
            v_part[..., V + 1 :] = 0.0
        key, row, m, enter, write = (
            x[block.chunks, rows, :, :L].flatten(1, 2)
            for x in (gates.key, gates.row, gates.m, gates.enter, gates.write)
        )
        same = None
        if gates.segment is not None:
            segment = gates.segment[block.chunks, rows, :, :L]
            same = segment[..., :, None] == segment[..., None, :]
        return cls(q_part, k_part, v_part, key, row, m, enter, write, same, real, rows, block)

    def weights(self) -> Tensor:
        """w_jl = exp(key_l - row_j) for l <= j in the same segment, else 0; [G, Z, L, L]."""
        w = torch.exp_(self.key[..., None, :] - self.row[..., :, None]).tril_()
        if self.same is not None:
            G, B = self.same.shape[:2]
            w.view(G, B, -1, *w.shape[-2:]).masked_fill_(~self.same, 0.0)
        return w

    def scores(self) -> Tensor:
        """S_jl = s (q_j . k_l) w_jl, [G, Z, L, L]."""
        w = self.weights()
        return torch.bmm(self.q.flatten(0, 1), self.k.flatten(0, 1).mT).view_as(w).mul_(w)

    def states(self, memory: Tensor) -> Tensor:
        """The memory before each chunk and after the last, [G + 1, Z, K, X]."""
        weighted = self.k * self.into_end[..., None]
        path = memory.new_empty(self.block.G + 1, *memory.shape)
        path[0] = memory
        torch.bmm(weighted.flatten(0, 1).mT, self.v.flatten(0, 1), out=path[1:].flatten(0, 1))
        for g in range(self.block.G):
            path[g + 1].addcmul_(path[g], self.enter[g, :, -1, None, None])
        return path

    def gradients(self, grad: Tensor, u: Tensor) -> Tensor:
        """The gradient of the memory before the first chunk and after each, [G + 1, Z, K, X]."""
        weighted = self.q * self.enter[..., None]
        path = grad.new_empty(self.block.G + 1, *grad.shape)
        path[-1] = grad
        torch.bmm(weighted.flatten(0, 1).mT, u.flatten(0, 1), out=path[:-1].flatten(0, 1))
        for g in reversed(range(self.block.G)):
            path[g].addcmul_(path[g + 1], self.enter[g, :, -1, None, None])
        return path

    def cotangents(self, dh: Tensor | None, a: Tensor, eps: float, normalised: bool) -> Tensor:
        """u = dh / d, [G, Z, L, X]; the normaliser's column is still 0."""
        u = torch.zeros_like(self.v)
        if dh is None:
            return u
        _split(u[..., : dh.shape[-1]], dh.shape[2]).copy_(
            _view(dh[self.rows, self.block.steps], self.block.G, self.block.L)
        )
        if self.mask is not None:
            u.masked_fill_(~self.mask, 0.0)
        return u.div_(denominator(self.read_a(a), self.m, eps)[..., None]) if normalised else u

    def normaliser_gradient(self, e: Tensor, a: Tensor, eps: float) -> Tensor:
        """da = -sign(a) e / d where the floor of the denominator does not act, with e = dh . h: [G, Z, L].

        e comes from the unrounded sums that make up h, not from the h that was returned: in bf16 its rounding alone
        costs up to 1.7 % of the gradient of n (docs/log.md).
        """
        a = self.read_a(a)
        above = a.abs() > denominator(torch.zeros_like(a), self.m, 0.0)
        return torch.where(above, -a.sign() * e / denominator(a, self.m, eps), 0.0)

    def read_a(self, a: Tensor) -> Tensor:
        """a of this block, [G, Z, L]."""
        return _view(a[self.rows, self.block.steps, :, None], self.block.G, self.block.L).flatten(1, 2)[..., 0]

    def sum_from(self, x: Tensor, rho: Tensor) -> Tensor:
        """r_t: the sum of x_j over j >= t of t's segment in the chunk, and rho if that segment reaches its end."""
        if self.same is None:
            return x.flip(-1).cumsum(-1).flip(-1) + rho[..., None]
        G, B, _, L, _ = self.same.shape
        later = self.same.triu().to(x.dtype)
        r = torch.einsum("gbhj,gbtj->gbht", x.view(G, B, -1, L), later[:, :, 0])
        return (r + rho.view(G, B, -1, 1) * self.same[..., -1]).flatten(1, 2)

    def write(self, out: Tensor, part: Tensor) -> None:
        """Put a part [G, Z, L, *] back where it belongs in [B, T, H, *]."""
        _view(out[self.rows, self.block.steps], self.block.G, self.block.L).copy_(_split(part, out.shape[2]))


def _view(x: Tensor, G: int, L: int) -> Tensor:
    """[B', G L, H, *] -> [G, B', H, L, *], a view."""
    return x.unflatten(1, (G, L)).permute(1, 0, 3, 2, 4)


def _split(x: Tensor, H: int) -> Tensor:
    """[G, B' H, L, *] -> [G, B', H, L, *], a view."""
    return x.unflatten(1, (-1, H))


def _join(C: Tensor, n: Tensor, X: int) -> Tensor:
    """C and, as one more column, n: [Z, K, X]."""
    B, H, K, V = C.shape
    joined = C.new_zeros(B, H, K, X)
    joined[..., :V] = C
    if X > V:
        joined[..., V] = n
    return joined.flatten(0, 1)


def _batches(B: int, bytes_per_row: int) -> Iterator[slice]:
    """Rows of the batch that are worked on together: as many as keep a block's working set in the cache."""
    size = max(1, min(B, CACHE // max(bytes_per_row, 1)))
    for first in range(0, B, size):
        yield slice(first, min(first + size, B))
