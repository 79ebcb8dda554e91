"""Text from a model: the prompt in one parallel pass, then constant memory and constant time per token.

    generate   the finished text of one prompt, or of each prompt in a list
    stream     the same text in pieces, as it appears
    pieces     one record per token and row: what the other two, the command line and a server are made of

A prompt is the beginning of a document, and in training the first input of a document is the end id of the document
before (the start id), so it stands before every prompt here too. Prompts of different lengths share one pass: padding
stands on the left, and `mask` tells the model that it does not exist. A row does not feel its neighbours: padding
changes nothing, every row draws from its own random numbers, and a finished row leaves the batch with its state. What
remains is rounding: a matrix product may add in another order for another number of rows, which can decide between
two tokens that are equal but for the last bits.

B rows still being written, T time, W vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from openxlstm.data.tokenizer import Tokenizer
from openxlstm.infer.decoder import Decoder, decoder
from openxlstm.infer.detokenize import Characters, StopStrings
from openxlstm.infer.sampling import Number, Sampling, choose
from openxlstm.models.interface import LanguageModel

PIECE = 2048  # tokens of a prompt that are read together: enough for the parallel form to be as fast as it gets


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added to one row. The texts of a row, joined, are its whole text."""

    row: int  # index of the prompt
    token: int
    text: str  # empty while a character or a possible stop string is incomplete
    finished: str | None = None  # "length": max_tokens reached; "stop": a stop string; "end": the model ended the text


@overload
def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, *,
    max_tokens: int = 200, temperature: Number = 1.0, top_k: int | None = None, top_p: Number | None = None,
    min_p: Number | None = None, repetition_penalty: Number | None = None, stop: str | Sequence[str] = (),
    seed: int | None = None,
) -> str: ...  # fmt: skip
@overload
def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompt: list[str] | tuple[str, ...], *,
    max_tokens: int = 200, temperature: Number = 1.0, top_k: int | None = None, top_p: Number | None = None,
    min_p: Number | None = None, repetition_penalty: Number | None = None, stop: str | Sequence[str] = (),
    seed: int | None = None,
) -> list[str]: ...  # fmt: skip
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | list[str] | tuple[str, ...],
    *,
    max_tokens: int = 200,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number | None = None,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
) -> str | list[str]:
    """The model's continuation of a prompt, without the prompt; a list of them for a list of prompts.

    Args:
        model: any language model of this library; its training mode is left as it was found.
        tokenizer: the one the model was trained with.
        prompt: text, or several texts of any lengths, which are continued together.
        max_tokens: at most this many new tokens per prompt. A character that they cut in half is left out.
        temperature, top_k, top_p, min_p, repetition_penalty: see `sampling.Sampling`.
        stop: one string or several; the text ends before the first that appears.
        seed: makes the text repeatable: row r draws from numbers that depend on (seed, r) alone.

    Raises:
        ValueError: an empty prompt, a token outside the model's vocabulary, an option out of range.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    prompts = [prompt] if isinstance(prompt, str) else prompt
    texts = [""] * len(prompts)
    for piece in pieces(model, tokenizer, prompts, sampling, max_tokens=max_tokens, stop=stop, seed=seed):
        texts[piece.row] += piece.text
    return texts[0] if isinstance(prompt, str) else texts


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 200,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number | None = None,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
) -> Iterator[str]:
    """The text of `generate`, with the same arguments, in pieces as they appear: whole characters, never taken back.

    Everything is checked before this function returns; the first piece is computed when it is asked for.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    found = pieces(model, tokenizer, [prompt], sampling, max_tokens=max_tokens, stop=stop, seed=seed)
    return (piece.text for piece in found if piece.text)


def pieces(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    max_tokens: int = 200,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
) -> Iterator[Piece]:
    """One `Piece` per row and token, all rows of a step in order; the last of a row says why it is the last.

    Raises:
        ValueError: as `generate`, before anything is computed.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    if isinstance(prompts, str):
        raise ValueError("pieces takes a list of prompts; write [prompt] for one")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    ids = [prompt_ids(model, tokenizer, prompt, _name(row, prompts)) for row, prompt in enumerate(prompts)]
    rows = [_Row(row, tokenizer, stops, seed) for row in range(len(prompts))]
    return _continue(model, tokenizer, ids, rows, sampling, max_tokens)


def prompt_ids(model: LanguageModel, tokenizer: Tokenizer, prompt: str, name: str = "prompt") -> list[int]:
    """What the model reads: the start id, where the tokenizer has one, and the tokens of the prompt.

    Raises:
        ValueError: no text, or a token that the model does not know.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError(f"{name} is empty; give the model something to continue, if only a line break: '\\n'")
    ids = ids if tokenizer.end_id is None else [tokenizer.end_id, *ids]
    vocabulary = model.config.vocab_size
    if max(ids) >= vocabulary:
        raise ValueError(
            f"{name} has token id {max(ids)}, but the model's vocabulary ends at {vocabulary - 1}; "
            f"use the tokenizer that the model was trained with (this one has {tokenizer.vocab_size} tokens)"
        )
    return ids


