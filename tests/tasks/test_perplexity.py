"""PALOMA-like tables: every number against one computed another way; a kill in between changes nothing."""

from __future__ import annotations

import gzip
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models.small_models import awake

from openxlstm.data.records import Document
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder, write_tokens
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.tasks import perplexity, scoring
from openxlstm.tasks.kept import Kept
from openxlstm.tasks.perplexity import Text

END, WINDOW = 256, 8
TEXTS = [
    ("web", "a.org", "The first text, of two windows and a bit."),
    ("web", "b.org", "tiny"),
    ("web", "a.org", "zwölf Bären"),
    ("code", "python", "def f(x):\n    return x\n"),
    ("code", "c", "int main(void) { return 0; }"),
]


@pytest.fixture(scope="module")
def model() -> xLSTM:
    torch.manual_seed(0)
    return awake(xLSTM(xLSTMConfig(vocab_size=257, width=12, heads=3, pattern="ms", mlstm_width=24))).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.bytes()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": text, "source": source, "domain": domain} for source, domain, text in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": ""}]))
    return path


def measured(model: xLSTM, tokenizer: Tokenizer, file: Path, **options) -> list[dict]:
    kept = Kept(None, {})
    perplexity.measure(model, tokenizer, perplexity.read_texts(file), kept, **{"window": WINDOW, **options})
    return kept.rows


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_rows_are_the_sums_of_the_scorer(model: xLSTM, tokenizer: Tokenizer, file: Path, batch_size: int) -> None:
    rows = measured(model, tokenizer, file, batch_size=batch_size)
    ids = [tokenizer.encode(text) for _, _, text in TEXTS]
    assert [row["tokens"] for row in rows] == list(map(len, ids))
    assert [row["bytes"] for row in rows] == [len(text.encode()) for _, _, text in TEXTS]
    want = {
        "stateful": scoring.rolling(model, ids, END),
        "windows": scoring.rolling_in_windows(model, ids, END, window=WINDOW),
    }
    for mode, logprobs in want.items():
        assert [row[mode] for row in rows] == pytest.approx([-one for one in logprobs], rel=1e-5)
    assert abs(rows[0]["windows"] - rows[0]["stateful"]) > 1e-3
    assert rows[1]["windows"] == pytest.approx(rows[1]["stateful"], rel=1e-6)  # no longer than a window


def test_token_nats_are_those_of_the_whole_forward(model: xLSTM) -> None:
    rows = [list(range(65, 65 + n)) for n in (1, 2, 15, 40)]
    for chunk in (1, 7, 64):
        for row, nats in zip(rows, scoring.token_nats(model, rows, chunk=chunk), strict=True):
            with torch.no_grad():
                logprobs = model(torch.tensor([row]))[0][0].double().log_softmax(-1)
            want = [-logprobs[t, row[t + 1]].item() for t in range(len(row) - 1)]
            assert nats.tolist() == pytest.approx(want, abs=1e-5)
    assert [len(one) for one in scoring.token_nats(model, [[3], [4]])] == [0, 0]


def test_tables_are_weighted_by_tokens(model: xLSTM, tokenizer: Tokenizer, file: Path) -> None:
    rows = measured(model, tokenizer, file)
    sources = {one["source"]: one for one in perplexity.table(rows)}
    assert list(sources) == ["code", "web"]
    web = rows[:3]
    nats, tokens = sum(row["windows"] for row in web), sum(row["tokens"] for row in web)
    assert sources["web"]["windows"]["perplexity"] == pytest.approx(math.exp(nats / tokens))
    assert sources["web"]["windows"]["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / sum(row["bytes"] for row in web)
    )
    assert (
        sources["web"]["windows"]["low"] <= sources["web"]["windows"]["perplexity"] <= sources["web"]["windows"]["high"]
    )
    domains = [(one["source"], one["domain"], one["documents"]) for one in perplexity.table(rows, "domain")]
    assert domains == [("code", "c", 1), ("code", "python", 1), ("web", "a.org", 2), ("web", "b.org", 1)]
    mean = (sources["web"]["stateful"]["perplexity"] + sources["code"]["stateful"]["perplexity"]) / 2
    assert perplexity.mean_over_sources(rows, "stateful") == pytest.approx(mean)
    assert perplexity.summary(rows)["tokens"] == sum(row["tokens"] for row in rows)


