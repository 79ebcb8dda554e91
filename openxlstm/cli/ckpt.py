"""`xlstm ckpt`: what is in a checkpoint, how two differ, and one without pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from openxlstm.cli.common import console, show_facts, show_json, show_table, size

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.group(short_help="Look into checkpoints: info, diff, consolidate.")
def ckpt() -> None:
    """Look into the checkpoints of a run. Where a checkpoint is asked for, a run folder means its newest one.

    \b
      xlstm ckpt info runs/demo
      xlstm ckpt diff runs/demo/checkpoints/step-00000200 runs/demo
      xlstm ckpt consolidate runs/demo demo.safetensors
    """


@ckpt.command(short_help="Where the run stood, and what is saved of it.")
@click.argument("path", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(path: Path, as_json: bool) -> None:
    """Say where the run stood at the checkpoint PATH, and how many tensors, numbers and bytes each part of it has."""
    from openxlstm.train.examine import overview

    found = overview(path)
    if as_json:
        show_json(found)
        return
    at: dict[str, Any] = found["progress"]
    trouble = [f"{at[name]} {name}" for name in ("skips", "spikes", "rollbacks") if at.get(name)]
    best = "not measured yet" if at["best"] is None else f"{at['best']:.4f} bits/byte on the validation windows"
    if at.get("best_step") is not None:
        best += f", at step {at['best_step']}"
    show_facts(found["checkpoint"], {
        **({"run": found["title"]} if found["title"] else {}),
        "step": f"{at['step']:,}, {at['consumed']:,} rows read, {at['elapsed']:,.0f} s of training",
        "best": best,
        "trouble": ", ".join(trouble) or "none",
        "size": f"{size(found['bytes'])}, processes that wrote it: {found['processes']}",
        "beside": ", ".join(found["beside"]) or "no other checkpoint",
    })  # fmt: skip
    rows = [
        (name, part["tensors"], part["numbers"], size(part["bytes"]), " ".join(part["dtypes"]))
        for name, part in found["parts"].items()
    ]
    show_table("Parts", ("part", "tensors", "numbers", "size", "dtypes"), rows, numbers=(1, 2, 3))


@ckpt.command(short_help="How much each tensor changed between two checkpoints or models.")
@click.argument("first", type=FOLDER)
@click.argument("second", type=FOLDER)
@click.option("--part", default="model", show_default=True, help="model, ema, optimiser or extra.")
@click.option("--most", default=20, show_default=True, help="Rows to show, the most changed first; 0 for all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, all rows.")
def diff(first: Path, second: Path, part: str, most: int, as_json: bool) -> None:
    """Say how much each tensor changed from FIRST to SECOND: checkpoints, run folders, or model folders.

    "change" compares Frobenius norms, |b - a| / |a|; "largest" compares the largest single numbers.
    """
    from openxlstm.train.examine import difference

    rows = difference(first, second, part)
    if as_json:
        show_json({"first": str(first), "second": str(second), "part": part, "tensors": rows})
        return
    changed = [row for row in rows if row["change"]]
    shown = changed[: most or None]
    title = f"{len(changed)} of {len(rows)} tensors differ"
    cells = [(row["name"], str(row["shape"]), f"{row['change']:.2e}", f"{row['largest']:.2e}") for row in shown]
    show_table(title, ("tensor", "shape", "change", "largest"), cells, numbers=(2, 3))
    if len(shown) < len(changed):
        console().print(f"{len(changed) - len(shown)} more; --most 0 shows all")


@ckpt.command(short_help="All tensors of a checkpoint in one safetensors file.")
@click.argument("path", type=FOLDER)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--part", "parts", multiple=True, help="Only this part: model, ema, optimiser, extra. May be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def consolidate(path: Path, file: Path, parts: tuple[str, ...], as_json: bool) -> None:
    """Write every tensor of the checkpoint PATH into the new safetensors FILE, as PART.NAME.

    The file holds no pickles, needs no PyTorch to be read, and carries meta.json in its header.
    """
    from openxlstm.train.examine import PARTS
    from openxlstm.train.examine import consolidate as write

    counts = write(path, file, parts or PARTS)
    written = file.stat().st_size
    if as_json:
        show_json({"file": str(file), "bytes": written, "tensors": counts})
    else:
        show_facts(str(file), {"size": size(written)} | {part: f"{count} tensors" for part, count in counts.items()})
