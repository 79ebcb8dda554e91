"""The loss of a batch does not depend on how the batch is cut, and bits per byte count bytes."""

import math

import numpy as np
import pytest
import torch

from openxlstm.data.windows import Batch
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.train import optim
from openxlstm.train.loss import Rows, Score, backward, derived, score, token_nats
from openxlstm.train.recipe import OptimRecipe

W, B, T = 11, 6, 7
BYTES_OF = torch.tensor([1] * 8 + [3, 2, 0])  # the last id ends documents and stands for no byte


def model() -> xLSTM:
    torch.manual_seed(3)
    return xLSTM(xLSTMConfig(vocab_size=W, width=16, heads=2, pattern="ms")).double()


def rows() -> Rows:
    """Six rows; one has a single target, two (which make one portion) have none, one holds a document's end."""
    draw = np.random.default_rng(1)
    tokens, targets = draw.integers(0, W, (2, B, T))
    valid = draw.random((B, T)) < 0.7
    valid[1] = False
    valid[1, 2] = True
    valid[4:] = False
    reset = draw.random((B, T)) < 0.2
    targets[0, 3], valid[0, 3] = W - 1, True
    return Rows.of(Batch(tokens, targets, reset, valid), torch.device("cpu"))


def gradients(micro_batch: int) -> tuple[dict[str, torch.Tensor], Score]:
    net = model()
    result = backward(net, rows(), BYTES_OF, micro_batch=micro_batch)
    return {name: weight.grad for name, weight in net.named_parameters()}, result


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
def test_accumulation_changes_nothing(micro_batch: int) -> None:
    net, batch = model(), rows()
    logits, _ = net(batch.tokens, reset=batch.reset)
    torch.nn.functional.cross_entropy(logits[batch.valid], batch.targets[batch.valid]).backward()
    got, _ = gradients(micro_batch)
    for name, weight in net.named_parameters():
        torch.testing.assert_close(
            got[name], weight.grad, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_score_does_not_depend_on_the_cut() -> None:
    whole, cut = gradients(6)[1], gradients(1)[1]
    assert (whole.tokens, whole.bytes) == (cut.tokens, cut.bytes) == (int(rows().valid.sum()), whole.bytes)
    assert math.isclose(whole.nats, cut.nats, rel_tol=1e-12)
    assert math.isclose(whole.byte_nats, cut.byte_nats, rel_tol=1e-12)


def test_bits_per_byte_against_a_hand_count() -> None:
    """Two bytes, a token of three bytes, an end token, and a target that does not count, at a uniform model."""
    nats = torch.full((1, 5), math.log(W))
    batch = Batch(
        np.zeros((1, 5), np.int64),
        np.array([[0, 1, 8, 10, 2]]),
        np.zeros((1, 5), np.bool_),
        np.array([[True, True, True, True, False]]),
    )
    nats[0, 4] = 0.0
    got = score(nats, Rows.of(batch, torch.device("cpu")), BYTES_OF)
    assert (got.tokens, got.bytes) == (4, 5)
    assert math.isclose(got.loss, math.log(W), rel_tol=1e-6)
    assert math.isclose(got.bits_per_byte, 3 * math.log2(W) / 5, rel_tol=1e-6)
    assert got + Score() == got


def test_what_does_not_count_has_no_gradient_and_may_be_anything() -> None:
    batch = rows()
    odd = Rows(batch.tokens, torch.where(batch.valid, batch.targets, 5), batch.reset, batch.valid)
    ours, theirs = token_nats(model(), batch), token_nats(model(), odd)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours == 0, ~batch.valid)


def test_dropout_is_a_function_of_the_seed() -> None:
    def run(seed: int) -> float:
        torch.manual_seed(3)
        net = xLSTM(xLSTMConfig(vocab_size=W, width=16, heads=2, pattern="ms", dropout=0.5))
        torch.rand(seed)  # whatever was drawn before does not matter
        return backward(net, rows(), BYTES_OF, micro_batch=2, seed=seed).nats

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert derived(1, 2) == 8854627303482016855, "a stored run would read other dropout masks"


def test_every_parameter_is_in_one_group_and_the_rate_reaches_all() -> None:
    net = model()
    optimiser = optim.build(net, OptimRecipe(lr=1e-3))
    held = [id(weight) for group in optimiser.param_groups for weight in group["params"]]
    assert sorted(held) == sorted(map(id, net.parameters()))
    optim.set_rate(optimiser, 0.25)
    assert {group["lr"] for group in optimiser.param_groups} == {0.25}


def test_the_clip_is_of_the_global_norm() -> None:
    net = model()
    optimiser = optim.build(net, OptimRecipe(lr=1e-3))
    backward(net, rows(), BYTES_OF, micro_batch=6)
    want = torch.cat([weight.grad.flatten() for weight in net.parameters()]).norm()
    assert math.isclose(optim.clip(optimiser, math.inf), want, rel_tol=1e-12)
    optim.clip(optimiser, 0.01)
    assert math.isclose(optim.clip(optimiser, 1.0), 0.01, rel_tol=1e-3)
