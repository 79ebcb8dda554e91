"""The six downstream tasks of arXiv:2405.04517, Table 3, from local JSONL files, with nothing to install.

LAMBADA asks for the last word of a passage; the others for one of several continuations: the most probable one (acc),
or the most probable one per character (acc_norm). Rows have the columns of the original data sets, prompts are those of
lm-eval 0.4.13, and so are the numbers: a test compares them, log-likelihood by log-likelihood. Zero-shot.

A context is read once and its state forked for every choice (`scoring`). What is kept is a row per question, so that
two models can be compared on the same questions (`intervals.mcnemar`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from openxlstm.data.records import json_lines
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.models import checks
from openxlstm.models.interface import LanguageModel
from openxlstm.tasks import intervals, scoring
from openxlstm.tasks.kept import Kept
from openxlstm.tasks.perplexity import beginning

Row = Mapping[str, Any]
AT_ONCE = 16  # batches of questions between two lines in the file of results


@dataclass(frozen=True, slots=True)
class Question:
    """Texts (context, continuation), and which is right; without choices, whether the only one is the likeliest text.

    `lengths` are those of the choices in characters, by which acc_norm divides.
    """

    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    right: int | None


@dataclass(frozen=True, slots=True)
class ChoiceTask:
    """How a row becomes a question, and what is reported of it."""

    name: str
    columns: tuple[str, ...]
    question: Callable[[Row], Question]
    metrics: tuple[str, ...]
    headline: str  # the one that the paper reports
    official: str  # lm-eval's file of it, below lm_eval/tasks
    split: str  # that file's name for the rows


def _lambada(row: Row) -> Question:
    """Everything up to the last space, and the rest."""
    *before, word = row["text"].split(" ")
    return Question(((" ".join(before), f" {word}"),), (len(word) + 1,), None)


def _hellaswag(row: Row) -> Question:
    context = _plain(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return _choices(context, [_plain(ending) for ending in row["endings"]], int(row["label"]))


def _piqa(row: Row) -> Question:
    return _choices(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _arc(row: Row) -> Question:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    return _choices(f"Question: {row['question']}\nAnswer:", texts, labels.index(row["answerKey"]))


def _winogrande(row: Row) -> Question:
    """Which filling makes the rest of the sentence more probable: the contexts differ, and what is scored does not."""
    before, after = row["sentence"].split("_", 1)
    contexts = [f"{before}{row[name]}" for name in ("option1", "option2")]
    pairs = tuple((context, f" {after.strip()}") for context in contexts)
    return Question(pairs, tuple(map(len, contexts)), ("1", "2").index(str(row["answer"])))


def _choices(context: str, texts: Sequence[str], right: int) -> Question:
    if not 0 <= right < len(texts):
        raise ValueError(f"the answer is number {right} of {len(texts)} choices")
    return Question(tuple((context, f" {text}") for text in texts), tuple(map(len, texts)), right)


def _plain(text: str) -> str:
    """HellaSwag without the marks that WikiHow left in it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


_ARC = ("question", "choices", "answerKey")
TASKS: dict[str, ChoiceTask] = {
    task.name: task
    for task in (
        ChoiceTask("lambada_openai", ("text",), _lambada, ("acc", "perplexity"), "acc",
                   "lambada/lambada_openai.yaml", "test"),
        ChoiceTask("hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag,
                   ("acc", "acc_norm"), "acc_norm", "hellaswag/hellaswag.yaml", "validation"),
        ChoiceTask("piqa", ("goal", "sol1", "sol2", "label"), _piqa, ("acc", "acc_norm"), "acc",
                   "piqa/piqa.yaml", "validation"),
        ChoiceTask("arc_easy", _ARC, _arc, ("acc", "acc_norm"), "acc", "arc/arc_easy.yaml", "test"),
        ChoiceTask("arc_challenge", _ARC, _arc, ("acc", "acc_norm"), "acc_norm", "arc/arc_challenge.yaml", "test"),
        ChoiceTask("winogrande", ("sentence", "option1", "option2", "answer"), _winogrande, ("acc",), "acc",
                   "winogrande/default.yaml", "validation"),
    )
}  # fmt: skip


