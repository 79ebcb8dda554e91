"""One token for every row as one replayed CUDA graph: no Python, no launch per operation between two tokens.

A graph works on fixed addresses, so the state lies in buffers that are written in place, and the batch is padded to a
bucket: rows that finish leave, and a smaller batch uses a smaller bucket's graph, captured when it first appears.
Padding rows read token 0 from the empty state; rows never feel each other, so nothing of them is seen.

A matrix memory is updated where it lies if its kernel can do that (the triton backend's can); what a step returns
elsewhere is copied back by the graph itself.

B rows still being written, W vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openxlstm.kernels.in_place import states_may_be_overwritten
from openxlstm.models.interface import LanguageModel, ModelState

log = logging.getLogger(__name__)
Step = Callable[[], None]
Capture = Callable[[Step], Step]
WARM_UP = 3  # calls before a capture: kernels are compiled and workspaces allocated outside the graph


class GraphDecoder:
    """One token at a time for B rows, from a state on; `reason` says why steps are not replayed, None if they are.

    Args:
        model: in evaluation mode, and so at every call; its weights must stay where they are.
        state: what the rows have read. It is copied.
        capture: makes a step replayable; None for the device's own way (CUDA graphs), or plain calls with a reason.
    """

    _state: ModelState
    _rows: int
    _tokens: Tensor

    def __init__(self, model: LanguageModel, state: ModelState, capture: Capture | None = None) -> None:
        self._model = model
        self.reason = refuses(model) if capture is None else None
        self._capture = capture or capture_on_cuda
        self._bind(state)

    @property
    def state(self) -> ModelState:
        """A copy of what the rows remember now."""
        return self._state.map(lambda x: x[: self._rows].clone())

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B W"]:
        """The token that each row reads now, to the scores of the one after it.

        Raises:
            ValueError: another number of tokens than rows.
        """
        if tokens.shape != (self._rows,):
            raise ValueError(f"tokens must be [{self._rows}], one for every row; given {list(tokens.shape)}")
        self._tokens[: self._rows].copy_(tokens)
        self._replay()
        return self._logits[: self._rows].clone()

    def select(self, rows: Int[Tensor, "R"]) -> None:
        """Go on with these rows of the batch alone."""
        state = self._state.map(lambda x: x[: self._rows][rows])
        count = state.tensors()[0].shape[0]
        if bucket(count) != self._tokens.shape[0]:
            return self._bind(state)
        self._rows = count
        for mine, x in zip(self._state.tensors(), state.tensors(), strict=True):
            mine[:count].copy_(x)
            mine[count:].zero_()
        self._tokens[count:].zero_()
        return None

    def _bind(self, state: ModelState) -> None:
        """Buffers of the bucket's size, and a step over them."""
        self._rows = state.tensors()[0].shape[0]
        size = bucket(self._rows)

        def padded(x: Tensor) -> Tensor:
            out = x.new_zeros(size, *x.shape[1:])
            out[: self._rows] = x.detach()
            return out

        self._state = state.map(padded)
        self._tokens = torch.zeros(size, dtype=torch.int64, device=state.tensors()[0].device)
        self._logits = torch.empty(0)
        if self.reason is not None:
            self._replay = self._advance
            return
        before = self._state.clone()
        for _ in range(WARM_UP):
            self._advance()
        try:
            self._replay = self._capture(self._advance)
        except RuntimeError as error:  # an operation that may not be captured; plain calls compute the same
            self.reason = f"the step cannot be captured: {error}"
            log.warning("decoding without a CUDA graph: %s", self.reason)
            self._replay = self._advance
        for mine, x in zip(self._state.tensors(), before.tensors(), strict=True):
            mine.copy_(x)

    def _advance(self) -> None:
        with torch.no_grad(), states_may_be_overwritten():
            hidden, state = self._model.features(self._tokens[:, None], self._state)
            logits = self._model.logits(hidden)[:, 0]
            if self._logits.shape != logits.shape:
                self._logits = torch.empty_like(logits)
            self._logits.copy_(logits)
            for mine, x in zip(self._state.tensors(), state.tensors(), strict=True):
                if x.data_ptr() != mine.data_ptr():
                    mine.copy_(x)


def bucket(rows: int) -> int:
    """The next power of two: at most half of a batch is padding, and a batch that empties needs few graphs."""
    return 1 << max(rows - 1, 0).bit_length()


def refuses(model: LanguageModel) -> str | None:
    """One sentence if steps of this model cannot be replayed."""
    assert isinstance(model, nn.Module), f"a language model is a torch module, not {type(model).__name__}"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return f"the model lies on {len(devices)} devices; a graph belongs to one"
    device = devices.pop()
    return None if device.type == "cuda" else f"CUDA graphs need a CUDA device; the model is on {device}"


def capture_on_cuda(step: Step) -> Step:
    """`step`, which has run before, recorded once; the result replays it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
