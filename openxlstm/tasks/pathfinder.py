"""Pathfinder: two points are marked; is one contour between them? The picture is read pixel by pixel, row by row.

Linsley et al. 2018, arXiv:1805.08315; in the Long Range Arena (Tay et al. 2020, arXiv:2011.04006) 32 x 32 grey pixels.
Two long dashed contours, shorter ones that distract, and a disc at two of the four ends: of one contour (class 1) or of
both (class 0), with equal probability. It is asked at the last pixel.

The drawing is ours, so results are of "Pathfinder (ours)". As there: 14 dashes of length 2 with gaps of 1, five
distractors of 4 dashes, discs of radius 1.5, ends at least 7 apart. Unlike there: a gap is dim and not empty, and
between contours at least one pixel is black, so that neighbouring pixels decide and no picture is ambiguous; no contour
crosses itself; and the marked ends of two contours are those about as far apart as the ends of one.

A contour grows from a random place, dash by dash, each in a direction near that of the one before; what cannot be
continued begins again elsewhere, and after some such failures the whole picture does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from openxlstm.tasks.base import NOT_ASKED, Sample, generator

DASH, GAP, STEP = 8, 4, 0.25  # points of a dash and of a gap, and their distance in pixels
DASH_GREY, GAP_GREY, DISC_GREY = 0.75, 0.3, 1.0
BEHIND = 10  # points: nearer to its end a contour does not avoid itself
TURN = 0.5  # radians to either side that a dash may turn; more where it is blocked
TRIES = 8  # directions of a dash, and
PLACES = 30  # places where a contour begins, before
PICTURES = 1000  # pictures are begun anew; less than two are needed on average


@dataclass(frozen=True, slots=True)
class Layout:
    """What is on a picture. Lengths count dashes, `apart` pixels between ends."""

    contour: int
    distractors: int
    distractor: int
    apart: float


LAYOUTS = {
    32: Layout(contour=14, distractors=5, distractor=4, apart=7.0),
    16: Layout(contour=5, distractors=2, distractor=2, apart=4.5),
    12: Layout(contour=3, distractors=1, distractor=1, apart=4.5),
}


@dataclass(frozen=True, slots=True)
class Pathfinder:
    """Pictures of `size` x `size` grey pixels as sequences of numbers from 0 to 1.

    Raises:
        ValueError: a size without a layout.
    """

    size: int = 32

    def __post_init__(self) -> None:
        if self.size not in LAYOUTS:
            raise ValueError(f"size={self.size} must be one of {', '.join(map(str, LAYOUTS))}")

    @property
    def name(self) -> str:
        """pathfinder."""
        return "pathfinder"

    @property
    def vocab_size(self) -> int:
        """Two classes: 0 not connected, 1 connected."""
        return 2

    @property
    def features(self) -> int:
        """The grey of a pixel."""
        return 1

    @property
    def chance(self) -> float:
        """Half of the pictures are connected."""
        return 1 / 2

    def sample(self, split: str, seed: int, index: int) -> Sample:
        """Sample `index` of the split. inputs float32 [size * size, 1]."""
        random = generator("pathfinder", split, seed, index)
        connected = bool(random.random() < 0.5)
        pictures = (_contours(random, self.size, LAYOUTS[self.size]) for _ in range(PICTURES))
        contours = next(picture for picture in pictures if picture is not None)
        a, b = contours[:2]
        marked = (a[0], a[-1]) if connected else _as_far(a, b, self.size)
        targets = np.full(self.size * self.size, NOT_ASKED, dtype=np.int64)
        targets[-1] = int(connected)
        return Sample(_draw(contours, marked, self.size).reshape(-1, 1), targets)


Points = list[int]  # pixel numbers on a canvas with a border of two


def _contours(random: np.random.Generator, size: int, layout: Layout) -> list[Points] | None:
    """All contours of a picture, the two long ones first; None if they found no room."""
    side = size + 4
    taken = bytearray(side * side)  # where another contour may not go: on or beside one that is there
    found: list[Points] = []
    ends: list[tuple[int, int]] = []
    for dashes in [layout.contour] * 2 + [layout.distractor] * layout.distractors:
        long = len(found) < 2
        for _ in range(PLACES):
            points = _grow(random.random(3 + TRIES * dashes).tolist(), taken, size, dashes)
            if points is None:
                continue
            new = [divmod(points[0], side), divmod(points[-1], side)]
            others = [*ends, *new]
            if not long or (_room_for_discs(points, taken, side) and _apart(others, layout.apart)):
                break
        else:
            return None
        _take(taken, dict.fromkeys(points), side)
        if long:
            ends = others
            for point in (points[0], points[-1]):  # a disc may come here
                for row in range(point - 2 * side, point + 3 * side, side):
                    taken[row - 2 : row + 3] = b"\1\1\1\1\1"
        found.append(points)
    return found


def _as_far(a: Points, b: Points, size: int) -> tuple[int, int]:
    """An end of each contour: of the four pairs the one most nearly as far apart as the ends of the first contour.

    Else the distance of the discs would tell connected pictures from others, in two of three.
    """
    place = {point: divmod(point, size + 4) for point in (a[0], a[-1], b[0], b[-1])}
    own = math.dist(place[a[0]], place[a[-1]])
    pairs = [(x, y) for x in (a[0], a[-1]) for y in (b[0], b[-1])]
    return min(pairs, key=lambda pair: abs(math.dist(place[pair[0]], place[pair[1]]) - own))


def _room_for_discs(points: Points, taken: bytearray, side: int) -> bool:
    """Whether discs at both ends would touch nothing."""
    return not any(
        any(taken[row - 1 : row + 2]) for end in (points[0], points[-1]) for row in (end - side, end, end + side)
    )


def _apart(ends: list[tuple[int, int]], distance: float) -> bool:
    """Whether all ends are at least so far from each other."""
    return all(math.dist(a, b) >= distance for k, a in enumerate(ends) for b in ends[:k])


def _take(canvas: bytearray, pixels: Iterable[int], side: int) -> None:
    """Mark the pixels and their neighbours."""
    for pixel in pixels:
        for row in (pixel - side, pixel, pixel + side):
            canvas[row - 1 : row + 2] = b"\1\1\1"


def _grow(uniform: list[float], taken: bytearray, size: int, dashes: int) -> Points | None:
    """The points of one contour, none of them on what is taken; None if it gets stuck."""
    side = size + 4
    x, y, direction = 3 + uniform.pop() * (size - 3), 3 + uniform.pop() * (size - 3), uniform.pop() * 2 * math.pi
    low, high = 2.5, size + 0.5  # the border of the picture stays free, so that discs are whole
    points: Points = []
    own = bytearray(len(taken))  # where it may not go itself: beside what is well behind
    avoided = 0
    for dash in range(dashes):
        count = DASH + 1 if dash == 0 else GAP + DASH
        for attempt in range(TRIES):
            angle = direction + (2 * uniform.pop() - 1) * TURN * (1 + attempt / 4)
            dx, dy = STEP * math.cos(angle), STEP * math.sin(angle)
            if not (low < x + count * dx < high and low < y + count * dy < high):
                continue
            new = [int(y + k * dy + 0.5) * side + int(x + k * dx + 0.5) for k in range(1, count + 1)]
            if not any(taken[point] or own[point] for point in new):
                break
        else:
            return None
        points += new
        x, y, direction = x + count * dx, y + count * dy, angle
        behind = max(len(points) - BEHIND, 0)
        _take(own, dict.fromkeys(points[avoided:behind]), side)
        avoided = behind
    return points


def _draw(contours: list[Points], marked: tuple[int, int], size: int) -> np.ndarray:
    """float32 [size, size]. Dashes are as bright as they are long in a pixel, gaps dim."""
    side = size + 4
    points = np.concatenate(contours)
    number = np.concatenate([np.arange(len(contour)) for contour in contours])
    within = (number - DASH - 1) % (DASH + GAP)
    dash = (number <= DASH) | (within >= GAP)
    length = np.bincount(points[dash], minlength=side * side) * STEP
    grey = np.where(length > 0, DASH_GREY * np.clip(0.5 + length / 2, 0, 1), 0.0)
    grey = np.maximum(grey, np.where(np.bincount(points, minlength=side * side) > 0, GAP_GREY, 0.0))
    for point in marked:
        for row in (point - side, point, point + side):  # of radius 1.5: three by three pixels
            grey[row - 1 : row + 2] = DISC_GREY
    return grey.reshape(side, side)[2:-2, 2:-2].astype(np.float32)
