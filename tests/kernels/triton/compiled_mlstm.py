"""Run by test_mlstm.py in its own process: every kernel of the mLSTM compiled without a GPU, one JSON line each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from openxlstm.kernels.triton import mlstm_backward, mlstm_forward
from openxlstm.kernels.triton.mlstm import LAUNCH, Plan

OPERANDS = {"p_q", "p_k", "p_v", "p_i", "p_f", "p_x", "p_y", "p_dh", "p_h", "p_dq", "p_dk", "p_dv", "p_di", "p_df"}
STORED = {"p_states", "p_other"}
PLAIN = {"T", "N", "H", "eps", "scale", "tiles", "tiles_k"}  # not specialised


def build(kernel, dtype: str, constants: dict, arch: int, options: dict) -> dict:
    types, constexprs, attrs = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], constexprs[(index,)] = "constexpr", constants[name]
            continue
        if name.startswith("p_"):
            types[name] = f"*{dtype}" if name in OPERANDS | STORED else "*fp32"
            types[name] = {"p_reset": "*u8", "p_mask": "*u8", "p_segment": "*i32"}.get(name, types[name])
        else:
            types[name] = "fp32" if name in ("eps", "scale") else "i32"
        if name not in PLAIN | {"p_i", "p_f", "p_reset", "p_mask"} and not name.startswith(("s_i", "s_f")):
            attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=types, constexprs=constexprs, attrs=attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", report)}
    wgmma = "wgmma.mma_async" in binary.asm["ptx"]
    return {"registers": found["REG"], "stack": found["STACK"], "shared": binary.metadata.shared, "wgmma": wgmma}


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
                    NORMALISED=True, IEEE=dtype == "fp32", REVERSE=index == 2,
                )  # fmt: skip
                constants = {name: value for name, value in known.items() if name in kernel.arg_names}
                options = {"num_warps": 1} if index == 0 else {"num_warps": 4} if index in (4, 8) else LAUNCH
                facts = {"kernel": kernel.fn.__name__, "dtype": dtype, "K": K, "V": V}
                print(json.dumps(facts | build(kernel, dtype, constants, int(arch), options)), flush=True)


if __name__ == "__main__":
    main()
