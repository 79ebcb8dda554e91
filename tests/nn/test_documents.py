"""Rows cut into documents and put together again, against a loop over tokens that says the same."""

from __future__ import annotations

import pytest
import torch

from openxlstm.nn.documents import Documents


def by_hand(reset: list[bool], mask: list[bool]) -> list[tuple[bool, list[int]]]:
    """(continues the row, places) of every document of a row, empty ones included."""
    found: list[tuple[bool, list[int]]] = [(True, [])]
    for place, (begins, exists) in enumerate(zip(reset, mask, strict=True)):
        if begins:
            found.append((False, []))
        if exists:
            found[-1][1].append(place)
    return found


@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 7), (3, 16), (5, 13)])
@pytest.mark.parametrize("odds", [0.0, 0.3, 1.0])
def test_documents_are_those_of_a_loop(B: int, T: int, odds: float) -> None:
    torch.manual_seed(B * T)
    reset, mask = torch.rand(B, T) < 0.3, torch.rand(B, T) >= odds
    cut = Documents.of(reset, mask, mask)
    x, memory = torch.randn(B, T, 3), torch.randn(B, 2)
    split = cut.split(x)
    final = torch.randn(len(split), 2)
    before, after = cut.before(memory), cut.after(memory, final)
    n = 0
    for b in range(B):
        *_, ending = documents = by_hand(reset[b].tolist(), mask[b].tolist())
        for goes_on, places in documents:
            if not places:
                continue
            assert torch.equal(split[n, : len(places)], x[b, places])
            assert not split[n, len(places) :].any()
            assert torch.equal(before[n], memory[b] if goes_on else torch.zeros(2))
            if places is ending[1]:
                assert torch.equal(after[b], final[n])
            n += 1
        if not ending[1]:
            assert torch.equal(after[b], memory[b] if ending[0] else torch.zeros(2))
    assert n == len(split)
    assert torch.equal(cut.join(split), torch.where(mask[..., None], x, 0))


def test_without_flags_a_row_is_one_document() -> None:
    x = torch.randn(3, 5, 2)
    cut = Documents.of(None, None, x[..., 0])
    assert torch.equal(cut.split(x), x)
    assert cut.goes_on.all()
    assert torch.equal(cut.after(torch.zeros(3), torch.arange(3.0)), torch.arange(3.0))


def test_no_time_is_no_document() -> None:
    cut = Documents.of(None, None, torch.zeros(2, 0))
    assert cut.join(cut.split(torch.zeros(2, 0, 4))).shape == (2, 0, 4)
    memory = torch.randn(2, 3)
    assert torch.equal(cut.after(memory, torch.zeros(0, 3)), memory)


def test_poison_where_nothing_exists_stays_there() -> None:
    x = torch.full((1, 4, 1), float("nan"), requires_grad=True)
    mask = torch.tensor([[True, False, True, False]])
    cut = Documents.of(None, mask, mask)
    real = torch.where(mask[..., None], torch.ones(1, 4, 1), x)
    out = cut.join(cut.split(real) * 2)
    assert torch.equal(out, torch.tensor([[[2.0], [0.0], [2.0], [0.0]]]))
