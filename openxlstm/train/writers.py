"""Where else the lines of `train.jsonl` go: TensorBoard and Weights & Biases, both extras. The journal stays the truth.

A writer gets exactly the lines that the journal gets. Numbers keep their names, those in lists get the name of their
row: `gates/3/forget_mean`, `lengths/2048/bits_per_byte`. A resumed run goes on in the same place, and what comes again
after a checkpoint replaces what was there.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from openxlstm.train.recipe import Recipe

ROW_NAMES = ("layer", "length", "from")  # what a row of a list is called by, the first that it has


@runtime_checkable
class Writer(Protocol):
    """Something that keeps lines."""

    def write(self, line: Mapping[str, Any]) -> None:
        """One line of the journal; it has a `step`."""

    def close(self) -> None:
        """Nothing more will be written."""


def open(recipe: Recipe, folder: Path, step: int = 0) -> list[Writer]:
    """The writers that the recipe asks for, which may be none.

    Args:
        folder: of the run.
        step: where the run stands; later points of an earlier sitting are void.

    Raises:
        ValueError: the recipe asks for a package that is not installed.
    """
    writers: list[Writer] = []
    if recipe.log.tensorboard:
        writers.append(TensorBoard(folder / "tensorboard", step))
    if recipe.log.wandb is not None:
        writers.append(WeightsAndBiases(recipe.log.wandb, folder, recipe.to_dict()))
    return writers


class TensorBoard:
    """Event files in the run folder: `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "log.tensorboard = true needs a package: pip install 'openxlstm[tensorboard]', or leave it out"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Every number as a scalar, every text as a text."""
        for name, value in flat(line):
            if isinstance(value, str):
                self._writer.add_text(name, value, line["step"])
            else:
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project, under an id that the run folder keeps. WANDB_MODE=offline needs no network."""

    def __init__(self, project: str, folder: Path, recipe: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("log.wandb needs a package: pip install 'openxlstm[wandb]', or leave it out") from error
        kept = folder / "wandb-id"
        if not kept.exists():
            kept.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        self._run = wandb.init(
            project=project, name=folder.resolve().name, id=kept.read_text(encoding="utf-8").strip(),
            resume="allow", dir=str(folder), config=recipe,
        )  # fmt: skip
        # Steps as a value of their own: wandb drops lines whose own step count goes back, which resuming does.
        self._run.define_metric("*", step_metric="step")

    def write(self, line: Mapping[str, Any]) -> None:
        """One record with everything."""
        self._run.log({"step": line["step"], **dict(flat(line))})

    def close(self) -> None:
        """Hand over what is still in memory."""
        self._run.finish()


def flat(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | int | str]]:
    """Names and values of a line, nested ones with slashes; `step` and what is None are left out."""
    for key, value in line.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}/")
        elif isinstance(value, list):
            for index, row in enumerate(value):
                known = next((key for key in ROW_NAMES if key in row), None)
                rest = {key: part for key, part in row.items() if key != known}
                yield from flat(rest, f"{name}/{index if known is None else row[known]}/")
        elif isinstance(value, (int, float, str)) and name != "step":
            yield name, value
