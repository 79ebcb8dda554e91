"""Ten training steps of two tiny models in float64: how they are computed, and how the recorded ones were made.

python tests/golden/trajectory.py        writes the files again; see PROVENANCE.md before you do
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig

HERE = Path(__file__).parent
STEPS, BATCH, LENGTH = 10, 3, 37
MODELS = {
    "xlstm-1-1": lambda: xLSTM(
        xLSTMConfig(vocab_size=19, width=16, heads=2, pattern="ms", mlstm_width=24, ffn_width=20)
    ),
    "xlstm-large": lambda: xLSTMLarge(
        xLSTMLargeConfig(vocab_size=19, width=16, blocks=2, heads=2, qk_width=8, v_width=16, ffn_width=24)
    ),
}


def run(name: str, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """`losses` [10] and the first step's gradient of every parameter, from stored weights, tokens and flags."""
    model = MODELS[name]().double()
    model.load_state_dict({key.removeprefix("weight."): x for key, x in start.items() if key.startswith("weight.")})
    optimiser = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2, betas=(0.9, 0.95), fused=False)
    losses, gradients = [], {}
    for step in range(STEPS):
        tokens, reset, mask = (start[key][step] for key in ("tokens", "reset", "mask"))
        reset, mask = reset.bool(), mask.bool()
        logits, _ = model(tokens[:, :-1], reset=reset, mask=mask)
        nats = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = nats[mask].mean()
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            gradients = {f"gradient.{key}": x.grad.clone() for key, x in model.named_parameters() if x.grad is not None}
        optimiser.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **gradients}


def begin(name: str) -> dict[str, Tensor]:
    """Weights well away from their initialisation (where gates and memory mixing are silent), tokens and flags."""
    generator = torch.Generator().manual_seed(20261120)
    torch.manual_seed(20261120)
    weights = {key: x.double() for key, x in MODELS[name]().state_dict().items()}
    noisy = {
        f"weight.{key}": x + 0.2 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        for key, x in weights.items()
    }
    shape = (STEPS, BATCH, LENGTH)
    return {
        **noisy,
        "tokens": torch.randint(0, 19, (STEPS, BATCH, LENGTH + 1), generator=generator),
        "reset": (torch.rand(shape, generator=generator) < 0.1).to(torch.uint8),
        "mask": (torch.rand(shape, generator=generator) > 0.1).to(torch.uint8),
    }


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was stored: the start, and what came of it."""
    return load_file(HERE / f"{name}.start.safetensors"), load_file(HERE / f"{name}.result.safetensors")


if __name__ == "__main__":
    for name in MODELS:
        start = begin(name)
        save_file(start, HERE / f"{name}.start.safetensors")
        save_file(run(name, start), HERE / f"{name}.result.safetensors")
