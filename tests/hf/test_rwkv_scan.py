"""RWKV-4's scan is transformers' loop over tokens: outputs and every gradient, at any length and any decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers.models.rwkv import modeling_rwkv

from openxlstm.hf.recurrent_baselines import RWKV4, RWKV4Config
from openxlstm.hf.rwkv_scan import ScannedAttention, wkv


def loop(*inputs: Tensor) -> Tensor:
    return modeling_rwkv.rwkv_linear_attention_cpu(*inputs)[0]


def plain(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Equation 16, word for word."""
    rows = []
    for t in range(k.shape[1]):
        ago = torch.arange(t - 1, -1, -1, dtype=k.dtype)[:, None]
        logs = torch.cat((k[:, :t] - ago * decay.exp(), (first + k[:, t])[:, None]), 1)
        rows.append((logs.softmax(1) * v[:, : t + 1]).sum(1))
    return torch.stack(rows, 1)


def inputs(T: int, dtype: torch.dtype = torch.float64, D: int = 6, spread: float = 3) -> tuple[Tensor, ...]:
    """Decays from 1 - e^-5 to e^-20 a token, which is what the model starts from."""
    made = torch.linspace(-5, 3, D), torch.randn(D), spread * torch.randn(2, T, D), torch.randn(2, T, D)
    return tuple(x.to(dtype).requires_grad_() for x in made)


def all_of(function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = function(*given)
    weights = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return out, *torch.autograd.grad((out * weights).sum(), given)


@pytest.mark.parametrize("T", [2, 3, 4, 5, 9, 16, 17, 63, 130])
@pytest.mark.parametrize("spread", [0.1, 3, 100])
def test_it_is_the_equation(T: int, spread: float) -> None:
    given = inputs(T, spread=spread)
    for got, want in zip(all_of(wkv, given), all_of(plain, given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("T", [3, 64, 257])
def test_it_is_as_near_to_the_equation_as_the_loop_is(T: int) -> None:
    given = inputs(T, torch.float32)
    exact = all_of(plain, tuple(x.detach().double().requires_grad_() for x in given))
    for got, theirs, want in zip(all_of(wkv, given), all_of(loop, given), exact, strict=True):
        off, off_of_loop = ((x - want).norm() / want.norm() for x in (got, theirs))
        assert off < 1e-5
        assert off < 3 * off_of_loop + 3e-6


def test_its_gradients_are_its_slopes() -> None:
    assert torch.autograd.gradcheck(wkv, inputs(7))


def test_what_is_later_changes_nothing() -> None:
    decay, first, k, v = (x.detach() for x in inputs(40))
    whole = wkv(decay, first, k, v)
    k[:, 25:], v[:, 25:] = 7, 8
    torch.testing.assert_close(wkv(decay, first, k, v)[:, :25], whole[:, :25], rtol=0, atol=0)


@pytest.mark.parametrize("T", [0, 1])
def test_no_token_and_one(T: int) -> None:
    _, _, _, v = given = inputs(T)
    assert torch.equal(wkv(*given), v)


def test_half_precision_is_summed_in_single() -> None:
    given = tuple(x.detach().bfloat16() for x in inputs(200))
    got = wkv(*given)
    assert got.dtype is torch.bfloat16
    want = plain(*(x.double() for x in given))
    assert (got - want).norm() < 3e-3 * want.norm()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_has_it_and_is_otherwise_that_of_transformers(training: bool, monkeypatch: Any) -> None:
    torch.manual_seed(3)
    model = RWKV4(RWKV4Config(vocab_size=31, width=20, blocks=2)).double().train(training)
    tokens = torch.randint(31, (2, 33))
    theirs = modeling_rwkv.RwkvForCausalLM(model.network.config).double().train(training)
    theirs.load_state_dict(model.network.state_dict())
    want = theirs(tokens, use_cache=False).logits
    assert all(type(block.attention) is ScannedAttention for block in model.layers())
    with monkeypatch.context() as patch:
        patch.setattr(modeling_rwkv, "rwkv_linear_attention", None)  # nobody calls the loop
        got, _ = model(tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # the loop is fp32


def test_with_a_state_to_carry_it_is_the_original() -> None:
    model = RWKV4(RWKV4Config(vocab_size=31, width=20, blocks=2)).eval()
    tokens = torch.randint(31, (1, 9))
    whole = model.network(tokens, use_cache=False).logits
    first = model.network(tokens[:, :5], use_cache=True)
    last = model.network(tokens[:, 5:6], use_cache=True, state=first.state).logits
    torch.testing.assert_close(last[:, 0], whole[:, 5], rtol=0, atol=1e-5)
