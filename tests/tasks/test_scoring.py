"""Scores of batches with shared contexts and unequal lengths are those of each request alone, in one whole pass."""

import pytest
import torch
from models.small_models import W, build

from openxlstm.data.tokenizer import Tokenizer
from openxlstm.tasks import scoring

KINDS = ("xlstm", "xlstm_large")
END = 0


def ids(count, seed):
    return torch.randint(1, W, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model, context, continuation):
    """log p(continuation | context) and greediness from one pass over both, with no state, batch or mask."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]]))[0][0, len(context) - 1 : -1]
    logprobs = logits.log_softmax(-1)[torch.arange(len(continuation)), continuation]
    return logprobs.sum().item(), logits.argmax(-1).tolist() == list(continuation)


def requests():
    """Choices that share contexts, contexts that share beginnings, all lengths from 1, an empty continuation."""
    shared = ids(9, 1)
    contexts = [[END], ids(3, 2), shared, [*shared, *ids(4, 3)], [*shared, *ids(1, 4)], ids(30, 5)]
    pairs = [(context, ids(length, 10 * length)) for context in contexts for length in (1, 4, 2, 17)]
    return [*pairs, pairs[5], ([END], [])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 512), (2, 5), (3, 512), (4, 7), (5, 1), (64, 512)])
def test_loglikelihoods_are_those_of_each_request_alone(kind, batch_size, chunk):
    model = build(kind).eval()
    pairs = requests()
    got = scoring.loglikelihoods(model, pairs, batch_size=batch_size, chunk=chunk)
    assert got[-1] == scoring.Score(0.0, True)
    for score, pair in zip(got[:-1], pairs[:-1], strict=True):
        logprob, greedy = alone(model, *pair)
        assert score.logprob == pytest.approx(logprob, abs=1e-9)
        assert score.greedy == greedy


def test_what_the_model_would_write_is_greedy():
    model = build("xlstm").eval()
    context, written = ids(5, 3), []
    for _ in range(4):
        written.append(model(torch.tensor([[*context, *written]]))[0][0, -1].argmax().item())
    wrong = [*written[:3], (written[3] + 1) % W]
    got = scoring.loglikelihoods(model, [(context, written), (context, wrong)], batch_size=2)
    assert [score.greedy for score in got] == [True, False]


def test_a_context_is_read_once_and_forked():
    """What goes through the model: each context once, each shared beginning once, continuations but for their end."""
    model, read = build("xlstm").eval(), []
    features = model.features

    def counted(tokens, state=None, *, reset=None, mask=None):
        read.append(tokens.numel() if mask is None else int(mask.sum()))
        return features(tokens, state, reset=reset, mask=mask)

    model.features = counted
    context = ids(40, 1)
    scoring.loglikelihoods(model, [(context, ids(3, n)) for n in range(4)], batch_size=4)
    assert sum(read) == 40 + 4 * 2
    read.clear()
    few_shot = [(context + ids(5, n), ids(1, n)) for n in range(4)]
    scoring.loglikelihoods(model, few_shot, batch_size=4)
    assert sum(read) == 40 + 4 * 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 4), (3, 512), (5, 3)])
def test_rolling_is_one_pass_and_windows_are_fresh_starts(kind, batch_size, chunk):
    model = build(kind).eval()
    texts = [ids(length, length) for length in (1, 20, 7, 8, 13, 40)] + [[]]
    got = scoring.rolling(model, texts, END, batch_size=batch_size, chunk=chunk)
    want = [alone(model, [END], text)[0] for text in texts[:-1]]
    assert got == pytest.approx([*want, 0.0], abs=1e-9)
    windowed = scoring.rolling_in_windows(model, texts, END, window=8, batch_size=batch_size, chunk=chunk)
    by_hand = [sum(alone(model, *pair)[0] for pair in scoring.windows(text, END, 8)) for text in texts]
    assert windowed == pytest.approx(by_hand, abs=1e-9)
    assert windowed[0] == pytest.approx(got[0], abs=1e-9)  # a text within one window is the same either way
    assert abs(windowed[5] - got[5]) > 1e-3


def test_windows_are_those_of_lm_eval():
    utils = pytest.importorskip("lm_eval.utils")
    for length in (1, 7, 8, 9, 16, 21):
        for window in (1, 3, 8):
            text = ids(length, 1)
            rolled = utils.get_rolling_token_windows(text, END, max_seq_len=window, context_len=1)
            want = [utils.make_disjoint_window(pair) for pair in rolled]
            assert list(scoring.windows(text, END, window)) == [(list(a), list(b)) for a, b in want]


class Letters:
    """As much of a tokenizer as generation needs: id n is the n-th letter, 0 ends."""

    end_id, vocab_size = 0, W

    def decode(self, ids):
        return "".join(chr(ord("`") + token) for token in ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_continuations_are_those_of_each_context_alone(kind, batch_size, monkeypatch):
    monkeypatch.setattr(scoring, "Tokenizer", Letters)
    model = build(kind).eval()
    contexts = [ids(length, length) for length in (1, 9, 4, 9, 30)]
    wanted = []
    for context in contexts:
        written = []
        while len(written) < 12:
            token = model(torch.tensor([[*context, *written]]))[0][0, -1].argmax().item()
            if token == END:
                break
            written.append(token)
        wanted.append(Letters().decode(written))
    write = (
        scoring.continuations.__wrapped__ if hasattr(scoring.continuations, "__wrapped__") else scoring.continuations
    )
    got = write(model, Letters(), contexts, max_tokens=12, batch_size=batch_size, chunk=5)
    assert got == wanted
    stop = max(wanted, key=len)[2:4]
    assert len(stop) == 2
    stopped = write(model, Letters(), contexts, until=[stop, "", "#"], max_tokens=12, batch_size=batch_size)
    assert stopped == [text.split(stop)[0] for text in wanted]
    assert write(model, Letters(), contexts, max_tokens=1, batch_size=batch_size) == [text[:1] for text in wanted]


def test_nothing_beyond_the_tokenizer_is_written():
    """A vocabulary rounded up: what has no text is never chosen, however probable."""
    model = build("xlstm").eval()
    tokenizer = Tokenizer.bytes()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        scoring.continuations(model, tokenizer, [[200]], max_tokens=3)
    text = scoring.continuations(
        model, tokenizer, [[1]], max_tokens=3, choose=lambda index, logits: int(logits.argmin()) % 20
    )
    assert len(text[0].encode()) == 3


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: scoring.loglikelihoods(m, [([], [1])]), "pair 0 has an empty context"),
        (lambda m: scoring.loglikelihoods(m, [([1], [W])]), f"token id {W} is outside the model's vocabulary of {W}"),
        (lambda m: scoring.loglikelihoods(m, [([1], [W, 1])]), f"token id {W} is outside"),
        (lambda m: scoring.loglikelihoods(m, [([W], [1])]), "outside the vocabulary"),
        (lambda m: scoring.loglikelihoods(m, [([1], [1])], batch_size=0), "batch_size=0"),
        (lambda m: scoring.loglikelihoods(m.train(), [([1], [1])]), r"call model.eval\(\) first"),
        (lambda m: scoring.rolling_in_windows(m, [[1]], END, window=0), "window=0 must be at least 1"),
        (lambda m: scoring.continuations(m, Tokenizer.bytes(), [[1]], max_tokens=0), "max_tokens=0"),
    ],
)
def test_a_mistake_gets_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(build("xlstm").eval())
