"""Builds the native CPU kernels when the package is installed, if there is a C++ compiler; without one it goes on.

Everything else about the package is in pyproject.toml. The library has a plain C interface, so one build serves every
version of Python and of torch. Each kernel source is compiled once per instruction set; the choice is made at run time.
"""

import os
import platform
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("openxlstm/kernels/cpu/csrc")
KERNELS = ("slstm", "mlstm_step", "mlstm_forward", "mlstm_backward", "decode", "product", "project", "norms")
# -ffast-math is not among these: it would flush denormals in the whole process, and it forgets infinities and NaN.
FLAGS = [
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-Wno-psabi",
]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
ISAS = {"baseline": (4, []), "avx2": (8, AVX2), "avx512": (16, AVX512)} | {
    "avx512_bf16": (16, [*AVX512, "-mavx512bf16", "-mavx512vnni"]),  # products of bf16 pairs and of int8 quadruples
    "amx": (16, [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"]),  # of bf16 matrices
}


def kernels(isa: str) -> tuple[str, ...]:
    """What is compiled for an instruction set: for AMX only what consists of products of matrices."""
    return ("mlstm_forward", "mlstm_backward") if isa == "amx" else KERNELS


class BuildNative(build_ext):
    """Compiles the library with the compiler that $CXX names, g++ or clang++. Failing is a sentence, not an error."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # no suffix of a Python version: it is no module of Python

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        work = Path(self.build_temp)
        for folder in (target.parent, work):
            folder.mkdir(parents=True, exist_ok=True)
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        said = []
        for compiler in compilers:
            for openmp in (["-fopenmp"], []):  # without OpenMP every call runs on one thread
                try:
                    self.compile_and_link(compiler, openmp, work, target)
                    return
                except (OSError, subprocess.CalledProcessError) as error:
                    said.append(f"{compiler}: {error}")
        print(
            "openxlstm: the native CPU kernels were not built, PyTorch serves instead:", *said, sep="\n  ", flush=True
        )

    def compile_and_link(self, compiler: str, openmp: list[str], work: Path, target: Path) -> None:
        isas = ISAS if platform.machine() in ("x86_64", "AMD64") else {"baseline": ISAS["baseline"]}
        jobs = [(work / "abi.o", SOURCES / "abi.cpp", [])]
        for isa, (lanes, flags) in isas.items():
            chosen = [f"-DXL_ISA=xl_{isa}", f"-DXL_LANES={lanes}", *flags]
            jobs += [(work / f"{kernel}-{isa}.o", SOURCES / f"{kernel}.cpp", chosen) for kernel in kernels(isa)]
        for output, source, flags in jobs:
            self.call(compiler, *FLAGS, *openmp, *flags, "-c", str(source), "-o", str(output))
        scratch = target.with_suffix(".tmp")
        self.call(compiler, "-shared", *openmp, *(str(output) for output, _, _ in jobs), "-o", str(scratch))
        scratch.replace(target)  # a process that has the old library mapped keeps it

    def call(self, *command: str) -> None:
        subprocess.run(command, check=True)


class AnyPython(bdist_wheel):
    """Names the wheel after its platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("openxlstm.kernels.cpu._openxlstm", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
