"""Run by test_mlstm.py in its own process: every kernel of the mLSTM compiled without a GPU, one JSON line each."""

from __future__ import annotations

import json
import sys
from functools import partial

import torch
from ahead_of_time import build

from openxlstm.kernels.triton import mlstm_backward, mlstm_forward
from openxlstm.kernels.triton.mlstm import LAUNCH, Plan

OPERANDS = {"p_q", "p_k", "p_v", "p_i", "p_f", "p_x", "p_y", "p_dh", "p_h", "p_dq", "p_dk", "p_dv", "p_di", "p_df"}
STORED = {"p_states", "p_other", "p_rest"}


def type_of(name: str, dtype: str) -> str:
    special = {"p_reset": "*u8", "p_mask": "*u8", "p_segment": "*i32"}
    return special.get(name, f"*{dtype}" if name in OPERANDS | STORED else "*fp32")


def main() -> None:
    arch, *shapes = sys.argv[1:]
    f, b = mlstm_forward, mlstm_backward
    kernels = (f.gates, f.sweep, f.sweep, f.output, b.row_dot, b.dq, b.dk, b.dv, b.dgates)
    for dtype, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for K, V in (map(int, shape.split("x")) for shape in shapes):
            plan = Plan.of(K, V, kind, None)
            for index, kernel in enumerate(kernels):
                known = dict(
                    K=K, V=V, L=plan.L, TILE_K=plan.TILE_K, TILE_V=plan.TILE_V, EXP=True, RESET=True, MASK=True,
                    NORMALISED=True, IEEE=dtype == "fp32", REVERSE=index == 2, REST=dtype == "bf16",
                )  # fmt: skip
                constants = {name: value for name, value in known.items() if name in kernel.arg_names}
                options = {"num_warps": 1} if index == 0 else {"num_warps": 4} if index in (4, 8) else LAUNCH
                facts = {"kernel": kernel.fn.__name__, "dtype": dtype, "K": K, "V": V}
                print(
                    json.dumps(facts | build(kernel, partial(type_of, dtype=dtype), constants, int(arch), options)),
                    flush=True,
                )


if __name__ == "__main__":
    main()
