"""Language models by the trainer, tested on documents: every contestant the same loop, tokens, order and grid.

A run is an ordinary run of the trainer, in a folder of its own with its recipe: it survives being killed and goes on.
What is measured, all in bits per byte on documents of the test split that training never sees:

    windows        every document in disjoint windows of the trained context, each from an empty state: what models with
                   a context length report (arXiv:2405.04517, App. B.3)
    stateful       a document in one pass, the state carried; only for what carries one here: patterns and LSTMs. (An
                   attention model has none, and the wrappers of Mamba-2 and RWKV-4 read everything again.)
    positions      loss by position in windows of `tested_to` tokens, from an empty state, in buckets of powers of two;
                   the same documents, those that are as long (arXiv:2405.04517, Fig. 7)
    largest rise   of the buckets beyond the trained context the largest loss, less that of the same bytes read at the
                   last `stride` places of windows of the trained context
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from openxlstm.data.prepare import open_source
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.experiments import contestants, corpora
from openxlstm.experiments.contestants import Sizes
from openxlstm.experiments.results import Metric, fingerprint
from openxlstm.tasks import intervals, scoring
from openxlstm.train import checkpoints
from openxlstm.train.export import choose
from openxlstm.train.folder import default_cache
from openxlstm.train.log import Silent, read_journal, read_json
from openxlstm.train.loop import train
from openxlstm.train.recipe import architecture
from openxlstm.train.report import SUMMARY
from openxlstm.train.run import read_recipe

WINDOWS, STATEFUL, RISE = "windows", "stateful", "largest rise"
REREAD = ("llama", "mamba2", "rwkv4")  # contestants that carry no state here
AT_ONCE = 16_384  # tokens in a forward pass of a test


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPlan:
    """A grid of language models on one corpus, in bytes."""

    corpus: str  # of `corpora`
    models: tuple[str, ...]
    width: int
    blocks: int
    heads: int
    context: int
    batch: int
    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    tested_to: int  # tokens of the longest window that is tested
    stride: int  # what lies beyond the trained length is read again by windows of that length, this far apart
    test_bytes: int  # of test documents, in the order of the split; whole documents
    optim: Mapping[str, Any] = field(default_factory=lambda: {"betas": [0.9, 0.95], "weight_decay": 0.1, "clip": 1.0})

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.context or (self.tested_to - self.context) % self.stride:
            raise ValueError(
                f"stride={self.stride} must be at most context={self.context} and divide tested_to - context = "
                f"{self.tested_to - self.context}, so that every byte beyond the context is read again"
            )

    @property
    def sizes(self) -> Sizes:
        """What all contestants share. 256 bytes and the end of a document."""
        return Sizes(width=self.width, blocks=self.blocks, heads=self.heads, vocab_size=257, text=True)

    @property
    def fingerprint(self) -> str:
        """Changes with everything that a run depends on; the lists of models, rates and seeds may grow."""
        facts: dict[str, Any] = asdict(self)
        for grown in ("models", "rates", "seeds"):
            del facts[grown]
        return fingerprint({**facts, "reference": self.models[0]})

    @property
    def metrics(self) -> tuple[str, ...]:
        """What stands in a table."""
        return (WINDOWS, STATEFUL, RISE)

    @property
    def headline(self) -> str:
        """The metric that stands for all where there is room for one."""
        return WINDOWS

    @property
    def unit(self) -> str:
        """Of all metrics."""
        return "bits per byte"

    @property
    def chance(self) -> float:
        """Of a model that knows nothing."""
        return 8.0

    @property
    def volume(self) -> str:
        """What a run has seen."""
        return f"{self.steps:,} steps of {self.batch} rows of {self.context} bytes"

    @property
    def lacking(self) -> str | None:
        """Why it cannot be run on this machine, if it cannot."""
        return corpora.missing(self.corpus)


def recipe(plan: TextPlan, model: str, rate: float, seed: int, corpus: str) -> str:
    """The TOML of a run."""
    config = contestants.config(model, plan.sizes, plan.models[0])
    facts = {"architecture": contestants.find(model).architecture, **config.to_dict()}
    del facts["vocab_size"]  # the tokenizer says it
    tables: dict[str, Mapping[str, Any]] = {
        "model": facts,
        "data": {"corpus": corpus, "context": plan.context},
        "train": {"steps": plan.steps, "batch": plan.batch, "seed": seed, "precision": "fp32"},
        "optim": {"lr": rate, **plan.optim},
        "optim.schedule": {"kind": "cosine", "warmup": "10%", "floor": 0.1},
        "evaluate": {"every": max(1, plan.steps // 10), "windows": 64, "yardsticks": False},
        "checkpoint": {"every": max(1, plan.steps // 4), "keep_last": 1},
    }
    title = json.dumps(f"{contestants.find(model).label} on {plan.corpus}, rate {rate:g}, seed {seed}")
    lines = [f"title = {title}"]
    for name, table in tables.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in table.items() if value is not None]
    text = "\n".join(lines) + "\n"
    assert tomllib.loads(text), "what was written is read back by the trainer"
    return text


def run(plan: TextPlan, model: str, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train one contestant, or go on with it, and test it: metrics, choice, curve, parameters, tokens, data.

    Raises:
        ValueError: the corpus is not here, or the trainer refuses.
        StoppedError: the trainer's guard stopped the run, which is a result.
    """
    corpus, file = corpora.locate(plan.corpus, default_cache()), folder.with_name(f"{folder.name}.toml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(recipe(plan, model, rate, seed, corpus), encoding="utf-8")
    resolved, tokenizer = read_recipe(str(file))
    ending = train(resolved, tokenizer, folder, default_cache(), Silent(), lambda *_: "")
    if ending in ("interrupted", "paused"):
        raise KeyboardInterrupt
    summary = read_json(folder / SUMMARY, "valid_bits_per_byte", "tokens", "data")
    lines = [line for line in read_journal(folder / "train.jsonl") if "valid_bits_per_byte" in line]
    assert tokenizer.end_id is not None, "read_recipe refuses a tokenizer without an end"
    trained = architecture(resolved.model["architecture"])[1](resolved.model_config())
    trained.load_state_dict(checkpoints.read_tensors(choose(folder), "model"))
    documents = test_documents(corpus, tokenizer, plan.test_bytes)
    metrics, bits = measure(trained.eval(), documents, plan, tokenizer.end_id, carries=model not in REREAD)
    return {
        "metrics": metrics,
        "choice": summary["valid_bits_per_byte"],
        "curve": {
            "step": [float(line["step"]) for line in lines],
            "validation": [line["valid_bits_per_byte"] for line in lines],
            "document bits": bits,
            "document bytes": [float(len(one)) for one in documents],
        },
        "tokens": summary["tokens"],
    }


def test_documents(corpus: str, tokenizer: Tokenizer, limit: int) -> list[list[int]]:
    """The first documents of the test split as ids, none in part, until they have `limit` bytes."""
    found: list[list[int]] = []
    for text in open_source(corpus, tokenizer, default_cache())["test"].texts():
        if sum(map(len, found)) >= limit:
            break
        if text:
            found.append(list(text))
    return found


def measure(
    model: Any, documents: Sequence[Sequence[int]], plan: TextPlan, end: int, *, carries: bool
) -> tuple[dict[str, Metric], list[float]]:
    """All metrics of a model, and the bits of every document in windows. A byte is a token here."""
    sizes = [float(len(one)) for one in documents]
    nats = [0.0] * len(documents)
    rows = [
        (index, [*context, *rest], len(rest))
        for index, one in enumerate(documents)
        for context, rest in scoring.windows(one, end, plan.context)
    ]
    for some in _batches(rows, plan.context + 1):
        for (index, _, scored), found in zip(some, scoring.token_nats(model, [row for _, row, _ in some]), strict=True):
            nats[index] += float(found[-scored:].sum())
    bits = [one / math.log(2) for one in nats]
    metrics = {WINDOWS: _metric(bits, sizes)}
    if carries:
        carried = [float(scoring.token_nats(model, [[end, *one]])[0].sum()) / math.log(2) for one in documents]
        metrics[STATEFUL] = _metric(carried, sizes)
    if whole := _whole_windows(documents, plan.tested_to, end):
        metrics |= _by_position(model, whole, plan)
    return metrics, bits


def _metric(bits: Sequence[float], sizes: Sequence[float]) -> Metric:
    found = intervals.ratio(bits, sizes)
    interval = None if found.low is None or found.high is None else (found.low, found.high)  # of one document: none
    return Metric(found.value, int(sum(sizes)), interval)


def _whole_windows(documents: Sequence[Sequence[int]], longest: int, end: int) -> list[list[int]]:
    """Windows of `longest` tokens that begin at multiples of it, each behind the token before it."""
    return [
        [end if first == 0 else one[first - 1], *one[first : first + longest]]
        for one in documents
        for first in range(0, len(one) - longest + 1, longest)
    ]


def _by_position(model: Any, windows: Sequence[Sequence[int]], plan: TextPlan) -> dict[str, Metric]:
    """Bits per byte by position, (upper/2, upper], and the largest rise beyond the trained length.

    What stands at one position is other text than what stands at another, and texts differ by more than the rise that
    is asked about. So the loss beyond the trained length is compared with that of the same bytes at the last `stride`
    places of windows of the trained length.
    """
    at_place = _bits(model, windows, plan.tested_to)
    edges = [2**power for power in range(5, plan.tested_to.bit_length())]  # what lies before 32 is one bucket
    metrics = {
        f"positions, to {upper}": Metric(float(at_place[:, lower:upper].mean()), at_place[:, lower:upper].size)
        for lower, upper in zip([0, *edges], edges, strict=False)
    }
    if beyond := [upper for upper in edges if upper > plan.context]:
        risen = at_place[:, plan.context :] - _near(model, windows, plan)
        worst = max((risen[:, upper // 2 - plan.context : upper - plan.context] for upper in beyond), key=np.mean)
        metrics[RISE] = Metric(float(worst.mean()), worst.size)
    return metrics


def _near(model: Any, windows: Sequence[Sequence[int]], plan: TextPlan) -> Float64[np.ndarray, "windows beyond"]:
    """Bits of what lies beyond the trained length, each byte read at the last places of a window of that length."""
    firsts = range(plan.stride, plan.tested_to - plan.context + 1, plan.stride)
    short = [row[first : first + plan.context + 1] for row in windows for first in firsts]
    return _bits(model, short, plan.context)[:, -plan.stride :].reshape(len(windows), -1)


def _bits(model: Any, rows: Sequence[Sequence[int]], length: int) -> Float64[np.ndarray, "rows length"]:
    """Of every token but the first of rows of `length` + 1 tokens."""
    nats = [scoring.token_nats(model, some, chunk=length) for some in _batches(rows, length + 1)]
    return np.array([row for some in nats for row in some]) / math.log(2)


def _toml(value: Any) -> str:
    """Numbers, texts, booleans and lists of them are written as JSON writes them."""
    return json.dumps(value)


def _batches(rows: Sequence[Any], tokens: int) -> Iterator[Sequence[Any]]:
    at_once = max(1, AT_ONCE // tokens)
    for first in range(0, len(rows), at_once):
        yield rows[first : first + at_once]
