"""`make gpu`: parity on the device, then the figures, in one command within a limit of seconds.

What matters most comes first. Every stage is a process of its own, with what is left of the time; what it finds is on
disk at once. No figure is taken of an operation whose parity is red, and none is written for a CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import click

from openxlstm.bench.gpu.report import NEEDS, Report
from openxlstm.bench.gpu.stage import STAGES

SHARES = {  # of the limit, at most; what a stage does not use is there for the next
    "parity": 0.40, "mlstm": 0.22, "step": 0.06, "slstm": 0.12, "train": 0.15, "decode": 0.12, "compilations": 0.08,
    "curve": 0.12,
}  # fmt: skip
GRACE = 20.0  # seconds after its time in which a stage may finish a case


@click.command()
@click.option("--limit", type=click.FloatRange(min=1), default=540.0, show_default=True, help="Seconds for everything.")
@click.option("--only", multiple=True, type=click.Choice(list(STAGES)), help="This stage, with the parity before it.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="cpu: a test.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes of the parity.  [default: one for two cores]")
@click.option("--out", type=click.Path(path_type=Path), default="runs/gpu.json", show_default=True, help="Findings.")
@click.option("--write", "file", type=click.Path(path_type=Path), help="Also the GPU's part of this page.")
def main(limit: float, only: tuple[str, ...], device: str, workers: int | None, out: Path, file: Path | None) -> None:
    """Compare every Triton kernel with the definition on this GPU, then time them beside the peers that are there."""
    from openxlstm.bench import page
    from openxlstm.bench.gpu.device import describe, missing

    if device == "cuda" and (reason := missing()) is not None:
        raise click.ClickException(reason)
    if device == "cpu" and file is not None:
        raise click.UsageError("--write is for figures, and an interpreter on a CPU gives none; leave it out")
    from openxlstm.bench.gpu.peers import versions

    ends = time.monotonic() + limit
    command = " ".join(["python -m openxlstm.bench.gpu", *sys.argv[1:]])
    facts = describe(device)
    found = {
        "device": facts.pop("device"),
        "versions": facts,
        "peers": versions(),
        "command": command,
        "figures": device == "cuda",
    }
    report = Report(found | {"date": f"{datetime.now(UTC):%Y-%m-%d}"}, out)
    for stage in STAGES:
        if only and stage not in only and stage != "parity":
            continue
        if stage != "parity" and (why := report.refuses(stage)) is not None:
            report.add({"kind": "failed", "case": stage, "reason": why})
            continue
        count = (workers or max(1, (os.cpu_count() or 2) // 2)) if stage == "parity" else 1
        seconds = min(ends - time.monotonic() - GRACE, SHARES[stage] * limit) if device == "cuda" else limit
        click.echo(f"{stage}: at most {max(seconds, 0):.0f} s", err=True)
        if seconds < GRACE and device == "cuda":
            report.add({"kind": "left", "case": stage, "reason": "the time is over"})
            continue
        _stage(report, stage, device, seconds, count)
        if file is not None:
            page.replace(file, "gpu", report.markdown())
    click.echo(report.markdown())
    click.echo(f"Findings: {out}", err=True)
    if not report.green:
        raise click.ClickException("not everything is green; see Failed and the parity above")


def _stage(report: Report, stage: str, device: str, seconds: float, count: int) -> None:
    """Run a stage in `count` processes at once and take what they say."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    lock = threading.Lock()

    def one(shard: str) -> None:
        command = [sys.executable, "-m", "openxlstm.bench.gpu.stage", stage, device, str(seconds), shard]
        errors = report.file.with_suffix(f".{stage}.{shard.replace('/', '-of-')}.log")
        with errors.open("w", encoding="utf-8") as log:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
            watch = threading.Timer(seconds + GRACE / 2, child.kill)
            watch.start()
            finished = False
            assert child.stdout is not None
            for line in child.stdout:
                if not line.startswith('{"kind"'):
                    continue  # a peer's own words
                finding = json.loads(line)
                finished = finished or finding.get("done") == stage
                with lock:
                    report.add(finding)
            code = child.wait()
            watch.cancel()
        if not finished:
            why = f"ended with code {code} before it was done; its last words are in {errors}"
            with lock:
                report.add({"kind": "failed", "case": f"stage {stage}, share {shard}", "reason": why})

    threads = [threading.Thread(target=one, args=(f"{n}/{count}",)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


assert set(SHARES) == set(STAGES) == {"parity", *NEEDS}, "every stage has its share and its needs"

if __name__ == "__main__":
    main()
