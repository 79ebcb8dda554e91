"""A model in a folder: model.safetensors (the numbers) and config.json (the facts), nothing else.

`load` reads the checkpoints of others too: see `layouts` for whose. What follows is about our own.

Writing is atomic: a file appears under its name complete, or the one that was there stays. The weights carry a copy of
the config, so a crash between the two files is noticed and can be mended. Foreign files in the folder are left alone.

Reading is strict: an unknown, missing or mis-shaped tensor and an unknown config key are errors by name. Nothing is
executed. Tensors are read one at a time into memory of their own: mapped, they would start at odd addresses, where
matmuls take other paths, and the loaded model would differ from the saved one in its last bits. The weights may stand
in several files with an index, as a conversion of a large model writes them.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from openxlstm.checkpoint import gguf, layouts
from openxlstm.checkpoint.folders import sync
from openxlstm.checkpoint.plan import Reader, build, check
from openxlstm.checkpoint.sources import TORCH_SUFFIXES, WEIGHTS, open_weights, parse_json, read_json, weight_files
from openxlstm.models.checks import did_you_mean
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig

CONFIG = "config.json"

Model = xLSTM | xLSTMLarge


def save(model: Model, folder: str | os.PathLike[str]) -> None:
    """Write the model into the folder, which is created if needed. The dtype of every tensor is kept.

    A failure (a full disk, a signal) leaves what was there before and raises.
    """
    check_model(model, "save()")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _describe(model)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}

    def write_weights(path: Path) -> None:
        try:
            save_file(tensors, path, metadata={"format": "pt", "config": json.dumps(config)})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"could not write {folder / WEIGHTS}: {error}; the previous file is untouched") from error

    _replace(folder / WEIGHTS, write_weights)
    _replace(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


def load(
    folder: str | os.PathLike[str],
    *,
    config: layouts.Given | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """The model in a folder, or in a file of weights, ready for use (`.train()` to go on training).

    Ours, or a checkpoint of NX-AI's xlstm or xlstm_large or of Hugging Face, told apart by its config and the names of
    its tensors. What a foreign checkpoint leaves open is said in a warning. Or a GGUF file, whose matrices stay in it,
    quantised: such a model computes, and is neither trained nor saved.

    Args:
        config: of weights without one beside them: a file (.json, .yaml) or a mapping, in the terms of whoever wrote
            the weights. None: what lies beside them.
        device: where its tensors go.
        dtype: what they become; None keeps each tensor's own. Of a GGUF file, a dtype dequantises it into an ordinary
            model.

    Raises:
        ValueError: anything missing, unknown or damaged, by name.
    """
    folder = Path(folder)
    if gguf.is_gguf(folder):
        if config is not None:
            raise ValueError(f"{folder} carries its config; leave out config=")
        return gguf.load(folder, device=device, dtype=dtype)
    if config is None and is_ours(folder):
        native = load_config(folder)
        expected = {name: tuple(t.shape) for name, t in build(native).state_dict().items()}
        tensors = _read_tensors(folder, expected)
        return _filled(native, {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()})
    if folder.is_file() and folder.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ValueError(f"{folder} is a file; load() takes the folder that holds {WEIGHTS} and {CONFIG}, or a file "
                         f"of weights (.safetensors, .gguf, {', '.join(TORCH_SUFFIXES)})")  # fmt: skip
    plan, source = layouts.open_foreign(folder, config)
    check(plan, source)
    if not isinstance(plan.config, (xLSTMConfig, xLSTMLargeConfig)):
        raise ValueError(f"{folder} is a bare block stack, without embedding and head; load() returns language models")
    for note in plan.notes:
        warnings.warn(f"{folder}: {note}", stacklevel=2)
    reader = Reader(source, plan.rules)
    # .contiguous() and the copy: parts of a fused matrix must not hold on to the whole
    return _filled(plan.config, {
        name: reader.read(name).to(device=device, dtype=dtype, copy=True).contiguous()
        for name in build(plan.config).state_dict()
    })  # fmt: skip


def check_model(model: object, caller: str) -> None:
    """Only whole models of this library have a config to write down.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(model, (xLSTM, xLSTMLarge)):
        raise ValueError(
            f"{caller} takes an xLSTM or an xLSTMLarge; got {type(model).__name__}. Of a wrapped or compiled model, "
            f"pass the model inside; of any other module, save state_dict()"
        )
    if gguf.is_quantised(model):
        raise ValueError(
            f"{caller} writes what can be trained, and this model's matrices stay quantised in a GGUF file, which is "
            f"its saved form; load it with dtype=torch.float32 to dequantise it"
        )


