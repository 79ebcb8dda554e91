"""The native library: found beside this file if it was built, loaded at the first question, never compiled here.

`OPENXLSTM_ISA` forces an instruction set (baseline, avx2, avx512, avx512_bf16, amx), so that each can be tested.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openxlstm.kernels.cpu.glue_calls import CALLS

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")  # by number, as csrc/openxlstm.h has them
FILE = Path(__file__).with_name("_openxlstm.so")
VERSION = 7  # XL_VERSION
LONGEST_CHUNK = 256  # XL_CHUNK
TAPE = 8  # vectors that the forward sweep keeps per step: XL_TAPE
ROWS_TOGETHER = 64  # rows that pass a matrix in blocks together: XL_ROWS_TOGETHER

_STATE = ("h0", "c0", "n0", "m0")


class SlstmForward(ctypes.Structure):
    """xl_slstm_forward."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "T", "H", "K", "threads", "bf16", "exp_forget")),
        ("gate_strides", c_int64 * 4),
        *((name, c_void_p) for name in ("gates", "R", "b", "reset", "mask", *_STATE, "out", "h1", "c1", "n1", "m1")),
        ("tape", c_void_p),
    ]


class SlstmBackward(ctypes.Structure):
    """xl_slstm_backward."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "T", "H", "K", "threads", "bf16")),
        *((name, c_void_p) for name in ("dout", "dh", "dc", "dn", "R", "reset", "mask", "c0", "n0", "tape")),
        *((name, c_void_p) for name in ("draw", "dh0", "dc0", "dn0")),
    ]


class MlstmStep(ctypes.Structure):
    """xl_mlstm_step."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "H", "K", "V", "threads", "bf16")),
        *((name, c_int64 * 2) for name in ("q_strides", "k_strides", "v_strides")),
        ("eps", c_double),
        *(
            (name, c_void_p)
            for name in ("q", "k", "v", "i", "f", "reset", "mask", "C", "n", "m", "h", "C1", "n1", "m1")
        ),
    ]


_SIZES = ("B", "T", "H", "K", "V", "threads", "bf16", "input_gate", "chunk")
_STRIDES = ("q_strides", "k_strides", "v_strides")
_READ = ("q", "k", "v", "i", "f", "reset", "mask")


class MlstmForward(ctypes.Structure):
    """xl_mlstm_forward."""

    _fields_ = [
        *((name, c_int64) for name in _SIZES),
        *((name, c_int64 * 3) for name in _STRIDES),
        ("eps", c_double),
        *((name, c_void_p) for name in (*_READ, "C", "n", "m", "h", "C1", "n1", "m1", "a", "states", "stabilisers")),
    ]


class MlstmBackward(ctypes.Structure):
    """xl_mlstm_backward."""

    _fields_ = [
        *((name, c_int64) for name in _SIZES),
        *((name, c_int64 * 3) for name in _STRIDES),
        ("eps", c_double),
        *((name, c_void_p) for name in ("dh", "dC", "dn", *_READ, "a", "states", "stabilisers")),
        *((name, c_void_p) for name in ("dq", "dk", "dv", "di", "df", "dC0", "dn0")),
    ]


class Operation(ctypes.Structure):
    """xl_operation."""

    _fields_ = [
        *((name, c_int64) for name in ("kind", "barrier", "width", "out", "heads", "taps", "grain", "parts", "steal")),
        *((name, c_int64) for name in ("mode", "add", "format", "exp_forget")),
        *((name, c_int64) for name in ("from_", "other", "third", "fourth", "to")),
        *((name, c_int64) for name in ("from_ld", "other_ld", "third_ld", "fourth_ld", "to_ld")),
        *((name, c_void_p) for name in ("weight", "bias", "state", "state2", "state3", "state4")),
        *((name, c_double) for name in ("eps", "scale")),
    ]


class Decode(ctypes.Structure):
    """xl_decode."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "threads", "count", "vocabulary", "steals", "own", "scratch")),
        *((name, c_void_p) for name in ("operations", "tokens", "memory", "own_memory")),
    ]


class Product(ctypes.Structure):
    """xl_product."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "width", "out", "format", "threads", "x_ld", "out_ld", "scratch")),
        *((name, c_void_p) for name in ("x", "weight", "result", "scratch_memory")),
    ]


