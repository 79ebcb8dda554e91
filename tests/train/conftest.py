"""What the tests of train/ share: a corpus of a few kilobytes and a recipe that runs on it in a second."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """
title = "A run for tests"
[model]
width = 16
heads = 2
pattern = "ms"
dropout = 0.1
[data]
corpus = "texts"
context = 24
[train]
steps = 12
batch = 6
micro_batch = 3
seed = 5
[optim]
lr = 1e-2
[optim.schedule]
warmup = 3
[evaluate]
every = 5
windows = 4
yardsticks = false
[checkpoint]
every = 4
"""


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty small documents, so that each split gets some."""
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    folder.mkdir()
    for number in range(60):
        words = " ".join(f"word{number * step % 17}" for step in range(3 + number % 11))
        (folder / f"{number}.txt").write_text(f"text {number}: {words}\n")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def recipe_file(texts: Path) -> Path:
    """A recipe beside the corpus: its relative path counts from there."""
    file = texts.parent / "small.toml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="session")
def train_small(recipe_file: Path, cache: Path) -> Callable[..., str]:
    """train_small(folder, *overrides) trains in this process and returns how it ended."""
    from openxlstm.train.log import Silent
    from openxlstm.train.loop import train
    from openxlstm.train.run import read_recipe

    def run(folder: Path, *overrides: str) -> str:
        recipe, tokenizer = read_recipe(str(recipe_file), overrides)
        return train(recipe, tokenizer, folder, cache, Silent(), lambda model, tokenizer: "a sample ``` of text")

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, train_small: Callable[..., str]) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train_small(folder) == "done"
    return folder


@pytest.fixture
def whole(tmp_path: Path, trained: Path) -> Path:
    """A run that nothing interrupted; a copy that the test may spoil."""
    return shutil.copytree(trained, tmp_path / "whole")
