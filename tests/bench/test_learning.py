"""The learning check: both models through the same small door, rates that move outward, a page made of run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openxlstm.bench import learning
from openxlstm.train.log import Silent

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


def test_the_best_rate_is_that_of_the_lowest_validation() -> None:
    rows = [
        {"values": {"optim.lr": rate}, "valid_bits_per_byte": value}
        for rate, value in (("1e-3", 2.5), ("2e-3", 2.4), ("4e-3", None))
    ]
    assert learning.chosen(rows) == "2e-3"


def test_the_grid_is_extended_while_the_best_is_at_an_edge(monkeypatch, tmp_path: Path) -> None:
    """The lower the better here: the search goes down and ends where no further rate is known."""
    asked: list[list[str]] = []

    def sweep(recipe, overrides, grid, seeds, out, display):
        asked.append(list(grid["optim.lr"]))
        return [{"values": {"optim.lr": rate}, "valid_bits_per_byte": float(rate)} for rate in grid["optim.lr"]]

    trained: list[Path] = []
    monkeypatch.setattr(learning, "sweep", sweep)
    monkeypatch.setattr(learning, "read_recipe", lambda name, said: (said[-1], None))
    monkeypatch.setattr(learning, "train", lambda recipe, tokenizer, folder, *rest: trained.append(folder))
    learning.check("stdlib", "llama", tmp_path / "stdlib-llama", Silent())
    assert asked == [
        ["1e-3", "2e-3", "4e-3"], ["5e-4", "1e-3", "2e-3", "4e-3"], ["2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3"],
        ["1.25e-4", "2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3"],
    ]  # fmt: skip
    assert trained == [tmp_path / "stdlib-llama" / "final-1.25e-4"]


@pytest.mark.slow
def test_two_small_runs_make_a_page(monkeypatch, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"document {number}: " + "words that repeat, " * 40)
    monkeypatch.setattr(learning, "TUNING", 2)
    monkeypatch.setattr(learning, "LOWER", {})
    monkeypatch.setattr(learning, "HIGHER", {})
    real = learning.read_recipe

    def smaller(name: str, said: list[str]):
        sizes = {
            "learning-xlstm": ["model.width=16", "model.heads=2", "model.pattern=ms"],
            "learning-llama": ["model.width=16", "model.heads=2", "model.blocks=1", "model.ffn_width=16"],
        }[name]
        budget = ["data.context=16", "train.batch=2", "evaluate.windows=2", "checkpoint.every=2"]
        steps = [] if any(word.startswith("train.steps") for word in said) else ["train.steps=4", "evaluate.every=2"]
        return real(name, [*said, *sizes, *budget, *steps])

    monkeypatch.setattr(learning, "read_recipe", smaller)
    monkeypatch.setattr("openxlstm.train.sweep.read_recipe", smaller)
    for model in learning.MODELS:
        learning.check(str(texts), model, tmp_path / "out" / f"words-{model}", Silent())
        learning.check(str(texts), model, tmp_path / "out" / f"words-{model}", Silent())  # finished: nothing happens
    text = learning.page(tmp_path / "out", tmp_path / "images", "the command")
    assert (tmp_path / "images" / "learning-words.png").stat().st_size > 10_000
    for model in learning.MODELS:
        summary = next((tmp_path / "out" / f"words-{model}").glob("final-*/summary.json"))
        said = json.loads(summary.read_text())
        assert f"**{said['held_out']['bits_per_byte']:.3f}**" in text
        assert f"{said['model']['parameters']:,}" in text
    with pytest.raises(ValueError, match="no finished run"):
        learning.page(tmp_path / "empty", tmp_path / "images", "the command")
