"""What compiled_mlstm.py and compiled_recurrent.py share: a kernel compiled for a GPU that is not there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def build(kernel, type_of: Callable[[str], str], constants: dict, arch: int, options: dict) -> dict:
    """Registers, stack and shared memory, and whether it uses the matrix units of Hopper, from the compiler's report.

    `type_of` gives a pointer's type by its name. Arguments are as aligned as a launch would find them.
    """
    types, constexprs, attrs = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        if name in constants:
            types[name], constexprs[(index,)] = "constexpr", constants[name]
            continue
        types[name] = type_of(name) if name.startswith("p_") else "fp32" if name in ("eps", "scale") else "i32"
        if not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment:
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
