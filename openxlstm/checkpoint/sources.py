"""Tensors in files, one at a time: names, shapes and dtypes at once, numbers when they are asked for.

Files are safetensors, single or in shards, or PyTorch state dicts, which are read with `weights_only=True`: nothing in
a file is ever executed. A read allocates the one tensor and fills it from the file; nothing stays mapped, so a file of
any size costs the memory of its largest tensor (of a state dict in the old pickle format: of all).
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Source:
    """The tensors below one path, by name; and what the files say in their headers."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_weights(path: Path) -> Source:
    """The tensors of a file, or of the weights in a folder.

    Raises:
        ValueError: no weights, or a damaged, truncated, executable or otherwise unusable file, by name.
    """
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {path}")
    files = weight_files(path)
    if not files:
        names = sorted(file.name for file in path.iterdir())
        found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
        raise ValueError(f"{path} holds no weights: no {WEIGHTS}, {INDEX}, model_0.safetensors or {TORCH_WEIGHTS}; "
                         f"found {found}")  # fmt: skip
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        part = _open_file(file)
        if twice := entries.keys() & part.entries.keys():
            name = min(twice)
            raise ValueError(f"{name!r} is in {entries[name].file.name} and again in {file.name}, both in {path}")
        entries.update(part.entries)
        metadata.update(part.metadata)
    if (path / INDEX).is_file() and files[0].name != WEIGHTS:
        _check_index(path, entries)
    return Source(path, entries, metadata)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder: one, the shards of an index, or model_0, model_1, ...

    Raises:
        ValueError: an index that names what is not a file of this folder, or a gap between shards.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(_weight_map(folder).values()))]
    numbers = sorted(
        int(match[1]) for file in folder.iterdir() if (match := re.fullmatch(r"model_(\d+)\.safetensors", file.name))
    )
    if numbers != list(range(len(numbers))):
        missing = min(set(range(max(numbers))) - set(numbers), default=0)
        raise ValueError(f"{folder} holds model_{numbers[-1]}.safetensors but no model_{missing}.safetensors")
    if numbers:
        return [folder / f"model_{number}.safetensors" for number in numbers]
    return [folder / TORCH_WEIGHTS] if (folder / TORCH_WEIGHTS).is_file() else []


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        ValueError: it is not one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        ValueError: it is not one.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{where} must hold an object; it holds {type(data).__name__}")
    return data


def _weight_map(folder: Path) -> dict[str, str]:
    """tensor: file, as the index says; every file plainly named and there."""
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of tensor names to file names")
    for name in sorted(set(names.values())):
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise ValueError(f"{folder / INDEX} points to {name!r}; a shard must be a file of the same folder")
        if not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} points to {name!r}, which is no safetensors file")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / INDEX} points to {name}, which is missing; was a download interrupted?")
    return names


def _check_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    """The shards hold exactly what the index says, where it says."""
    said = _weight_map(folder)
    for name in sorted(said.keys() ^ entries.keys()):
        where = f"{said[name]} should hold" if name in said else f"{entries[name].file.name} holds"
        lack = "and does not" if name in said else "and the index does not know it"
        raise ValueError(f"{folder / INDEX} and the shards disagree: {where} {name!r}, {lack}")
    for name, file in said.items():
        if entries[name].file.name != file:
            raise ValueError(f"{folder / INDEX} says {name!r} is in {file}; it is in {entries[name].file.name}")


def _open_file(path: Path) -> Source:
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        if start[8:9] == b"{":
            raise ValueError(f"{path} is a safetensors file by another name; rename it to {path.stem}.safetensors")
        return _open_torch(path)
    raise ValueError(
        f"{path} is not a weights file by its name; known are .safetensors and {', '.join(TORCH_SUFFIXES)}"
    )


def _open_safetensors(path: Path) -> Source:
    try:
        with safe_open(path, framework="pt") as checked:  # it checks every offset against the size of the file
            metadata = dict(checked.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); was a copy or a download interrupted?") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    entries = {}
    for name, said in header.items():
        if name == "__metadata__":
            continue
        if said["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: {name} is stored as {said['dtype']}; a model's tensors are floating-point, "
                f"one of {', '.join(DTYPES)}"
            )
        shape, dtype, begin = tuple(said["shape"]), DTYPES[said["dtype"]], 8 + length + said["data_offsets"][0]
        entries[name] = Entry(shape, dtype, path, _reader(path, shape, dtype, begin))
    return Source(path, entries, metadata)


def _reader(path: Path, shape: tuple[int, ...], dtype: torch.dtype, begin: int) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        into = tensor.reshape(-1).view(torch.uint8).numpy().data
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            done = 0
            while done < len(into):  # one call reads at most 2 GiB
                count = file.readinto(into[done:])
                if not count:
                    raise ValueError(f"{path} became shorter while it was read")
                done += count
        return tensor

    return read


def _open_torch(path: Path) -> Source:
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # only the zip format can be mapped; older files are read whole
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged pickle, anything
        told = str(error).split("WeightsUnpickler error:")[-1].strip() or "it ends early"
        reason = told.splitlines()[0][:200]
        if isinstance(error, pickle.UnpicklingError) and re.search("global|class", reason, re.IGNORECASE):
            raise ValueError(
                f"{path} holds more than tensors, and what it holds would have to be executed ({reason}). Nothing was; "
                f"load it where you trust it, and save its state_dict() as safetensors"
            ) from error
        raise ValueError(
            f"{path} is damaged, incomplete or no PyTorch file ({reason}); was a copy or a download interrupted?"
        ) from error
    tensors = _find_state_dict(loaded, path)
    entries = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(tensor).__name__}; a state dict holds tensors only")
        if tensor.dtype not in DTYPES.values() and not name.endswith("causal_mask"):
            raise ValueError(f"{path}: {name} is {tensor.dtype}; a model's tensors are floating-point")
        entries[name] = Entry(tuple(tensor.shape), tensor.dtype, path, tensor.detach().clone)
    return Source(path, entries)


def _find_state_dict(loaded: Any, path: Path) -> dict[str, Any]:
    """The state dict itself, or the one inside what trainers save around it."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} holds {type(loaded).__name__}, not a state dict")
    return {str(name): tensor for name, tensor in loaded.items()}
