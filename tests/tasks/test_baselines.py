"""LSTM baselines obey the contract of our models, and sizes are matched as the comparison asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openxlstm.cells import State
from openxlstm.models.accounting import count_parameters, flops_per_token, state_bytes
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.tasks.baselines import (
    LSTM,
    LSTMBlockConfig,
    LSTMConfig,
)
from openxlstm.tasks.matching import match, non_embedding_parameters
from openxlstm.train.recipe import COMPARED, architecture

CONFIGS = {
    "lstm": LSTMConfig(vocab_size=31, width=7, blocks=2),
    "lstm_block": LSTMBlockConfig(vocab_size=31, width=7, blocks=2, ffn_width=11),
    "residual": LSTMBlockConfig(vocab_size=31, width=7, blocks=3, ffn_width=0, tie_embeddings=True),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> LSTM:
    torch.manual_seed(3)
    built = LSTM(CONFIGS[request.param])
    for weight in built.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return built.double().eval()


def close(got: Any, want: Any) -> None:
    if isinstance(got, State):
        for (name, one), other in zip(got.named_tensors(), want.tensors(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_flags_are_those_of_a_loop_over_tokens(model: LSTM) -> None:
    """Any reset, any hole, with a state: the same as token by token, where both are decided by hand."""
    B, T = 3, 13
    tokens, reset, mask = torch.randint(31, (B, T)), torch.rand(B, T) < 0.25, torch.rand(B, T) < 0.7
    reset[2], mask[2] = False, False  # a row that stays as it was
    reset[1, -1], mask[1, -1] = True, False  # a masked reset at the end still empties the state
    _, start = model(torch.randint(31, (B, 4)))
    got, after = model(torch.where(mask, tokens, 99), start, reset=reset, mask=mask)
    assert torch.isfinite(got).all()
    for b in range(B):
        state = start.select(torch.tensor([b]))
        for t in range(T):
            state = model.empty_state(1) if reset[b, t] else state
            if mask[b, t]:
                logits, state = model(tokens[b : b + 1, t : t + 1], state)
                close(got[b, t], logits[0, 0])
        close(after.select(torch.tensor([b])), state)


def test_gradients_of_packed_documents_are_those_of_separate_ones(model: LSTM) -> None:
    first, second = torch.randint(31, (1, 7)), torch.randint(31, (1, 9))
    reset = torch.zeros(1, 16, dtype=torch.bool)
    reset[0, 7] = True
    weights = list(model.parameters())
    for every in (0, 1):
        model.checkpoint_every = every
        packed = torch.autograd.grad(model(torch.cat([first, second], 1), reset=reset)[0].square().mean(), weights)
        total = model(first)[0].square().sum() + model(second)[0].square().sum()
        for got, want in zip(packed, torch.autograd.grad(total / (16 * 31), weights), strict=True):
            close(got, want)
            assert got.abs().max() > 0


def test_gradients_reach_a_state(model: LSTM) -> None:
    tokens = torch.randint(31, (2, 5))
    leaves = [tensor.requires_grad_() for tensor in model.empty_state(2).tensors()]
    parts = iter(leaves)
    state = model.empty_state(2).map(lambda _: next(parts))
    gradients = torch.autograd.grad(model(tokens, state)[0].square().mean(), leaves)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("cut", [0, 1, 5, 12])
def test_a_prefix_and_its_state_are_the_whole(model: LSTM, cut: int) -> None:
    tokens = torch.randint(31, (2, 12))
    whole, last = model(tokens)
    start, state = model(tokens[:, :cut])
    before = state.clone()
    rest, after = model(tokens[:, cut:], state)
    close(torch.cat([start, rest], 1), whole)
    close(after, last)
    close(state, before)


def test_it_is_causal(model: LSTM) -> None:
    tokens = torch.randint(31, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (tokens[0, 8] + 1) % 31
    assert torch.equal(model(tokens)[0][:, :8], model(changed)[0][:, :8])


def test_the_layers_are_nn_lstm() -> None:
    """Two layers of ours are nn.LSTM(num_layers=2) with the same weights."""
    model = LSTM(CONFIGS["lstm"]).eval()
    theirs = torch.nn.LSTM(7, 7, num_layers=2, batch_first=True)
    for index, block in enumerate(model.stack.blocks):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(theirs, f"{name}_l{index}").data.copy_(getattr(block.lstm, f"{name}_l0"))
    tokens = torch.randint(31, (2, 9))
    got, state = model.features(tokens)
    want, (h, c) = theirs(model.embedding(tokens))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.stack([block.h for block in state.blocks]), h)
    torch.testing.assert_close(torch.stack([block.c for block in state.blocks]), c)


def test_autocast_leaves_the_cell_in_fp32() -> None:
    model = LSTM(CONFIGS["lstm_block"]).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = model(torch.randint(31, (2, 5)), mask=torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    assert logits.dtype == torch.float32
    assert {tensor.dtype for tensor in state.tensors()} == {torch.float32}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_counted_as_it_is(name: str) -> None:
    config = CONFIGS[name]
    built = LSTM(config)
    assert count_parameters(config) == sum(weight.numel() for weight in built.parameters())
    matrices = sum(w.numel() for n, w in built.named_parameters() if w.ndim > 1 and n.startswith("stack"))
    assert flops_per_token(config) == 2 * (matrices + 31 * 7)
    assert state_bytes(config, 3) == built.empty_state(3).nbytes
    assert sum(len(group["params"]) for group in built.parameter_groups(0.1)) == len(list(built.parameters()))
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert len(built.units()) == config.blocks
    assert (
        built.stack.blocks[0]
        .state_dict()[next(k for k in built.stack.blocks[0].state_dict() if "bias_ih" in k)][7:14]
        .tolist()
        == [1.0] * 7
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_files_bring_it_back(name: str, tmp_path: Any) -> None:
    built = LSTM(CONFIGS[name]).eval()
    built.save(tmp_path / "model")
    tokens = torch.randint(31, (2, 6))
    other = LSTM(CONFIGS[name]).eval()
    other.restore(tmp_path / "model")
    assert torch.equal(other(tokens)[0], built(tokens)[0])


def test_the_trainer_knows_them() -> None:
    for name, config in (("lstm", LSTMConfig), ("lstm_block", LSTMBlockConfig)):
        assert name in COMPARED
        assert architecture(name) == (config, LSTM)


def test_sizes_are_matched_within_two_percent() -> None:
    ours = xLSTMConfig(vocab_size=257, width=64, heads=4, pattern="ms")
    target = non_embedding_parameters(ours)
    stack = xLSTM(ours).stack
    assert target == sum(weight.numel() for weight in stack.parameters())
    wide = match(lambda D: LSTMConfig(vocab_size=257, width=D, blocks=2), target, range(8, 256))
    deep = match(lambda U: LSTMBlockConfig(vocab_size=257, width=48, blocks=2, ffn_width=U), target, range(1, 400))
    for config in (wide, deep):
        assert abs(non_embedding_parameters(config) / target - 1) < 0.02
    with pytest.raises(ValueError, match=r"no size comes within 2% of .* the nearest is 20 with"):
        match(lambda D: LSTMConfig(vocab_size=257, width=D, blocks=2), target, [8, 20])
    with pytest.raises(ValueError, match="no size to choose from: LSTMConfig: blocks=0"):
        match(lambda D: LSTMConfig(vocab_size=257, width=D, blocks=0), target, [8, 20])


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        (LSTMConfig, {"blocks": 0}, "blocks=0 must be at least 1"),
        (LSTMConfig, {"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        (LSTMConfig, {"heads": 2}, "no field 'heads'"),
        (LSTMBlockConfig, {"ffn_width": -1}, "ffn_width=-1 must be at least 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(kind: Any, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        kind.from_dict({"vocab_size": 31, "width": 7, "blocks": 2} | fields)


def test_a_state_of_another_model_is_refused() -> None:
    model = LSTM(CONFIGS["lstm"])
    with pytest.raises(ValueError, match="has shape"):
        model(torch.zeros(2, 3, dtype=torch.long), model.empty_state(3))
