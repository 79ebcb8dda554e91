"""What the tests of data/ share."""

import pytest
from tiny_texts import bpe_json

from openxlstm.data.corpus import Document
from openxlstm.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return Tokenizer.from_json(bpe_json())


@pytest.fixture(scope="session")
def byte() -> Tokenizer:
    return Tokenizer.bytes()


@pytest.fixture
def documents() -> list[Document]:
    """Eight documents whose lengths and letters differ; one mentions the end token, one is a single character."""
    texts = [
        "one\n",
        "zwei é\n",
        "x",
        "<|endoftext|> in text\n",
        "five " * 7,
        "six\n\n",
        "7" * 40,
        "the returned value",
    ]
    return [Document(f"{number}.txt", text) for number, text in enumerate(texts)]
