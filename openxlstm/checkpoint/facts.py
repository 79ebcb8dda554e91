"""What the names and shapes of foreign tensors say about a model, before any config is believed.

D model width, U_m and U_f inner widths, H heads, K head width, J taps, P width of the blocks of q, k, v, W vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from openxlstm.checkpoint.rules_nx import STACK, Backend, Variant
from openxlstm.checkpoint.sources import Source
from openxlstm.models.xlstm import xLSTMConfig, xLSTMStackConfig


def of_nx(source: Source) -> tuple[xLSTMStackConfig, Variant]:
    """A model of NX-AI's xlstm: an xLSTMConfig, or an xLSTMStackConfig of a bare block stack; and how it is stored.

    Raises:
        ValueError: blocks that no model of this library can have beside each other, or a part that is missing.
    """
    shapes = {name: entry.shape for name, entry in source.entries.items()}
    stack = STACK if any(name.startswith(STACK) for name in shapes) else ""
    found = Shapes(shapes, f"{stack}blocks.", str(source.path))
    pattern = "".join("s" if found.has(index, "xlstm.slstm_cell._recurrent_kernel_") else "m" for index in found.blocks)
    m, s = (next((index for index in found.blocks if pattern[index] == kind), None) for kind in "ms")
    heads, taps, sizes, backend = {}, {}, {}, "vanilla"
    if m is not None:
        heads["mLSTM"] = found.size(m, "xlstm.mlstm_cell.igate.weight", 0)
        taps["mLSTM"] = found.size(m, "xlstm.conv1d.conv.weight", -1) if found.has(m, CONV) else 0
        sizes["mlstm_width"] = found.size(m, "xlstm.proj_up.weight", 0) // 2
        sizes["proj_block"] = found.size(m, "xlstm.q_proj.weight", -1)
    if s is not None:
        heads["sLSTM"] = found.size(s, "xlstm.slstm_cell._recurrent_kernel_", 0)
        taps["sLSTM"] = found.size(s, "xlstm.conv1d.conv.weight", -1) if found.has(s, CONV) else 0
        if not found.has(s, "ffn.proj_up.weight"):
            raise ValueError(f"{source.path}: block {s} has no feed-forward layer (feedforward: null); ours always do")
        sizes["ffn_width"] = found.size(s, "ffn.proj_up.weight", 0) // 2
        backend = _backend(found, s)
    for what, kinds in (("heads", heads), ("convolution taps", taps)):
        if len(set(kinds.values())) > 1:
            raise ValueError(
                f"{source.path}: mLSTM blocks have {kinds['mLSTM']} {what} and sLSTM blocks {kinds['sLSTM']}; in this "
                f"library both have the same number"
            )
    variant = Variant(
        backend="cuda" if backend == "cuda" else "vanilla",
        stack=stack,
        mlstm_bias=m is not None and found.has(m, "xlstm.proj_up.bias"),
        ffn_bias=s is not None and found.has(s, "ffn.proj_up.bias"),
        group_norm=s is None or found.has(s, "xlstm.group_norm.weight"),
    )
    known: dict[str, Any] = {
        "width": found.size(0, "xlstm_norm.weight", 0), "pattern": pattern, **sizes,
        "heads": next(iter(heads.values())), "conv": next(iter(taps.values())),
        "bias": variant.mlstm_bias or variant.ffn_bias,
    }  # fmt: skip
    if f"{stack}post_blocks_norm.weight" not in shapes:
        raise ValueError(f"{source.path} lacks {stack}post_blocks_norm.weight (add_post_blocks_norm: false); this "
                         f"library's models always have that norm")  # fmt: skip
    if "token_embedding.weight" in shapes:
        return xLSTMConfig(**known, vocab_size=found.rows("token_embedding.weight")), variant
    return xLSTMStackConfig(**known), variant


CONV = "xlstm.conv1d.conv.weight"


def _backend(found: Shapes, index: int) -> Backend:
    """vanilla [H, 4K, K] or cuda [H, K, 4K], which are never equal."""
    name = "xlstm.slstm_cell._recurrent_kernel_"
    _, rows, columns = (found.size(index, name, axis) for axis in range(3))
    if rows == 4 * columns:
        return "vanilla"
    if columns == 4 * rows:
        return "cuda"
    raise ValueError(f"{found.where}: block {index} has {name} of [_, {rows}, {columns}]; one of the two must be 4 "
                     f"times the other")  # fmt: skip


def of_large(source: Source, embedding: str) -> tuple[dict[str, int], bool]:
    """The sizes of a model of the 7B architecture, by our names; and whether its matrices are fused.

    Raises:
        ValueError: a tensor that every such model has is missing.
    """
    found = Shapes({name: entry.shape for name, entry in source.entries.items()}, "backbone.blocks.", str(source.path))
    W, D = found.rows(embedding), found.size(0, "norm_mlstm.weight", 0)
    is_fused = found.has(0, "mlstm_layer.qkv_opreact.weight")
    HV = found.size(0, "mlstm_layer.out_proj.weight", 1)
    if is_fused:
        QK = found.size(0, "mlstm_layer.qkv_opreact.weight", 0) // 2 - HV
        H = found.size(0, "mlstm_layer.ifgate_preact.weight", 0) // 2
    else:
        QK, H = found.size(0, "mlstm_layer.q.weight", 0), found.size(0, "mlstm_layer.igate_preact.weight", 0)
    U_f = found.size(0, "ffn.proj_down.weight", 1)
    sizes = {"vocab_size": W, "width": D, "blocks": len(found.blocks), "heads": H, "qk_width": QK, "v_width": HV}
    return sizes | {"ffn_width": U_f}, is_fused


def equal(source: Source, first: str, second: str) -> bool:
    """Whether two tensors of a file are the same numbers."""
    one, other = source.entries[first], source.entries[second]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.read(), other.read())


class Shapes:
    """Shapes of a file by block and name, with sentences for what is missing."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], prefix: str, where: str):
        self.shapes, self.where, self._prefix = shapes, where, prefix
        self.blocks = range(_count_blocks(shapes, prefix, where))

    def has(self, index: int, name: str) -> bool:
        """Whether the block has this tensor."""
        return f"{self._prefix}{index}.{name}" in self.shapes

    def size(self, index: int, name: str, axis: int) -> int:
        """One size of a tensor of a block.

        Raises:
            ValueError: it is missing, or has too few axes.
        """
        return self._size(f"{self._prefix}{index}.{name}", axis)

    def rows(self, name: str) -> int:
        """The first size of a tensor outside the blocks, by its full name.

        Raises:
            ValueError: it is missing, or has no axis.
        """
        return self._size(name, 0)

    def _size(self, full: str, axis: int) -> int:
        if full not in self.shapes:
            raise ValueError(f"{self.where} lacks {full!r}, so the model would be incomplete")
        shape = self.shapes[full]
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"{self.where}: {full} has shape {list(shape)}, which is no shape of this tensor")
        return shape[axis]


def _count_blocks(names: Iterable[str], prefix: str, where: str) -> int:
    """How many blocks there are; numbers without a gap."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {int(match[1]) for name in names if (match := pattern.match(name))}
    if not numbers:
        raise ValueError(f"{where} has no tensor {prefix}0.*; a model has at least one block")
    if missing := sorted(set(range(max(numbers))) - numbers):
        raise ValueError(f"{where} has a block {max(numbers)} but no block {missing[0]}")
    return len(numbers)
