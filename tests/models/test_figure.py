"""Each block against its paper's figure, written out a second time: plain sums, the cells' definition, no modules.

The code under test is read for its parameters' names only, so a swapped pair of gates or halves cannot hide.
"""

import math

import torch
from models.small_models import build, build_stack, tokens

from openxlstm.cells import mlstm, slstm

close = {"rtol": 1e-10, "atol": 1e-10}


def layer_norm(x, eps):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


def silu(x):
    return x / (1 + torch.exp(-x))


def heads_of(x, H):
    return x.reshape(*x.shape[:2], H, -1)


def blockwise(x, weight):
    """One small matrix per contiguous part of x."""
    parts = x.split(weight.shape[1], dim=-1)
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, weight, strict=True)], dim=-1)


def convolved(x, p):
    """y_t = bias + sum over j of w[:, J-1-j] x_{t-j}, then silu."""
    w, J = p["conv.weight"], p["conv.weight"].shape[1]
    y = torch.zeros_like(x) + p["conv.bias"]
    for t in range(x.shape[1]):
        for j in range(min(J, t + 1)):
            y[:, t] += w[:, J - 1 - j] * x[:, t - j]
    return silu(y)


def test_the_block_of_matrix_memory_is_figure_11():
    block = build_stack().blocks[0]
    p = dict(block.named_parameters())
    x = torch.randn(2, 7, 12, dtype=torch.float64)

    xi = layer_norm(x, 1e-5) * p["norm.weight"]
    up = xi @ p["up.weight"].T
    xu, z = up[..., :24], up[..., 24:]
    c = convolved(xu, p)
    q, k, v = blockwise(c, p["q.weight"]), blockwise(c, p["k.weight"]), blockwise(xu, p["v.weight"])
    qkv = torch.cat((q, k, v), -1)
    i, f = (qkv @ p[f"gate_{g}.weight"].T + p[f"gate_{g}.bias"] for g in "if")
    h, _ = mlstm.recurrent(*(heads_of(part, 3) for part in (q, k, v)), i, f)
    h = layer_norm(h, 1e-5).flatten(2) * p["head_norm.weight"]
    y = x + ((h + p["skip"] * c) * silu(z)) @ p["down.weight"].T

    torch.testing.assert_close(block(x, None, None, None)[0], y, **close)


def test_the_block_of_scalar_memory_is_figure_10():
    block = build_stack().blocks[1]
    p = dict(block.named_parameters())
    x = torch.randn(2, 7, 12, dtype=torch.float64)

    xi = layer_norm(x, 1e-5) * p["norm.weight"]
    c = convolved(xi, p)
    raw = {g: blockwise(c if g in "if" else xi, p[f"gate_{g}.weight"]) for g in "ifzo"}
    gates = torch.stack([heads_of(raw[g], 3) for g in "ifzo"], dim=2)
    h, _ = slstm.recurrent(gates, p["R"], p["b"])
    y = x + layer_norm(h, 1e-5).flatten(2) * p["head_norm.weight"]
    up = (layer_norm(y, 1e-5) * p["norm_ffn.weight"]) @ p["ffn_up.weight"].T
    gelu = up[..., :20] * 0.5 * (1 + torch.erf(up[..., :20] / math.sqrt(2)))
    y = y + (gelu * up[..., 20:]) @ p["ffn_down.weight"].T

    torch.testing.assert_close(block(x, None, None, None)[0], y, **close)


def test_the_large_model_is_its_recipe():
    model = build("xlstm_large")
    p = dict(model.named_parameters())
    ids = tokens(2, 7)

    def rms(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[name]

    x = p["backbone.embeddings.weight"][ids]
    for n in range(2):
        at = f"backbone.blocks.{n}."
        w = {name.removeprefix(at + "mlstm_layer."): value for name, value in p.items() if name.startswith(at)}
        g = rms(x, at + "norm_mlstm.weight")
        q, k, v = (heads_of(g @ w[f"{name}.weight"].T, 3) for name in "qkv")
        i, f = (15 * torch.tanh((g @ w[f"{x}gate_preact.weight"].T + w[f"{x}gate_preact.bias"]) / 15) for x in "if")
        h, _ = mlstm.recurrent(q, k, v, i, f)
        h = layer_norm(h, 1e-6).flatten(2) * w["multihead_norm.weight"]
        x = x + (torch.sigmoid(g @ w["ogate_preact.weight"].T) * h) @ w["out_proj.weight"].T
        g = rms(x, at + "norm_ffn.weight")
        up, gate = g @ p[at + "ffn.proj_up.weight"].T, silu(g @ p[at + "ffn.proj_up_gate.weight"].T)
        x = x + (gate * up) @ p[at + "ffn.proj_down.weight"].T
    logits = 30 * torch.tanh(rms(x, "backbone.out_norm.weight") @ p["lm_head.weight"].T / 30)

    torch.testing.assert_close(model(ids)[0], logits, **close)


def test_the_first_architecture_is_embedding_blocks_norm_head():
    model = build("xlstm")
    ids = tokens(2, 7)
    x = model.embedding.weight[ids]
    for block in model.stack.blocks:
        x, _ = block(x, None, None, None)
    x = layer_norm(x, 1e-5) * model.stack.norm.weight
    torch.testing.assert_close(model(ids)[0], x @ model.head.weight.T, **close)


def test_state_dict_of_the_large_model_has_the_published_names():
    """A file of xLSTM-7B must load without renaming."""
    names = {
        name.replace("blocks.0.", "blocks.N.") for name in build("xlstm_large").state_dict() if "blocks.1." not in name
    }
    layer = {f"mlstm_layer.{part}.weight" for part in ("q", "k", "v", "ogate_preact", "multihead_norm", "out_proj")}
    layer |= {f"mlstm_layer.{gate}_preact.{kind}" for gate in ("igate", "fgate") for kind in ("weight", "bias")}
    layer |= {f"ffn.{part}.weight" for part in ("proj_up_gate", "proj_up", "proj_down")}
    layer |= {"norm_mlstm.weight", "norm_ffn.weight"}
    ends = {"backbone.embeddings.weight", "backbone.out_norm.weight", "lm_head.weight"}
    assert names == {f"backbone.blocks.N.{name}" for name in layer} | ends
