"""The first steps of training: initialisation by the papers' tables, decay groups, tying, dropout, precisions."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from models.small_models import build, tokens

from openxlstm.models.xlstm import xLSTM, xLSTMConfig, xLSTMStack, xLSTMStackConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig
from openxlstm.nn.init import forget_bias_within_head

W, D, BLOCKS = 200, 128, 4
CONFIGS = {
    "xlstm": xLSTMConfig(vocab_size=W, width=D, pattern="msms", bias=True),
    "xlstm_large": xLSTMLargeConfig(vocab_size=W, width=D, blocks=BLOCKS, heads=4),
}
SMALL, RESIDUAL = math.sqrt(2 / (5 * D)), 2 / (BLOCKS * math.sqrt(D))

# The tables of both papers: names (the first pattern that matches), standard deviation, mean, and whether they decay.
TABLE = {
    "xlstm": [
        (r"embedding\.weight", SMALL, 0, False),
        (r"head\.weight", SMALL, 0, True),
        (r".*norm(_ffn)?\.weight|.*skip", 0, 1, False),
        (r".*(down)\.weight", RESIDUAL, 0, True),
        (r".*conv\.weight", 0.5 / math.sqrt(3), 0, True),
        (r".*conv\.bias", 0.5 / math.sqrt(3), 0, False),
        (r".*blocks\.[02]\.gate_[if]\.weight", 0, 0, True),
        (r".*blocks\.[02]\.gate_i\.bias", 0.1, 0, False),
        (r".*blocks\.[02]\.gate_f\.bias", torch.linspace(3, 6, 4).std(correction=0).item(), 4.5, False),
        (r".*blocks\.[13]\.R", 0, 0, False),
        (r".*blocks\.[13]\.b", None, None, False),
        (r".*\.weight", SMALL, 0, True),
        (r".*\.bias", 0, 0, False),
    ],
    "xlstm_large": [
        (r"backbone\.embeddings\.weight", SMALL, 0, False),
        (r"lm_head\.weight", SMALL, 0, True),
        (r".*norm(_mlstm|_ffn)?\.weight", 0, 1, False),
        (r".*(out_proj|proj_down)\.weight", RESIDUAL, 0, True),
        (r".*(ogate|igate|fgate)_preact\.weight", 0, 0, True),
        (r".*igate_preact\.bias", 0, -10, False),
        (r".*fgate_preact\.bias", torch.linspace(3, 6, 4).std(correction=0).item(), 4.5, False),
        (r".*\.weight", SMALL, 0, True),
    ],
}


def make(kind):
    config = CONFIGS[kind]
    return xLSTM(config) if isinstance(config, xLSTMConfig) else xLSTMLarge(config)


def row_of(kind, name):
    return next(row for row in TABLE[kind] if re.fullmatch(row[0], name))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_starts_as_its_table_says(kind):
    for name, parameter in make(kind).named_parameters():
        _, std, mean, _ = row_of(kind, name)
        if std is None:
            continue  # the sLSTM's b: below, in closed form
        slack = 5 * std / math.sqrt(parameter.numel())  # five standard errors, and 5 / sqrt(2) of the deviation's
        assert parameter.mean().item() == pytest.approx(mean, abs=slack + 1e-6), name
        assert parameter.std(correction=0).item() == pytest.approx(std, abs=slack + 1e-6), name


def test_the_slstm_bias_is_zero_but_for_the_forget_gate():
    blocks = make("xlstm").stack.blocks
    for index in (1, 3):
        i, f, z, o = blocks[index].b
        assert not torch.stack((i, z, o)).any()
        for head in f:
            torch.testing.assert_close(head, forget_bias_within_head(D // 4, index / 3))


def test_recurrent_init_uniform():
    R = xLSTMStack(xLSTMStackConfig(width=D, pattern="s", recurrent_init="uniform")).blocks[0].R
    assert R.abs().max() <= D**-0.5
    assert R.std().item() == pytest.approx(D**-0.5 / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("kind", CONFIGS)
def test_decay_groups_follow_the_table_and_hold_every_parameter_once(kind):
    model = make(kind)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    for group, expected in ((decayed, True), (kept, False)):
        for parameter in group["params"]:
            assert row_of(kind, names[id(parameter)])[3] is expected, names[id(parameter)]
    everything = [id(p) for group in (decayed, kept) for p in group["params"]]
    assert sorted(everything) == sorted(names)


def loss_of(model, x):
    return F.cross_entropy(model(x)[0][:, :-1].flatten(0, 1).float(), x[:, 1:].flatten())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_model_knows_nothing_and_claims_nothing(kind, tied):
    config = type(CONFIGS[kind]).from_dict(CONFIGS[kind].to_dict() | {"tie_embeddings": tied})
    model = xLSTM(config) if kind == "xlstm" else xLSTMLarge(config)
    assert loss_of(model, torch.randint(0, W, (8, 50))).item() <= math.log(W) + 0.3


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_one_step_in_each_precision_reaches_every_parameter(kind, precision):
    model = make(kind)
    if precision == "bf16":
        model.bfloat16()
    optimiser = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2)
    x = torch.randint(0, W, (4, 70))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        logits, state = model(x)
        before = loss_of(model, x)
    assert logits.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in state.tensors()), "a state below fp32 drifts"
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"no gradient reaches {name}"
    optimiser.step()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        assert loss_of(model, x) < before


@pytest.mark.parametrize("kind", CONFIGS)
def test_half_precision_is_the_same_model(kind):
    """bf16 rounds, it does not change the function: logits stay within a few of its steps of fp32's."""
    model = make(kind)
    x = torch.randint(0, W, (2, 40))
    want = model(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x)[0]
    for got in (autocast, model.bfloat16()(x)[0]):
        assert (got - want).square().mean().sqrt() < 0.02 * want.square().mean().sqrt()


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_the_gates_of_an_slstm_are_not_rounded(precision):
    """i and f are exponents: bf16 would round a forget gate of 5 to steps of 1/32."""
    block = make("xlstm").stack.blocks[1]
    x = torch.randn(2, 7, D)
    if precision == "bf16":
        block, x = block.bfloat16(), x.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        gates = block._gates(x, x)
    want = block.double()._gates(x.double(), x.double())
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_fp16_trains_and_continues(kind):
    model = make(kind).half()
    x = torch.randint(0, W, (2, 70))
    logits, state = model(x)
    logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model(x[:, :1], state)[0].isfinite().all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_tied_head_is_the_embedding(kind):
    """One tensor, once in the optimiser, without decay, and with the gradient of both uses."""
    config = type(CONFIGS[kind]).from_dict(CONFIGS[kind].to_dict() | {"tie_embeddings": True})
    model = (xLSTM if kind == "xlstm" else xLSTMLarge)(config)
    square = [name for name, p in model.named_parameters() if p.shape == (W, D)]
    assert square == list(model.state_dict())[:1]
    embedding = model.get_parameter(square[0])
    decayed, kept = model.parameter_groups(0.1)
    assert sum(p is embedding for p in kept["params"]) == 1
    assert not any(p is embedding for p in decayed["params"])
    x = torch.zeros(1, 3, dtype=torch.long)
    loss_of(model, x).backward()
    assert embedding.grad[0].any(), "read as an embedding"
    assert embedding.grad[1:].any(), "and as a head, where every row has a gradient"
    model.double().to_empty(device="cpu")  # moves that rebuild parameters cannot untie what is one by construction
    assert model.state_dict().keys() == {name for name, _ in model.named_parameters()}


