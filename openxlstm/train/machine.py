"""What a run finds: the device, whether bf16 is worth using on it, and the versions that produced a number."""

import os
import platform
import shutil
import sys
from importlib import metadata
from typing import Any, Literal

import numpy
import torch


def device() -> torch.device:
    """The accelerator, if PyTorch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(wanted: Literal["auto", "fp32", "bf16", "fp64"], device: torch.device) -> Literal["fp32", "bf16", "fp64"]:
    """What the matrix products are computed in. Parameters, gradients, states and the loss are fp32 at least.

    Raises:
        ValueError: bf16 was asked for and this processor only emulates it, which is slower than fp32.
    """
    if wanted in ("fp32", "fp64"):
        return wanted
    if _has_bf16(device):
        return "bf16"
    if wanted == "bf16":
        raise ValueError(
            'train.precision = "bf16" needs bf16 instructions (avx512_bf16 or amx; on a GPU, Ampere or newer), which'
            f' this {device.type} has not; "auto" uses them where they are, "fp32" works everywhere'
        )
    return "fp32"


def check_compiler(device: torch.device) -> None:
    """Compiled training on a CPU is C++ that is built when the first step runs.

    Raises:
        ValueError: there is no C++ compiler where PyTorch looks for one.
    """
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(name) is None:
        raise ValueError(
            f"train.compile = true needs a C++ compiler, and there is no {name!r} here; install one, or name yours in"
            " the environment variable CXX, or leave train.compile out"
        )


def describe(device: torch.device) -> dict[str, Any]:
    """Machine and versions, for the run folder: bits repeat only where all of these are equal."""
    on_gpu = device.type == "cuda"
    return {
        "openxlstm": metadata.version("openxlstm") if _installed("openxlstm") else "source tree",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
    }


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # PyTorch says this under private names only; both exist from 2.11 to 2.13.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