class Packing(ctypes.Structure):
    """xl_packing."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "row_bytes", "format", "threads")),
        *((name, c_void_p) for name in ("from_", "to")),
    ]


@dataclass(frozen=True, slots=True)
class Native:
    """The loaded library and the instruction set that it uses."""

    library: ctypes.CDLL
    isa: int

    @property
    def name(self) -> str:
        """Of the instruction set."""
        return ISAS[self.isa]

    @property
    def vectors(self) -> str:
        """Of the instruction set of everything but the mLSTM over a sequence, for which alone there is AMX code."""
        return "avx512_bf16" if self.name == "amx" else self.name

    @property
    def multiplies_bytes(self) -> bool:
        """Whether blocks of Q8_0 and Q4_0 are fastest with 16 rows side by side (csrc/bytes.h)."""
        return self.vectors == "avx512_bf16"

    @property
    def refused_amx(self) -> bool:
        """Whether the processor has AMX and the operating system keeps it from this process."""
        return bool(self.library.xl_has_amx() == 2)

    def slstm_forward(self, call: SlstmForward) -> None:
        """Run one forward sweep."""
        _check(self.library.xl_run_slstm_forward(self.isa, ctypes.byref(call)))

    def slstm_backward(self, call: SlstmBackward) -> None:
        """Run one backward sweep."""
        _check(self.library.xl_run_slstm_backward(self.isa, ctypes.byref(call)))

    def mlstm_step(self, call: MlstmStep) -> None:
        """Run one step of the mLSTM."""
        _check(self.library.xl_run_mlstm_step(self.isa, ctypes.byref(call)))

    def mlstm_forward(self, call: MlstmForward) -> None:
        """Run the mLSTM forward over a sequence."""
        _check(self.library.xl_run_mlstm_forward(self.isa, ctypes.byref(call)))

    def mlstm_backward(self, call: MlstmBackward) -> None:
        """Run the mLSTM backward over a sequence."""
        _check(self.library.xl_run_mlstm_backward(self.isa, ctypes.byref(call)))

    def decode(self, call: Decode) -> bool:
        """Run one token through a model; False if a token is outside the vocabulary, and nothing was done."""
        code = self.library.xl_run_decode(self.isa, ctypes.byref(call))
        if code not in (0, 3):
            _check(code)
        return bool(code == 0)

    def product(self, call: Product) -> None:
        """Multiply rows with a matrix."""
        _check(self.library.xl_run_product(self.isa, ctypes.byref(call)))

    def packing(self, call: Packing) -> None:
        """Put rows in blocks side by side."""
        _check(self.library.xl_run_packing(self.isa, ctypes.byref(call)))

    def run(self, name: str, call: ctypes.Structure) -> None:
        """Run what surrounds a cell: a name and its structure, as `glue_calls.CALLS` pairs them."""
        _check(getattr(self.library, f"xl_run_{name}")(self.isa, ctypes.byref(call)))

    def function(self, name: str, x: Tensor) -> Tensor:
        """exp, log1p, tanh or sigmoid of an fp32 tensor: what the gates are made of, for the tests of its accuracy."""
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        _check(self.library.xl_run_function(self.isa, name.encode(), x.data_ptr(), y.data_ptr(), x.numel()))
        return y


@functools.cache
def native() -> Native | str:
    """The library, or one sentence about why there is none.

    Raises:
        ValueError: `OPENXLSTM_ISA` names an instruction set that does not exist or that this machine lacks.
    """
    if not FILE.exists():
        return (
            "the native library was not built: install openxlstm again where there is a C++ compiler (g++ or clang++)"
        )
    try:
        library = ctypes.CDLL(str(FILE))
    except OSError as error:
        return f"the native library cannot be loaded ({error}); install openxlstm again on this machine"
    if not hasattr(library, "xl_version") or library.xl_version() != VERSION:
        return "the native library was built from other sources than these; install openxlstm again"
    library.xl_run_slstm_forward.argtypes = [c_int, POINTER(SlstmForward)]
    library.xl_run_slstm_backward.argtypes = [c_int, POINTER(SlstmBackward)]
    library.xl_run_mlstm_step.argtypes = [c_int, POINTER(MlstmStep)]
    library.xl_run_mlstm_forward.argtypes = [c_int, POINTER(MlstmForward)]
    library.xl_run_mlstm_backward.argtypes = [c_int, POINTER(MlstmBackward)]
    library.xl_run_decode.argtypes = [c_int, POINTER(Decode)]
    library.xl_run_product.argtypes = [c_int, POINTER(Product)]
    library.xl_run_packing.argtypes = [c_int, POINTER(Packing)]
    for name, call in CALLS.items():
        getattr(library, f"xl_run_{name}").argtypes = [c_int, POINTER(call)]
    library.xl_run_function.argtypes = [c_int, c_char_p, c_void_p, c_void_p, c_int64]
    best = library.xl_best_isa()
    wanted = os.environ.get("OPENXLSTM_ISA")
    if not wanted:  # an empty variable is an unset one
        return Native(library, best)
    if wanted not in ISAS[: best + 1]:
        raise ValueError(f"OPENXLSTM_ISA={wanted!r} must be one of {', '.join(ISAS[: best + 1])} on this machine")
    return Native(library, ISAS.index(wanted))


def slot(K: int, V: int) -> int:
    """Numbers between two kept states of the mLSTM: XL_SLOT."""
    return -(-K // 32) * 32 * (-(-V // 32) * 32 + 16 + 1)


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's first element, None for none."""
    return None if x is None else x.data_ptr()


def threads() -> int:
    """As many as PyTorch would use; one in a forked child, where the parent's pool does not exist."""
    return 1 if os.getpid() != _PROCESS else torch.get_num_threads()


def _check(code: int) -> None:
    if code == 1:
        raise MemoryError("the native kernel could not get the memory that it works in")
    assert code == 0, f"the native library answered {code}"


_PROCESS = os.getpid()
