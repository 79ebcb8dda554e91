"""What the tests of checkpoint/ share: a small model in each of two formats."""

import pytest
from checkpoint.peers import awake
from safetensors.torch import load_file

from openxlstm.checkpoint.convert import convert, export
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig


@pytest.fixture
def hf(tmp_path):
    """A Hugging Face folder in several shards."""
    model = awake(xLSTMLarge(xLSTMLargeConfig(vocab_size=23, width=24, blocks=2, heads=3, ffn_width=64)))
    export(model, tmp_path / "one", to="hf")
    convert(tmp_path / "one", tmp_path / "hf", to="hf", shard_size=20_000)
    return tmp_path / "hf"


@pytest.fixture
def nx(tmp_path):
    """Tensors of NX-AI's xlstm."""
    model = xLSTM(xLSTMConfig(vocab_size=23, width=12, heads=3, pattern="ms", mlstm_width=24, ffn_width=20))
    export(awake(model), tmp_path / "nx", to="nxai")
    return load_file(tmp_path / "nx" / "model.safetensors")
