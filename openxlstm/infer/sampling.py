"""Which token comes next: pure functions on logits, in one fixed order.

    1. repetition penalty   Keskar et al. 2019, arXiv:1909.05858, Sec. 4.1
    2. temperature          0 ends here: the largest logit, ties to the smaller id
    3. top-k                Fan et al. 2018, arXiv:1805.04833
    4. top-p                Holtzman et al. 2020, arXiv:1904.09751, of what top-k left, renormalised
    5. min-p                Nguyen et al. 2024, arXiv:2407.01082, relative to the most probable token
    6. one draw             inverse of the cumulative distribution, one uniform number per row

A filter sets what it removes to -inf and never removes the most probable token. All ties are broken towards the
smaller id, so that a filter keeps the same tokens on every machine that computes the same logits.
B batch, W vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Number = int | float  # float alone includes int for mypy, but not for the checker in our test runner


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose a token. None leaves a filter out; the default draws from the model's own distribution.

    Raises:
        ValueError: a number outside its range, by name, value and rule.
    """

    temperature: Number = 1.0  # > 0 divides the logits; 0 takes the most probable token
    top_k: int | None = None  # keep the k most probable tokens
    top_p: Number | None = None  # keep the smallest set of most probable tokens that holds this share, in (0, 1]
    min_p: Number | None = None  # keep tokens at least this share as probable as the best one, in [0, 1]
    repetition_penalty: Number | None = None  # > 1 makes tokens of the prompt and the text so far less likely

    def __post_init__(self) -> None:
        """Refuse what has no meaning; `not (a <= x)` also refuses NaN."""
        if not (0 <= self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature} must be at least 0; 0 takes the most probable token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out to keep every token")
        if self.top_p is not None and not (0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1; 1 keeps every token")
        if self.min_p is not None and not (0 <= self.min_p <= 1):
            raise ValueError(f"min_p={self.min_p} must be between 0 and 1; 0 keeps every token")
        penalty = self.repetition_penalty
        if penalty is not None and not (0 < penalty < math.inf):
            raise ValueError(f"repetition_penalty={penalty} must be above 0; 1 changes nothing, above 1 repeats less")


def choose(
    logits: Float[Tensor, "B W"],
    sampling: Sampling,
    uniform: Float[Tensor, "B"],
    seen: Bool[Tensor, "B W"] | None = None,
) -> Int[Tensor, "B"]:
    """The next token of every row. `uniform` is in [0, 1), one per row; `seen` marks what the penalty applies to."""
    logits = logits.float()
    if sampling.repetition_penalty is not None:
        assert seen is not None, "a repetition penalty needs to know what was seen"
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)  # torch documents: the first of equals
    logits = temper(logits, sampling.temperature)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return draw(logits, uniform)


def penalise(logits: Float[Tensor, "B W"], seen: Bool[Tensor, "B W"], penalty: Number) -> Float[Tensor, "B W"]:
    """Seen tokens: positive logits are divided by the penalty, negative ones multiplied, so both fall above 1."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def temper(logits: Float[Tensor, "B W"], temperature: Number) -> Float[Tensor, "B W"]:
    """Divide by a temperature above 0, with the largest logit at 0: 80 / 1e-40 would be inf, and inf - inf NaN."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits: Float[Tensor, "B W"], k: int) -> Float[Tensor, "B W"]:
    """Exactly the k largest logits; all of them when k is at least W."""
    if k >= logits.shape[-1]:
        return logits
    order_BW = logits.argsort(dim=-1, descending=True, stable=True)
    return logits.scatter(-1, order_BW[:, k:], -torch.inf)


def keep_top_p(logits: Float[Tensor, "B W"], p: Number) -> Float[Tensor, "B W"]:
    """The fewest most probable tokens whose probabilities sum to at least p: the one that crosses p stays."""
    if p == 1:
        return logits  # a rounded sum can reach 1 before the tail is counted
    sorted_BW, order_BW = logits.sort(dim=-1, descending=True, stable=True)
    probability_BW = sorted_BW.softmax(-1)
    before_BW = probability_BW.cumsum(-1) - probability_BW  # the share of all better tokens
    sorted_BW = sorted_BW.masked_fill(before_BW >= p, -torch.inf)
    return torch.empty_like(logits).scatter(-1, order_BW, sorted_BW)


def keep_min_p(logits: Float[Tensor, "B W"], p: Number) -> Float[Tensor, "B W"]:
    """Tokens whose probability is at least p times that of the most probable one."""
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)


def draw(logits: Float[Tensor, "B W"], uniform: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """The first token whose cumulative probability exceeds `uniform`; a token of probability 0 is never drawn.

    On the CPU and in float64 wherever the model lives: the same number draws the same token on a device without
    float64 too, a sum over 50,000 tokens keeps its small terms, and u < 1 in float64 never rounds up to the total.
    """
    cumulative_BW = logits.softmax(-1).cpu().double().cumsum(-1)
    threshold_B1 = uniform.cpu().double()[:, None] * cumulative_BW[:, -1:]
    return torch.searchsorted(cumulative_BW, threshold_B1, right=True)[:, 0].to(logits.device)
