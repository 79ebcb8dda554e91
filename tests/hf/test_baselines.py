"""A baseline obeys the contract of our models: what follows is what `interface` promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from openxlstm.hf.baselines import Llama, LlamaConfig
from openxlstm.hf.recurrent_baselines import RWKV4, Mamba2, Mamba2Config, RWKV4Config
from openxlstm.models.accounting import count_parameters, flops_per_token
from openxlstm.tasks.scoring import token_nats
from openxlstm.train.recipe import COMPARED, architecture

SMALL: dict[str, dict[str, Any]] = {
    "llama": {"width": 24, "blocks": 2, "heads": 3, "kv_heads": 1, "ffn_width": 40},
    "mamba2": {"width": 20, "blocks": 2, "heads": 8, "groups": 2, "state": 6, "conv": 3},
    "rwkv4": {"width": 20, "blocks": 2, "ffn_width": 36},
}
CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, Llama),
    "mamba2": (Mamba2Config, Mamba2),
    "rwkv4": (RWKV4Config, RWKV4),
}
CLOSE = {"llama": 1e-10, "mamba2": 1e-4, "rwkv4": 1e-10}  # Mamba-2 computes in fp32 whatever the weights are


@pytest.fixture(params=SMALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> Any:
    torch.manual_seed(3)
    config, build = CLASSES[name]
    built = build(config(vocab_size=31, **SMALL[name]))
    for key, weight in built.named_parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 and key.endswith("weight") else None
    return built.eval() if name == "mamba2" else built.double().eval()


def test_packed_documents_are_separate_documents(model: Any, name: str) -> None:
    first, second = torch.randint(31, (1, 7)), torch.randint(31, (1, 9))
    reset = torch.zeros(1, 16, dtype=torch.bool)
    reset[0, 0] = reset[0, 7] = True
    packed, _ = model(torch.cat([first, second], 1), reset=reset)
    alone = torch.cat([model(first)[0], model(second)[0]], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=CLOSE[name])
    leaking, _ = model(torch.cat([first, second], 1))
    assert (leaking[:, 7:] - alone[:, 7:]).abs().max() > 1e-2


def test_gradients_of_packed_documents_are_those_of_separate_ones(model: Any, name: str) -> None:
    first, second = torch.randint(31, (1, 7)), torch.randint(31, (1, 9))
    reset = torch.zeros(1, 16, dtype=torch.bool)
    reset[0, 7] = True
    weights = list(model.parameters())
    packed = torch.autograd.grad(model(torch.cat([first, second], 1), reset=reset)[0].square().mean(), weights)
    alone = torch.autograd.grad((model(first)[0].square().sum() + model(second)[0].square().sum()) / (16 * 31), weights)
    for got, want in zip(packed, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=CLOSE[name], atol=CLOSE[name])
    assert all(gradient.abs().max() > 0 for gradient in packed)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(model: Any, name: str, side: str) -> None:
    tokens = torch.randint(31, (2, 8))
    gap = {"left": 0, "right": 8, "middle": 3}[side]
    padding = torch.full((2, 4), 7)
    padded = torch.cat([tokens[:, :gap], padding, tokens[:, gap:]], 1)
    mask = torch.cat([torch.ones(2, gap), torch.zeros(2, 4), torch.ones(2, 8 - gap)], 1).bool()
    got, _ = model(padded, mask=mask)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[mask].view(2, 8, -1), model(tokens)[0], rtol=0, atol=CLOSE[name])


def test_a_state_goes_on_where_it_stopped(model: Any, name: str) -> None:
    tokens = torch.randint(31, (2, 12))
    whole, _ = model(tokens)
    start, state = model(tokens[:, :5], model.empty_state(2))
    rest, state = model(tokens[:, 5:], state)
    nothing, _ = model(tokens[:, :0], state)
    assert nothing.shape == (2, 0, 31)
    torch.testing.assert_close(torch.cat([start, rest], 1), whole, rtol=0, atol=CLOSE[name])


def test_where_nothing_exists_nothing_is_said(model: Any) -> None:
    logits, _ = model(torch.full((2, 5), 7), mask=torch.zeros(2, 5, dtype=torch.bool))
    assert torch.isfinite(logits).all()
    assert model(torch.zeros(2, 0, dtype=torch.long))[0].shape == (2, 0, 31)


def test_the_scorer_takes_it(model: Any, name: str) -> None:
    """Rows of different lengths, piece by piece, with the state between the pieces."""
    rows = [list(range(n)) for n in (2, 9, 5)]
    for row, nats in zip(rows, token_nats(model, rows, chunk=4), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([row]))[0][0].log_softmax(-1)
        want = -logprobs[range(len(row) - 1), row[1:]].double()
        torch.testing.assert_close(torch.tensor(nats), want, rtol=0, atol=CLOSE[name])


def test_it_trains_under_autocast(model: Any) -> None:
    model.float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = model(torch.randint(31, (2, 9)))
    assert logits.dtype == torch.float32
    logits.square().mean().backward()
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in model.parameters())


def test_it_is_causal(model: Any) -> None:
    tokens = torch.randint(31, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (tokens[0, 8] + 1) % 31
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :8], after[:, :8])
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 1e-3


def test_recomputed_activations_give_the_same_gradients(model: Any, name: str) -> None:
    tokens = torch.randint(31, (2, 9))
    reads = [0, 0]
    for index, layer in enumerate(model.layers()):
        norm = next(layer.children())
        norm.register_forward_pre_hook(lambda *_, index=index: reads.__setitem__(index, reads[index] + 1))
    model.train()
    plain = torch.autograd.grad(model(tokens)[0].square().mean(), list(model.parameters()))
    for every, times in ((1, [2, 2]), (2, [2, 1]), (0, [1, 1])):
        reads[:] = 0, 0
        model.checkpoint_every = every
        assert model.checkpoint_every == every
        again = torch.autograd.grad(model(tokens)[0].square().mean(), list(model.parameters()))
        assert reads == times
        for got, want in zip(again, plain, strict=True):
            torch.testing.assert_close(got, want, rtol=CLOSE[name], atol=CLOSE[name])


def test_evaluation_leaves_the_weights_alone(model: Any) -> None:
    """RWKV-4 of transformers divides weights on its way from training to evaluation, unless it is told not to."""
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    for training in (True, False, True):
        model.train(training)(torch.randint(31, (1, 3)))
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_counted_as_it_is(name: str, tied: bool) -> None:
    config_class, build = CLASSES[name]
    config = config_class(vocab_size=31, **SMALL[name], tie_embeddings=tied)
    built = build(config)
    assert count_parameters(config) == sum(weight.numel() for weight in built.parameters())
    matrices = sum(
        weight.numel()
        for key, weight in built.named_parameters()
        if weight.ndim > 1 and key.endswith("weight") and "embed" not in key and "head" not in key
    )
    scan = 2 * 4 * 40 * 6 if name == "mamba2" else 0  # two blocks write and read a state of 40 by 6
    assert flops_per_token(config) == 2 * (matrices + 31 * config.width) + scan
    groups = built.parameter_groups(0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(built.parameters()))
    decayed = {id(weight) for weight in groups[0]["params"]}
    free = {key for key, weight in built.named_parameters() if id(weight) not in decayed}
    assert any("embed" in key for key in free)
    assert all("embed" in key or "norm" in key or "ln" in key or "." in key for key in free)
    assert len(built.units()) == config.blocks
    assert all(unit.rounded for unit in built.units())
    assert config_class.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert config.label.endswith(", 2 blocks")


def test_weight_decay_leaves_mixtures_and_vectors_alone() -> None:
    """RWKV-4 keeps its mixtures as [1, 1, D]: matrices by shape, vectors by meaning."""
    built = RWKV4(RWKV4Config(vocab_size=31, **SMALL["rwkv4"]))
    decayed = {id(weight) for weight in built.parameter_groups(0.1)[0]["params"]}
    chosen = {key.split(".")[-2] for key, weight in built.named_parameters() if id(weight) in decayed}
    assert chosen == {"key", "value", "receptance", "output", "head"}


def test_the_trainer_knows_them() -> None:
    for name, classes in CLASSES.items():
        assert name in COMPARED
        assert architecture(name) == classes


def test_files_are_those_of_transformers(name: str, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    config, build = CLASSES[name]
    built = build(config(vocab_size=31, **SMALL[name])).eval()
    built.save(tmp_path)
    other = build(built.config).eval()
    other.restore(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(31, (2, 6))
    torch.testing.assert_close(theirs(tokens, use_cache=False).logits, built(tokens)[0], rtol=0, atol=1e-6)
    assert torch.equal(other(tokens)[0], built(tokens)[0])


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("llama", {"heads": 5}, "heads"),
        ("llama", {"kv_heads": 2}, "kv_heads=2 must divide heads=3"),
        ("llama", {"width": 27, "heads": 3}, "even head width"),
        ("llama", {"blocks": 0}, "blocks=0 must be at least 1"),
        ("llama", {"witdh": 3}, "width"),
        ("mamba2", {"heads": 3}, "expand . width=40 must be a multiple of heads=3; nearest below is 39"),
        ("mamba2", {"groups": 3}, "heads=8 must be a multiple of groups=3"),
        ("mamba2", {"state": 0}, "state=0 must be at least 1"),
        ("rwkv4", {"blocks": 1}, "blocks=1 must be at least 2"),
        ("rwkv4", {"heads": 2}, "no field 'heads'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(name: str, fields: dict[str, int], sentence: str) -> None:
    good = {"vocab_size": 31, **SMALL[name]} | ({"kv_heads": None} if name == "llama" else {})
    with pytest.raises(ValueError, match=sentence):
        CLASSES[name][0].from_dict(good | fields)
