"""What several processes do together, as named checks. test_parallel.py launches this file with torchrun, once.

    torchrun --nproc-per-node N rank_program.py FOLDER CHECK...

Every process writes FOLDER/results/CHECK-RANK.json: {"measured": ...} or {"error": ...}. These are judged, not the exit
status: processes that meet over sockets can also die after all work is done.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from train.ranks import (
    FILES,
    SAVED,
    SPLITS,
    curve,
    digest,
    dying,
    meters,
    opened,
    recipe_of,
    recorded,
    replaced,
    run_training,
    same_run,
    whole,
)

from openxlstm.data.gather import Batch
from openxlstm.data.order import rows_of_rank
from openxlstm.train import checkpoints, parallel, step
from openxlstm.train.objective import Objective
from openxlstm.train.parallel import World, join
from openxlstm.train.run import Run


def uneven_batch(rows: int, context: int, words: int) -> Batch:
    """Row 0 is full, rows 2 and 3 hold nothing that counts, the others some; so ranks and portions differ."""
    draw = np.random.default_rng(3)
    tokens, targets = draw.integers(0, words, (2, rows, context))
    valid = draw.random((rows, context)) < np.linspace(0.9, 0.1, rows)[:, None]
    valid[0], valid[2:4] = True, False
    reset = draw.random((rows, context)) < 0.1
    return Batch(tokens, targets, reset, valid)


def split(batch: Batch, run: Run) -> list[Batch]:
    """The portions of this process, cut by the rule of the feed."""
    size = len(batch.tokens)
    rows = rows_of_rank(size, run.recipe.train.micro_batch or size // run.world.ranks, run.world.rank, run.world.ranks)
    arrays = (batch.tokens, batch.targets, batch.reset, batch.valid)
    return [Batch(*(array[part] for array in arrays)) for part in rows]


def gradient_of(run: Run, batch: Batch) -> tuple[step.Found, dict[str, torch.Tensor]]:
    found = step.gradient(run, split(batch, run), meters(run), 0.0, wished=False)
    return found, {name: whole(weight.grad) for name, weight in run.model.named_parameters()}


def place(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that owns the parameter of that dotted name, and its name there."""
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


def check_gradients(folder: Path) -> dict[str, float]:
    """One process = every split, with unequal numbers of targets and portions in which nothing counts."""
    return compare_gradients(folder, SPLITS)


def check_gradients_hsdp(folder: Path) -> dict[str, float]:
    """Groups of two that share parameters, and are copies of each other."""
    return compare_gradients(folder, {"hsdp": ("train.parallel=fsdp2", "train.shard=2", "train.micro_batch=1")})


def compare_gradients(folder: Path, splits: dict[str, tuple[str, ...]]) -> dict[str, float]:
    alone = World("single", 0, 1, torch.device("cpu"))
    furthest = {}
    for file in FILES:
        batch = uneven_batch(8, 24, 257)
        reference = opened(folder, alone, "loss.z_loss=0.01", file=file)
        one, want = gradient_of(reference, batch)
        for name, said in splits.items():
            recipe, _ = recipe_of(folder, *said)
            with join(recipe.train.parallel, recipe.train.shard) as world:
                run = opened(folder, world, *said, "loss.z_loss=0.01", file=file)
                found, got = gradient_of(run, batch)
                assert got.keys() == want.keys()
                for weight in want:
                    torch.testing.assert_close(
                        got[weight],
                        want[weight],
                        rtol=0,
                        atol=1e-12,
                        msg=lambda text, at=(name, weight): f"{at}: {text}",
                    )
                assert math.isclose(found.norm, one.norm, rel_tol=1e-12), (name, found.norm, one.norm)
                assert found.score.tokens == one.score.tokens == int(batch.valid.sum())
                for field in ("nats", "byte_nats", "z"):
                    mine, theirs = getattr(found.score, field), getattr(one.score, field)
                    assert math.isclose(mine, theirs, rel_tol=1e-12), (name, field)
                furthest[f"{file}, {name}"] = max(float((got[key] - want[key]).abs().max()) for key in want)
                parallel.clip(run.parameters, found.norm / 2, found.norm)
                assert math.isclose(parallel.global_norm(run.parameters), found.norm / 2, rel_tol=1e-5)
    return furthest


