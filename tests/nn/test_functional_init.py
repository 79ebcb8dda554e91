"""fp32 islands, soft caps, and the closed forms of initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F

from openxlstm.nn.functional import soft_cap, widened
from openxlstm.nn.gates import GateLinear, project_gates
from openxlstm.nn.init import forget_bias_per_head, forget_bias_within_head, residual_std, small_std


def gates(dtype=torch.float32):
    i, f = torch.nn.Linear(10, 3, dtype=dtype), torch.nn.Linear(10, 3, dtype=dtype)
    return i, f, [torch.randn(2, 4, width).to(dtype) for width in (5, 2, 3)]


def test_gates_read_the_concatenation():
    i, f, inputs = gates(torch.float64)
    whole = torch.cat(inputs, -1)
    torch.testing.assert_close(project_gates(inputs, i, f), (i(whole), f(whole)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_gates_are_fp32_inside_a_bf16_model(autocast):
    i, f, inputs = gates(torch.float32 if autocast else torch.bfloat16)
    inputs = [x.bfloat16() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = project_gates(inputs, i, f)
    whole = torch.cat(inputs, -1).double()
    for raw, gate in zip(got, (i, f)):
        assert raw.dtype == torch.float32
        want = F.linear(whole, gate.weight.double(), gate.bias.double()).float()
        torch.testing.assert_close(raw, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", ["hook", "forward", "subclass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_that_somebody_changed_is_called(wrap, dtype):
    """An adapter, a quantiser or an offloaded module does its work when it is called; its weight says nothing."""

    class Doubled(GateLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    f, plain, inputs = gates(dtype)
    i = (Doubled if wrap == "subclass" else GateLinear)(10, 3).to(dtype)
    i.load_state_dict(plain.state_dict())
    if wrap == "hook":
        i.register_forward_hook(lambda module, args, output: 2 * output)
    elif wrap == "forward":
        i.forward = lambda x: 2 * GateLinear.forward(i, x)
    f.forward = lambda x: GateLinear.forward(f, x)
    want_i, want_f = project_gates(inputs, plain, plain)[0], project_gates(inputs, plain, gates_of(f))[1]
    got_i, got_f = project_gates(inputs, i, f)
    assert got_i.dtype == got_f.dtype == torch.float32
    torch.testing.assert_close(got_i, 2 * want_i, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_f, want_f, rtol=1e-5, atol=1e-5)


def gates_of(linear):
    copy = torch.nn.Linear(10, 3, dtype=linear.weight.dtype)
    copy.load_state_dict(linear.state_dict())
    return copy


def test_soft_cap_is_the_identity_near_zero_and_never_passes_the_cap():
    x = torch.tensor([0.0, 1e-3, -1e-3, 1e4, -1e4], dtype=torch.float64)
    torch.testing.assert_close(soft_cap(x, 15.0)[:3], x[:3])
    assert soft_cap(x, 15.0).abs().max() <= 15


def test_widened_never_narrows():
    assert [widened(torch.ones(1, dtype=t)).dtype for t in (torch.bfloat16, torch.float16)] == [torch.float32] * 2
    assert widened(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


def test_closed_forms():
    assert small_std(40) == pytest.approx(0.1)
    assert residual_std(16, 5) == pytest.approx(0.1)
    assert forget_bias_per_head(4).tolist() == [3, 4, 5, 6]
    assert forget_bias_per_head(1).tolist() == [3]
    first, last = forget_bias_within_head(9, 0.0), forget_bias_within_head(9, 1.0)
    for bias, power in ((first, 0.3), (last, 1.6)):
        torch.testing.assert_close(bias, torch.tensor([5 - 12 * math.pow(j / 8, power) for j in range(9)]))


def test_a_head_of_width_one_has_a_finite_bias():
    assert forget_bias_within_head(1, 0.5).tolist() == [5.0]
