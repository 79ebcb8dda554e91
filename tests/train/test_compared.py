"""The loop trains what xLSTMs are compared with, from a recipe alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from openxlstm.train.finished import load_finished
from openxlstm.train.log import Silent, read_journal
from openxlstm.train.loop import train
from openxlstm.train.recipe import COMPARED, architecture
from openxlstm.train.run import read_recipe

SIZES = {
    "lstm": "blocks = 2",
    "lstm_block": "blocks = 2\nffn_width = 24\ndropout = 0.1",
    "llama": "blocks = 1\nheads = 2\nffn_width = 24",
    "mamba2": "blocks = 1\nheads = 4\nstate = 8",
    "rwkv4": "blocks = 2\nffn_width = 24",
}
RECIPE = """
title = "A run for tests"
[model]
architecture = "{name}"
width = 16
{sizes}
[data]
corpus = "texts"
context = 16
[train]
steps = 6
batch = 4
micro_batch = 2
[optim]
lr = 1e-2
[evaluate]
every = 3
windows = 4
yardsticks = false
"""


@pytest.mark.parametrize("name", COMPARED)
def test_it_trains_and_leaves_its_files(name: str, texts: Path, cache: Path, tmp_path: Path) -> None:
    file = texts.parent / f"{name}.toml"
    file.write_text(RECIPE.format(name=name, sizes=SIZES[name]))
    recipe, tokenizer = read_recipe(str(file), ())
    folder = tmp_path / "run"
    assert train(recipe, tokenizer, folder, cache, Silent(), lambda model, tokenizer: "a sample") == "done"
    losses = [line["loss"] for line in read_journal(folder / "train.jsonl") if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert json.loads((folder / "summary.json").read_text())["held_out"]["bits_per_byte"] > 0
    assert (folder / "model" / "model.safetensors").is_file()
    model = load_finished(folder / "model")
    assert not model.training
    assert type(model) is architecture(name)[1]
    assert torch.isfinite(model(torch.zeros(1, 3, dtype=torch.long))[0]).all()
