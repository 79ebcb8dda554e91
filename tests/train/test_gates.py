"""The figures of gates and states against a loop over the definition, and a measurement that leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from support import unchanged

from openxlstm import kernels
from openxlstm.cells import mlstm, slstm
from openxlstm.cells.state import mLSTMState, sLSTMState
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig
from openxlstm.train import gates

B, T, H, K, V = 2, 37, 3, 5, 7


def stepped_m(log_f, i, m, reset, emptied):
    """Equation (15), one step after the other."""
    found = []
    for t in range(i.shape[1]):
        m = torch.where(reset[:, t].reshape(-1, *(1,) * (i.ndim - 2)), emptied, m)
        m = torch.maximum(log_f[:, t] + m, i[:, t])
        found.append(m)
    return torch.stack(found, 1)


@pytest.mark.parametrize("emptied", [0.0, -math.inf])
@pytest.mark.parametrize("length", [1, 2, 3, 37, 64])
def test_the_exponent_at_every_position(length: int, emptied: float) -> None:
    log_f, i = -torch.rand(B, length, H), 3 * torch.randn(B, length, H)
    reset, m = torch.rand(B, length) < 0.2, torch.randn(B, H)
    found = gates._running_max(log_f, i, m[:, None], reset, emptied)
    torch.testing.assert_close(found, stepped_m(log_f, i, m, reset, torch.tensor(emptied)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("carried", [False, True])
def test_figures_of_an_mlstm_are_those_of_the_definition(carried: bool) -> None:
    """Every figure once more, from the recurrence step by step: m, q.n and the floor from the states themselves."""
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    i, f, reset = 2 * torch.randn(B, T, H), torch.randn(B, T, H) + 1, torch.rand(B, T) < 0.1
    state = mLSTMState(torch.randn(B, H, K, V), torch.randn(B, H, K), torch.randn(B, H)) if carried else None
    _, after = mlstm.recurrent(q, k, v, i, f, state, reset=reset)
    found = gates._of_mlstm(kernels.mlstm, q, k, v, i, f, state, after=after, reset=reset)

    m, floored, current = [], [], state
    for t in range(T):
        _, current = mlstm.step(q[:, t], k[:, t], v[:, t], i[:, t], f[:, t], current, reset=reset[:, t])
        m.append(current.m)
        product = (q[:, t] * K**-0.5 * current.n).sum(-1).abs()
        floored.append(product < gates.FLOOR * torch.exp(-current.m))
    assert found["m_min"] == pytest.approx(torch.stack(m).min().item(), abs=1e-5)
    assert found["m_max"] == pytest.approx(torch.stack(m).max().item(), abs=1e-5)
    share = torch.stack(floored).double().mean().item()
    assert 0.05 < share < 0.95
    assert found["floor"] == pytest.approx(share, abs=1e-9)
    assert found["forget_mean"] == pytest.approx(torch.sigmoid(f).mean().item(), abs=1e-6)
    assert found["forgetful"] == pytest.approx((f < 0).double().mean().item(), abs=1e-9)
    assert found["input_max"] == i.abs().max().item()
    memory = torch.exp(after.m)[..., None, None] * after.C
    assert found["state_log10"] == pytest.approx(memory.square().sum((-2, -1)).sqrt().max().log10().item(), abs=1e-4)


@pytest.mark.parametrize("carried", [False, True])
def test_figures_of_an_slstm_are_those_of_the_definition(carried: bool) -> None:
    raw, R, b = torch.randn(B, T, 4, H, K), torch.randn(H, K, 4, K), torch.randn(4, H, K)
    reset = torch.rand(B, T) < 0.1
    state = None
    if carried:
        state = sLSTMState(*(torch.rand(B, H, K) for _ in range(4)))
    y, after = slstm.recurrent(raw, R, b, state, reset=reset)
    found = gates._of_slstm(raw, R, b, state, h=y, after=after, reset=reset)

    m, i, f = [], [], []
    current = sLSTMState.empty(B, H, K) if state is None else state
    for t in range(T):
        h = torch.where(reset[:, t, None, None], 0.0, current.h)
        mixed = raw[:, t] + torch.einsum("bhd,hdge->bghe", h, R) + b
        i.append(mixed[:, 0])
        f.append(mixed[:, 1])
        _, current = slstm.step(raw[:, t], R, b, current, reset=reset[:, t])
        m.append(current.m)
    assert found["m_min"] == pytest.approx(torch.stack(m).min().item(), abs=1e-5)
    assert found["m_max"] == pytest.approx(torch.stack(m).max().item(), abs=1e-5)
    assert found["input_max"] == pytest.approx(torch.stack(i).abs().max().item(), abs=1e-5)
    assert found["forgetful"] == pytest.approx((torch.stack(f) < 0).double().mean().item(), abs=1e-9)
    cell = (torch.exp(after.m) * after.c).square().sum(-1).sqrt().max().log10().item()
    assert found["state_log10"] == pytest.approx(cell, abs=1e-5)
    assert found["floor"] is None


def models():
    yield xLSTM(xLSTMConfig(vocab_size=19, width=16, heads=2, pattern="msm", dropout=0.3))
    yield xLSTMLarge(xLSTMLargeConfig(vocab_size=19, width=16, heads=2, blocks=2, input_gate="sigmoid_normalized"))


@pytest.mark.parametrize("model", list(models()), ids=["xlstm", "xlstm_large"])
def test_a_measurement_leaves_no_trace(model) -> None:
    """Same mode, same doors, same random numbers, same logits as without it; and every figure is a finite number."""
    tokens, reset = torch.randint(0, 19, (2, 30)), torch.rand(2, 30) < 0.1
    doors, generator = (kernels.mlstm, kernels.slstm), torch.get_rng_state()
    model.checkpoint_every = 1
    with unchanged(tokens, *model.parameters()):
        found = gates.measure(model, lambda: model(tokens, reset=reset))
    assert model.training
    assert (kernels.mlstm, kernels.slstm) == doors
    assert "features" not in vars(model)
    assert torch.equal(torch.get_rng_state(), generator)
    kinds = "msm" if isinstance(model, xLSTM) else "mm"
    assert [layer["kind"] for layer in found["gates"]] == list(kinds)
    assert [layer["layer"] for layer in found["gates"]] == list(range(len(kinds)))
    for layer in found["gates"]:
        assert all(math.isfinite(value) for key, value in layer.items() if key not in ("kind", "floor"))
    model.eval()
    logits, _ = model(tokens, reset=reset)
    assert found["logit_max"] == pytest.approx(logits.abs().max().item(), rel=1e-6)
    again = gates.measure(model, lambda: model(tokens, reset=reset))
    assert again == found
    assert not model.training


def test_a_gate_without_normaliser_has_no_floor() -> None:
    model = xLSTMLarge(xLSTMLargeConfig(vocab_size=19, width=16, heads=2, blocks=1, input_gate="sigmoid"))
    (layer,) = gates.measure(model, lambda: model(torch.randint(0, 19, (1, 9))))["gates"]
    assert layer["floor"] is None
    assert layer["m_min"] == layer["m_max"] == 0.0


def test_a_fresh_model_shows_the_gates_it_was_given() -> None:
    """The initialisation of the 7B architecture: input gates at -10, forget gates from 3 to 6, all at the floor."""
    model = xLSTMLarge(xLSTMLargeConfig(vocab_size=19, width=64, heads=4, blocks=1))
    (layer,) = gates.measure(model, lambda: model(torch.randint(0, 19, (1, 40))))["gates"]
    capped = torch.tensor(-10 / 15).tanh().item() * 15
    assert layer["input_max"] == pytest.approx(-capped, rel=1e-4)
    biases = 15 * torch.tanh(torch.linspace(3, 6, 4) / 15)
    assert layer["forget_mean"] == pytest.approx(torch.sigmoid(biases).mean().item(), abs=1e-4)
    assert layer["forgetful"] == 0
    assert layer["floor"] == 1.0
