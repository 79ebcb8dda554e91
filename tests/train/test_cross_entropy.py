"""The chunked loss is the plain one: value, gradients, cap, z-loss, mask, at every chunk; and it keeps no logits."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openxlstm.train.cross_entropy import Entropy, linear_cross_entropy

N, D, W = 37, 8, 29
EVERY = list(itertools.product((None, 3.0), (0.0, 0.02), (False, True)))


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, weight = torch.randn(N, D, dtype=dtype), torch.randn(W, D, dtype=dtype)
    return h.requires_grad_(), weight.requires_grad_(), torch.randint(0, W, (N,)), torch.rand(N) < 0.7


def plain(h: Tensor, weight: Tensor, y: Tensor, v: Tensor, cap: float | None, z_loss: float) -> tuple[Tensor, Tensor]:
    """With all logits at once, as the equations say it."""
    a = h @ weight.T
    a = a if cap is None else cap * torch.tanh(a / cap)
    lse = a.logsumexp(1)
    return ((lse - a.gather(1, y[:, None])[:, 0] + z_loss * lse.square()) * v).sum(), z_loss * (lse.square() * v).sum()


@pytest.mark.parametrize(("cap", "z_loss", "recompute"), EVERY)
@pytest.mark.parametrize("chunk", [1, 10, N, 2048])
def test_value_and_gradients_are_those_of_the_plain_form(cap, z_loss, recompute, chunk) -> None:
    h, weight, y, v = problem()
    want, want_z = plain(h, weight, y, v, cap, z_loss)
    wanted = torch.autograd.grad(1.7 * want, (h, weight))
    odd = torch.where(v, y, -100)  # what does not count may be anything
    got = linear_cross_entropy(h, weight, odd, v, soft_cap=cap, z_loss=z_loss, chunk=chunk, recompute=recompute)
    gradients = torch.autograd.grad(1.7 * got.total, (h, weight))
    for name, a, b in zip(("total", "z", "dh", "dW"), (got.total, got.z, *gradients), (want, want_z, *wanted)):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(got.nats.sum() + got.z, got.total.detach(), rtol=1e-13, atol=0)
    assert (got.nats[~v] == 0).all()
    assert (gradients[0][~v] == 0).all(), "masked tokens give exactly zero"


@pytest.mark.parametrize(("cap", "z_loss"), [(None, 0.0), (2.0, 0.02)])
def test_gradcheck(cap, z_loss) -> None:
    """On the form that can be asked twice; the other one has the same gradients, bit for bit."""
    h, weight, y, v = problem()

    def total(h: Tensor, weight: Tensor, recompute: bool = True) -> Tensor:
        return linear_cross_entropy(h, weight, y, v, soft_cap=cap, z_loss=z_loss, chunk=10, recompute=recompute).total

    assert torch.autograd.gradcheck(total, (h, weight))
    kept, formed_again = (torch.autograd.grad(total(h, weight, form), (h, weight)) for form in (False, True))
    assert all(map(torch.equal, kept, formed_again))


def test_only_what_asks_gets_a_gradient() -> None:
    h, weight, y, v = problem()
    both = torch.autograd.grad(linear_cross_entropy(h, weight, y, v).total, (h, weight))
    for recompute in (False, True):
        (alone,) = torch.autograd.grad(linear_cross_entropy(h, weight.detach(), y, v, recompute=recompute).total, (h,))
        assert torch.equal(alone, both[0])
        (alone,) = torch.autograd.grad(
            linear_cross_entropy(h.detach(), weight, y, v, recompute=recompute).total, weight
        )
        assert torch.equal(alone, both[1])
    with torch.no_grad():
        assert not linear_cross_entropy(h, weight, y, v).total.requires_grad


def test_a_second_backward_pass_is_refused_with_the_remedy() -> None:
    h, weight, y, v = problem()
    total = linear_cross_entropy(h, weight, y, v).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"loss\.recompute = true"):
        total.backward()


@pytest.mark.parametrize("valid", [0, 1])
def test_portions_with_nothing_or_one_to_learn_from(valid: int) -> None:
    h, weight, y, v = problem()
    v = torch.arange(N) < valid
    got = linear_cross_entropy(h, weight, y, v, chunk=10)
    got.total.backward()
    assert (got.total.item() == 0) == (valid == 0)
    assert (weight.grad == 0).all() == (valid == 0)
    assert (h.grad[valid:] == 0).all()


def test_no_rows_at_all() -> None:
    _, weight, y, v = problem()
    h = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    got = linear_cross_entropy(h, weight, y[:0], v[:0])
    got.total.backward()
    assert (got.total.item(), weight.grad.abs().max().item(), h.grad.shape) == (0.0, 0.0, (0, D))


def test_extreme_logits_stay_finite() -> None:
    h, weight, y, v = problem(torch.float32)
    got = linear_cross_entropy(h * 1e4, weight, y, v, chunk=10)
    got.total.backward()
    assert all(part.isfinite().all() for part in (got.total, h.grad, weight.grad))


def test_autocast_rounds_products_and_nothing_else() -> None:
    """Losses and dW are fp32, and as close to the exact ones as bf16 products allow: a relative 2^-8."""
    h, weight, y, v = problem(torch.float32)
    exact = linear_cross_entropy(h.double(), weight.double(), y, v)
    wanted = torch.autograd.grad(exact.total, (h, weight))
    for recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            got = linear_cross_entropy(h, weight, y, v, chunk=10, recompute=recompute)
            assert {part.dtype for part in got} == {torch.float32}
        gradients = torch.autograd.grad(got.total, (h, weight))  # the backward pass stands outside, as it should
        assert (got.nats - exact.nats).abs().max() < 0.1
        for a, b in zip(gradients, wanted):
            assert a.dtype == torch.float32
            assert (a - b).norm() < 0.01 * b.norm()


def test_half_precision_parameters() -> None:
    h, weight, y, v = problem(torch.float32)
    low_h, low_weight = (part.detach().bfloat16().requires_grad_() for part in (h, weight))
    got = linear_cross_entropy(low_h, low_weight, y, v, chunk=10)
    got.total.backward()
    assert got.nats.dtype == torch.float32
    assert (low_h.grad.dtype, low_weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    want = linear_cross_entropy(low_h.detach().float(), low_weight.detach().float(), y, v)
    assert (got.total - want.total).abs() < 2e-3 * want.total


def test_inputs_are_not_changed() -> None:
    h, weight, y, v = problem()
    before = [part.detach().clone() for part in (h, weight, y, v)]
    linear_cross_entropy(h, weight, y, v, soft_cap=3.0, chunk=10).total.backward()
    assert all(map(torch.equal, before, (h, weight, y, v)))


def test_nothing_of_the_size_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that an operation returns is counted, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            made = function(*arguments, **(options or {}))
            for part in made if isinstance(made, tuple | list) else (made,):
                if isinstance(part, Tensor):
                    self.numbers = max(self.numbers, part.numel())
            return made

    h = torch.randn(400, D, requires_grad=True)
    weight = torch.randn(W, D, requires_grad=True)
    y, v = torch.randint(0, W, (400,)), torch.ones(400, dtype=torch.bool)
    for recompute in (False, True):
        with Largest() as largest:
            got: Entropy = linear_cross_entropy(h, weight, y, v, chunk=120, soft_cap=3.0, recompute=recompute)
            got.total.backward()
        assert largest.numbers == 120 * W


@pytest.mark.slow
def test_memory_beside_the_plain_form(tmp_path: Path, record_property) -> None:
    """The benchmark at a size that takes seconds; each side in a process of its own."""
    numbers = {"tokens": 2048, "vocabulary": 16_000, "width": 64, "chunk": 256, "runs": 1, "threads": 1}
    size = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    file = tmp_path / "loss.json"
    done = subprocess.run(
        [sys.executable, "-m", "openxlstm.bench.loss", *size, "--json", str(file)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    chunked = json.loads(file.read_text())["rows"][1]
    assert chunked["difference"] < 2e-6
    assert chunked["peak_of_plain"] <= 0.25
    record_property(
        "measured", f"chunked cross-entropy: {100 * chunked['peak_of_plain']:.0f} % of the plain one's peak"
    )


@pytest.mark.compile
def test_a_compiled_caller_gets_the_same() -> None:
    """One break in the graph, nothing else: what stands around the loss is compiled."""
    h, weight, y, v = problem()

    def loss(h: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(torch.tanh(h), weight, y, v, chunk=10).total * 2

    want = torch.autograd.grad(loss(h, weight), (h, weight))
    got = torch.autograd.grad(torch.compile(loss)(h, weight), (h, weight))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
