"""The plan of the house, enforced: imports go downward only, and what may be missing stays in its folder.

docs/architecture.md draws the same layers. An offence is reported as a sentence with file, line and rule.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "openxlstm"

LAYERS = (  # top to bottom; names on one line do not import each other
    ("cli",),
    ("serve", "bench", "experiments"),
    ("train", "infer"),
    ("hf", "tasks"),
    ("checkpoint", "data"),
    ("models", "rnn"),
    ("nn",),
    ("kernels",),
    ("cells",),
)
LEVEL = {name: len(LAYERS) - index for index, names in enumerate(LAYERS) for name in names}
DATA_ONLY = {"recipes"}  # folders of files that are read, not imported

CORE = {"torch", "numpy", "safetensors", "tokenizers", "jaxtyping", "click", "rich", "openxlstm"}
DEFINITION = {"torch", "jaxtyping", "openxlstm"}  # all that cells/ may know
OPTIONAL = {  # package: the folders that may import it
    "triton": ("kernels/triton",),
    "transformers": ("hf",),
    "huggingface_hub": ("hf",),
    "accelerate": ("hf",),
    "peft": ("hf",),
    "trl": ("hf",),
    "gguf": ("checkpoint",),
    "yaml": ("checkpoint",),
    "datatrove": ("data",),
    "pyarrow": ("data",),
    "zstandard": ("data",),
    "wandb": ("train",),
    "matplotlib": ("train", "bench", "experiments"),
    "lm_eval": ("tasks",),
    "sklearn": ("tasks",),
    "starlette": ("serve",),
    "uvicorn": ("serve",),
    "mlstm_kernels": ("bench",),  # the peers that our speed is compared with
    "xlstm": ("bench",),
}
HOMES = (
    "kernels/triton/",
    "hf/",
    "serve/",
    "train/plots.py",
    "experiments/pictures.py",
    "data/pipeline.py",
    "tasks/lm_eval.py",
)  # what exists for its dependency imports it at the top,
# and is itself imported only by functions, or by the same home


def imports(tree: ast.Module, file: str) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute dotted name, whether it runs when the file is imported) of everything that a file imports."""
    inside = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(scope)
        for node in ast.walk(scope)
    }
    package = ["openxlstm", *Path(file).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, id(node) not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}", id(node) not in inside) for alias in node.names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def dotted(path: str) -> str:
    """kernels/triton/ -> kernels.triton, train/plots.py -> train.plots"""
    return path.removesuffix(".py").strip("/").replace("/", ".")


def offences(file: str, source: str) -> list[str]:
    """Every broken rule of one file, as a sentence. `file` is its path below openxlstm/."""
    found = []
    own = Path(file).parts[0].removesuffix(".py")
    for line, module, at_import in imports(ast.parse(source), file):
        where, top = f"{file}:{line} imports {module}", module.split(".")[0]
        if top == "openxlstm":
            found += _layer_offence(where, own, module)
            home = next((home for home in HOMES if f"{module}.".startswith(f"openxlstm.{dotted(home)}.")), None)
            if home and at_import and not file.startswith(home):
                found.append(f"{where} at the top: {home} needs what can be missing, so import it in a function")
        elif top in OPTIONAL:
            folders = OPTIONAL[top]
            if not file.startswith(tuple(f"{folder}/" for folder in folders)):
                found.append(f"{where}: only {' and '.join(folders)} may, because it can be missing")
            elif at_import and not file.startswith(HOMES):
                found.append(f"{where} at the top: import it in the function that needs it, because it can be missing")
        elif own == "cells" and top not in DEFINITION | sys.stdlib_module_names:
            found.append(f"{where}: the definition knows torch only")
        elif top not in CORE | sys.stdlib_module_names:
            found.append(
                f"{where}: not a core dependency; use {', '.join(sorted(CORE - {'openxlstm'}))}, or make an extra"
            )
    return found


def _layer_offence(where: str, own: str, module: str) -> list[str]:
    """The package's own files import from lower lines only; its front door may import everything."""
    other = [*module.split("."), ""][1]
    if own in ("__init__", "__main__") or own == other or other.startswith("__"):
        return []
    unknown = [name for name in (own, other) if name not in LEVEL and name not in DATA_ONLY]
    if unknown:
        return [f"{where}: {unknown[0]} has no place in LAYERS; import from the module that defines it, or give it one"]
    if own not in DATA_ONLY and other not in DATA_ONLY and LEVEL[other] >= LEVEL[own]:
        beside = "stand on one line" if LEVEL[other] == LEVEL[own] else "would point upward"
        return [f"{where}: {own} may not import {other}, they {beside}".replace("they would", "it would")]
    return []


@pytest.mark.parametrize("file", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")))
def test_imports_go_downward_and_optional_packages_stay_home(file: str) -> None:
    found = offences(file, (PACKAGE / file).read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", sorted({path.parent for path in PACKAGE.rglob("*.py")}), ids=lambda path: path.name)
def test_a_folder_of_code_is_a_package_with_a_place(folder: Path) -> None:
    assert (folder / "__init__.py").is_file(), f"{folder} has no __init__.py"
    if folder != PACKAGE:
        top = folder.relative_to(PACKAGE).parts[0]
        assert top in LEVEL or top in DATA_ONLY, f"{top} has no place in LAYERS"


@pytest.mark.parametrize(
    ("file", "source", "sentence"),
    [
        ("infer/generate.py", "from openxlstm.train import loop", "infer may not import train, they stand on one line"),
        ("models/xlstm.py", "\nimport openxlstm.cli.info", ":2 imports openxlstm.cli.info: models may not import cli"),
        ("nn/norm.py", "def f():\n  from ..models import xlstm", "nn may not import models, it would point upward"),
        ("data/tokens.py", "from openxlstm import xLSTM", "xLSTM has no place in LAYERS"),
        ("train/report.py", "import matplotlib.pyplot as plt", "at the top: import it in the function"),
        ("models/xlstm.py", "import triton", "only kernels/triton may"),
        ("train/report.py", "from openxlstm.train import plots", "train/plots.py needs what can be missing"),
        ("cells/mlstm.py", "import numpy as np", "the definition knows torch only"),
        ("train/loop.py", "import requests", "not a core dependency"),
    ],
)
def test_an_offence_is_found_and_said(file: str, source: str, sentence: str) -> None:
    (found,) = offences(file, source)
    assert sentence in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("infer/generate.py", "import json\nimport torch\nfrom openxlstm.data.tokenizer import Tokenizer"),
        ("models/xlstm.py", "from openxlstm import kernels\nfrom . import interface\nfrom ..cells import State"),
        ("train/report.py", "def plot():\n    import matplotlib\n    from openxlstm.train import plots"),
        ("train/plots.py", "from matplotlib.axes import Axes"),
        ("kernels/triton/mlstm.py", "import triton"),
        ("__init__.py", "from openxlstm.models.xlstm import xLSTM as xLSTM"),
    ],
)
def test_what_is_allowed_is_allowed(file: str, source: str) -> None:
    assert offences(file, source) == []