class _Row:
    """One text being written: its random numbers, and what of it may be shown."""

    def __init__(self, index: int, tokenizer: Tokenizer, stops: Sequence[str], seed: int | None) -> None:
        self.index = index
        self._end_id = tokenizer.end_id
        self._characters = Characters(tokenizer)
        self._stops = StopStrings(stops)
        # A string seed goes through SHA-512: neighbouring seeds and rows share nothing, on every machine alike.
        self._random = random.Random() if seed is None else random.Random(f"{seed}/{index}")

    def uniform(self) -> float:
        """The next random number of this row, in [0, 1): one per token whatever the options, so it never shifts."""
        return self._random.random()

    def push(self, token: int, last: bool) -> Piece:
        """Take the next token; `last` says that there is no room for another."""
        end = token == self._end_id
        text = self._stops.push(self._characters.finish() if end else self._characters.push(token))
        if self._stops.found is not None:
            return Piece(self.index, token, text, "stop")
        if end or last:
            return Piece(self.index, token, text + self._stops.finish(), "end" if end else "length")
        return Piece(self.index, token, text)


def _continue(
    model: LanguageModel,
    tokenizer: Tokenizer,
    ids: list[list[int]],
    rows: list[_Row],
    sampling: Sampling,
    max_tokens: int,
) -> Iterator[Piece]:
    """Read the prompts, then write one token per row until every row has finished."""
    if not rows:
        return
    device = next(_module(model).parameters()).device
    tokens_BT, mask_BT = _left_padded(ids, device)
    logits_BW, decode = _read(model, tokens_BT, mask_BT)
    # Widths of models are rounded up; what lies beyond the tokenizer is no token and is never drawn.
    width = min(tokenizer.vocab_size, logits_BW.shape[-1])
    seen_BW = _seen(ids, tokenizer, width, device) if sampling.repetition_penalty is not None else None

    for written in range(1, max_tokens + 1):
        if logits_BW.isnan().any():
            raise ValueError(f"the model returned NaN for new token {written}; its weights are damaged or overflow")
        uniform_B = torch.tensor([row.uniform() for row in rows], dtype=torch.float64)
        next_B = choose(logits_BW[:, :width], sampling, uniform_B, seen_BW)
        if seen_BW is not None:
            seen_BW = seen_BW.scatter(1, next_B[:, None], True)
        new = [row.push(token, written == max_tokens) for row, token in zip(rows, next_B.tolist(), strict=True)]
        yield from new

        alive = [index for index, piece in enumerate(new) if piece.finished is None]
        if not alive:
            return
        if len(alive) < len(rows):
            keep = torch.tensor(alive, device=device)
            rows = [rows[index] for index in alive]
            next_B = next_B[keep]
            with _evaluating(model):
                decode.select(keep)
            seen_BW = None if seen_BW is None else seen_BW[keep]
        with _evaluating(model):
            logits_BW = decode.step(next_B)


def _read(
    model: LanguageModel, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None
) -> tuple[Float[Tensor, "B W"], Decoder]:
    """Read the prompts and predict the token after the last; only that one goes through the vocabulary's matrix.

    A long prompt goes in pieces from state to state, so that reading it takes the memory of one piece.

    no_grad and not inference_mode: a table that a module keeps from an inference_mode call could not be trained with.
    """
    with torch.no_grad(), _evaluating(model):
        hidden_BTD, state = model.features(tokens[:, :PIECE], None, mask=None if mask is None else mask[:, :PIECE])
        for first in range(PIECE, tokens.shape[1], PIECE):
            there = slice(first, first + PIECE)
            hidden_BTD, state = model.features(tokens[:, there], state, mask=None if mask is None else mask[:, there])
        return model.logits(hidden_BTD[:, -1:])[:, 0], decoder(model, state)


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """No dropout inside; afterwards every module is in the mode it was found in, whatever the others were in.

    Through vars(), because a module's __setattr__ looks for parameters first: a tenth of a small model's step.
    """
    training = [module for module in _module(model).modules() if module.training]
    for module in training:
        vars(module)["training"] = False
    try:
        yield
    finally:
        for module in training:
            vars(module)["training"] = True


def _module(model: LanguageModel) -> nn.Module:
    assert isinstance(model, nn.Module), f"a language model is a torch module, not {type(model).__name__}"
    return model


def _left_padded(ids: list[list[int]], device: torch.device) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"] | None]:
    """Rows that end together, so that the last position is the last token of each; no mask if nothing is padded."""
    length = max(map(len, ids))
    tokens_BT = torch.tensor([[0] * (length - len(row)) + row for row in ids], device=device)
    padded = torch.tensor([length - len(row) for row in ids], device=device)
    mask_BT = torch.arange(length, device=device) >= padded[:, None]
    return tokens_BT, None if min(map(len, ids)) == length else mask_BT


def _seen(ids: list[list[int]], tokenizer: Tokenizer, width: int, device: torch.device) -> Bool[Tensor, "B W"]:
    """The tokens of each prompt; the start id is no text, and penalising it would forbid the text to end."""
    seen_BW = torch.zeros(len(ids), width, dtype=torch.bool, device=device)
    for row, tokens in enumerate(ids):
        seen_BW[row, tokens[tokenizer.end_id is not None :]] = True
    return seen_BW


def _name(row: int, prompts: Sequence[str]) -> str:
    return "prompt" if len(prompts) == 1 else f"prompt[{row}]"
