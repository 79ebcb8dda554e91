"""Rows of whole models: a training step beside a Llama, decoding by a CUDA graph, and 50 steps that follow fp32.

Here models choose the Triton kernels by themselves, since the parity of this run stands before (`kernels.trust`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openxlstm import kernels
from openxlstm.bench.generate import read_by_a_token
from openxlstm.bench.gpu.device import Setting
from openxlstm.bench.gpu.stage import case, emit, rows, sentence
from openxlstm.bench.harness import OURS, Side, check, measure, relative
from openxlstm.infer.decoder import ModelDecoder, decoder
from openxlstm.infer.graph import GraphDecoder
from openxlstm.models import accounting
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig

TRAINING = (2, 8_192)  # B, T
MIDDLE: dict[str, Any] = dict(vocab_size=50_304, width=1024, blocks=24, heads=4)  # 406M parameters
LLAMA: dict[str, Any] = dict(vocab_size=50_304, width=1024, blocks=24, heads=8, ffn_width=2_752)  # 406M
TINY: dict[str, Any] = dict(vocab_size=64, width=32, blocks=1, heads=2)
BATCHES = (1, 64)
PROMPT, COMPARED = 16, 8  # tokens that the state has read, and tokens that are compared before a time is taken
LIMIT = 5e-2  # relative rms of bf16 logits by two ways
STEPS, CURVE = 50, 2e-2  # of the loss at every step, bf16 on the GPU beside fp32 on the CPU


def train(setting: Setting) -> None:
    """Forward, loss, backward, AdamW: fp32 weights under bf16 autocast, both sides without torch.compile."""
    case(setting, "training step", 60.0, partial(_train, setting))


def _train(setting: Setting) -> None:
    B, T = (1, 20) if setting.small else TRAINING
    config = xLSTMLargeConfig(**(TINY if setting.small else MIDDLE))
    name = f"training step, {config.label}, {accounting.count_parameters(config) / 1e6:.0f}M parameters, B {B}, T {T:,}"
    W = config.vocab_size
    tokens = torch.randint(W, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(setting.device)
    torch.manual_seed(0)
    ours = xLSTMLarge(config).to(setting.device)
    error = _trusted(setting, ours, tokens[:, : min(T, 512)])
    check(OURS, name, error, LIMIT)
    sides = [Side(OURS, _step(setting, ours, lambda x: ours(x)[0], tokens), error)]
    flops = {OURS: 3.0 * accounting.flops_per_token(config)}
    if (llama := _llama(setting)) is not None:
        label, network, per_token = llama
        sides.append(Side(label, _step(setting, network, lambda x: network(input_ids=x).logits, tokens)))
        flops[label] = 3.0 * (per_token + _attention(T, setting))
    product, work = setting.product()
    found = measure(name, sides, 1 if setting.small else 5, timer=setting.timer, ceiling=(product, work))
    top = work / setting.timer(product, 10)  # TFLOP a millisecond
    said = [
        replace(
            row, rate=1e3 * B * T / row.median_ms, unit="tokens/s",
            of_ceiling=1e-12 * flops[row.side] * B * T / row.median_ms / top,
        )
        for row in found
    ]  # fmt: skip
    rows("train", said)


def _attention(T: int, setting: Setting) -> float:
    """FLOPs a token of causal attention in all layers of the Llama: scores and their sums, half of them masked."""
    sizes = TINY if setting.small else LLAMA
    return 2.0 * T * sizes["width"] * sizes["blocks"]


def _llama(setting: Setting) -> tuple[str, nn.Module, int] | None:
    """transformers' Llama with torch's attention, called without a mask, so that it takes its fastest kernel."""
    try:
        from openxlstm.hf.baselines import Llama, LlamaConfig

        config = LlamaConfig(**((TINY | {"ffn_width": 64}) if setting.small else LLAMA))
        label = f"Llama, {config.count_parameters() / 1e6:.0f}M parameters, sdpa"
        torch.manual_seed(0)
        network: nn.Module = Llama(config).network
        return label, network.to(setting.device), config.flops_per_token()
    except Exception as failure:
        emit("missing", peer="Llama of transformers", reason=sentence(failure))
        return None


def _autocast(setting: Setting) -> torch.autocast:
    return torch.autocast(setting.device, torch.bfloat16, enabled=not setting.small)


def _trusted(setting: Setting, model: nn.Module, tokens: Tensor) -> float:
    """From here on models of this process use the Triton kernels; their logits against those of before."""
    with torch.no_grad(), _autocast(setting):
        before = model(tokens)[0]
        kernels.trust("triton")
        return relative(model(tokens)[0], before)


def _step(
    setting: Setting, model: nn.Module, logits_of: Callable[[Tensor], Tensor], tokens: Tensor
) -> Callable[[], Tensor]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not setting.small)

    def call() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with _autocast(setting):
            logits = logits_of(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        return loss.detach()

    return call


def decode(setting: Setting) -> None:
    """A token for every row: what `ox.generate` runs on a GPU, a replayed CUDA graph."""
    for B in (2,) if setting.small else BATCHES:
        for kind in ("xLSTMLarge", "xLSTM"):
            case(setting, f"decoding, {kind}, batch {B}", 40.0, partial(_decode, setting, kind, B))


def _decode(setting: Setting, kind: str, B: int) -> None:
    torch.manual_seed(0)
    model: xLSTM | xLSTMLarge
    sizes: dict[str, Any]
    if kind == "xLSTMLarge":
        model = xLSTMLarge(xLSTMLargeConfig(**(TINY if setting.small else MIDDLE)))
    else:
        sizes = dict(vocab_size=64, width=32) if setting.small else dict(vocab_size=50_304, width=768)
        model = xLSTM(xLSTMConfig(**sizes, heads=4, pattern="ms" if setting.small else "mmmsmmmm"))
    model = model.to(setting.device, setting.dtype).eval()
    label = f"{model.config.label}, {accounting.count_parameters(model.config) / 1e6:.0f}M parameters"
    name = f"a token, {label}, batch {B}"
    tokens = torch.randint(model.config.vocab_size, (B, PROMPT + COMPARED)).to(setting.device)
    kernels.trust("triton")
    with torch.no_grad():
        _, state = model(tokens[:, :PROMPT])
        graph = GraphDecoder(model, state, lambda step: step) if setting.small else decoder(model, state.clone())
        if not isinstance(graph, GraphDecoder) or graph.reason is not None:
            raise RuntimeError(f"not replayed: {getattr(graph, 'reason', type(graph).__name__)}")
        plain = ModelDecoder(model, state)
        read = [tokens[:, t] for t in range(PROMPT, PROMPT + COMPARED)]
        error = max(relative(graph.step(token), plain.step(token)) for token in read)
        check(OURS, name, error, LIMIT)
        sides = [
            Side(OURS, lambda: graph.step(read[0]), error),
            Side(f"{OURS}, a call per operation", lambda: plain.step(read[0])),
        ]
        work = 1e-9 * (read_by_a_token(model) + (B - 1) * 2 * model.empty_state(1).nbytes)
        ceiling = setting.copy()
        rows(
            "decode",
            measure(
                name,
                sides,
                1 if setting.small else 5,
                work=work,
                unit="GB/s",
                ceiling=ceiling,
                repeat=10,
                timer=setting.timer,
            ),
        )


def curve(setting: Setting) -> None:
    """The same 50 steps twice: bf16 with the Triton kernels on the device, fp32 without them on the CPU."""
    W, B, T, steps = (32, 1, 16, 2) if setting.small else (256, 8, 200, STEPS)
    sizes: dict[str, Any] = dict(vocab_size=W, width=32 if setting.small else 128, heads=2)
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {
        "xLSTMLarge": xLSTMLarge(xLSTMLargeConfig(**sizes, blocks=2)),
        "xLSTM[1:1]": xLSTM(xLSTMConfig(**sizes, pattern="ms")),
    }
    data = [_text(W, B, T + 1, seed) for seed in range(steps)]
    exact: dict[str, list[float]] = {}
    for kind, model in models.items():
        case(setting, f"{steps} steps of {kind} on the CPU", 40.0, partial(_exact, exact, kind, model, data))
    kernels.trust("triton")
    for kind, want in exact.items():
        case(setting, f"{steps} steps of {kind}", 20.0, partial(_curve, setting, kind, models[kind], data, want))


def _exact(into: dict[str, list[float]], kind: str, model: nn.Module, data: list[Tensor]) -> None:
    into[kind] = _losses(copy.deepcopy(model), data, "cpu", bf16=False)


def _curve(setting: Setting, kind: str, model: nn.Module, data: list[Tensor], exact: list[float]) -> None:
    device = setting.device
    found = _losses(model.to(device), [x.to(device) for x in data], device, bf16=not setting.small)
    apart = max(abs(a - b) / b for a, b in zip(found, exact, strict=True))
    last = len(data) - 1
    shown = [(n, found[n], exact[n]) for n in sorted({0, 9, 19, 29, 39, last}) if n <= last]
    emit("curve", model=kind, steps=len(data), apart=apart, limit=CURVE, green=apart <= CURVE, shown=shown)


def _text(W: int, B: int, T: int, seed: int) -> Tensor:
    """Tokens that can be learnt: each follows from the one before, but for one in eight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(W, (B, T), generator=generator)
    free = torch.rand(B, T, generator=generator) < 0.125
    for t in range(1, T):
        x[:, t] = torch.where(free[:, t], x[:, t], (5 * x[:, t - 1] + 3) % W)
    return x


def _losses(model: nn.Module, data: list[Tensor], device: str, *, bf16: bool) -> list[float]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for tokens in data:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = model(tokens[:, :-1])[0]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]
