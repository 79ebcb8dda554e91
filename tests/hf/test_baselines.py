"""A baseline obeys the contract of our models: what follows is what `interface` promises."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from openxlstm.hf.baselines import Llama, LlamaConfig
from openxlstm.models.accounting import count_parameters, flops_per_token


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(3)
    built = Llama(LlamaConfig(vocab_size=31, width=24, blocks=2, heads=3, kv_heads=1, ffn_width=40)).double()
    for weight in built.parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    return built.eval()


def test_packed_documents_are_separate_documents(model: Llama) -> None:
    first, second = torch.randint(31, (1, 7)), torch.randint(31, (1, 9))
    reset = torch.zeros(1, 16, dtype=torch.bool)
    reset[0, 0] = reset[0, 7] = True
    packed, _ = model(torch.cat([first, second], 1), reset=reset)
    alone = torch.cat([model(first)[0], model(second)[0]], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)
    leaking, _ = model(torch.cat([first, second], 1))
    assert (leaking[:, 7:] - alone[:, 7:]).abs().max() > 1e-3


def test_gradients_of_packed_documents_are_those_of_separate_ones(model: Llama) -> None:
    first, second = torch.randint(31, (1, 7)), torch.randint(31, (1, 9))
    reset = torch.zeros(1, 16, dtype=torch.bool)
    reset[0, 7] = True
    weights = list(model.parameters())
    packed = torch.autograd.grad(model(torch.cat([first, second], 1), reset=reset)[0].square().sum(), weights)
    alone = torch.autograd.grad(model(first)[0].square().sum() + model(second)[0].square().sum(), weights)
    for got, want in zip(packed, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(model: Llama, side: str) -> None:
    tokens = torch.randint(31, (2, 8))
    gap = {"left": 0, "right": 8, "middle": 3}[side]
    padding = torch.full((2, 4), 7)
    padded = torch.cat([tokens[:, :gap], padding, tokens[:, gap:]], 1)
    mask = torch.cat([torch.ones(2, gap), torch.zeros(2, 4), torch.ones(2, 8 - gap)], 1).bool()
    got, _ = model(padded, mask=mask)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[mask].view(2, 8, -1), model(tokens)[0], rtol=0, atol=1e-10)


def test_a_state_goes_on_where_it_stopped(model: Llama) -> None:
    tokens = torch.randint(31, (2, 12))
    whole, _ = model(tokens)
    start, state = model(tokens[:, :5], model.empty_state(2))
    rest, _ = model(tokens[:, 5:], state)
    torch.testing.assert_close(torch.cat([start, rest], 1), whole, rtol=0, atol=1e-10)


def test_it_is_causal(model: Llama) -> None:
    tokens = torch.randint(31, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (tokens[0, 8] + 1) % 31
    assert torch.equal(model(tokens)[0][:, :8], model(changed)[0][:, :8])


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_counted_as_it_is(tied: bool) -> None:
    config = LlamaConfig(vocab_size=31, width=24, blocks=2, heads=3, kv_heads=1, ffn_width=40, tie_embeddings=tied)
    built = Llama(config)
    assert count_parameters(config) == sum(weight.numel() for weight in built.parameters())
    matrices = sum(
        w.numel() for n, w in built.named_parameters() if w.ndim > 1 and "embed" not in n and "head" not in n
    )
    assert flops_per_token(config) == 2 * (matrices + 31 * 24)
    assert sum(len(group["params"]) for group in built.parameter_groups(0.1)) == len(list(built.parameters()))
    assert LlamaConfig.from_dict(config.to_dict()) == LlamaConfig.from_dict(
        LlamaConfig.from_dict(config.to_dict()).to_dict()
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"heads": 5}, "heads"),
        ({"kv_heads": 2}, "kv_heads=2 must divide heads=3"),
        ({"width": 27, "heads": 3}, "even head width"),
        ({"blocks": 0}, "blocks=0 must be at least 1"),
        ({"witdh": 3}, "width"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields: dict[str, int], sentence: str) -> None:
    good = {"vocab_size": 31, "width": 24, "blocks": 2, "heads": 3, "ffn_width": 40}
    with pytest.raises(ValueError, match=sentence):
        LlamaConfig.from_dict(good | fields)
