"""Every shipped recipe loads, is the published model to the last parameter, and reads the printed number of tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from openxlstm.models.accounting import count_parameters
from openxlstm.models.presets import PRESETS
from openxlstm.train import config, estimate
from openxlstm.train.recipe import Recipe, architecture

SIZES = {  # recipe: parameters, printed or from the published shapes
    **{f"neurips-15b-{size}": PRESETS[f"xlstm-{size}"].parameters for size in ("125m", "350m", "760m", "1.3b", "2.7b")},
    **{
        f"neurips-{run}-{size}{ratio}": PRESETS[f"xlstm-{size}{ratio}"].parameters
        for run in ("15b", "300b")
        for size in ("125m", "350m", "760m", "1.3b")
        for ratio in ("", "-7-1")
    },
    "neurips-15b-compare": 409_290_112,
    "neurips-15b-compare-7-1": 408_436_048,
    "jax-mlstm-120m": 120_536_928,  # 77,266,944 of embedding and head, 768 of the last norm, 12 of 24 equal blocks
    "jax-mlstm-165m": 163_806_144,
    "jax-mlstm-1.3b": 1_422_559_616,
    "jax-mlstm-7b": 6_889_935_872,
    "jax-mlstmv1-165m": 164_073_312,  # 36,912 fewer than the ladder's: 2 x 2 x 768 gate weights, 4 biases, per block
    "jax-mlstmv1-1.3b": 1_420_839_104,
    "jax-mlstmv1-2.7b": 2_780_449_600,
    "jax-mlstmv1-7b": 6_865_424_896,
    **{f"xlstm-7b{variant}": 6_865_424_896 for variant in ("", "-long", "-ablation")},
    "dclm-83m": 83_680_848,  # printed as 83.7M
    **{f"dclm-{size}": PRESETS[f"xlstm-large-{size}"].parameters for size in ("164m", "406m", "841m", "1.4b", "2.8b")},
    "dclm-7b": 6_865_424_896,
    "stdlib-demo": 502_296,
    "stdlib-tiny": 96_648,
    "gcide-small": 1_987_640,
    "learning-xlstm": 5_299_256,
    "learning-llama": 5_246_720,
    "164m-smoke": 87_238_032,
}
TOKENS = {  # recipe: tokens in billions, as printed
    "neurips-15b-compare": 14.77,
    "neurips-300b-350m": 314.6,
    "neurips-300b-1.3b": 314.6,
    "xlstm-7b": 2296.0,  # 2,307 without the ramp
    "xlstm-7b-ablation": 159.4,
}


def resolved(name: str) -> Recipe:
    recipe, _ = estimate.read(name)
    return recipe


def test_every_shipped_recipe_is_in_the_table() -> None:
    assert set(config.shipped()) == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_builds_its_published_model(name: str) -> None:
    """On the meta device, from what the recipe resolves to; no data and no tokenizer need to be here."""
    recipe = resolved(name)
    _, build = architecture(recipe.model["architecture"])
    with torch.device("meta"):
        model = build(recipe.model_config())
    assert (
        sum(weight.numel() for weight in model.parameters()) == SIZES[name] == count_parameters(recipe.model_config())
    )
    assert recipe.title
    assert 0 < recipe.schedule().factor(0) <= 1


@pytest.mark.parametrize("name", TOKENS)
def test_a_published_run_has_its_tokens(name: str) -> None:
    recipe = resolved(name)
    assert recipe.train.steps is not None
    tokens = recipe.train.rows(recipe.train.steps) * recipe.data.context
    assert tokens / 1e9 == pytest.approx(TOKENS[name], rel=1e-3)


def test_the_rate_of_7b_is_the_released_one() -> None:
    course = resolved("xlstm-7b").schedule()
    for step, factor in ((498_000, 0.1), (500_000, 0.0991), (543_000, 0.0811)):
        assert course.factor(step) == pytest.approx(factor, abs=5e-5)
    assert course.factor(549_999) < 2e-5


def test_the_cosine_of_15b_is_stopped_before_its_floor() -> None:
    assert resolved("neurips-15b-350m").schedule().factor(28_169) == pytest.approx(0.109, abs=5e-4)


@pytest.mark.parametrize("name", sorted(set(config.shipped()) - {"stdlib-demo", "stdlib-tiny"}))
def test_every_number_of_a_published_recipe_names_its_source(name: str) -> None:
    """A source at the top, its own or its parent's, and (D) wherever it is silent."""
    text = (Path(config.find(name))).read_text()
    assert text.startswith("# ")
    if name.startswith(("neurips", "jax", "xlstm", "dclm")):
        parent = re.search(r'extends = "(.+)\.toml"', text)
        assert "arXiv:" in text or "xlstm-jax" in text or parent, f"{name} says nowhere what it repeats"


@pytest.mark.parametrize("name", ["neurips-300b-1.3b", "xlstm-7b", "gcide-small"])
def test_training_without_the_data_is_refused_with_what_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openxlstm.train.run import read_recipe

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data/(slimpajama|dclm|gcide)"):
        read_recipe(name)
