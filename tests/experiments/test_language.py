"""Language models beyond the trained length: by hand, and of models whose forgetting is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from copy_task import line
from models.small_models import awake

from openxlstm.experiments import choice, language, report
from openxlstm.experiments.language import RISE, WINDOWS, TextPlan
from openxlstm.experiments.results import Metric
from openxlstm.models.interface import ModelState
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.tasks import scoring

END = 256
CONFIG = xLSTMConfig(vocab_size=257, width=12, heads=3, pattern="ms", mlstm_width=24)
PLAN = TextPlan(
    corpus="stdlib", models=("ms",), width=12, blocks=2, heads=3, context=32, batch=1, steps=1, rates=(1e-2,),
    seeds=(1,), tested_to=128, stride=16, test_bytes=1000,
)  # fmt: skip
EASY, HARD = list(b"ab" * 32), list(b"azbycxdw" * 8)
TEXT = [*EASY, *HARD]  # 128 bytes; what follows a letter of the second half was never learned


class Repeats(xLSTM):
    """After "a" it expects "b" and after "b" "a", whatever came before; after `tired` tokens it expects nothing."""

    def __init__(self, tired: int = 1000) -> None:
        super().__init__(CONFIG)
        self.tired = tired
        self.eval()

    def features(self, tokens, state=None, *, reset=None, mask=None):
        assert state is None, "every window is read at once"
        other = torch.where(tokens == ord("a"), ord("b"), ord("a"))
        rested = torch.arange(tokens.shape[1]) < self.tired
        return 5.0 * torch.nn.functional.one_hot(other, 257) * rested[:, None], ModelState(())

    def logits(self, hidden):
        return hidden


def test_texts_differ_by_more_than_a_model_rises() -> None:
    found = language._by_position(Repeats(), [[END, *TEXT]], PLAN)
    beyond, within = found["positions, to 128"].value, found["positions, to 32"].value
    assert beyond - within > 4
    assert found[RISE].value == 0.0
    assert found[RISE].n == 32


def test_what_fails_beyond_the_trained_length_rises_by_as_much_as_it_loses() -> None:
    found = language._by_position(Repeats(tired=32), [[END, *EASY, *EASY]], PLAN)
    known = math.log2(1 + 256 * math.exp(-5))  # bits of a byte that was expected
    assert found["positions, to 128"].value == pytest.approx(math.log2(257))
    assert found[RISE].value == pytest.approx(math.log2(257) - known, abs=1e-6)


def test_every_byte_beyond_is_read_again_from_near() -> None:
    torch.manual_seed(0)
    model = awake(xLSTM(CONFIG)).double().eval()
    documents = [[*TEXT, *HARD, *EASY, 1, 2], TEXT[:100], TEXT]  # the second is too short for a window
    windows = language._whole_windows(documents, 128, END)
    assert [row[0] for row in windows] == [END, TEXT[-1], END]
    assert [row[1:] for row in windows] == [TEXT, [*HARD, *EASY], TEXT]
    near = language._near(model, windows, PLAN)
    far = language._bits(model, windows, 128)
    assert near.shape == (3, 96)
    for row, bits, whole in zip(windows, near, far, strict=True):
        for place in range(32, 128):
            begin = place // 16 * 16 - 16  # the window of 32 in whose second half it is
            (alone,) = scoring.token_nats(model, [row[begin : place + 2]])
            assert bits[place - 32] == pytest.approx(alone[-1] / math.log(2), abs=1e-9)
        (alone,) = scoring.token_nats(model, [row])
        np.testing.assert_allclose(whole, alone / math.log(2), atol=1e-9)
    metrics, _ = language.measure(model, documents, PLAN, END, carries=True)
    buckets = [(far[:, 32:64] - near[:, :32]).mean(), (far[:, 64:] - near[:, 32:]).mean()]
    assert metrics[RISE].value == pytest.approx(max(buckets), abs=1e-9)
    assert max(buckets) != pytest.approx(min(buckets), abs=1e-6)


def test_without_a_whole_window_there_is_no_position() -> None:
    metrics, bits = language.measure(Repeats(), [EASY], PLAN, END, carries=False)
    assert set(metrics) == {WINDOWS}
    assert len(bits) == 1


@pytest.mark.parametrize("stride", [0, 33, 20])
def test_a_stride_that_leaves_bytes_out_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride={stride} must be at most context=32 and divide"):
        replace(PLAN, stride=stride)


def contestant(**bits: list[float]) -> choice.Entry:
    """Documents of 10, 20 and 30 bytes, or the first of them alone, and what each cost; a run per seed."""
    runs = []
    for seed, costs in bits.items():
        sizes = [10.0, 20.0, 30.0][: len(costs)]
        metrics = {WINDOWS: Metric(sum(costs) / sum(sizes), len(costs)), RISE: Metric(costs[0], 1)}
        curve = {"document bits": costs, "document bytes": sizes}
        runs.append(line(seed=int(seed[1:]), metrics=metrics, curve=curve))
    return choice.entries(runs)[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "metric", "said"),
    [
        ({"s1": [20.0, 40.0, 60.0]}, {"s1": [10.0, 20.0, 30.0]}, WINDOWS, "+1.000 (+1.000 to +1.000, over documents)"),
        ({"s1": [20.0, 40.0, 60.0]}, {"s1": [10.0, 20.0, 30.0]}, RISE, "+10.000"),
        ({"s1": [20.0]}, {"s1": [10.0]}, WINDOWS, "+1.000"),
        ({"s1": [9.0], "s2": [15.0]}, {"s2": [10.0], "s3": [1.0]}, WINDOWS, "+0.500"),
        ({"s1": [9.999]}, {"s1": [10.0]}, WINDOWS, "+0.000"),
        ({"s1": [9.0]}, {"s2": [10.0]}, WINDOWS, "–"),
        ({"s1": [11.0], "s2": [12.0]}, {"s1": [10.0], "s2": [11.0]}, WINDOWS, "+0.100 (+0.100 to +0.100)"),
    ],
    ids=["documents", "of windows alone", "one document", "one seed of both", "nought", "none", "seeds"],
)
def test_a_difference_has_the_interval_that_its_runs_give(ours, theirs, metric, said) -> None:
    assert report._difference(contestant(**ours), contestant(**theirs), metric, metric == WINDOWS) == said
