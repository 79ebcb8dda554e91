"""Run by test_operators.py in a process of its own: the kernels' operators, as PyTorch's own checks see them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from openxlstm import kernels
from openxlstm.kernels.triton import mlstm, recurrent_ops

B, T, H, K, V = 2, 7, 3, 5, 6
ops = torch.ops.openxlstm_triton


def inputs(device: str = "cpu", grad: bool = True) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    x = [torch.randn(B, T, H, w, device=device) for w in (K, K, V)] + [
        torch.randn(B, T, H, device=device) for _ in "if"
    ]
    state = [torch.randn(*s, device=device) for s in ((B, H, K, V), (B, H, K), (B, H))]
    return [p.requires_grad_(grad) for p in x], [*(p.requires_grad_(grad) for p in state[:2]), state[2]]


def slstm_inputs(device: str = "cpu") -> tuple[torch.Tensor, ...]:
    shapes = ((B, T, 4, H, K), (H, K, 4, K), (4, H, K))
    return tuple((0.5 * torch.randn(*s, device=device)).requires_grad_() for s in shapes)


def test_opcheck() -> None:
    assert mlstm is not None
    assert recurrent_ops is not None
    reset, mask = torch.rand(B, T) < 0.2, torch.rand(B, T) > 0.2
    x, state = inputs()
    torch.library.opcheck(ops.mlstm.default, (*x, *state, reset, mask, "exp", 1e-6, None, True))
    gates, R, b = slstm_inputs()
    h, c, n, m = torch.rand(4, B, H, K).unbind(0)
    torch.library.opcheck(ops.slstm.default, (gates, R, b, h, c, n, m, reset, mask, "sigmoid"))
    x, state = inputs(grad=False)
    one = [p[:, 0].contiguous() for p in x]
    torch.library.opcheck(ops.mlstm_step.default, (*one, *state, None, None, "exp", "sigmoid", 1e-6))


def test_a_launch_has_a_size() -> None:
    x = [torch.zeros(1, 1, 1, 1).expand(65_536, 2, 1, 1) for _ in "qkv"]
    gates = [torch.zeros(1, 1, 1).expand(65_536, 2, 1) for _ in "if"]
    with pytest.raises(ValueError, match="65536 rows times heads are more than a launch takes, 65535"):
        kernels.mlstm(*x, *gates, backend="triton")


def test_compiled_through_the_door() -> None:
    """One graph, forward and backward; a second for a length that is not known, and none after it."""
    x, _ = inputs()
    gates, R, b = slstm_inputs()

    def both(x, gates):
        h, state = kernels.mlstm(*x, backend="triton")
        y, _ = kernels.slstm(gates, R, b, backend="triton")
        return h, state.C, y

    def loss(results):
        return sum(part.square().sum() for part in results)

    want = both(x, gates)
    found = torch.compile(both, fullgraph=True, backend="aot_eager")(x, gates)
    leaves = (*x, gates, R, b)
    for a, e in zip(found, want, strict=True):
        torch.testing.assert_close(a, e)
    for a, e in zip(torch.autograd.grad(loss(found), leaves), torch.autograd.grad(loss(want), leaves), strict=True):
        torch.testing.assert_close(a, e)
    torch._dynamo.reset()
    counts = torch._dynamo.testing.CompileCounter()
    counted = torch.compile(both, fullgraph=True, backend=counts)
    for length in (6, 4, 5, 3):
        part = [p.detach()[:, :length].contiguous() for p in x]
        counted(part, gates.detach()[:, :length].contiguous())
    assert counts.frame_count == 2, counts.frame_count  # the first length, and then every length


def test_fake_tensors_on_a_gpu() -> None:
    """What torch.compile sees on a GPU: the door's decision and the shapes, dtypes and devices, bf16 too.

    The backward operators are called by name: PyTorch's engine asks for the device, which is not there.
    """
    with FakeTensorMode(), torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            x, state = inputs("cuda", grad=False)
            x = [p.to(dtype) for p in x]
            h, end = kernels.mlstm(*x, backend="triton")
            assert (h.shape, h.dtype, h.device.type) == ((B, T, H, V), dtype, "cuda")
            assert [p.dtype for p in end.tensors()] == [torch.float32] * 3
            *_, a, rest = ops.mlstm(*x, *state, None, None, "exp", 1e-6, None, True)
            assert rest.shape == (h.shape if dtype == torch.bfloat16 else (0,))
            found = ops.mlstm_backward(h, None, None, *x, *state, None, None, h, a, rest, "exp", 1e-6, None)
            for part, gradient in zip((*x, *state[:2]), found, strict=True):
                assert (gradient.shape, gradient.dtype, gradient.device) == (part.shape, part.dtype, part.device)
            gates, R, b = (p.detach().to(dtype) for p in slstm_inputs("cuda"))
            y, _ = kernels.slstm(gates, R, b, backend="triton")
            assert (y.shape, y.dtype, y.device.type) == ((B, T, H, K), dtype, "cuda")
            token = [torch.empty(B, H, *w, dtype=dtype, device="cuda") for w in ((K,), (K,), (V,), (), ())]
            one, _ = kernels.mlstm_step(*token, backend="triton")
            assert (one.shape, one.dtype, one.device.type) == ((B, H, V), dtype, "cuda")


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[name]()
        print("passed", name, flush=True)


if __name__ == "__main__":
    main()
