"""rnn.sLSTM, mLSTM and xLSTM against loops by hand over the definition: outputs, (h, c) and every gradient, float64."""

import pytest
import torch
from rnn.by_hand import D, U, build, close, module_by_hand, sequences
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence

from openxlstm import rnn
from openxlstm.cells import slstm

KINDS = ("sLSTM", "mLSTM", "xLSTM")
VARIANTS = {
    "one layer": {},
    "layers": {"num_layers": 3},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "projected": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    "no bias": {"bias": False, "num_layers": 2},
}
CASES = [(kind, name) for kind in KINDS for name in VARIANTS if (kind, name) not in {("xLSTM", "projected")}]
CASES.remove(("xLSTM", "no bias"))  # by_hand adds biases; test_modules counts them
CASES.remove(("mLSTM", "no bias"))


def gradients(outputs, module, inputs):
    """Of a fixed random projection of all outputs, with respect to inputs and parameters."""
    torch.manual_seed(1)
    loss = sum((output * torch.randn(output.shape, dtype=output.dtype)).sum() for output in outputs)
    return torch.autograd.grad(loss, [*inputs, *module.parameters()])


def assert_same_gradients(got, want, module, inputs):
    names = [f"x{index}" for index in range(len(inputs))] + [name for name, _ in module.named_parameters()]
    for name, a, b in zip(names, got, want, strict=True):
        torch.testing.assert_close(a, b, **close, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_slstm_is_the_definition_with_a_matrix_before_it():
    """One layer against cells.slstm, with a state in the middle of a sequence, its gradients included."""
    module = build("sLSTM")
    layer = module.layers[0]
    x = torch.randn(9, 2, D, dtype=torch.float64, requires_grad=True)
    _, state = module(torch.randn(4, 2, D, dtype=torch.float64))
    start = state.map(lambda tensor: tensor.detach().requires_grad_())
    y, after = module(x, start)

    W = torch.cat((layer.cell.W_if.weight, layer.cell.W_zo.weight))
    gates = (x.transpose(0, 1) @ W.T).unflatten(-1, (4, 2, U // 2))
    want, want_after = slstm.recurrent(gates, layer.cell.R, layer.cell.b, start.layers[0])
    torch.testing.assert_close(y, want.flatten(-2).transpose(0, 1), **close)
    for got, expected in zip(after.layers[0].tensors(), want_after.tensors(), strict=True):
        torch.testing.assert_close(got, expected, **close)
    past = [start.layers[0].h, start.layers[0].c, start.layers[0].n]
    found, expected = (
        gradients([y_TBU, one.h, one.c, one.n], module, [x, *past])
        for y_TBU, one in ((y, after.layers[0]), (want.flatten(-2).transpose(0, 1), want_after))
    )
    assert_same_gradients(found, expected, module, [x, *past])


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_every_sequence_of_a_batch_is_a_loop_by_hand(kind, variant):
    """Unequal lengths with NaN as padding, by lengths=: outputs, h and gradients are those of each sequence alone."""
    module = build(kind, **VARIANTS[variant])
    rows = [row.requires_grad_() for row in sequences(7, 1, 12)]
    padded = pad_sequence(rows, padding_value=float("nan"))
    y, (h, _) = module(padded, lengths=[7, 1, 12])
    alone = [module_by_hand(module, row) for row in rows]
    for b, (want_y, want_h) in enumerate(alone):
        torch.testing.assert_close(y[: len(rows[b]), b], want_y, **close)
        assert (y[len(rows[b]) :, b] == 0).all()
        torch.testing.assert_close(h[:, b], want_h, **close)
    got = gradients([*(y[: len(row), b] for b, row in enumerate(rows)), *h.unbind(1)], module, rows)
    want = gradients([*(y for y, _ in alone), *(h for _, h in alone)], module, rows)
    assert_same_gradients(got, want, module, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_in_is_packed_out(kind, enforce_sorted):
    """The same packing, the same order of sequences in h and c as they were given in, the same gradients."""
    module = build(kind, num_layers=2, bidirectional=True)
    lengths = (9, 5, 5, 1) if enforce_sorted else (5, 1, 9, 5)
    rows = [row.requires_grad_() for row in sequences(*lengths)]
    packed = pack_sequence(rows, enforce_sorted=enforce_sorted)
    y, state = module(packed)
    assert type(y) is type(packed)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        mine, given = getattr(y, name), getattr(packed, name)
        assert (mine is None and given is None) or torch.equal(mine, given)
    padded, counts = pad_packed_sequence(y)
    assert counts.tolist() == list(lengths)
    want_y, want_state = module(pad_sequence(rows), lengths=torch.tensor(lengths))
    torch.testing.assert_close(padded, want_y, **close)
    for got, want in zip(state, want_state, strict=True):
        torch.testing.assert_close(got, want, **close)
    got, want = (gradients([one_y, *one], module, rows) for one_y, one in ((padded, state), (want_y, want_state)))
    assert_same_gradients(got, want, module, rows)

    again, _ = module(packed, (state[0], state[1]))  # h and c go back in the order in which sequences were given
    want_again, _ = module(pad_sequence(rows), tuple(want_state), lengths=lengths)
    torch.testing.assert_close(pad_packed_sequence(again)[0], want_again, **close)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_episodes_in_one_row_are_episodes_alone(kind, bidirectional):
    """reset cuts in both directions; what ran before the call is forgotten where a row begins with a reset."""
    module = build(kind, num_layers=2, bidirectional=bidirectional, batch_first=True)
    episodes = sequences(4, 1, 7)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[:, [0, 4, 5]] = True
    x = torch.stack([torch.cat(episodes), torch.randn(12, D, dtype=torch.float64)])
    reset[1, 4] = False
    used = module(torch.randn(2, 3, D, dtype=torch.float64))[1]
    y, state = module(x, None if bidirectional else used, reset=reset)
    alone = [module(episode) for episode in episodes]
    torch.testing.assert_close(y[0], torch.cat([one for one, _ in alone]), **close)
    torch.testing.assert_close(y[1, :5], module(x[1, :5])[0], **close)
    torch.testing.assert_close(state.h[0, 0], alone[-1][1].h[0, 0], **close)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_cuts_the_gradient(kind):
    module = build(kind)
    x = torch.randn(8, 1, D, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(8, 1, dtype=torch.bool)
    reset[5] = True
    y, _ = module(x, reset=reset)
    (grad,) = torch.autograd.grad(y[5:].sum(), x)
    assert (grad[:5] == 0).all()
    assert (grad[5:] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_does_not_leak(kind):
    module = build(kind, num_layers=2)
    x = torch.randn(2, 20, D, dtype=torch.float64).transpose(0, 1)
    changed = x.clone()
    changed[13:] = 100.0
    assert torch.equal(module(x)[0][:13], module(changed)[0][:13])


@pytest.mark.parametrize("options", [{"input_gate": "sigmoid"}, {"forget_gate": "exp", "eps": 0.0}])
def test_other_gates_of_the_mlstm(options):
    module = build("mLSTM", num_layers=2, **options)
    (x,) = sequences(11)
    torch.testing.assert_close(module(x)[0], module_by_hand(module, x)[0], **close)


def test_the_other_forget_gate_of_the_slstm_and_a_layer_without_convolution():
    (x,) = sequences(11)
    for module in (build("sLSTM", forget_gate="exp"), build("xLSTM", conv=0, pattern="sm")):
        torch.testing.assert_close(module(x)[0], module_by_hand(module, x)[0], **close)


def test_the_names_of_the_package():
    assert set(vars(rnn)) >= {"sLSTM", "mLSTM", "xLSTM", "RNNState"}
