"""Who optimises which parameter, what Muon does to a matrix, and an average that is a function of the steps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig
from openxlstm.train import checkpoints, optim
from openxlstm.train.checkpoints import Progress
from openxlstm.train.ema import EMA
from openxlstm.train.recipe import OptimRecipe

MUON = OptimRecipe(lr=1e-2, name="muon", weight_decay=0.1)


def small(kind: str = "xlstm") -> nn.Module:
    torch.manual_seed(4)
    if kind == "large":
        return xLSTMLarge(xLSTMLargeConfig(vocab_size=11, width=16, blocks=2, heads=2))
    return xLSTM(xLSTMConfig(vocab_size=11, width=16, heads=2, pattern="ms", tie_embeddings=kind == "tied"))


def train(model: nn.Module, optimiser: optim.Optimiser, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        model(torch.randint(0, 11, (3, 6)))[0].logsumexp(-1).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("kind", ["xlstm", "tied", "large"])
def test_muon_serves_dense_matrices_and_adamw_the_rest_with_the_models_decay(kind: str) -> None:
    model = small(kind)
    optimiser = optim.build(model, MUON)
    muon, adamw = optim.parts(optimiser)
    assert (type(muon).__name__, type(adamw).__name__) == ("Muon", "AdamW")
    names = {id(weight): name for name, weight in model.named_parameters()}
    held = [names[id(weight)] for group in optimiser.param_groups for weight in group["params"]]
    assert sorted(held) == sorted(names.values()), "every parameter in one group"
    theirs = {names[id(weight)] for group in muon.param_groups for weight in group["params"]}
    assert theirs, "there are dense layers"
    assert not [name for name in theirs if "embed" in name or "head" in name or "conv" in name or name.endswith(".R")]
    decay = {id(w): group["weight_decay"] for group in model.parameter_groups(0.1) for w in group["params"]}
    for group in optimiser.param_groups:
        assert {decay[id(weight)] for weight in group["params"]} == {group["weight_decay"]}
    optim.set_rate(optimiser, 0.25)
    assert {group["lr"] for group in optimiser.param_groups} == {0.25}


def test_muon_steps_along_an_orthogonal_matrix_of_adamws_size() -> None:
    """Root mean square 0.2 of the rate (arXiv:2502.16982), nearly all singular values alike."""
    model = small("large")
    optimiser = optim.build(model, OptimRecipe(lr=1e-2, name="muon", weight_decay=0.0))
    weight = model.backbone.blocks[0].ffn.proj_down.weight
    before = weight.detach().clone()
    model(torch.randint(0, 11, (3, 6)))[0].logsumexp(-1).square().sum().backward()
    gradient = weight.grad.clone()
    optimiser.step()
    update = (weight.detach() - before) / 1e-2
    assert 0.16 < update.square().mean().sqrt() < 0.24
    assert large_directions(update) >= 12 > 4 >= large_directions(gradient)


def large_directions(matrix: Tensor) -> int:
    """Singular values within a factor of two of the largest, of 16."""
    singular = torch.linalg.svdvals(matrix)
    return int((singular > singular.max() / 2).sum())


def test_adamw_serves_all_and_the_rate_reaches_all() -> None:
    model = small()
    optimiser = optim.build(model, OptimRecipe(lr=1e-3))
    held = [id(weight) for group in optimiser.param_groups for weight in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    optim.set_rate(optimiser, 0.25)
    assert {group["lr"] for group in optimiser.param_groups} == {0.25}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_prefix_and_checkpoint_are_the_whole(tmp_path: Path, name: str) -> None:
    recipe = OptimRecipe(lr=1e-2, name=name, ema=0.9)

    def start() -> tuple[nn.Module, optim.Optimiser, EMA]:
        model = small()
        return model, optim.build(model, recipe), EMA(model, 0.9)

    def go_on(run: tuple[nn.Module, optim.Optimiser, EMA], steps: range) -> list[Tensor]:
        for step in steps:
            train(run[0], run[1], range(step, step + 1))
            run[2].update(step)
        return [*run[0].parameters(), *run[2].tensors.values()]

    want = go_on(start(), range(5))
    first = start()
    go_on(first, range(3))
    path = checkpoints.save(tmp_path, first[0], first[1], Progress(step=3), {}, ema=first[2]).wait()
    second = start()
    checkpoints.load(path, second[0], second[1], ema=second[2])
    assert all(map(torch.equal, go_on(second, range(3, 5)), want))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_save_before_the_first_step_is_no_step(tmp_path: Path, name: str) -> None:
    """Asked for the state of an optimiser without any, PyTorch takes a step of rate 0, which must not count."""
    recipe = OptimRecipe(lr=1e-2, name=name)

    def start() -> tuple[nn.Module, optim.Optimiser]:
        model = small()
        return model, optim.build(model, recipe)

    want, saved, loaded = start(), start(), start()
    path = checkpoints.save(tmp_path, *saved, Progress(), {}).wait()
    checkpoints.load(path, *loaded)
    for run in (want, saved, loaded):
        train(*run, range(3))
    for run in (saved, loaded):
        assert all(map(torch.equal, run[0].parameters(), want[0].parameters()))


def test_the_average_is_its_closed_form() -> None:
    model, decay = nn.Linear(3, 2), 0.5
    ema = EMA(model, decay)
    average = model.weight.detach().double()
    for step in range(6):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(step)
        d = min(decay, (1 + step) / (10 + step))
        average = d * average + (1 - d) * model.weight.detach().double()
    torch.testing.assert_close(ema.tensors["weight"].double(), average, rtol=1e-6, atol=1e-6)


def test_the_average_is_fp32_and_lent_to_the_model_without_a_trace() -> None:
    model = nn.Linear(3, 2).bfloat16()
    ema = EMA(model, 0.999)
    assert {average.dtype for average in ema.tensors.values()} == {torch.float32}
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(0)
    own = copy.deepcopy(model.state_dict())

    def fails_with_the_average() -> None:
        with ema.swapped():
            assert torch.equal(model.weight, ema.tensors["weight"].bfloat16())
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fails_with_the_average()
    assert all(torch.equal(model.state_dict()[name], own[name]) for name in own)
    assert model.weight.requires_grad
    assert EMA(nn.Linear(3, 2).double(), 0.9).tensors["weight"].dtype == torch.float64


def test_a_decay_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay=1\.0 must be at least 0 and below 1"):
        EMA(nn.Linear(3, 2), 1.0)
