"""What a run will need, before money is spent: from the recipe and the shapes alone, nothing is allocated.

    time       3 x forward FLOPs per token x tokens / (GPUs x peak x share of the peak that is reached)
    memory     of one process, at its largest: between forward and backward pass

        weights       4 bytes per parameter          divided by `shard` under fsdp2
        gradients     4 bytes per parameter          divided by `shard` under fsdp2
        optimiser     8 (AdamW), 4 (matrices of Muon); an average of the weights 4 more; divided likewise
        gathered      fsdp2 only: embedding and head, and the two largest blocks, in the dtype of the products
        activations   what autograd keeps of every block (activations.py), and one block's gradients
        loss          logits and their gradient for `loss.chunk` targets, hidden states and their gradient, and the
                      head's gradient, which waits for the backward pass unless `loss.recompute`

What is left out: the allocator's fragments, communication buffers, the CUDA context (about 1 GiB). Kernels other than
the torch backend's keep other activations; these are an upper bound for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch._subclasses.fake_tensor import FakeTensorMode

from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import META, TokenFolder
from openxlstm.data.windows import Stream
from openxlstm.models.accounting import count_parameters, flops_per_token, parameters_by_part, state_bytes
from openxlstm.models.xlstm import xLSTMConfig
from openxlstm.train import config, optim
from openxlstm.train.activations import kept
from openxlstm.train.gpus import Gpu
from openxlstm.train.recipe import ARCHITECTURES, Recipe, architecture, nearest_divisor

DOCUMENT = "⟦document⟧"  # stands where a reset is
SHOWN = 400  # characters of the first window


def read(name: str, overrides: Iterable[str] = ()) -> tuple[Recipe, Tokenizer | None]:
    """A resolved recipe, whether or not its data are on this machine; the tokenizer if it is.

    Raises:
        ValueError: the recipe is wrong; or its tokenizer is not here and it does not give model.vocab_size.
    """
    recipe, table = config.load(config.find(name), overrides)
    said = recipe.data.tokenizer
    if said == config.FILES["data.tokenizer"]:
        tokenizer: Tokenizer | None = Tokenizer.bytes()
    else:
        tokenizer = Tokenizer.from_file(said) if Path(said).is_file() else None
    if tokenizer is None and "vocab_size" not in recipe.model:
        raise ValueError(
            f"{table.where('data.tokenizer')}: data.tokenizer = {said!r} is not here, so the recipe must say"
            " model.vocab_size for an estimate; 50_304 fits the tokenizers of GPT-2 and GPT-NeoX"
        )
    return config.resolve(recipe, table, 1 if tokenizer is None else tokenizer.vocab_size), tokenizer


def estimate(
    recipe: Recipe, *, gpus: int = 1, gpu: Gpu | None = None, mfu: float = 0.4, tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """Everything that can be known in advance, as plain values; bytes, seconds and counts as numbers.

    Args:
        recipe: resolved.
        gpus: processes, one device each.
        gpu: what kind of device; without one nothing is said about time, nor whether the memory suffices.
        mfu: share of the peak that training reaches, above 0 and at most 1.
        tokenizer: to show the first window of data that are here.

    Raises:
        ValueError: the architecture is not ours; the batch cannot be dealt to so many GPUs; mfu is out of range; data
            that are here are damaged.
    """
    if recipe.model["architecture"] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model.architecture = {recipe.model['architecture']!r} cannot be estimated; only {known} can")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu} must be above 0 and at most 1; 0.4 is usual, the papers reached 0.22 to 0.38")
    if gpus < 1:
        raise ValueError(f"gpus={gpus} must be at least 1")
    model, steps = recipe.model_config(), recipe.train.steps
    assert steps is not None, "resolve(recipe) first"
    parameters, forward = count_parameters(model), flops_per_token(model)
    tokens = recipe.train.rows(steps) * recipe.data.context
    split = _dealt(recipe, gpus)
    memory = _memory(recipe, split)
    room = None if gpu is None else gpu.memory
    found = {
        "title": recipe.title,
        "model": {
            "label": model.label,
            "parameters": parameters,
            "parts": parameters_by_part(model),
            "state_bytes": state_bytes(model),
        },
        "work": {
            "flops_per_token": forward,
            "training_flops_per_token": 3 * forward,
            "steps": steps,
            "tokens": tokens,
            "tokens_per_parameter": tokens / parameters,
            "flops": 3 * forward * tokens,
        },
        "parallel": split,
        "memory": memory | {"device": room, "fits": None if room is None else memory["total"] <= room},
        "time": None if gpu is None else _time(gpu, gpus, mfu, 3 * forward * tokens, tokens),
        "checkpoint": _checkpoint(recipe),
        "data": [_source(source.path, source.weight, recipe, tokens, tokenizer) for source in recipe.data.mixture],
    }
    return found


def _dealt(recipe: Recipe, gpus: int) -> dict[str, Any]:
    """How the largest batch is dealt: kind of parallelism, ranks per copy of the parameters, rows per forward pass."""
    train = recipe.train
    kind = train.parallel if train.parallel != "auto" else "ddp" if gpus > 1 else "single"
    if kind == "single" and gpus > 1:
        raise ValueError(f'train.parallel = "single" uses one GPU, and {gpus} were given; "ddp" and "fsdp2" use all')
    shard = (train.shard or gpus) if kind == "fsdp2" else 1
    if gpus % shard:
        near = nearest_divisor(shard, gpus)
        raise ValueError(f"train.shard = {shard} must divide the {gpus} GPUs; nearest is {near}")
    for _, batch in train.ramp:
        rows = train.micro_batch or max(1, batch // gpus)
        if batch % (gpus * rows):
            parts = batch // (train.micro_batch or 1)
            near = nearest_divisor(gpus, parts)
            raise ValueError(
                f"train.batch = {batch} cannot be dealt to {gpus} GPUs by {rows} rows; {near} GPUs would do"
            )
    batch = max(batch for _, batch in train.ramp)
    rows = train.micro_batch or batch // gpus
    return {
        "kind": kind, "gpus": gpus, "shard": shard, "batch": batch, "rows": rows,
        "accumulation": batch // (gpus * rows),
    }  # fmt: skip


def _memory(recipe: Recipe, split: dict[str, Any]) -> dict[str, int]:
    """Bytes of one process by purpose, and their sum."""
    model, train, shard = recipe.model_config(), recipe.train, split["shard"]
    N, W, D = count_parameters(model), model.vocab_size, model.width
    bf16 = train.precision in ("auto", "bf16")  # "auto" on the GPUs that are asked about
    width = 2 if bf16 else 4
    positions = split["rows"] * recipe.data.context
    blocks = kept(model, split["rows"], recipe.data.context, bf16=bf16, checkpoint_every=train.checkpoint_every)
    parts = {
        "weights": 4 * N // shard,
        "gradients": 4 * N // shard,
        "optimiser": (_moments(recipe) + (4 * N if recipe.optim.ema is not None else 0)) // shard,
        "gathered": 0 if split["kind"] != "fsdp2" else width * ((2 - model.tie_embeddings) * W * D + 2 * _block(model)),
        "activations": blocks.total,
        "loss": 2 * 4 * min(recipe.loss.chunk, positions) * W
        + 2 * width * positions * D
        + (0 if recipe.loss.recompute else 4 * W * D),
    }
    return parts | {"total": sum(parts.values())}


def _block(model: Any) -> int:
    """Parameters of the largest block."""
    if isinstance(model, xLSTMConfig):
        alone = [parameters_by_part(replace(model, pattern=kind)) for kind in sorted(set(model.pattern))]
    else:
        alone = [parameters_by_part(replace(model, blocks=1))]
    return max(parts.get("mLSTM blocks", 0) + parts.get("sLSTM blocks", 0) for parts in alone)


def _moments(recipe: Recipe) -> int:
    """Bytes of the optimiser's state: two fp32 numbers per parameter, or one (Muon), as its groups say."""
    _, build = architecture(recipe.model["architecture"])
    with FakeTensorMode():  # shapes without numbers; not the meta device, which no fused optimiser knows
        optimiser = optim.build(build(recipe.model_config()), recipe.optim)
    return sum(
        (8 if "betas" in group else 4) * weight.numel()
        for group in optimiser.param_groups
        for weight in group["params"]
    )


