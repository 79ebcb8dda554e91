"""Bad input gets a sentence: the value, the rule, the nearest fix; and nothing is silently broadcast or cast."""

import pytest
import torch
from models.small_models import KINDS, W, build, build_stack, tokens

from openxlstm.models import checks
from openxlstm.models.interface import LanguageModel, ModelConfig


def refusal(call, *arguments, **options):
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [-1, W, W + 1000])
def test_a_token_outside_the_vocabulary(kind, bad):
    x = tokens(2, 5)
    x[1, 3] = bad
    said = refusal(build(kind), x)
    assert f"token id {bad} at [1, 3] is outside the vocabulary of {W} (ids 0 to {W - 1})" in said
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 0] = False
    assert "at [1, 3]" in refusal(build(kind), x, mask=mask)


def test_tokens_of_another_kind():
    """Asked directly: in tests the shape checker would answer first, users have none."""
    assert "got torch.float32 [2, 3]" in refusal(checks.check_tokens, torch.ones(2, 3), W, None, None)
    assert "pass tokens[None]" in refusal(checks.check_tokens, tokens(3), W, None, None)


def test_flags_that_would_broadcast():
    flag = torch.ones(1, 5, dtype=torch.bool)
    assert "mask must be bool of shape [2, 5]" in refusal(checks.check_flag, "mask", flag, 2, 5)
    assert "use reset.bool()" in refusal(checks.check_flag, "reset", torch.ones(2, 5), 2, 5)


def test_hidden_states_of_another_width_or_dtype():
    norm = build_stack().norm.weight
    assert "x must be [batch, time, 12]; got [2, 3, 13]" in refusal(checks.check_input, torch.ones(2, 3, 13), norm)
    assert "use x.to(torch.float64)" in refusal(checks.check_input, torch.ones(2, 3, 12), norm)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_batch(kind):
    model = build(kind)
    said = refusal(model, tokens(3, 2), model.empty_state(2))
    assert "and this call needs [3," in said
    assert "state.select(rows) picks rows" in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_state(kind):
    model = build(kind, torch.float32)
    said = refusal(model, tokens(2, 2), model.empty_state(2).to(torch.bfloat16))
    assert "is torch.bfloat16 and must be torch.float32" in said


def test_the_state_of_another_model():
    """More blocks, other blocks, other widths."""
    model, large = build("xlstm"), build("xlstm_large")
    said = refusal(model, tokens(2, 2), large.empty_state(2))
    assert "the state has 'blocks.0.C', so it comes from another model" in said
    wide = build("xlstm_no_conv").empty_state(2)
    assert "state blocks.0.conv has shape [2, 0, 24], and this call needs [2, 3, 24]" in refusal(
        model, tokens(2, 2), wide
    )
    fewer = type(wide)(model.empty_state(2).blocks[:2])
    assert "the state lacks 'blocks.2.cell.C'" in refusal(model, tokens(2, 2), fewer)


def test_a_state_elsewhere():
    model = build("xlstm")
    said = refusal(model, tokens(2, 2), model.empty_state(2, device="meta"))
    assert "is on meta, the input on cpu; use state.to(cpu)" in said


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_keeps_the_interface(kind):
    model = build(kind)
    assert isinstance(model, LanguageModel)
    assert isinstance(model.config, ModelConfig)
