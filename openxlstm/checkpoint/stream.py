"""Safetensors files written one tensor at a time, so that a model of any size needs the memory of its largest tensor.

The format (https://huggingface.co/docs/safetensors): 8 bytes, the length of a JSON header; the header, which gives
dtype, shape and place of every tensor; the numbers. All of the header is known before the first number is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openxlstm.checkpoint.sources import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to be written: its name, and meta tensors that say what goes into it."""

    name: str
    tensors: Mapping[str, Tensor]


def divide(tensors: Mapping[str, Tensor], most: int, pattern: str | None) -> list[Shard]:
    """Shards of at most `most` bytes of numbers each, in the order of the tensors; a larger tensor gets its own.

    Args:
        pattern: names of shards, with {number} (from 0), {place} (from 1) and {count}; None: as transformers does.
    """
    parts: list[dict[str, Tensor]] = [{}]
    room = most
    for name, tensor in tensors.items():
        if parts[-1] and tensor.nbytes > room:
            parts.append({})
            room = most
        parts[-1][name] = tensor
        room -= tensor.nbytes
    if len(parts) == 1:
        return [Shard("model.safetensors", parts[0])]
    pattern = "model-{place:05d}-of-{count:05d}.safetensors" if pattern is None else pattern
    return [
        Shard(pattern.format(number=number, place=number + 1, count=len(parts)), part)
        for number, part in enumerate(parts)
    ]


def index(shards: list[Shard]) -> str:
    """The text of model.safetensors.index.json."""
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors.values())
    places = {name: shard.name for shard in shards for name in shard.tensors}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"


def write_shard(
    folder: Path,
    shard: Shard,
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    wrote: Callable[[int], None],
) -> None:
    """Write one file and force it to the disk.

    Args:
        read: the tensor of a name; called once for each, and forgotten when it is written.
        wrote: is told the bytes of each tensor.
    """
    # wide numbers first: every tensor then starts at a multiple of its item size, whatever the shapes
    names = sorted(shard.tensors, key=lambda name: -shard.tensors[name].element_size())
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = shard.tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / shard.name).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name).contiguous()
            expected = shard.tensors[name]
            got, want = (tensor.shape, tensor.dtype), (expected.shape, expected.dtype)
            assert got == want, f"{name} is {got}, and was announced as {want}"
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            wrote(tensor.nbytes)
            del tensor  # before the next is read, so that there is one at a time
        file.flush()
        os.fsync(file.fileno())
