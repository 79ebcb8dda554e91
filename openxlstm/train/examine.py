"""Looking into checkpoints: what is in one, how two differ, and all tensors of one in a single file without pickles."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from openxlstm.checkpoint import store
from openxlstm.train import checkpoints
from openxlstm.train.export import choose

PARTS = ("model", "ema", "optimiser", "extra")


def overview(path: Path) -> dict[str, Any]:
    """What a checkpoint holds: where the run stood, and tensors, numbers and bytes of each part.

    Args:
        path: a checkpoint, or a run folder, which means its newest one.

    Raises:
        ValueError: there is no checkpoint, or it is damaged.
    """
    chosen = choose(path)
    meta = checkpoints.read_meta(chosen)
    parts = {}
    for part in PARTS:
        tensors = checkpoints.read_tensors(chosen, part)
        if tensors:
            parts[part] = {
                "tensors": len(tensors),
                "numbers": sum(tensor.numel() for tensor in tensors.values()),
                "bytes": sum(tensor.nbytes for tensor in tensors.values()),
                "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
            }
    return {
        "checkpoint": str(chosen),
        "title": meta["recipe"].get("title", ""),
        "progress": meta["progress"],
        "parts": parts,
        "processes": len({file.name.split("_")[2] for file in chosen.glob("__*_*.distcp")}),
        "bytes": sum(file.stat().st_size for file in chosen.iterdir()),
        "beside": [other.name for other in checkpoints.complete(chosen.parent) if other != chosen],
    }


def difference(first: Path, second: Path, part: str = "model") -> list[dict[str, Any]]:
    """How much each tensor changed from `first` to `second`, the most changed first.

    `change` is |b - a| / |a| in Frobenius norms, `largest` the largest |b - a| of one number over the largest |a|;
    both are infinite where the first tensor was zero and the second is not.

    Args:
        first: a checkpoint, a run folder (its newest one), or a model folder; likewise `second`.
        part: "model", "ema", "optimiser" or "extra".

    Raises:
        ValueError: they do not hold the same tensors; the message names one that differs.
    """
    a, b = _tensors(first, part), _tensors(second, part)
    if not a and not b:
        raise ValueError(f"neither {first} nor {second} holds a part {part!r}")
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            raise ValueError(f"{name} is in {first if name in a else second} only; these are two different models")
        if a[name].shape != b[name].shape:
            shapes = f"{list(a[name].shape)} and {list(b[name].shape)}"
            raise ValueError(f"{name} has the shapes {shapes}; these are two different models")
    rows = [{"name": name, "shape": list(a[name].shape), **_change(a[name].double(), b[name].double())} for name in a]
    return sorted(rows, key=lambda row: -row["change"])


def consolidate(path: Path, file: Path, parts: Iterable[str] = PARTS) -> dict[str, int]:
    """Write the tensors of a checkpoint into one safetensors file, as PART.NAME, its meta.json in the header.

    Returns the number of tensors of each part.

    Raises:
        ValueError: the file exists, or the checkpoint has none of the parts.
    """
    chosen = choose(path)
    if file.exists():
        raise ValueError(f"{file} exists; name a new file")
    found = {part: checkpoints.read_tensors(chosen, part) for part in parts}
    tensors = {f"{part}.{name}": tensor for part, inner in found.items() for name, tensor in inner.items()}
    if not tensors:
        raise ValueError(f"{chosen} holds no part {' or '.join(map(repr, found))}")
    header = {"meta": json.dumps(checkpoints.read_meta(chosen))}
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.tmp")
    try:
        save_file(tensors, scratch, metadata=header)
        checkpoints.sync(scratch)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)
    return {part: len(inner) for part, inner in found.items() if inner}


def _tensors(path: Path, part: str) -> dict[str, Tensor]:
    if (path / store.CONFIG).exists():
        if part != "model":
            raise ValueError(f"{path} is a model and has no part {part!r}; compare part 'model', or two checkpoints")
        return dict(store.load(path).state_dict())
    return checkpoints.read_tensors(choose(path), part)


def _change(a: Tensor, b: Tensor) -> dict[str, float]:
    def over(change: Tensor, size: Tensor) -> float:
        return 0.0 if change == 0 else (change / size).item()

    if not a.numel():
        return {"change": 0.0, "largest": 0.0}
    return {
        "change": over((b - a).norm(), a.norm()),
        "largest": over((b - a).abs().max(), a.abs().max()),
    }
