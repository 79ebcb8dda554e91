"""What the GPUs that people rent can do at most: dense bf16 products per second, and memory, as their makers state it.

Peaks are without 2:4 sparsity, which doubles the figure that datasheets print first. Memory is the datasheet's, in
units of 10^9 bytes; a driver usually shows a few percent more. Only the variants named here: a PCIe or NVL card of
the same name has another peak, and a wrong MFU is worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from openxlstm.models.checks import did_you_mean


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator: `flops` per second in bf16, dense; `memory` in bytes; and how the driver spells its name."""

    name: str
    flops: float
    memory: int
    driver: str


GPUS = {
    # NVIDIA A100 datasheet (2021), SXM4 80 GB: 312 teraFLOPS bf16.
    "a100": Gpu("A100 SXM 80 GB", 312e12, 80 * 10**9, "A100"),
    # NVIDIA H100 datasheet (2022), SXM5: 1,979 teraFLOPS bf16 with sparsity, so 989.4 without; 80 GB.
    "h100": Gpu("H100 SXM 80 GB", 989.4e12, 80 * 10**9, "H100"),
    # NVIDIA H200 datasheet (2024), SXM: the same chip as H100; 141 GB.
    "h200": Gpu("H200 SXM 141 GB", 989.4e12, 141 * 10**9, "H200"),
    # NVIDIA HGX B200 (2024), 1,000 W: 4.5 petaFLOPS bf16 with sparsity, so 2.25 without; 180 GB of the 192 usable.
    "b200": Gpu("HGX B200 180 GB", 2250e12, 180 * 10**9, "B200"),
    # AMD Instinct MI300X datasheet (2023): 1,307.4 teraFLOPS bf16 without sparsity; 192 GB.
    "mi300x": Gpu("Instinct MI300X 192 GB", 1307.4e12, 192 * 10**9, "MI300X"),
}
OTHER_VARIANTS = ("PCIe", "NVL", "GB200")  # the same letters in the name, another peak


def gpu(name: str) -> Gpu:
    """A row of the table.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    if name not in GPUS:
        raise ValueError(f"gpu={name!r} is not known{did_you_mean(name, GPUS)}; known: {', '.join(GPUS)}")
    return GPUS[name]


def find(driver_name: str) -> Gpu | None:
    """The row of a device by the name its driver gives ("NVIDIA H100 80GB HBM3"), or None for any other device."""
    if any(other in driver_name for other in OTHER_VARIANTS):
        return None
    return next((row for row in GPUS.values() if row.driver in driver_name), None)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations per second of this device, or None where they are not known: a CPU, an unlisted GPU."""
    if device.type != "cuda":
        return None
    found = find(torch.cuda.get_device_name(device))
    return None if found is None else found.flops
