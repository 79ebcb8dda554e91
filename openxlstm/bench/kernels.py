"""Both cells, forward and backward, beside the kernels that people have: the suite `kernels` of `xlstm bench`.

The mLSTM stands beside every native kernel of `mlstm_kernels`, each side at its best chunk and in the layout it
prefers; the sLSTM beside the vanilla cell of `xlstm` and beside `nn.LSTM`, which is another cell of equal width with
one head, so it multiplies more; it is here because it is what people have. Every result is compared with the definition
in float64 first. (The peers' mLSTM drops the gradient through the normaliser, so only its outputs are compared.)

An mLSTM forward pass takes L (K + V) + 4 K V FLOPs a token and head, chunks being L long and scores causal, and a
backward pass L (3 K + 2 V) + 10 K V: the products of kernels/cpu/csrc/mlstm_*.cpp, half of the causal ones counted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from openxlstm import kernels
from openxlstm.bench.harness import OURS, Row, Side, check, gemm, measure, relative
from openxlstm.bench.peers import native_mlstm_kernels, vanilla_slstm
from openxlstm.cells import mlstm as mlstm_definition
from openxlstm.cells import slstm as slstm_definition
from openxlstm.kernels.cpu.mlstm_ops import best_chunk

MLSTM = ((4, 4, 512, 64, 128), (1, 4, 2048, 64, 128), (1, 4, 1024, 128, 256), (1, 8, 2048, 256, 512))  # B, H, T, K, V
SLSTM = ((4, 512, 256, 4), (16, 256, 512, 4), (1, 512, 768, 4))  # B, T, D, H
LIMITS = {torch.float32: 4e-5, torch.bfloat16: 1.2e-2}  # relative rms of ours against float64; the tests' own limits
PEER_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # theirs, outputs only
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def run(runs: int, say: Callable[[str], None]) -> list[Row]:
    """Rows of all cases; `say` hears what comes next."""
    rows = []
    for shape in MLSTM:
        for dtype in (torch.float32, torch.bfloat16):
            say(f"mLSTM {shape} {NAMES[dtype]}")
            rows += mlstm(shape, dtype, runs)
    for size in SLSTM:
        say(f"sLSTM {size} fp32")
        rows += slstm(size, runs)
    return rows


def mlstm(shape: tuple[int, ...], dtype: torch.dtype, runs: int) -> list[Row]:
    """Forward and backward of one shape. bf16: q, k, v and h; a peer needs its gates in bf16 too."""
    B, H, T, K, V = shape
    case = f"mLSTM, B {B}, H {H}, T {T}, K {K}, V {V}, {NAMES[dtype]}"
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(B, T, H, width, generator=generator).to(dtype) for width in (K, K, V)]
    inputs += [torch.randn(B, T, H, generator=generator).bfloat16().float() + mean for mean in (0.0, 3.0)]
    inputs = [x.requires_grad_() for x in inputs]
    cotangent = torch.randn(B, T, H, V, generator=generator).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth, _ = mlstm_definition.chunkwise(exact[0], exact[1], exact[2], exact[3], exact[4], chunk=128)
    gradients = torch.autograd.grad(truth, exact, cotangent.double())

    def by(backend: str) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            h, _ = kernels.mlstm(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], backend=backend)
            return [h, *torch.autograd.grad(h, inputs, cotangent)]

        return call

    head_first = [x.detach().to(dtype).transpose(1, 2).contiguous().requires_grad_() for x in inputs]
    theirs = cotangent.transpose(1, 2).contiguous()

    def peer(kernel: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            h = kernel(*head_first)
            return [h, *torch.autograd.grad(h, head_first, theirs)]

        return call

    sides = []
    for name, backend in ((OURS, "auto"), (f"{OURS}, torch", "torch")):
        error = max(relative(got, want) for got, want in zip(by(backend)(), (truth, *gradients), strict=True))
        check(name, case, error, LIMITS[dtype])
        sides.append(Side(name, by(backend), error))
    for name, kernel in native_mlstm_kernels().items():
        error = relative(peer(kernel)()[0].transpose(1, 2), truth)
        check(name, case, error, PEER_LIMITS[dtype])
        sides.append(Side(f"mlstm_kernels, {name}", peer(kernel), error))
    L = best_chunk(K, V, dtype)
    flops = B * T * H * (L * (K + V) + 4 * K * V + L * (3 * K + 2 * V) + 10 * K * V)
    return measure(case, sides, runs, work=flops / 1e9, unit="GFLOP/s", ceiling=gemm())


def slstm(size: tuple[int, int, int, int], runs: int) -> list[Row]:
    """Forward and backward of one size."""
    B, T, D, H = size
    K, case = D // H, f"sLSTM, B {B}, T {T}, D {D}, H {H}, fp32"
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(B, T, 4, H, K, generator=generator).requires_grad_()
    R = (torch.randn(H, K, 4, K, generator=generator) * 0.3 / K**0.5).requires_grad_()
    b = torch.zeros(4, H, K).requires_grad_()
    cotangent = torch.randn(B, T, H, K, generator=generator)
    with torch.no_grad():
        truth, _ = slstm_definition.recurrent(gates[:1].double(), R.double(), b.double())

    def by(backend: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            h, _ = kernels.slstm(gates, R, b, backend=backend)
            torch.autograd.grad(h, (gates, R, b), cotangent)
            return h

        return call

    found: dict[str, Callable[[], Tensor]] = {OURS: by("auto"), f"{OURS}, torch": by("torch")}
    if (vanilla := vanilla_slstm(gates, R, b)) is not None:
        forward, leaves = vanilla

        def peer() -> Tensor:
            h = forward()
            torch.autograd.grad(h, leaves, cotangent)
            return h

        found["xlstm, vanilla"] = peer
    sides = []
    for name, call in found.items():
        error = relative(call()[:1], truth)
        check(name, case, error, LIMITS[torch.float32])
        sides.append(Side(name, call, error))
    lstm, x = nn.LSTM(D, D, batch_first=True), torch.randn(B, T, D, generator=generator).requires_grad_()

    def other() -> Tensor:
        h, _ = lstm(x)
        torch.autograd.grad(h, [x, *lstm.parameters()], cotangent.flatten(2))
        return h

    return measure(case, [*sides, Side("nn.LSTM, one head", other)], runs)
