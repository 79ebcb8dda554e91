"""The step that decoding takes: the definition's bits, and nothing written that came in."""

from __future__ import annotations

import pytest
import torch

from openxlstm import kernels
from openxlstm.cells import mlstm as definition


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 3, 5, 7), (4, 2, 32, 48)])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@torch.no_grad()
def test_a_step_without_gradients_is_the_definition_bit_for_bit(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, eps: float
) -> None:
    B, H, K, V = sizes
    got_state = want_state = None
    for _ in range(6):
        q, k, v = (torch.randn(B, H, width, dtype=dtype) for width in (K, K, V))
        i, f = (torch.randn(B, H) * 6 for _ in range(2))
        want, want_state = definition.step(q, k, v, i, f, want_state, eps=eps)
        before = None if got_state is None else got_state.clone()
        entered = got_state
        got, got_state = kernels.mlstm_step(q, k, v, i, f, got_state, eps=eps, backend="torch")
        assert torch.equal(got, want)
        assert got.dtype == dtype
        for a, b in zip(got_state.tensors(), want_state.tensors(), strict=True):
            assert torch.equal(a, b)
        if before is not None:
            assert all(torch.equal(a, b) for a, b in zip(entered.tensors(), before.tensors(), strict=True))
