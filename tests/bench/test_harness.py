"""The harness behind every published speed: turns, ceilings, refusals, and a page that is only numbers it was given."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter

import pytest
import torch
from click.testing import CliRunner

from openxlstm.bench import generate, harness, kernels, llama_cpp, page, train
from openxlstm.bench.harness import OURS, Row, Side, check, measure
from openxlstm.cli import main
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig


def test_every_side_and_the_ceiling_take_their_turn_in_every_round() -> None:
    heard: list[str] = []
    sides = [Side(OURS, lambda: heard.append("a")), Side("peer", lambda: heard.append("b"), 0.5)]
    rows = measure("case", sides, 3, work=2.0, unit="GB/s", ceiling=(lambda: heard.append("c"), 1.0))
    rounds = [heard[at : at + 3] for at in range(0, 12, 3)]  # the first does not count
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({order[0] for order in rounds}) == 3
    assert [row.side for row in rows] == [OURS, "peer"]
    assert rows[0].its_over_ours == 1
    assert rows[1].error == 0.5
    with pytest.raises(AssertionError, match="stands first"):
        measure("case", sides[::-1], 1)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7])
def test_no_side_has_a_place_nor_a_neighbour_of_its_own(count: int) -> None:
    rounds = [harness.turns(count, round_) for round_ in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in rounds)
    for place in range(count):
        assert Counter(order[place] for order in rounds) == Counter(dict.fromkeys(range(count), 2))
    followed = Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert followed == Counter(dict.fromkeys(itertools.permutations(range(count), 2), 2))


def test_ratios_are_those_of_the_medians_and_shares_those_of_the_ceiling() -> None:
    def wait(ms: float):
        return lambda: time.sleep(ms / 1e3)

    fast, slow = measure("case", [Side(OURS, wait(5)), Side("peer", wait(20))], 5, work=1.0, ceiling=(wait(10), 1.0))
    assert 2.5 < slow.its_over_ours < 6
    assert fast.fastest_ms <= fast.median_ms <= fast.slowest_ms
    assert fast.of_ceiling is not None
    assert slow.of_ceiling is not None
    assert 1.2 < fast.of_ceiling < 3
    assert 0.3 < slow.of_ceiling < 0.8


def test_no_time_for_a_wrong_result() -> None:
    check("peer", "case", 1e-6, 1e-5)
    for wrong in (1e-4, float("nan")):
        with pytest.raises(ValueError, match="no time is printed"):
            check("peer", "case", wrong, 1e-5)


def test_the_page_holds_what_it_was_given() -> None:
    rows = [
        Row("a case", OURS, 1e-6, 2.0, 1.5, 2.5, 1.0, 120.0, "GB/s", 0.8),
        Row("a case", "peer", None, 6.0, 5.0, 7.0, 3.0),
    ]
    found = harness.as_json({"generate": rows}, 5)
    text = page.page(json.loads(json.dumps(found)), "xlstm bench generate", "2026-11-28")
    assert "| openxlstm | 2.00 (1.50 to 2.50) | 1.00 | 1e-06 | 120 GB/s | 80 % |" in text
    assert "| peer | 6.00 (5.00 to 7.00) | 3.00 |  |  |  |" in text
    assert "**a case**" in text
    assert f"torch {torch.__version__}" in text


def test_bytes_of_a_token_are_matrices_without_the_embedding_and_the_state_twice() -> None:
    vocabulary = 96  # a multiple of the 16 rows that packed matrices are padded to
    model = xLSTMLarge(xLSTMLargeConfig(vocab_size=vocabulary, width=64, blocks=1, heads=2))
    weights = sum(p.numel() for p in model.parameters()) - vocabulary * 64
    assert generate.read_by_a_token(model) == 4 * weights + 2 * model.empty_state(1).nbytes
    generate.quantise(model, "q8_0")
    large = sum(64 * n for n in (32, 32, 64, 64, 64, 192, 192, 192, vocabulary))
    assert (
        generate.read_by_a_token(model) == 4 * weights - large * 4 + large // 32 * 34 + 2 * model.empty_state(1).nbytes
    )


@pytest.mark.slow
def test_the_suites_run_and_the_verb_prints_them(monkeypatch, tmp_path) -> None:
    """Small sizes: every side is called and compared; the numbers mean nothing."""
    monkeypatch.setattr(kernels, "MLSTM", ((1, 2, 128, 16, 24),))
    monkeypatch.setattr(kernels, "SLSTM", ((1, 20, 32, 2),))
    monkeypatch.setattr(train, "T", 24)
    monkeypatch.setattr(harness, "EDGE", 64)
    done = CliRunner().invoke(main, ["bench", "kernels", "train", "--runs", "1", "--write", str(tmp_path / "page.md")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "page.md").read_text()
    for side in ("| openxlstm, torch |", "| mlstm_kernels, ", "| nn.LSTM, one head |", "| xlstm, vanilla sLSTM |"):
        assert side in text
    assert "mLSTM, B 1, H 2, T 128, K 16, V 24, bf16" in done.output
    found = json.loads(CliRunner().invoke(main, ["bench", "train", "--runs", "1", "--json"]).stdout)
    assert [row["side"] for row in found["suites"]["train"]] == [OURS, "xlstm, vanilla sLSTM"] * 2


@pytest.mark.slow
@pytest.mark.skipif(llama_cpp.absent() is not None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_0"])
def test_llama_cpp_reads_what_was_written_and_decodes_as_many_tokens(kind: str) -> None:
    shape = llama_cpp.Shape(vocabulary=128, width=64, blocks=1, heads=4, kv_heads=2, feed_forward=96)
    calls: list[int] = []
    rows = llama_cpp.beside("a label", lambda: calls.append(1), kind, 1, 32, shape)
    assert [row.side.split()[0] for row in rows] == [OURS, "llama.cpp", "llama.cpp"]
    assert ["flash attention" in row.side for row in rows] == [False, False, True]
    assert len(calls) == 2 * llama_cpp.TOKENS  # a round that does not count, and one that does
    assert all("2 of 4 heads" in row.side and row.median_ms > 0 for row in rows[1:])
    calls.clear()
    alone = llama_cpp.beside("a label", lambda: calls.append(1), kind, 1, 32, shape, flash=(False,))
    assert [row.side for row in alone] == [row.side for row in rows[:2]]


@pytest.mark.slow
def test_decoding_small_sizes(monkeypatch) -> None:
    monkeypatch.setattr(harness, "SPREAD", 1 << 22)
    rows = generate.small("fp32", 1)
    assert [row.side for row in rows] == [OURS, f"{OURS}, torch", "xlstm, step"]
