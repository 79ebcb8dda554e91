"""States of recurrent modules: carried, unpacked, detached, selected, stepped; as a tree and as nn.LSTM's pair."""

import copy
import dataclasses
import pickle

import pytest
import torch
from rnn.by_hand import D, U, build, close
from support import storages, unchanged
from torch import nn

from openxlstm.rnn import RNNState

KINDS = ("sLSTM", "mLSTM", "xLSTM")
VARIANTS = [("sLSTM", {}), ("sLSTM", {"proj_size": 3}), ("mLSTM", {}), ("mLSTM", {"proj_size": 3}), ("xLSTM", {})]


def x_of(T, B=3):
    return torch.randn(T, B, D, dtype=torch.float64)


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], **close)
    for (name, a), (_, b) in zip(got[1].named_tensors(), want[1].named_tensors(), strict=True):
        torch.testing.assert_close(a, b, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
@pytest.mark.parametrize("cut", [0, 1, 7, 10])
def test_a_prefix_and_its_state_are_the_whole(kind, options, cut):
    """As a tree, as the pair (h, c), as a list; values and gradients, at both ends too."""
    module = build(kind, num_layers=2, **options)
    x = x_of(10).requires_grad_()
    whole = module(x)
    (want,) = torch.autograd.grad(whole[0].sin().sum(), x)
    for form in (lambda state: state, tuple, list):
        first, state = module(x[:cut])
        second, after = module(x[cut:], form(state))
        y = torch.cat((first, second))
        assert_same((y, after), whole)
        torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), x)[0], want, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_is_the_whole(kind):
    for batch_first in (False, True):
        module = build(kind, num_layers=2, batch_first=batch_first)
        x = x_of(6)
        want = module(x.transpose(0, 1) if batch_first else x)
        state, outputs = None, []
        for x_t in x:
            y_t, state = module.step(x_t, state)
            outputs.append(y_t)
        y = torch.stack(outputs, dim=1 if batch_first else 0)
        assert_same((y, state), want)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_goes_in_is_written_to_and_nothing_shares_memory(kind):
    module = build(kind, num_layers=2)
    x = x_of(5)
    _, state = module(x)
    for T in (5, 1, 0):
        given = x[:T].clone()
        with unchanged(given, *state.tensors()):
            y, after = module(given, state)
            assert not storages(y, *after.tensors()) & storages(given, *state.tensors()) - {0}
        first, second = module(given, state), module(given, state)
        assert_same(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_stateful_training_and_outputs_changed_in_place(kind):
    """Truncated back-propagation with a carried state, under anomaly detection, with in-place activations behind."""
    module = build(kind, num_layers=2)
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-3)
    state = None
    with torch.autograd.set_detect_anomaly(True):
        for _ in range(4):
            y, state = module(x_of(5), state)
            kept = state.h.clone()
            loss = torch.relu_(y).square().sum()
            assert torch.equal(state.h, kept)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            state = state.detach()
            assert not any(tensor.requires_grad for tensor in state.tensors())


@pytest.mark.parametrize("kind", KINDS)
def test_the_habits_of_scripts(kind):
    """What programs do with nn.LSTM's pair: each line here was written for nn.LSTM."""
    lstm, module = nn.LSTM(D, U, 2, bidirectional=True).double(), build(kind, num_layers=2, bidirectional=True)
    for recurrent in (lstm, module):
        recurrent.flatten_parameters()
        out, (h, c) = recurrent(x_of(7))
        assert out.shape == (7, 3, 2 * U)
        assert h.shape == (4, 3, U)
        assert c.shape[:2] == (4, 3)
        assert out.view(-1, 2 * U).shape[0] == 21
        assert h.view(-1).shape == (4 * 3 * U,)
        last = h.view(recurrent.num_layers, 2, 3, U)[-1]  # layers, directions
        torch.testing.assert_close(last[0], out[-1, :, :U], **close)
        torch.testing.assert_close(last[1], out[0, :, U:], **close)
        torch.testing.assert_close(torch.cat((h[-2], h[-1]), 1), torch.cat((out[-1, :, :U], out[0, :, U:]), 1))

        out, hidden = recurrent(x_of(7))
        hidden = tuple(part.detach() for part in hidden)
        out, hidden = recurrent(x_of(2), (hidden[0][:, :2].repeat(1, 2, 1)[:, :3], hidden[1][:, [0, 1, 0]]))
        out, hidden = recurrent(x_of(2), [part.data for part in hidden])
        assert len(hidden) == 2
        zeros = torch.zeros(4, 3, U, dtype=torch.float64)
        x = x_of(4)
        torch.testing.assert_close(recurrent(x, (zeros, zeros))[0], recurrent(x)[0], rtol=0, atol=0)
        one, (h, c) = recurrent(x[:, 0])  # a sequence without a batch
        assert one.shape == (4, 2 * U)
        assert h.shape == (4, U)
        _, (h, c) = recurrent(x[:, 0], (h, c))
        assert c.ndim == 2
        for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
            assert getattr(module, name) == getattr(lstm, name)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_selected_joined_moved_and_saved(kind):
    module = build(kind)
    x = x_of(6)
    _, state = module(x)
    rows = torch.tensor([2, 0, 0])
    want = module(x[:, rows])
    assert_same((want[0], state.select(rows)), want)
    assert_same((want[0], pickle.loads(pickle.dumps(state.select(rows)))), want)
    halves = [module(x[:, :1])[1], module(x[:, 1:])[1]]
    joined = tuple(torch.cat(parts, dim=1) for parts in zip(*halves, strict=True))
    torch.testing.assert_close(module(x, joined)[0], module(x, state)[0], **close)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.h = None
    assert isinstance(state, RNNState)


