"""Generation over length: forks that feel nothing of one another, and a plan that can be timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openxlstm.experiments import contestants, generation
from openxlstm.experiments.catalogue import EXPERIMENTS

PLAN = EXPERIMENTS["generation"].profiles["smoke"]


@pytest.mark.parametrize("name", ["ms", "llama"])
def test_a_fork_has_read_the_same_and_goes_on_alone(name: str) -> None:
    model, _, _ = contestants.enter(name, PLAN.sizes, "ms", 1)
    whole, forked = (generation._entrant(name, model.eval()) for _ in range(2))
    tokens = torch.randint(1, 100, (20, 1))
    for token in tokens[:10]:
        whole.step(token)
        forked.step(token)
    fork, before = forked.fork(), forked.nbytes
    for token in tokens[10:]:
        forked.step(token + 100)  # what the fork must not feel
        assert torch.equal(fork.step(token), whole.step(token))
    assert fork.nbytes == whole.nbytes
    assert (fork.nbytes == before) == (name == "ms")  # constant, or growing


def test_what_is_kept_and_timed_is_there_for_every_length() -> None:
    plan = replace(PLAN, lengths=(8, 12, 20), timed=8, turns=2)
    for name in ("ms", "llama"):
        metrics = generation.run(plan, name, 1)["metrics"]
        assert {f"ms at {length}" for length in plan.lengths} < set(metrics)
        kept = [metrics[f"MiB kept at {length}"].value for length in plan.lengths]
        if name == "llama":  # keys and values of what was read
            assert kept == pytest.approx([kept[0] * length / 8 for length in plan.lengths])
        else:
            assert kept[0] == kept[-1] > 0
    with pytest.raises(ValueError, match="lstm-block is not timed: patterns and llama are"):
        generation._entrant("lstm-block", None)


def test_a_plan_that_cannot_be_timed_says_why() -> None:
    with pytest.raises(ValueError, match="timed=64 must be a multiple of turns=5"):
        replace(PLAN, turns=5)
    with pytest.raises(ValueError, match=r"lengths=\(32, 256\) must rise, and the first be at least timed=64"):
        replace(PLAN, lengths=(32, 256))
