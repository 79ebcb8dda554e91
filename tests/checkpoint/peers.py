"""Small models of the installed peers with every mechanism awake, as black boxes to compare with."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from openxlstm.checkpoint.targets import to_yaml

W = 31


def awake(model, spread=0.2):
    """Every parameter random, around what the peer draws; a shipped initialisation hides mistakes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * spread
    return model.eval().requires_grad_(False)


def nx_config(
    pattern="msm", D=64, H=4, J=4, P=4, factor=2.0, bias=False, ffn_bias=False, tied=False, group_norm=True, **changes
):
    """A config of NX-AI's xlstm, in its own classes."""
    nx = pytest.importorskip("xlstm")
    at = [index for index, kind in enumerate(pattern) if kind == "s"]
    mlstm = nx.mLSTMLayerConfig(conv1d_kernel_size=J, qkv_proj_blocksize=P, num_heads=H, proj_factor=factor)
    slstm = nx.sLSTMLayerConfig(backend="vanilla", num_heads=H, conv1d_kernel_size=J, group_norm_weight=group_norm)
    ffn = nx.FeedForwardConfig(proj_factor=1.3, act_fn="gelu", bias=ffn_bias)
    return nx.xLSTMLMModelConfig(
        mlstm_block=nx.mLSTMBlockConfig(mlstm=mlstm) if "m" in pattern else None,
        slstm_block=nx.sLSTMBlockConfig(slstm=slstm, feedforward=ffn) if at else None,
        context_length=80, num_blocks=len(pattern), embedding_dim=D, slstm_at=at, vocab_size=W, bias=bias,
        tie_weights=tied, **changes,
    )  # fmt: skip


def nx_model(**options):
    """A model of NX-AI's xlstm and its config as plain data."""
    config = nx_config(**options)
    return awake(pytest.importorskip("xlstm").xLSTMLMModel(config)), dataclasses.asdict(config)


def save_nx(model, config, folder):
    """The folder that `xlstm convert --to nxai` would write, made from the peer's own state dict."""
    folder.mkdir(parents=True)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LARGE = {"embedding_dim": 128, "num_heads": 2, "num_blocks": 2, "vocab_size": W}
NATIVE = {
    "chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native",
    "step_kernel": "native", "mode": "inference", "return_last_states": True, "chunk_size": 16,
    "autocast_kernel_dtype": "float32",
}  # fmt: skip


def large_model(**options):
    """A model of NX-AI's xlstm_large and the facts of its config."""
    large = pytest.importorskip("xlstm.xlstm_large.model")
    facts = LARGE | options
    return awake(large.xLSTMLarge(large.xLSTMLargeConfig(**facts, **NATIVE)), 0.1), facts


def save_large(tensors, facts, folder, shards=1):
    """A folder as NX-AI's `load_from_pretrained` reads it: config.yaml, one file or model_0, model_1, ..."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(facts))
    names = sorted(tensors)
    for number in range(shards):
        part = {name: tensors[name].clone().contiguous() for name in names[number::shards]}
        save_file(part, folder / ("model.safetensors" if shards == 1 else f"model_{number}.safetensors"))
    return folder


def fused(tensors):
    """The same weights as `weight_mode: fused` stores them, built by exact names."""
    new = dict(tensors)
    for name in tensors:
        if name.endswith("mlstm_layer.q.weight"):
            layer, block = name.removesuffix("q.weight"), name.removesuffix("mlstm_layer.q.weight")
            for to, parts in (
                (f"{layer}qkv_opreact.weight", [f"{layer}{p}.weight" for p in ("q", "k", "v", "ogate_preact")]),
                (f"{layer}ifgate_preact.weight", [f"{layer}{p}.weight" for p in ("igate_preact", "fgate_preact")]),
                (f"{layer}ifgate_preact.bias", [f"{layer}{p}.bias" for p in ("igate_preact", "fgate_preact")]),
                (f"{block}ffn.proj_up_gate_z.weight", [f"{block}ffn.{p}.weight" for p in ("proj_up_gate", "proj_up")]),
            ):
                new[to] = torch.cat([new.pop(part) for part in parts])
    return new


def hf_model(**options):
    """A model of transformers' own xLSTM."""
    transformers = pytest.importorskip("transformers")
    facts = {"hidden_size": 128, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": W, "chunk_size": 16} | options
    return awake(transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**facts)), 0.1)


def relative(got, want):
    """Largest difference on the scale of what is wanted."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())


def greedy(model, tokens, steps):
    """The tokens that a model continues with, computed from the whole text each time."""
    for _ in range(steps):
        out = model(tokens)
        logits = out[0] if isinstance(out, tuple) else getattr(out, "logits", out)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    return tokens
