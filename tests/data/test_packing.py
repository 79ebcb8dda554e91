"""Plans: every piece in one row, rows as full as best-fit makes them, and stored so that damage is noticed."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import numbered

from openxlstm.data.packing import best_fit, pieces, plan


def one_by_one(lengths: list[int], context: int) -> list[list[int]]:
    """Best-fit decreasing as the textbook has it: the lengths in each row."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= context]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@given(data=st.data(), context=st.integers(1, 40))
@settings(deadline=None)
def test_groups_of_rows_are_filled_as_single_rows_are(data, context):
    lengths = data.draw(st.lists(st.integers(1, context), min_size=1, max_size=120))
    filled = np.bincount(best_fit(np.array(lengths), context), lengths)
    assert sorted(filled.tolist()) == sorted(map(sum, one_by_one(lengths, context)))  # equally full rows are alike


@pytest.mark.parametrize("context", [1, 7, 64])
def test_pieces_are_the_documents(context):
    lengths = [3, 64, 1, 130, 7, 65]
    folder = numbered([lengths[:4], lengths[4:]])
    start, length = pieces(folder, context)
    assert np.array_equal(np.sort(start), np.unique(start))
    assert np.array_equal(start[1:], (start + length)[:-1]), "they follow one another without a gap"
    assert length.sum() == sum(lengths)
    assert length.max() <= context
    borders = set(np.cumsum(lengths).tolist())
    inner = [end for end in (start + length).tolist() if end not in borders]
    assert len(inner) == sum(-(-n // context) - 1 for n in lengths), "only documents longer than a row are cut"


def test_many_short_documents_leave_almost_no_room(record_property):
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 200_000).astype(np.int64).clip(1, 2048)
    row_of = best_fit(lengths, 2048)
    filled = np.bincount(row_of, lengths)
    assert filled.max() <= 2048
    share = lengths.sum() / (2048 * len(filled))
    record_property("measured", f"best-fit packing of 200,000 log-normal documents: {100 * share:.2f} % of places used")
    assert share > 0.999


def test_a_plan_is_kept_and_belongs_to_its_data(tmp_path):
    folder = numbered([[5, 3, 8, 20, 1], [9, 2]])
    made = plan(folder, 8, "best_fit", tmp_path)
    (file,) = tmp_path.iterdir()
    stamp = os.stat(file).st_mtime_ns
    again = plan(folder, 8, "best_fit", tmp_path)
    without = plan(folder, 8, "best_fit")
    for other in (again, without):
        assert np.array_equal(made.rows, other.rows)
        assert np.array_equal(made.starts, other.starts)
    assert os.stat(file).st_mtime_ns == stamp, "it was not made twice"
    plan(folder, 9, "best_fit", tmp_path)
    plan(folder, 8, "one_per_row", tmp_path)
    plan(numbered([[5]], name="other"), 8, "best_fit", tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_plan_never_changes():
    """Rows of a stored plan: a sample id must mean the same tokens in every version."""
    made = plan(numbered([[5, 3, 8, 20, 1], [9, 2]]), 8, "best_fit")
    assert made.rows.tolist() == [0, 1, 2, 3, 4, 6, 10]
    assert made.starts.tolist() == [8, 16, 24, 37, 0, 5, 32, 36, 45, 46]  # 8 8 8 8 | 5 + 3 | 4 + 1 + 1 + 2


@pytest.mark.parametrize("damage", ["cut", "rows", "kind", "empty"])
def test_a_damaged_plan_is_refused_by_name(tmp_path, damage):
    folder = numbered([[5, 3, 8]])
    plan(folder, 8, "best_fit", tmp_path)
    (file,) = tmp_path.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        stored = np.load(file)
        np.save(file, stored[:-1] if damage == "rows" else stored.astype(np.float64))
    with pytest.raises(ValueError, match=rf"{file.name} is damaged.*delete it"):
        plan(folder, 8, "best_fit", tmp_path)


def test_nonsense_is_refused_by_name():
    with pytest.raises(ValueError, match="context=0 must be at least 1"):
        plan(numbered([[5]]), 0, "best_fit")
