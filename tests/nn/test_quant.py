"""Quantised matrices: the gguf library's numbers to the bit, and products equal to those of the dequantised matrix."""

import copy

import pytest
import torch

pytest.importorskip("gguf")
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize as oracle
from gguf.quants import quantize

from openxlstm.kernels import quantized
from openxlstm.kernels.quantized import KINDS, bytes_per_row, can_pack, dequantize, pack, quantized_linear, unpack
from openxlstm.nn.quant import QuantEmbedding, QuantLinear, project

TYPES = {kind: GGMLQuantizationType[kind.upper()] for kind in KINDS}


def stored(kind, rows, features, scale=1.0, seed=0):
    """A matrix as the library writes it, and as the library reads it."""
    wide = np.random.default_rng(seed).standard_normal((rows, features), dtype=np.float32) * scale
    with np.errstate(over="ignore"):  # a scale that fp16 cannot hold is infinite on both sides
        blocks = quantize(wide, TYPES[kind]) if kind != "f32" else wide.view(np.uint8)
    want = oracle(blocks, TYPES[kind]) if kind != "f32" else wide
    return torch.from_numpy(blocks.copy()), torch.from_numpy(want.copy())


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.parametrize("scale", [1.0, 1e-7, 3e4, 0.0])  # 1e-7: scales are subnormal in fp16
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_gguf_library_to_the_bit(kind, scale):
    blocks, want = stored(kind, 7, 96, scale)
    assert blocks.shape == (7, bytes_per_row(kind, 96))
    assert same_bits(dequantize(blocks, kind, 96), want)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "f32"])
