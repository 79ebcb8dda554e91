"""The contract of models/interface.py: state, reset, mask and time, for both architectures, in float64 at 1e-10."""

import copy
import pickle

import pytest
import torch
from models.small_models import KINDS, assert_same_memory, build, build_stack, tokens

close = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_of_documents_is_the_documents_alone(kind):
    model = build(kind)
    lengths = [5, 1, 9, 3]
    documents = [tokens(1, n) for n in lengths]
    reset = torch.zeros(1, sum(lengths), dtype=torch.bool)
    reset[0, [0, 5, 6, 15]] = True
    used = model(tokens(1, 4))[1]  # a reset also forgets what came before the call
    logits, state = model(torch.cat(documents, 1), used, reset=reset)
    alone = [model(document) for document in documents]
    torch.testing.assert_close(logits, torch.cat([y for y, _ in alone], 1), **close)
    assert_same_memory(state, alone[-1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_anywhere_changes_nothing(kind):
    """Left, right, middle, everywhere and nowhere, in one batch, with ids outside the vocabulary as padding."""
    model = build(kind)
    n, T = 6, 11
    places = [range(5, 11), range(6), [0, 1, 4, 5, 9, 10], [1, 2, 3, 6, 8, 9]]
    mask = torch.zeros(5, T, dtype=torch.bool)
    x = torch.full((5, T), -100)
    sentences = tokens(4, n)
    for row, place in enumerate(places):
        mask[row, list(place)] = True
        x[row, list(place)] = sentences[row]
    before = model(tokens(5, 3))[1]
    logits, state = model(x, before, mask=mask)
    want, want_state = model(sentences, before.select(torch.arange(4)))
    assert logits.isfinite().all()
    for row, place in enumerate(places):
        torch.testing.assert_close(logits[row, list(place)], want[row], **close)
    assert_same_memory(state.select(torch.arange(4)), want_state)
    for (name, a), (_, b) in zip(state.named_tensors(), before.named_tensors()):
        assert torch.equal(a[4], b[4]), f"{name}: a row of padding only moved the state"


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_reset_still_empties_the_state(kind):
    model = build(kind)
    x = tokens(2, 4)
    reset, mask = torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    reset[:, 0], mask[:, 0] = True, False
    logits, state = model(torch.cat((tokens(2, 1), x), 1), model(tokens(2, 7))[1], reset=reset, mask=mask)
    want, want_state = model(x)
    torch.testing.assert_close(logits[:, 1:], want, **close)
    assert_same_memory(state, want_state)


def test_nan_at_masked_positions_reaches_nothing():
    """No output, no state, no gradient: not of the parameters, not of the input."""
    stack = build_stack()
    x = torch.randn(3, 9, 12, dtype=torch.float64)
    mask = torch.rand(3, 9) < 0.6
    results = []
    for filler in (0.0, torch.nan):
        stack.zero_grad()
        filled = torch.where(mask[..., None], x, filler).requires_grad_()
        y, state = stack(filled, mask=mask)
        (y[mask].square().sum() + sum(t.square().sum() for t in state.tensors())).backward()
        results.append([y, *state.tensors(), filled.grad, *(p.grad.clone() for p in stack.parameters())])
    for clean, poisoned in zip(*results, strict=True):
        assert poisoned.isfinite().all()
        assert torch.equal(clean, poisoned)
    assert (results[1][-1 - len(list(stack.parameters()))][~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_and_state_are_the_whole_at_every_cut(kind):
    """With resets and holes, and with the empty prefix and the empty rest."""
    model = build(kind)
    T = 9
    x, reset, mask = tokens(3, T), torch.rand(3, T) < 0.2, torch.rand(3, T) < 0.7
    whole, end = model(x, reset=reset, mask=mask)
    for cut in range(T + 1):
        first, state = model(x[:, :cut], reset=reset[:, :cut], mask=mask[:, :cut])
        second, state = model(x[:, cut:], state, reset=reset[:, cut:], mask=mask[:, cut:])
        torch.testing.assert_close(torch.cat((first, second), 1)[mask], whole[mask], **close)
        assert_same_memory(state, end)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_cross_a_cut(kind):
    """Back-propagation through the state: two halves, or single tokens, give the gradients of the whole."""
    model = build(kind)
    x = tokens(2, 8)

    def gradients(*parts):
        model.zero_grad()
        state, loss = None, 0.0
        for part in parts:
            logits, state = model(part, state)
            loss = loss + logits.square().sum()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    whole = gradients(x)
    for parts in ((x[:, :3], x[:, 3:]), x.split(1, dim=1)):
        cut = gradients(*parts)
        for name in whole:
            torch.testing.assert_close(
                cut[name], whole[name], rtol=1e-8, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_is_the_whole(kind):
    model = build(kind)
    x = tokens(2, 7)
    whole, end = model(x)
    state, steps = None, []
    for t in range(7):
        logits, state = model(x[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, **close)
    assert_same_memory(state, end)


@pytest.mark.parametrize("kind", KINDS)
def test_models_and_states_are_copied_and_pickled(kind):
    """For worker processes, and for whoever keeps a state in a file of their own."""
    model = build(kind)
    x = tokens(2, 5)
    want, state = model(x)
    logits, _ = model(x, state)
    for again in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
        assert torch.equal(again(model)(x)[0], want)
        assert again(model.config) == model.config
        assert torch.equal(model(x, again(state.detach()))[0], logits)


@pytest.mark.parametrize("kind", KINDS)
def test_one_state_serves_two_continuations(kind):
    """Independent, repeatable to the bit, and nothing that goes in is changed: in fp32, as users run it."""
    model = build(kind, torch.float32)
    _, state = model(tokens(2, 6))
    x, other, reset, mask = tokens(2, 5), tokens(2, 5), torch.rand(2, 5) < 0.3, torch.rand(2, 5) < 0.7
    inputs = [*state.tensors(), x, other, reset, mask, *model.parameters()]
    versions, copies = [t._version for t in inputs], [t.clone() for t in inputs]
    first, first_state = model(x, state, reset=reset, mask=mask)
    model(other, state)
    again, again_state = model(x, state, reset=reset, mask=mask)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(first_state.tensors(), again_state.tensors()))
    assert versions == [t._version for t in inputs]
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies))
    given = {t.untyped_storage().data_ptr() for t in state.tensors() if t.numel()}
    assert not given & {t.untyped_storage().data_ptr() for t in first_state.tensors() if t.numel()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_does_not_leak_by_one_bit(kind):
    model = build(kind, torch.float32)
    x = tokens(2, 70)
    logits, _ = model(x)
    for t in (0, 1, 15, 16, 63, 64, 69):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 23
        got, _ = model(changed)
        assert torch.equal(got[:, :t], logits[:, :t])
        assert not torch.equal(got[:, t:], logits[:, t:])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_do_not_meet(kind):
    model = build(kind)
    x = tokens(3, 6)
    logits, state = model(x)
    alone, alone_state = model(x[1:2])
    torch.testing.assert_close(logits[1:2], alone, **close)
    assert_same_memory(state.select(torch.tensor([1])), alone_state)


@pytest.mark.parametrize("kind", KINDS)
def test_no_time_at_all(kind):
    """T = 0 is legal: no logits, and the state as it was."""
    model = build(kind)
    _, state = model(tokens(2, 3))
    logits, after = model(tokens(2, 0), state)
    assert logits.shape == (2, 0, 23)
    assert_same_memory(after, state, tolerance=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_empty_state_is_no_state(kind):
    model = build(kind)
    x = tokens(2, 5)
    got, want = model(x, model.empty_state(2)), model(x)
    torch.testing.assert_close(got[0], want[0], **close)
    assert_same_memory(got[1], want[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_activations_give_the_same_gradients(kind, every):
    """With a state, resets and a mask, since these take part in the replay."""
    model = build(kind)
    x, reset, mask = tokens(2, 6), torch.rand(2, 6) < 0.3, torch.rand(2, 6) < 0.8
    _, state = model(tokens(2, 3))
    results = []
    for checkpoint_every in (0, every):
        model.checkpoint_every = checkpoint_every
        model.zero_grad()
        logits, after = model(x, state.detach(), reset=reset, mask=mask)
        (logits[mask].square().sum() + sum(t.sum() for t in after.tensors())).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("kind", ["xlstm", "xlstm_large"])
def test_every_nth_block_is_recomputed_and_no_other(kind):
    model = build(kind)
    blocks = model.stack.blocks if kind == "xlstm" else model.backbone.blocks
    calls = [0] * len(blocks)

    def count(index):
        calls[index] += 1

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, index=index: count(index))
    model.checkpoint_every = 2
    model(tokens(2, 5))[0].sum().backward()
    assert calls == [2 if index % 2 == 0 else 1 for index in range(len(blocks))]
    with torch.no_grad():
        model(tokens(2, 5))
    assert calls == [3 if index % 2 == 0 else 2 for index in range(len(blocks))], "nothing to recompute for"


def test_recomputation_draws_the_same_dropout():
    stack = build_stack()
    for module in stack.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.4
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    results = []
    for every in (0, 1):
        stack.checkpoint_every = every
        stack.zero_grad()
        torch.manual_seed(5)
        stack(x)[0].square().sum().backward()
        results.append([p.grad.clone() for p in stack.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("kind", ["xlstm", "xlstm_large"])
def test_logits_are_the_head_over_features(kind):
    model = build(kind)
    x = tokens(2, 4)
    hidden, state = model.features(x)
    logits, end = model(x)
    assert hidden.shape == (2, 4, 12)
    assert torch.equal(model.logits(hidden), logits)
    assert_same_memory(state, end, tolerance=0)
