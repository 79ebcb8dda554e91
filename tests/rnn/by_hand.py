"""Recurrent modules as loops over the definition: one sequence alone, one layer and one direction after the other."""

import torch
import torch.nn.functional as F

from openxlstm import rnn
from openxlstm.cells import mlstm, slstm
from openxlstm.rnn.layers import BlockLayer, sLSTMCell

MODULES = {"sLSTM": rnn.sLSTM, "mLSTM": rnn.mLSTM, "xLSTM": rnn.xLSTM}
D, U = 5, 6  # input and hidden width
close = {"rtol": 1e-10, "atol": 1e-10}


def build(kind, **options):
    """A small module in float64 with every parameter random: the papers' zeros would hide half of the mistakes."""
    options = {"heads": 2, **options}
    module = MODULES[kind](D, options.pop("hidden_size", U), **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    return module


def sequences(*lengths):
    """One [T, D] per length."""
    return [torch.randn(T, D, dtype=torch.float64) for T in lengths]


def module_by_hand(module, x):
    """y [T, width] and the last output of every layer and direction [S, width], for one sequence x [T, D]."""
    directions, last, y = 1 + module.bidirectional, [], x
    for index in range(0, len(module.layers), directions):
        outputs = [layer_by_hand(module.layers[index], y)]
        last.append(outputs[0][-1])
        if module.bidirectional:
            backward = layer_by_hand(module.layers[index + 1], y.flip(0))
            last.append(backward[-1])
            outputs.append(backward.flip(0))
        y = torch.cat(outputs, dim=-1)
    return y, torch.stack(last)


def layer_by_hand(layer, x):
    if isinstance(layer, BlockLayer):
        x = x if layer.inputs is None else x @ layer.inputs.weight.T + layer.inputs.bias
        for block in layer.blocks:
            x = block_by_hand(block, x)
        return x if layer.norm is None else norm(x, layer.norm.weight)
    y = cell_by_hand(layer.cell, x, x).flatten(-2)
    if layer.out_gate is not None:
        y = torch.sigmoid(x @ layer.out_gate.weight.T + layer.out_gate.bias) * y
    return y if layer.proj is None else y @ layer.proj.weight.T


def block_by_hand(block, x):
    xi = norm(x, block.norm.weight)
    c, taps = xi, block.conv.taps
    if taps:
        c = F.conv1d(F.pad(xi.T[None], (taps - 1, 0)), block.conv.weight[:, None], block.conv.bias, groups=xi.shape[1])
        c = F.silu(c[0].T)
    h = cell_by_hand(block.cell, xi, c)
    y = norm(h, torch.ones(h.shape[-1], dtype=h.dtype)).flatten(-2) * block.head_norm.weight
    if block.out is not None:
        y = block.out(torch.sigmoid(block.out_gate(xi)) * y)
    x = x + y
    gate, up = block.ffn_up(norm(x, block.norm_ffn.weight)).chunk(2, dim=-1)
    return x + block.ffn_down(F.gelu(gate) * up)


def cell_by_hand(cell, x, c):
    """h [T, H, K], a step of the definition at a time."""
    state, outputs = None, []
    for t in range(x.shape[0]):
        if isinstance(cell, sLSTMCell):
            gates = torch.cat((cell.W_if.weight @ c[t], cell.W_zo.weight @ x[t])).view(1, 4, cell.heads, -1)
            b = torch.zeros_like(gates[0]) if cell.b is None else cell.b
            h, state = slstm.step(gates, cell.R, b, state, forget_gate=cell.forget_gate)
        else:
            q, k, v = (
                linear(source).view(1, cell.heads, -1)
                for linear, source in ((cell.q, c[t]), (cell.k, c[t]), (cell.v, x[t]))
            )
            i, f = cell.W_if(c[t]).view(1, 2, cell.heads).unbind(1)
            h, state = mlstm.step(
                q, k, v, i, f, state, input_gate=cell.input_gate, forget_gate=cell.forget_gate, eps=cell.eps
            )
        outputs.append(h[0])
    return torch.stack(outputs)


def norm(x, weight):
    return F.layer_norm(x, weight.shape, weight, None, 1e-5)
