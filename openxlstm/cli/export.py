"""`xlstm export`: the model of a run, for use elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from openxlstm.cli.common import nearest, show_facts, show_json, size

if TYPE_CHECKING:
    from openxlstm.checkpoint.convert import To


@click.command(short_help="Take the model out of a run's checkpoint, in any layout.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["ours", "hf", "nxai", "nxai-large"]),
    default="ours",
    show_default=True,
    help="The layout to write.",
)
@click.option("--ema", is_flag=True, help="The running average of the weights, if the run keeps one (optim.ema).")
@click.option("--step", type=int, help="The checkpoint of this step.  [default: the newest]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export(run: Path, target: Path, to: To, ema: bool, step: int | None, as_json: bool) -> None:
    """Write the model of RUN, a run folder, into the new folder TARGET, its tokenizer and resolved.json beside it.

    The run may be going on: the newest complete checkpoint is read, and nothing in RUN is changed. A finished run has
    its model in RUN/model already, which `xlstm convert` takes as well.

    \b
      xlstm export runs/demo demo-hf --to hf
      xlstm export runs/demo average --ema --step 400
    """
    from openxlstm.train.export import export as export_run

    if not run.exists():
        raise ValueError(f"there is no {run}{nearest(run)}")
    report = export_run(run, target, to=to, ema=ema, step=step)
    if as_json:
        show_json(report.to_dict())
        return
    show_facts(report.target, {
        "model": f"{report.architecture}, {report.parameters:,} parameters",
        "from": report.source + (", running average" if ema else ""),
        "to": f"{report.to}, {len(report.files)} files, {size(report.bytes)}: {', '.join(report.files)}",
        **({"note": "\n".join(report.notes)} if report.notes else {}),
    })  # fmt: skip
