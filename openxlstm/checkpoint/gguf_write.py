"""Any checkpoint into one GGUF file: quantised a tensor at a time, verified, and never half-written.

What is stored how (`kind_of`):
  gates, norms, convolutions, skips, block-diagonal maps, recurrent matrices    f32
  matrices whose rows do not divide into blocks of 32                           bf16
  embedding and head, of the 4-bit kinds                                        q8_0
  all other matrices                                                            as asked for
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from openxlstm.checkpoint import folders, gguf
from openxlstm.checkpoint.convert import Progress, carried_files, plan_of, token_ids
from openxlstm.checkpoint.gguf_file import TYPES, Stored
from openxlstm.checkpoint.layouts import Given
from openxlstm.checkpoint.plan import Plan, Reader, check, our_tensors
from openxlstm.checkpoint.rules_gguf import matrices, rules
from openxlstm.checkpoint.sources import Source, read_json
from openxlstm.kernels.quantized import BLOCK, KINDS, bytes_per_row
from openxlstm.models.xlstm import xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLargeConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter

Quant = Literal["q8_0", "q4_0", "q4_1", "bf16", "f32"]

FILE_TYPES = {"f32": 0, "q4_0": 2, "q4_1": 3, "q8_0": 7, "bf16": 32}  # general.file_type: what most tensors are
NUMBERS = {kind: number for number, kind in TYPES.items()}
STEP = 1 << 20  # numbers that are quantised at a time; the library's temporaries then take about 30 MB
LARGEST = 65_504  # a scale is fp16, and a block's scale is at most its largest number
SPECIAL_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}  # theirs: in tokenizer.ggml.*


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did."""

    source: str
    layout: str  # of the source
    target: str
    quant: str
    architecture: str
    parameters: int
    bytes: int  # of the file
    kinds: dict[str, tuple[int, int]]  # kind of storage: tensors, bytes
    wider: tuple[str, ...]  # tensors whose rows do not divide into blocks, so that they are bf16
    tokenizer: bool
    verified: int  # tensors that were read again and compared with what was written
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def to_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    quant: Quant = "q8_0",
    config: Given | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the checkpoint in `source` into the new file `target`, with the tokenizer that lies beside it.

    Memory: the largest tensor, less than twice.

    Args:
        source: a folder or a file of weights in any layout, or another GGUF file, which is dequantised first.
        quant: what most matrices become.
        config: for weights without one beside them: a file or a mapping.

    Raises:
        ValueError: what cannot be read or stored, by name.
        OSError: what was written is not what was read again, or could not be written. Nothing is left at `target`.
    """
    path, file = Path(source), Path(target)
    check_target(file, quant)
    plan, weights = plan_of(path, config)
    check(plan, weights)
    return write(plan, weights, file, quant, words_beside(path), progress)


def check_target(target: Path, quant: str) -> None:
    """The arguments make sense, and nothing would be lost.

    Raises:
        ValueError: they do not, or something is there.
    """
    if quant not in get_args(Quant):
        raise ValueError(f"quant={quant!r} must be one of {', '.join(get_args(Quant))}")
    if target.suffix != ".gguf":
        raise ValueError(f"{target} must end in .gguf: the model becomes one file")
    folders.check_free_file(target)


def words_beside(path: Path) -> dict[str, Any]:
    """Metadata about the tokenizer that lies in a folder, or in a GGUF file: what other tools look for, too.

    Raises:
        ValueError: a file that is not JSON or not text.
    """
    if gguf.is_gguf(path):
        head = gguf.read_head(path, gguf.CONFIGS)
        return {key: value for key, value in head.metadata.items() if key.startswith("tokenizer.")}
    carried = carried_files(path) if path.is_dir() else {}
    found: dict[str, Any] = {}
    if "tokenizer.json" in carried:
        read_json(carried["tokenizer.json"])
        found[gguf.TOKENIZER] = carried["tokenizer.json"].read_bytes().decode()
    for name, value in token_ids(carried).items():
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32:
            found[f"tokenizer.ggml.{SPECIAL_IDS[name]}_token_id"] = value
    if "chat_template.jinja" in carried:
        found["tokenizer.chat_template"] = carried["chat_template.jinja"].read_text(encoding="utf-8")
    elif "tokenizer_config.json" in carried:
        template = read_json(carried["tokenizer_config.json"]).get("chat_template")
        if isinstance(template, str):
            found["tokenizer.chat_template"] = template
    return found


def kind_of(name: str, config: xLSTMConfig | xLSTMLargeConfig, quant: str) -> str:
    """How the tensor of ours by this name is stored; the table is in the module's docstring."""
    if name not in matrices(config) or quant == "f32":
        return "f32"
    if quant == "bf16" or our_tensors(config)[name].shape[-1] % BLOCK:
        return "bf16"
    return "q8_0" if name in ENDS else quant


ENDS = ("embedding.weight", "head.weight", "backbone.embeddings.weight", "lm_head.weight")


