"""What happens after the last step: the model for use, the one look at the test split, the summary, the report."""

import json
from collections.abc import Callable
from typing import Any, Literal

from openxlstm.checkpoint import store
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import write_atomically
from openxlstm.models.accounting import flops_per_token, state_bytes
from openxlstm.train.evaluate import evaluate, yardsticks
from openxlstm.train.log import Display, read_journal, read_json
from openxlstm.train.report import SUMMARY, write_report
from openxlstm.train.run import Run

Sample = Callable[[Any, Tokenizer], str]  # a text by a model, for the report
Ending = Literal["done", "out of time", "interrupted", "already finished"]


def finish(run: Run, ending: Ending, display: Display, sample: Sample) -> None:
    """Write `model/`; and, unless the run is to be continued, measure, summarise and report.

    Killed in here, the run does this again when it is started again: the test split is read, nothing is learned.
    """
    store.save(run.model, run.folder / "model")
    run.tokenizer.save(run.folder / "model" / "tokenizer.json")
    if ending == "interrupted":
        return
    display.note(f"reads the test split: {run.test.folder.total_bytes:,} bytes that training never sees")
    score = evaluate(run.model, run.test, run.bytes_of, batch=run.recipe.evaluate.batch, autocast=run.autocast)
    beside: dict[str, float] = {}
    if run.recipe.evaluate.yardsticks:
        display.note("computes the yardsticks on the same bytes (kept with the corpus)")
        beside = yardsticks(run.prepared)
    summary = {
        "title": run.recipe.title,
        "ending": ending,
        "step": run.progress.step,
        "tokens": sum(line.get("tokens", 0) for line in read_journal(run.folder / "train.jsonl")),
        "seconds": round(run.progress.elapsed, 1),
        "model": run.facts["model"]
        | {"state_bytes": state_bytes(run.model.config), "flops_per_token": flops_per_token(run.model.config)},
        "machine": run.facts["machine"],
        "data": {
            "corpus": run.recipe.data.corpus,
            "fingerprint": run.facts["data"],
            "train_tokens": run.rows.folder.total_tokens,
            "test_documents": run.test.folder.total_documents,
        },
        "valid_bits_per_byte": run.progress.best,
        "held_out": {
            "bits_per_byte": score.bits_per_byte,
            "loss": score.loss,
            "bytes": score.bytes,
            "tokens": score.tokens,
            "context": run.recipe.data.context,
        },
        "yardsticks": beside,
        "sample": sample(run.model, run.tokenizer),
    }
    write_atomically(run.folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_report(run.folder)
    display.note(f"held-out text: {score.bits_per_byte:.4f} bits/byte over {score.bytes:,} bytes")


def is_finished(run: Run) -> bool:
    """The summary is that of the step where the run stands, and the recipe asks for no more."""
    file = run.folder / SUMMARY
    if not file.exists() or read_json(file, "step")["step"] != run.progress.step:
        return False
    minutes = run.recipe.train.max_minutes
    return run.progress.step >= run.schedule.end or (minutes is not None and run.progress.elapsed >= 60 * minutes)
