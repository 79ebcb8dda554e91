"""One regressor around four backbones: causal, deaf to padding, and able to learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from openxlstm.models.xlstm import xLSTMStack, xLSTMStackConfig
from openxlstm.tasks.baselines import lstm_blocks, lstm_layers
from openxlstm.tasks.continuous import Regressor

D = 12


def llama() -> nn.Module:
    pytest.importorskip("transformers")
    from openxlstm.hf.continuous import LlamaStack

    return LlamaStack(D, 2, heads=3, ffn_width=20)


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "xlstm": lambda: xLSTMStack(xLSTMStackConfig(width=D, heads=3, pattern="ms", mlstm_width=24)),
    "lstm": lambda: lstm_layers(D, 2),
    "lstm_block": lambda: lstm_blocks(D, 2, ffn_width=20),
    "llama": llama,
}


@pytest.fixture(params=BACKBONES)
def model(request: pytest.FixtureRequest) -> Regressor:
    torch.manual_seed(1)
    return Regressor(BACKBONES[request.param](), width=D, features=3, outputs=2)


def test_padding_is_not_there_even_if_it_is_poison(model: Regressor) -> None:
    x = torch.randn(2, 7, 3)
    padded = torch.cat([x, torch.full((2, 4, 3), float("nan"))], 1)
    mask = torch.arange(11).expand(2, 11) < 7
    got, want = model(padded, mask), model(x)
    torch.testing.assert_close(got[:, :7], want, rtol=0, atol=1e-5)
    assert torch.isfinite(got).all()
    weights = list(model.parameters())
    padded_gradients = torch.autograd.grad(got[:, :7].square().sum(), weights)
    for one, other in zip(padded_gradients, torch.autograd.grad(want.square().sum(), weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_it_is_causal(model: Regressor) -> None:
    x = torch.randn(1, 9, 3)
    changed = x.clone()
    changed[0, 5] += 1
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-6


def test_a_backbone_goes_on_where_it_stopped(model: Regressor) -> None:
    x, reset = torch.randn(2, 9, D), torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 6] = True
    whole, _ = model.backbone(x, reset=reset)
    start, state = model.backbone(x[:, :4], reset=reset[:, :4])
    rest, _ = model.backbone(x[:, 4:], state, reset=reset[:, 4:])
    torch.testing.assert_close(torch.cat([start, rest], 1), whole, rtol=0, atol=1e-5)
    alone, _ = model.backbone(x[:1, 6:])
    torch.testing.assert_close(whole[:1, 6:], alone, rtol=0, atol=1e-5)


def test_every_parameter_has_its_group_and_learns(model: Regressor) -> None:
    groups = model.parameter_groups(0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimiser = torch.optim.AdamW(groups, lr=1e-2)
    x = torch.rand(16, 5, 3)
    target = x.cumsum(1)[..., :2]
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(weight.grad is not None for weight in model.parameters())
    assert losses[-1] < 0.5 * losses[0]


def test_mistakes_get_a_sentence() -> None:
    model = Regressor(lstm_layers(D, 1), width=D, features=3, outputs=1)
    with pytest.raises(ValueError, match=r"inputs must be \[batch, time, 3\]; got \[2, 5, 4\]"):
        model(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="Linear is no backbone"):
        Regressor(nn.Linear(3, 3), width=3, features=3, outputs=1)
