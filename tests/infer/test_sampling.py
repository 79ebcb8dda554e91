"""Sampling against a slow NumPy version that follows the definitions word by word, and at every edge."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openxlstm.infer.sampling import Sampling, choose, draw, keep_min_p, keep_top_k, keep_top_p, penalise, temper

INF = math.inf


def slow_distribution(logits: list[float], seen: list[bool], s: Sampling) -> np.ndarray:
    """Probabilities of one row in float64, one plain loop per definition."""
    x = {token: float(logit) for token, logit in enumerate(logits)}
    if s.repetition_penalty is not None:
        for token in x:
            if seen[token]:
                x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
    x = {token: logit / s.temperature for token, logit in x.items()}
    ranked = sorted(x, key=lambda token: (-x[token], token))
    if s.top_k is not None:
        ranked = ranked[: s.top_k]
    if s.top_p is not None:
        p, kept, total = softmax(x, ranked), [], 0.0
        for token in ranked:
            if total < s.top_p or s.top_p == 1:
                kept.append(token)
            total += p[token]
        ranked = kept
    if s.min_p is not None:
        p = softmax(x, ranked)
        ranked = [token for token in ranked if p[token] >= s.min_p * p[ranked[0]]]
    p = softmax(x, ranked)
    return np.array([p.get(token, 0.0) for token in range(len(logits))])


def softmax(x: dict[int, float], tokens: list[int]) -> dict[int, float]:
    top = max(x[token] for token in tokens)
    weights = {token: math.exp(x[token] - top) for token in tokens}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


def slow_draw(p: np.ndarray, u: float) -> int:
    total = 0.0
    for token, share in enumerate(p):
        total += share
        if total > u:
            return token
    raise AssertionError("u must be below 1")


OPTIONS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.none() | st.sampled_from([0.1234, 0.517, 0.9071, 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 0.0517, 0.3071, 1.0]),
    repetition_penalty=st.none() | st.sampled_from([0.8, 1.0, 1.3]),
)


@settings(max_examples=300, deadline=None)
@given(
    # quarters in float32 are exact, and their ties are many
    rows=st.lists(st.lists(st.integers(-24, 24), min_size=7, max_size=7), min_size=1, max_size=3),
    options=OPTIONS,
    seen=st.lists(st.booleans(), min_size=7, max_size=7),
    u=st.floats(0, 1, exclude_max=True),
)
def test_choice_equals_the_definition(rows, options, seen, u) -> None:
    logits = torch.tensor(rows, dtype=torch.float32) / 4
    seen_BW = torch.tensor([seen] * len(rows))
    got = choose(logits, options, torch.full((len(rows),), u, dtype=torch.float64), seen_BW)
    for row, token in zip(logits.tolist(), got.tolist()):
        p = slow_distribution(row, seen, options)
        cumulative = p.cumsum()
        assert p[token] > 0
        if np.abs(cumulative - u).min() > 1e-5:  # else float32 and float64 may round to different sides
            assert token == slow_draw(p, u)


def test_the_draw_has_the_distribution_of_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, -INF, 2.0, -1.0]])
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = draw(logits.expand(10_000, -1), grid).bincount(minlength=5)
    torch.testing.assert_close(counts / 10_000, logits.softmax(-1)[0], atol=2e-4, rtol=0)
    assert counts[2] == 0


@pytest.mark.parametrize("u", [0.0, 0.5, math.nextafter(1, 0)])
def test_a_removed_token_is_never_drawn(u: float) -> None:
    logits = torch.full((1, 50_000), -INF)
    logits[0, 123] = -7.0
    assert draw(logits, torch.tensor([u], dtype=torch.float64)).item() == 123


def test_temperature_zero_takes_the_best_and_the_smaller_id_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]])
    assert choose(logits, Sampling(temperature=0), torch.tensor([0.9, 0.9])).tolist() == [1, 0]
    penalised = choose(
        logits,
        Sampling(temperature=0, repetition_penalty=4.0),
        torch.tensor([0.9, 0.9]),
        torch.tensor([[False, True, True], [True, False, False]]),
    )
    assert penalised.tolist() == [0, 1]


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = torch.tensor([[80.0, 79.0, -80.0]])
    assert not temper(logits, 1e-40).isnan().any()
    assert choose(logits, Sampling(temperature=1e-40), torch.tensor([0.999])).item() == 0


def test_top_k_edges() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert keep_top_k(logits, 2).tolist() == [[-INF, 2.0, 2.0, -INF]]
    assert keep_top_k(logits, 1).tolist() == [[-INF, 2.0, -INF, -INF]]  # a tie: exactly k stay, the smaller id first
    assert keep_top_k(torch.zeros(1, 5_000), 100).isfinite()[0].nonzero()[:, 0].tolist() == list(range(100))
    assert keep_top_k(logits, 4) is logits
    assert keep_top_k(logits, 99) is logits


def test_top_p_edges() -> None:
    logits = torch.tensor([[0.25, 0.125, 0.5, 0.125]]).log()

    def kept(p: float) -> list[int]:
        return keep_top_p(logits, p).isfinite()[0].nonzero()[:, 0].tolist()

    assert kept(1e-9) == [2]  # the best token always stays
    assert kept(0.49) == [2]
    assert kept(0.51) == [0, 2]  # the token that crosses p stays
    assert kept(0.76) == [0, 1, 2]  # a tie: the smaller id first
    assert kept(1.0) == [0, 1, 2, 3]
    removed = logits.clone()
    removed[0, 0] = -INF
    assert keep_top_p(removed, 0.99).isfinite()[0].tolist() == [False, True, True, True]
    long_tail = torch.zeros(1, 50_000)
    assert keep_top_p(long_tail, 1.0).isfinite().all()


def test_min_p_edges() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert keep_min_p(logits, 0.0) is logits
    assert keep_min_p(logits, 0.3).isfinite().sum() == 2
    assert keep_min_p(logits, 1.0).isfinite()[0].tolist() == [True, False, False, False]


def test_a_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, 2.0]])
    seen = torch.tensor([[True, True, True, False]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 0.0, 2.0]]
    assert penalise(logits, seen, 1.0).tolist() == logits.tolist()


def test_top_p_reads_what_top_k_left() -> None:
    # Alone, top_p = 0.7 keeps three tokens of 0.3; after top_k = 2 each has 0.5, and two of them reach 0.7.
    logits = torch.tensor([[0.3, 0.3, 0.3, 0.1]]).log()
    uniforms = torch.tensor([0.1, 0.4, 0.6, 0.99])
    both = choose(logits.expand(4, -1), Sampling(top_k=2, top_p=0.7), uniforms)
    assert sorted(set(both.tolist())) == [0, 1]


def test_inputs_are_left_alone() -> None:
    logits, seen = torch.randn(3, 11), torch.rand(3, 11) > 0.5
    before = logits._version, seen._version
    options = Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    choose(logits, options, torch.rand(3), seen)
    assert (logits._version, seen._version) == before


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("temperature", -0.1, "temperature=-0.1 must be at least 0"),
        ("temperature", math.nan, "temperature=nan must be at least 0"),
        ("temperature", INF, "temperature=inf must be at least 0"),
        ("top_k", 0, "top_k=0 must be at least 1"),
        ("top_p", 0.0, "top_p=0.0 must be above 0 and at most 1"),
        ("top_p", 1.5, "top_p=1.5 must be above 0 and at most 1"),
        ("min_p", -0.5, "min_p=-0.5 must be between 0 and 1"),
        ("min_p", math.nan, "min_p=nan must be between 0 and 1"),
        ("repetition_penalty", 0.0, "repetition_penalty=0.0 must be above 0"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(option: str, value: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        Sampling(**{option: value})
