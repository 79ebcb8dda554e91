"""The three modules, with the constructor of `torch.nn.LSTM` and a few keyword arguments of their own.

The arguments of nn.LSTM mean here what they mean there:
    input_size, hidden_size   features of x and of the output; any two numbers
    num_layers                layers on top of each other
    bias                      False: no additive parameters at all. The forget gates then begin at 1/2: better keep them
    batch_first               x is [batch, time, features] instead of [time, batch, features]
    dropout                   on the output of every layer but the last, while training
    bidirectional             a second set of layers reads from the end; outputs stand side by side
    proj_size                 > 0: a last matrix makes the output this narrow, the memory stays as wide as hidden_size.
                              Memory mixing reads the unprojected h, where nn.LSTM's reads the projected one
    device, dtype             of the parameters; states are fp32 at least
"""

from __future__ import annotations

from typing import final

import torch

from openxlstm.cells import mlstm, slstm
from openxlstm.rnn.layers import Block, BlockLayer, CellLayer, mLSTMCell, sLSTMCell
from openxlstm.rnn.recurrent import Recurrent


@final
class sLSTM(Recurrent):
    """Scalar memory with exponential gates, a normaliser and memory mixing (arXiv:2405.04517, Sec. 2.2).

    The nearest relative of nn.LSTM, and like it sequential in time. It tracks state that a matrix memory cannot
    (parity, counters, modes), and can begin from nn.LSTM's (h, c).

    Args:
        heads: R mixes memory inside a head only. 1, the default, is the full recurrent matrix of nn.LSTM and fits any
            hidden_size; more heads have fewer parameters and run faster.
        forget_gate: "sigmoid", or "exp" as the paper's other choice.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        forget_gate: str = "sigmoid",
    ):
        _check_sizes(input_size, hidden_size, num_layers, proj_size)
        _check_heads(hidden_size, heads)
        slstm.check_gate(forget_gate)
        layers = [
            CellLayer(sLSTMCell(inputs, hidden_size, heads, bias, forget_gate), inputs, bias, proj_size)
            for inputs in _inputs(input_size, proj_size or hidden_size, num_layers, bidirectional)
        ]
        super().__init__(
            layers, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, proj_size=proj_size,
            heads=heads, device=device, dtype=dtype,
        )  # fmt: skip


@final
class mLSTM(Recurrent):
    """Matrix memory (arXiv:2405.04517, Sec. 2.3): values are stored under keys and read with queries.

    Nothing recurs but the memory, so a whole sequence is computed in parallel; the memory holds hidden_size^2 / heads
    numbers per layer. The output gate of eq. (27) is included; norms, residuals and convolutions are what `xLSTM` adds.

    Args:
        heads: memories of head width hidden_size / heads. None: the most of 4, 2, 1 that makes
            whole heads of at least 8 values.
        input_gate: "exp", or "sigmoid", "sigmoid_normalized" (arXiv:2503.14376).
        forget_gate: "sigmoid", or "exp", which needs input_gate="exp" and eps=0.
        eps: added to the normaliser; 0 in the paper, 1e-6 in every published checkpoint.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int | None = None,
        input_gate: str = "exp",
        forget_gate: str = "sigmoid",
        eps: float = 1e-6,
    ):
        _check_sizes(input_size, hidden_size, num_layers, proj_size)
        heads = _usual_heads(hidden_size) if heads is None else heads
        _check_heads(hidden_size, heads)
        mlstm.check_gates(input_gate, forget_gate, eps)
        layers = [
            CellLayer(
                mLSTMCell(inputs, hidden_size, heads, bias, input_gate, forget_gate, eps), inputs, bias, proj_size
            )
            for inputs in _inputs(input_size, proj_size or hidden_size, num_layers, bidirectional)
        ]
        super().__init__(
            layers, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, proj_size=proj_size,
            heads=heads, device=device, dtype=dtype,
        )  # fmt: skip


@final
class xLSTM(Recurrent):
    """Residual blocks of both kinds: what to try when the task deserves more than a bare cell.

    A layer is a block per letter of `pattern`: norm, short causal convolution, cell, head norm, residual; norm, gated
    feed-forward layer, residual. The input is projected to hidden_size, and a norm stands behind the last layer.
    For language models of the published shapes use `openxlstm.xLSTM`.

    Args:
        pattern: the blocks of one layer, first to last: m matrix memory, s scalar memory.
        heads: of every cell. None: the most of 4, 2, 1 that makes
            whole heads of at least 8 values.
        conv: taps of the convolution; 0 leaves it out.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pattern: str = "ms",
        heads: int | None = None,
        conv: int = 4,
    ):
        _check_sizes(input_size, hidden_size, num_layers, 0)
        if not pattern or set(pattern) - set("ms"):
            raise ValueError(
                f"pattern={pattern!r} must name one block per letter, m (matrix memory) or s (scalar memory), such as "
                f"'ms'"
            )
        if conv < 0:
            raise ValueError(f"conv={conv} must be a number of taps; 0 means no convolution")
        heads = _usual_heads(hidden_size) if heads is None else heads
        _check_heads(hidden_size, heads)
        if hidden_size == heads:
            raise ValueError(
                f"heads={heads} leaves heads of width 1 for hidden_size={hidden_size}, and the norm over one value is "
                f"always 0; use " + (f"at most heads={hidden_size // 2}" if hidden_size > 1 else "a wider hidden_size")
            )
        directions = 1 + bidirectional
        layers = [
            BlockLayer(
                inputs if index < directions or bidirectional else None,
                hidden_size,
                [Block(kind, hidden_size, heads, bias, conv) for kind in pattern],
                bias,
                last=index >= (num_layers - 1) * directions,
            )
            for index, inputs in enumerate(_inputs(input_size, hidden_size, num_layers, bidirectional))
        ]
        super().__init__(
            layers, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, proj_size=0,
            heads=heads, device=device, dtype=dtype,
        )  # fmt: skip
        self.pattern = pattern


def _inputs(input_size: int, width: int, num_layers: int, bidirectional: bool) -> list[int]:
    """Input width of every layer and direction, in nn.LSTM's order: both directions feed both directions above."""
    directions = 1 + bidirectional
    return [input_size] * directions + [width * directions] * (directions * (num_layers - 1))


def _usual_heads(hidden_size: int) -> int:
    """4 as in the papers, or else 2 or 1: heads of at least 8 values, a memory narrower than that holds little."""
    return next((heads for heads in (4, 2) if hidden_size % heads == 0 and hidden_size >= 8 * heads), 1)


def _check_sizes(input_size: int, hidden_size: int, num_layers: int, proj_size: int) -> None:
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    if not 0 <= proj_size < hidden_size:
        raise ValueError(f"proj_size={proj_size} must be below hidden_size={hidden_size}; 0 means no projection")


def _check_heads(hidden_size: int, heads: int) -> None:
    if heads < 1 or hidden_size % heads:
        divisors = [count for count in range(1, hidden_size + 1) if hidden_size % count == 0]
        nearest = min(divisors, key=lambda count: abs(count - heads))
        raise ValueError(f"heads={heads} must divide hidden_size={hidden_size}; the nearest that does is {nearest}")
