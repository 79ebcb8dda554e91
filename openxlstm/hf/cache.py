"""What `generate` carries from token to token: one frozen state per block, of a size that no text changes.

A forward pass replaces states as a whole and writes into none, so whoever holds the old ones still has them: a fork is
a copy of references. Nothing here depends on no_grad; gradients flow through a carried state until `detach`.

The library slices a prompt by `get_seq_length`, so two counts differ: `get_seq_length` is how many columns of the ids
at hand were already read, `seen_tokens` how many tokens the state has read in all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from openxlstm.cells import State
from openxlstm.models.interface import ModelState

NOT_SHORTER = "a recurrent state cannot be shortened; keep cache.fork() from before the tokens you may take back"
NOT_WRITTEN = "states are replaced as a whole by the model; nothing writes into a layer of an xLSTMCache"
ABSENT = -1  # in place of the id of a column that the mask left out


class StateLayer(LinearAttentionCacheLayerMixin):
    """One block's state. The library's own layer for linear attention writes in place and needs a convolution."""

    is_compileable = False  # no compilation behind the user's back, and no four-dimensional mask
    is_croppable = False

    def __init__(self, state: State | None = None) -> None:
        super().__init__(number_of_states=1)
        self.state: State | None = None
        self.device: torch.device | None = None  # type: ignore[assignment]  # where an offloaded state belongs
        if state is not None:
            self.put(state)

    def put(self, state: State) -> None:
        """Replace the state."""
        self.state = state
        self.has_previous_state[0] = True

    @property
    def batch_size(self) -> int:
        """Rows of the state.

        Raises:
            AttributeError: nothing was seen yet; the library asks with hasattr.
        """
        if self.state is None:
            raise AttributeError("nothing was seen yet")
        return self.state.tensors()[0].shape[0]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by index, as beam search asks: a new state, the old one stays with its holders."""
        if self.state is not None:
            self.state = self.state.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows by index."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        if self.state is not None:
            self.state = self.state.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Nothing seen yet."""
        self.state = None
        self.has_previous_state[0] = False

    def offload(self) -> None:
        """Keep the state in the memory of the host until the next forward pass."""
        if self.state is not None and self.device is None:
            self.device = self.state.tensors()[0].device
            self.state = self.state.to("cpu")

    def prefetch(self) -> None:
        """Back to the device that `offload` took it from."""
        if self.state is not None and self.device is not None:
            self.state = self.state.to(self.device)
        self.device = None

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: see NOT_SHORTER."""
        raise ValueError(NOT_SHORTER)

    def activate_past_recording(self) -> None:
        """Refused: see NOT_SHORTER."""
        raise ValueError(NOT_SHORTER)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Refused: see NOT_WRITTEN."""
        raise ValueError(NOT_WRITTEN)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused: see NOT_WRITTEN."""
        raise ValueError(NOT_WRITTEN)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused: see NOT_WRITTEN."""
        raise ValueError(NOT_WRITTEN)


class xLSTMCache(Cache):
    """A state per block, and how much was read. Made empty: the first forward pass fills it.

    Attributes:
        seen_tokens: columns read since the state was empty, padding included.
        ids: [B, get_seq_length()], the ids read, ABSENT where masked; None once something else (embeddings) was read.
    """

    layers: list[StateLayer]  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.seen_tokens = 0
        self.ids: Tensor | None = None
        self.ends: tuple[Tensor, int] | None = None  # generate's: ids that end a row, and the first generated column
        self._columns = 0
        self._is_user_defined = False  # the library's own mark of a cache that its caller will see again

    @staticmethod
    def from_state(state: ModelState, *, seen_tokens: int = 0) -> xLSTMCache:
        """A state of ours (`ox.generate`, a file, the server) for `generate(new_ids, past_key_values=...)`."""
        cache = xLSTMCache()
        cache.layers = [StateLayer(block) for block in state.blocks]
        cache.seen_tokens = seen_tokens
        return cache

    def to_state(self) -> ModelState:
        """The state that our own models take and return; it shares its tensors.

        Raises:
            ValueError: nothing was seen yet.
        """
        self._prefetch_all()
        states = tuple(layer.state for layer in self.layers)
        if not states or any(state is None for state in states):
            raise ValueError(
                "this xLSTMCache has seen nothing yet; a model's empty state is model.native().empty_state(batch)"
            )
        return ModelState(states)  # type: ignore[arg-type]

    def states(self, blocks: int) -> list[State | None]:
        """One state per block, None where nothing was seen yet, each on the device of its block.

        Raises:
            ValueError: it holds another number of blocks.
        """
        if not self.layers:
            return [None] * blocks
        if len(self.layers) != blocks:
            raise ValueError(f"this xLSTMCache has {len(self.layers)} blocks, and the model {blocks}: another model's?")
        self._prefetch_all()
        return [layer.state for layer in self.layers]

    def advance(self, states: list[State], columns: int, ids: Tensor | None) -> None:
        """Take what a forward pass returned: the states after `columns` more columns, whose ids are [B, columns]."""
        if not self.layers:
            self.layers = [StateLayer() for _ in states]
        for layer, state in zip(self.layers, states, strict=True):
            layer.put(state)
        if ids is None or torch.compiler.is_compiling() or (self.ids is None and self._columns):
            self.ids = None
        else:
            self.ids = ids if self.ids is None else torch.cat((self.ids, ids.to(self.ids.device)), dim=1)
        self._columns += columns
        self.seen_tokens += columns

    def fork(self) -> xLSTMCache:
        """A second cache that starts where this one is. It copies references, not memory."""
        other = xLSTMCache()
        for layer in self.layers:
            copy = StateLayer(layer.state)
            copy.device = layer.device
            other.layers.append(copy)
        other.seen_tokens, other.ids, other._columns = self.seen_tokens, self.ids, self._columns
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> xLSTMCache:
        return self.fork()

    def detach(self) -> xLSTMCache:
        """A fork without history: where truncated back-propagation through time cuts."""
        return self._mapped(State.detach)

    def to(self, *args: Any, **kwargs: Any) -> xLSTMCache:
        """A fork whose tensors are elsewhere or of another dtype. Below fp32 is for storage: models refuse it."""
        return self._mapped(lambda state: state.to(*args, **kwargs))

    def detach_prefix(self) -> xLSTMCache:
        """A fork that counts from here: what `generate` gets next is new text in full."""
        other = self.fork()
        other.ids, other._columns = None, 0
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(layer.state.nbytes for layer in self.layers if layer.state is not None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the ids at hand that were already read."""
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """As long as the query: no earlier column is looked at again."""
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything was seen."""
        return any(layer.state is not None for layer in self.layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by index, of the states and of the ids."""
        for layer in self.layers:
            layer.reorder_cache(beam_idx)
        if self.ids is not None:
            self.ids = self.ids.index_select(0, beam_idx.to(self.ids.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows by index."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.ids is not None:
            self.ids = self.ids.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        """Nothing seen yet."""
        super().reset()
        self.seen_tokens, self.ids, self._columns = 0, None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: see NOT_SHORTER."""
        raise ValueError(NOT_SHORTER)

    def offload(self, layer_idx: int | None = None, only_non_sliding: bool = True) -> None:
        """Keep one block's state, or all of them, in the host's memory until the next forward pass."""
        for layer in self.layers if layer_idx is None else [self.layers[layer_idx]]:
            layer.offload()

    def prefetch(self, layer_idx: int | None = None, only_non_sliding: bool = True) -> None:
        """Undo `offload`."""
        for layer in self.layers if layer_idx is None else [self.layers[layer_idx]]:
            layer.prefetch()

    def _prefetch_all(self) -> None:
        for layer in self.layers:
            if layer.device is not None:
                layer.prefetch()

    def _mapped(self, function: Any) -> xLSTMCache:
        other = self.fork()
        for layer in other.layers:
            layer.state = None if layer.state is None else function(layer.state)
        return other
