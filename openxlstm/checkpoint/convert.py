"""From any layout to any other, a tensor at a time, verified, and never half-written.

Our own names are the hub: the rules of the source make our tensors, the rules of the target make its own from them.
What was written is read again as a user would read it, and compared with the source bit by bit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from openxlstm.checkpoint import folders, gguf, layouts, store, stream
from openxlstm.checkpoint.forms import Rule
from openxlstm.checkpoint.layouts import Given
from openxlstm.checkpoint.plan import LAYOUTS, Plan, Reader, check, identity, our_tensors
from openxlstm.checkpoint.rules_nx import Backend
from openxlstm.checkpoint.sources import INDEX, WEIGHTS, Entry, Source, open_weights, read_json
from openxlstm.checkpoint.targets import Target, target_of
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig

To = Literal["hf", "nxai", "nxai-large", "ours"]
Progress = Callable[[int, int], None]  # bytes done, bytes in all

SHARD_SIZE = 5 * 10**9  # bytes, as transformers cuts

CARRIED = (  # what belongs to a model and has one form in every layout
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did."""

    source: str
    layout: str  # of the source
    target: str
    to: str
    architecture: str
    parameters: int
    tensors: int
    bytes: int
    files: tuple[str, ...]
    verified: int  # tensors of ours that were read again and compared
    rounded: float  # largest difference among norm weights that the target stores as weight - 1; 0: all bits equal
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: To,
    config: Given | None = None,
    shard_size: int = SHARD_SIZE,
    slstm_layout: Backend = "vanilla",
    progress: Progress | None = None,
) -> Report:
    """Write the checkpoint in `source` into the new folder `target`, in another layout.

    Memory: the largest tensor, a few times over. Tokenizer files beside the source are copied.

    Args:
        source: a folder, or a file of weights.
        config: for weights without one beside them: a file or a mapping.
        shard_size: the most bytes of one file; a single larger tensor gets a file of its own.
        slstm_layout: which backend of NX-AI's xlstm shall be able to load the result (to="nxai").

    Raises:
        ValueError: what cannot be read, or what the target's layout cannot say, by name.
        OSError: what was written is not what was read, or could not be written. Nothing is left under `target`.
    """
    path, folder = Path(source), Path(target)
    _check_arguments(to, shard_size)
    folders.check_free(folder)
    plan, weights = plan_of(path, config)
    check(plan, weights)
    with folders.appearing(folder) as hidden:
        carried = carried_files(path) if path.is_dir() else {}
        if gguf.is_gguf(path) and gguf.TOKENIZER in gguf.open_gguf(path).head.metadata:
            _write_text(hidden / "tokenizer.json", gguf.tokenizer_json(path))
        return _write(plan, weights, hidden, folder, to, shard_size, slstm_layout, progress, carried)


def export(
    model: xLSTM | xLSTMLarge,
    folder: str | os.PathLike[str],
    *,
    to: To,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Report:
    """Write a model in memory into `folder` in any layout; an earlier export in that folder is replaced.

    Args:
        tokenizer: a tokenizer.json, or a folder that holds one, to copy.

    Raises:
        ValueError: no model of this library; what the layout cannot say, by name; a folder that holds other things.
        OSError: it could not be written. What was there before is still there.
    """
    _check_arguments(to, SHARD_SIZE)
    store.check_model(model, "export()")
    target, words = Path(folder), None if tokenizer is None else Path(tokenizer)
    entries = {
        name: Entry(tuple(tensor.shape), tensor.dtype, target, _in_memory(tensor))
        for name, tensor in model.state_dict().items()
    }
    plan = Plan("ours", model.config, identity(model.config))
    known = (*CARRIED, "config.json", "config.yaml", WEIGHTS, INDEX)
    with folders.appearing(target, replaceable=known) as hidden:
        carried = {} if words is None else carried_files(words) if words.is_dir() else {"tokenizer.json": words}
        if words is not None and not any(name.startswith("tokenizer") for name in carried):
            raise ValueError(f"tokenizer={str(words)!r} is a folder without a tokenizer")
        return _write(plan, Source(target, entries), hidden, target, to, SHARD_SIZE, "vanilla", None, carried)


def plan_of(path: Path, config: Given | None = None) -> tuple[Plan, Source]:
    """Whose checkpoint it is, ours included, and its tensors; not yet checked against each other.

    Raises:
        ValueError: no known layout, or what a layout refuses.
    """
    if gguf.is_gguf(path):
        if config is not None:
            raise ValueError(f"{path} carries its config; leave out config=")
        opened = gguf.open_gguf(path)
        return opened.plan, opened.source
    if config is None and store.is_ours(path):
        native = store.load_config(path)
        return Plan("ours", native, identity(native)), open_weights(path)
    return layouts.open_foreign(path, config)


def _check_arguments(to: str, shard_size: int) -> None:
    if to not in get_args(To):
        hint = "; of a model in one GGUF file, call gguf_write.to_gguf" if to == "gguf" else ""
        raise ValueError(f"to={to!r} must be one of {', '.join(get_args(To))}{hint}")
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size} must be at least 1 byte; 5_000_000_000 is usual")