def check_islands(folder: Path) -> dict[str, float]:
    """bf16 products under fsdp2: weights of products travel as bf16, all others and all gradients are fp32."""
    alone = World("single", 0, 1, torch.device("cpu"))
    batch, worst = uneven_batch(8, 24, 257), 0.0
    for file in FILES:
        said = ("train.precision=fp32", "train.micro_batch=2")
        reference = opened(folder, alone, *said, file=file)
        reference.precision = "bf16"  # without asking this processor, which may be slow at it
        _, want = gradient_of(reference, batch)
        with join("fsdp2") as world:
            with replaced(
                World, "wrap", lambda self, objective, _, honest=World.wrap: honest(self, objective, torch.bfloat16)
            ):
                run = opened(folder, world, *said, "train.parallel=fsdp2", file=file)
            run.precision = "bf16"
            seen: dict[str, torch.dtype] = {}
            views: list[bool] = []
            for unit in run.model.units():
                unit.block.register_forward_hook(
                    lambda module, inputs, output, views=views: views.append(output[0]._is_view())
                )
                names = {weight: name for name, weight in unit.block.named_parameters()}
                apart = {weight for module in unit.rounded for weight in module.parameters()}
                # Hooks only where FSDP has its own: a leaf with a hook is called by itself, not in one pass.
                for module in (unit.block, *unit.rounded):
                    own = [
                        (names[weight], *place(module, name))
                        for name, weight in module.named_parameters()
                        if module is not unit.block or weight not in apart
                    ]
                    note = lambda module, inputs, output, own=own, seen=seen: seen.update(
                        {name: getattr(owner, last).dtype for name, owner, last in own}
                    )
                    module.register_forward_hook(note, prepend=True)
            _, got = gradient_of(run, batch)
            rounded = {
                f"{name}.{part}"
                for unit in run.model.units()
                for name, module in unit.block.named_modules()
                if module in unit.rounded
                for part, _ in module.named_parameters(recurse=False)
            }
            assert views
            assert not any(views), "an operation in place on the output of a unit would lose its hooks"
            assert rounded
            assert {name for name, dtype in seen.items() if dtype == torch.bfloat16} == rounded
            assert all(weight.dtype == torch.float32 for weight in run.parameters)
        for name, grad in want.items():
            assert got[name].dtype == torch.float32
            distance = float((got[name] - grad).norm() / (grad.norm() + 1e-12))
            assert distance < 1e-5, (name, distance)  # 0 seen; 1e-2 where only one took a block in one pass
            worst = max(worst, distance)
    return {"relative distance to one process": worst}


def check_resume_same_world(folder: Path) -> dict[str, str]:
    """A run that died goes on, in the same world, to the bit."""
    for kind in ("ddp", "fsdp2"):
        said = (f"train.parallel={kind}", "train.precision=fp32", "train.micro_batch=2", "model.dropout=0.1")
        assert run_training(folder, f"whole-{kind}", *said) == "done"
        dying(folder, f"died-{kind}", *said)
        assert checkpoints.latest(folder / f"died-{kind}" / "checkpoints").name == f"step-{SAVED:08d}"
        assert run_training(folder, f"died-{kind}", *said) == "done"
        if dist.get_rank() == 0:
            same_run(folder / f"whole-{kind}", folder / f"died-{kind}")
    return {"compared": "bit for bit"}


def check_continue_one_as_two(folder: Path) -> dict[str, str]:
    """A run that one process began, and that died, is finished by these, in other portions."""
    for kind, micro_batch in (("ddp", 1), ("fsdp2", 4)):
        name = f"one-as-{kind}"
        if dist.get_rank() == 0:
            shutil.copytree(folder / "died-alone", folder / name)
        dist.barrier()
        with recorded() as seen:
            ending = run_training(folder, name, f"train.parallel={kind}", f"train.micro_batch={micro_batch}")
        assert ending == "done"
        write_samples(folder / name, seen)
    return {}


def check_begin_as_two(folder: Path) -> dict[str, str]:
    """A run that these begin and do not survive; others will finish it."""
    with recorded() as seen:
        dying(folder, "died-as-two", "train.parallel=fsdp2", "train.micro_batch=2")
    write_samples(folder / "died-as-two", seen)
    return {}


def check_continue_as_four(folder: Path) -> dict[str, str]:
    """Two processes began it; four finish it, as two copies that share their parameters by two (HSDP), and as ddp."""
    for name, said in (("hsdp", ("train.parallel=fsdp2", "train.shard=2")), ("ddp", ("train.parallel=ddp",))):
        if dist.get_rank() == 0:
            shutil.copytree(folder / "died-as-two", folder / f"two-as-four-{name}")
        dist.barrier()
        with recorded() as seen:
            assert run_training(folder, f"two-as-four-{name}", *said, "train.micro_batch=1") == "done"
        write_samples(folder / f"two-as-four-{name}", seen)
    return {}


def write_samples(run: Path, seen: dict[int, list[list[int]]]) -> None:
    (run / f"samples-{dist.get_rank()}.json").write_text(json.dumps(seen))


