"""Text to token ids and back, with one format for every tokenizer: the `tokenizer.json` of Hugging Face `tokenizers`.

The identity of a tokenizer is the sha256 of that file. It travels with token folders, checkpoints and exports, and a
mismatch is refused, never warned about.

Four settings of a `tokenizer.json` would change data behind the reader's back. Here
  special tokens in a text stay text: a document that mentions `<|endoftext|>` does not end there
    (`encode_special_tokens`, which the file cannot store);
  nothing is truncated or padded, whatever the file asks for;
  the post-processor is not used: a document is its tokens, and who wants an end token appends `end_id`;
  BPE dropout, which encodes one text differently each time, is refused.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import tokenizers
from jaxtyping import Int64

END_OF_TEXT = "<|endoftext|>"
END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")  # the first one a vocabulary has ends documents


@final
class Tokenizer:
    """A tokenizer.json at work. Attributes:

    json        the file's text, unchanged
    sha256      its identity
    vocab_size  W: the largest id + 1, special tokens included
    end_id      the token that ends every document, or None if the vocabulary has none of END_TOKENS
    byte_level  whether every token stands for known bytes, so that bits per byte are exact and decoding is lossless
    """

    def __init__(self, text: str, origin: str = "tokenizer.json") -> None:
        """`text` is the content of a tokenizer.json; `origin` is what errors call it."""
        data = _parse(text, origin)
        try:
            self._inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{origin} is not a tokenizer.json that tokenizers can read: {error}") from None
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()

        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{origin} has an empty vocabulary")
        self.json = text
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_id = next((vocabulary[name] for name in END_TOKENS if name in vocabulary), None)
        self._origin = origin
        self._bytes = _bytes_of_tokens(data, vocabulary, self.vocab_size)
        self.byte_level = self._bytes is not None
        self._is_plain_bytes = self.sha256 == _BYTES_SHA256

    @classmethod
    def bytes(cls) -> Tokenizer:
        """The built-in byte tokenizer: id = byte value, and 256 ends a document. The same file on every machine."""
        return cls(_BYTES_JSON, "the built-in byte tokenizer")

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """From the content of a tokenizer.json."""
        return cls(text)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From a tokenizer.json, or from a folder that holds one."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"there is no tokenizer at {path}; give a tokenizer.json, or a folder that holds one")
        try:
            return cls(path.read_bytes().decode(), str(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text, so not a tokenizer.json ({error})") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the very bytes whose sha256 this tokenizer carries."""
        Path(path).write_bytes(self.json.encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any start or end token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, in parallel where the library can."""
        for index, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text {index} cannot be written as UTF-8, so it has no tokens: {error}") from None
        if self._is_plain_bytes:  # the ids that the library gives as well, without its work
            return [list(text.encode()) for text in texts]
        return [one.ids for one in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids, special tokens left out. Bytes that are not UTF-8 (half a character) become U+FFFD."""
        if self.byte_level:
            return self.decode_bytes(ids).decode(errors="replace")
        return self._inner.decode(self._checked(ids), skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> builtins.bytes:
        """The exact bytes that token ids stand for, special tokens left out. Needs a byte-level tokenizer."""
        table = self._table("decode_bytes")
        return b"".join([table[token] for token in self._checked(ids)])

    @property
    def bytes_of(self) -> Int64[np.ndarray, "W"]:
        """UTF-8 bytes per token id, 0 for special tokens: the denominator of bits per byte. Byte-level only."""
        return np.array([len(token) for token in self._table("bytes_of")], dtype=np.int64)

    def __repr__(self) -> str:
        return f"Tokenizer({self._origin}, W={self.vocab_size}, sha256={self.sha256[:12]})"

    def _table(self, asked: str) -> list[builtins.bytes]:
        if self._bytes is None:
            raise ValueError(
                f"{asked} needs a byte-level tokenizer (GPT-2, GPT-NeoX, Llama 3 and the built-in one are); "
                f"{self._origin} is not, so what one token stands for depends on its neighbours: use decode"
            )
        return self._bytes

    def _checked(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """The ids as a list; the library would drop an unknown id in silence."""
        array = np.asarray(ids, dtype=np.int64)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token id {outside[0]} is not in the vocabulary of {self._origin}, 0..{self.vocab_size - 1}"
            )
        return array.tolist()


def _parse(text: str, origin: str) -> dict[str, Any]:
    """The file as a dictionary, refused where the library would say nothing useful or nothing at all."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin} is not JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise ValueError(f"{origin} is not a tokenizer.json: it has no table 'model'")
    if data["model"].get("dropout"):
        raise ValueError(
            f"{origin} sets dropout={data['model']['dropout']}, which encodes the same text differently each time; "
            "set model.dropout to null"
        )
    return data


def _bytes_of_tokens(data: dict[str, Any], vocabulary: dict[str, int], W: int) -> list[bytes] | None:
    """The bytes behind every id, b"" for special tokens and for gaps; None if the tokenizer is not byte-level."""
    if "ByteLevel" not in _kinds(data.get("pre_tokenizer")) or _kinds(data.get("decoder")) != {"ByteLevel"}:
        return None
    added = {token["content"]: bool(token.get("special")) for token in data.get("added_tokens") or ()}
    table = [b""] * W
    for token, index in vocabulary.items():
        if token in added:  # stored as it reads, not in the byte alphabet
            table[index] = b"" if added[token] else token.encode()
        elif all(char in _BYTE_OF_CHAR for char in token):
            table[index] = bytes(_BYTE_OF_CHAR[char] for char in token)
        else:
            return None
    return table


def _kinds(part: dict[str, Any] | None) -> set[str]:
    """The types of a component of the file, which may be a sequence of components."""
    if part is None:
        return set()
    inner = part.get("pretokenizers") or part.get("decoders")
    return set().union(*(_kinds(each) for each in inner)) if inner else {part["type"]}


def _byte_alphabet() -> list[str]:
    """One visible character per byte value, as in GPT-2: Latin-1 where it prints, else 256, 257, ... in turn."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = iter(range(256, 512))
    return [chr(byte if byte in printable else next(unprintable)) for byte in range(256)]


def _bytes_json() -> str:
    """The tokenizer.json of the byte tokenizer: a BPE model with 256 entries and not one merge."""
    alphabet = _byte_alphabet()
    end = {"id": 256, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end | {"normalized": False, "special": True}],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": model | {"vocab": {char: byte for byte, char in enumerate(alphabet)}, "merges": []},
        },
        ensure_ascii=False,
        indent=1,
    )


_BYTE_OF_CHAR = {char: byte for byte, char in enumerate(_byte_alphabet())}
_BYTES_JSON = _bytes_json()
_BYTES_SHA256 = hashlib.sha256(_BYTES_JSON.encode()).hexdigest()
