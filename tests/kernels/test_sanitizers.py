"""The native kernels under the address and undefined-behaviour sanitizers, on buffers of the exact size."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "openxlstm/kernels/cpu/csrc"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def setup_facts() -> tuple[Callable[[str], tuple[str, ...]], dict[str, tuple[int, list[str]]], list[str]]:
    """What setup.py compiles and how: the test follows it, so that no kernel is forgotten."""
    facts: dict[str, object] = {"__name__": "facts", "__file__": str(ROOT / "setup.py")}
    text = (ROOT / "setup.py").read_text().split("\nsetup(")[0]
    exec(compile(text, "setup.py", "exec"), facts)
    return facts["kernels"], facts["ISAS"], facts["FLAGS"]  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with its sanitizers")
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setup.py imports setuptools")
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    kernels, isas, flags = setup_facts()
    if platform.machine() != "x86_64":
        isas = {"baseline": isas["baseline"]}
    common = [*(flag for flag in flags if flag != "-O3"), "-O1", "-fopenmp", *SANITIZE, f"-I{SOURCES}"]
    jobs = [["abi.o", str(SOURCES / "abi.cpp")], ["driver.o", str(Path(__file__).with_name("sanitized.cpp"))]]
    for isa, (lanes, own) in isas.items():
        chosen = [f"-DXL_ISA=xl_{isa}", f"-DXL_LANES={lanes}", *own]
        jobs += [[f"{kernel}-{isa}.o", str(SOURCES / f"{kernel}.cpp"), *chosen] for kernel in kernels(isa)]

    def compile_one(job: list[str]) -> None:
        subprocess.run(["g++", *common, *job[2:], "-c", job[1], "-o", str(tmp_path / job[0])], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, jobs))
    program = tmp_path / "sanitized"
    objects = [str(tmp_path / job[0]) for job in jobs]
    subprocess.run(["g++", "-fopenmp", *SANITIZE, *objects, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:] or done.stdout
    assert done.stdout.endswith("clean\n")
    here = {int(number) for number in done.stdout.split()[:-1]}
    if missing := [isa for number, isa in enumerate(isas) if number not in here]:
        pytest.skip(f"clean, but this machine does not have {', '.join(missing)}")
