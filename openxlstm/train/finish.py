"""What happens after the last step: the model for use, the one look at the test split, the summary, the report."""

import json
from collections.abc import Callable
from typing import Any, Literal

from openxlstm.checkpoint import store
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import write_atomically
from openxlstm.data.windows import Stream
from openxlstm.models.accounting import flops_per_token, state_bytes
from openxlstm.train.evaluate import evaluate, yardsticks
from openxlstm.train.log import Display, read_journal, read_json
from openxlstm.train.loss import Score
from openxlstm.train.recipe import ARCHITECTURES
from openxlstm.train.report import SUMMARY, write_report
from openxlstm.train.run import Run

Sample = Callable[[Any, Tokenizer], str]  # a text by a model, for the report
Ending = Literal["done", "out of time", "interrupted", "paused", "already finished"]  # the 3rd and 4th can go on


def finish(run: Run, ending: Ending, display: Display, sample: Sample) -> None:
    """Write `model/`; and, unless the run is to be continued, measure, summarise and report.

    Called by all processes; the first one writes. Killed in here, the run does this again when it is started again:
    the test split is read, nothing is learned.
    """
    model = run.whole_model()  # gathered by all, None in all but the first
    if model is not None:
        if run.recipe.model["architecture"] in ARCHITECTURES:
            store.save(model, run.folder / "model")
        else:  # one to compare with, which knows how it is kept
            model.save(run.folder / "model")
        run.tokenizer.save(run.folder / "model" / "tokenizer.json")
    if ending in ("interrupted", "paused"):
        return
    score = None if run.test is None else _held_out(run, run.test, display)
    if model is None:
        return
    beside: dict[str, float] = {}
    if run.recipe.evaluate.yardsticks and run.prepared is not None:
        display.note("computes the yardsticks on the same bytes (kept with the corpus)")
        beside = yardsticks(run.prepared)
    summary = {
        "title": run.recipe.title,
        "ending": ending,
        "step": run.progress.step,
        "tokens": sum(line.get("tokens", 0) for line in read_journal(run.folder / "train.jsonl")),
        "seconds": round(run.progress.elapsed, 1),
        "model": run.facts["model"]
        | {"state_bytes": state_bytes(model.config), "flops_per_token": flops_per_token(model.config)},
        "machine": run.facts["machine"],
        "data": {
            "corpus": ", ".join(source.path for source in run.recipe.data.mixture),
            "fingerprint": run.facts["data"],
            "train_tokens": sum(source.folder.total_tokens for source in run.feed.windows),
            "test_documents": 0 if run.test is None else run.test.folder.total_documents,
        },
        "valid_bits_per_byte": run.progress.best,
        "skips": run.progress.skips,
        "spikes": run.progress.spikes,
        "rollbacks": run.progress.rollbacks,
        "held_out": None
        if score is None
        else {
            "bits_per_byte": score.bits_per_byte,
            "loss": score.loss,
            "bytes": score.bytes,
            "tokens": score.tokens,
            "context": run.recipe.data.context,
        },
        "yardsticks": beside,
        "sample": sample(model, run.tokenizer),
    }
    write_atomically(run.folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_report(run.folder)
    if score is not None:
        display.note(f"held-out text: {score.bits_per_byte:.4f} bits/byte over {score.bytes:,} bytes")


def _held_out(run: Run, test: Stream, display: Display) -> Score:
    """The one look at the test split, by all processes together."""
    display.note(f"reads the test split: {test.folder.total_bytes:,} bytes that training never sees")
    with run.averaged():
        return evaluate(
            run.objective,
            test,
            run.bytes_of,
            batch=run.recipe.evaluate.batch,
            autocast=run.autocast,
            rank=run.world.rank,
            ranks=run.world.ranks,
            total=run.world.sum,
        )


def is_finished(run: Run) -> bool:
    """The summary is that of the step where the run stands, and the recipe asks for no more."""
    file = run.folder / SUMMARY
    if not file.exists() or read_json(file, "step")["step"] != run.progress.step:
        return False
    minutes = run.recipe.train.max_minutes
    return run.progress.step >= run.schedule.end or (minutes is not None and run.progress.elapsed >= 60 * minutes)
