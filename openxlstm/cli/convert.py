"""`xlstm convert`: a checkpoint from any layout into any other."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from openxlstm.cli.common import nearest, show_facts, show_json, size

if TYPE_CHECKING:
    from openxlstm.checkpoint.convert import Progress, Report, To
    from openxlstm.checkpoint.rules_nx import Backend

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@click.command(short_help="Convert a checkpoint: ours, Hugging Face, NX-AI xlstm and xlstm_large.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to", required=True, type=click.Choice(["hf", "nxai", "nxai-large", "ours"]), help="The layout to write."
)
@click.option(
    "--config", type=click.Path(path_type=Path), help="The config (.json, .yaml) of weights that have none beside them."
)
@click.option("--shard-size", default="5GB", show_default=True, help="The most bytes of one file, such as 500MB.")
@click.option(
    "--slstm-layout",
    type=click.Choice(["vanilla", "cuda"]),
    default="vanilla",
    show_default=True,
    help="With --to nxai: the sLSTM backend that shall load the result.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(
    source: Path, target: Path, to: To, config: Path | None, shard_size: str, slstm_layout: Backend, as_json: bool
) -> None:
    """Write the checkpoint SOURCE, a folder or a file of weights, into the new folder TARGET in another layout.

    Whose layout SOURCE has is found out by itself. It works tensor by tensor, reads what it wrote, and compares it bit
    by bit with the source; TARGET appears complete or not at all. Tokenizer files are copied.

    \b
      xlstm convert xLSTM-7b ours-7b --to ours
      xlstm convert runs/demo demo-hf --to hf
      xlstm convert model.pt model --to ours --config model.yaml
    """
    from openxlstm.checkpoint.convert import convert as convert_checkpoint

    if not source.exists():
        raise ValueError(f"there is no {source}{nearest(source)}")
    if (source / "model" / "config.json").is_file() and not (source / "config.json").is_file():
        source = source / "model"  # of a run
    started = time.perf_counter()
    with Bar(target.name, shown=sys.stderr.isatty() and not as_json) as progress:
        report = convert_checkpoint(
            source, target, to=to, config=config, shard_size=read_size(shard_size), slstm_layout=slstm_layout,
            progress=progress,
        )  # fmt: skip
    seconds = round(time.perf_counter() - started, 2)
    show_json(report.to_dict() | {"seconds": seconds}) if as_json else _show(report, seconds)


def read_size(text: str) -> int:
    """Bytes in a size such as 500MB (10^6) or 2GiB (2^30).

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise ValueError(f"--shard-size {text!r} must be a positive size such as 500MB, 5GB or 2GiB")
    return max(1, int(float(match[1]) * UNITS[match[2]]))


class Bar:
    """A bar of progress on a terminal, nothing elsewhere: the callable that a conversion tells its bytes."""

    def __init__(self, title: str, *, shown: bool):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), disable=not shown, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(f"{title}: writes, then reads again", total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self.tell

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def tell(self, done: int, total: int) -> None:
        """Bytes written and read again so far, and in all."""
        self._bar.update(self._task, completed=done, total=total)


def _show(report: Report, seconds: float) -> None:
    from openxlstm.checkpoint.plan import LAYOUTS

    same = "equal to the source bit by bit"
    if report.rounded:
        same += f", but for norms that are stored as weight - 1 and moved by {report.rounded:.1e} at most"
    show_facts(report.target, {
        "architecture": f"{report.architecture}, {report.parameters:,} parameters",
        "from": f"{LAYOUTS[report.layout]}, {report.source}",
        "to": f"{LAYOUTS[report.to]}, {len(report.files)} files, {size(report.bytes)} in {seconds:.1f} s",
        "verified": f"{report.verified} tensors read again: {same}",
        **({"note": "\n".join(report.notes)} if report.notes else {}),
    })  # fmt: skip
