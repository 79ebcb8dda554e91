"""Texts and a tokenizer small enough to check by hand."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = ("", "a", "def f(x):\n    return x\n", "grüße, 世界 🙂\r\n", "<|endoftext|>", "\x00\x7f\t  \u00a0é")


def bpe_json(*, normalizer: str | None = None, **changes: object) -> str:
    """A byte-level BPE with 30 merges, trained on the spot; `changes` replace top-level keys of its file."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if normalizer == "NFC":
        bpe.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=287, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["return the returned value of the function", "def function(value):"] * 9, trainer)
    bpe.add_tokens(["<tab>"])  # added, but not special: it stands for its own text
    return json.dumps(json.loads(bpe.to_str()) | changes, ensure_ascii=False)
