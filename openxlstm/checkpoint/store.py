"""A model in a folder: model.safetensors (the numbers) and config.json (the facts), nothing else.

Writing is atomic: a file appears under its name complete, or the one that was there stays. The weights carry a copy of
the config, so a crash between the two files is noticed and can be mended. Foreign files in the folder are left alone.

Reading is strict: an unknown, missing or mis-shaped tensor and an unknown config key are errors by name. Nothing is
executed. Tensors are mapped from the file and copied one at a time: in place they would start at odd addresses, where
matmuls take other paths, and the loaded model would differ from the saved one in its last bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openxlstm.models.checks import did_you_mean
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"

Model = xLSTM | xLSTMLarge


def save(model: Model, folder: str | os.PathLike[str]) -> None:
    """Write the model into the folder, which is created if needed. The dtype of every tensor is kept.

    A failure (a full disk, a signal) leaves what was there before and raises.
    """
    if not isinstance(model, (xLSTM, xLSTMLarge)):
        raise ValueError(
            f"save() takes an xLSTM or an xLSTMLarge; got {type(model).__name__}. Of a wrapped or compiled model, pass "
            f"the model inside; of any other module, save state_dict()"
        )
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
    folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Model:
    """The model that `save` wrote, ready for use (`.train()` to go on training).

    Args:
        device: where its tensors go.
        dtype: what they become; None keeps each tensor's own.

    Raises:
        ValueError: anything missing, unknown or damaged, by name.
    """
    folder = Path(folder)
    config = load_config(folder)
    with torch.device("meta"):  # the numbers come from the file, so none are drawn
        model: Model = xLSTM(config) if isinstance(config, xLSTMConfig) else xLSTMLarge(config)
    tensors = _read_tensors(folder / WEIGHTS, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    model.load_state_dict(
        {name: t.to(device=device, dtype=dtype, copy=True) for name, t in tensors.items()}, assign=True
    )
    return model.eval()


def load_config(folder: str | os.PathLike[str]) -> xLSTMConfig | xLSTMLargeConfig:
    """The config of the model in the folder, without reading its weights: of 7B parameters as fast as of 7M.

    Raises:
        ValueError: anything missing, unknown or damaged, by name.
    """
    folder = Path(folder)
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
    if os.name == "posix":  # the new name itself must survive a power cut; Windows cannot open folders
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    """What the user's new files are not allowed. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json, checked against the copy inside the weights."""
    _check_folder(folder)
    inside = _config_inside(folder / WEIGHTS)
    if not (folder / CONFIG).exists():
        if inside is None:
            raise ValueError(f"{folder} lacks {CONFIG}, and {WEIGHTS} carries no copy of it")
        return inside
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON, or not text at all
        raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} must hold an object; it holds {type(config).__name__}")
    if inside is not None and inside != config:
        differing = sorted(key for key in inside.keys() | config.keys() if inside.get(key) != config.get(key))
        key = differing[0]
        raise ValueError(
            f"{folder}: {CONFIG} says {key}={config.get(key)!r}, and {WEIGHTS} was saved with {key}={inside.get(key)!r}"
            f"{' (and more differs)' if len(differing) > 1 else ''}. If the file was edited or a save was interrupted, "
            f"delete {CONFIG}: the weights carry their own copy"
        )
    return config


def _check_folder(folder: Path) -> None:
    """A sentence about what the folder is, if it is not ours."""
    if (folder / WEIGHTS).is_file():
        return
    if folder.is_file():
        raise ValueError(f"{folder} is a file; load() takes the folder that holds {WEIGHTS} and {CONFIG}")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    if (folder / "model" / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no model itself; did you mean {folder / 'model'}?")
    names = sorted(path.name for path in folder.iterdir())
    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
    raise ValueError(f"{folder} holds no model of this library: {WEIGHTS} is missing; found {found}")


def _config_inside(weights: Path) -> dict[str, Any] | None:
    """The copy of config.json in the header of the weights, if one was put there."""
    with _open(weights) as file:
        text = (file.metadata() or {}).get("config")
    if text is None:
        return None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{weights}: the copy of {CONFIG} in its header is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{weights}: the copy of {CONFIG} in its header holds {type(config).__name__}, not an object")
    return config


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


def _read_tensors(weights: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Every tensor of the file; names and shapes must be exactly the expected ones, numbers floating-point."""
    with _open(weights) as file:
        names = set(file.keys())
        for name in sorted(names - expected.keys()):
            raise ValueError(f"{weights} holds {name!r}, which this model has not{did_you_mean(name, expected)}")
        if missing := sorted(expected.keys() - names):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{weights} lacks {missing[0]!r}{more}, so the model would be incomplete")
        tensors = {}
        for name, shape in expected.items():
            if tuple(file.get_slice(name).get_shape()) != shape:
                found = list(file.get_slice(name).get_shape())
                raise ValueError(f"{weights}: {name} has shape {found}, and {CONFIG} describes {list(shape)}")
            tensors[name] = file.get_tensor(name)
            if not tensors[name].is_floating_point():
                raise ValueError(f"{weights}: {name} is {tensors[name].dtype}; a model's tensors are floating-point")
    return tensors


def _open(weights: Path) -> Any:
    try:
        return safe_open(weights, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is damaged or incomplete ({error}); was a copy or a download interrupted?"
        ) from error
