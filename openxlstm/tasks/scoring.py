"""Log-likelihoods and continuations of token ids. What a recurrent model gains over windows of attention:

    a context is read once, and its state is forked for every continuation that is asked about;
    a text of any length is scored in one pass that carries the state, in constant memory; nothing is truncated.

Rows of unequal length share a batch: padding stands on the right, `mask` says that it does not exist, and the state at
the end of a row is the state after its last token. A row does not feel its neighbours: what it gets is what it gets
alone, but for rounding. "Tokens" are ids; the end id that begins a document is among them where the caller wants it.

B batch, T time, D model width, W vocabulary, N positions to be scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from openxlstm.data.tokenizer import Tokenizer
from openxlstm.models.interface import LanguageModel, ModelState

Ids = Sequence[int]
CHUNK = 512  # tokens per row that are in memory at once
POSITIONS = 1024  # positions whose logits are in memory at once: 200 MB at W = 50,000


@dataclass(frozen=True, slots=True)
class Score:
    """A continuation's natural-log probability, and whether every token of it is the most probable one."""

    logprob: float
    greedy: bool


def loglikelihoods(
    model: LanguageModel, pairs: Sequence[tuple[Ids, Ids]], *, batch_size: int = 1, chunk: int = CHUNK
) -> list[Score]:
    """log p(continuation | context) of every pair of token ids (context, continuation), in their order.

    Equal contexts are read once; what the contexts of a batch have in common at their beginning is read once, too.

    Args:
        model: in evaluation mode.
        pairs: contexts of at least one token (of an empty text: the end id). An empty continuation scores 0.
        batch_size: contexts, and then continuations, that are computed together.
        chunk: tokens of a row in memory at once; changes nothing but speed and memory.

    Raises:
        ValueError: an empty context, a token outside the vocabulary, a model in training mode.
    """
    _check(model, batch_size, chunk)
    requests: dict[tuple[int, ...], list[int]] = {}  # context: which pairs ask about it
    for index, (context, _) in enumerate(pairs):
        if not context:
            raise ValueError(f"pair {index} has an empty context; begin with the tokenizer's end id, as documents do")
        requests.setdefault(tuple(context), []).append(index)
    scores: list[Score | None] = [None] * len(pairs)
    for contexts in _batches(sorted(requests, key=len, reverse=True), batch_size):
        hidden_BD, state = _read(model, contexts, chunk)
        asked = [(row, index) for row, context in enumerate(contexts) for index in requests[context]]
        for some in _batches(sorted(asked, key=lambda one: -len(pairs[one[1]][1])), batch_size):
            rows = torch.tensor([row for row, _ in some], device=hidden_BD.device)
            found = _score(model, hidden_BD[rows], state.select(rows), [pairs[index][1] for _, index in some], chunk)
            for (_, index), score in zip(some, found, strict=True):
                scores[index] = score
    return [score for score in scores if score is not None]


def rolling(
    model: LanguageModel, texts: Sequence[Ids], prefix: int, *, batch_size: int = 1, chunk: int = CHUNK
) -> list[float]:
    """log p of every whole text, each beginning after `prefix` (the end id): one pass with the state carried along."""
    scores = loglikelihoods(model, [([prefix], text) for text in texts], batch_size=batch_size, chunk=chunk)
    return [score.logprob for score in scores]


@torch.no_grad()
def token_nats(model: LanguageModel, rows: Sequence[Ids], *, chunk: int = CHUNK) -> list[Float64[np.ndarray, "n"]]:
    """-log p of every token of each row but its first, given all before it in the row; rows are one batch.

    The state is carried from chunk to chunk, so the memory does not grow with a row. What is per domain, per position
    or per frequency is a sum of these.

    Raises:
        ValueError: an empty row, a token outside the vocabulary, a model in training mode.
    """
    _check(model, 1, chunk)
    _check_vocabulary(model, rows)
    if not all(rows):
        raise ValueError("a row has no token; begin with the tokenizer's end id, as documents do")
    device, state = _device(model), None
    found = [np.empty(len(row) - 1) for row in rows]
    for first, tokens_BT, mask_BT in _padded_chunks([row[:-1] for row in rows], chunk, device):
        hidden_BTD, state = model.features(tokens_BT, state, mask=mask_BT)
        counts = [max(0, min(len(row) - 1 - first, tokens_BT.shape[1])) for row in rows]
        exists = torch.arange(tokens_BT.shape[1], device=device) < torch.tensor(counts, device=device)[:, None]
        targets = [token for row, n in zip(rows, counts, strict=True) for token in row[first + 1 : first + 1 + n]]
        nats = -np.concatenate([part for part, _ in _logprobs(model, hidden_BTD[exists], targets)])
        for row, part in zip(found, np.split(nats, np.cumsum(counts)[:-1]), strict=True):
            row[first : first + len(part)] = part
    return found


