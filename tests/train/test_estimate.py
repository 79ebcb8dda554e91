"""Estimates against what happens: kept tensors, peak memory of a real step, closed sums, and data that are here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.autograd.graph import saved_tensors_hooks

from openxlstm.cli import main
from openxlstm.data.prepare import prepare_corpus
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig
from openxlstm.train.activations import kept
from openxlstm.train.estimate import DOCUMENT, estimate, first_window, read
from openxlstm.train.gpus import GPUS

SMALL = [
    xLSTMConfig(vocab_size=11, width=32, heads=2, pattern="ms"),
    xLSTMConfig(vocab_size=11, width=32, heads=2, pattern="sss", conv=0, dropout=0.1),
    xLSTMLargeConfig(vocab_size=11, width=32, heads=2, blocks=3),
]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.label)
def test_what_is_kept_is_what_autograd_keeps(config: xLSTMConfig | xLSTMLargeConfig, bf16: bool) -> None:
    """The same count on real tensors: every storage that is not a parameter, once, over all blocks."""
    model = xLSTM(config) if isinstance(config, xLSTMConfig) else xLSTMLarge(config)
    stack = model.stack if isinstance(model, xLSTM) else model.backbone
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    x = torch.randn(3, 70, 32, requires_grad=True)
    reset = torch.zeros(3, 70, dtype=torch.bool)
    with saved_tensors_hooks(count, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for block in stack.blocks:
            x, _ = block(x, None, reset, None)
    assert kept(config, 3, 70, bf16=bf16).blocks == pytest.approx(sum(found.values()), rel=0.02)


def test_recomputed_blocks_keep_their_input_only() -> None:
    config = SMALL[2]
    all_kept, none_kept = (kept(config, 2, 50, bf16=False, checkpoint_every=n) for n in (0, 1))
    assert none_kept.blocks == 3 * 4 * 2 * 50 * 32
    assert none_kept.working == 2 * all_kept.working
    assert (
        kept(config, 2, 50, bf16=False, checkpoint_every=2).blocks == 2 * none_kept.blocks // 3 + all_kept.blocks // 3
    )


MEASURE = """
import json, resource, sys
import torch
from openxlstm.train import optim
from openxlstm.train.objective import Objective
from openxlstm.train.recipe import ARCHITECTURES
from openxlstm.train.estimate import estimate, read
torch.set_num_threads(1)
recipe, _ = read(sys.argv[1], sys.argv[2:])
said = estimate(recipe)["memory"]["total"]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def step(rows):
    tokens = torch.randint(0, 256, (rows, recipe.data.context))
    flags = torch.zeros_like(tokens, dtype=torch.bool)
    objective = Objective(model, recipe.loss)
    loss, _, _ = objective(tokens, tokens, flags, ~flags, torch.ones(257, dtype=torch.long), torch.tensor(1e-5))
    loss.backward()
