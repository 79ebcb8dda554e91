"""Generation, with models whose every prediction can be computed by hand."""

import pytest
import torch
from infer.tiny_models import Recurrent, Scripted

from openxlstm.infer.generate import Piece, generate, pieces, stream
from openxlstm.infer.sampling import Sampling

PROMPTS = ["a", "def f(x):", "été 夏", "x" * 40]
GREEDY = Sampling(temperature=0)


def by_hand(model, tokenizer, prompt: str, count: int) -> str:
    """Greedy continuation by reading the whole text again for every token."""
    ids = [tokenizer.end_id, *tokenizer.encode(prompt)]
    read = len(ids)
    for _ in range(count):
        logits, _state = model(torch.tensor([ids]))
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == tokenizer.end_id:
            break
    return tokenizer.decode_bytes(ids[read:]).decode(errors="ignore")


def test_greedy_text_equals_reading_everything_again_for_each_token(tokenizer) -> None:
    model = Recurrent().eval()
    for prompt in PROMPTS:
        got = generate(model, tokenizer, prompt, max_tokens=30, temperature=0)
        assert got.replace("\ufffd", "") == by_hand(model, tokenizer, prompt, 30).replace("\ufffd", "")


def test_prompts_of_any_lengths_give_what_each_gives_alone(tokenizer) -> None:
    model = Recurrent()
    together = generate(model, tokenizer, PROMPTS, max_tokens=30, temperature=0)
    assert together == [generate(model, tokenizer, prompt, max_tokens=30, temperature=0) for prompt in PROMPTS]
    assert len(set(together)) == len(PROMPTS)  # else this test could not fail


def test_a_neighbour_changes_no_sample(tokenizer) -> None:
    model = Recurrent()
    options = {"max_tokens": 30, "temperature": 0.9, "top_k": 50, "repetition_penalty": 1.1, "seed": 7}
    four = generate(model, tokenizer, PROMPTS, **options)
    assert generate(model, tokenizer, PROMPTS[:2], **options) == four[:2]
    assert generate(model, tokenizer, PROMPTS[0], **options) == four[0]
    twice = generate(model, tokenizer, [PROMPTS[0]] * 2, **options)
    assert twice[0] == four[0] != twice[1]  # rows with equal prompts are two samples, not one


