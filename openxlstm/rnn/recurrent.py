"""What sLSTM, mLSTM and xLSTM share: layers, directions, dropout, and state in every form a script may hold.

B batch, T time, D input width, S layers times directions, `width` of the output of one direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from openxlstm.cells import State, sLSTMState
from openxlstm.rnn import sequences
from openxlstm.rnn.layers import BlockLayer, CellLayer, initialise
from openxlstm.rnn.state import RNNState, UnbatchedRNNState, from_cell, from_memory, memory_size

Start = RNNState | tuple[Tensor, Tensor] | list[Tensor]  # what a call may begin from


class Recurrent(nn.Module):
    """Layers of one kind, run as `torch.nn.LSTM` runs its own. Subclasses build the layers and nothing else."""

    def __init__(
        self,
        layers: Sequence[CellLayer] | Sequence[BlockLayer],
        *,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        heads: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
        self.input_size, self.hidden_size, self.proj_size = input_size, hidden_size, proj_size
        self.num_layers, self.bidirectional, self.heads = num_layers, bidirectional, heads
        self.bias, self.batch_first, self.dropout = bias, batch_first, dropout
        self.layers = nn.ModuleList(layers)
        self._empty = tuple(layer.empty_state(1, "meta", torch.float32) for layer in layers)
        self._shapes = tuple(_shapes(empty) for empty in self._empty)
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    @property
    def width(self) -> int:
        """Features of the output of one direction: proj_size, or else hidden_size."""
        return self.proj_size or self.hidden_size

    @property
    def memory_size(self) -> int:
        """Numbers per sequence, layer and direction in the c of the pair (h, c)."""
        return memory_size(self._empty[0])

    def reset_parameters(self) -> None:
        """Draw fresh parameters: the table of `layers.initialise`."""
        directions = 1 + self.bidirectional
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, (CellLayer, BlockLayer))
            blocks = self.num_layers * (len(layer.blocks) if isinstance(layer, BlockLayer) else 1)
            initialise(layer, (index // directions) / max(self.num_layers - 1, 1), blocks)

    def flatten_parameters(self) -> None:
        """Nothing: nn.LSTM lays out its weights for cuDNN here, and scripts call it."""

    def empty_state(self, batch: int, *, device: torch.device | str | None = None) -> RNNState:
        """Nothing seen yet, for `batch` sequences: what a call without a state begins from."""
        parameter = next(self.parameters())
        device = parameter.device if device is None else device
        h = torch.zeros(batch, len(self.layers), self.width, device=device, dtype=parameter.dtype)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return RNNState(h, tuple(
            empty.map(lambda tensor: torch.zeros(batch, *tensor.shape[1:], device=device, dtype=dtype))
            for empty in self._empty
        ))  # fmt: skip

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Start | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, RNNState]:
        """Run over whole sequences, of any length, 0 included. The first two names are those of nn.LSTM.

        Args:
            input: x, [time, batch, input_size], with batch_first [batch, time, input_size], of one sequence [time,
                input_size], or a PackedSequence.
            hx: what a call before returned, whole or as (h, c); None or zeros begin afresh.
            lengths: [batch], steps that exist per sequence; what stands behind them influences nothing.
            reset: bool, shaped as x without its features: True where a sequence (an episode) starts, so that this step
                remembers nothing. Of a packed input in the padded shape.

        Returns:
            The output, [..., width] or [..., 2 width] if bidirectional, in the form of x and 0 behind `lengths`; and
            the state after the last step of each sequence, which unpacks into nn.LSTM's (h, c).

        Raises:
            ValueError: shapes, dtypes or a state that do not fit, with what would.
        """
        batch = sequences.read(input, lengths, reset, self.input_size, self.batch_first)
        self._check_dtype(batch.x)
        start = None if hx is None else self._start(hx, batch.x, batch.batched)
        y, h, after, directions = batch.x, [], [], 1 + self.bidirectional
        for index in range(0, len(self.layers), directions):
            outputs = []
            for direction in range(directions):
                before = None if start is None else (start.h[:, index + direction], start.layers[index + direction])
                flags = batch.flags.reversed() if direction else batch.flags
                out, last, layer_state = _run(
                    self.layers[index + direction], y.flip(1) if direction else y, before, flags, self.width
                )
                outputs.append(out.flip(1) if direction else out)
                h.append(last)
                after.append(layer_state)
            y = torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]
            if index + directions < len(self.layers):
                y = F.dropout(y, self.dropout, self.training)
        kind = RNNState if batch.batched else UnbatchedRNNState
        return batch.restored(y), kind(torch.stack(h, dim=1), tuple(after))

    def step(self, x: Tensor, state: Start | None = None) -> tuple[Tensor, RNNState]:
        """One time step, [batch, input_size] -> [batch, width], or [input_size] -> [width]: for acting and streaming.

        Raises:
            ValueError: as `forward`; and for a bidirectional module, whose backward half would need the future.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional module has no step: its backward half would need the future")
        if x.ndim not in (1, 2) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"step takes [batch, {self.input_size}], or [{self.input_size}] for one sequence; got {list(x.shape)}"
            )
        time = 1 if x.ndim == 2 and self.batch_first else 0
        y, after = self(x.unsqueeze(time), state)
        return y.squeeze(time), after

    def _check_dtype(self, x: Float[Tensor, "B T D"]) -> None:
        parameter = next(self.parameters())
        if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"x is {x.dtype} and the module {parameter.dtype}; use x.to({parameter.dtype}), or torch.autocast"
            )

    def _start(self, state: Start, x: Float[Tensor, "B T D"], batched: bool) -> RNNState:
        """The state as a tree of this module, this batch and this device."""
        if not isinstance(state, RNNState):
            state = self._from_pair(state, x, batched)
        want = (x.shape[0], len(self.layers), self.width)
        if state.h.shape != want:
            raise ValueError(
                f"the state is for [batch, layers and directions, width] = {list(state.h.shape)}, and this call needs "
                f"{list(want)}; state.select(rows) picks sequences"
            )
        for layer, (given, wanted) in enumerate(zip(state.layers, self._shapes, strict=True)):
            if (shapes := _shapes(given)) != wanted:
                raise ValueError(
                    f"layer {layer} of the state holds {_said(shapes)}; this module's holds {_said(wanted)}"
                )
        if state.h.device != x.device:
            raise ValueError(f"the state is on {state.h.device}, x on {x.device}; use state.to({x.device})")
        return state

    def _from_pair(self, pair: Sequence[Tensor], x: Float[Tensor, "B T D"], batched: bool) -> RNNState:
        """(h, c) as a state: the c of this module, or one of nn.LSTM's shape to begin from."""
        if isinstance(pair, Tensor) or len(pair) != 2:
            got = "one tensor, as for nn.GRU" if isinstance(pair, Tensor) else f"{len(pair)} tensors"
            raise ValueError(f"a state is what a call before returned, or a pair (h, c); got {got}")
        S, B = len(self.layers), x.shape[0]
        axes = [S, B] if batched else [S]
        h, c = pair
        widths = (self.width,), (self.memory_size, self.hidden_size)
        for name, part, allowed in zip("hc", pair, widths, strict=True):
            if list(part.shape[:-1]) != axes or part.shape[-1] not in allowed:
                shapes = " or ".join(str([*axes, width]) for width in allowed)
                raise ValueError(f"{name} of the state must be {shapes}, given {list(part.shape)}")
            if part.device != x.device:
                raise ValueError(f"{name} of the state is on {part.device}, x on {x.device}; use {name}.to(x.device)")
        h_BSU, c_BSM = (part.transpose(0, 1) if batched else part[None] for part in pair)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if c.shape[-1] == self.memory_size:
            layers = [from_memory(e, h_BSU[:, s], c_BSM[:, s], dtype) for s, e in enumerate(self._empty)]
        elif all(isinstance(empty, sLSTMState) for empty in self._empty):
            layers = [
                from_cell(empty, h_BSU[:, s], c_BSM[:, s], dtype)
                for s, empty in enumerate(self._empty)
                if isinstance(empty, sLSTMState)
            ]
        else:
            self._check_zeros(h, c)
            return self.empty_state(B, device=x.device)
        return RNNState(h_BSU.to(x.dtype), tuple(layers))

    def _check_zeros(self, h: Tensor, c: Tensor) -> None:
        """nn.LSTM's zeros mean "nothing seen yet" here too; other numbers of its shape cannot be this memory."""
        if torch.compiler.is_compiling():
            raise ValueError("while compiling pass hx=None, not zeros: nobody can look whether they are zeros")
        if h.any() or c.any():
            raise ValueError(
                f"c is [..., {self.hidden_size}], nn.LSTM's shape, and not zero; the memory of this module is "
                f"[..., {self.memory_size}] and cannot be made from it. Begin with hx=None, or with a state or pair "
                f"(h, c) that this module returned; only rnn.sLSTM without proj_size can begin from nn.LSTM's (h, c)"
            )

    def extra_repr(self) -> str:
        """As nn.LSTM's: sizes, what differs from the defaults, and the heads that were chosen."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False, "proj_size": 0
        }  # fmt: skip
        parts += [f"{name}={getattr(self, name)}" for name, usual in defaults.items() if getattr(self, name) != usual]
        return ", ".join([*parts, f"heads={self.heads}"])


def _run(
    layer: nn.Module,
    x: Float[Tensor, "B T D"],
    before: tuple[Float[Tensor, "B width"], State] | None,
    flags: sequences.Flags,
    width: int,
) -> tuple[Float[Tensor, "B T width"], Float[Tensor, "B width"], State]:
    """One layer in one direction: every output, the last one that exists (or the one before), and the state."""
    y, state = layer(x, None if before is None else before[1], flags.reset, flags.mask)
    h = x.new_zeros(x.shape[0], width) if before is None else before[0].to(y.dtype)
    if flags.mask is not None:
        y = torch.where(flags.mask[..., None], y, 0.0)
    return y, _last(y, h, flags.mask), state


def _last(
    y: Float[Tensor, "B T width"], h: Float[Tensor, "B width"], mask: Bool[Tensor, "B T"] | None
) -> Float[Tensor, "B width"]:
    """The output of the last step that exists; h where none does."""
    T = y.shape[1]
    if T == 0:
        return h
    if mask is None:
        return y[:, -1]
    index_B = torch.where(mask, torch.arange(T, device=y.device), 0).amax(dim=1)
    last = y.gather(1, index_B[:, None, None].expand(-1, 1, y.shape[2]))[:, 0]
    return torch.where(mask.any(dim=1)[:, None], last, h)


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    """Dotted path to shape without the batch axis."""
    return {name: tuple(tensor.shape[1:]) for name, tensor in state.named_tensors()}


def _said(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