def task_of(name: str) -> ChoiceTask:
    """The task of this name.

    Raises:
        ValueError: there is none, with the nearest one.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}, only {', '.join(TASKS)}{checks.did_you_mean(name, TASKS)}")
    return TASKS[name]


def read_questions(task: ChoiceTask, path: Path) -> Iterator[tuple[int, Question]]:
    """(number, question) of every row of a JSONL file (also .gz, .zst).

    Raises:
        ValueError: no such file, no row in it, or a row that is not of this task: which columns it needs.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    index = -1
    for index, (where, row) in enumerate(json_lines(path)):
        if missing := [name for name in task.columns if name not in row]:
            raise ValueError(
                f"{where} has no {missing[0]!r}: a row of {task.name} has {', '.join(task.columns)}, and this one "
                f"{', '.join(row) or 'nothing'}"
            )
        try:
            yield index, task.question(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{where} is no row of {task.name}: {error}") from None
    if index < 0:
        raise ValueError(f"{path} holds no row")


def measure(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Iterator[tuple[int, Question]],
    kept: Kept,
    *,
    batch_size: int = 1,
    bos: bool = True,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Answer all questions that are not in `kept` yet.

    A row: {"index", "logprobs" of the choices, "right", "right_norm"}; of LAMBADA without the last.

    Args:
        model: in evaluation mode.
        batch_size: requests computed together.
        bos: the end id stands before every context, as before every document in training.
        progress: called with the number of questions done.
    """
    done, waiting = 0, ((index, question) for index, question in questions if index not in kept)
    while some := list(islice(waiting, batch_size * AT_ONCE)):
        pairs = [encode_pair(tokenizer, *pair, bos=bos) for _, question in some for pair in question.pairs]
        scores = iter(scoring.loglikelihoods(model, pairs, batch_size=batch_size))
        kept.add(_answer(index, question, [next(scores) for _ in question.pairs]) for index, question in some)
        done += len(some)
        if progress is not None:
            progress(done)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, *, bos: bool) -> tuple[list[int], list[int]]:
    """Ids of both, cut where lm-eval cuts: spaces at the end of a context belong to what follows, and the two are
    encoded as one text, whose ids behind those of the context are the continuation's."""
    begin = beginning(tokenizer)
    spaces = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
    before = tokenizer.encode(context) if context else []
    whole = tokenizer.encode(context + continuation)
    return ([begin, *before] if bos or not before else before), whole[len(before) :]


def summary(task: ChoiceTask, rows: Sequence[Row]) -> dict[str, Any]:
    """{"task", "questions", and each metric with its standard error "..._error"}; perplexity has none.

    The perplexity of LAMBADA is per word, exp(-mean log p), as everywhere.
    """
    found: dict[str, Any] = {"task": task.name, "questions": len(rows), "headline": task.headline}
    for metric, key in (("acc", "right"), ("acc_norm", "right_norm")):
        if metric in task.metrics:
            right = sum(row[key] for row in rows)
            found[metric] = right / len(rows)
            found[f"{metric}_error"] = intervals.accuracy_error(right, len(rows))
    if "perplexity" in task.metrics:
        mean = -math.fsum(row["logprobs"][0] for row in rows) / len(rows)
        found["perplexity"] = math.exp(min(mean, 700.0))
    return found


def compare(task: ChoiceTask, first: Sequence[Row], second: Sequence[Row]) -> intervals.McNemar:
    """McNemar's test of two models' rows by the task's headline metric.

    Raises:
        ValueError: the rows are not of the same questions.
    """
    if [row["index"] for row in first] != [row["index"] for row in second]:
        raise ValueError("the rows are not of the same questions, so they cannot be paired")
    key = "right_norm" if task.headline == "acc_norm" else "right"
    return intervals.mcnemar([row[key] for row in first], [row[key] for row in second])


def _answer(index: int, question: Question, scores: Sequence[scoring.Score]) -> dict[str, Any]:
    logprobs = [score.logprob for score in scores]
    if question.right is None:
        return {"index": index, "logprobs": logprobs, "right": scores[0].greedy}
    per_character = [one / max(n, 1) for one, n in zip(logprobs, question.lengths, strict=True)]
    return {
        "index": index,
        "logprobs": logprobs,
        "right": int(np.argmax(logprobs)) == question.right,
        "right_norm": int(np.argmax(per_character)) == question.right,
    }
