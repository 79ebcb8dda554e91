"""A model out of a run's checkpoint, in any layout that conversions know, with its tokenizer and where it came from."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openxlstm.checkpoint import convert, folders
from openxlstm.checkpoint.convert import Report, To
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.train import checkpoints
from openxlstm.train.config import FILES
from openxlstm.train.folder import RESOLVED
from openxlstm.train.log import read_json
from openxlstm.train.recipe import ARCHITECTURES


def export(run: Path, target: Path, *, to: To, ema: bool = False, step: int | None = None) -> Report:
    """Write the model of a run into the new folder `target`, tokenizer.json and resolved.json beside it.

    The run may be going on: only a complete checkpoint is read.

    Args:
        run: the run folder.
        to: the layout; see `convert.export`.
        ema: the running average of the weights instead of the weights.
        step: of which checkpoint; None: the newest.

    Raises:
        ValueError: there is no such checkpoint, no average in it, or the layout cannot say this model.
        OSError: it could not be written. There is no `target` then.
    """
    path = choose(run, step)
    facts = read_json(run / RESOLVED, "recipe") if (run / RESOLVED).exists() else {}
    meta = checkpoints.read_meta(path)
    taken = {"step": meta["progress"]["step"], "weights": "running average" if ema else "as trained"}
    model = read_model(path, meta["recipe"], ema=ema)
    with folders.appearing(target) as hidden, tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch) / "tokenizer.json"
        tokenizer_of(run, meta["recipe"]).save(tokenizer)
        report = convert.export(model, hidden, to=to, tokenizer=tokenizer)
        said = json.dumps({**facts, "recipe": meta["recipe"], "exported": taken}, indent=1)
        (hidden / RESOLVED).write_text(said + "\n", encoding="utf-8")
    return replace(report, source=str(path), target=str(target), files=(*report.files, RESOLVED))


def choose(run: Path, step: int | None = None) -> Path:
    """The checkpoint that `run` means: a checkpoint itself, or one of a run folder, the newest or that of `step`.

    Raises:
        ValueError: there is none; the message says which there are.
    """
    if checkpoints.NAME.fullmatch(run.name) and (run / "meta.json").exists() and step is None:
        return run
    found = {int(path.name.removeprefix("step-")): path for path in checkpoints.complete(run / "checkpoints")}
    if not found:
        finished = (run / "model" / "config.json").exists()
        instead = f"; its finished model is in {run / 'model'}, which `xlstm convert` takes" if finished else ""
        raise ValueError(f"{run} holds no complete checkpoint (checkpoints/step-...){instead}")
    if step is not None and step not in found:
        raise ValueError(f"{run} has no checkpoint of step {step}; there are {', '.join(map(str, found))}")
    return found[max(found) if step is None else step]


def read_model(path: Path, recipe: dict[str, Any], *, ema: bool = False) -> Any:
    """The model of a checkpoint, in evaluation mode on the CPU.

    Raises:
        ValueError: the checkpoint is damaged, keeps no average, or is of another model than its recipe says.
    """
    tensors = checkpoints.read_tensors(path, "ema" if ema else "model")
    if ema and not tensors:
        raise ValueError(f"{path} keeps no running average: the run had no optim.ema; without --ema its weights serve")
    said = dict(recipe["model"])
    if (name := said.pop("architecture")) not in ARCHITECTURES:
        raise ValueError(f"{path} is of a model that xLSTMs are compared with, {name!r}; only xLSTMs are exported")
    config, build = ARCHITECTURES[name]
    with torch.device("meta"):  # the numbers come from the file, so none are drawn
        model = build(config.from_dict(said))
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    if expected != {name: weight.shape for name, weight in tensors.items()}:
        odd = sorted(name for name in expected.keys() | tensors.keys() if name not in expected or name not in tensors)
        raise ValueError(f"{path} does not hold the model that its recipe describes: {', '.join(odd[:3]) or 'shapes'}")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def tokenizer_of(run: Path, recipe: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a run: the copy beside its model, or else what its recipe names.

    Raises:
        ValueError: it is not there any more.
    """
    said = recipe["data"]["tokenizer"]
    if (copy := run / "model" / "tokenizer.json").exists():
        return Tokenizer.from_file(copy)
    if said == FILES["data.tokenizer"]:
        return Tokenizer.bytes()
    if not Path(said).exists():
        raise ValueError(f"the tokenizer of {run} is gone: {said}; put it back, or a copy at {copy}")
    return Tokenizer.from_file(said)
