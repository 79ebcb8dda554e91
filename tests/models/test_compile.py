"""Both models compile as one graph, with states going in and coming out, for any length."""

import dataclasses

import pytest
import torch
from models.small_models import CONFIGS, assert_same_memory, awake, tokens

from openxlstm.models.xlstm import xLSTM
from openxlstm.models.xlstm_large import xLSTMLarge

pytestmark = pytest.mark.compile


def build_short(kind):
    """Two blocks, or one: tracing is slow, and more blocks are more of the same."""
    change = {"pattern": "ms"} if kind == "xlstm" else {"blocks": 1}
    config = dataclasses.replace(CONFIGS[kind], **change)
    return awake(xLSTM(config) if kind == "xlstm" else xLSTMLarge(config)).double()


@pytest.mark.parametrize("kind", ["xlstm", "xlstm_large"])
def test_one_graph_with_state_in_and_out(kind):
    """The first call has no state, the later ones do; lengths within a chunk and beyond one."""
    torch._dynamo.reset()
    model = build_short(kind)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    state = eager_state = None
    for T in (9, 70, 3):
        x, reset, mask = tokens(2, T), torch.rand(2, T) < 0.2, torch.rand(2, T) < 0.8
        got, state = compiled(x, state, reset=reset, mask=mask)
        want, eager_state = model(x, eager_state, reset=reset, mask=mask)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert_same_memory(state, eager_state)


@pytest.mark.parametrize("kind", ["xlstm", "xlstm_large"])
def test_gradients_of_the_compiled_model(kind):
    torch._dynamo.reset()
    model = build_short(kind)
    x = tokens(2, 20)
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        logits, state = forward(x)
        (logits.square().sum() + sum(t.sum() for t in state.tensors())).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


def test_one_graph_under_autocast():
    torch._dynamo.reset()
    model = build_short("xlstm").float()
    x = tokens(2, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, _ = model(x)
        got, _ = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
