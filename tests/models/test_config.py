"""Configs: every field acts or raises, sizes have rules, and a refusal names value, rule and nearest fix."""

import dataclasses

import pytest
import torch

from openxlstm.models.xlstm import xLSTM, xLSTMConfig, xLSTMStack, xLSTMStackConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig

A = xLSTMConfig(vocab_size=23, width=24, heads=3, pattern="ms", mlstm_width=48, ffn_width=40)
B = xLSTMLargeConfig(vocab_size=23, width=24, heads=3, blocks=2, qk_width=12, v_width=24, ffn_width=40)

CHANGED = {
    xLSTMConfig: {
        "vocab_size": 24, "width": 48, "pattern": "sm", "heads": 4, "mlstm_width": 60, "ffn_width": 44, "conv": 3,
        "proj_block": 2, "bias": True, "dropout": 0.5, "recurrent_init": "uniform", "input_gate": "sigmoid",
        "forget_gate": "exp", "norm_eps": 1e-2, "eps": 1e-1, "tie_embeddings": True,
    },
    xLSTMLargeConfig: {
        "vocab_size": 24, "width": 48, "blocks": 3, "heads": 4, "qk_width": 24, "v_width": 48, "ffn_width": 44,
        "gate_soft_cap": 2.0, "logit_soft_cap": 0.1, "input_gate": "sigmoid", "forget_gate": "exp",
        "tie_embeddings": True, "norm_eps": 1e-2, "eps": 1e-1,
    },
}  # fmt: skip


def fingerprint(config):
    """Names, shapes and logits of the model that a config describes, from one seed."""
    torch.manual_seed(0)
    model = (xLSTM if isinstance(config, xLSTMConfig) else xLSTMLarge)(config).double()
    logits, _ = model(torch.arange(20)[None])
    return {name: t.shape for name, t in model.state_dict().items()}, logits.tolist()


@pytest.mark.parametrize(
    ("config", "field"),
    [(c, f.name) for c in (A, B) for f in dataclasses.fields(c)],
    ids=lambda v: getattr(v, "label", v),
)
def test_every_field_acts_or_raises(config, field):
    value = CHANGED[type(config)][field]
    assert value != getattr(config, field)
    if field == "forget_gate":
        with pytest.raises(ValueError, match="forget_gate='exp' needs eps=0"):
            dataclasses.replace(config, forget_gate=value)
        config = dataclasses.replace(config, eps=0.0)
    changed = dataclasses.replace(config, **{field: value})
    assert fingerprint(changed) != fingerprint(config)
    assert changed != config


@pytest.mark.parametrize("pattern", ["m", "s"])
def test_the_forget_gate_is_that_of_both_cells(pattern):
    config = dataclasses.replace(A, pattern=pattern, eps=0.0)
    assert fingerprint(dataclasses.replace(config, forget_gate="exp")) != fingerprint(config)


@pytest.mark.parametrize("config", [A, B], ids=["xlstm", "xlstm_large"])
def test_what_a_config_says_can_be_read_back(config):
    data = config.to_dict()
    assert type(config).from_dict(data) == config
    assert set(data) == {f.name for f in dataclasses.fields(config)}


def test_sizes_left_to_their_rule_equal_the_numbers_and_follow_the_width():
    short = xLSTMConfig(vocab_size=23, width=768, pattern="ms")
    full = dataclasses.replace(short, mlstm_width=1536, ffn_width=1024)
    assert short == full
    assert hash(short) == hash(full)
    assert dataclasses.replace(short, width=1024).to_dict()["mlstm_width"] == 2048
    assert short != xLSTMConfig(vocab_size=24, width=768, pattern="ms")


@pytest.mark.parametrize(
    ("width", "U_m", "U_f"), [(48, 128, 64), (80, 192, 128), (96, 192, 128), (768, 1536, 1024), (1024, 2048, 1344)]
)
def test_inner_widths_of_the_first_architecture(width, U_m, U_f):
    config = xLSTMStackConfig(width=width, pattern="ms")
    assert (config.U_m, config.U_f) == (U_m, U_f)


@pytest.mark.parametrize(
    ("width", "U_f"), [(768, 2112), (1024, 2752), (1536, 4160), (2048, 5504), (2560, 6848), (4096, 10_944)]
)
def test_the_feed_forward_of_the_large_one_is_a_true_ceiling(width, U_f):
    assert xLSTMLargeConfig(vocab_size=1, width=width, blocks=1, heads=2).U_f == U_f


@pytest.mark.parametrize(
    ("pattern", "label"),
    [
        ("mmmsmmmm", "xLSTM[7:1]"),
        ("m", "xLSTM[1:0]"),
        ("ss", "xLSTM[0:1]"),
        ("msms", "xLSTM[1:1]"),
        ("mm", "xLSTM[1:0]"),
    ],
)
def test_the_ratio_is_derived_from_the_letters(pattern, label):
    assert xLSTMStackConfig(width=16, pattern=pattern).label == label


