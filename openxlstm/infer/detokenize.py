"""Token ids to text, one token at a time, in constant time per token.

Two small machines in a row. `Characters` turns the bytes of tokens into whole characters: a character that is spread
over several tokens appears with its last byte. `StopStrings` lets text pass until a stop string is complete, and
holds back only what may still become one. What they emit never changes afterwards, and does not depend on how the
text was cut into tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from openxlstm.data.tokenizer import Tokenizer


class Characters:
    """Whole characters from token ids. Bytes that can no longer become a character turn into U+FFFD at once.

    Raises:
        ValueError: a tokenizer whose tokens are no fixed bytes; its text is only known when all of it is there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start with nothing pending."""
        if not tokenizer.byte_level:
            raise ValueError(f"text appears token by token only from a byte-level tokenizer, and {tokenizer!r} is none")
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this token completes: none, one or many. At most three bytes stay pending."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """The text ends here: a pending half character is broken for good, and becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Text up to the stop string that is completed first, the longest one if several end together.

    Raises:
        ValueError: an empty stop string, which every text contains.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """With no stop strings everything passes at once."""
        if "" in stops:
            raise ValueError("stop contains an empty string, which would end every text at once; leave it out")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What may be shown of the text so far and was not shown yet; nothing after a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        hits = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if hits:
            end, _, self.found = min(hits)
            self._held = ""
            return text[: end - len(self.found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text ends here: what was held back did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, `stop` itself excluded."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
