"""The objective is the model's cross-entropy, in any portions; under autocast the islands stay in fp32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openxlstm import kernels
from openxlstm.data.windows import Batch
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig
from openxlstm.nn.norm import HeadNorm, LayerNorm, RMSNorm
from openxlstm.train.loss import Rows, Score
from openxlstm.train.objective import Objective
from openxlstm.train.recipe import LossRecipe

W, B, T = 11, 6, 7
BYTES_OF = torch.tensor([1] * 8 + [3, 2, 0])  # the last id ends documents and stands for no byte
KINDS = ("xlstm", "tied", "large")


def model(kind: str = "xlstm") -> nn.Module:
    torch.manual_seed(3)
    if kind == "large":
        return xLSTMLarge(xLSTMLargeConfig(vocab_size=W, width=16, blocks=2, heads=2, logit_soft_cap=2.0)).double()
    return xLSTM(xLSTMConfig(vocab_size=W, width=16, heads=2, pattern="ms", tie_embeddings=kind == "tied")).double()


def rows() -> Rows:
    """Six rows; one has a single target, two have none, one holds a document's end."""
    draw = np.random.default_rng(1)
    tokens, targets = draw.integers(0, W, (2, B, T))
    valid = draw.random((B, T)) < 0.7
    valid[1] = False
    valid[1, 2] = True
    valid[4:] = False
    targets[0, 3], valid[0, 3] = W - 1, True
    return Rows.of(Batch(tokens, targets, draw.random((B, T)) < 0.2, valid), torch.device("cpu"))


def arguments(part: Rows, scale: Tensor) -> tuple[Tensor, ...]:
    return part.tokens, part.targets, part.reset, part.valid, BYTES_OF, scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batch", [1, 2, 6])
@pytest.mark.parametrize("recompute", [False, True])
def test_it_is_the_cross_entropy_of_the_batch_in_any_portions(kind: str, micro_batch: int, recompute: bool) -> None:
    net, batch = model(kind), rows()
    logits, _ = net(batch.tokens, reset=batch.reset)
    want = F.cross_entropy(logits[batch.valid], batch.targets[batch.valid])
    wanted = torch.autograd.grad(want, tuple(net.parameters()))
    objective = Objective(net, LossRecipe(chunk=5, recompute=recompute))
    scale, sums = 1 / batch.valid.sum().double(), torch.zeros(5, dtype=torch.float64)
    for part in batch.split(micro_batch):
        loss, portion, _ = objective(*arguments(part, scale))
        loss.backward()
        sums += portion
    for (name, weight), gradient in zip(net.named_parameters(), wanted):
        torch.testing.assert_close(
            weight.grad, gradient, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )
    score = Score.of(sums)
    assert math.isclose(score.loss, want.item(), rel_tol=1e-12)
    assert (score.tokens, score.bytes) == (int(batch.valid.sum()), int((BYTES_OF[batch.targets] * batch.valid).sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_token_nats_are_those_of_the_logits(kind: str) -> None:
    net, batch = model(kind), rows()
    logits, end = net(batch.tokens, reset=batch.reset)
    want = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none") * batch.valid
    nats, state = Objective(net).token_nats(batch.tokens, batch.targets, batch.reset, batch.valid)
    torch.testing.assert_close(nats, want.detach(), rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, state.tensors(), end.tensors()))
    assert not nats.requires_grad


def test_end_tokens_and_masked_targets_stand_for_no_byte() -> None:
    """Bits per byte by hand: the targets of bytes alone, in nats and in bytes."""
    batch = rows()
    nats, _ = Objective(model()).token_nats(batch.tokens, batch.targets, batch.reset, batch.valid)
    _, sums, _ = Objective(model())(*arguments(batch, torch.tensor(1.0)))
    counted = batch.valid & (batch.targets != W - 1)
    assert int(counted.sum()) < int(batch.valid.sum()), "there is an end token among the targets"
    score = Score.of(sums)
    want = nats[counted].sum() / math.log(2) / BYTES_OF[batch.targets[counted]].sum()
    assert math.isclose(score.bits_per_byte, want.item(), rel_tol=1e-12)


def test_the_z_loss_is_minimised_and_not_reported() -> None:
    batch, net = rows(), model()
    losses, scores = [], []
    for z_loss in (0.0, 0.1):
        loss, sums, _ = Objective(net, LossRecipe(z_loss=z_loss))(*arguments(batch, torch.tensor(0.5)))
        losses.append(2 * loss.item())
        scores.append(Score.of(sums))
    assert scores[0].loss == scores[1].loss
    assert math.isclose(losses[1] - losses[0], scores[1].z, rel_tol=1e-12)
    logits, _ = net(batch.tokens, reset=batch.reset)
    want = 0.1 * logits.logsumexp(-1).square()[batch.valid].sum()
    assert math.isclose(scores[1].z, want.item(), rel_tol=1e-12)


def test_a_prefix_and_its_state_are_the_whole() -> None:
    batch, objective = rows(), Objective(model())
    whole, _ = objective.token_nats(batch.tokens, batch.targets, batch.reset, batch.valid)
    parts, state = [], None
    for columns in (slice(0, 3), slice(3, T)):
        cut = [part[:, columns] for part in (batch.tokens, batch.targets, batch.reset, batch.valid)]
        nats, state = objective.token_nats(*cut, state)
        parts.append(nats)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["xlstm", "large"])
def test_under_autocast_the_islands_are_fp32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates, states, the insides of norms, losses; while products do run in bf16."""
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str, *tensors: Tensor) -> None:
        seen.setdefault(name, set()).update(tensor.dtype for tensor in tensors)

    def watched_mlstm(q, k, v, i, f, state=None, **options):
        h, after = mlstm(q, k, v, i, f, state, **options)
        note("gates", i, f)
        note("products", q, v)
        note("states", *after.tensors())
        return h, after

    def watched_slstm(gates, R, b, state=None, **options):
        h, after = slstm(gates, R, b, state, **options)
        note("gates", gates)
        note("states", *after.tensors())
        return h, after

    def watched(norm, name):
        def run(x, *rest, **options):
            note(name, x)
            return norm(x, *rest, **options)

        return run

    mlstm, slstm = kernels.mlstm, kernels.slstm
    monkeypatch.setattr(kernels, "mlstm", watched_mlstm)
    monkeypatch.setattr(kernels, "slstm", watched_slstm)
    monkeypatch.setattr(F, "layer_norm", watched(F.layer_norm, "norms"))
    monkeypatch.setattr(F, "rms_norm", watched(F.rms_norm, "norms"))
    net, batch = model(kind).float(), rows()
    objective = Objective(net)
    with torch.autocast("cpu", torch.bfloat16):
        loss, sums, state = objective(*arguments(batch, torch.tensor(1.0)))
        logits, _ = net(batch.tokens, reset=batch.reset)
    loss.backward()
    note("logits and loss", logits, loss)
    note("states", *state.tensors())
    note("gradients", *(weight.grad for weight in net.parameters()))
    assert seen.pop("products") == {torch.bfloat16}, "or nothing was tested"
    assert seen == {name: {torch.float32} for name in ("gates", "states", "norms", "logits and loss", "gradients")}
    with torch.no_grad():
        exact, _ = Objective(model(kind)).token_nats(batch.tokens, batch.targets, batch.reset, batch.valid)
    assert abs(Score.of(sums).nats - exact.sum().item()) < 0.02 * exact.sum().item()
    assert any(isinstance(part, LayerNorm | RMSNorm | HeadNorm) for part in net.modules())
