"""Models in GGUF files: one file that holds the numbers in ggml's block layouts, the exact config, and the tokenizer.

`load` maps the file instead of reading it: matrices stay in their blocks, where `nn.quant` computes with them, so a
model needs the memory of its file. Everything else is fp32 and small. The config stands in `openxlstm.config` as JSON;
the tokenizer.json in the format's own key for it. Files are written by `gguf_write`; llama.cpp has no xLSTM, so
nothing but this library runs them, though its tools show what is inside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openxlstm.checkpoint.gguf_file import Head, Stored, read_head
from openxlstm.checkpoint.gguf_file import is_gguf as is_gguf
from openxlstm.checkpoint.plan import Plan, build, check
from openxlstm.checkpoint.rules_gguf import matrices, rules
from openxlstm.checkpoint.sources import Entry, Source
from openxlstm.kernels.quantized import can_pack, dequantize, memory_for_packed, pack, packed_shape
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig
from openxlstm.nn.quant import QuantEmbedding, QuantLinear

PIECE = 1 << 20  # bytes that are read at a time when rows are laid side by side

CONFIG, FORMAT, QUANT = "openxlstm.config", "openxlstm.format", "openxlstm.quant"
TOKENIZER = "tokenizer.huggingface.json"
NEWEST_FORMAT = 1
CONFIGS: dict[str, Callable[[dict[str, Any]], xLSTMConfig | xLSTMLargeConfig]] = {  # by general.architecture
    "xlstm": xLSTMConfig.from_dict, "xlstm-large": xLSTMLargeConfig.from_dict,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Opened:
    """A file whose head is understood: nothing of its numbers has been read."""

    head: Head
    plan: Plan
    source: Source  # tensors by their names in the file; reading one dequantises it to fp32

    @property
    def config(self) -> xLSTMConfig | xLSTMLargeConfig:
        """The model's."""
        assert isinstance(self.plan.config, (xLSTMConfig, xLSTMLargeConfig))
        return self.plan.config

    def kinds(self) -> dict[str, tuple[int, int]]:
        """Kind of storage: (number of tensors, bytes), the largest first."""
        found: dict[str, tuple[int, int]] = {}
        for stored in self.head.tensors.values():
            count, size = found.get(stored.kind, (0, 0))
            found[stored.kind] = count + 1, size + stored.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def open_gguf(path: Path) -> Opened:
    """Head, config, and which tensor is which; every name, shape and kind checked.

    Raises:
        ValueError: damage, another architecture, or contents that are no whole model, by name.
    """
    head = read_head(path, CONFIGS)
    config = _config(head)
    plan = Plan("gguf", config, rules(config))
    entries = {
        name: Entry(stored.shape, torch.float32, path, _reader(path, stored)) for name, stored in head.tensors.items()
    }
    source = Source(path, entries)
    check(plan, source)
    quantisable = matrices(config)
    for row in plan.rules:
        if (kind := head.tensors[row.theirs[0]].kind) != "f32" and row.ours[0] not in quantisable:
            raise ValueError(f"{path}: {row.theirs[0]} is stored as {kind}; gates, norms, convolutions and recurrent "
                             f"matrices must be f32")  # fmt: skip
    return Opened(head, plan, source)


