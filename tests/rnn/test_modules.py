"""Recurrent modules as modules: construction, initialisation, dropout, dtypes, saving, and sentences for mistakes."""

import copy
import inspect
import pickle

import pytest
import torch
from rnn.by_hand import MODULES, D, U, build, close
from torch import nn
from torch.nn.utils.rnn import pack_sequence

KINDS = list(MODULES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_constructor_is_that_of_nn_lstm(kind):
    """Names, defaults and order: `bias` of nn.LSTM may be given by position, so may ours."""
    theirs = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
    ours = inspect.signature(MODULES[kind]).parameters
    assert list(ours)[: len(theirs)] == theirs
    lstm = nn.LSTM(3, 4)
    for name in theirs[2:]:
        assert ours[name].default == getattr(lstm, name)
    assert "device" in ours
    assert "dtype" in ours
    assert ("proj_size" in ours) == (kind != "xLSTM")
    module, x = build(kind, batch_first=True), x_of()
    assert torch.equal(module(input=x, hx=None)[0], module(x)[0])  # nn.LSTM's own keywords


@pytest.mark.parametrize("kind", KINDS)
def test_any_widths_fit(kind):
    """hidden_size has nothing to do with input_size, and no heads need to be chosen."""
    for inputs, hidden in ((1, 7), (64, 3), (10, 50), (3, 8), (5, 32)):
        module = MODULES[kind](inputs, hidden)
        y, (h, _) = module(torch.randn(4, 2, inputs))
        assert y.shape == (4, 2, hidden)
        assert torch.equal(h[-1], y[-1])
    assert [MODULES["mLSTM"](3, hidden).heads for hidden in (3, 8, 16, 32, 50)] == [1, 1, 2, 4, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_is_copied_pickled_saved_and_described(kind):
    module, x = build(kind, num_layers=2, bidirectional=True), torch.randn(4, 2, D, dtype=torch.float64)
    want = module(x)[0]
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x)[0], want)
    fresh = MODULES[kind](D, U, 2, bidirectional=True, heads=2, dtype=torch.float64)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x)[0], want)
    assert f"{kind}(\n  {D}, {U}, num_layers=2, bidirectional=True, heads=2" in repr(module)
    assert len(module._empty[0].tensors()) > 0
    assert not [name for name in module.state_dict() if "_empty" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_device_and_dtype_are_those_asked_for(kind):
    module = MODULES[kind](D, U, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    y, _ = module(torch.empty(3, 2, D, device="meta", dtype=torch.bfloat16))
    assert y.shape == (3, 2, U)
    assert y.device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_initialisation_fills_every_parameter_and_opens_the_memory(kind):
    """Uninitialised memory is NaN in every test; gates begin as constants that remember."""
    module = MODULES[kind](D, 32, 2)
    assert all(p.isfinite().all() for p in module.parameters())
    cells = {name: one for name, one in module.named_modules() if name.endswith("cell")}
    assert cells
    for cell in cells.values():
        if hasattr(cell, "R"):
            assert (cell.R == 0).all()
            if kind == "sLSTM":
                torch.testing.assert_close(cell.b[1, 0], torch.linspace(0, 6, 32))
        else:
            assert (cell.W_if.weight == 0).all()
            torch.testing.assert_close(cell.W_if.bias[4:], torch.linspace(3, 6, 4))
    if kind == "xLSTM":  # the papers' tables: unlike forget biases by depth, small writes to the residual stream
        first, last = (next(b.cell for b in layer.blocks if hasattr(b.cell, "R")) for layer in module.layers)
        assert not torch.allclose(first.b[1], last.b[1])
        for block in (block for layer in module.layers for block in layer.blocks):
            assert block.ffn_down.weight.std() < 1.3 * 2 / (4 * 32**0.5)  # four blocks write
    before = [p.clone() for p in module.parameters()]
    module.reset_parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_no_bias_means_no_bias(kind):
    module = MODULES[kind](D, U, 2, bias=False)
    biases = [name for name, _ in module.named_parameters() if name.rsplit(".", 1)[-1] in ("bias", "b")]
    assert [name for name in biases if "conv" not in name] == []  # a convolution without one would be another cell
    assert module(torch.zeros(3, 1, D))[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_lies_between_layers_and_only_in_training(kind):
    module, x = build(kind, num_layers=2, dropout=0.5), torch.randn(6, 2, D, dtype=torch.float64)
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    single = build(kind, dropout=0.5)
    assert torch.equal(single(x)[0], single(x)[0])  # the last layer's output is never dropped
    torch.manual_seed(3)
    module.train()
    y, _ = module(x)
    first, second = module.layers
    torch.manual_seed(3)
    lower = nn.functional.dropout(first(x.transpose(0, 1), None, None, None)[0], 0.5)
    torch.testing.assert_close(y, second(lower, None, None, None)[0].transpose(0, 1), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_little_and_gradients_arrive(kind):
    module, x = build(kind, num_layers=2).float(), torch.randn(9, 2, D)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = module(x)
        y.square().sum().backward()
    assert y.dtype == torch.float32
    assert {tensor.dtype for layer in state.layers for tensor in layer.tensors()} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    torch.testing.assert_close(y, module(x)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_in_the_middle_of_padding_and_in_every_form(kind):
    module, x = build(kind), torch.randn(4, 2, D, dtype=torch.float64)
    forms = [module(x, lengths=lengths)[0] for lengths in ([3, 4], (3, 4), torch.tensor([3, 4], dtype=torch.int32))]
    assert torch.equal(forms[0], forms[1])
    assert torch.equal(forms[0], forms[2])
    reset = torch.zeros(4, 2, dtype=torch.bool)
    reset[3, 0] = True  # behind the end of sequence 0: not there
    assert torch.equal(module(x, lengths=[3, 4], reset=reset)[1].h, module(x, lengths=[3, 4])[1].h)


REFUSALS = [
    (lambda m: m(torch.zeros(4, 2, 3)), r"x must be \[time, batch, 5\] \(batch_first=False\), or \[time, 5\]"),
    (lambda m: m(torch.zeros(4, 2, D, dtype=torch.long)), "embed token ids first"),
    (lambda m: m(torch.zeros(4, 2, D)), r"x is torch.float32 and the module torch.float64; use x.to\(torch.float64\)"),
    (lambda m: m(x_of(), lengths=[1, 5]), r"length 5 is outside 0\.\.4"),
    (lambda m: m(x_of(), lengths=[1]), "lengths must be 2 whole numbers"),
    (lambda m: m(x_of(), lengths=torch.tensor([1.0, 2.0])), "lengths must be 2 whole numbers"),
    (lambda m: m(x_of()[:, 0], lengths=[1]), "lengths are for batches"),
    (lambda m: m(pack_sequence([x_of()[:, 0]]), lengths=[4]), "has its lengths inside"),
    (lambda m: m(x_of(), reset=torch.zeros(2, 4, dtype=torch.bool)), r"reset must be bool \[time, batch\] = \[4, 2\]"),
    (lambda m: m(x_of(), reset=torch.zeros(4, 2)), r"use reset.bool\(\)"),
    (lambda m: m(x_of(), m(x_of()[:, :1])[1]), r"state.select\(rows\) picks sequences"),
    (lambda m: m(x_of(), build("xLSTM", pattern="s")(x_of())[1]), r"layer 0 of the state holds blocks\.0\.conv"),
    (lambda m: m(x_of(), (torch.zeros(1, 2, U), torch.zeros(1, 2, 5))), r"c of the state must be \[1, 2, \d+\] or"),
    (lambda m: m(x_of(), (torch.zeros(2, 1, U), torch.zeros(2, 1, U))), r"h of the state must be \[1, 2, 6\]"),
    (lambda m: m(x_of(), [torch.zeros(1, 2, U)]), "got 1 tensor"),
    (
        lambda m: inspect.unwrap(type(m)._from_pair)(m, torch.zeros(1, 2, U), x_of(), True),
        "got one tensor, as for nn.GRU",
    ),
    (lambda m: m.step(x_of()), r"step takes \[batch, 5\]"),
    (lambda m: build("sLSTM", bidirectional=True).step(x_of()[0]), "would need the future"),
]


def x_of():
    return torch.zeros(4, 2, D, dtype=torch.float64)


@pytest.mark.parametrize("case", range(len(REFUSALS)))
def test_a_mistake_gets_a_sentence(case):
    call, sentence = REFUSALS[case]
    with pytest.raises(ValueError, match=sentence):
        call(build("sLSTM"))


def test_a_matrix_cannot_be_made_from_a_vector():
    ones = torch.ones(1, 2, U, dtype=torch.float64)
    for module in (build("mLSTM"), build("xLSTM"), build("sLSTM", proj_size=3)):
        h = ones[..., : module.width]
        with pytest.raises(ValueError, match="cannot be made from it. Begin with hx=None"):
            module(x_of(), (h, ones))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MODULES["sLSTM"](3, 10, heads=4), "heads=4 must divide hidden_size=10; the nearest that does is 5"),
        (lambda: MODULES["mLSTM"](3, 0), "hidden_size=0 must be at least 1"),
        (lambda: MODULES["mLSTM"](3, 4, num_layers=0), "num_layers=0 must be at least 1"),
        (lambda: MODULES["mLSTM"](3, 4, proj_size=4), "proj_size=4 must be below hidden_size=4"),
        (lambda: MODULES["mLSTM"](3, 4, dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
        (lambda: MODULES["mLSTM"](3, 4, forget_gate="exp"), "needs eps=0"),
        (lambda: MODULES["sLSTM"](3, 4, forget_gate="tanh"), "forget_gate='tanh' must be one of"),
        (lambda: MODULES["xLSTM"](3, 4, pattern="mx"), "must name one block per letter"),
        (lambda: MODULES["xLSTM"](3, 4, conv=-1), "conv=-1 must be a number of taps"),
        (lambda: MODULES["xLSTM"](3, 1), "use a wider hidden_size"),
        (lambda: MODULES["xLSTM"](3, 4, heads=4), "at most heads=2"),
    ],
)
def test_what_cannot_be_built_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.compile
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_with_state_in_and_out(kind):
    torch._dynamo.reset()
    module = build(kind, bidirectional=kind == "sLSTM")  # tracing is slow, and more layers are more of the same
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    state = eager_state = None
    for T in (9, 70, 3):
        x, reset = torch.randn(T, 2, D, dtype=torch.float64), torch.rand(T, 2) < 0.2
        lengths = torch.tensor([T, T - 2])
        got, state = compiled(x, state, lengths=lengths, reset=reset)
        want, eager_state = module(x, eager_state, lengths=lengths, reset=reset)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
