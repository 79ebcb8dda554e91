"""Run by test_recurrent.py in a process of its own: every kernel of the sLSTM and of the step, compiled without a GPU.

Prints one JSON line per configuration: registers, stack (spills) and shared memory, from the compiler's own report.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from ahead_of_time import build

from openxlstm.kernels.triton import mlstm_step, slstm

FLAGS = {"EXP_FORGET": False, "RESET": True, "MASK": True}


def types(dtype: str, fp32: set[str]) -> Callable[[str], str]:
    """The type of a pointer by its name."""
    return lambda name: "*u8" if name in ("p_reset", "p_mask") else "*fp32" if name in fp32 else f"*{dtype}"


def main() -> None:
    states = {"p_states", "p_b", "p_raw", "p_G", "p_draw"}
    for arch in map(int, sys.argv[1:]):
        for dtype in ("bf16", "fp32"):
            for K in {"bf16": (64, 128, 192, 256), "fp32": (32, 192)}[dtype]:
                small, tile = slstm.plan(K, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
                constants = {"K": K, "TILE": tile, "ROWS": slstm.ROWS, **FLAGS}
                for kernel in (
                    slstm.forward_resident if small else slstm.forward_tiled,
                    slstm.backward_resident if small else slstm.backward_tiled,
                ):
                    given = constants | ({"DOUT": True} if "DOUT" in kernel.arg_names else {})
                    facts = {"kernel": kernel.fn.__name__, "arch": arch, "dtype": dtype, "K": K}
                    print(
                        json.dumps(facts | build(kernel, types(dtype, states), given, arch, slstm.LAUNCH)), flush=True
                    )
            for K, V in ((256, 512),):
                constants = {
                    "K": K, "V": V, "TILE_K": min(K, mlstm_step.TILE_K), "TILE_V": mlstm_step.TILE_V,
                    "INPUT_GATE": "exp", **FLAGS,
                }  # fmt: skip
                fp32 = {"p_i", "p_f", "p_C", "p_n", "p_m", "p_C_out", "p_n_out", "p_m_out"}
                facts = {"kernel": "step", "arch": arch, "dtype": dtype, "K": K}
                built = build(mlstm_step.step, types(dtype, fp32), constants, arch, {"num_warps": 4})
                print(json.dumps(facts | built), flush=True)


if __name__ == "__main__":
    main()
