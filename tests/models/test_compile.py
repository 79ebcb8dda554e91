"""Both models compile as one graph, with states going in and coming out, for any length."""

import collections
import dataclasses

import pytest
import torch
from models.small_models import CONFIGS, assert_same_memory, awake, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from openxlstm.kernels import cpu
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge

pytestmark = pytest.mark.compile
NATIVE = {"norm": 4, "project": 2, "gate": 1, "mlstm": 1, "slstm": 1}  # a block of each kind, and the norm behind them


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


class Native(TorchDispatchMode):
    """Counts calls of native operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "openxlstm_cpu":
            self.calls[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(cpu.missing() is not None, reason="no native kernels")
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_what_is_compiled_calls_the_native_operators_that_eager_calls(autocast):
    """An m block in one pass before its cell and one behind it; tracing must not lead it through the leaves."""
    torch._dynamo.reset()
    model = awake(xLSTM(xLSTMConfig(vocab_size=11, width=16, heads=2, pattern="ms", mlstm_width=32)))
    x = torch.randint(11, (2, 20))
    compiled = collections.Counter()

    def count(graph, inputs):
        names = (getattr(node.target, "_qualified_op_name", "") for node in graph.graph.nodes)
        compiled.update(name for name in names if name.startswith("openxlstm_cpu::"))
        return graph

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Native() as eager:
            want, _ = model(x)
        got, _ = torch.compile(model, fullgraph=True, backend=count)(x)
        assert compiled == eager.calls
        assert compiled == {f"openxlstm_cpu::{name}": n for name, n in NATIVE.items()}
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        model.stack.blocks[0].head_norm.register_forward_hook(lambda *_: None)
        torch._dynamo.reset()
        compiled.clear()
        torch.compile(model, fullgraph=True, backend=count)(x)
    assert compiled["openxlstm_cpu::gate"] == 0
    assert compiled["openxlstm_cpu::project"] == 2
