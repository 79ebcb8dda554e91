"""Token folders whose every token is its own place: what a batch holds can be read off it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import Shard, TokenFolder

FIRST = 1000  # above every id of the byte tokenizer, whose end id 256 must stay recognisable


def numbered(shards: Sequence[Sequence[int]], *, name: str = "numbered", masked: Sequence[int] = ()) -> TokenFolder:
    """A folder in memory: one shard per list of document lengths, tokens FIRST, FIRST + 1, ... over all shards.

    `masked` tokens, counted from 0, are no targets.
    """
    made, first = [], FIRST
    for number, lengths in enumerate(shards):
        tokens = np.arange(first, first + sum(lengths), dtype=np.uint32)
        loss = ~np.isin(tokens - FIRST, masked) if masked else None
        made.append(Shard(f"{number}.ds", tokens, np.cumsum(lengths), len(tokens), "", loss))
        first += len(tokens)
    byte = Tokenizer.bytes()
    return TokenFolder(Path(name), byte, 256, True, name, tuple(made))


def starts(shards: Sequence[Sequence[int]]) -> set[int]:
    """The first tokens of all documents."""
    lengths = [length for shard in shards for length in shard]
    return set((FIRST + np.cumsum([0, *lengths[:-1]])).tolist())
