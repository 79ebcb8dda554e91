"""Other people's mLSTM kernels, as functions of our arguments. Optional: what is not installed is not compared.

`mlstm_kernels` is under the NXAI Community License: it is run as an installed black box and nothing else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CHUNKS = (64, 128)  # the lengths at which the peer's native kernels were fastest (docs/log.md)


def native_mlstm_kernels() -> dict[str, Callable[..., Tensor]]:
    """Every chunkwise kernel of `mlstm_kernels` that runs on a CPU: name -> function of q, k, v, i, f as [B,H,T,*].

    Names are the package's, less `chunkwise--native_`. Empty if the package is not installed. Its parallel kernels
    hold T x T matrices and are left out: at T = 512 they take four times as long as its chunkwise ones.
    """
    if importlib.util.find_spec("mlstm_kernels") is None or importlib.util.find_spec("einops") is None:
        return {}
    registry = importlib.import_module("mlstm_kernels.torch")
    found: dict[str, Callable[..., Tensor]] = {}
    for name in registry.get_available_mlstm_kernels():
        if name.startswith("chunkwise--native"):
            for chunk in CHUNKS:
                found[f"{name.removeprefix('chunkwise--native_')} L={chunk}"] = _call(
                    registry.get_mlstm_kernel(name), chunk
                )
    return found


def _call(kernel: Callable[..., Tensor], chunk: int) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        return kernel(q, k, v, i, f, chunk_size=chunk)

    return run


def nx_model(folder: str) -> nn.Module:
    """The language model of `xlstm` from a folder of `xlstm convert --to nxai`: its own config classes and weights."""
    yaml, dacite = importlib.import_module("yaml"), importlib.import_module("dacite")
    nx = importlib.import_module("xlstm")
    said = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
    model = nx.xLSTMLMModel(dacite.from_dict(nx.xLSTMLMModelConfig, said))
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    assert isinstance(model, nn.Module), "the peer's model is a torch module"
    return model


def vanilla_slstm(gates: Tensor, R: Tensor, b: Tensor) -> tuple[Callable[[], Tensor], list[Tensor]] | None:
    """The plain PyTorch cell of `xlstm` on gates [B,T,4,H,K]: its forward as h [B,T,H,K], and what it differentiates.

    None if the package is not installed. Its cell takes [B,T,4 D], keeps R as [H,4 K,K] and gives [B,H,T,K].
    """
    if importlib.util.find_spec("xlstm") is None:
        return None
    module = importlib.import_module("xlstm.blocks.slstm.cell")
    H, K = gates.shape[-2:]
    config = module.sLSTMCellConfig(hidden_size=H * K, num_heads=H, backend="vanilla", function="slstm")
    cell = module.sLSTMCell(config)
    with torch.no_grad():
        cell._recurrent_kernel_.copy_(R.permute(0, 2, 3, 1).reshape(cell._recurrent_kernel_.shape))
        cell._bias_.copy_(b.flatten())
    x = gates.detach().flatten(2).requires_grad_()
    return lambda: cell(x)[0].transpose(1, 2), [x, cell._recurrent_kernel_, cell._bias_]
