"""Parameters, FLOPs and bytes of state, from a config alone: nothing is built.

D model width, H heads, K, V head widths, U_m, U_f inner widths, J taps, P width of blocks of q, k, v,
L chunk length, W vocabulary.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from openxlstm.models.xlstm import xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLargeConfig


@runtime_checkable
class Counted(Protocol):
    """The config of an architecture that is not of this library, for comparison: it counts itself."""

    def count_parameters(self) -> int: ...

    def flops_per_token(self) -> int: ...

    def state_bytes(self) -> int: ...


Own = xLSTMConfig | xLSTMLargeConfig
Config = Own | Counted


def count_parameters(config: Config) -> int:
    """Every number that training can change; a tied head counts once."""
    if isinstance(config, Counted):
        return config.count_parameters()
    return sum(parameters_by_part(config).values())


def parameters_by_part(config: Own) -> dict[str, int]:
    """Numbers of parameters: embedding, all blocks of a kind, the last norm, head."""
    W, D = config.vocab_size, config.width
    ends = {"final norm": D, "head": 0 if config.tie_embeddings else W * D}
    if isinstance(config, xLSTMLargeConfig):
        return {"embedding": W * D, "mLSTM blocks": config.blocks * _large_block(config), **ends}
    mlstm = config.pattern.count("m") * _mlstm_block(config)
    slstm = config.pattern.count("s") * _slstm_block(config)
    return {"embedding": W * D, "mLSTM blocks": mlstm, "sLSTM blocks": slstm, **ends}


def flops_per_token(config: Config, *, chunk: int = 64) -> int:
    """Floating-point operations of a forward pass, per token; training takes three times as many.

    2 per weight of every matrix and convolution (the head is one, the embedding is not), and the cells:
    mLSTM H (4 K V + L (K + V)), writing and reading the state and the causal half of a chunk of length L;
    sLSTM 8 D K, the recurrent matrix. Elementwise work is left out.
    """
    if isinstance(config, Counted):
        return config.flops_per_token()
    W, D = config.vocab_size, config.width
    if isinstance(config, xLSTMLargeConfig):
        weights = _large_block(config) - 2 * D - config.HV - 2 * config.heads
        K, V = config.QK // config.heads, config.HV // config.heads
        return 2 * W * D + config.blocks * (2 * weights + _mlstm_cell(config.heads, K, V, chunk))
    U, H, J = config.U_m, config.heads, config.conv
    K, P = U // H, config.proj_block
    mlstm = 2 * (3 * U * D + 3 * U * P + J * U + 6 * H * U) + _mlstm_cell(H, K, K, chunk)
    K = D // H
    slstm = 2 * (4 * D * K + J * D + 3 * D * config.U_f) + 8 * D * K
    return 2 * W * D + config.pattern.count("m") * mlstm + config.pattern.count("s") * slstm


def state_bytes(config: Config, batch: int = 1) -> int:
    """Bytes that `batch` sequences keep between calls, in fp32: the same after one token and after a million."""
    if isinstance(config, Counted):
        return batch * config.state_bytes()
    H = config.heads
    if isinstance(config, xLSTMLargeConfig):
        K, V = config.QK // H, config.HV // H
        return 4 * batch * config.blocks * H * (K * V + K + 1)
    tail, K = max(config.conv - 1, 0), config.U_m // H
    mlstm = H * (K * K + K + 1) + tail * config.U_m
    slstm = 4 * config.width + tail * config.width
    return 4 * batch * (config.pattern.count("m") * mlstm + config.pattern.count("s") * slstm)


def _mlstm_cell(H: int, K: int, V: int, L: int) -> int:
    return H * (4 * K * V + L * (K + V))


def _conv(config: xLSTMConfig, width: int) -> int:
    """Weight and bias."""
    return width * (config.conv + 1) if config.conv else 0


def _mlstm_block(config: xLSTMConfig) -> int:
    D, U, H, P = config.width, config.U_m, config.heads, config.proj_block
    matrices = 3 * U * D + 3 * U * P + 2 * H * 3 * U
    biases = 2 * H + (2 * U + 3 * U + D if config.bias else 0)
    return matrices + biases + _conv(config, U) + D + 2 * U  # norm; head norm and skip


def _slstm_block(config: xLSTMConfig) -> int:
    D, K, U = config.width, config.width // config.heads, config.U_f
    matrices = 4 * D * K + 4 * D * K + 3 * D * U  # gates, R, feed-forward
    biases = 4 * D + (2 * U + D if config.bias else 0)
    return matrices + biases + _conv(config, D) + 3 * D  # two norms and the head norm


def _large_block(config: xLSTMLargeConfig) -> int:
    D, H, QK, HV, U = config.width, config.heads, config.QK, config.HV, config.U_f
    matrices = 2 * QK * D + 3 * HV * D + 2 * H * D + 3 * U * D  # q, k; v, o, out; gates; feed-forward
    return matrices + 2 * H + 2 * D + HV  # gate biases; two norms; head norm
