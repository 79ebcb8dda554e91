"""What the model remembers from one step to the next, where `data.window` is "lanes".

Row b of every batch reads on where row b of the batch before it stopped, so its state goes with it, detached: that is
truncated back-propagation through time. Where a lane begins anew the window itself begins with a reset, so nothing
here ever clears a state.

A process holds the states of its own rows only. In a checkpoint they stand by the row of the whole batch, so that any
number of processes, in any portions, can go on from it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from openxlstm.data.order import rows_of_rank
from openxlstm.models.interface import ModelState
from openxlstm.train.parallel import World

PREFIX = "carried."


@final
class Carry:
    """The states of this process's portions, one per portion and None at the start of a run."""

    def __init__(self, batch: int, micro_batch: int | None, world: World) -> None:
        """batch: rows of all processes, the same at every step; micro_batch: as in the recipe."""
        size = batch // world.ranks if micro_batch is None else micro_batch
        self._batch, self._world = batch, world
        self._rows: Int64[np.ndarray, "portions micro_batch"] = rows_of_rank(batch, size, world.rank, world.ranks)
        self.states: list[ModelState | None] = [None] * len(self._rows)

    def take(self, states: Sequence[ModelState]) -> None:
        """Remember the states behind a step, cut from its graph."""
        self.states = [state.detach() for state in states]

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a checkpoint: the rows of the whole batch, the same in every process, which all must ask."""
        whole: dict[str, Tensor] = {}
        for rows, state in zip(self._rows, self.states, strict=True):
            if state is None:
                return {}
            for name, part in state.named_tensors(PREFIX):
                if name not in whole:
                    whole[name] = part.new_zeros(self._batch, *part.shape[1:])
                whole[name][torch.from_numpy(rows).to(part.device)] = part
        return {name: self._world.sum(tensor) for name, tensor in whole.items()}  # rows of others are zero here

    def restore(self, model: Any, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` stored; from nothing if there is none, as at the start of a run.

        Args:
            model: a LanguageModel, which knows the shape of its states.

        Raises:
            ValueError: the stored states are not those of this model and batch.
        """
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        self.states = [None] * len(self._rows)
        if not mine:
            return
        for index, rows in enumerate(self._rows):
            empty = model.empty_state(len(rows))
            names = iter([name for name, _ in empty.named_tensors(PREFIX)])
            self.states[index] = empty.map(lambda part: _rows_of(mine, next(names), rows, part, self._batch))  # noqa: B023


def _rows_of(
    tensors: Mapping[str, Tensor], name: str, rows: Int64[np.ndarray, "micro_batch"], like: Tensor, batch: int
) -> Tensor:
    stored = tensors.get(name)
    if stored is None or stored.shape != (batch, *like.shape[1:]):
        found = "nothing" if stored is None else f"shape {tuple(stored.shape)}"
        raise ValueError(f"{name}: the checkpoint holds {found}, and this run needs {(batch, *like.shape[1:])}")
    return stored[torch.from_numpy(rows)].to(device=like.device, dtype=like.dtype)
