"""The norms against their formulas, in fp64, and their reductions in bf16."""

import torch

from openxlstm.nn.norm import HeadNorm, LayerNorm, RMSNorm

x = torch.randn(2, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3


def randomised(norm):
    torch.nn.init.normal_(norm.weight)
    return norm.double()


def test_layer_norm():
    norm = randomised(LayerNorm(12, 1e-5))
    variance = x.var(-1, correction=0, keepdim=True)
    torch.testing.assert_close(norm(x), (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * norm.weight)


def test_rms_norm():
    norm = randomised(RMSNorm(12, 1e-6))
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight)


def test_head_norm_sees_one_head_at_a_time():
    norm = randomised(HeadNorm(4, 3, 1e-6))
    alone = torch.cat([torch.nn.functional.layer_norm(h, (3,), eps=1e-6) for h in x.split(3, -1)], -1)
    torch.testing.assert_close(norm(x.unflatten(-1, (4, 3))), alone * norm.weight)


def test_reductions_are_fp32_and_the_dtype_stays():
    """A mean of bf16 numbers near 256 taken in bf16 would be off by a whole unit."""
    y = (torch.arange(64.0) % 7 + 256).bfloat16()[None, None]
    for norm in (LayerNorm(64), RMSNorm(64)):
        got, want = norm.bfloat16()(y), norm.double()(y.double())
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=2**-7)