def write(
    plan: Plan, source: Source, target: Path, quant: str, words: Mapping[str, Any], progress: Progress | None = None
) -> Report:
    """The work of `to_gguf`, from any source of tensors: a model in memory, or one that is made up as it is read."""
    config = plan.config
    if not isinstance(config, (xLSTMConfig, xLSTMLargeConfig)):
        raise ValueError(f"{source.path} is a bare block stack; only language models can be converted")
    reader = Reader(source, plan.rules)
    ours = our_tensors(config)
    kinds = {name: kind_of(name, config, quant) for name in ours}
    theirs = {row.ours[0]: row.theirs[0] for row in rules(config)}
    sizes = {
        name: math.prod(t.shape[:-1]) * bytes_per_row(kinds[name], t.shape[-1]) for name, t in ours.items()
    }  # fmt: skip
    wider = tuple(theirs[name] for name in ours if kinds[name] == "bf16" and quant not in ("bf16", "f32"))
    done, total = 0, 2 * sum(sizes.values())

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    digests: dict[str, bytes] = {}
    with folders.appearing_file(target) as hidden:
        writer = _writer(hidden, target.stem, config, quant, kinds, words)
        try:
            for name, tensor in ours.items():
                rows = list(tensor.shape[:-1])
                shape = [*rows, bytes_per_row(kinds[name], tensor.shape[-1])]
                _announce(writer, theirs[name], list(tensor.shape), shape, kinds[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in ours:
                data = _encode(reader.read(name), kinds[name], f"{source.path}: {name}")
                digests[theirs[name]] = _digest(iter((data.reshape(-1).data,)))
                writer.write_tensor_data(data)
                advance(data.nbytes)
                del data
        finally:
            writer.close()
        opened = _verify(hidden, plan, digests, advance)
        size = hidden.stat().st_size
    notes = plan.notes
    if quant != "f32" and any(reader.dtype(name) == torch.float64 for name in ours):
        notes += ("float64 is stored as fp32 where it is not quantised",)
    return Report(
        source=str(source.path), layout=plan.layout, target=str(target), quant=quant, architecture=config.label,
        parameters=sum(tensor.numel() for tensor in ours.values()), bytes=size, kinds=opened.kinds(), wider=wider,
        tokenizer=gguf.TOKENIZER in words, verified=len(digests), notes=notes,
    )  # fmt: skip


def _writer(
    path: Path, name: str, config: xLSTMConfig | xLSTMLargeConfig, quant: str, kinds: Mapping[str, str],
    words: Mapping[str, Any],
) -> GGUFWriter:  # fmt: skip
    """The library's writer, with all metadata.

    Raises:
        ValueError: the library is missing.
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise ValueError("writing GGUF files needs the gguf library: pip install 'openxlstm[gguf]'") from error
    large = isinstance(config, xLSTMLargeConfig)
    writer = GGUFWriter(path, "xlstm-large" if large else "xlstm")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.blocks if isinstance(config, xLSTMLargeConfig) else len(config.pattern))
    writer.add_head_count(config.heads)
    writer.add_feed_forward_length(config.U_f)
    if isinstance(config, xLSTMLargeConfig):
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
        writer.add_ssm_conv_kernel(config.conv)
        writer.add_ssm_inner_size(config.U_m)
    writer.add_uint32(gguf.FORMAT, gguf.NEWEST_FORMAT)
    writer.add_string(gguf.CONFIG, json.dumps(config.to_dict()))
    counts = {kind: list(kinds.values()).count(kind) for kind in KINDS if kind in kinds.values()}
    said = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    writer.add_string(gguf.QUANT, f"{quant} (tensors: {said})")
    for key, value in words.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
    return writer


def _announce(writer: GGUFWriter, name: str, shape: list[int], stored: list[int], kind: str) -> None:
    """Name, shape and size of a tensor; of quantised ones the library takes bytes for axes."""
    from gguf import GGMLQuantizationType

    is_bytes = kind != "f32"
    dtype = np.dtype(np.uint8 if is_bytes else np.float32)
    writer.add_tensor_info(
        name, stored if is_bytes else shape, dtype, math.prod(stored), GGMLQuantizationType(NUMBERS[kind])
    )


def _encode(tensor: Tensor, kind: str, name: str) -> np.ndarray:
    """The tensor as it is stored, some rows at a time: the library's temporaries are several times what it is given.

    Raises:
        ValueError: numbers that the kind cannot hold.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind == "f32":
        return tensor.detach().float().contiguous().numpy()
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    stored = np.empty((rows.shape[0], bytes_per_row(kind, rows.shape[1])), dtype=np.uint8)
    step = max(1, STEP // rows.shape[1])
    for first in range(0, len(rows), step):
        some = rows[first : first + step].float()
        largest = float(some.abs().max())
        if not largest <= LARGEST:
            raise ValueError(f"{name} holds {largest}, which {kind} cannot store; its weights are damaged, or convert "
                             f"with f32")  # fmt: skip
        stored[first : first + step] = quantize(some.contiguous().numpy(), GGMLQuantizationType(NUMBERS[kind]))
    return stored


def _verify(path: Path, plan: Plan, digests: Mapping[str, bytes], advance: Callable[[int], None]) -> gguf.Opened:
    """Read the file as a user would; every byte of every tensor is the one that was written.

    Raises:
        OSError: something differs.
    """
    opened = gguf.open_gguf(path)
    if opened.config != plan.config:
        raise OSError(f"what was written describes another model:\n{opened.config}\nis not\n{plan.config}")
    for name, stored in opened.head.tensors.items():
        if _digest(_pieces(path, stored)) != digests[name]:
            raise OSError(f"{name} was not written as it was made; is the disk sound?")
        advance(stored.nbytes)
    return opened


def _pieces(path: Path, stored: Stored) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(stored.begin)
        left = stored.nbytes
        while left:
            piece = file.read(min(left, 1 << 24))
            if not piece:
                raise OSError(f"{path} became shorter while it was read")
            left -= len(piece)
            yield piece


def _digest(pieces: Iterator[Any]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        found.update(piece)
    return found.digest()
