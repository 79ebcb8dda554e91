"""`xlstm eval`: tasks from local files, offline, and a table, an object or a file of results."""

import json

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("lm_eval")

from openxlstm.checkpoint.store import save
from openxlstm.cli import main
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.tasks import scoring

TASKS = {
    "sky": (
        "output_type: multiple_choice\ndoc_to_text: 'Question: {{question}}\\nAnswer:'\ndoc_to_target: answer\n"
        "doc_to_choice: '{{choices}}'\n",
        [
            {"question": "What colour is the sky?", "choices": ["blue", "made of stone"], "answer": 0},
            {"question": "How many legs has a cat?", "choices": ["none at all", "four"], "answer": 1},
            {"question": "Is fire hot?", "choices": ["yes", "no, it is cold"], "answer": 0},
        ],
    ),
    "prose": (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]\n",
        [{"text": "It was the best of times."}, {"text": "Call me Ishmael. " * 20}],
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and a folder with two tasks whose data lies beside them."""
    path = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    model = xLSTM(xLSTMConfig(vocab_size=257, width=16, heads=2, pattern="ms"))
    save(model, path / "run" / "model")
    Tokenizer.bytes().save(path / "run" / "model" / "tokenizer.json")
    (path / "tasks").mkdir()
    for name, (text, rows) in TASKS.items():
        data = path / "tasks" / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (path / "tasks" / f"{name}.yaml").write_text(head + text)
    return path


def run(*args):
    return CliRunner().invoke(main, ["eval", *map(str, args)], catch_exceptions=False)


def test_local_tasks_offline(place, monkeypatch, tmp_path):
    """Both kinds of task in one call; the perplexity is that of one pass per text, computed here."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    out = tmp_path / "deep" / "results.json"
    done = run(place / "run", "--tasks", "sky,prose", "--include-path", place / "tasks", "--json", "--out", out,
               "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["results"]["sky"]["acc,none"] in {0, 1 / 3, 2 / 3, 1}
    assert answer["n-samples"]["sky"]["effective"] == 3
    written = json.loads(out.read_text())
    assert written["results"] == answer["results"]
    assert written["configs"]["sky"]["output_type"] == "multiple_choice"

    from openxlstm.checkpoint.store import load

    texts = [row["text"].encode() for row in TASKS["prose"][1]]
    total = sum(scoring.rolling(load(place / "run" / "model"), [list(text) for text in texts], 256))
    bits = -total / sum(map(len, texts)) / torch.tensor(2.0).log().item()
    assert answer["results"]["prose"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


def test_a_table_for_people(place):
    done = run(place / "run", "--tasks", "sky", "--include-path", place / "tasks", "--limit", 2, "--device", "cpu")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("sky") and "acc_norm" not in line]
    assert line.split()[:2] == ["sky", "acc"]
    assert line.split()[-1] == "2"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--tasks", "sly"), "has no task 'sly'; did you mean 'sky'?"),
        (("--tasks", ","), "--tasks names no task"),
        (("--tasks", "sky", "--dtype", "fp8"), "dtype='fp8' must be one of"),
    ],
)
def test_a_mistake_gets_a_sentence(place, args, sentence):
    done = run(place / "run", "--include-path", place / "tasks", *args)
    assert done.exit_code == 2
    assert sentence in done.output