def perplexity(model: LanguageModel, ids: Ids, *, chunk: int = CHUNK) -> float:
    """exp of the mean loss of every token but the first, in nats, the state carried from the first to the last.

    Raises:
        ValueError: fewer than two tokens, or what `loglikelihoods` refuses.
    """
    if len(ids) < 2:
        raise ValueError(f"a perplexity needs at least two tokens, of which the first is given; got {len(ids)}")
    (score,) = loglikelihoods(model, [(ids[:1], ids[1:])], chunk=chunk)
    return math.exp(min(-score.logprob / (len(ids) - 1), 700.0))  # beyond it a double is infinite anyway


def read_text_ids(path: Path, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a text file, behind the end id, as in training.

    Raises:
        ValueError: not UTF-8, or nothing in it.
    """
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    ids = ids if tokenizer.end_id is None else [tokenizer.end_id, *ids]
    if len(ids) < 2:
        raise ValueError(f"{path} has too little text for a perplexity")
    return ids


def rolling_in_windows(
    model: LanguageModel,
    texts: Sequence[Ids],
    prefix: int,
    *,
    window: int = 2048,
    batch_size: int = 1,
    chunk: int = CHUNK,
) -> list[float]:
    """The same with a fresh state every `window` tokens: the number that models with a context length report."""
    pairs, owner = [], []
    for index, text in enumerate(texts):
        for pair in windows(text, prefix, window):
            pairs.append(pair)
            owner.append(index)
    totals = [0.0] * len(texts)
    for index, score in zip(owner, loglikelihoods(model, pairs, batch_size=batch_size, chunk=chunk), strict=True):
        totals[index] += score.logprob
    return totals


def windows(text: Ids, prefix: int, window: int) -> Iterator[tuple[list[int], list[int]]]:
    """Disjoint windows of a text as (context, continuation): every token is a continuation once.

    The first token of a text follows `prefix`, that of a later window the token before it. The last window is filled up
    with earlier tokens as context, which are not scored again (evaluation of arXiv:2405.04517, App. B.3).
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1 token")
    for first in range(0, len(text), window):
        last = min(first + window, len(text))
        begin = max(last - window, 0)  # of the scored tokens, if all of the window were scored
        before = [prefix] if begin == 0 else [text[begin - 1]]
        yield [*before, *text[begin:first]], list(text[first:last])


def continuations(
    model: LanguageModel,
    tokenizer: Tokenizer,
    contexts: Sequence[Ids],
    *,
    until: Sequence[str] = (),
    max_tokens: int = 256,
    choose: Callable[[int, Float[Tensor, "W"]], int] | None = None,
    batch_size: int = 1,
    chunk: int = CHUNK,
) -> list[str]:
    """The text that the model writes after every context, up to a stop string, the end id, or `max_tokens` tokens.

    Args:
        until: stop strings; none of them, and nothing behind the first one, is part of the text.
        choose: which token comes next, from the context's index and the logits; None takes the most probable one.
    """
    _check(model, batch_size, chunk)
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    until, texts = [stop for stop in until if stop], [""] * len(contexts)
    order = sorted(range(len(contexts)), key=lambda index: -len(contexts[index]))
    for some in _batches(order, batch_size):
        hidden_BD, state = _read(model, [contexts[index] for index in some], chunk)
        alive: list[int] = list(some)
        written: list[list[int]] = [[] for _ in some]
        for count in range(1, max_tokens + 1):
            # Widths of models are rounded up; what lies beyond the tokenizer is no token.
            logits_BW = model.logits(hidden_BD)[:, : tokenizer.vocab_size]
            if choose is None:
                chosen = logits_BW.argmax(-1).tolist()
            else:
                chosen = [choose(index, row) for index, row in zip(alive, logits_BW, strict=True)]
            keep = []
            for row, (index, token) in enumerate(zip(alive, chosen, strict=True)):
                ended = token == tokenizer.end_id
                if not ended:
                    written[row].append(token)
                texts[index], stopped = _until(tokenizer.decode(written[row]), until)
                if not (ended or stopped):
                    keep.append(row)
            if not keep or count == max_tokens:
                break
            tokens_B1 = torch.tensor([[chosen[row]] for row in keep], device=hidden_BD.device)
            if len(keep) < len(alive):
                state = state.select(torch.tensor(keep, device=hidden_BD.device))
            alive, written = [alive[row] for row in keep], [written[row] for row in keep]
            with torch.no_grad():
                hidden_BTD, state = model.features(tokens_B1, state)
            hidden_BD = hidden_BTD[:, -1]
    return texts


def _until(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string in it, and whether there was one."""
    ends = [text.index(stop) for stop in stops if stop in text]
    return (text[: min(ends)], True) if ends else (text, False)


@torch.no_grad()
def _read(model: LanguageModel, rows: Sequence[Ids], chunk: int) -> tuple[Float[Tensor, "B D"], ModelState]:
    """The hidden state at the last token of every row, which predicts the next one, and the state after it."""
    device = _device(model)
    shared = _common_beginning([row[:-1] for row in rows]) if len(rows) > 1 else 0
    state: ModelState | None = None
    for part in _batches(rows[0][:shared], chunk):
        _, state = model.features(torch.tensor([part], device=device), state)
    if state is not None:
        state = state.select(torch.zeros(len(rows), dtype=torch.long, device=device))
    last: list[Tensor | None] = [None] * len(rows)
    rest = [row[shared:] for row in rows]
    for first, tokens_BT, mask_BT in _padded_chunks(rest, chunk, device):
        hidden_BTD, state = model.features(tokens_BT, state, mask=mask_BT)
        for row, ids in enumerate(rest):
            if first < len(ids) <= first + tokens_BT.shape[1]:
                last[row] = hidden_BTD[row, len(ids) - 1 - first]
    assert state is not None, "every row has a token"
    return torch.stack([hidden for hidden in last if hidden is not None]), state


@torch.no_grad()
def _score(
    model: LanguageModel, hidden: Float[Tensor, "B D"], state: ModelState, rows: Sequence[Ids], chunk: int
) -> list[Score]:
    """Scores of one continuation per row, from the hidden state that predicts its first token."""
    device = hidden.device
    total, greedy = [0.0] * len(rows), [True] * len(rows)

    def add(owners: list[int], hidden_ND: Tensor, targets: list[int]) -> None:
        found = _logprobs(model, hidden_ND, targets)
        pairs = ((logprob, best) for logprobs, bests in found for logprob, best in zip(logprobs, bests, strict=True))
        for row, (logprob, is_best) in zip(owners, pairs, strict=True):
            total[row] += float(logprob)
            greedy[row] = greedy[row] and bool(is_best)

    _check_vocabulary(model, rows)
    beginning = [row for row, ids in enumerate(rows) if ids]
    add(beginning, hidden[beginning], [rows[row][0] for row in beginning])
    for first, tokens_BT, mask_BT in _padded_chunks([ids[:-1] for ids in rows], chunk, device):
        hidden_BTD, state = model.features(tokens_BT, state, mask=mask_BT)
        counts = [max(0, min(len(ids) - 1 - first, tokens_BT.shape[1])) for ids in rows]
        exists = torch.arange(tokens_BT.shape[1], device=device) < torch.tensor(counts, device=device)[:, None]
        targets = [token for ids, n in zip(rows, counts, strict=True) for token in ids[first + 1 : first + 1 + n]]
        add([row for row, n in enumerate(counts) for _ in range(n)], hidden_BTD[exists], targets)
    return [Score(*one) for one in zip(total, greedy, strict=True)]


def _logprobs(
    model: LanguageModel, hidden: Float[Tensor, "N D"], targets: Sequence[int]
) -> Iterator[tuple[Float64[np.ndarray, "n"], Bool[np.ndarray, "n"]]]:
    """(log p of every target, whether it is the most probable token), POSITIONS of them at a time."""
    for begin in range(0, len(targets), POSITIONS):
        part = slice(begin, begin + POSITIONS)
        logits_NW = model.logits(hidden[part])
        target_N1 = torch.tensor(targets[part], device=hidden.device)[:, None]
        found = (logits_NW.gather(1, target_N1) - logits_NW.logsumexp(1, keepdim=True))[:, 0]
        yield found.double().cpu().numpy(), (logits_NW.argmax(1) == target_N1[:, 0]).cpu().numpy()


def _padded_chunks(
    rows: Sequence[Ids], chunk: int, device: torch.device
) -> Iterator[tuple[int, Int[Tensor, "B T"], Bool[Tensor, "B T"] | None]]:
    """(first position, tokens, mask) of `chunk` positions after the other; no mask where nothing is padded."""
    longest, shortest = max(map(len, rows), default=0), min(map(len, rows), default=0)
    for first in range(0, longest, chunk):
        parts = [list(row[first : first + chunk]) for row in rows]
        width = min(chunk, longest - first)
        tokens_BT = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=device)
        if shortest >= first + width:
            yield first, tokens_BT, None
        else:
            counts = torch.tensor([len(part) for part in parts], device=device)
            yield first, tokens_BT, torch.arange(width, device=device) < counts[:, None]


def _common_beginning(rows: Sequence[Ids]) -> int:
    """How many tokens all rows begin with: those that the first and the last in alphabetical order begin with."""
    first, last = min(map(list, rows)), max(map(list, rows))
    return next((n for n, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _check(model: LanguageModel, batch_size: int, chunk: int) -> None:
    if batch_size < 1 or chunk < 1:
        raise ValueError(f"batch_size={batch_size} and chunk={chunk} must be at least 1")
    if _module(model).training:
        raise ValueError("the model is in training mode, where dropout changes scores; call model.eval() first")


def _check_vocabulary(model: LanguageModel, rows: Iterable[Ids]) -> None:
    """A continuation's tokens are looked up among the logits, where the model checks nothing."""
    W = model.config.vocab_size
    for row in rows:
        if unknown := [token for token in row if not 0 <= token < W]:
            raise ValueError(f"token id {unknown[0]} is outside the model's vocabulary of {W}; is this its tokenizer?")


def _module(model: LanguageModel) -> nn.Module:
    assert isinstance(model, nn.Module), f"a language model is a torch module, not {type(model).__name__}"
    return model


def _device(model: LanguageModel) -> torch.device:
    return next(_module(model).parameters()).device