@pytest.mark.parametrize("width", [48, 80, 96])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("conv", [0, 1, 4])
def test_awkward_sizes_work(width, heads, conv):
    stack = xLSTMStack(xLSTMStackConfig(width=width, heads=heads, pattern="ms", conv=conv))
    y, state = stack(torch.randn(2, 5, width))
    y.sum().backward()
    assert y.isfinite().all()
    stack(torch.randn(2, 1, width), state)
    model = xLSTMLarge(xLSTMLargeConfig(vocab_size=9, width=width, blocks=1, heads=heads))
    assert model(torch.zeros(1, 3, dtype=torch.long))[0].isfinite().all()


def test_query_heads_of_width_one_work():
    model = xLSTMLarge(xLSTMLargeConfig(vocab_size=9, width=8, blocks=1, heads=4))
    logits, state = model(torch.zeros(1, 3, dtype=torch.long))
    assert state.blocks[0].C.shape == (1, 4, 1, 2)
    assert logits.isfinite().all()


SIZES = {"vocab_size": 23, "width": 24}
LARGE = SIZES | {"blocks": 2, "heads": 3}


@pytest.mark.parametrize(
    ("config", "fields", "sentence"),
    [
        (xLSTMConfig, {"pattern": "s", "heads": 5}, "width=24 must be a multiple of heads=5; nearest below is 20"),
        (xLSTMConfig, {"pattern": "s", "heads": 48}, "width=24 must be a multiple of heads=48; the smallest is 48"),
        (
            xLSTMConfig,
            {"pattern": "m", "heads": 5},
            "must be a multiple of heads=5 and of proj_block=4; nearest below is 60",
        ),
        (
            xLSTMConfig,
            {"pattern": "m", "proj_block": 3},
            "mlstm_width=64 must be a multiple of heads=4 and of proj_block=3; nearest below is 60",
        ),
        (xLSTMConfig, {"pattern": "s", "heads": 24}, "heads=24 leaves heads of width 1 for width=24"),
        (xLSTMConfig, {"pattern": "mxs"}, "pattern='mxs' must name one block per letter"),
        (xLSTMConfig, {"pattern": ""}, "pattern='' must name one block per letter"),
        (xLSTMConfig, {"pattern": "m", "conv": -1}, "conv=-1 must be a number of taps"),
        (xLSTMConfig, {"pattern": "m", "dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        (
            xLSTMConfig,
            {"pattern": "m", "recurrent_init": "normal"},
            "recurrent_init='normal' must be one of zeros, uniform",
        ),
        (xLSTMConfig, {"pattern": "m", "input_gate": "sigmod"}, "did you mean 'sigmoid'?"),
        (xLSTMConfig, {"pattern": "m", "forget_gate": "exp"}, "forget_gate='exp' needs eps=0"),
        (xLSTMConfig, {"pattern": "m", "eps": -1.0}, "eps=-1.0 must be at least 0 and finite"),
        (xLSTMConfig, {"pattern": "m", "norm_eps": 0.0}, "norm_eps=0.0 must be positive"),
        (xLSTMConfig, {"pattern": "m", "vocab_size": 0}, "vocab_size=0 must be at least 1"),
        (
            xLSTMLargeConfig,
            LARGE | {"width": 4096, "heads": 23},
            "width=4096 must be a multiple of heads=23; nearest below is 4094",
        ),
        (xLSTMLargeConfig, LARGE | {"v_width": 25}, "v_width=25 must be a multiple of heads=3; nearest below is 24"),
        (xLSTMLargeConfig, LARGE | {"qk_width": 13}, "qk_width=13 must be a multiple of heads=3; nearest below is 12"),
        (xLSTMLargeConfig, LARGE | {"v_width": 3}, "use at most heads=1"),
        (xLSTMLargeConfig, LARGE | {"blocks": 0}, "blocks=0 must be at least 1"),
        (xLSTMLargeConfig, LARGE | {"gate_soft_cap": 0.0}, "gate_soft_cap=0.0 must be positive"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(config, fields, sentence):
    with pytest.raises(ValueError) as error:
        config(**SIZES | fields)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"widht": 3}, "xLSTMConfig has no field 'widht'; did you mean 'width'?"),
        ({"zzz": 3}, "xLSTMConfig has no field 'zzz'"),
        ({"vocab_size": 3, "width": 8}, "lacks pattern"),
        ({"vocab_size": "3"}, "vocab_size must be int; got '3'"),
        ({"vocab_size": True}, "vocab_size must be int; got True"),
        ({"vocab_size": 3.0}, "vocab_size must be int; got 3.0"),
        ({"mlstm_width": "wide"}, "mlstm_width must be int | None; got 'wide'"),
        ({"bias": 1}, "bias must be bool; got 1"),
    ],
)
def test_a_dict_is_read_strictly(data, sentence):
    with pytest.raises(ValueError) as error:
        xLSTMConfig.from_dict(data)
    assert sentence in str(error.value)


def test_an_integer_is_a_good_float():
    assert xLSTMConfig.from_dict({"vocab_size": 3, "width": 8, "pattern": "m", "dropout": 0}).dropout == 0
