"""A tokenizer of one's own: byte-level BPE, as GPT-2's, with every byte in its alphabet, so that nothing is unknown.

The text is cut into words by GPT-2's pattern; then the pair of neighbours that occurs most often becomes a token, again
and again (Sennrich, Haddow, Birch 2016, arXiv:1508.07909; Radford et al. 2019 for bytes). The same texts in the same
order give the same file with the same version of `tokenizers`; between versions nobody promises it, so keep the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from openxlstm.data.corpus import split_of
from openxlstm.data.records import Document
from openxlstm.data.tokenizer import END_OF_TEXT, Tokenizer

LEAST = 257  # the bytes and the end token


def train_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A tokenizer of at most `vocabulary` ids; fewer, if no pair is left that occurs twice.

    Raises:
        ValueError: the vocabulary has no room for the bytes, or there is no text.
    """
    if vocabulary < LEAST:
        raise ValueError(f"vocabulary={vocabulary} must be at least {LEAST}: 256 bytes and {END_OF_TEXT}")
    byte_level = tokenizers.Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = _Counted(texts)
    byte_level.train_from_iterator(iter(seen), trainer)
    if not seen.count:
        raise ValueError("there is no text to train a tokenizer on")
    return Tokenizer(byte_level.to_str(), f"the tokenizer trained on {seen.count:,} texts")


def for_training(documents: Iterable[Document]) -> Iterator[str]:
    """Texts that are training data in any usual split (the first 90 %): the tokenizer should not know the others."""
    return (document.text for document in documents if split_of(document.name) == "train")


class _Counted:
    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.count = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.count += 1
            yield text
