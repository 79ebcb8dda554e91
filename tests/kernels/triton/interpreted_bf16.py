"""Run by test_bf16.py in a process of its own: the kernels' bf16 path in the interpreter, by the cases of `make gpu`.

The door refuses bf16 under the interpreter, which cannot do it by itself; here that refusal is lifted.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import bf16
import torch

from openxlstm.bench.gpu.device import Setting
from openxlstm.bench.gpu.parity import Case, report
from openxlstm.kernels import dispatch

CASES = {
    "mlstm": [
        Case("mlstm", 5, 7, torch.bfloat16, (65,)),
        Case("mlstm", 16, 33, torch.bfloat16, (130,), flags=False),  # df was off by 1.3e-2 with rounded memory in rho
        Case("mlstm", 20, 48, torch.bfloat16, (65,), input_gate="sigmoid_normalized"),  # dn by 1.1e-2 with rounded h
    ],
    "more": [
        Case("mlstm", 48, 60, torch.bfloat16, (65,), input_gate="sigmoid"),
        Case("mlstm", 64, 128, torch.bfloat16, (65,), i_mean=-10.0),
        Case("mlstm_step", 48, 60, torch.bfloat16, (1,)),
        Case("slstm", 20, 20, torch.bfloat16, (3,)),
        Case("slstm", 80, 80, torch.bfloat16, (2,), flags=False),
    ],
}


def main() -> None:
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty is NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    bf16.install()
    triton = replace(dispatch.BACKENDS[0], refuses=lambda call: None)
    dispatch.BACKENDS = (triton, *dispatch.BACKENDS[1:])
    for case in CASES[sys.argv[1]]:
        report(Setting("cpu", float("inf")), case)


if __name__ == "__main__":
    main()
