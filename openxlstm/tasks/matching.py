"""Equal sizes: architectures are compared at equal numbers of parameters, embedding and head apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from openxlstm.models.accounting import count_parameters

ConfigT = TypeVar("ConfigT")


def non_embedding_parameters(config: Any) -> int:
    """Parameters without embedding and head, which are a matter of the vocabulary."""
    return count_parameters(config) - config.vocab_size * config.width * (1 if config.tie_embeddings else 2)


def match(build: Callable[[int], ConfigT], target: int, sizes: Sequence[int], *, within: float = 0.02) -> ConfigT:
    """The config among `build(size)` whose parameters, embeddings apart, are nearest to `target`.

        match(lambda U: LlamaConfig(vocab_size=257, width=128, blocks=4, heads=4, ffn_width=U),
              non_embedding_parameters(ours), range(64, 1024))

    Args:
        build: a config from a size, of width or feed-forward width; a size that it refuses is left out.
        within: how far off, as a share of the target, is still equal.

    Raises:
        ValueError: no size comes that near, or `build` refuses all of them.
    """
    found: list[tuple[int, int, ConfigT]] = []
    refusal = "there is none"
    for size in sizes:
        try:
            config = build(size)
        except ValueError as error:
            refusal = str(error)
            continue
        found.append((non_embedding_parameters(config), size, config))
    if not found:
        raise ValueError(f"no size to choose from: {refusal}")
    count, size, config = min(found, key=lambda one: abs(one[0] - target))
    if abs(count - target) > within * target:
        raise ValueError(
            f"no size comes within {within:.0%} of {target:,} parameters: the nearest is {size} with {count:,}; give "
            f"more or finer sizes, or match another of them"
        )
    return config
