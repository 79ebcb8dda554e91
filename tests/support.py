"""What several tests share: random problems, one comparison by name, and the guard against changed inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from openxlstm.cells import mLSTMState, sLSTMState

B, H, K, V = 2, 3, 5, 7  # pairwise distinct: with K = V a swapped k and v is invisible
LENGTHS = (1, 2, 15, 16, 17, 63, 130)


def normal(*shape: int, dtype: torch.dtype = torch.float64, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return (mean + std * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def mlstm_inputs(
    T: int, *, K: int = K, V: int = V, i_mean: float = 0.0, f_mean: float = 1.0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v, i, f that ask for gradients."""
    shapes = ((B, T, H, K), (B, T, H, K), (B, T, H, V))
    x = [normal(*shape, dtype=dtype) for shape in shapes]
    x += [normal(B, T, H, dtype=dtype, mean=mean) for mean in (i_mean, f_mean)]
    return [part.requires_grad_() for part in x]


def mlstm_state(*, K: int = K, V: int = V, dtype: torch.dtype = torch.float64, stabilised: bool = True) -> mLSTMState:
    """A state in the middle of a sequence; C and n ask for gradients."""
    m = normal(B, H, dtype=dtype) if stabilised else torch.zeros(B, H, dtype=dtype)
    n = normal(B, H, K, dtype=dtype)
    return mLSTMState(normal(B, H, K, V, dtype=dtype).requires_grad_(), n.requires_grad_(), m)


def slstm_inputs(T: int, *, K: int = K, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """gates, R, b that ask for gradients."""
    shapes = ((B, T, 4, H, K), (H, K, 4, K), (4, H, K))
    return [normal(*shape, dtype=dtype, std=0.7).requires_grad_() for shape in shapes]


def slstm_state(*, K: int = K, dtype: torch.dtype = torch.float64) -> sLSTMState:
    """A state in the middle of a sequence; h, c and n ask for gradients."""
    h, c, m = (normal(B, H, K, dtype=dtype) for _ in range(3))
    n = (0.1 + torch.rand(B, H, K)).to(dtype)
    return sLSTMState(h.requires_grad_(), c.requires_grad_(), n.requires_grad_(), m)


def random_flags(T: int) -> dict[str, Tensor]:
    """Resets at about every seventh step and holes in every fourth, so that all their combinations occur."""
    return {"reset": torch.rand(B, T) < 0.15, "mask": torch.rand(B, T) > 0.25}


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of a fixed random projection of all outputs; zeros where an input does not matter."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator).bfloat16().double()  # exact in every dtype of output
        loss = loss + (output.double() * weight).sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


def mlstm_results(
    function: Callable[..., Any], x: list[Tensor], state: mLSTMState, **options: Any
) -> dict[str, Tensor]:
    """h, C, n, m and every gradient, for a loss on h and on the true memory exp(m) C, exp(m) n."""
    h, end = function(*x, state, **options)
    scale = torch.exp(end.m)
    memory = [end.C * scale[..., None, None]]
    if options.get("input_gate", "exp") != "sigmoid":
        memory.append(end.n * scale[..., None])
    grads = gradients([h, *memory], [*x, state.C, state.n])
    names = "h C n m dq dk dv di df dC0 dn0".split()  # noqa: SIM905
    return dict(zip(names, [h, end.C, end.n, end.m, *grads], strict=True))


def slstm_results(
    function: Callable[..., Any], x: list[Tensor], state: sLSTMState, **options: Any
) -> dict[str, Tensor]:
    """h, the state and every gradient, for a loss on h and on the true cell exp(m) c, exp(m) n."""
    y, end = function(*x, state, **options)
    scale = torch.exp(end.m)
    grads = gradients([y, end.h, end.c * scale, end.n * scale], [*x, state.h, state.c, state.n])
    names = ["y", "h", "c", "n", "m", "dgates", "dR", "db", "dh0", "dc0", "dn0"]
    return dict(zip(names, [y, end.h, end.c, end.n, end.m, *grads], strict=True))


def error(got: Tensor, want: Tensor) -> float:
    """rms(got - want) / rms(want) in float64; the plain rms where `want` is all zeros."""
    got, want = got.detach(), want.detach()
    difference = (got.double() - want.double()).square().mean().sqrt()
    scale = want.double().square().mean().sqrt()
    return float(difference if scale == 0 else difference / scale)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], limit: float | dict[str, float], where: str) -> None:
    """Every tensor by name; `limit` may depend on the name. NaN fails."""
    assert got.keys() == want.keys()
    for name in want:
        allowed = limit if isinstance(limit, float) else limit[name]
        found = error(got[name], want[name])
        assert found <= allowed, f"{name} ({where}): relative rms error {found:.3g}, allowed {allowed:.3g}"


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    """The block writes to none of these tensors: neither value nor version counter moves."""
    versions, values = [x._version for x in tensors], [x.detach().clone() for x in tensors]
    yield
    for x, version, value in zip(tensors, versions, values):
        assert x._version == version, "an input was written to"
        torch.testing.assert_close(x.detach(), value, rtol=0, atol=0, equal_nan=True)


def storages(*tensors: Tensor) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}


def refused(call: Callable[..., object], *arguments: object, **options: object) -> str:
    """The sentence of the ValueError with which a call refuses."""
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    return str(error.value)