def check_lanes(folder: Path) -> dict[str, str]:
    """States that one process carried go on in two, in other portions."""
    if dist.get_rank() == 0:
        shutil.copytree(folder / "lanes-died-alone", folder / "lanes-as-two")
    dist.barrier()
    said = ("data.window=lanes", "train.parallel=ddp", "train.micro_batch=2")
    assert run_training(folder, "lanes-as-two", *said) == "done"
    return {}


def check_nan_in_one_rank(folder: Path) -> dict[str, int]:
    """A loss that is no number on one process: all skip the step, and nothing has changed."""
    honest = Objective.forward
    for kind in ("ddp", "fsdp2"):
        with join(kind) as world:
            run = opened(folder, world, f"train.parallel={kind}", "train.micro_batch=2")
            batch = uneven_batch(8, 24, 257)
            step.update(run, step.gradient(run, split(batch, run), meters(run), 0.0, wished=False))
            before = digest(run)

            def spoilt(self: Objective, *inputs: Any) -> Any:
                loss, sums, state = honest(self, *inputs)
                return (loss * math.nan, sums, state) if dist.get_rank() == 1 else (loss, sums, state)

            with replaced(Objective, "forward", spoilt):
                found = step.gradient(run, split(batch, run), meters(run), 0.0, wished=False)
            assert math.isnan(found.norm), "every process sees it"
            assert None in step.largest(run).values()
            step.leave(run)
            assert digest(run) == before
    calls: list[int] = []

    def once(self: Objective, *inputs: Any) -> Any:
        loss, sums, state = honest(self, *inputs)
        calls.append(self.training)
        bad = dist.get_rank() == 1 and self.training and sum(calls) == 4
        return (loss * math.nan if bad else loss), sums, state

    with replaced(Objective, "forward", once):
        assert run_training(folder, "nan", "train.parallel=ddp") == "done"
    if dist.get_rank() == 0:
        skipped = [line["step"] for line in curve(folder / "nan") if "skipped" in line]
        assert skipped == [4], skipped
    return {"skipped step": 4}


def check_rollback(folder: Path) -> dict[str, str]:
    """All go back together, and it is the run that was told to leave these samples out."""
    honest = step.gradient

    def spoilt(run: Run, *given: Any, **named: Any) -> step.Found:
        found = honest(run, *given, **named)
        return dataclasses.replace(found, norm=math.nan) if 48 in run.feed.step(found.step).sample else found

    said = ("train.parallel=fsdp2", "train.micro_batch=2")
    with replaced(step, "gradient", spoilt):
        assert run_training(folder, "rolled", *said, "guard.nonfinite=rollback") == "done"
    assert run_training(folder, "told", *said, "data.skip=[[48, 56]]") == "done"
    if dist.get_rank() == 0:
        same_run(folder / "rolled", folder / "told")
    return {"compared": "bit for bit"}


def check_signal_to_one_rank(folder: Path) -> dict[str, int]:
    """A scheduler warns one process; all of them save after the same step, and the run goes on from there."""
    honest = step.update

    def update(run: Run, found: step.Found) -> float:
        if found.step == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return honest(run, found)

    with replaced(step, "update", update):
        assert run_training(folder, "warned", "train.parallel=ddp", "train.precision=fp32") == "interrupted"
    assert checkpoints.latest(folder / "warned" / "checkpoints").name == "step-00000004"
    assert run_training(folder, "warned", "train.parallel=ddp", "train.precision=fp32") == "done"
    return {"saved after step": 4}


def check_refusals(folder: Path) -> dict[str, str]:
    """What the first process refuses, all refuse; and it is said once."""
    said = {}
    for name, words in {
        "batch": ("train.batch=9", "train.micro_batch=3"),
        "single": ("train.parallel=single",),
        "shard": ("train.parallel=fsdp2", "train.shard=3"),
        "ddp with shard": ("train.parallel=ddp", "train.shard=2"),
    }.items():
        try:
            run_training(folder, "refused", *words)
        except ValueError as error:
            said[name] = str(error)
    (folder / "somebody").mkdir(exist_ok=True)
    (folder / "somebody" / "letter.txt").write_text("dear")
    try:
        run_training(folder, "somebody", "train.parallel=ddp")
    except parallel.ElsewhereError as error:
        said["folder"] = f"elsewhere: {error}"
    except ValueError as error:
        said["folder"] = str(error)
    return said


CHECKS: dict[str, Callable[[Path], Any]] = {
    name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")
}


def main() -> None:
    """Every check, in order; the first that fails ends the program, since its processes no longer walk in step."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in names:
        try:
            result = {"measured": CHECKS[name](folder)}
        except Exception:
            result = {"error": traceback.format_exc()}
        (folder / "results" / f"{name}-{rank}.json").write_text(json.dumps(result))
        if "error" in result:
            os._exit(1)  # the launcher ends the others
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