def _checkpoint(recipe: Recipe) -> dict[str, int]:
    """Bytes of one complete checkpoint, and how many are kept at least."""
    N = count_parameters(recipe.model_config())
    one = 4 * N + _moments(recipe) + (4 * N if recipe.optim.ema is not None else 0)
    return {"bytes": one, "kept": recipe.checkpoint.keep_last}


def _time(gpu: Gpu, gpus: int, mfu: float, flops: int, tokens: int) -> dict[str, Any]:
    seconds = flops / (gpus * gpu.flops * mfu)
    return {
        "gpu": gpu.name, "peak_flops": gpu.flops, "mfu": mfu, "seconds": seconds, "gpu_hours": seconds * gpus / 3600,
        "tokens_per_second": tokens / seconds,
    }  # fmt: skip


def _source(path: str, weight: float, recipe: Recipe, tokens: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What is known of one source: its tokens and epochs if it is here as tokens, else only where it should be."""
    share = weight / sum(source.weight for source in recipe.data.mixture)
    row: dict[str, Any] = {"path": path, "share": share, "here": path == "stdlib" or Path(path).exists()}
    tokens_at = next((at for at in (Path(path), Path(path) / "train") if (at / META).is_file()), None)
    if tokens_at is None:
        return row
    folder = TokenFolder.open(tokens_at)
    if tokenizer is not None and folder.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(f"{tokens_at} holds tokens of another tokenizer than data.tokenizer = {recipe.data.tokenizer}")
    return row | {
        "tokens": folder.total_tokens,
        "documents": folder.total_documents,
        "epochs": share * tokens / folder.total_tokens,
        "first_window": first_window(folder, recipe.data.context),
    }


def first_window(folder: TokenFolder, context: int) -> str:
    """The beginning of the first row as text, every start of a document marked."""
    row = Stream(folder, context).batch(np.zeros(1, np.int64))
    ids, reset, valid = row.targets[0], row.reset[0], row.valid[0]
    text = ""
    for number, piece in enumerate(np.split(ids[valid], np.flatnonzero(reset[valid]))):
        text += (DOCUMENT if number else "") + folder.tokenizer.decode(piece)
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"
