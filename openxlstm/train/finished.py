"""The model that a run left behind, whichever architecture it is: ours, or one that ours are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from openxlstm.checkpoint import store
from openxlstm.train.folder import RESOLVED
from openxlstm.train.log import read_json
from openxlstm.train.recipe import COMPARED, architecture


def load_finished(model: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The language model in a model folder, in evaluation mode.

    A folder of ours, or a GGUF file, says itself what it is. The folder of a baseline does not say how it was built
    here; the recipe of its run, `resolved.json` beside it, does.

    Args:
        model: runs/NAME/model, or any folder that `store.load` takes.
        dtype: None: as it was saved.

    Raises:
        ValueError: it is neither, or its architecture needs a package that is missing.
    """
    resolved = model.parent / RESOLVED
    if model.name == "model" and resolved.exists():
        said = dict(read_json(resolved, "recipe")["recipe"]["model"])
        if (name := said.pop("architecture", "")) in COMPARED:
            config, build = architecture(name)
            built = build(config.from_dict(said))
            built.restore(model)
            return built.to(device=device, dtype=dtype).eval()
    return store.load(model, device=device, dtype=dtype).eval()