def test_any_bytes_are_read_as_the_library_reads_them(kind):
    """Scales that are infinite or NaN, and nibbles of every value."""
    noise = np.random.default_rng(1).integers(0, 256, (64, bytes_per_row(kind, 128)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        want = torch.from_numpy(oracle(noise, TYPES[kind]).copy())
    got = dequantize(torch.from_numpy(noise), kind, 128)
    assert torch.equal(got.isnan(), want.isnan())
    assert same_bits(got.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_1"])
def test_bytes_may_lie_anywhere(kind):
    """A row at an odd address, and rows with gaps between them."""
    blocks, want = stored(kind, 5, 64)
    odd = torch.zeros(blocks.numel() + 1, dtype=torch.uint8)
    odd[1:] = blocks.flatten()
    assert same_bits(dequantize(odd[1:].view_as(blocks), kind, 64), want)
    gaps = torch.zeros(5, blocks.shape[1] + 3, dtype=torch.uint8)
    gaps[:, 3:] = blocks
    assert same_bits(dequantize(gaps[:, 3:], kind, 64), want)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (3, 5, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_that_of_the_dequantised_matrix(kind, shape, monkeypatch):
    monkeypatch.setattr(quantized, "PART", 3 * 64)  # 7 rows of weights, three at a time
    blocks, want = stored(kind, 7, 64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = quantized_linear(x, blocks, kind, 64)
    expected = x @ want.double().T
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy @ want.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_has_the_dtype_of_x(dtype):
    blocks, want = stored("q4_0", 6, 64)
    x = torch.randn(3, 64).to(dtype)
    y = quantized_linear(x, blocks, "q4_0", 64)
    assert y.dtype == dtype
    torch.testing.assert_close(y, x @ want.to(dtype).T)


def filled(module, kind, rows, features):
    blocks, want = stored(kind, rows, features)
    module.blocks.copy_(blocks)
    return module, want


@pytest.mark.parametrize("kind", KINDS)
def test_modules(kind):
    linear, want = filled(QuantLinear(64, 7, kind, bias=True), kind, 7, 64)
    torch.nn.init.normal_(linear.bias)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(linear(x), x @ want.T + linear.bias)
    assert same_bits(linear.weight, want)
    torch.testing.assert_close(project(x, linear), x @ want.T)
    words, want = filled(QuantEmbedding(11, 32, kind), kind, 11, 32)
    tokens = torch.tensor([[0, 10], [3, 3]])
    assert same_bits(words(tokens), want[tokens])
    torch.testing.assert_close(project(x[..., :32], words), x[..., :32] @ want.T)
    with pytest.raises(IndexError):
        words(torch.tensor([11]))
    assert kind in repr(linear)
    assert kind in repr(words)


def test_a_quantised_matrix_computes_and_does_not_learn():
    model = torch.nn.Sequential(QuantEmbedding(9, 32, "q8_0"), QuantLinear(32, 3, "q4_0", bias=True))
    assert not model[0].training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.eval()[1].blocks.dtype == torch.uint8
    with pytest.raises(ValueError, match=r"q8_0 of a GGUF file cannot be trained; load the file with dtype="):
        model.train()
    with pytest.raises(ValueError, match=r"q4_0 of a GGUF file cannot be trained"):
        model[1].train()
    assert model.to(torch.bfloat16)[1].blocks.dtype == torch.uint8
    assert torch.equal(copy.deepcopy(model)[1].blocks, model[1].blocks)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"a row of 33 numbers does not divide into blocks of 32, as q4_0 needs; bf16"):
        bytes_per_row("q4_0", 33)
    with pytest.raises(ValueError, match=r"kind='q5_0' must be one of f32, bf16, q8_0, q4_0, q4_1"):
        QuantLinear(32, 2, "q5_0")
    with pytest.raises(
        ValueError, match=r"rows of 64 numbers in q8_0 take 68 bytes \(uint8\); got torch.uint8, rows of 67"
    ):
        dequantize(torch.zeros(2, 67, dtype=torch.uint8), "q8_0", 64)
    with pytest.raises(ValueError, match=r"x has 32 features, and the matrix takes in_features=64"):
        quantized_linear(torch.zeros(1, 32), torch.zeros(2, 68, dtype=torch.uint8), "q8_0", 64)


@pytest.mark.parametrize("rows", [1, 16, 23])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_packed_rows_are_the_same_rows(kind, rows):
    """To the bit when unpacked; as a product, to the 15 bits that x has there; differentiable, and exact in fp64."""
    if not can_pack(kind):
        pytest.skip("this machine does not multiply bytes")
    blocks, want = stored(kind, rows, 96)
    packed = pack(blocks, kind)
    assert packed.shape == (-(-rows // 16), 16 * blocks.shape[1])
    assert torch.equal(unpack(packed, kind, rows), blocks)
    for count in (1, 3, 65, 130):
        x = torch.randn(count, 96)
        exact = x.double() @ want.double().T
        y = quantized_linear(x, packed, kind, 96, rows)
        assert float((y - exact).abs().max() / exact.abs().max()) <= 1e-3
        assert torch.equal(y[:1], quantized_linear(x[:1], packed, kind, 96, rows))  # no row feels another
    x = torch.randn(2, 96, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(quantized_linear(x, packed, kind, 96, rows), x @ want.double().T)
    linear, want = filled(QuantLinear(96, rows, kind), kind, rows, 96)
    linear.pack()
    assert linear.packed
    assert same_bits(linear.weight, want)
    with pytest.raises(ValueError, match="q4_1 cannot be packed here"):
        pack(torch.zeros(2, 20, dtype=torch.uint8), "q4_1")


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_prompt_meets_packed_rows_as_exactly(kind):
    """Rows, columns and widths that fill no tile, on one thread and on two; the error beside the sum of magnitudes."""
    if not can_pack(kind):
        pytest.skip("this machine does not multiply bytes")
    blocks, want = stored(kind, 1003, 288)
    packed = pack(blocks, kind)
    x = torch.randn(300, 288)
    exact, scale = x.double() @ want.double().T, x.abs().double() @ want.abs().double().T
    y = quantized_linear(x, packed, kind, 288, 1003)
    assert float(((y - exact).abs() / scale).max()) <= 3e-5
    try:
        torch.set_num_threads(2)
        assert torch.equal(y, quantized_linear(x, packed, kind, 288, 1003))
    finally:
        torch.set_num_threads(1)
    x[7, 3] = torch.nan
    spoilt = quantized_linear(x, packed, kind, 288, 1003)
    assert spoilt[7].isnan().all()
    assert torch.equal(spoilt[:7], y[:7])
    assert torch.equal(spoilt[8:], y[8:])


def test_what_is_not_finite_stays_so_in_a_packed_product():
    if not can_pack("q8_0"):
        pytest.skip("this machine does not multiply bytes")
    blocks, _ = stored("q8_0", 5, 64)
    x = torch.zeros(3, 64)
    x[0, 40], x[2, 3] = torch.inf, torch.nan
    y = quantized_linear(x, pack(blocks, "q8_0"), "q8_0", 64, 5)
    assert y[0].isnan().all()
    assert (y[1] == 0).all()
    assert y[2].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_very_long_row_is_multiplied_too(kind):
    """Q4_1 keeps a sum for every block of x: 5,000 of them are more than any fixed table held."""
    width = 32 * 5_000
    blocks, want = stored(kind, 4, width)
    x = torch.randn(2, width)
    torch.testing.assert_close(quantized_linear(x, blocks, kind, width), x @ want.T, rtol=1e-4, atol=2e-2)
