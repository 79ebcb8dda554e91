"""`xlstm eval --perplexity`, `--choice` and `--extrapolate`: what needs nothing but a model and a file of texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click

from openxlstm.cli.common import model_folder, nearest, show_table, tokenizer_of
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder, sha256_of
from openxlstm.tasks import choice, extrapolation, perplexity
from openxlstm.tasks.intervals import Interval
from openxlstm.tasks.kept import Kept, read_rows

SECONDS = 10.0  # between two lines of progress


@dataclass(frozen=True, slots=True)
class Setting:
    """What all three have in common: the model, and how it is asked."""

    folder: Path
    model: Any
    tokenizer: Tokenizer
    batch_size: int
    limit: int | None
    rows: Path | None  # the folder that keeps a line per document or question
    against: Path | None  # such a folder of another model

    def kept(self, name: str, file: Path, how: Mapping[str, Any]) -> Kept:
        """The rows of this measurement, those that are finished already included."""
        if not file.is_file():
            raise ValueError(f"there is no file {file}{nearest(file)}")
        weights = sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else [self.folder]
        about = {
            "measured": name, "file": sha256_of(file), **how, "tokenizer": self.tokenizer.sha256,
            "dtype": str(next(self.model.parameters()).dtype),
            "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
        }  # fmt: skip
        return Kept(None if self.rows is None else self.rows / f"{name}.jsonl", about)

    def other_rows(self, name: str, file: Path) -> list[dict[str, Any]] | None:
        """The rows of the model to compare with.

        Raises:
            ValueError: they are of another file.
        """
        if self.against is None:
            return None
        about, rows = read_rows(self.against / f"{name}.jsonl")
        if about.get("file") != sha256_of(file):
            raise ValueError(f"{self.against / f'{name}.jsonl'} is about another file than {file}")
        return rows


def setting(
    path: Path, *, batch_size: int, limit: int | None, device: str | None, dtype: str | None, rows: Path | None,
    against: Path | None,
) -> Setting:  # fmt: skip
    """Load the model of a run, a folder or a GGUF file, baselines included.

    Raises:
        ValueError: there is none, an option that is out of range.
    """
    import torch

    from openxlstm.train.finished import load_finished

    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size} must be at least 1")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} must be at least 1")
    dtypes = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"--dtype {dtype} must be one of {', '.join(dtypes)}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = model_folder(path)
    model = load_finished(folder, device=where, dtype=None if dtype is None else dtypes[dtype])
    return Setting(folder, model, tokenizer_of(folder), batch_size, limit, rows, against)


def run_perplexity(at: Setting, file: Path, *, window: int, seen: Path | None) -> dict[str, Any]:
    """Measure, and return what --json prints."""
    counts = None
    if seen is not None:
        counts = perplexity.token_counts(TokenFolder.open(seen), at.model.config.vocab_size)
    how = {"window": window, "seen": None if seen is None else TokenFolder.open(seen).fingerprint}
    kept = at.kept("perplexity", file, how)
    texts = islice(perplexity.read_texts(file), at.limit)
    perplexity.measure(
        at.model, at.tokenizer, texts, kept, window=window, batch_size=at.batch_size, counts=counts,
        progress=progress("documents"),
    )  # fmt: skip
    rows = kept.rows
    answer = {
        "model": str(at.folder), "measured": "perplexity", "file": str(file), "window": window,
        "sources": perplexity.table(rows), "domains": perplexity.table(rows, "domain"),
        "all": perplexity.summary(rows),
        "mean": {mode: perplexity.mean_over_sources(rows, mode) for mode in perplexity.MODES},
        "frequencies": perplexity.frequency_table(rows),
    }  # fmt: skip
    other = at.other_rows("perplexity", file)
    if other is not None:
        answer["difference"] = {
            mode: interval(perplexity.difference(other, rows, mode)) for mode in perplexity.modes_of(other)
        }
    return answer


def show_perplexity(answer: Mapping[str, Any]) -> None:
    """Tables for people: sources, domains where there are several, frequencies."""
    numbers = ("documents", "tokens", "perplexity", "from", "to", "bits/byte", "stateful ppl", "bits/byte")
    lines = [(one["source"], *_line(one)) for one in answer["sources"]]
    if len(lines) > 1:
        mean = answer["mean"]
        lines.append(("mean", "", "", f"{mean['windows']:.3f}", "", "", "", f"{mean['stateful']:.3f}", ""))
        lines.append(("all", *_line(answer["all"])))
    columns = ("source", *numbers)
    show_table(f"{answer['model']}, windows of {answer['window']}", columns, lines, numbers=range(1, 9))
    if any(one["domain"] != one["source"] for one in answer["domains"]):
        lines = [(f"{one['source']} / {one['domain']}", *_line(one)) for one in answer["domains"]]
        show_table("By domain", ("domain", *numbers), lines, numbers=range(1, 9))
    if answer["frequencies"]:
        lines = [
            (f"{one['seen_from']:,}", f"{one['seen_below']:,}", one["tokens"], f"{one['perplexity']:.3f}")
            for one in answer["frequencies"]
        ]
        show_table("By how often the target was seen in training", ("from", "below", "tokens", "perplexity"), lines,
                   numbers=range(4))  # fmt: skip
    for mode, found in answer.get("difference", {}).items():
        _show_difference(f"{mode}: bits per byte less the other's", found)


def run_choice(at: Setting, files: Mapping[str, Path], *, bos: bool) -> dict[str, Any]:
    """Answer the questions of every task, and return what --json prints."""
    results = []
    for name, file in files.items():
        task = choice.task_of(name)
        kept = at.kept(name, file, {"bos": bos})
        choice.measure(
            at.model, at.tokenizer, islice(choice.read_questions(task, file), at.limit), kept,
            batch_size=at.batch_size, bos=bos, progress=progress(f"questions of {name}"),
        )  # fmt: skip
        found = {**choice.summary(task, kept.rows), "file": str(file)}
        other = at.other_rows(name, file)
        if other is not None:
            found["mcnemar"] = asdict(choice.compare(task, other, kept.rows))
        results.append(found)
    return {"model": str(at.folder), "measured": "choice", "bos": bos, "tasks": results}


def show_choice(answer: Mapping[str, Any]) -> None:
    """A line per metric; the one that papers report is marked."""
    lines = []
    for one in answer["tasks"]:
        for metric in ("acc", "acc_norm", "perplexity"):
            if metric in one:
                error = one.get(f"{metric}_error")
                mark = " *" if metric == one["headline"] else ""
                said = "" if error is None else f"{error:.4f}"
                lines.append((one["task"], f"{metric}{mark}", f"{one[metric]:.4f}", said, one["questions"]))
    columns = ("task", "metric", "value", "standard error", "questions")
    show_table(f"{answer['model']}", columns, lines, numbers=(2, 3, 4))
    for one in answer["tasks"]:
        if "mcnemar" in one:
            pair = one["mcnemar"]
            click.echo(
                f"{one['task']}: only the other model is right {pair['only_first']} times, only this one "
                f"{pair['only_second']} times (McNemar p = {pair['p']:.4f})"
            )


def run_extrapolation(at: Setting, file: Path, *, train_length: int, factors: Sequence[int]) -> dict[str, Any]:
    """Measure, and return what --json prints."""
    kept = at.kept("extrapolation", file, {"train_length": train_length, "factors": list(factors)})
    texts = islice(perplexity.read_texts(file), at.limit)
    short = extrapolation.measure(
        at.model, ((one.index, at.tokenizer.encode(one.text)) for one in texts), perplexity.beginning(at.tokenizer),
        kept, train_length=train_length, factors=factors, bytes_of=at.tokenizer.bytes_of, batch_size=at.batch_size,
        progress=progress("documents"),
    )  # fmt: skip
    rows = kept.rows
    answer: dict[str, Any] = {
        "model": str(at.folder), "measured": "extrapolation", "file": str(file), "train_length": train_length,
        "documents": len(rows), "too_short": short, "lengths": extrapolation.table(rows),
    }  # fmt: skip
    if train_length > 1 and not train_length & (train_length - 1) and max(factors) > 1:
        answer["rise"] = interval(extrapolation.rise(rows, train_length))
    answer["carried"] = interval(extrapolation.carried(rows))
    return answer


def show_extrapolation(answer: Mapping[str, Any]) -> None:
    """A line per length, and the loss by place at the largest."""
    lines = [
        (one["mode"], one["length"], one["tokens"], f"{one['perplexity']:.3f}", _bits(one["bits_per_byte"]),
         f"{one['last_perplexity']:.3f}", _bits(one["last_bits_per_byte"]))
        for one in answer["lengths"]
    ]  # fmt: skip
    last = f"of the last {answer['train_length']}"
    columns = ("mode", "length", "tokens", "perplexity", "bits/byte", last, "bits/byte")
    show_table(f"{answer['model']}, trained at {answer['train_length']}", columns, lines, numbers=range(1, 7))
    click.echo(f"{answer['documents']:,} documents; {answer['too_short']:,} were too short and are left out\n")
    longest = {one["mode"]: one for one in answer["lengths"]}  # lengths rise, so the largest of a mode stays
    for mode, one in longest.items():
        by_place = [
            (f"{place['from']:,} to {place['to'] - 1:,}", place["tokens"], _bits(place["bits_per_byte"]))
            for place in one["places"]
        ]
        show_table(f"{mode}, by place", ("places", "tokens", "bits/byte"), by_place, numbers=(1, 2))
    if "rise" in answer:
        _show_difference(f"bits per byte beyond {answer['train_length']} less those before it", answer["rise"])
    shortest = answer["lengths"][0]["length"]
    _show_difference(f"bits per byte, stateful less windows of {shortest}", answer["carried"])


def read_choices(said: Sequence[str]) -> dict[str, Path]:
    """TASK=FILE, several times.

    Raises:
        ValueError: something else, or a task that does not exist.
    """
    files = {}
    for one in said:
        name, equals, file = one.partition("=")
        if not equals or not file:
            raise ValueError(f"--choice {one} must be TASK=FILE, such as piqa=piqa.jsonl")
        files[choice.task_of(name).name] = Path(file)
    return files


def read_factors(said: str) -> list[int]:
    """1,2,4,8.

    Raises:
        ValueError: no numbers.
    """
    if not all(part.strip().isdecimal() for part in said.split(",")):
        raise ValueError(f"--factors {said} must be whole numbers with commas between them, such as 1,2,4,8")
    return [int(part) for part in said.split(",")]


def progress(what: str) -> Callable[..., None]:
    """A line on standard error every few seconds."""
    last = time.monotonic()

    def say(done: int, tokens: int | None = None) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            click.echo(f"{done:,} {what}" + ("" if tokens is None else f", {tokens:,} tokens"), err=True)

    return say


def interval(found: Interval) -> dict[str, Any]:
    """As --json prints it."""
    return {"value": found.value, "low": found.low, "high": found.high, "excludes_zero": found.excludes_zero}


def _show_difference(what: str, found: Mapping[str, Any]) -> None:
    if found["low"] is None:
        click.echo(f"{what}: {found['value']:+.4f}; one document has no interval")
        return
    verdict = "" if found["excludes_zero"] else "; no difference seen"
    click.echo(f"{what}: {found['value']:+.4f}, 95 % from {found['low']:+.4f} to {found['high']:+.4f}{verdict}")


def _line(one: Mapping[str, Any]) -> tuple[Any, ...]:
    w, s = one["windows"], one["stateful"]
    return (
        one["documents"], one["tokens"], f"{w['perplexity']:.3f}",
        "-" if w["low"] is None else f"{w['low']:.3f}", "-" if w["high"] is None else f"{w['high']:.3f}",
        f"{w['bits_per_byte']:.4f}", f"{s['perplexity']:.3f}", f"{s['bits_per_byte']:.4f}",
    )  # fmt: skip


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
