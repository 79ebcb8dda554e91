"""attention_mask, cu_seq_lens_q, seq_idx, position_ids: how transformers says what our operations call mask and reset.

B batch, T time (columns of this call), P columns that the state has read.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.utils import logging

from openxlstm.hf.cache import ABSENT, xLSTMCache

logger = logging.get_logger(__name__)

IGNORED = -100  # the label that no loss reads


def read_cache(past_key_values: object, cache_params: object) -> xLSTMCache | None:
    """The one cache given, under either name.

    Raises:
        ValueError: two different ones, or a cache of keys and values.
    """
    if past_key_values is not None and cache_params is not None and past_key_values is not cache_params:
        raise ValueError("past_key_values and cache_params are two names of one argument; pass one of them")
    given = cache_params if past_key_values is None else past_key_values
    if given is not None and not isinstance(given, xLSTMCache):
        raise ValueError(
            f"past_key_values must be an openxlstm.hf.xLSTMCache; got {type(given).__name__}. Start with none and take "
            f"out.past_key_values, or wrap a state of ours with xLSTMCache.from_state(state)"
        )
    return given


def read_mask(attention_mask: Tensor | None, batch: int, time: int) -> Bool[Tensor, "B T"] | None:
    """Which tokens of this call exist: the last T columns of the mask. None: all of them.

    Raises:
        ValueError: a mask of another kind, or one that does not cover this call.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [batch, columns] of ones and zeros; got {list(attention_mask.shape)}. A recurrent "
            f"model has no mask between pairs of tokens; code that makes one should ask model.create_masks_for_generate"
        )
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < time:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} does not cover this call of {batch} x {time} tokens; give a "
            f"column for every token of the call, with or without those that the state has read"
        )
    mask = attention_mask[:, attention_mask.shape[1] - time :].bool()
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None  # the way without a mask is faster; under tracing nobody can look
    return mask


def read_documents(
    cu_seq_lens_q: Tensor | None,
    seq_idx: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    *,
    batch: int,
    time: int,
    continued: bool,
) -> Bool[Tensor, "B T"] | None:
    """Where a new document starts: by `cu_seq_lens_q`, else by `seq_idx`, else by `position_ids`. None: nowhere.

    Position ids count as packing only where they cannot mean anything else: one row of more than one token, no mask, no
    state to continue, and not one rising run. `generate` writes zeros at padding and restarts at 0 on a given state.

    Raises:
        ValueError: offsets that do not cut this row, or packing and padding at once.
    """
    if cu_seq_lens_q is not None:
        return _starts_of_offsets(cu_seq_lens_q, attention_mask, batch, time)
    if seq_idx is not None:
        if tuple(seq_idx.shape) != (batch, time):
            raise ValueError(
                f"seq_idx must be [{batch}, {time}], a document number per token; got {list(seq_idx.shape)}"
            )
        return torch.nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    if position_ids is None or attention_mask is not None or continued or time < 2 or torch.compiler.is_compiling():
        return None
    if position_ids.ndim != 2 or position_ids.shape[-1] != time or bool((position_ids.diff(dim=-1) == 1).all()):
        return None
    if batch > 1:
        logger.warning_once(
            f"position_ids of a batch of {batch} restart, which is read as packing in a batch of 1 only; pass seq_idx "
            f"to separate packed documents, or attention_mask for padding"
        )
        return None
    return position_ids == position_ids.amin(dim=-1, keepdim=True)


def _starts_of_offsets(
    cu_seq_lens: Int[Tensor, "_"], attention_mask: Tensor | None, batch: int, time: int
) -> Bool[Tensor, "B T"]:
    """[0, 3, 7, 9]: documents of 3, 4 and 2 tokens. An empty document has no start."""
    if batch != 1:
        raise ValueError(
            f"cu_seq_lens_q cuts one row into documents; this call has {batch} rows. Use seq_idx for several"
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "cu_seq_lens_q (packing) and an attention_mask with zeros (padding) contradict: leave the padding out, or "
            "make it a document of its own"
        )
    if not torch.compiler.is_compiling():
        ends = cu_seq_lens[0].item(), cu_seq_lens[-1].item()
        if ends != (0, time) or bool((cu_seq_lens.diff() < 0).any()):
            raise ValueError(
                f"cu_seq_lens_q must rise from 0 to the {time} tokens of the row; got {cu_seq_lens.tolist()[:8]} and "
                f"so on, ending in {ends[1]}"
            )
    starts = torch.zeros(time + 1, dtype=torch.bool, device=cu_seq_lens.device)
    starts = starts.index_fill(0, cu_seq_lens[:-1].long(), True)  # an empty last document starts at T, which is cut off
    return starts[None, :time]


def read_labels(
    labels: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None, reset: Bool[Tensor, "B T"] | None
) -> Int[Tensor, "B T"]:
    """Labels without those that nothing predicts: the first token of a document, and one behind a token that is not."""
    if mask is not None:
        exists_before = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=True)
        labels = labels.masked_fill(~(mask & exists_before).to(labels.device), IGNORED)
    if reset is not None:
        labels = labels.masked_fill(reset.to(labels.device), IGNORED)
    return labels


def recorded(ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None) -> Int[Tensor, "B T"]:
    """The ids as a cache remembers them."""
    return ids if mask is None else torch.where(mask, ids, ABSENT)


def check_embeds(embeds: Float[Tensor, "B T D"], width: int) -> None:
    """Hidden states of the model's width.

    Raises:
        ValueError: another shape.
    """
    if embeds.ndim != 3 or embeds.shape[-1] != width:
        raise ValueError(f"inputs_embeds must be [batch, time, {width}]; got {list(embeds.shape)}")
