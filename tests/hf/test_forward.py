"""One forward pass: arguments, dtypes, padding and packing, each against the plain run of each row alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from hf.tiny_hf import KINDS, build, forget_warnings, padded, said, text

import openxlstm.hf as oxhf
from openxlstm.hf import inputs

close = torch.testing.assert_close


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_equal_and_a_tuple_holds_what_the_dict_holds(kind):
    model, x = build(kind), text(2, 9)
    first, second = model(x, labels=x, output_hidden_states=True), model(x, labels=x, output_hidden_states=True)
    assert torch.equal(first.logits, second.logits)
    for flat in (model(x, labels=x, output_hidden_states=True, return_dict=False), first.to_tuple()):
        assert torch.equal(flat[0], first.loss)
        assert torch.equal(flat[1], first.logits)
        assert isinstance(flat[2], oxhf.xLSTMCache)
        assert all(torch.equal(a, b) for a, b in zip(flat[3], first.hidden_states, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_the_embedding_every_block_and_the_last_norm(kind):
    model, x = build(kind), text(2, 9)
    out = model(x, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1 == 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(x))
    assert torch.equal(out.hidden_states[-1], model.backbone(x).last_hidden_state)
    assert torch.equal(model(x).logits, out.logits), "asking for them changes nothing"
    assert model(x).hidden_states is None


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_in_place_of_ids(kind):
    model, x = build(kind), text(2, 9)
    embeds = model.get_input_embeddings()(x)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(x).logits)
    for wrong in ({}, {"input_ids": x, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**wrong)
    with pytest.raises(ValueError, match=r"inputs_embeds must be \[batch, time, 24\]"):
        model(inputs_embeds=embeds[..., :5])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(x + 64)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_to_keep_in_all_four_forms(kind):
    model, x = build(kind), text(2, 9)
    whole, rows = model(x).logits, torch.arange(2)[:, None]
    index, positions, chosen = torch.tensor([0, 4]), torch.tensor([[1, 2], [7, 8]]), torch.rand(2, 9) > 0.5
    for keep, want in (
        (0, whole), (1, whole[:, -1:]), (3, whole[:, -3:]), (index, whole[:, index]),
        (positions, whole[rows, positions]), (chosen, whole[chosen]),
    ):  # fmt: skip
        close(model(x, logits_to_keep=keep).logits, want, msg=str(keep))
    with pytest.raises(ValueError, match="leave logits_to_keep at 0"):
        model(x, labels=x, logits_to_keep=2)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_any_length_and_token_by_token(kind, length):
    model, x = build(kind), text(2, length)
    whole, cache, steps = model(x).logits, None, []
    for t in range(length):
        out = model(x[:, t : t + 1], past_key_values=cache)
        cache = out.past_key_values
        steps.append(out.logits)
    close(torch.cat(steps, 1), whole, rtol=1e-4, atol=2e-5)
    assert cache.seen_tokens == cache.get_seq_length() == length


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_with_and_without_a_cache(kind, dtype, use_cache):
    model, x = build(kind), text(2, 9)
    want = model.double()(x).logits
    model.to(dtype)
    out = model(x, use_cache=use_cache)
    assert out.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (out.logits - want).norm() / want.norm()
    assert error < {torch.float64: 1e-14, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    if use_cache:
        assert all(t.dtype == out.logits.dtype for t in out.past_key_values.to_state().tensors())
        model(x[:, :1], past_key_values=out.past_key_values)
    else:
        assert out.past_key_values is None


# --- padding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", "both", "middle"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_is_its_rows_alone(kind, side):
    """Logits, hidden states, loss, and the state that is carried on; the convolution skips a pad in the middle."""
    model = build(kind)
    rows = [text(1, n)[0] for n in (3, 8, 17)]
    ids, mask = padded(rows, side)
    out = model(ids, attention_mask=mask, labels=ids)
    step = model(ids[:, :1] * 0 + 5, past_key_values=out.past_key_values.fork()).logits
    loss, count = 0.0, 0
    for r, row in enumerate(rows):
        alone = model(row[None], labels=row[None])
        close(out.logits[r, mask[r].bool()], alone.logits[0], rtol=1e-4, atol=1e-5)
        more = model(torch.full((1, 1), 5), past_key_values=alone.past_key_values).logits[0]
        close(step[r], more, rtol=1e-4, atol=1e-5)
        pairs = len(row) - 1 if side != "middle" else len(row) - 2
        if side != "middle":
            loss, count = loss + alone.loss * pairs, count + pairs
    assert torch.isfinite(out.logits).all()
    if side != "middle":  # there, the pair across the gap has no prediction in the padded row
        close(out.loss, loss / count)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_at_padding_reaches_nothing(kind):
    model = build(kind)
    ids, mask = padded([text(1, 4)[0], text(1, 9)[0]], "both")
    want = model(ids, attention_mask=mask).logits[mask.bool()]
    assert torch.equal(model(torch.where(mask == 0, -100, ids), attention_mask=mask).logits[mask.bool()], want)
    embeds = model.get_input_embeddings()(ids).masked_fill((mask == 0)[..., None], float("nan"))
    got = model(inputs_embeds=embeds, attention_mask=mask.bool())
    assert torch.equal(got.logits[mask.bool()], want)
    assert torch.isfinite(got.logits).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_masked_token_changes_no_state(kind):
    model, x = build(kind), text(2, 6)
    cache = model(x).past_key_values
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, -1] = 0
    after = model(text(2, 1), attention_mask=mask, past_key_values=cache.fork()).past_key_values.to_state()
    for old, new in zip(cache.to_state().tensors(), after.tensors(), strict=True):
        assert torch.equal(old[1], new[1])
    assert any(not torch.equal(old[0], new[0]) for old, new in zip(cache.to_state().tensors(), after.tensors()))


def test_the_last_columns_of_a_mask_count():
    model, x = build("large"), text(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    whole = model(x, attention_mask=mask).logits
    cache = model(x[:, :5], attention_mask=mask[:, :5]).past_key_values
    close(model(x[:, 5:], attention_mask=mask, past_key_values=cache).logits, whole[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (torch.ones(2, 1, 8, 8), "create_masks_for_generate"),
        (torch.ones(2, 7), r"does not cover this call of 2 x 8"),
        (torch.ones(3, 8), r"does not cover this call of 2 x 8"),
    ],
)
def test_masks_of_another_kind_are_refused(mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        build("large")(text(2, 8), attention_mask=mask)


# --- packing -----------------------------------------------------------------------------------------------------


def packings(lengths: list[int]):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "cu_seq_lens_q": ends.int(),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int(),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }


@pytest.mark.parametrize("how", ["cu_seq_lens_q", "seq_idx", "position_ids"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_separate_documents(kind, how):
    """Logits, the loss, and every gradient; documents of one token and runs of them too."""
    model = build(kind).double()
    lengths = [7, 1, 1, 16, 1, 3]
    documents = [text(1, n) for n in lengths]
    x = torch.cat(documents, dim=1)
    packed = model(x, labels=x, **{how: packings(lengths)[how]})
    packed.loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses = []
    for document, part in zip(documents, packed.logits.split(lengths, dim=1), strict=True):
        alone = model(document, labels=document)
        close(part, alone.logits, rtol=1e-10, atol=1e-10)
        if document.shape[1] > 1:
            losses.append(alone.loss * (document.shape[1] - 1))
    loss = sum(losses) / sum(n - 1 for n in lengths)
    close(packed.loss, loss, rtol=1e-6, atol=1e-6)  # the library's loss is in fp32
    loss.backward()
    for name, parameter in model.named_parameters():
        close(got[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_of_packed_documents_by_their_numbers():
    model, x = build("neurips"), text(2, 10)
    index = torch.tensor([[0] * 4 + [1] * 6, [3] * 9 + [4]])
    got = model(x, seq_idx=index).logits
    for r, cut in ((0, 4), (1, 9)):
        close(got[r, cut:], model(x[r : r + 1, cut:]).logits[0], rtol=1e-4, atol=1e-5)
        close(got[r, :cut], model(x[r : r + 1, :cut]).logits[0], rtol=1e-4, atol=1e-5)


def test_an_empty_document_has_no_start_and_padding_is_many_short_ones():
    model, x = build("large"), text(1, 9)
    want = model(x, cu_seq_lens_q=torch.tensor([0, 4, 9])).logits
    assert torch.equal(model(x, cu_seq_lens_q=torch.tensor([0, 4, 4, 9, 9])).logits, want)
    tail = model(x, cu_seq_lens_q=torch.tensor([0, 4, 5, 6, 7, 8, 9])).logits
    close(tail[:, :4], want[:, :4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        {"position_ids": torch.arange(9)[None] + 100},  # one rising run, wherever it starts
        {"position_ids": torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5, 6]]), "attention_mask": torch.ones(1, 9)},  # a mask
        {"rows": 2, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]] * 2)},  # more than one row
        {"state": True, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]])},  # a text that goes on
    ],
)
def test_position_ids_reset_nothing_where_they_can_mean_something_else(case, caplog):
    forget_warnings()
    model, case = build("large"), dict(case)
    x = text(case.pop("rows", 1), 9)
    cache = model(text(len(x), 4)).past_key_values if case.pop("state", False) else None
    plain = model(x, past_key_values=None if cache is None else cache.fork()).logits
    assert torch.equal(model(x, past_key_values=cache, **case).logits, plain)
    assert ("pass seq_idx" in said(caplog)) == (len(x) > 1)


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 4, 8])}, "rise from 0 to the 9 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 6, 4, 9])}, "rise from 0 to the 9 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 9]), "attention_mask": torch.tensor([[0] + [1] * 8])}, "contradict"),
        ({"seq_idx": torch.zeros(1, 8)}, r"seq_idx must be \[1, 9\]"),
    ],
)
def test_packing_that_cuts_nothing_properly_is_refused(keywords, sentence):
    with pytest.raises(ValueError, match=sentence):
        build("large")(text(1, 9), **keywords)
    with pytest.raises(ValueError, match="one row into documents"):
        build("large")(text(2, 9), cu_seq_lens_q=torch.tensor([0, 9]))


# --- arguments ---------------------------------------------------------------------------------------------------


def test_an_unknown_keyword_is_said_once_with_its_neighbour(caplog):
    forget_warnings()
    model, x = build("large"), text(1, 5)
    for _ in range(2):
        model(x, atention_mask=torch.ones(1, 5), num_items_in_batch=3, max_length_q=4)
    assert said(caplog).count("does not read 'atention_mask'; did you mean 'attention_mask'?") == 1
    assert "num_items" not in said(caplog)
    model(x, output_attentions=True)
    assert "no attentions" in said(caplog)


def test_the_cache_has_two_names():
    model, x = build("large"), text(2, 6)
    out = model(x)
    assert out.cache_params is out.past_key_values
    assert "cache_params" not in out
    want = model(x, past_key_values=out.past_key_values.fork()).logits
    assert torch.equal(model(x, cache_params=out.past_key_values.fork()).logits, want)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(x, cache_params=out.past_key_values, past_key_values=oxhf.xLSTMCache())


def test_foreign_caches_and_states_are_refused():
    model, x = build("large"), text(2, 6)
    with pytest.raises(ValueError, match="must be an openxlstm.hf.xLSTMCache; got DynamicCache"):
        model(x, past_key_values=transformers.DynamicCache())
    for foreign in ([torch.ones(2)], model.native().empty_state(2)):
        with pytest.raises(ValueError, match=r"xLSTMCache.from_state\(state\)"):
            inputs.read_cache(foreign, None)
    cache = model(x).past_key_values
    for wrong, sentence in (
        (cache.to(torch.bfloat16), "must be torch.float32"),
        (oxhf.xLSTMCache.from_state(build("large", heads=2).native().empty_state(2)), "another model's"),
        (build("large", blocks=1)(x).past_key_values, "has 1 blocks, and the model 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(x, past_key_values=wrong)
    with pytest.raises(ValueError, match="this call needs"):
        model(x[:1], past_key_values=cache)


def test_a_failed_call_leaves_the_cache_as_it_was():
    model, x = build("large"), text(2, 6)
    cache = model(x).past_key_values
    before, read = cache.to_state().tensors(), cache.seen_tokens
    handle = model.backbone.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        model(x, past_key_values=cache)
    handle.remove()
    assert all(a is b for a, b in zip(before, cache.to_state().tensors(), strict=True))
    assert cache.seen_tokens == read


def test_heads_read_the_last_token_that_exists():
    model, body = build("large"), None
    config = model.config
    config.num_labels = 3
    classifier = oxhf.xLSTMForSequenceClassification(config).eval()
    body = classifier.backbone
    rows = [text(1, n)[0] for n in (3, 8, 17)]
    want = torch.cat([classifier(row[None]).logits for row in rows])
    close(want[0], classifier.score(body(rows[0][None]).last_hidden_state[0, -1]))
    for side in ("left", "right", "both", "middle"):
        ids, mask = padded(rows, side)
        out = classifier(ids, attention_mask=mask, labels=torch.tensor([0, 2, 1]))
        close(out.logits, want, rtol=1e-4, atol=1e-5)
        close(out.loss, torch.nn.functional.cross_entropy(want, torch.tensor([0, 2, 1])))
    ids, _ = padded(rows, "right")
    close(classifier(ids).logits, want, rtol=1e-4, atol=1e-5)  # by pad_token_id
    config.pad_token_id = None
    with pytest.raises(ValueError, match="where do the 3 sequences end"):
        classifier(ids)


def test_token_classification_scores_every_token():
    config = build("neurips").config
    config.num_labels = 4
    model, x = oxhf.xLSTMForTokenClassification(config).eval(), text(2, 7)
    labels = x % 4
    labels[0, 0] = -100
    out = model(x, labels=labels)
    assert out.logits.shape == (2, 7, 4)
    close(out.loss, torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