def load(path: Path, *, device: torch.device | str, dtype: torch.dtype | None) -> xLSTM | xLSTMLarge:
    """The model in a file, in evaluation mode.

    Args:
        device: where its tensors go; on the CPU, matrices stay in the file, which must not change as long as they do.
        dtype: None: matrices stay quantised. Else everything is dequantised to this dtype, into an ordinary model.

    Raises:
        ValueError: as `open_gguf`.
    """
    opened = open_gguf(path)
    model = build(opened.config)
    assert isinstance(model, (xLSTM, xLSTMLarge))
    named = {row.ours[0]: row.theirs[0] for row in opened.plan.rules}
    if dtype is not None:
        read = opened.source.entries
        tensors = {ours: read[name].read().to(device=device, dtype=dtype) for ours, name in named.items()}
        model.load_state_dict(tensors, assign=True)
        return model.eval()
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    tensors = {}
    packed = _packed(
        path, model, {ours: opened.head.tensors[name] for ours, name in named.items()}, opened.config, device
    )
    for ours, name in named.items():
        stored = opened.head.tensors[name]
        raw = mapped[stored.begin : stored.begin + stored.nbytes]
        if ours in matrices(opened.config):
            module = ours.removesuffix(".weight")
            _replace(model, module, stored.kind)
            if ours in packed:
                tensors[f"{module}.blocks"] = packed[ours]
                model.get_submodule(module).blocks = packed[ours].to("meta")  # of the size that will be assigned
                continue
            tensors[f"{module}.blocks"] = raw.view(stored.shape[0], -1).to(device)
        else:
            tensors[ours] = dequantize(raw, "f32", stored.nbytes // 4).view(stored.shape).to(device, copy=True)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def tokenizer_json(path: Path) -> str:
    """The text of the tokenizer.json inside: `Tokenizer.from_json` reads it.

    Raises:
        ValueError: damage, or a file without one.
    """
    text = read_head(path, CONFIGS).metadata.get(TOKENIZER)
    if not isinstance(text, str):
        raise ValueError(f"{path} carries no tokenizer ({TOKENIZER}); convert the model again from a folder that holds "
                         f"a tokenizer.json")  # fmt: skip
    return text


def is_quantised(model: nn.Module) -> bool:
    """Whether some matrix of the model stays in blocks, so that it can neither be trained nor saved."""
    return any(isinstance(module, (QuantLinear, QuantEmbedding)) for module in model.modules())


def _config(head: Head) -> xLSTMConfig | xLSTMLargeConfig:
    """The config inside, refused before it is built if the file could not hold such a model."""
    path, text, form = head.path, head.metadata.get(CONFIG), head.metadata.get(FORMAT)
    if not isinstance(text, str):
        raise ValueError(f"{path} has no {CONFIG}, so it was not written by this library")
    if not isinstance(form, int) or isinstance(form, bool) or not 1 <= form <= NEWEST_FORMAT:
        raise ValueError(f"{path} has {FORMAT}={form!r}; this version of openxlstm reads up to {NEWEST_FORMAT}")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {CONFIG} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: {CONFIG} must hold an object; it holds {type(data).__name__}")
    try:
        config = CONFIGS[str(head.metadata["general.architecture"])](data)
    except ValueError as error:
        raise ValueError(f"{path}: {CONFIG}: {error}") from error
    blocks = config.blocks if isinstance(config, xLSTMLargeConfig) else len(config.pattern)
    if blocks > len(head.tensors):
        raise ValueError(f"{path}: {CONFIG} means {blocks} blocks, and the file holds {len(head.tensors)} tensors")
    numbers = sum(math.prod(stored.shape) for stored in head.tensors.values())
    for name, size in config.to_dict().items():  # each is an axis of some tensor; building it would not be free
        if isinstance(size, int) and size > numbers:
            raise ValueError(f"{path}: {CONFIG} says {name}={size}, and all tensors together hold {numbers} numbers")
    return config


def _packed(
    path: Path,
    model: nn.Module,
    stored: dict[str, Stored],
    config: xLSTMConfig | xLSTMLargeConfig,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """The linear maps whose rows lie side by side from now on, where the processor reads them fastest so.

    They are read, some rows at a time: mapped pages beside the packed ones would be memory twice, and whole matrices go
    in and out of the heap and leave holes as large as they are.
    """
    if torch.device(device).type != "cpu":
        return {}
    shapes = {}
    for ours in matrices(config):
        is_linear = isinstance(model.get_submodule(ours.removesuffix(".weight")), nn.Linear)
        if is_linear and can_pack(stored[ours].kind):
            height, features = stored[ours].shape
            shapes[ours] = packed_shape(height, stored[ours].kind, features)
    memory = memory_for_packed([groups * size for groups, size in shapes.values()])
    packed = {}
    for (ours, shape), piece in zip(shapes.items(), memory, strict=True):
        packed[ours] = piece.view(shape)
        size = stored[ours].nbytes // stored[ours].shape[0]
        some = max(1, PIECE // shape[1])  # groups
        for index, groups in enumerate(packed[ours].split(some)):
            first = index * some * shape[1]
            rows = _bytes(path, stored[ours], first, min(groups.nbytes, stored[ours].nbytes - first))
            pack(rows.view(-1, size), stored[ours].kind, groups)
    return packed


def _bytes(path: Path, stored: Stored, first: int = 0, count: int | None = None) -> Tensor:
    """`count` of a tensor's bytes, from its `first` on; all of them unless said."""
    raw = torch.empty(stored.nbytes if count is None else count, dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(stored.begin + first)
        view = raw.numpy().data
        while view:  # one call reads at most 2 GiB
            got = file.readinto(view)
            if not got:
                raise ValueError(f"{path} became shorter while it was read")
            view = view[got:]
    return raw


def _reader(path: Path, stored: Stored) -> Callable[[], Tensor]:
    def read() -> Tensor:
        raw = _bytes(path, stored)
        if stored.kind == "f32":
            return raw.view(torch.float32).view(stored.shape)
        rows = raw.view(math.prod(stored.shape[:-1]), -1)
        wide = torch.empty(rows.shape[0], stored.shape[-1])
        for some, into in zip(rows.split(1024), wide.split(1024), strict=True):  # a few rows' temporaries at a time
            into.copy_(dequantize(some, stored.kind, stored.shape[-1]))
        return wide.view(stored.shape)

    return read


def _replace(model: nn.Module, name: str, kind: str) -> None:
    """Put a quantised module in the place of the dense one."""
    dense = model.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    with torch.device("meta"):
        if isinstance(dense, nn.Embedding):
            new: nn.Module = QuantEmbedding(dense.num_embeddings, dense.embedding_dim, kind)
        else:
            assert isinstance(dense, nn.Linear)
            new = QuantLinear(dense.in_features, dense.out_features, kind, bias=dense.bias is not None)
    setattr(model.get_submodule(parent), leaf, new)