def test_a_seed_repeats_the_text_and_another_does_not(tokenizer) -> None:
    model = Recurrent()
    first, again, other = (generate(model, tokenizer, "a", max_tokens=40, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    unseeded = {generate(model, tokenizer, "a", max_tokens=40) for _ in range(3)}
    assert len(unseeded) == 3


def test_the_stream_is_the_text_in_pieces(tokenizer) -> None:
    model = Recurrent()
    options = {"max_tokens": 80, "temperature": 0.8, "seed": 3, "stop": ["q", "zz"]}
    parts = list(stream(model, tokenizer, "def ", **options))
    assert "".join(parts) == generate(model, tokenizer, "def ", **options)
    assert len(parts) > 3
    assert all(parts)


def test_the_prompt_is_one_pass_and_each_token_one_step(tokenizer) -> None:
    model = Recurrent()
    generate(model, tokenizer, "twelve bytes", max_tokens=9, temperature=0)
    assert model.calls == [(1, 13)] + [(1, 1)] * 8  # the last token is not read: nobody asks what follows it


def test_the_document_starts_with_the_start_id(tokenizer) -> None:
    model = Recurrent()
    generate(model, tokenizer, ["a", "bcd"], max_tokens=1)
    assert model.first_inputs == [tokenizer.end_id] * 2


def test_a_finished_row_leaves_and_the_others_do_not_notice(tokenizer) -> None:
    model = Recurrent()
    wanted = generate(model, tokenizer, PROMPTS, max_tokens=40, temperature=0)
    stop = wanted[1][3:6]  # ends row 1 early, and perhaps others
    model.calls.clear()
    cut = generate(model, tokenizer, PROMPTS, max_tokens=40, temperature=0, stop=stop)
    assert cut == [text.split(stop)[0] for text in wanted]
    assert model.calls[0][0] == 4
    assert [shape[0] for shape in model.calls] == sorted((shape[0] for shape in model.calls), reverse=True)
    assert model.calls[-1][0] < 4


def test_a_character_over_many_tokens_appears_once_and_whole(tokenizer) -> None:
    text = "é夏🦊a"
    model = Scripted(list(text.encode()), prompt_tokens=2)
    shown = [piece.text for piece in pieces(model, tokenizer, ["x"], GREEDY, max_tokens=len(text.encode()))]
    assert shown == ["", "é", "", "", "夏", "", "", "", "🦊", "a"]


def test_a_character_cut_by_max_tokens_is_left_out_and_one_cut_by_the_end_is_broken(tokenizer) -> None:
    half = list("a🦊".encode())[:-1]
    cut = Scripted(half, prompt_tokens=2)
    assert generate(cut, tokenizer, "x", max_tokens=len(half), temperature=0) == "a"
    ended = Scripted([*half, tokenizer.end_id], prompt_tokens=2)
    assert generate(ended, tokenizer, "x", temperature=0) == "a\ufffd"


@pytest.mark.parametrize(
    ("script", "stop", "shown", "finished"),
    [
        ("one END two", "END", ["o", "n", "e", " ", "", "", ""], "stop"),
        ("one EN", "END", ["o", "n", "e", " ", "", "EN"], "length"),
        ("abc", ["x", "y"], ["a", "b", "c"], "length"),
    ],
)
def test_stop_strings_never_leak_and_never_swallow(tokenizer, script, stop, shown, finished) -> None:
    model = Scripted(list(script.encode()), prompt_tokens=2)
    got = list(pieces(model, tokenizer, ["x"], GREEDY, max_tokens=len(script), stop=stop))
    assert [piece.text for piece in got] == shown
    assert [piece.finished for piece in got] == [None] * (len(shown) - 1) + [finished]


def test_the_end_id_ends_the_text_and_is_not_shown(tokenizer) -> None:
    model = Scripted([*b"ok", tokenizer.end_id, *b"more"], prompt_tokens=2)
    got = list(pieces(model, tokenizer, ["x"], GREEDY, stop=["kk"]))
    assert got == [Piece(0, ord("o"), "o"), Piece(0, ord("k"), ""), Piece(0, tokenizer.end_id, "k", "end")]


def test_a_vocabulary_wider_than_the_tokenizer_draws_no_token_from_the_margin(tokenizer) -> None:
    model = Recurrent(vocab_size=320)
    with torch.no_grad():
        model.head.bias[tokenizer.vocab_size :] = 30.0
    drawn = [piece.token for piece in pieces(model, tokenizer, ["x"], Sampling(), max_tokens=60, seed=0)]
    assert max(drawn) < tokenizer.vocab_size


def test_a_penalty_knows_the_prompt_and_the_text_so_far_but_not_the_start_id(tokenizer) -> None:
    model = Recurrent()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(1.0)
        model.head.bias[[ord("a"), ord("b"), ord("c")]] = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)
    plain, penalised = (
        generate(model, tokenizer, "a", max_tokens=3, temperature=0, repetition_penalty=penalty)
        for penalty in (None, 3.5)
    )
    assert plain == "aaa"
    assert penalised[:2] == "bc"
    with torch.no_grad():
        model.head.bias[tokenizer.end_id] = 5.0
    assert generate(model, tokenizer, "a", temperature=0, repetition_penalty=100.0) == ""


def test_dropout_sleeps_and_every_mode_comes_back(tokenizer) -> None:
    model = Recurrent(dropout=0.9).train()
    model.head.eval()  # a person froze this part
    wanted = generate(model, tokenizer, "a", max_tokens=20, temperature=0)
    assert model.training
    assert model.dropout.training
    assert not model.head.training
    assert generate(model.eval(), tokenizer, "a", max_tokens=20, temperature=0) == wanted


def test_training_goes_on_between_the_pieces_of_a_stream(tokenizer) -> None:
    model = Recurrent().train()
    for _ in stream(model, tokenizer, "a", max_tokens=3, seed=0):
        assert model.training
        assert torch.is_grad_enabled()
        logits, _state = model(torch.tensor([[1, 2]]))
        logits.sum().backward()
    assert model.head.weight.grad is not None


def test_no_prompts_no_texts(tokenizer) -> None:
    assert generate(Recurrent(), tokenizer, []) == []


def test_nan_is_said_not_sampled(tokenizer) -> None:
    model = Recurrent()
    with torch.no_grad():
        model.head.bias[5] = torch.nan
    with pytest.raises(ValueError, match="the model returned NaN for new token 1"):
        generate(model, tokenizer, "a")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompt": ""}, "prompt is empty; give the model something to continue"),
        ({"prompt": ["a", ""]}, r"prompt\[1\] is empty"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"stop": ""}, "stop contains an empty string"),
        ({"prompt": "\udc80"}, "cannot be written as UTF-8"),
    ],
)
def test_bad_input_is_refused_by_name_before_anything_is_computed(tokenizer, arguments, sentence) -> None:
    model = Recurrent()
    with pytest.raises(ValueError, match=sentence):
        generate(model, tokenizer, **{"prompt": "a", **arguments})
    if arguments.get("prompt") != ["a", ""]:
        with pytest.raises(ValueError, match=sentence):
            stream(model, tokenizer, **{"prompt": "a", **arguments})  # refused now, not at the first piece
    assert model.calls == []


def test_a_tokenizer_of_another_model_is_refused_by_name(tokenizer) -> None:
    sentence = "prompt has token id 256, but the model's vocabulary ends at 255; use the tokenizer that the model was"
    with pytest.raises(ValueError, match=sentence):
        generate(Recurrent(vocab_size=256), tokenizer, "a")
