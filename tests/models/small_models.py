"""Small models with every mechanism awake, for every test of the contract.

The papers' initialisation starts gates and recurrence at zero, where half of the mistakes are invisible; here every
parameter is random. Widths are pairwise distinct where the architecture allows it.
"""

import torch

from openxlstm.models.xlstm import xLSTM, xLSTMConfig, xLSTMStack, xLSTMStackConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig

W = 23
STACK = {"width": 12, "heads": 3, "pattern": "msm", "mlstm_width": 24, "ffn_width": 20, "conv": 4}
CONFIGS = {
    "xlstm": xLSTMConfig(vocab_size=W, **STACK),
    "xlstm_no_conv": xLSTMConfig(vocab_size=W, **STACK | {"conv": 0, "bias": True, "tie_embeddings": True}),
    "xlstm_sigmoid": xLSTMConfig(vocab_size=W, **STACK | {"conv": 1, "input_gate": "sigmoid"}),
    "xlstm_exp_forget": xLSTMConfig(vocab_size=W, **STACK | {"conv": 2, "forget_gate": "exp", "eps": 0.0}),
    "xlstm_large": xLSTMLargeConfig(vocab_size=W, width=12, blocks=2, heads=3, qk_width=6, ffn_width=20),
    "xlstm_large_sigmoid": xLSTMLargeConfig(
        vocab_size=W, width=12, blocks=2, heads=3, v_width=15, input_gate="sigmoid_normalized", tie_embeddings=True
    ),
}
KINDS = list(CONFIGS)


def awake(model):
    """Every parameter random, around what the table gives."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.3
    return model


def build(kind, dtype=torch.float64):
    config = CONFIGS[kind]
    return awake((xLSTM if isinstance(config, xLSTMConfig) else xLSTMLarge)(config)).to(dtype)


def build_stack(dtype=torch.float64):
    return awake(xLSTMStack(xLSTMStackConfig(**STACK))).to(dtype)


def tokens(*shape):
    return torch.randint(0, W, shape)


def assert_same_memory(got, want, rows=slice(None), tolerance=1e-10):
    """Equal states, by name."""
    for (name, a), (_, b) in zip(got.named_tensors(), want.named_tensors(), strict=True):
        torch.testing.assert_close(
            a[rows], b[rows], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