_, build = ARCHITECTURES[recipe.model["architecture"]]
model = build(recipe.model_config()); step(1); model = None       # libraries are loaded, caches are warm
before = resident()
model = build(recipe.model_config())
optimiser = optim.build(model, recipe.optim)
step(recipe.train.batch); optimiser.step(); optimiser.zero_grad(set_to_none=True)
step(recipe.train.batch)
high = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
peak = int(high.split()[1]) * 1024 - before           # not ru_maxrss: a child begins with its parent's
print(json.dumps([said, peak]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
@pytest.mark.parametrize(
    "model",
    [
        ["model.pattern=mmmm", "model.width=192"],
        ["model.pattern=ssss", "model.width=192"],
    ],
    ids=["mLSTM", "sLSTM"],
)
def test_memory_of_a_real_step_is_what_was_estimated(model: list[str], record_property) -> None:
    """Peak resident size of two optimiser steps in a process of their own, above what the libraries take."""
    said = [*model, "train.batch=8", "data.context=256"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "stdlib-demo", *said], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    estimated, measured = json.loads(done.stdout.splitlines()[-1])
    ratio = measured / estimated
    record_property(
        "measured", f"memory of a step, {' '.join(model)}: {measured / 2**20:.0f} MiB, {ratio:.2f} of it estimated"
    )
    assert 0.7 < ratio < 1.4


def test_what_a_run_needs_is_summed_up() -> None:
    recipe, _ = read("neurips-300b-1.3b")
    N, D, W = 1_422_559_616, 2048, 50_304
    found = estimate(recipe, gpus=64, gpu=GPUS["h100"], mfu=0.4)
    memory = found["memory"]
    assert memory["weights"] == memory["gradients"] == 4 * N // 64
    assert memory["optimiser"] == 8 * N // 64
    assert memory["loss"] == 2 * 4 * 2048 * W + 2 * 2 * 8 * 2048 * D + 4 * W * D
    assert memory["total"] == sum(memory[name] for name in memory if name not in ("total", "device", "fits"))
    assert found["parallel"] | {"kind": "fsdp2", "shard": 64, "rows": 8, "accumulation": 1} == found["parallel"]
    assert found["work"]["tokens"] == 512 * 300_000 * 2048
    seconds = found["work"]["flops"] / (64 * 989.4e12 * 0.4)
    assert found["time"]["seconds"] == pytest.approx(seconds)
    assert found["time"]["gpu_hours"] == pytest.approx(64 * seconds / 3600)
    assert found["checkpoint"]["bytes"] == 12 * N
    assert found["data"][0]["here"] is False


def test_choices_of_the_recipe_change_the_memory() -> None:
    base = estimate(read("dclm-164m")[0], gpus=8)["memory"]
    ema = estimate(read("dclm-164m", ["optim.ema=0.999"])[0], gpus=8)["memory"]
    assert ema["optimiser"] - base["optimiser"] == 4 * 164_110_224 // 8
    lean = estimate(read("dclm-164m", ["loss.recompute=true", "loss.chunk=1024"])[0], gpus=8)["memory"]
    assert base["loss"] - lean["loss"] == 4 * 50_304 * 768 + 8 * 1024 * 50_304
    hybrid = estimate(read("dclm-164m", ["train.shard=2"])[0], gpus=8)["memory"]
    assert hybrid["weights"] == 4 * base["weights"]
    ddp = estimate(read("dclm-164m", ['train.parallel="ddp"'])[0], gpus=8)["memory"]
    assert (ddp["weights"], ddp["gathered"]) == (4 * 164_110_224, 0)
    muon = estimate(read("dclm-164m", ['optim.name="muon"'])[0], gpus=8)["memory"]
    assert base["optimiser"] / 2 < muon["optimiser"] < base["optimiser"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mfu": 1.5}, r"mfu=1.5 must be above 0 and at most 1"),
        ({"gpus": 0}, r"gpus=0 must be at least 1"),
        ({"gpus": 7}, r"train.batch = 256 cannot be dealt to 7 GPUs by 36 rows; 8 GPUs would do"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        estimate(read("neurips-15b-350m")[0], **options)


def test_one_device_is_not_many_and_shards_divide() -> None:
    with pytest.raises(ValueError, match=r'"single" uses one GPU, and 2 were given'):
        estimate(read("neurips-15b-350m", ['train.parallel="single"'])[0], gpus=2)
    with pytest.raises(ValueError, match=r"train.shard = 3 must divide the 8 GPUs; nearest is"):
        estimate(read("neurips-15b-350m", ["train.shard=3"])[0], gpus=8)


def test_an_architecture_to_compare_with_is_refused() -> None:
    recipe, _ = read("stdlib-tiny")
    other = replace(recipe, model={"architecture": "llama"})
    with pytest.raises(ValueError, match=r"model.architecture = 'llama' cannot be estimated; only xlstm, xlstm_large"):
        estimate(other)


def test_a_missing_tokenizer_needs_a_vocabulary(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        '[model]\nwidth = 16\npattern = "m"\n[data]\ntokenizer = "t.json"\n'
        "[train]\nsteps = 1\nbatch = 1\n[optim]\nlr = 1.0\n"
    )
    with pytest.raises(ValueError, match=r"r.toml: data.tokenizer = .*t.json' is not here, so the recipe must say"):
        read(str(file))
    assert read(str(file), ["model.vocab_size=300"])[0].model["vocab_size"] == 300


def test_data_that_are_here_are_opened_and_shown(texts: Path, cache: Path, recipe_file: Path) -> None:
    prepared = prepare_corpus(texts, cache, Tokenizer.bytes())
    recipe, tokenizer = read(str(recipe_file), [f'data.corpus="{prepared}"'])
    (row,) = estimate(recipe, tokenizer=tokenizer)["data"]
    assert row["epochs"] == pytest.approx(12 * 6 * 24 / row["tokens"])
    assert row["first_window"].startswith(DOCUMENT + "text ")
    folder = TokenFolder.open(prepared / "train")
    whole = list(folder.texts())
    shown = first_window(folder, len(whole[0]) + 1 + len(whole[1]))
    assert shown == "".join(DOCUMENT + text.decode() for text in whole[:2])


def test_the_verb_shows_and_prints_json() -> None:
    said = ["estimate", "neurips-15b-125m", "train.micro_batch=8", "--gpus", "8", "--gpu", "h100", "--mfu", "0.3"]
    shown = CliRunner().invoke(main, said)
    assert shown.exit_code == 0, shown.output
    for words in ("163,806,144 parameters", "GPU hours", "not on this machine", "it fits", "fsdp2 on 8"):
        assert words in shown.output
    found = json.loads(CliRunner().invoke(main, [*said, "--json"]).output)
    assert found["time"]["mfu"] == 0.3
    refused = CliRunner().invoke(main, [*said[:-4], "--gpu", "h10"])
    assert refused.exit_code == 2
    assert "did you mean 'h100'?" in refused.output