def _in_memory(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor.detach().cpu()


def _write(
    plan: Plan,
    source: Source,
    hidden: Path,
    final: Path,
    to: To,
    shard_size: int,
    backend: Backend,
    progress: Progress | None,
    carried: Mapping[str, Path],
) -> Report:
    """Write everything into `hidden`, read it again, compare."""
    if not isinstance(plan.config, (xLSTMConfig, xLSTMLargeConfig)):
        raise ValueError(f"{source.path} is a bare block stack; only language models can be converted")
    reader = Reader(source, plan.rules)
    dtypes = {name: reader.dtype(name) for name in our_tensors(plan.config)}
    target = target_of(plan.config, to, backend, dtypes, token_ids(carried))
    theirs = _announced(target.rules, plan, dtypes)
    shards = stream.divide(theirs, shard_size, target.shard_names)
    total = 2 * sum(tensor.nbytes for tensor in theirs.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    rule_of = {name: row for row in target.rules for name in row.theirs}

    def read(name: str) -> Tensor:
        row = rule_of[name]
        return row.form.write(tuple(reader.read(ours) for ours in row.ours))[row.theirs.index(name)]

    for shard in shards:
        stream.write_shard(hidden, shard, read, target.metadata, advance)
    files = {target.config_name: target.config_text}
    if len(shards) > 1 and target.shard_names is None:
        files[INDEX] = stream.index(shards)
    for name, text in files.items():
        _write_text(hidden / name, text)
    for name, file in carried.items():
        if name != "config.json":
            shutil.copyfile(file, hidden / name)
    rounded = _verify(plan, reader, hidden, target, advance)
    advance(total - done)  # a tied tensor is written twice and compared once
    ours = our_tensors(plan.config)
    return Report(
        source=str(source.path), layout=plan.layout, target=str(final), to=to, architecture=plan.config.label,
        parameters=sum(tensor.numel() for tensor in ours.values()), tensors=len(theirs),
        bytes=total // 2, files=tuple(sorted(path.name for path in hidden.iterdir())),
        verified=len(ours), rounded=rounded, notes=(*plan.notes, *target.notes),
    )  # fmt: skip


def _announced(rules: Iterable[Rule], plan: Plan, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Every tensor of the target as a meta tensor, before a number is read."""
    ours = {name: tensor.to(dtypes[name]) for name, tensor in our_tensors(plan.config).items()}
    return {
        name: tensor
        for row in rules
        for name, tensor in zip(row.theirs, row.form.write(tuple(ours[o] for o in row.ours)), strict=True)
    }


def _verify(plan: Plan, reader: Reader, hidden: Path, target: Target, advance: Callable[[int], None]) -> float:
    """Read the target as a user would; every tensor of ours has the same bits, but for norms stored as weight - 1.

    Returns:
        The largest difference among those norms.

    Raises:
        OSError: something differs.
    """
    found, weights = plan_of(hidden, target.given)
    check(found, weights)
    if found.config != target.read_as:
        raise OSError(f"what was written describes another model:\n{found.config}\nis not\n{target.read_as}")
    again = Reader(weights, found.rules)
    inexact = {name for row in found.rules if not row.form.exact for name in row.ours}
    largest = 0.0
    for name in our_tensors(plan.config):
        want, got = reader.read(name), again.read(name)
        if want.dtype != got.dtype or not _same_bits(want, got):
            difference = (want.double() - got.double()).abs()
            allowed = torch.finfo(want.dtype).eps * want.double().abs().clamp(min=1)
            if name not in inexact or want.dtype != got.dtype or not bool((difference <= allowed).all()):
                raise OSError(f"{name} was not written as it was read; is the disk sound?")
            largest = max(largest, float(difference.max()))
        advance(want.nbytes)
        del want, got  # before the next are read
    return largest


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaNs and signs of zeros included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def carried_files(folder: Path) -> dict[str, Path]:
    """Files to pass on; config.json among them for its token ids only."""
    return {name: folder / name for name in (*CARRIED, "config.json") if (folder / name).is_file()}


def token_ids(carried: Mapping[str, Path]) -> dict[str, Any]:
    """The ids of special tokens that a Hugging Face folder names."""
    found: dict[str, Any] = {}
    for name in ("generation_config.json", "config.json"):
        if name in carried:
            data = read_json(carried[name])
            found |= {key: data[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id") if key in data}
    return found


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


assert {*get_args(To), "gguf"} == set(LAYOUTS), "every layout that can be read can be written; GGUF by gguf_write"
