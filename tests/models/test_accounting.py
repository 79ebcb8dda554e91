"""Published numbers of parameters, bytes of state and FLOPs: from the config, and from the model itself."""

import dataclasses

import pytest
import torch
from models.small_models import CONFIGS
from torch.utils.flop_counter import FlopCounterMode

from openxlstm.models import accounting, presets, xlstm_large
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig


def make(config):
    return xLSTM(config) if isinstance(config, xLSTMConfig) else xLSTMLarge(config)


VARIANTS = [
    *CONFIGS.values(),
    xLSTMConfig(vocab_size=7, width=80, pattern="sms", heads=2, bias=True, conv=2, proj_block=8),
    xLSTMLargeConfig(vocab_size=7, width=80, blocks=3, heads=5, v_width=60, tie_embeddings=True),
]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_has_its_published_number_of_parameters(name):
    preset = presets.PRESETS[name]
    assert accounting.count_parameters(preset.config) == preset.parameters
    with torch.device("meta"):
        model = make(preset.config)
    assert sum(p.numel() for p in model.parameters()) == preset.parameters
    assert preset.source


@pytest.mark.parametrize("config", VARIANTS)
def test_the_config_knows_what_the_model_holds(config):
    model = make(config)
    assert accounting.count_parameters(config) == sum(p.numel() for p in model.parameters())
    assert accounting.state_bytes(config, 3) == model(torch.zeros(3, 5, dtype=torch.long))[1].nbytes
    parts = accounting.parameters_by_part(config)
    assert parts["embedding"] == config.vocab_size * config.width
    assert parts["head"] == (0 if config.tie_embeddings else config.vocab_size * config.width)


@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [
        ("xlstm-125m", 54.6),
        ("xlstm-125m-7-1", 50.1),
        ("xlstm-1.3b", 771.0),
        ("xlstm-large-1.4b", 48.1),
        ("xlstm-7b", 128.25),
    ],
)
def test_published_bytes_of_state(name, mebibytes):
    assert accounting.state_bytes(presets.PRESETS[name].config) / 2**20 == pytest.approx(mebibytes, abs=0.06)


def test_flops_equal_what_torch_counts_outside_the_cell(monkeypatch):
    config = CONFIGS["xlstm_large"]
    model = xLSTMLarge(config)
    memory = model.empty_state(2).blocks[0]
    monkeypatch.setattr(xlstm_large.kernels, "mlstm", lambda q, k, v, i, f, state, **options: (v, memory))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 5, dtype=torch.long))
    cells = config.blocks * config.heads * (4 * 2 * 4 + 64 * (2 + 4))
    assert accounting.flops_per_token(config, chunk=64) == counter.get_total_flops() / 10 + cells


def test_flops_of_7b_and_of_one_slstm_block():
    """4.0e10 for a training step, of which the cells take 4.4e8; and a block counted by hand."""
    training = 3 * accounting.flops_per_token(presets.PRESETS["xlstm-7b"].config)
    assert training == pytest.approx(4.04e10, rel=1e-3)
    config = xLSTMConfig(vocab_size=5, width=12, heads=3, pattern="s", ffn_width=20, conv=4)
    gates, conv, ffn, recurrent = 4 * 12 * 4, 4 * 12, 3 * 12 * 20, 4 * 12 * 4
    assert accounting.flops_per_token(config) == 2 * (gates + conv + ffn + recurrent + 5 * 12)


def test_a_longer_chunk_costs_the_matrix_memory_only():
    m, s = (xLSTMConfig(vocab_size=5, width=12, heads=3, pattern=p, mlstm_width=24) for p in "ms")
    assert accounting.flops_per_token(m, chunk=65) - accounting.flops_per_token(m, chunk=64) == 3 * (8 + 8)
    assert accounting.flops_per_token(s, chunk=65) == accounting.flops_per_token(s, chunk=64)


def test_presets_are_found_by_name_and_architecture():
    with pytest.raises(ValueError, match=r"no preset 'xlstm-125'; did you mean 'xlstm-125m'\?"):
        xLSTM.from_preset("xlstm-125")
    with pytest.raises(ValueError, match=r"use xLSTMLarge\.from_preset\('xlstm-7b'\)"):
        xLSTM.from_preset("xlstm-7b")
    with torch.device("meta"):
        assert xLSTMLarge.from_preset("xlstm-7b").config is presets.PRESETS["xlstm-7b"].config
        assert xLSTM.from_preset("xlstm-350m-7-1").config.label == "xLSTM[7:1]"


def test_presets_write_every_size_out():
    sizes = ("mlstm_width", "ffn_width", "qk_width", "v_width")
    for name, preset in presets.PRESETS.items():
        for field in dataclasses.fields(preset.config):
            assert field.name not in sizes or getattr(preset.config, field.name) is not None, name
