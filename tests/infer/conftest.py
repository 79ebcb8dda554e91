"""The built-in tokenizer, built once."""

import pytest

from openxlstm.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.bytes()