def test_dropout_stands_on_every_branch_and_nowhere_else():
    """All branches dropped, only the residual stream is left: the last norm of the input."""
    stack = xLSTMStack(xLSTMStackConfig(width=12, heads=3, pattern="msm", mlstm_width=24, dropout=0.5))
    x = torch.randn(2, 5, 12)
    seen = []
    for index, block in enumerate(stack.blocks):
        block.dropout.register_forward_hook(lambda module, inputs, y, at=index: seen.append((at, tuple(y.shape))))
        block.dropout.register_forward_hook(lambda module, inputs, y: torch.zeros_like(y))
    y, _ = stack(x)
    torch.testing.assert_close(y, stack.norm(x))
    branch, heads = (2, 5, 12), (2, 5, 3, 4)
    assert seen == [(0, branch), (1, heads), (1, branch), (2, branch)]


def test_dropout_acts_in_training_only():
    stack = xLSTMStack(xLSTMStackConfig(width=12, heads=3, pattern="msm", mlstm_width=24, dropout=0.5))
    x = torch.randn(2, 5, 12)
    assert not torch.equal(stack(x)[0], stack(x)[0])
    stack.eval()
    assert torch.equal(stack(x)[0], stack(x)[0])


def test_no_gradient_is_cut_by_reading_in_evaluation_mode():
    model = build("xlstm").eval()
    model(tokens(1, 4))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
