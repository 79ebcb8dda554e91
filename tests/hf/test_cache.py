"""xLSTMCache: frozen states, replaced and never written, whoever holds them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hf.tiny_hf import KINDS, build, text

import openxlstm as ox
from openxlstm.hf import StateLayer, xLSTMCache
from openxlstm.models.interface import ModelState

close = torch.testing.assert_close


def tensors(cache: xLSTMCache) -> list[torch.Tensor]:
    return cache.to_state().tensors()


@pytest.mark.parametrize("cut", [1, 7, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_and_its_state_are_the_whole(kind, cut):
    model, x = build(kind), text(2, 33)
    whole = model(x)
    first = model(x[:, :cut])
    rest = model(x[:, cut:], past_key_values=first.past_key_values)
    close(torch.cat((first.logits, rest.logits), 1), whole.logits, rtol=1e-4, atol=2e-5)
    memories = ([t * 1 for t in tensors(out.past_key_values)] for out in (rest, whole))
    assert [t.shape for t in next(memories)] == [t.shape for t in next(memories)]
    nxt = text(2, 3)
    close(
        model(nxt, past_key_values=rest.past_key_values).logits,
        model(nxt, past_key_values=whole.past_key_values).logits, rtol=1e-4, atol=2e-5,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_ever_written(kind):
    model, x = build(kind), text(2, 9)
    cache = model(x).past_key_values
    held = tensors(cache)
    versions, bits = [t._version for t in held], [t.clone() for t in held]
    model(x, past_key_values=cache)
    model.generate(
        torch.cat((x, x), 1), past_key_values=cache.fork().detach_prefix(), max_new_tokens=2, do_sample=False
    )
    cache.reset()
    assert [t._version for t in held] == versions
    assert all(torch.equal(a, b) for a, b in zip(held, bits, strict=True))


@pytest.mark.parametrize("copied", [xLSTMCache.fork, copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_fork_goes_its_own_way(copied):
    model, x = build("neurips"), text(2, 9)
    with torch.no_grad():
        cache = model(x).past_key_values
    other = copied(cache)
    if copied is not copy.copy:  # a shallow copy of the object shares its layers: use fork()
        before = tensors(cache)
        first = model(x, past_key_values=other).logits
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(cache), strict=True))
        assert torch.equal(model(x, past_key_values=cache).logits, first), "and both continue alike"
        assert cache.seen_tokens == other.seen_tokens == 18


def test_a_fork_copies_references_not_memory():
    cache = build("large")(text(2, 9)).past_key_values
    assert all(a is b for a, b in zip(tensors(cache), tensors(cache.fork()), strict=True))
    assert all(a is b for a, b in zip(tensors(cache), tensors(copy.deepcopy(cache)), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_works_with_a_history_and_gradients_flow_through(kind):
    """Truncated back-propagation is a choice: without detach the gradient is that of the whole text."""
    model, x = build(kind).double(), text(2, 12)
    want = torch.autograd.grad(model(x, use_cache=True).logits[:, 6:].square().sum(), list(model.parameters()))
    cache = copy.deepcopy(model(x[:, :6], use_cache=True).past_key_values)
    assert cache.to_state().tensors()[0].requires_grad
    got = torch.autograd.grad(
        model(x[:, 6:], past_key_values=cache.fork(), use_cache=True).logits.square().sum(),
        list(model.parameters()), retain_graph=True,
    )  # fmt: skip
    for (name, _), a, b in zip(model.named_parameters(), got, want, strict=True):
        close(a, b, rtol=1e-8, atol=1e-8, msg=name)
    cut = model(x[:, 6:], past_key_values=cache.detach()).logits.square().sum()
    other = torch.autograd.grad(cut, list(model.parameters()))
    assert any(not torch.allclose(a, b) for a, b in zip(other, want, strict=True))
    assert tensors(cache)[0].requires_grad, "detach() gives a fork"


def test_counts_and_reset():
    model, x = build("large"), text(2, 9)
    cache = model(x).past_key_values
    assert (cache.get_seq_length(), cache.seen_tokens, cache.batch_size, len(cache)) == (9, 9, 2, 2)
    assert cache.has_previous_state()
    assert torch.equal(cache.ids, x)
    visible = cache.detach_prefix()
    assert (visible.get_seq_length(), visible.seen_tokens, visible.ids) == (0, 9, None)
    assert cache.get_seq_length() == 9, "detach_prefix() gives a fork"
    cache.reset()
    assert (cache.get_seq_length(), cache.seen_tokens, cache.batch_size, cache.ids) == (0, 0, -1, None)
    assert not cache.has_previous_state()
    close(model(x, past_key_values=cache).logits, model(x).logits)
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    assert cache.get_max_length() == -1
    assert [cache.is_compileable, cache.is_croppable, cache.is_initialized] == [False] * 3
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(x), past_key_values=cache)
    assert cache.ids is None, "not all that it read were ids"


def test_rows_are_selected_repeated_and_reordered():
    model, x = build("neurips"), text(3, 9)
    cache = model(x).past_key_values
    rows = torch.tensor([2, 0, 0, 1])
    cache.reorder_cache(rows)
    assert torch.equal(cache.ids, x[rows])
    nxt = text(4, 2)
    whole = model(torch.cat((x[rows], nxt), 1)).logits[:, 9:]
    close(model(nxt, past_key_values=cache.fork()).logits, whole, rtol=1e-4, atol=1e-5)
    cache.batch_select_indices(torch.tensor([3]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 2
    close(model(nxt[:2], past_key_values=cache).logits[1], model(torch.cat((x[1:2], nxt[1:2]), 1)).logits[0, 9:],
          rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_states_come_from_and_go_to_the_rest_of_the_library(kind):
    model, x = build(kind), text(2, 9)
    native = model.native()
    _, state = native(x)
    cache = xLSTMCache.from_state(state, seen_tokens=9)
    nxt = text(2, 4)
    assert torch.equal(model(nxt, past_key_values=cache).logits, native(nxt, state)[0])
    assert (cache.seen_tokens, cache.get_seq_length()) == (13, 4)
    back = cache.to_state()
    assert isinstance(back, ModelState)
    assert torch.equal(native(nxt, back)[0], model(nxt, past_key_values=cache).logits)
    assert cache.nbytes == back.nbytes == native.empty_state(2).nbytes
    with pytest.raises(ValueError, match="has seen nothing yet"):
        xLSTMCache().to_state()


def test_storage_in_half_is_explicit_and_offloading_comes_back():
    model, x = build("large"), text(2, 9)
    cache = model(x).past_key_values
    half = cache.to(torch.bfloat16)
    assert (half.nbytes, cache.to_state().tensors()[0].dtype) == (cache.nbytes // 2, torch.float32)
    model(x, past_key_values=half.to(torch.float32))
    moved = cache.fork()
    moved.layers[0].state = moved.layers[0].state.to("meta")  # stands for an accelerator: offload remembers where
    layer = StateLayer(cache.layers[0].state)
    layer.device = torch.device("cpu")  # was offloaded
    layer.prefetch()
    assert layer.device is None
    cache.offload()
    assert all(layer.device == torch.device("cpu") for layer in cache.layers)
    model(x, past_key_values=cache)
    assert all(layer.device is None for layer in cache.layers)


def test_what_a_state_cannot_do_is_refused():
    cache = build("large")(text(1, 3)).past_key_values
    for refused in (lambda: cache.crop(-1), cache.activate_past_recording, lambda: cache.layers[0].crop(-1)):
        with pytest.raises(ValueError, match="cannot be shortened; keep cache.fork"):
            refused()
    for refused in (
        lambda: cache.update_recurrent_state(torch.ones(1), 0),
        lambda: cache.update_conv_state(torch.ones(1), 0),
        cache.layers[0].lazy_initialization,
    ):
        with pytest.raises(ValueError, match="replaced as a whole"):
            refused()


@pytest.mark.compile
@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_step_traces_in_one_piece_with_the_cache(kind):
    from torch._dynamo.testing import CompileCounter

    model, x = build(kind), text(2, 8)
    counter = CompileCounter()
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    cache, other = model(x[:, :3]).past_key_values, model(x[:, :3]).past_key_values
    for t in range(3, 8):
        got = compiled(x[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        close(got, model(x[:, t : t + 1], past_key_values=other, use_cache=True).logits)
    assert cache.seen_tokens == 8
    assert counter.frame_count <= 3, "the count of tokens is no constant of the graph"
    assert ox.__version__
