"""Rows of the cells: mLSTM over a sequence, its decoding step, sLSTM, beside the peers that are there.

FLOPs of the mLSTM are those of `bench/kernels.py`, at chunks of 64 whatever a side uses. The decoding step is timed as
one CUDA graph over many layers' states, beyond the second-level cache, as a share of a copy's bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from openxlstm import kernels
from openxlstm.bench.gpu import peers
from openxlstm.bench.gpu.device import Setting
from openxlstm.bench.gpu.parity import LIMITS
from openxlstm.bench.gpu.stage import case, emit, rows
from openxlstm.bench.harness import OURS, Side, check, measure, relative
from openxlstm.cells import mlstm as mlstm_definition
from openxlstm.cells import mLSTMState
from openxlstm.cells import slstm as slstm_definition

TOKENS = 65_536  # B T of every mLSTM row
MLSTM = ((16, 128, 256), (8, 256, 512))  # H, K, V: the published benchmark's shape, and a layer of the 7B model
LENGTHS = (8_192, 2_048, 65_536)
SLSTM = (16, 1_024, 768)  # B, T, width
STEP = (8, 256, 512)  # H, K, V of a 7B layer
BATCHES = (64, 512, 1)
LAYERS_BYTES = 1 << 29  # of states that take turns, so that none stays in the cache
PREFIX = 2_048  # tokens of one row that are compared before a time is taken
ROUNDS, OFTEN = 7, 5


def _rounds(setting: Setting) -> int:
    return 1 if setting.small else ROUNDS


def mlstm(setting: Setting) -> None:
    """Forward, and forward with backward."""
    shapes = ((1, 16, 32),) if setting.small else MLSTM
    for T in (64,) if setting.small else LENGTHS:
        for H, K, V in shapes:
            B = 1 if setting.small else TOKENS // T
            for backward in (False, True):
                name = f"mLSTM, T {T:,}, B {B}, H {H}, K {K}, V {V}, {'forward + backward' if backward else 'forward'}"
                case(setting, name, 20.0, partial(_mlstm, setting, name, (B, T, H, K, V), backward))


def _mlstm(setting: Setting, name: str, shape: tuple[int, ...], backward: bool) -> None:
    B, T, H, K, V = shape
    x = [setting.randn(B, T, H, width, seed=n) for n, width in enumerate((K, K, V))]
    x += [setting.randn(B, T, H, seed=3 + n, dtype=torch.float32) + mean for n, mean in enumerate((0.0, 3.0))]
    x = [part.requires_grad_() for part in x]
    ours: peers.Peer = (lambda: kernels.mlstm(x[0], x[1], x[2], x[3], x[4], backend="triton")[0], x)
    h = ours[0]().detach()
    error = _mlstm_error(x, h, min(T, PREFIX))
    check(OURS, name, error, LIMITS[setting.dtype])
    sides = [_side(OURS, ours, backward, error)]
    theirs = lambda other: relative(other.transpose(1, 2), h)
    known = [
        (f"mlstm_kernels, xl_chunk {chunk}", partial(peers.xl_chunk, x, chunk))
        for chunk in peers.CHUNKS[: 1 if setting.small else None]
    ]
    chunks = {label: peer for label, make in known if (peer := peers.guarded(label, make, theirs)) is not None}
    if chunks:
        label = min(chunks, key=lambda key: setting.timer(_call(chunks[key], backward), 2))
        sides.append(_side(label, chunks[label], backward))
    if (peer := peers.guarded("flash-linear-attention, simple GLA", lambda: peers.simple_gla(x))) is not None:
        sides.append(_side("fla, simple GLA", peer, backward))
    L = 64
    flops = L * (K + V) + 4 * K * V + backward * (L * (3 * K + 2 * V) + 10 * K * V)
    work = 1e-12 * B * T * H * flops
    found = measure(
        name, sides, _rounds(setting), work=work, unit="TFLOP/s", ceiling=setting.product(), repeat=OFTEN,
        timer=setting.timer,
    )  # fmt: skip
    rows("mlstm", found)


def _mlstm_error(x: list[Tensor], h: Tensor, T: int) -> float:
    """Of h in the first row, and of all gradients of its beginning, against float64."""
    part = [p.detach()[:1, :T].clone().requires_grad_() for p in x]
    exact = [p.detach().double().requires_grad_() for p in part]
    got, _ = kernels.mlstm(part[0], part[1], part[2], part[3], part[4], backend="triton")
    want, _ = mlstm_definition.chunkwise(exact[0], exact[1], exact[2], exact[3], exact[4], chunk=64)
    cotangent = torch.randn(got.shape, device=got.device, generator=torch.Generator(got.device).manual_seed(9))
    cotangent = cotangent.to(got.dtype)
    pairs = zip(
        (h[:1, :T], got, *torch.autograd.grad(got, part, cotangent)),
        (want, want, *torch.autograd.grad(want, exact, cotangent.double())),
        strict=True,
    )
    return max(relative(a, b) for a, b in pairs)


def _call(peer: peers.Peer, backward: bool) -> Callable[[], object]:
    forward, leaves = peer
    if not backward:
        return torch.no_grad()(forward)
    cotangent = torch.randn_like(forward().detach())
    return lambda: torch.autograd.grad(forward(), leaves, cotangent, allow_unused=True)


def _side(name: str, peer: peers.Peer, backward: bool, error: float | None = None) -> Side:
    return Side(name, _call(peer, backward), error)


def step(setting: Setting) -> None:
    """One token of a layer, in place."""
    for B in (2,) if setting.small else BATCHES:
        name = f"mLSTM step, B {B}, H, K, V of a 7B layer"
        case(setting, name, 15.0, partial(_step, setting, name, B))


def _step(setting: Setting, name: str, B: int) -> None:
    from openxlstm.kernels.triton.mlstm_step import step_in_place

    H, K, V = (2, 16, 32) if setting.small else STEP
    one = mLSTMState.empty(B, H, K, V, device=setting.device).map(
        lambda x: setting.randn(*x.shape, seed=9, dtype=torch.float32)
    )
    layers = 2 if setting.small else max(2, LAYERS_BYTES // one.nbytes)
    states = [one.clone() for _ in range(layers)]
    x = [setting.randn(B, H, width, seed=n) for n, width in enumerate((K, K, V))]
    x += [setting.randn(B, H, seed=3 + n, dtype=torch.float32) for n in range(2)]
    q, k, v, i, f = (part.double() for part in x)
    want, after = mlstm_definition.step(q, k, v, i, f, one.map(Tensor.double))
    mine = one.clone()
    h = step_in_place(x[0], x[1], x[2], x[3], x[4], mine.C, mine.n, mine.m)
    pairs = zip((h, *mine.tensors()), (want, *after.tensors()), strict=True)
    error = max(relative(a, b) for a, b in pairs)
    check(OURS, name, error, LIMITS[setting.dtype])

    def ours() -> None:
        for s in states:
            step_in_place(x[0], x[1], x[2], x[3], x[4], s.C, s.n, s.m)

    sides = [Side(OURS, setting.replayed(ours), error)]
    try:
        peer = peers.xl_step(x, [[s.C, s.n, s.m] for s in states], h)
        sides.append(Side("mlstm_kernels, triton step", setting.replayed(peer)))
    except Exception as failure:
        emit("missing", peer="mlstm_kernels, triton step", reason=peers.sentence(failure))
    name = f"{name}, {layers} layers in turn"
    work = layers * 2e-9 * one.nbytes
    rows(
        "step",
        measure(name, sides, _rounds(setting), work=work, unit="GB/s", ceiling=setting.copy(), timer=setting.timer),
    )


def slstm(setting: Setting) -> None:
    """Ours and cuDNN's at every head width first; then flashrnn, which has to be compiled by nvcc."""
    widths = (5,) if setting.small else (64, 128, 192, 256)
    for peer in ("cuDNN", "flashrnn, cuda_fused", "flashrnn, triton"):
        for K in widths:
            for backward in (False, True):
                direction = "forward + backward" if backward else "forward"
                B, T, D = (2, 3, 10) if setting.small else SLSTM
                name = f"sLSTM, B {B}, T {T:,}, width {D}, heads of {K}, {direction}"
                run = partial(_slstm, setting, name, (B, T, D // K, K), backward, peer)
                case(setting, f"{name}, beside {peer}", 15.0 if peer == "cuDNN" else 60.0, run)


def _slstm(setting: Setting, name: str, shape: tuple[int, ...], backward: bool, beside: str) -> None:
    B, T, H, K = shape
    gates = setting.randn(B, T, 4, H, K, seed=0).requires_grad_()
    R = (0.5 / K**0.5 * setting.randn(H, K, 4, K, seed=1)).detach().requires_grad_()
    b = setting.randn(4, H, K, seed=2).requires_grad_()
    ours: peers.Peer = (lambda: kernels.slstm(gates, R, b, backend="triton")[0], [gates, R, b])
    h = ours[0]().detach()
    if beside == "cuDNN":
        other, label = peers.guarded("nn.LSTM", lambda: peers.cudnn_lstm(gates)), "nn.LSTM, one head, input product"
    else:
        backend = beside.removeprefix("flashrnn, ")
        make, label = lambda: peers.flashrnn(gates, R, b, backend), beside
        other = peers.guarded(f"{beside}, heads of {K}", make, lambda theirs: relative(theirs, h))
    if other is None:
        return
    with torch.no_grad():
        want, _ = slstm_definition.recurrent(gates[:1].double(), R.double(), b.double())
        error = relative(ours[0]()[:1], want)
    check(OURS, name, error, LIMITS[setting.dtype])
    sides = [_side(OURS, ours, backward, error)]
    if beside == "cuDNN":  # the same product with the input in front of ours
        project = nn.Linear(H * K, 4 * H * K).to(setting.device, setting.dtype)
        x = setting.randn(B, T, H * K, seed=3).requires_grad_()
        whole = lambda: kernels.slstm(project(x).unflatten(-1, (4, H, K)), R, b, backend="triton")[0]
        sides.append(_side(f"{OURS}, input product", (whole, [x, R, b, *project.parameters()]), backward))
    sides.append(_side(label, other, backward))
    rows("slstm", measure(name, sides, _rounds(setting), repeat=OFTEN, timer=setting.timer))


def compilations(setting: Setting) -> None:
    """How often a new length or a new batch compiles a kernel anew: Triton's own counts."""
    from openxlstm.kernels.triton.layout import compiled

    def count() -> None:
        _some_sizes(setting, [(1, 2)] if setting.small else [(2, 65)])
        before = compiled()
        sizes = [(B, T) for B in (1, 2, 3, 16) for T in (2, 15, 16, 17, 64, 130, 1_000)]
        _some_sizes(setting, sizes[:1] if setting.small else sizes)
        after = compiled()
        if before is None or after is None:
            emit("fact", compilations="not counted, the kernels are interpreted")
        else:
            emit("fact", compilations=f"{after - before} for {len(sizes)} new lengths and batches of both cells")
            if after > before:
                raise ValueError(f"{after - before} compilations for new lengths and batches, none is allowed")

    case(setting, "compilations", 20.0, count)


def _some_sizes(setting: Setting, sizes: list[tuple[int, int]]) -> None:
    for B, T in sizes:
        x = [setting.randn(B, T, 3, width, seed=1).requires_grad_() for width in (48, 48, 60)]
        x += [setting.randn(B, T, 3, seed=1, dtype=torch.float32).requires_grad_() for _ in range(2)]
        h, _ = kernels.mlstm(x[0], x[1], x[2], x[3], x[4], backend="triton")
        torch.autograd.grad(h.sum(), x)
        gates, R, b = (
            setting.randn(*s, seed=1).requires_grad_() for s in ((B, T, 4, 3, 20), (3, 20, 4, 20), (4, 3, 20))
        )
        y, _ = kernels.slstm(gates, R, b, backend="triton")
        torch.autograd.grad(y.sum(), (gates, R, b))
