"""Every launch configuration on the device against the definition in float64, from the same rounded inputs.

A configuration is what Triton compiles for: head sizes, dtype, gates, flags, chunk. Each runs at every length, through
the door a user calls, from a state in the middle of a sequence, and every output and every gradient is compared by
relative rms. No norm stands in the loss, which is a fixed random projection of h and of the true memory exp(m) C. Then
it runs once more: equal calls give equal bits.

B batch, T time, H heads, K query/key width, V value width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openxlstm import kernels
from openxlstm.bench.gpu.device import Setting
from openxlstm.bench.gpu.stage import case as guarded
from openxlstm.bench.gpu.stage import emit
from openxlstm.bench.harness import relative
from openxlstm.cells import State, mLSTMState, sLSTMState
from openxlstm.cells import mlstm as mlstm_definition
from openxlstm.cells import slstm as slstm_definition

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 6e-3}
LENGTHS = (1, 15, 63, 64, 65, 130, 1000)
FEW = (1, 65)  # where the configuration differs in nothing that depends on the length
B, H = 2, 3
TIMED = ((128, 256), (256, 512))  # the shapes that are timed; first, since nothing is timed that was not compared
WIDTHS = ((16, 16), (5, 7), (20, 48), (48, 60), (64, 128), (60, 384), (96, 192), (192, 96), (300, 40), (512, 512))
TILES = tuple(itertools.product((16, 32, 64), (16, 32, 64)))  # every pair of tiles, at every chunk that can be chosen
HEADS = (64, 128, 192, 256)  # of the sLSTM, timed
OTHER_HEADS = (16, 20, 48, 65, 96, 300, 512)
GATES = ("exp", "sigmoid", "sigmoid_normalized")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SECONDS = 15.0  # that a configuration may take, most of them the compiler's


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration and the lengths to run it at."""

    op: str
    K: int
    V: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    flags: bool = True
    input_gate: str = "exp"
    forget_gate: str = "sigmoid"
    chunk: int | None = None
    i_mean: float = 0.0

    @property
    def name(self) -> str:
        """All that distinguishes it."""
        sizes = f"K {self.K}, V {self.V}" if self.op != "slstm" else f"K {self.K}"
        gates = self.forget_gate if self.op == "slstm" else f"{self.input_gate}/{self.forget_gate}"
        more = "" if self.chunk is None else f", chunk {self.chunk}"
        more += "" if self.i_mean == 0 else f", input gate {self.i_mean:g}"
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.op}, {sizes}, {kind}, {gates}, {'reset and mask' if self.flags else 'plain'}{more}"


def cases(small: bool) -> list[Case]:
    """What is timed first, then everything else that a call can choose."""
    if small:
        fp32, fp16 = torch.float32, torch.float16
        found = [Case("mlstm", 5, 7, fp32, (1, 17)), Case("mlstm", 16, 20, fp16, (17,), False, "sigmoid", chunk=16)]
        found += [Case("slstm", 5, 5, fp32, (1, 3)), Case("mlstm_step", 5, 7, fp32, (1,))]
        return found
    return list(dict.fromkeys([*_timed(), *_widths(), *_others(), *_tiles()]))


def _timed() -> Iterator[Case]:
    bf16 = torch.bfloat16
    for flags, (K, V) in itertools.product((False, True), TIMED):
        yield Case("mlstm", K, V, bf16, LENGTHS, flags)
    yield from (Case("mlstm_step", K, V, bf16, (1,), flags) for flags in (False, True) for K, V in TIMED)
    yield from (Case("slstm", K, K, bf16, LENGTHS, flags) for flags in (False, True) for K in HEADS)


def _widths() -> Iterator[Case]:
    for dtype, (K, V) in itertools.product(DTYPES, (*TIMED, *WIDTHS)):
        yield Case("mlstm", K, V, dtype, LENGTHS)
        yield Case("mlstm_step", K, V, dtype, (1,))
    for dtype, K in itertools.product(DTYPES, (*HEADS, *OTHER_HEADS)):
        yield Case("slstm", K, K, dtype, LENGTHS if K in HEADS else FEW)


def _others() -> Iterator[Case]:
    for dtype, gate, flags in itertools.product(DTYPES, GATES, (False, True)):
        yield Case("mlstm", 64, 128, dtype, FEW, flags, gate)
        yield Case("mlstm_step", 64, 128, dtype, (1,), flags, gate)
    for dtype in DTYPES:
        yield Case("mlstm", 128, 256, dtype, (130, 1000), i_mean=-10.0)  # the published models' initialisation
        yield Case("mlstm_step", 64, 128, dtype, (1,), forget_gate="exp")
        yield from (Case("slstm", K, K, dtype, FEW, flags, "exp", "exp") for K in (64, 192) for flags in (False, True))


def _tiles() -> Iterator[Case]:
    for dtype, chunk, (K, V) in itertools.product(DTYPES, (16, 32, 64), TILES):
        yield Case("mlstm", K, V, dtype, (130,), chunk=chunk)


def run(setting: Setting) -> None:
    """This share of the configurations."""
    torch.backends.cuda.matmul.allow_tf32 = False
    first, count = setting.shard
    for one in cases(setting.small)[first::count]:
        guarded(setting, one.name, SECONDS, partial(report, setting, one))


