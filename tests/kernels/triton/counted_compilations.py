"""Run by test_compilations.py in its own process: how often new lengths and batches would compile a kernel anew.

The host code runs as it does on a GPU, on tensors without memory: Triton's own binder turns the arguments of every
launch into the key of its cache, for a device that is only named. What is replaced is what follows a miss (the
compiler) and what follows a hit (the launch). One JSON line per case: kernel -> keys seen.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from openxlstm.kernels.triton import mlstm, mlstm_backward, mlstm_forward, mlstm_step, slstm

LENGTHS = (2, 3, 15, 16, 17, 63, 64, 65, 80, 1000, 1024)
BATCHES = (1, 2, 3, 16, 17)
WIDTHS = ((64, 128), (48, 60), (5, 7))  # multiples of 16, one of them, neither
KERNELS = [
    value
    for module in (mlstm_forward, mlstm_backward, mlstm_step, slstm)
    for value in vars(module).values()
    if isinstance(value, JITFunction)
]
FOUND: dict[str, set[str]] = defaultdict(set)


class Device:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands for a compiled kernel, and is launched into nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, *_: object) -> None:
        return None


def compile_nothing(self, key, signature, device, constexprs, options, attrs, warmup):
    FOUND[self.fn.__name__].add(key)
    self.device_caches[device][0][key] = compiled = Compiled()
    return compiled


def count(case: str, call, sizes, **facts) -> None:
    FOUND.clear()
    for kernel in KERNELS:
        kernel.device_caches.clear()
    for B, T in sizes:
        call(B, T, **facts)
    keys = {name: len(keys) for name, keys in FOUND.items()}
    print(json.dumps({"case": f"{case} {facts}", "sizes": len(sizes), "keys": keys}), flush=True)


def flags(B: int, T: int, given: bool) -> list[torch.Tensor | None]:
    return [torch.zeros(B, T, dtype=torch.bool) if given else None for _ in range(2)]


def mlstm_both(B: int, T: int, K: int, V: int, H: int, flagged: bool, packed: bool) -> None:
    q, k, v = (torch.empty(B, T, H, w, dtype=torch.bfloat16) for w in (K, K, V))
    if packed:  # as a fused projection leaves them
        q, k, v = torch.empty(B, T, H, 2 * K + V, dtype=torch.bfloat16).split((K, K, V), dim=-1)
    i, f = torch.empty(B, T, 2 * H).split(H, dim=-1)
    state = torch.empty(B, H, K, V), torch.empty(B, H, K), torch.empty(B, H)
    reset, mask = flags(B, T, flagged)
    h, C, n, _, a, rest = mlstm.forward(q, k, v, i, f, *state, reset, mask, "exp", 1e-6, None, True)
    mlstm.backward(h, C, n, q, k, v, i, f, *state, reset, mask, h, a, rest, "exp", 1e-6, None)


def slstm_both(B: int, T: int, K: int, H: int, flagged: bool) -> None:
    gates, R, b = (torch.empty(s, dtype=torch.bfloat16) for s in ((B, T, 4, H, K), (H, K, 4, K), (4, H, K)))
    reset, mask = flags(B, T, flagged)
    out, *_, states = slstm.forward(gates, R, b, *(torch.zeros(B, H, K) for _ in range(4)), reset, mask, "sigmoid")
    slstm.backward(out, None, None, None, gates, R, b, states, reset, mask, "sigmoid")


def step(B: int, T: int, K: int, V: int, H: int) -> None:
    q, k, v = (torch.empty(B, T, H, w, dtype=torch.bfloat16)[:, T - 1] for w in (K, K, V))
    i, f = torch.empty(2, B, H)
    state = torch.empty(B, H, K, V), torch.empty(B, H, K), torch.empty(B, H)
    mlstm_step.functional(q, k, v, i, f, *state, None, None, "exp", "sigmoid", 1e-6)


@triton.jit
def canary(p_x, T):
    """T is specialised: three keys, for 1, multiples of 16, and the rest. Shows that this program can count."""


def main() -> None:
    triton.runtime.driver.set_active(Device())
    JITFunction._do_compile = compile_nothing
    torch.utils.deterministic.fill_uninitialized_memory = False
    sizes = [(B, T) for B in BATCHES for T in LENGTHS if B * T <= 4096]
    x = torch.empty(1)
    count("canary", lambda B, T: canary[1,](x, T), [(B, T) for B in (1, 2) for T in (1, *LENGTHS)])
    for (K, V), H in itertools.product(WIDTHS, (1, 3)):
        for flagged, packed in itertools.product((False, True), repeat=2):
            count("mlstm", mlstm_both, sizes, K=K, V=V, H=H, flagged=flagged, packed=packed)
        for flagged in (False, True):
            count("slstm", slstm_both, sizes, K=K, H=H, flagged=flagged)
        count("step", step, sizes, K=K, V=V, H=H)


if __name__ == "__main__":
    main()
