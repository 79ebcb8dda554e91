"""generate(): every mode, from nothing and from a state, padded and not; tokens are compared, not logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hf.tiny_hf import GREEDY, KINDS, PAD, build, padded, text

from openxlstm.hf import xLSTMCache

SAMPLE: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "pad_token_id": PAD, "top_k": 0, "temperature": 1.3}


def seeded(model, *args, **kwargs):
    torch.manual_seed(7)
    return model.generate(*args, **kwargs)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize(
    "mode",
    [GREEDY, SAMPLE, GREEDY | {"num_beams": 3}, SAMPLE | {"num_beams": 3}],
    ids=["greedy", "sample", "beam", "both"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_with_and_without_a_cache(kind, mode, as_dict):
    model, x = build(kind), text(2, 9)
    keywords = mode | {"return_dict_in_generate": as_dict, "output_scores": as_dict, "output_hidden_states": as_dict}
    with_cache, without = (seeded(model, x, use_cache=use, **keywords) for use in (True, False))
    if as_dict:
        assert len(with_cache.scores) == 5
        torch.testing.assert_close(with_cache.scores[-1], without.scores[-1], rtol=1e-4, atol=1e-4)
        assert isinstance(with_cache.past_key_values, xLSTMCache)
        assert len(with_cache.hidden_states[0]) == 3
        with_cache, without = with_cache.sequences, without.sequences
    assert torch.equal(with_cache, without)
    assert with_cache.shape == (2, 14)


def test_greedy_is_the_argmax_of_the_whole_text_each_time():
    model, x = build("neurips"), text(2, 9)
    want = x
    for _ in range(5):
        want = torch.cat((want, model(want).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(x, **GREEDY), want)


@pytest.mark.parametrize("mode", [GREEDY, GREEDY | {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("side", ["left", "both", "middle"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_says_what_each_prompt_says_alone(kind, side, mode):
    model = build(kind)
    rows = [text(1, n)[0] for n in (2, 5, 11)]
    ids, mask = padded(rows, side)
    if side == "both":  # the library goes on behind the last column, so the last columns must exist
        ids, mask = padded([torch.cat((row, row[:1])) for row in rows], "left")
        ids[:, -1], mask[:, -1] = PAD, 0
        ids, mask = torch.cat((ids, ids[:, -2:-1] * 0 + 9), 1), torch.cat((mask, mask[:, -1:] * 0 + 1), 1)
    got = model.generate(ids, attention_mask=mask, **mode)[:, ids.shape[1] :]
    chunked = model.generate(ids, attention_mask=mask, prefill_chunk_size=3, **mode)[:, ids.shape[1] :]
    assert torch.equal(got, chunked)
    for r in range(3):
        row = ids[r][mask[r].bool()][None]
        assert torch.equal(got[r : r + 1], model.generate(row, **mode)[:, row.shape[1] :])


@pytest.mark.parametrize("size", [1, 4, 9, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_chunks(kind, size):
    model, x = build(kind), text(2, 9)
    assert torch.equal(model.generate(x, prefill_chunk_size=size, **GREEDY), model.generate(x, **GREEDY))


@pytest.mark.parametrize("kind", KINDS)
def test_several_sequences_of_one_prompt(kind):
    model, x = build(kind), text(2, 9)
    many = seeded(model, x, num_return_sequences=3, **SAMPLE)
    assert many.shape == (6, 14)
    assert len({tuple(row.tolist()) for row in many[:3]}) > 1
    beams = model.generate(x, num_beams=3, num_return_sequences=3, **GREEDY)
    assert torch.equal(beams, model.generate(x, num_beams=3, num_return_sequences=3, use_cache=False, **GREEDY))


def test_from_embeddings_and_from_nothing():
    model, x = build("large"), text(2, 9)
    embeds = model.get_input_embeddings()(x)
    want = model.generate(x, **GREEDY)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), want[:, 9:])
    assert torch.equal(model.generate(x, inputs_embeds=embeds, **GREEDY), want)
    assert model.generate(**GREEDY).shape == (1, 6), "from the token that begins a text"


@pytest.mark.parametrize("mode", [GREEDY, GREEDY | {"num_beams": 2}], ids=["greedy", "beam"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_goes_on_from_its_state_in_every_form(kind, mode):
    model, x, new = build(kind), text(2, 9), text(2, 3)
    out = model.generate(x, return_dict_in_generate=True, **GREEDY)
    cache = out.past_key_values
    assert cache.seen_tokens == 13, "all but the token that was sampled last"
    whole = torch.cat((out.sequences, new), 1)
    want = model.generate(whole, **mode)
    rest = whole[:, 13:]
    ones = torch.ones_like(whole)
    for name, got in {
        "the whole text": model.generate(whole, past_key_values=cache.fork(), **mode),
        "the whole text and a mask": model.generate(whole, attention_mask=ones, past_key_values=cache.fork(), **mode),
        "in chunks": model.generate(whole, past_key_values=cache.fork(), prefill_chunk_size=2, **mode),
        "the in-tree name": model.generate(whole, cache_params=cache.fork(), **mode),
    }.items():
        assert torch.equal(got, want), name
    for name, got in {
        "new tokens and a mask of all": model.generate(rest, attention_mask=ones, past_key_values=cache.fork(), **mode),
        "new tokens, prefix detached": model.generate(rest, past_key_values=cache.detach_prefix(), **mode),
        "a state of ours": model.generate(rest, past_key_values=xLSTMCache.from_state(cache.to_state()), **mode),
    }.items():
        assert torch.equal(got[:, 4:], want[:, 17:]), name
    assert torch.equal(model.generate(whole, past_key_values=cache.fork(), **mode), want), "the original is still valid"


def test_generate_consumes_the_cache_it_is_given():
    model, x = build("large"), text(2, 9)
    cache = xLSTMCache()
    first = model.generate(x, past_key_values=cache, **GREEDY)
    assert cache.seen_tokens == 13
    again = model.generate(first, past_key_values=cache, **GREEDY)
    assert torch.equal(again, model.generate(x, **GREEDY | {"max_new_tokens": 10}))


def test_a_state_of_one_row_serves_a_batch_of_continuations():
    model, prefix, questions = build("neurips"), text(1, 9), text(3, 4)
    cache = model(prefix).past_key_values.detach_prefix()
    got = model.generate(questions, past_key_values=cache, **GREEDY)
    want = model.generate(torch.cat((prefix.expand(3, -1), questions), 1), **GREEDY)
    assert torch.equal(got[:, 4:], want[:, 13:])
    with pytest.raises(ValueError, match="has 2 rows, and 3 prompts x 1 beams"):
        model.generate(questions, past_key_values=model(text(2, 5)).past_key_values.detach_prefix(), **GREEDY)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_ended_reads_no_padding(kind):
    """A batch chat goes on exactly, though its rows ended at different times."""
    model, x = build(kind), text(3, 9)
    free = model.generate(x, **GREEDY)
    eos = int(free[0, 10])  # row 0 ends after two new tokens
    out = model.generate(x, return_dict_in_generate=True, eos_token_id=eos, **GREEDY)
    said = out.sequences
    ended = (said[:, 9:] == eos).cumsum(1) - (said[:, 9:] == eos).long() > 0
    assert ended.any(), "a row ended early"
    assert not ended.all(0).any(), "and another did not"
    new = text(3, 4)
    ids = torch.cat((said, new), 1)
    mask = torch.ones_like(ids)
    mask[:, 9 : said.shape[1]][ended] = 0
    got = model.generate(ids, attention_mask=mask, past_key_values=out.past_key_values, **GREEDY)[:, ids.shape[1] :]
    for r in range(3):
        row = ids[r][mask[r].bool()][None]
        assert torch.equal(got[r : r + 1], model.generate(row, **GREEDY)[:, row.shape[1] :])


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"prompt_lookup_num_tokens": 2}, "a recurrent state cannot forget"),
        ({"cache_implementation": "static"}, "one size whatever the length"),
        ({"cache_implementation": "quantized"}, "one size whatever the length"),
        ({"cache_implementation": "offloaded"}, "one size whatever the length"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"past_key_values": transformers.DynamicCache()}, "must be an openxlstm.hf.xLSTMCache"),
        ({"past_key_values": xLSTMCache(), "use_cache": False}, "use_cache=False"),
    ],
)
def test_what_a_state_cannot_do_is_refused_in_our_words(keywords, sentence):
    with pytest.raises(ValueError, match=sentence):
        build("large").generate(text(1, 9), **GREEDY, **keywords)


def test_an_assistant_is_refused_and_so_is_batching_by_pages():
    model = build("large")
    with pytest.raises(ValueError, match="a recurrent state cannot forget"):
        model.generate(text(1, 9), assistant_model=build("large"), **GREEDY)
    for refused in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(ValueError, match="openxlstm.generate"):
            refused([[3, 4]])
    assert torch.equal(
        model.generate(x := text(1, 9), cache_implementation="dynamic", **GREEDY), model.generate(x, **GREEDY)
    )


@pytest.mark.parametrize("chunk", [None, 2])
def test_ids_that_do_not_follow_the_state_are_refused_with_both_remedies(chunk):
    model, x = build("large"), text(2, 9)
    cache = model(x).past_key_values
    keywords = GREEDY | ({} if chunk is None else {"prefill_chunk_size": chunk})
    for ids in (text(2, 3), x):
        with pytest.raises(
            ValueError, match=r"has read 9 tokens .*nothing new is left; pass the whole text.*detach_prefix"
        ):
            model.generate(ids, past_key_values=cache.fork(), **keywords)
    other = torch.cat((x, text(2, 3)), 1)
    other[1, 4] = (other[1, 4] + 1) % 60 + 3
    with pytest.raises(ValueError, match=r"input_ids\[1, 4\] is .*has read .*detach_prefix"):
        model.generate(other, past_key_values=cache.fork(), **keywords)


def test_a_streamer_and_stopping_work():
    model, x = build("large"), text(1, 9)
    streamed: list[int] = []

    class Streamer(transformers.generation.BaseStreamer):
        def put(self, value):
            streamed.extend(value.flatten().tolist())

        def end(self):
            streamed.append(-1)

    got = model.generate(x, streamer=Streamer(), **GREEDY)
    assert streamed == [*got[0].tolist(), -1]
    stop = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(11)])
    assert model.generate(x, stopping_criteria=stop, **GREEDY).shape == (1, 11)