def _filled(config: xLSTMConfig | xLSTMLargeConfig, tensors: Mapping[str, Tensor]) -> Model:
    """The model with these tensors as its parameters; no numbers are drawn."""
    model = build(config)
    assert isinstance(model, (xLSTM, xLSTMLarge))
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def is_ours(folder: Path) -> bool:
    """Whether the folder holds a model of this library, or is so empty that our own errors say best what is missing.

    A config of model_type (Hugging Face) or embedding_dim (NX-AI), or weights that say nothing of us, are foreign.
    """
    if not folder.is_dir():
        return not folder.exists()
    if (folder / CONFIG).is_file():
        try:
            data = read_json(folder / CONFIG)
        except ValueError:
            return True  # whatever it is, the error is the same
        return "model_type" not in data and "embedding_dim" not in data and "model" not in data
    if (folder / "config.yaml").is_file():
        return False
    files = weight_files(folder)
    if not files or files[0].suffix != ".safetensors":
        return not files
    first = open_weights(files[0])
    return "config" in first.metadata or "stack.norm.weight" in first.entries


def load_config(folder: str | os.PathLike[str]) -> xLSTMConfig | xLSTMLargeConfig:
    """The config of the model in the folder, without reading its weights: of 7B parameters as fast as of 7M.

    Raises:
        ValueError: anything missing, unknown or damaged, by name.
    """
    folder = Path(folder)
    if gguf.is_gguf(folder):
        return gguf.open_gguf(folder).config
    if not is_ours(folder):
        plan, _ = layouts.open_foreign(folder, None)
        if isinstance(plan.config, (xLSTMConfig, xLSTMLargeConfig)):
            return plan.config
        raise ValueError(f"{folder} is a bare block stack, without embedding and head")
    config = _read_config(folder)
    architecture = config.pop("architecture", None)
    if architecture == "xlstm":
        return _located(xLSTMConfig.from_dict, config, folder)
    if architecture == "xlstm_large":
        return _located(xLSTMLargeConfig.from_dict, config, folder)
    known = "one of xlstm, xlstm_large"
    raise ValueError(f"{folder / CONFIG} must name its architecture, {known}; it says {architecture!r}")


def _describe(model: Model) -> dict[str, Any]:
    """What config.json says."""
    return {"architecture": "xlstm" if isinstance(model, xLSTM) else "xlstm_large", **model.config.to_dict()}


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, force it to the disk, then take its place in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors makes its files private
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)  # the new name itself must survive a power cut


def _umask() -> int:
    """What the user's new files are not allowed. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json, checked against the copy inside the weights."""
    _check_folder(folder)
    weights = weight_files(folder)[0]
    inside = _config_inside(weights)
    if not (folder / CONFIG).exists():
        if inside is None:
            raise ValueError(f"{folder} lacks {CONFIG}, and {weights.name} carries no copy of it")
        return inside
    config = read_json(folder / CONFIG)
    if inside is not None and inside != config:
        differing = sorted(key for key in inside.keys() | config.keys() if inside.get(key) != config.get(key))
        key = differing[0]
        raise ValueError(
            f"{folder}: {CONFIG} says {key}={config.get(key)!r}, and {weights.name} was saved with "
            f"{key}={inside.get(key)!r}{' (and more differs)' if len(differing) > 1 else ''}. If the file was edited "
            f"or a save was interrupted, delete {CONFIG}: the weights carry their own copy"
        )
    return config


def _check_folder(folder: Path) -> None:
    """A sentence about what the folder is, if it is not ours."""
    if not folder.is_dir():
        raise ValueError(f"there is no file or folder {folder}")
    if weight_files(folder):
        return
    if (folder / "model" / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no model itself; did you mean {folder / 'model'}?")
    names = sorted(path.name for path in folder.iterdir())
    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
    raise ValueError(f"{folder} holds no model of this library: {WEIGHTS} is missing; found {found}")


def _config_inside(weights: Path) -> dict[str, Any] | None:
    """The copy of config.json in the header of the weights, if one was put there."""
    text = open_weights(weights).metadata.get("config")
    return None if text is None else parse_json(text, f"{weights}: the copy of {CONFIG} in its header")


def _located(
    from_dict: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    folder: Path,
) -> Any:
    """Errors of a config name the file they come from."""
    try:
        return from_dict(config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def _read_tensors(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Every tensor of the weights; names and shapes must be exactly the expected ones."""
    entries = open_weights(folder).entries
    for name in sorted(entries.keys() - expected.keys()):
        raise ValueError(f"{entries[name].file} holds {name!r}, which this model has not{did_you_mean(name, expected)}")
    if missing := sorted(expected.keys() - entries.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{folder} lacks {missing[0]!r}{more}, so the model would be incomplete")
    for name, shape in expected.items():
        if entries[name].shape != shape:
            found = list(entries[name].shape)
            raise ValueError(f"{entries[name].file}: {name} has shape {found}, and {CONFIG} describes {list(shape)}")
    return {name: entries[name].read() for name in expected}
