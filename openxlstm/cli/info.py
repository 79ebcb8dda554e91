"""`xlstm info`: what a model, a preset, a recipe or this installation is made of."""

from __future__ import annotations

import platform
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from openxlstm.cli.common import model_folder, nearest, short, show_facts, show_json, show_table, size

if TYPE_CHECKING:
    from openxlstm.models.accounting import Own


@click.command(short_help="Show what a model, a preset, a recipe or this installation is made of.")
@click.argument("what", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes as whole numbers.")
def info(what: str | None, as_json: bool) -> None:
    """Show what WHAT is made of, without building it: parameters, what each block is, state, FLOPs.

    WHAT is the folder of a run or a model, a GGUF file, a recipe (a file, or the name of a shipped one), or a preset.
    Without it: versions, which kernel serves which call here and why, and the presets.

    \b
      xlstm info
      xlstm info xlstm-7b
      xlstm info runs/demo --json
    """
    if what is None:
        show_json(installation()) if as_json else _show_installation(installation())
    else:
        config, origin = find_config(what)
        facts = {"name": what, "from": origin, **anatomy(config), **stored(what)}
        show_json(facts) if as_json else _show_anatomy(facts)


def find_config(what: str) -> tuple[Own, str]:
    """The model's config that `what` names, and where it is from. What exists on disk goes before names.

    Raises:
        ValueError: nothing of that name; the nearest one is offered.
    """
    from openxlstm.data.tokenizer import Tokenizer
    from openxlstm.models.presets import PRESETS
    from openxlstm.train import config as recipes

    path = Path(what)
    if path.is_dir() or path.suffix == ".gguf":
        from openxlstm.checkpoint.store import load_config

        folder = model_folder(path)
        return load_config(folder), f"model in {folder}"
    if what in PRESETS and not path.exists():
        return PRESETS[what].config, f"preset, {PRESETS[what].source}"
    try:
        file = recipes.find(what)
    except ValueError:
        known = [*PRESETS, *recipes.shipped()]
        raise ValueError(f"there is no folder, recipe or preset {what!r}{nearest(path, known)}") from None
    recipe, table = recipes.load(file)
    tokenizer = recipe.data.tokenizer
    words = Tokenizer.bytes() if tokenizer == "bytes" else Tokenizer.from_file(tokenizer)
    config = recipes.resolve(recipe, table, words.vocab_size).model_config()
    if config.__class__.__module__.startswith("openxlstm.hf"):
        raise ValueError(f"{file} trains a {config.label} to compare with; info shows what models of this library are")
    return config, f"recipe {file}"


def anatomy(config: Own) -> dict[str, Any]:
    """A model in numbers, from its config alone."""
    from openxlstm.models.accounting import count_parameters, flops_per_token, parameters_by_part, state_bytes
    from openxlstm.models.xlstm import xLSTMConfig

    parts = parameters_by_part(config)
    pattern = config.pattern if isinstance(config, xLSTMConfig) else "m" * config.blocks
    blocks, first = [], 0
    for kind, run in groupby(pattern):
        count = len(list(run))
        one = replace(config, pattern=kind) if isinstance(config, xLSTMConfig) else replace(config, blocks=1)
        name = "mLSTM" if kind == "m" else "sLSTM"
        blocks.append({
            "first": first, "last": first + count - 1, "kind": name, "about": _about(config, kind),
            "parameters_each": parts[f"{name} blocks"] // pattern.count(kind), "state_bytes_each": state_bytes(one),
        })  # fmt: skip
        first += count
    forward = flops_per_token(config)
    return {
        "label": config.label, "pattern": pattern, "parameters": count_parameters(config), "parts": parts,
        "blocks": blocks, "state_bytes": state_bytes(config), "flops_per_token": forward,
        "training_flops_per_token": 3 * forward, "config": config.to_dict(),
    }  # fmt: skip


def stored(what: str) -> dict[str, Any]:
    """How the numbers lie in a GGUF file; nothing of what is none."""
    from openxlstm.checkpoint.gguf import is_gguf, open_gguf

    path = Path(what)
    if not is_gguf(path):
        return {}
    kinds = {kind: {"tensors": n, "bytes": size} for kind, (n, size) in open_gguf(path).kinds().items()}
    return {"file_bytes": path.stat().st_size, "stored": kinds}


def installation() -> dict[str, Any]:
    """Versions, the machine, which kernel serves which call here, and the presets."""
    import torch

    from openxlstm import __version__, kernels
    from openxlstm.kernels.dispatch import BACKENDS
    from openxlstm.models.accounting import state_bytes
    from openxlstm.models.presets import PRESETS

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    presets = [
        {
            "name": name, "label": preset.config.label, "parameters": preset.parameters,
            "state_bytes": state_bytes(preset.config), "source": preset.source,
        }
        for name, preset in PRESETS.items()
    ]  # fmt: skip
    return {
        "openxlstm": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "system": platform.platform(), "threads": torch.get_num_threads(), "gpu": gpu,
        "backends": {backend.name: backend.about for backend in BACKENDS},
        "kernels": kernels.explain_table(), "presets": presets,
    }  # fmt: skip


def _about(config: Own, kind: str) -> str:
    """One block in one line; the numbers are its widths."""
    from openxlstm.models.xlstm import xLSTMConfig

    H, D = config.heads, config.width
    if not isinstance(config, xLSTMConfig):
        return f"matrix memory: {H} heads of {config.QK // H} × {config.HV // H}; feed-forward {config.U_f}"
    conv = f"conv {config.conv}" if config.conv else "no conv"
    if kind == "m":
        return f"matrix memory: {H} heads of {config.U_m // H} × {config.U_m // H}; width {config.U_m}, {conv}"
    return f"scalar memory: {H} mixing heads of {D // H}; {conv}, feed-forward {config.U_f}"


def _show_anatomy(facts: dict[str, Any]) -> None:
    total, state = facts["parameters"], facts["state_bytes"]
    show_facts(facts["name"], {
        "architecture": facts["label"],
        "from": facts["from"],
        "parameters": f"{total:,} ({size(4 * total)} in fp32, {size(2 * total)} in bf16)",
        **_storage(facts),
        "state": f"{state:,} bytes per sequence ({size(state)}), however long the text",
        "FLOPs per token": f"{short(facts['flops_per_token'])} forward, "
                           f"{short(facts['training_flops_per_token'])} in training",
    })  # fmt: skip
    parts = [(part, count, f"{100 * count / total:.1f} %") for part, count in facts["parts"].items() if count]
    show_table("Parameters by part", ("part", "parameters", "share"), parts, numbers=(1, 2))
    rows = [
        (
            f"{run['first']}" if run["first"] == run["last"] else f"{run['first']} to {run['last']}",
            run["kind"], run["about"], run["parameters_each"], size(run["state_bytes_each"]),
        )
        for run in facts["blocks"]
    ]  # fmt: skip
    show_table("Blocks, first to last", ("block", "kind", "what it is", "parameters", "state"), rows, numbers=(3, 4))


def _storage(facts: dict[str, Any]) -> dict[str, str]:
    if "stored" not in facts:
        return {}
    parts = [f"{kind}: {part['tensors']} tensors, {size(part['bytes'])}" for kind, part in facts["stored"].items()]
    return {"file": f"{size(facts['file_bytes'])}; {'; '.join(parts)}"}


def _show_installation(facts: dict[str, Any]) -> None:
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    show_facts("openxlstm " + facts["openxlstm"], {
        "torch": facts["torch"], "python": facts["python"], "system": facts["system"],
        "runs on": facts["gpu"] or f"CPU, {threads}",
    })  # fmt: skip
    kernels = [tuple(row.values()) for row in facts["kernels"]]
    show_table("Which kernel serves which call here", tuple(facts["kernels"][0]), kernels)
    show_facts("Backends", facts["backends"])
    presets = [
        (
            row["name"],
            row["label"],
            row["parameters"],
            size(row["state_bytes"]),
            row["source"].split(",")[0].split(" ")[0],
        )
        for row in facts["presets"]
    ]
    columns = ("preset", "architecture", "parameters", "state", "source")
    show_table("Presets: xlstm info NAME shows one", columns, presets, numbers=(2, 3))