@pytest.mark.parametrize("kind", KINDS)
def test_the_empty_state_is_none_and_is_zeros(kind):
    module = build(kind, num_layers=2)
    x = x_of(4)
    empty = module.empty_state(3)
    assert all((tensor == 0).all() for tensor in empty.tensors())
    assert_same(module(x, empty), module(x))
    assert_same(module(x, tuple(empty)), module(x))
    assert empty.h.shape == (3, 2, U)
    assert tuple(empty)[1].shape == (2, 3, module.memory_size)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_without_steps_keeps_its_state(kind):
    """lengths of 0 in a batch, and no time at all: h, c and the next output are what they were."""
    module = build(kind, num_layers=2)
    _, state = module(x_of(5))
    y, after = module(x_of(4), state, lengths=[4, 0, 2])
    assert (y[:, 1] == 0).all()
    for a, b in zip(after, state, strict=True):
        torch.testing.assert_close(a[:, 1], b[:, 1], rtol=0, atol=0)
        assert not torch.equal(a[:, 0], b[:, 0])
    y, after = module(x_of(0), state)
    assert y.shape == (0, 3, U)
    assert_same((y, after), (y, state))


def test_an_slstm_begins_from_the_pair_of_an_lstm():
    """h is h; c is one observation. Zeros are nothing; a row of them stays empty."""
    module = build("sLSTM", num_layers=2)
    h, c = torch.randn(2, 2, 3, U, dtype=torch.float64).unbind(0)
    c[1, 2] = 0
    h, c = h.requires_grad_(), c.requires_grad_()
    y, _ = module(x_of(4), (h, c))
    assert all((grad != 0).any() for grad in torch.autograd.grad(y.sum(), (h, c)))
    state = module._start((h, c), x_of(4).transpose(0, 1), True)
    layer = state.layers[1]
    assert (layer.n.flatten(1)[:2] == 1).all()
    assert (layer.n[2] == 0).all()
    torch.testing.assert_close((layer.c / layer.n).flatten(1)[:2], c[1, :2])  # what the output gate will let out


def test_a_learned_initial_state_learns():
    module = build("mLSTM")
    start = nn.Parameter(0.1 * torch.randn(1, 1, module.memory_size, dtype=torch.float64))
    h = torch.zeros(1, 3, U, dtype=torch.float64)
    y, _ = module(x_of(4), (h, start.expand(-1, 3, -1)))
    y.sum().backward()
    assert (start.grad != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_keeps_states_in_fp32_and_the_tree_continues_exactly(kind):
    module = copy.deepcopy(build(kind, num_layers=2)).bfloat16()
    x = x_of(12).bfloat16()
    whole, _ = module(x)
    first, state = module(x[:5])
    second, _ = module(x[5:], state)
    assert whole.dtype == state.h.dtype == torch.bfloat16
    assert {tensor.dtype for layer in state.layers for tensor in layer.tensors()} == {torch.float32}
    if kind == "sLSTM":  # sequential: not even the rounding differs
        assert torch.equal(torch.cat((first, second)), whole)
    torch.testing.assert_close(torch.cat((first, second)), whole, rtol=0.02, atol=0.05)
    pair = module(x[5:], tuple(state))[0]
    torch.testing.assert_close(pair, second, rtol=0.02, atol=0.05)
