"""Training through transformers' arguments: the default call, checkpointing, half precision, the loss."""

from __future__ import annotations

import pytest
import torch
from hf.tiny_hf import KINDS, build, text

close = torch.testing.assert_close


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_call_trains_and_gives_no_cache(kind):
    model, x = build(kind).train(), text(2, 9)
    out = model(x, labels=x)
    assert out.past_key_values is None
    got = gradients(model, out.loss)
    assert all(torch.isfinite(g).all() for g in got.values())
    model.eval()
    want = gradients(model, model(x, labels=x).loss)
    for name in want:
        close(got[name], want[name], msg=f"{name}: gradients do not depend on train or eval")
    model.config.use_cache = False
    assert model(x).past_key_values is None
    assert model(x, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_equal_gradients_for_one_more_call_per_block(kind, reentrant):
    model, x = build(kind).train(), text(2, 9)
    want = gradients(model, model(x, labels=x).loss)
    calls = []
    for block in model.backbone.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    out = model(x, labels=x)
    assert len(calls) == 2
    assert out.past_key_values is None
    got = gradients(model, out.loss)
    assert len(calls) == 4
    for name in want:
        close(got[name], want[name], msg=name)
    model.activation_checkpointing_disable()
    gradients(model, model(x, labels=x).loss)
    assert len(calls) == 6


def test_every_second_block_is_recomputed_if_asked():
    model, x, calls = build("large", blocks=4).train(), text(1, 5), []
    for block in model.backbone.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable(every_n_layers=2)
    gradients(model, model(x, labels=x).loss)
    assert len(calls) == 4 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_a_given_state_and_its_gradient(kind):
    """The library's own layer would drop the state here and train on something else."""
    model, x = build(kind).train().double(), text(2, 12)
    want = gradients(model, model(x).logits[:, 6:].square().sum())
    model.activation_checkpointing_enable()
    cache = model(x[:, :6], use_cache=True).past_key_values
    got = gradients(model, model(x[:, 6:], past_key_values=cache, use_cache=True).logits.square().sum())
    for name in want:
        close(got[name], want[name], rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_trains(kind, dtype):
    model, x = build(kind).train(), text(2, 17)
    want = gradients(model, model(x, labels=x).loss)
    with torch.autocast("cpu", dtype):
        auto = gradients(model, model(x, labels=x).loss)
    pure = gradients(model.to(dtype), model(x, labels=x).loss)
    for got in (auto, pure):
        for name in want:
            assert torch.isfinite(got[name]).all(), name
        whole = torch.cat([g.flatten().float() for g in got.values()])
        exact = torch.cat([g.flatten() for g in want.values()])
        assert torch.cosine_similarity(whole, exact, dim=0) > 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_shifted_mean_and_accumulates_exactly(kind):
    model, x = build(kind), text(4, 9)
    labels = x.clone()
    labels[:, :3], labels[2, 5:] = -100, -100
    logits = model(x).logits
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(model(x, labels=labels).loss, want)
    count = int((labels[:, 1:] != -100).sum())
    parts = [model(x[r : r + 2], labels=labels[r : r + 2], num_items_in_batch=count).loss for r in (0, 2)]
    close(sum(parts), want)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    close(model(x, labels=labels, shift_labels=shifted).loss, want)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_tokens_are_learnt_by_heart(kind):
    model, x = build(kind).train(), text(1, 8)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(x, labels=x).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.1
    assert torch.equal(model.eval().generate(x[:, :1], max_new_tokens=7, do_sample=False, pad_token_id=1), x)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_embeddings_given(kind):
    model, x = build(kind), text(2, 9)
    got = gradients(model, model(x, labels=x).loss)
    assert all(g.abs().sum() > 0 for g in got.values())
    embeds = model.get_input_embeddings()(x).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=x).loss.backward()
    assert (embeds.grad.abs().sum(-1) > 0)[:, :-1].all()
