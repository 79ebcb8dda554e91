"""What computes one token for every row: the model itself, or one call for all of it, native or a CUDA graph.

All take the state that the prompt left, and all can drop rows. `decoder` chooses; `explain` says what and why.
"""

from __future__ import annotations

import ctypes
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openxlstm.infer import graph
from openxlstm.infer.program import FORMATS, Program, foreign_module
from openxlstm.kernels.cpu.library import Decode, Native, native, threads
from openxlstm.models.interface import LanguageModel, ModelState
from openxlstm.models.xlstm import xLSTM
from openxlstm.models.xlstm_large import xLSTMLarge

MOST_ROWS = 16  # beyond, a product of matrices is faster than rows that pass a matrix together


@runtime_checkable
class Decoder(Protocol):
    """One token at a time for B rows, from a state on."""

    @property
    def state(self) -> ModelState:
        """What the rows remember now; later steps do not change it."""
        ...

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B W"]:
        """The token that each row reads now, to the scores of the one after it."""
        ...

    def select(self, rows: Int[Tensor, "R"]) -> None:
        """Go on with these rows of the batch alone."""
        ...


class NativeDecoder:
    """The native step of a model (kernels/cpu). Owns its state, and writes to it in place: memory is constant.

    Matrices are read where the model keeps them, in fp32, bf16 or a GGUF file's blocks; activations, norms, gates and
    states are fp32. So its scores are those of the same weights in fp32 arithmetic, to rounding.

    Args:
        model: one that `refuses` lets through; weights that change later must not be used with an old decoder.
        state: what the rows have read.
        copy: False gives the state away: it becomes the decoder's, which may write to it, and is not held twice.
    """

    def __init__(self, model: LanguageModel, state: ModelState, *, copy: bool = True):
        self._model = model
        self._memory, self._own_memory, self._logits = (torch.empty(0, 0) for _ in range(3))  # of `_bind`
        self._call = Decode()
        self._bind(state, copy)

    @property
    def state(self) -> ModelState:
        """See `Decoder`: a copy."""
        return self._state.clone()

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B W"]:
        """See `Decoder`.

        Raises:
            ValueError: a token outside the vocabulary, or another number of tokens than rows.
        """
        ids, threads_now, library = tokens.to(torch.int64).contiguous(), threads(), native()
        if ids.shape != (self._program.rows,):
            raise ValueError(f"tokens must be [{self._program.rows}], one for every row; given {list(ids.shape)}")
        assert isinstance(library, Native)
        if threads_now > self._own_memory.shape[0]:
            self._own_memory = torch.zeros(threads_now, self._program.own)
            self._call.own_memory = self._own_memory.data_ptr()
        self._call.threads, self._call.tokens = threads_now, ids.data_ptr()
        if not library.decode(self._call):
            last = self._call.vocabulary - 1
            raise ValueError(f"tokens={ids.tolist()} must lie in 0 .. {last}, the model's vocabulary")
        return self._logits.clone()

    def select(self, rows: Int[Tensor, "R"]) -> None:
        """See `Decoder`."""
        self._bind(self._state.select(rows), copy=False)

    def _bind(self, state: ModelState, copy: bool) -> None:
        self._state = state.map(lambda x: x.detach().to(torch.float32, copy=copy).contiguous())
        rows = self._state.tensors()[0].shape[0]
        library = native()
        assert isinstance(library, Native)
        self._program = program = Program(self._model, self._state, rows, library)
        self._memory, self._own_memory = torch.zeros(program.size), torch.zeros(threads(), program.own)
        place = program.logits
        logits = self._memory[place.offset : place.offset + rows * place.ld].view(rows, place.ld)
        self._logits = logits[:, : place.width]
        self._call = Decode(
            rows=rows, count=len(program.array), vocabulary=self._model.config.vocab_size,
            steals=program.steals, own=program.own, scratch=program.scratch, operations=ctypes.addressof(program.array),
            memory=self._memory.data_ptr(), own_memory=self._own_memory.data_ptr(),
        )  # fmt: skip


class ModelDecoder:
    """The model itself, a call per operation. Takes any language model on any device."""

    def __init__(self, model: LanguageModel, state: ModelState):
        self._model, self._state = model, state

    @property
    def state(self) -> ModelState:
        """See `Decoder`: the state itself, for no call of a model changes the one that it was given."""
        return self._state

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B W"]:
        """See `Decoder`."""
        with torch.no_grad():
            hidden, self._state = self._model.features(tokens[:, None], self._state)
            return self._model.logits(hidden)[:, 0]

    def select(self, rows: Int[Tensor, "R"]) -> None:
        """See `Decoder`."""
        self._state = self._state.select(rows)


def decoder(model: LanguageModel, state: ModelState) -> Decoder:
    """What is fastest for these rows: the native step on a CPU, a CUDA graph on a GPU, the model itself elsewhere.

    The state is given away: what decodes may write to it.
    """
    rows = state.tensors()[0].shape[0]
    if refuses(model, rows) is None:
        return NativeDecoder(model, state, copy=False)
    if isinstance(model, xLSTM | xLSTMLarge) and graph.refuses(model) is None:
        return graph.GraphDecoder(model, state)
    return ModelDecoder(model, state)


def refuses(model: LanguageModel, rows: int) -> str | None:
    """One sentence if the native step cannot decode `rows` rows of this model."""
    if not isinstance(model, xLSTM | xLSTMLarge):
        return f"{type(model).__name__} is not an architecture of this library"
    assert isinstance(model, nn.Module)
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            return f"{name} is on {parameter.device}"
        if parameter.dtype not in FORMATS:
            return f"{name} is {str(parameter.dtype).removeprefix('torch.')}; it takes float32 and bfloat16"
    if rows > MOST_ROWS:
        return f"{rows} rows are more than {MOST_ROWS}, where matrix products of PyTorch are faster"
    found = native()
    return found if isinstance(found, str) else foreign_module(model)


def explain(model: LanguageModel, rows: int = 1) -> str:
    """What decodes this model here, in a sentence."""
    reason = refuses(model, rows)
    if reason is not None and isinstance(model, xLSTM | xLSTMLarge) and graph.refuses(model) is None:
        return "one replayed CUDA graph per token"
    if reason is not None:
        return f"PyTorch, a call per operation: {reason}"
    found = native()
    assert isinstance(found, Native)
    return f"one native call per token, {found.vectors} instructions"
