"""xLSTM that simply works: exact cells, both published architectures, training, and generation with constant memory.

The public names, and nothing that runs: each is imported when it is first used, so that `xlstm --help` and a program
that needs one cell do not pay for the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openxlstm import cells as cells
    from openxlstm import kernels as kernels
    from openxlstm import rnn as rnn
    from openxlstm.cells import mLSTMState as mLSTMState
    from openxlstm.cells import sLSTMState as sLSTMState
    from openxlstm.checkpoint.store import load as load
    from openxlstm.checkpoint.store import save as save
    from openxlstm.data.tokenizer import Tokenizer as Tokenizer
    from openxlstm.infer.generate import generate as generate
    from openxlstm.infer.generate import stream as stream
    from openxlstm.models.xlstm import xLSTM as xLSTM
    from openxlstm.models.xlstm import xLSTMConfig as xLSTMConfig
    from openxlstm.models.xlstm import xLSTMStack as xLSTMStack
    from openxlstm.models.xlstm import xLSTMStackConfig as xLSTMStackConfig
    from openxlstm.models.xlstm_large import xLSTMLarge as xLSTMLarge
    from openxlstm.models.xlstm_large import xLSTMLargeConfig as xLSTMLargeConfig

__version__ = "0.1.0.dev0"

_HOME = {  # public name: module that has it; "" for a module itself
    "Tokenizer": "openxlstm.data.tokenizer",
    "cells": "",
    "generate": "openxlstm.infer.generate",
    "kernels": "",
    "load": "openxlstm.checkpoint.store",
    "mLSTMState": "openxlstm.cells",
    "rnn": "",
    "sLSTMState": "openxlstm.cells",
    "save": "openxlstm.checkpoint.store",
    "stream": "openxlstm.infer.generate",
    "xLSTM": "openxlstm.models.xlstm",
    "xLSTMConfig": "openxlstm.models.xlstm",
    "xLSTMLarge": "openxlstm.models.xlstm_large",
    "xLSTMLargeConfig": "openxlstm.models.xlstm_large",
    "xLSTMStack": "openxlstm.models.xlstm",
    "xLSTMStackConfig": "openxlstm.models.xlstm",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'openxlstm' has no attribute {name!r}")
    home = _HOME[name]
    value = getattr(importlib.import_module(home), name) if home else importlib.import_module(f"openxlstm.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
