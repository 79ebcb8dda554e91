"""`xlstm convert`: a checkpoint from any layout into any other, or into one quantised file."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from openxlstm.cli.common import nearest, show_facts, show_json, size, tokenizer_of

if TYPE_CHECKING:
    from openxlstm.checkpoint import gguf_write
    from openxlstm.checkpoint.convert import Progress, Report, To
    from openxlstm.checkpoint.rules_nx import Backend

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@click.command(short_help="Convert a checkpoint: ours, Hugging Face, NX-AI, GGUF.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["hf", "nxai", "nxai-large", "ours", "gguf"]),
              help="The layout to write.  [default: gguf if TARGET ends in .gguf]")  # fmt: skip
@click.option("--quant", type=click.Choice(["q8_0", "q4_0", "q4_1", "bf16", "f32"]),
              help="With --to gguf: what most matrices become.  [default: q8_0]")  # fmt: skip
@click.option("--check", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="With --to gguf: a text, of which SOURCE and TARGET then tell their perplexities.")  # fmt: skip
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
    source: Path,
    target: Path,
    to: str | None,
    quant: gguf_write.Quant | None,
    check: Path | None,
    config: Path | None,
    shard_size: str,
    slstm_layout: Backend,
    as_json: bool,
) -> None:
    """Write the checkpoint SOURCE, a folder or a file of weights, into the new folder TARGET in another layout.

    Whose layout SOURCE has is found out by itself. It works tensor by tensor, reads what it wrote, and compares it bit
    by bit with the source; TARGET appears complete or not at all. Tokenizer files are copied. A TARGET that ends in
    .gguf is one file with quantised matrices and the tokenizer inside, as docs/checkpoints.md explains.

    \b
      xlstm convert xLSTM-7b ours-7b --to ours
      xlstm convert runs/demo demo.gguf --quant q4_0
      xlstm convert runs/demo demo-hf --to hf
      xlstm convert model.pt model --to ours --config model.yaml
    """
    from openxlstm.checkpoint.convert import convert as convert_checkpoint

    if not source.exists():
        raise ValueError(f"there is no {source}{nearest(source)}")
    if (source / "model" / "config.json").is_file() and not (source / "config.json").is_file():
        source = source / "model"  # of a run
    if to == "gguf" or (to is None and target.suffix == ".gguf"):
        _to_gguf(source, target, quant or "q8_0", check, config, as_json)
        return
    if quant is not None or check is not None:
        raise ValueError(f"--{'check' if quant is None else 'quant'} is about GGUF files; end TARGET in .gguf")
    if to is None:
        raise ValueError("--to is missing: the layout to write, one of hf, nxai, nxai-large, ours, gguf")
    started = time.perf_counter()
    with Bar(target.name, shown=sys.stderr.isatty() and not as_json) as progress:
        report = convert_checkpoint(
            source, target, to=cast("To", to), config=config, shard_size=read_size(shard_size),
            slstm_layout=slstm_layout, progress=progress,
        )  # fmt: skip
    seconds = round(time.perf_counter() - started, 2)
    show_json(report.to_dict() | {"seconds": seconds}) if as_json else _show(report, seconds)


def _to_gguf(
    source: Path, target: Path, quant: gguf_write.Quant, check: Path | None, config: Path | None, as_json: bool
) -> None:
    from openxlstm.checkpoint.gguf_write import to_gguf
    from openxlstm.tasks.scoring import read_text_ids

    ids = None if check is None else read_text_ids(check, tokenizer_of(source))  # what is wrong is said before the work
    started = time.perf_counter()
    with Bar(target.name, shown=sys.stderr.isatty() and not as_json) as progress:
        report = to_gguf(source, target, quant=quant, config=config, progress=progress)
    seconds = round(time.perf_counter() - started, 2)
    found = {} if ids is None else {"check": _perplexities(source, target, config, ids)}
    show_json(report.to_dict() | {"seconds": seconds} | found) if as_json else _show_gguf(report, seconds, found)


def _perplexities(source: Path, target: Path, config: Path | None, ids: list[int]) -> dict[str, float | int]:
    """exp of the mean loss per token of the text, of both models, one after the other in memory."""
    from openxlstm.checkpoint.store import load
    from openxlstm.tasks.scoring import perplexity

    before = perplexity(load(source, config=config).eval(), ids)
    after = perplexity(load(target), ids)
    return {"tokens": len(ids) - 1, "source": before, "target": after, "change": after / before - 1}


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


def _show_gguf(report: gguf_write.Report, seconds: float, found: dict[str, Any]) -> None:
    from openxlstm.checkpoint.plan import LAYOUTS

    kinds = "; ".join(f"{kind}: {count} tensors, {size(nbytes)}" for kind, (count, nbytes) in report.kinds.items())
    wider = f"{len(report.wider)} ({', '.join(report.wider[:3])}{', ...' if len(report.wider) > 3 else ''})"
    check = found.get("check")
    show_facts(report.target, {
        "architecture": f"{report.architecture}, {report.parameters:,} parameters",
        "from": f"{LAYOUTS[report.layout]}, {report.source}",
        "to": f"GGUF, {report.quant}, {size(report.bytes)} in {seconds:.1f} s",
        "stored as": kinds,
        **({"wider": f"bf16, since their rows do not divide into blocks of 32: {wider}"} if report.wider else {}),
        "tokenizer": "inside" if report.tokenizer else "none: no tokenizer.json lies beside the source",
        "verified": f"{report.verified} tensors read again: the bytes that were written",
        **({"perplexity": f"{check['source']:.4f} before, {check['target']:.4f} after ({check['change']:+.2%}), "
                          f"of {check['tokens']:,} tokens"} if check else {}),
        **({"note": "\n".join(report.notes)} if report.notes else {}),
    })  # fmt: skip
