"""The convolution against its definition: delete what is masked, run each sequence alone, put the results back."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from openxlstm.nn.conv import ConvSiLU, causal_conv

B, U = 3, 5


def by_definition(x, w, b, state, reset, mask):
    """One row at a time, one step at a time."""
    J = w.shape[1]
    y, last = torch.zeros_like(x), torch.empty_like(state)
    for row in range(x.shape[0]):
        past = list(state[row])
        for t in range(x.shape[1]):
            if reset[row, t]:
                past = [torch.zeros_like(x[row, 0]) for _ in range(J - 1)]
            if mask[row, t]:
                past.append(x[row, t])
                y[row, t] = b + sum(w[:, j] * tap for j, tap in enumerate(past))
                past = past[1:]
        last[row] = torch.stack(past) if past else last[row]
    return y, last


@given(
    T=st.integers(0, 9),
    J=st.sampled_from([1, 2, 4]),
    resets=st.booleans(),
    masks=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_definition(T, J, resets, masks, seed):
    torch.manual_seed(seed)
    x, w, b, state = (torch.randn(s, dtype=torch.float64) for s in ((B, T, U), (U, J), (U,), (B, J - 1, U)))
    reset, mask = torch.rand(B, T) < 0.3, torch.rand(B, T) < 0.6
    if not resets:
        reset = torch.zeros_like(reset)
    if not masks:
        mask = torch.ones_like(mask)
    want = by_definition(x, w, b, state, reset, mask)
    x[~mask] = torch.nan
    got = causal_conv(x, w, b, state, reset=reset if resets else None, mask=mask if masks else None)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("J", [1, 2, 4])
def test_any_cut_gives_the_same_values_and_gradients(J):
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((B, 7, U), (U, J), (U,)))
    reset, mask = torch.rand(B, 7) < 0.3, torch.rand(B, 7) < 0.7
    weight = torch.randn(B, 7, U, dtype=torch.float64)
    y, last = causal_conv(x, w, b, reset=reset, mask=mask)
    want = torch.autograd.grad((y * weight).sum() + last.square().sum(), (x, w, b))
    for cut in range(8):
        y1, state = causal_conv(x[:, :cut], w, b, reset=reset[:, :cut], mask=mask[:, :cut])
        y2, state = causal_conv(x[:, cut:], w, b, state, reset=reset[:, cut:], mask=mask[:, cut:])
        torch.testing.assert_close((torch.cat((y1, y2), 1), state), (y, last), rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad((torch.cat((y1, y2), 1) * weight).sum() + state.square().sum(), (x, w, b))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_what_is_masked_reaches_no_gradient():
    x = torch.randn(B, 6, U, requires_grad=True)
    mask = torch.rand(B, 6) < 0.5
    w, b = torch.randn(U, 4, requires_grad=True), torch.randn(U, requires_grad=True)
    poisoned = torch.where(mask[..., None], x, torch.nan)
    y, last = causal_conv(poisoned, w, b, mask=mask)
    gradients = torch.autograd.grad(y.sum() + last.sum(), (poisoned, w, b))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][~mask] == 0).all()


def test_the_newest_tap_is_last_as_in_torch():
    x, w, b = torch.randn(B, 8, U), torch.randn(U, 4), torch.randn(U)
    want = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), w[:, None], b, groups=U).transpose(1, 2)
    torch.testing.assert_close(causal_conv(x, w, b)[0], want)


def test_no_input_is_changed_and_no_memory_shared():
    x, w, b, state = torch.randn(B, 2, U), torch.randn(U, 4), torch.randn(U), torch.randn(B, 3, U)
    versions = [t._version for t in (x, w, b, state)]
    for T in (0, 1, 2):  # shorter than the state: part of the old tail is in the new one
        _, last = causal_conv(x[:, :T], w, b, state)
        assert last.untyped_storage().data_ptr() not in {
            x.untyped_storage().data_ptr(),
            state.untyped_storage().data_ptr(),
        }
        assert last.untyped_storage().nbytes() == last.nbytes, "the state keeps a longer window alive"
    assert versions == [t._version for t in (x, w, b, state)]


def test_half_precision_accumulates_in_fp32():
    x, w, b = (torch.randn(s).bfloat16() for s in ((B, 9, U), (U, 4), (U,)))
    y, last = causal_conv(x, w, b)
    want, _ = causal_conv(x.float(), w.float(), b.float())
    assert last.dtype == torch.float32
    assert torch.equal(y, want.bfloat16())


def test_without_taps_there_is_neither_convolution_nor_silu():
    conv = ConvSiLU(U, 0)
    x = torch.randn(B, 4, U)
    y, state = conv(x)
    assert torch.equal(y, x)
    assert state.shape == (B, 0, U)
    assert not list(conv.parameters())
