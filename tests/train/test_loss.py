"""Scores add up, bits per byte count bytes, portions are portions, and seeds are the same for ever."""

from __future__ import annotations

import math

import numpy as np
import torch

from openxlstm.data.windows import Batch
from openxlstm.train.loss import Rows, Score, derived


def test_portions_are_the_rows_in_order() -> None:
    draw = np.random.default_rng(1)
    batch = Batch(*draw.integers(0, 9, (2, 7, 5)), *(draw.random((2, 7, 5)) < 0.5))
    rows = Rows.of(batch, torch.device("cpu"))
    for size, lengths in ((1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (9, [7])):
        parts = list(rows.split(size))
        assert [len(part.tokens) for part in parts] == lengths
        for name in ("tokens", "targets", "reset", "valid"):
            whole = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(whole, torch.from_numpy(getattr(batch, name))), name


def test_scores_add_up() -> None:
    first = Score.of(torch.tensor([6.0, 4, 5.0, 3, 0.5], dtype=torch.float64))
    both = first + Score.of(torch.tensor([2.0, 1, 2.0, 2, 0.25], dtype=torch.float64))
    assert both == Score(nats=8.0, tokens=5, byte_nats=7.0, bytes=5, z=0.75)
    assert both.loss == 8 / 5
    assert math.isclose(both.bits_per_byte, 7 / 5 / math.log(2))
    assert both + Score() == both
    assert (Score().loss, Score().bits_per_byte) == (0.0, 0.0), "nothing counted is nothing, not an error"


def test_seeds_are_the_same_for_ever() -> None:
    assert derived(1, 2) == 8854627303482016855, "a stored run would read other dropout masks"
    assert len({derived(0, step) for step in range(1000)}) == 1000
    assert derived(1, 2) != derived(12)
