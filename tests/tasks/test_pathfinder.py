"""Pathfinder against a flood fill, and what is on its pictures."""

from __future__ import annotations

import numpy as np
import pytest
import solvers

from openxlstm.tasks.base import NOT_ASKED, Task, batch
from openxlstm.tasks.floors import floor
from openxlstm.tasks.pathfinder import LAYOUTS, Pathfinder


@pytest.mark.parametrize(("size", "samples"), [(12, 300), (16, 120), (32, 60)])
def test_a_flood_fill_gives_the_same_label(size, samples):
    task = Pathfinder(size)
    assert isinstance(task, Task)
    labels, lit = [], 0.0
    for index in range(samples):
        sample = task.sample("train", 0, index)
        assert sample.inputs.shape == (size * size, 1)
        assert (sample.inputs.dtype, sample.targets.dtype) == (np.float32, np.int64)
        assert sample.inputs.min() == 0
        assert sample.inputs.max() == 1
        assert (sample.targets[:-1] == NOT_ASKED).all()
        assert sample.targets[-1:].tolist() == solvers.pathfinder(sample.inputs), index
        labels.append(int(sample.targets[-1]))
        lit += float((sample.inputs > 0).mean()) / samples
    assert abs(np.mean(labels) - 0.5) < 2.5 / samples**0.5
    assert 0.15 < lit < 0.45


@pytest.mark.parametrize("size", LAYOUTS)
def test_every_contour_is_a_component(size):
    """Two contours and the distractors, nothing joined: as many components as the layout has."""
    for index in range(30):
        inputs = Pathfinder(size).sample("test", 0, index).inputs
        lit = {divmod(place, size) for place in np.flatnonzero(inputs > 0).tolist()}
        components = 0
        while lit:
            todo, components = [lit.pop()], components + 1
            while todo:
                row, column = todo.pop()
                near = {(row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & lit
                lit -= near
                todo += near
        assert components == 2 + LAYOUTS[size].distractors


@pytest.mark.parametrize("size", LAYOUTS)
def test_distance_of_the_discs_says_little(size):
    """A rule fitted to it is right in less than two of three."""
    best = floor(Pathfinder(size), "test", 0, {32: 100, 16: 120, 12: 160}[size])[0]
    assert best.score < 0.68


def test_pictures_make_batches_and_differ():
    side_by_side = batch(Pathfinder(12), "validation", 3, [0, 1, 0])
    assert side_by_side.inputs.shape == (3, 144, 1)
    assert side_by_side.asked.sum(1).tolist() == [1, 1, 1]
    assert (side_by_side.inputs[0] == side_by_side.inputs[2]).all()
    assert (side_by_side.inputs[0] != side_by_side.inputs[1]).any()
    with pytest.raises(ValueError, match=r"size=28 must be one of 32, 16, 12"):
        Pathfinder(28)
