"""Which backend serves a call: an ordered table, and one sentence for every refusal.

A call is described by static facts, so a decision traces under torch.compile(fullgraph=True). "auto" takes the first
willing backend; an explicit name never falls back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

import openxlstm.kernels.cpu as cpu_backend
import openxlstm.kernels.gpu as triton_backend
import openxlstm.kernels.torch as torch_backend

OPERATIONS = ("mlstm", "mlstm_step", "slstm", "slstm_step")


@dataclass(frozen=True, slots=True)
class Call:
    """What a backend may decide on. K, V: head widths; `dtype` is that of q (mLSTM) or of the gates (sLSTM)."""

    op: str
    device: str
    dtype: torch.dtype
    K: int
    V: int
    needs_grad: bool
    input_gate: str = "exp"
    forget_gate: str = "sigmoid"
    reset: bool = False
    mask: bool = False


@dataclass(frozen=True, slots=True)
class Backend:
    """A name, the module that has the operations it serves, and why it refuses a call (None: it does not)."""

    name: str
    module: ModuleType
    refuses: Callable[[Call], str | None]
    about: str
    on_request: str | None = None  # why "auto" passes it over although it does not refuse


# Fastest first. The torch backend is last and never refuses.
BACKENDS: tuple[Backend, ...] = (
    Backend("triton", triton_backend, triton_backend.refuses, triton_backend.about(), triton_backend.ON_REQUEST),
    Backend("cpu", cpu_backend, cpu_backend.refuses, cpu_backend.about()),
    Backend("torch", torch_backend, lambda call: None, "plain PyTorch, hand-written gradients; any device, any dtype"),
)

_TRUSTED: set[str] = set()


def trust(name: str) -> None:
    """Let "auto" choose a backend that otherwise serves only calls that name it, as models cannot: in this process.

    Raises:
        ValueError: there is no such backend.
    """
    names = [backend.name for backend in BACKENDS]
    if name not in names:
        raise ValueError(f"backend={name!r} does not exist; there are {', '.join(map(repr, names))}")
    _TRUSTED.add(name)


def resolve(call: Call, name: str = "auto") -> Any:
    """The module that serves `call`. ValueError if the named backend does not exist or refuses."""
    if name == "auto":
        for backend in BACKENDS:
            if _waits(backend) is None and backend.refuses(call) is None:
                return backend.module
    for backend in BACKENDS:
        if backend.name == name and backend.refuses(call) is None:
            return backend.module
    names = [backend.name for backend in BACKENDS]
    if name not in names:
        raise ValueError(f"backend={name!r} does not exist; there are 'auto', {', '.join(map(repr, names))}")
    lines = "\n".join(f"  {row['backend']:<8} {row['answer']}" for row in _answers(call))
    raise ValueError(f"backend={name!r} cannot run {call}:\n{lines}")


def explain_table(device: str | None = None) -> list[dict[str, str]]:
    """For each operation, dtype and backend: whether it serves a typical call on `device`, and why not if not.

    Rows have the keys op, device, dtype, grad, backend, answer ("serves", "available", or the refusal).
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op in OPERATIONS:
        for dtype in (torch.float32, torch.bfloat16):
            needs_grad = not op.endswith("_step")
            call = Call(op=op, device=device, dtype=dtype, K=64, V=128 if "mlstm" in op else 64, needs_grad=needs_grad)
            for row in _answers(call):
                facts = {"op": op, "device": device, "dtype": str(dtype).removeprefix("torch.")}
                rows.append({**facts, "grad": "yes" if needs_grad else "no", **row})
    return rows


def explain(device: str | None = None) -> str:
    """The same table as text: which backend serves which call here, and why not the others."""
    lines = [f"{'operation':<11} {'device':<6} {'dtype':<9} {'grad':<4} {'backend':<8} answer"]
    for row in explain_table(device):
        lines.append(
            f"{row['op']:<11} {row['device']:<6} {row['dtype']:<9} {row['grad']:<4} {row['backend']:<8} {row['answer']}"
        )
    lines += ["", *(f"{backend.name}: {backend.about}" for backend in BACKENDS)]
    return "\n".join(lines)


def _waits(backend: Backend) -> str | None:
    """Why "auto" passes a backend over that would serve."""
    return None if backend.name in _TRUSTED else backend.on_request


def _answers(call: Call) -> list[dict[str, str]]:
    served, rows = False, []
    for backend in BACKENDS:
        reason = backend.refuses(call) or _waits(backend)
        rows.append({"backend": backend.name, "answer": reason or ("available" if served else "serves")})
        served = served or reason is None
    return rows
