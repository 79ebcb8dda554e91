"""Generation with the real models: one pass over the prompt equals reading token by token, alone equals together."""

import pytest
import torch

from openxlstm.infer.generate import generate, stream
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig

PROMPTS = ["a", "def f(x):", "été 夏", "x" * 70]  # the last is longer than a chunk


@pytest.fixture(params=["xlstm", "xlstm_large"])
def model(request) -> torch.nn.Module:
    """Both architectures, small, in float64, with weights that say something: initialisation is nearly uniform."""
    if request.param == "xlstm":
        made = xLSTM(xLSTMConfig(vocab_size=257, width=32, heads=2, pattern="msm", dropout=0.3))
    else:
        made = xLSTMLarge(xLSTMLargeConfig(vocab_size=257, width=32, heads=2, blocks=2))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made.double()


def test_the_text_equals_reading_everything_again_for_each_token(model, tokenizer) -> None:
    for prompt in PROMPTS[:3]:
        ids = [tokenizer.end_id, *tokenizer.encode(prompt)]
        read = len(ids)
        model.eval()
        for _ in range(12):
            logits, _state = model(torch.tensor([ids]))
            ids.append(int(logits[0, -1].argmax()))
        if tokenizer.end_id in ids[read:]:
            ids = ids[: ids.index(tokenizer.end_id, read) + 1]
        wanted = tokenizer.decode_bytes(ids[read:]).decode(errors="replace").rstrip("\ufffd")
        model.train()
        got = generate(model, tokenizer, prompt, max_tokens=12, temperature=0)
        assert got.rstrip("\ufffd") == wanted


def test_together_equals_alone(model, tokenizer) -> None:
    together = generate(model, tokenizer, PROMPTS, max_tokens=16, temperature=0)
    assert together == [generate(model, tokenizer, prompt, max_tokens=16, temperature=0) for prompt in PROMPTS]
    seeded = generate(model, tokenizer, PROMPTS, max_tokens=16, temperature=0.8, top_p=0.9, seed=5)
    assert generate(model, tokenizer, PROMPTS[:2], max_tokens=16, temperature=0.8, top_p=0.9, seed=5) == seeded[:2]
    assert len(set(seeded)) == len(PROMPTS)


def test_memory_is_constant_and_the_prompt_is_one_pass(model, tokenizer, monkeypatch) -> None:
    lengths, sizes, features = [], [], model.features

    def watched(tokens, state=None, **options):
        lengths.append(tokens.shape[1])
        hidden, state = features(tokens, state, **options)
        sizes.append(state.nbytes)
        return hidden, state

    monkeypatch.setattr(model, "features", watched)
    "".join(stream(model, tokenizer, "y" * 90, max_tokens=6, temperature=0.8, seed=1, stop=()))
    assert lengths[0] == 91
    assert set(lengths[1:]) == {1}
    assert len(set(sizes)) == 1


def test_a_long_prompt_is_read_in_pieces(model, tokenizer, monkeypatch) -> None:
    """As in one piece, for prompts of different lengths too: padding may be whole pieces long."""
    prompts = ["a", "b" * 30, "def f(x):\n    return x" * 4]
    whole = generate(model, tokenizer, prompts, max_tokens=8, temperature=0)
    lengths, features = [], model.features

    def watched(tokens, state=None, **options):
        lengths.append(tokens.shape[1])
        return features(tokens, state, **options)

    monkeypatch.setattr(model, "features", watched)
    monkeypatch.setattr("openxlstm.infer.generate.PIECE", 16)
    assert generate(model, tokenizer, prompts, max_tokens=8, temperature=0) == whole
    assert max(lengths) == 16


def test_a_model_can_train_after_it_has_spoken(model, tokenizer) -> None:
    model.train()
    generate(model, tokenizer, "abc", max_tokens=3)
    logits, _state = model(torch.randint(257, (2, 9)))
    logits.logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
