"""The C structures of what surrounds the cells, field by field as csrc/openxlstm.h has them."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p


class ProjectForward(ctypes.Structure):
    """xl_project_forward."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "T", "U", "J", "G", "threads", "bf16")),
        ("x_strides", c_int64 * 2),
        *((name, c_void_p) for name in ("x", "w", "b")),
        ("maps", c_void_p * 3),
        *((name, c_void_p) for name in ("gate_w", "gate_b", "past", "reset", "mask", "c")),
        ("out", c_void_p * 3),
        *((name, c_void_p) for name in ("raw", "last")),
    ]


class ProjectBackward(ctypes.Structure):
    """xl_project_backward."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "T", "U", "J", "G", "threads", "bf16")),
        ("x_strides", c_int64 * 2),
        *((name, c_void_p) for name in ("x", "w", "b")),
        ("maps", c_void_p * 3),
        *((name, c_void_p) for name in ("gate_w", "past", "reset", "mask", "c")),
        ("out", c_void_p * 3),
        ("dc", c_void_p),
        ("dout", c_void_p * 3),
        *((name, c_void_p) for name in ("draw", "dlast", "dx", "dw", "db")),
        ("dmaps", c_void_p * 3),
        *((name, c_void_p) for name in ("dgate_w", "dgate_b", "dpast")),
    ]


class GateForward(ctypes.Structure):
    """xl_gate_forward."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "H", "V", "threads", "bf16", "z_stride")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("h", "c", "z", "weight", "skip", "y")),
    ]


class GateBackward(ctypes.Structure):
    """xl_gate_backward."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "H", "V", "threads", "bf16", "z_stride")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("dy", "h", "c", "z", "weight", "skip", "dh", "dc", "dz", "dweight", "dskip")),
    ]


class NormForward(ctypes.Structure):
    """xl_norm_forward."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "D", "threads", "x_bf16", "y_bf16")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("x", "weight", "y")),
    ]


class NormBackward(ctypes.Structure):
    """xl_norm_backward."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "D", "threads", "x_bf16", "y_bf16")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("dy", "x", "weight", "dx", "dweight")),
    ]


CALLS = {
    "project_forward": ProjectForward,
    "project_backward": ProjectBackward,
    "gate_forward": GateForward,
    "gate_backward": GateBackward,
    "norm_forward": NormForward,
    "norm_backward": NormBackward,
}