def test_two_models_are_compared_document_by_document(model: xLSTM, tokenizer: Tokenizer, file: Path) -> None:
    rows = measured(model, tokenizer, file)
    worse = [{**row, "windows": row["windows"] + 0.1 * row["bytes"] * math.log(2)} for row in rows]
    found = perplexity.difference(rows, worse, "windows")
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert perplexity.difference(rows, worse, "windows", "perplexity").low > 0
    with pytest.raises(ValueError, match="not of the same documents"):
        perplexity.difference(rows, worse[1:], "windows")
    other = [{**row, "tokens": row["tokens"] + 1} for row in rows]
    with pytest.raises(ValueError, match="only their bits per byte"):
        perplexity.difference(rows, other, "windows", "perplexity")
    windows_only = measured(model, tokenizer, file, modes=("windows",))
    with pytest.raises(ValueError, match="mode 'stateful' was not measured; these rows have windows"):
        perplexity.perplexity(windows_only, "stateful")


def test_rare_tokens_have_a_line_of_their_own(model: xLSTM, tokenizer: Tokenizer, file: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", [Document("x", "a" * 12 + "bbbbb" + "c")], tokenizer)
    folder = TokenFolder.open(tmp_path / "train")
    counts = perplexity.token_counts(folder, 257)
    assert counts[[97, 98, 99, 100]].tolist() == [12, 5, 1, 0]
    assert counts.sum() == folder.total_tokens
    rows = measured(model, tokenizer, file, counts=counts)
    table = perplexity.frequency_table(rows)
    assert [(one["seen_from"], one["seen_below"]) for one in table] == [(0, 1), (1, 10), (10, 100)]
    joined = "".join(text for _, _, text in TEXTS).encode()
    assert [one["tokens"] for one in table] == [
        sum(byte not in b"abc" for byte in joined), sum(byte in b"bc" for byte in joined), joined.count(b"a"),
    ]  # fmt: skip
    nats = sum(one["tokens"] * math.log(one["perplexity"]) for one in table)
    assert nats == pytest.approx(sum(row["windows"] for row in rows))
    with pytest.raises(ValueError, match="this model knows 100 token ids"):
        perplexity.token_counts(folder, 100)


@pytest.mark.parametrize(("count", "edge"), [(0, 0), (1, 1), (9, 1), (10, 10), (99, 10), (1_000_000, 1_000_000)])
def test_frequencies_by_powers_of_ten(count: int, edge: int) -> None:
    assert perplexity.bucket(count) == edge


PROGRAM = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from models.small_models import awake
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.tasks import perplexity
from openxlstm.tasks.kept import Kept
torch.manual_seed(0)
model = awake(xLSTM(xLSTMConfig(vocab_size=257, width=12, heads=3, pattern="ms", mlstm_width=24))).eval()
kill = lambda done, tokens: done == 3 and os.kill(os.getpid(), signal.SIGKILL)
perplexity.measure(model, Tokenizer.bytes(), perplexity.read_texts(Path({file!r})), Kept(Path({rows!r}), {{"n": 1}}),
                   window=8, progress=kill)
"""


@pytest.mark.slow  # a process of its own: tests/tasks/test_kept.py cuts the file at every byte instead
def test_a_killed_measurement_goes_on(model: xLSTM, tokenizer: Tokenizer, file: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    code = PROGRAM.format(tests=str(Path(__file__).parents[1]), file=str(file), rows=str(rows))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    kept, scored = Kept(rows, {"n": 1}), []
    assert len(kept.rows) == 3
    texts = perplexity.read_texts(file)
    perplexity.measure(
        model, tokenizer, texts, kept, window=WINDOW, progress=lambda done, tokens: scored.append((done, tokens))
    )
    assert scored[-1] == (2, sum(len(text.encode()) for _, _, text in TEXTS[3:]))
    for got, want in zip(kept.rows, measured(model, tokenizer, file), strict=True):
        assert got.pop("windows") == pytest.approx(want.pop("windows"), rel=1e-6)
        assert got.pop("stateful") == pytest.approx(want.pop("stateful"), rel=1e-6)
        assert got == want


def test_files_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "wiki.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n\n{"text": "two", "source": "s"}\n'))
    assert list(perplexity.read_texts(path)) == [Text(0, "one", "wiki", "wiki"), Text(1, "two", "s", "s")]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"text": 3}\n', "1: 'text' is a int, not a text"),
        ('{"text": "a", "domain": 3}\n', "'domain' is a int"),
        ('{"body": "a"}\n', "has no 'text'; its keys are body"),
        ("[]\n", "every line must be an object"),
        ('{"text": ""}\n', "holds no document with a text"),
    ],
)
def test_a_damaged_file_gets_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        list(perplexity.read_texts(path))
    with pytest.raises(ValueError, match="there is no file"):
        list(perplexity.read_texts(tmp_path / "none.jsonl"))


def test_an_unknown_mode_gets_a_sentence(model: xLSTM, tokenizer: Tokenizer, file: Path) -> None:
    with pytest.raises(ValueError, match=r"modes=\['window'\] must be of windows, stateful"):
        measured(model, tokenizer, file, modes=("window",))
    assert np.isfinite(measured(model, tokenizer, file, modes=("stateful",))[0]["stateful"])