def report(setting: Setting, one: Case) -> None:
    """Say the largest error over all lengths, and of what; a case is green if none is above its limit."""
    worst, where, same = 0.0, "", True
    for T in one.lengths:
        got, want, again = compared(setting, one, T)
        for name in want:
            error = relative(got[name], want[name]) if bool(want[name].any()) else float(got[name].abs().max())
            if not error <= worst:  # NaN is larger than everything
                worst, where = error, f"{name} at T {T}"
        same = same and all(torch.equal(got[name], again[name]) for name in got)
    limit = LIMITS[one.dtype]
    green = worst <= limit and same
    facts = {"op": one.op, "case": one.name, "error": worst, "limit": limit, "worst": where, "green": green}
    emit("parity", **facts, equal_bits=same)


Results = dict[str, Tensor]


def compared(setting: Setting, one: Case, T: int) -> tuple[Results, Results, Results]:
    """What the kernels give, what the definition gives, and what the kernels give again."""
    options: dict[str, Any] = _flags(setting, T) if one.flags else {}
    door: Callable[..., Any]
    exact: Callable[..., Any]
    results: Callable[..., Results]
    state: Any
    options["forget_gate"] = one.forget_gate
    if one.op == "slstm":
        x, state = _slstm_inputs(setting, one, T)
        door, exact, results = kernels.slstm, partial(slstm_definition.recurrent, **options), _slstm_results
    else:
        x, state = _mlstm_inputs(setting, one, T)
        options |= dict(input_gate=one.input_gate, eps=0.0 if one.forget_gate == "exp" else 1e-6)
        door, exact = partial(kernels.mlstm, chunk=one.chunk), partial(mlstm_definition.chunkwise, **options)
        results = partial(_mlstm_results, normalised=one.input_gate != "sigmoid", gradients=one.op == "mlstm" and T > 1)
    door = partial(door, backend="triton", **options)
    double = [part.detach().double().requires_grad_() for part in x]
    want = results(exact, double, state.map(lambda part: part.detach().double().requires_grad_()))
    return results(door, x, state), want, results(door, x, state)


def _flags(setting: Setting, T: int) -> dict[str, Tensor]:
    return {
        "reset": setting.randn(B, T, seed=11, dtype=torch.float32) < -1.0,
        "mask": setting.randn(B, T, seed=12, dtype=torch.float32) > -0.7,
    }


def _mlstm_inputs(setting: Setting, one: Case, T: int) -> tuple[list[Tensor], mLSTMState]:
    widths = {"q": (one.K,), "k": (one.K,), "v": (one.V,), "i": (), "f": ()}
    x = [setting.randn(B, T, H, *w, seed=n, dtype=torch.float32) for n, w in enumerate(widths.values())]
    x = [part + mean for part, mean in zip(x, (0.0, 0.0, 0.0, one.i_mean, 1.0), strict=True)]
    if one.forget_gate == "exp":
        x[4] = x[4] - 2.0
    state = mLSTMState(*(setting.randn(B, H, *w, seed=7 + n, dtype=torch.float32) for n, w in enumerate(
        ((one.K, one.V), (one.K,), ())
    )))  # fmt: skip
    if one.input_gate != "exp":  # no stabiliser, and without a normaliser no n
        n = torch.zeros_like(state.n) if one.input_gate == "sigmoid" else state.n
        state = mLSTMState(state.C, n, torch.zeros_like(state.m))
    return [part.to(one.dtype).requires_grad_() for part in x], state.map(lambda part: part.requires_grad_())


def _slstm_inputs(setting: Setting, one: Case, T: int) -> tuple[list[Tensor], sLSTMState]:
    K = one.K
    gates, R, b = (
        scale * setting.randn(*shape, seed=n, dtype=torch.float32)
        for n, (shape, scale) in enumerate((((B, T, 4, H, K), 0.7), ((H, K, 4, K), 0.5 / K**0.5), ((4, H, K), 0.7)))
    )  # R as a model's: with larger numbers chaos is measured, not the kernel
    if one.forget_gate == "exp":
        gates[:, :, 1] -= 2.0
    h, c, n, m = (setting.randn(B, H, K, seed=7 + n, dtype=torch.float32) for n in range(4))
    state = sLSTMState(h, c, 0.1 + n.abs(), m).map(lambda part: part.requires_grad_())
    return [part.to(one.dtype).requires_grad_() for part in (gates, R, b)], state


def _projected(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random projection of all outputs; its weights are exact in every dtype."""
    loss = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
    for number, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(100 + number)
        weight = torch.randn(output.shape, generator=generator, device=output.device).bfloat16().double()
        loss = loss + (output.double() * weight).sum()
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _named(names: str, tensors: Sequence[Tensor]) -> Results:
    return {name: x.detach() for name, x in zip(names.split(), tensors, strict=True)}


def _mlstm_results(
    function: Callable[..., Any], x: list[Tensor], state: mLSTMState, *, normalised: bool, gradients: bool
) -> Results:
    with torch.set_grad_enabled(gradients):
        h, end = function(*x, state)
    found = _named("h C n m", (h, *_tensors(end)))
    if gradients:
        scale = torch.exp(end.m)
        memory = [end.C * scale[..., None, None], *([end.n * scale[..., None]] if normalised else [])]
        found |= _named("dq dk dv di df dC dn", _projected([h, *memory], [*x, state.C, state.n]))
    return found


def _slstm_results(function: Callable[..., Any], x: list[Tensor], state: sLSTMState) -> Results:
    y, end = function(*x, state)
    scale = torch.exp(end.m)
    gradients = _projected([y, end.h, end.c * scale, end.n * scale], [*x, state.h, state.c, state.n])
    return _named("y h c n m dgates dR db dh dc dn", (y, *_tensors(end), *gradients))


def _tensors(state: State) -> list[Tensor]:
    return list(state.tensors())
