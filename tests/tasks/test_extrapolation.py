"""Beyond the trained length: every number against one forward pass per window, and a model that is known to fail."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.small_models import awake

from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.tasks import extrapolation
from openxlstm.tasks.kept import Kept

END, TRAIN = 256, 4
ONE = np.array([1] * 256 + [0])
TEXTS = [(0, list(b"sixteen letters.")), (2, list(b"too short")), (5, list(b"and a longer text of 38 letters, count"))]


@pytest.fixture(scope="module")
def model() -> xLSTM:
    torch.manual_seed(0)
    return awake(xLSTM(xLSTMConfig(vocab_size=257, width=12, heads=3, pattern="ms", mlstm_width=24))).eval()


@pytest.fixture(scope="module")
def rows(model: xLSTM) -> list[dict[str, Any]]:
    kept = Kept(None, {})
    short = extrapolation.measure(
        model, TEXTS, END, kept, train_length=TRAIN, factors=(4, 1, 2), bytes_of=ONE, batch_size=3
    )
    assert short == 1
    assert [(row["index"], row["tokens"]) for row in kept.rows] == [(0, 16), (5, 32)]
    return kept.rows


def nats_by_hand(model: xLSTM, text: list[int], T: int | None) -> list[float]:
    found = []
    for begin in range(0, len(text), T or len(text)):
        window = text[begin : begin + (T or len(text))]
        row = [text[begin - 1] if begin else END, *window]
        with torch.no_grad():
            logprobs = model(torch.tensor([row[:-1]]))[0][0].double().log_softmax(-1)
        found += [-logprobs[t, token].item() for t, token in enumerate(window)]
    return found


@pytest.mark.parametrize("mode", ["windows", "stateful"])
@pytest.mark.parametrize("T", [4, 8, 16])
def test_the_table_is_that_of_one_forward_pass_per_window(
    model: xLSTM, rows: list[dict[str, Any]], mode: str, T: int
) -> None:
    (line,) = [line for line in extrapolation.table(rows) if (line["mode"], line["length"]) == (mode, T)]
    everything: list[float] = []
    last: list[float] = []
    places: dict[int, list[float]] = {}
    for text in (TEXTS[0][1], TEXTS[2][1][:32]):
        nats = nats_by_hand(model, text, T if mode == "windows" else None)
        everything += nats
        last += [one for t, one in enumerate(nats) if t % T >= T - TRAIN]
        for t, one in enumerate(nats):
            place = t % T if mode == "windows" else t
            places.setdefault(extrapolation.place_bucket(place), []).append(one)
    assert line["tokens"] == 48
    assert line["perplexity"] == pytest.approx(math.exp(np.mean(everything)), rel=1e-5)
    assert line["bits_per_byte"] == pytest.approx(np.mean(everything) / math.log(2), rel=1e-5)
    assert line["last_perplexity"] == pytest.approx(math.exp(np.mean(last)), rel=1e-5)
    assert [one["from"] for one in line["places"]] == sorted(places)
    for one in line["places"]:
        assert one["tokens"] == len(places[one["from"]])
        assert one["perplexity"] == pytest.approx(math.exp(np.mean(places[one["from"]])), rel=1e-5)


def test_the_rise_beyond_the_trained_length(model: xLSTM, rows: list[dict[str, Any]]) -> None:
    nats = [nats_by_hand(model, text, 16) for text in (TEXTS[0][1], TEXTS[2][1][:32])]
    beyond = np.mean([one for part in nats for t, one in enumerate(part) if t % 16 >= TRAIN])
    before = np.mean([one for part in nats for t, one in enumerate(part) if TRAIN // 2 <= t % 16 < TRAIN])
    found = extrapolation.rise(rows, TRAIN)
    assert found.value == pytest.approx((beyond - before) / math.log(2), abs=1e-5)
    assert found.low <= found.value <= found.high
    apart = [nats_by_hand(model, text, TRAIN) for text in (TEXTS[0][1], TEXTS[2][1][:32])]
    whole = [nats_by_hand(model, text, None) for text in (TEXTS[0][1], TEXTS[2][1][:32])]
    gain = (np.mean(np.concatenate(whole)) - np.mean(np.concatenate(apart))) / math.log(2)
    assert extrapolation.carried(rows).value == pytest.approx(gain, abs=1e-5)
    with pytest.raises(ValueError, match="nothing was read beyond the trained length of 16"):
        extrapolation.rise(rows, 16)
    with pytest.raises(ValueError, match="train_length=6 must be a power of two"):
        extrapolation.rise(rows, 6)


def test_a_finished_document_is_not_scored_again(model: xLSTM, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    options: dict[str, Any] = {"train_length": TRAIN, "factors": (1, 4), "bytes_of": ONE}
    extrapolation.measure(model, TEXTS[:1], END, Kept(file, {}), **options)
    seen: list[tuple[int, int]] = []
    kept = Kept(file, {})
    extrapolation.measure(model, TEXTS, END, kept, progress=lambda *step: seen.append(step), **options)
    assert seen == [(1, 32)]
    fresh = Kept(None, {})
    extrapolation.measure(model, TEXTS, END, fresh, **options)
    assert kept.rows == fresh.rows


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"factors": (1, 16)}, "no document has the 64 tokens that 16 times .* the longest has 38"),
        ({"factors": (2, 3)}, "length 8 must divide the largest, 12"),
        ({"factors": ()}, "must be at least 1"),
        ({"train_length": 0}, "must be at least 1"),
    ],
)
def test_mistakes_get_a_sentence(model: xLSTM, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        extrapolation.measure(
            model, TEXTS, END, Kept(None, {}), **{"train_length": TRAIN, "factors": (1, 4), "bytes_of": ONE, **options}
        )


@pytest.mark.parametrize(("place", "edge"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 4), (255, 128), (256, 256)])
def test_places_by_powers_of_two(place: int, edge: int) -> None:
    assert extrapolation.place_bucket(place) == edge
