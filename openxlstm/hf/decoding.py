"""Decoding with a Llama as transformers does it: keys and values of all that was read, in its default cache.

B batch, W vocabulary.
"""

from __future__ import annotations

import copy
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from openxlstm.hf.baselines import Llama


@final
class CachedLlama:
    """A token at a time, behind the `step` of our decoders, so that both are timed by the same lines.

    Args:
        cache: what was read before; it becomes the decoder's own, and grows.
    """

    def __init__(self, model: Llama, cache: DynamicCache | None = None) -> None:
        self._model, self._network = model, model.network.eval()
        self._cache = DynamicCache(config=model.network.config) if cache is None else cache

    def fork(self) -> CachedLlama:
        """Another that has read the same; neither feels what the other reads from here on."""
        return CachedLlama(self._model, copy.deepcopy(self._cache))

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B W"]:
        """Scores of the token after these, in fp32."""
        out = self._network(input_ids=tokens[:, None], past_key_values=self._cache, use_cache=True)
        return out.logits[:, -1].float()

    @property
    def nbytes(self) -> int:
        """Of the keys and values that are kept."""
        kept = [part for layer in self._cache.layers if isinstance(layer, CacheLayerMixin)
                for part in (layer.keys, layer.values) if part is not None]  # fmt: skip
        return sum(part.nbytes for part in kept)
