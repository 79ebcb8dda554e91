"""The built-in scorer is lm-eval's on the same rows; and each answer is that of one forward pass."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models.small_models import awake

from openxlstm.checkpoint.store import load, save
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.tasks import choice
from openxlstm.tasks.kept import Kept

SAMPLES = Path(__file__).parent / "samples"
END = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save(awake(xLSTM(xLSTMConfig(vocab_size=257, width=12, heads=3, pattern="ms", mlstm_width=24))), path)
    Tokenizer.bytes().save(path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder).eval()


def measured(model: Any, name: str, kept: Kept | None = None, **options: Any) -> list[dict[str, Any]]:
    kept = Kept(None, {}) if kept is None else kept
    task = choice.task_of(name)
    questions = choice.read_questions(task, SAMPLES / f"{name}.jsonl")
    choice.measure(model, Tokenizer.bytes(), questions, kept, **options)
    return kept.rows


@pytest.mark.parametrize("name", choice.TASKS)
@pytest.mark.parametrize("bos", [True, False])
def test_a_forked_context_is_one_that_is_read_again(model: Any, name: str, bos: bool) -> None:
    rows = measured(model, name, bos=bos, batch_size=2)
    assert len(rows) == 3
    for (_, question), row in zip(
        choice.read_questions(choice.TASKS[name], SAMPLES / f"{name}.jsonl"), rows, strict=True
    ):
        for (context, continuation), got in zip(question.pairs, row["logprobs"], strict=True):
            whole, split = (context + continuation).encode(), len(context.rstrip().encode())
            ids = [END, *whole] if bos or not split else list(whole)
            first = split + len(ids) - len(whole)
            with torch.no_grad():
                logprobs = model(torch.tensor([ids[:-1]]))[0][0].double().log_softmax(-1)
            want = sum(logprobs[t - 1, ids[t]].item() for t in range(first, len(ids)))
            assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_lm_eval_says_the_same(folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All six tasks, through the official files of the installed lm-eval: every log-likelihood and every metric."""
    pytest.importorskip("lm_eval")
    from openxlstm.tasks import lm_eval as adapter

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    adapter.write_local_tasks(tmp_path, {name: SAMPLES / f"{name}.jsonl" for name in choice.TASKS})
    manager = adapter.task_manager(list(choice.TASKS), tmp_path)
    lm = adapter.OpenXLSTMLM(str(folder), batch_size=4, device="cpu")
    asked: dict[tuple[str, str], float] = {}
    real = lm.loglikelihood

    def listened(requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers = real(requests, disable_tqdm)
        asked.update({request.args: answer[0] for request, answer in zip(requests, answers, strict=True)})
        return answers

    monkeypatch.setattr(lm, "loglikelihood", listened)
    theirs = adapter.run(lm, list(choice.TASKS), manager)["results"]
    for name, task in choice.TASKS.items():
        rows = measured(model, name, batch_size=4)
        for (_, question), row in zip(choice.read_questions(task, SAMPLES / f"{name}.jsonl"), rows, strict=True):
            for pair, logprob in zip(question.pairs, row["logprobs"], strict=True):
                assert logprob == pytest.approx(asked.pop(pair), rel=1e-5), (name, pair)
        ours = choice.summary(task, rows)
        for metric in task.metrics:
            assert ours[metric] == pytest.approx(theirs[name][f"{metric},none"], rel=1e-5), (name, metric)
    assert not asked


def test_a_summary_by_hand() -> None:
    rows = [{"index": n, "logprobs": [-1.0 - n], "right": n > 0} for n in range(4)]
    found = choice.summary(choice.TASKS["lambada_openai"], rows)
    assert found["acc"] == 0.75
    assert found["acc_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert found["perplexity"] == pytest.approx(math.exp(2.5))
    rows = [{"index": n, "logprobs": [-1.0, -2.0], "right": True, "right_norm": n == 0} for n in range(4)]
    found = choice.summary(choice.TASKS["hellaswag"], rows)
    assert (found["acc"], found["acc_norm"], found["headline"]) == (1.0, 0.25, "acc_norm")
    other = [{**row, "right_norm": True} for row in rows]
    pair = choice.compare(choice.TASKS["hellaswag"], rows, other)
    assert (pair.only_first, pair.only_second, pair.p) == (0, 3, 0.25)
    with pytest.raises(ValueError, match="not of the same questions"):
        choice.compare(choice.TASKS["hellaswag"], rows, other[:3])


def test_longer_answers_are_divided_by_their_length() -> None:
    question = choice.Question((("c", " ab"), ("c", " abcdefgh")), (2, 8), 1)
    score = choice.scoring.Score
    row = choice._answer(0, question, [score(-3.0, False), score(-4.0, False)])
    assert (row["right"], row["right_norm"]) == (False, True)


def test_answered_questions_are_not_asked_again(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = measured(model, "piqa")
    Kept(file, {}).add(rows[:2])
    seen: list[int] = []
    again = measured(model, "piqa", Kept(file, {}), progress=seen.append)
    assert seen == [1]
    assert [row["right"] for row in again] == [row["right"] for row in rows]


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        ("piqa", {"goal": "g", "sol1": "a"}, "1 has no 'sol2': a row of piqa has goal, sol1, sol2, label"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 2}, "the answer is number 2 of 2 choices"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": "x"}, "is no row of piqa: invalid literal"),
        (
            "winogrande",
            {"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"},
            "is no row of winogrande",
        ),
        ("winogrande", {"sentence": "a _", "option1": "a", "option2": "b", "answer": ""}, "is no row of winogrande"),
        ("arc_easy", {"question": "q", "choices": ["a"], "answerKey": "A"}, "is no row of arc_easy"),
        ("lambada_openai", {"text": 3}, "is no row of lambada_openai"),
    ],
)
def test_a_wrong_row_gets_a_sentence(tmp_path: Path, name: str, row: dict[str, Any], sentence: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=sentence):
        list(choice.read_questions(choice.task_of(name), file))


def test_what_is_not_there_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no task 'pica', only .*; did you mean 'piqa'"):
        choice.task_of("pica")
    with pytest.raises(ValueError, match="there is no file"):
        list(choice.read_questions(choice.TASKS["piqa"], tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no row"):
        list(choice.read_questions(choice.TASKS["piqa"], tmp_path / "empty.jsonl"))
