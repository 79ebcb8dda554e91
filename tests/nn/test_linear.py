"""Block-diagonal maps against the sum that defines them."""

import pytest
import torch

from openxlstm.nn.linear import HeadwiseLinear


@pytest.mark.parametrize("T", [3, 30])  # few tokens use the blocks as they are, many use merged ones
@pytest.mark.parametrize(("blocks", "width", "merged"), [(6, 4, 3), (8, 4, 4), (7, 4, 1), (5, 1, 5), (3, 20, 1)])
def test_headwise_is_the_sum_over_each_block(blocks, width, merged, T):
    layer = HeadwiseLinear(blocks, width, bias=True).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    assert layer.merged == merged
    x = torch.randn(2, T, blocks * width, dtype=torch.float64)
    want = torch.einsum("btgd,god->btgo", x.unflatten(-1, (blocks, width)), layer.weight).flatten(-2) + layer.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(layer(x).sin().sum(), (layer.weight, layer.bias))
    torch.testing.assert_close(got, torch.autograd.grad(want.sin().sum(), (layer.weight, layer.bias)))


def test_blocks_do_not_see_each_other():
    layer = HeadwiseLinear(6, 4)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(1, 1, 24)
    y = x.clone()
    y[..., 4:8] += 1
    differs = (layer(x) != layer(y)).squeeze()
    assert differs[4:8].any()
    assert not differs[:4].any()
    assert not differs[8:].any()


def test_empty_time():
    layer = HeadwiseLinear(6, 4)
    torch.nn.init.normal_(layer.weight)
    assert layer(torch.empty(2, 0, 24)).shape == (2, 0, 24)
