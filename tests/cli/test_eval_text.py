"""`xlstm eval` on local texts and questions: tables, objects, rows that are kept, and comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from openxlstm.checkpoint.store import load, save
from openxlstm.cli import main
from openxlstm.data.corpus import Document
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import write_tokens
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.tasks import scoring

SAMPLES = Path(__file__).parents[1] / "tasks" / "samples"
TEXTS = [
    {"text": "The first text, " * 3, "source": "web", "domain": "a"},
    {"text": "another one that is as long as it has to be for this", "source": "web", "domain": "b"},
    {"text": "def f(x): return x", "source": "code"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a file of texts, and a token folder to count in."""
    path = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("run", "other")):
        torch.manual_seed(seed)
        model = xLSTM(xLSTMConfig(vocab_size=257, width=16, heads=2, pattern="ms"))
        save(model, path / name / "model")
        Tokenizer.bytes().save(path / name / "model" / "tokenizer.json")
    (path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    write_tokens(path / "train", [Document("x", "e" * 20 + "xyz")], Tokenizer.bytes())
    return path


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, args), "--device", "cpu"], catch_exceptions=False)


def answer(*args: Any) -> dict[str, Any]:
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_perplexity(place: Path, tmp_path: Path) -> None:
    args = (place / "run", "--perplexity", place / "texts.jsonl", "--window", 8, "--rows", tmp_path / "rows")
    found = answer(*args, "--seen", place / "train", "--out", tmp_path / "deep" / "all.json")
    assert json.loads((tmp_path / "deep" / "all.json").read_text()) == found
    ids = [list(row["text"].encode()) for row in TEXTS]
    want = -sum(scoring.rolling_in_windows(load(place / "run" / "model"), ids, 256, window=8)) / sum(map(len, ids))
    assert found["all"]["windows"]["perplexity"] == pytest.approx(torch.tensor(want).exp().item(), rel=1e-4)
    assert [one["source"] for one in found["sources"]] == ["code", "web"]
    assert [one["domain"] for one in found["domains"]] == ["code", "a", "b"]
    assert [one["seen_from"] for one in found["frequencies"]] == [0, 1, 10]
    kept = (tmp_path / "rows" / "perplexity.jsonl").read_bytes()
    assert answer(*args, "--seen", place / "train") == found
    assert (tmp_path / "rows" / "perplexity.jsonl").read_bytes() == kept
    refused = run(*args)
    assert refused.exit_code == 2
    assert "is of another measurement: seen was" in refused.output


def test_a_table_for_people_and_a_comparison(place: Path, tmp_path: Path) -> None:
    args = ("--perplexity", place / "texts.jsonl", "--window", 8)
    assert run(place / "other", *args, "--rows", tmp_path / "other").exit_code == 0
    done = run(place / "run", *args, "--against", tmp_path / "other", "--limit", 3)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line][2:6] == ["code", "web", "mean", "all"]
    assert "web / a" in done.stdout
    assert sum("bits per byte less the other's:" in line and "95 % from" in line for line in lines) == 2
    (tmp_path / "texts2.jsonl").write_text('{"text": "something else"}\n')
    done = run(place / "run", "--perplexity", tmp_path / "texts2.jsonl", "--against", tmp_path / "other")
    assert done.exit_code == 2
    assert "is about another file" in done.output


def test_choices(place: Path, tmp_path: Path) -> None:
    args = [f"--choice={name}={SAMPLES / f'{name}.jsonl'}" for name in ("piqa", "hellaswag", "lambada_openai")]
    assert run(place / "other", *args, "--rows", tmp_path / "other").exit_code == 0
    found = answer(place / "run", *args, "--against", tmp_path / "other", "--rows", tmp_path / "rows")
    assert [(one["task"], one["questions"]) for one in found["tasks"]] == [
        ("piqa", 3), ("hellaswag", 3), ("lambada_openai", 3),
    ]  # fmt: skip
    assert all(one["mcnemar"]["p"] <= 1 for one in found["tasks"])
    assert (tmp_path / "rows" / "hellaswag.jsonl").is_file()
    done = run(place / "run", *args, "--limit", 2, "--against", tmp_path / "rows")
    assert done.exit_code == 2
    assert "not of the same questions" in done.output
    done = run(place / "run", *args, "--against", tmp_path / "other")
    assert "acc_norm *" in done.stdout
    assert "McNemar p = " in done.stdout


def test_extrapolation(place: Path) -> None:
    args = (place / "run", "--extrapolate", place / "texts.jsonl", "--train-length", 4, "--factors", "1,2,8")
    found = answer(*args)
    assert (found["documents"], found["too_short"]) == (2, 1)
    assert [(one["mode"], one["length"]) for one in found["lengths"]] == [
        (mode, length) for mode in ("windows", "stateful") for length in (4, 8, 32)
    ]
    for name in ("rise", "carried"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    done = run(*args)
    assert done.exit_code == 0, done.output
    assert "2 documents; 1 were too short" in done.stdout
    assert "16 to 31" in done.stdout
    alone = answer(*args[:-1], "2")
    assert [one["length"] for one in alone["lengths"]] == [8, 8]
    assert "rise" not in answer(*args[:-1], "1")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((), "give one of --tasks, --perplexity, --choice, --extrapolate; got none of them"),
        (("--tasks", "x", "--perplexity", "y"), "got --tasks and --perplexity"),
        (("--extrapolate", "x"), "--extrapolate needs --train-length"),
        (("--extrapolate", "x", "--train-length", "4", "--factors", "a"), "--factors a must be whole numbers"),
        (("--choice", "piqa"), "--choice piqa must be TASK=FILE"),
        (("--choice", "pica=x"), "did you mean 'piqa'"),
        (("--choice", "piqa=none.jsonl"), "there is no file"),
        (("--perplexity", "none.jsonl"), "none.jsonl"),
        (("--perplexity", "x", "--limit", "0"), "--limit 0 must be at least 1"),
        (("--perplexity", "x", "--dtype", "fp8"), "--dtype fp8 must be one of"),
    ],
)
def test_a_mistake_gets_a_sentence(place: Path, args: tuple[str, ...], sentence: str) -> None:
    done = run(place / "run", *args)
    assert done.exit_code == 2
    assert sentence in done.output.replace("\n", " ")
