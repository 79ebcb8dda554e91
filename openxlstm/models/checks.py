"""Sentences for bad input and bad configurations: the value, the rule, and the nearest fix.

B batch, T time, D model width. Nothing here looks at numbers on an accelerator: that would make it wait.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from openxlstm.cells import State, mlstm

ConfigT = TypeVar("ConfigT")
Shapes = Mapping[str, tuple[int, ...]]


def read_config(cls: type[ConfigT], data: Mapping[str, object], where: str) -> ConfigT:
    """A config dataclass from a dict, strictly: an unknown, missing or mistyped field is a ValueError by name."""
    known, fields = typing.get_type_hints(cls), {}
    for key, value in data.items():
        if key not in known:
            raise ValueError(f"{where} has no field {key!r}{did_you_mean(key, known)}")
        if not _fits(value, known[key]):
            kind = getattr(known[key], "__name__", str(known[key]))
            raise ValueError(f"{where}: {key} must be {kind}; got {value!r}")
        fields[key] = float(value) if known[key] is float else value  # type: ignore[arg-type]
    needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}  # type: ignore[arg-type]
    if missing := sorted(needed - data.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}, which has no default")
    return cls(**fields)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'width'?`, or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_positive(where: str, **sizes: int) -> None:
    """Every size is at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{where}: {name}={size} must be at least 1")


def check_multiple(where: str, name: str, value: int, **divisors: int) -> None:
    """`value` is a multiple of every divisor, or the sentence names the nearest one that is."""
    if any(value % divisor for divisor in divisors.values()):
        rule = " and of ".join(f"{by}={divisor}" for by, divisor in divisors.items())
        step = math.lcm(*divisors.values())
        below = value // step * step
        nearest = f"nearest below is {below}" if below else f"the smallest is {step}"
        raise ValueError(f"{where}: {name}={value} must be a multiple of {rule}; {nearest}")


def check_head_width(where: str, name: str, width: int, heads: int) -> None:
    """A head has at least two values: the norm over a single one is always 0, and its cell would be silent."""
    if width == heads:
        raise ValueError(
            f"{where}: heads={heads} leaves heads of width 1 for {name}={width}, and the norm over one value is "
            f"always 0; use at most heads={max(1, width // 2)}"
        )


def check_choice(where: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{where}: {name}={value!r} must be one of {', '.join(allowed)}{did_you_mean(value, allowed)}")


def check_gates(where: str, input_gate: str, forget_gate: str, eps: float) -> None:
    """The gate activations exist, and eps suits them."""
    check_choice(where, "input_gate", input_gate, mlstm.INPUT_GATES)
    check_choice(where, "forget_gate", forget_gate, mlstm.FORGET_GATES)
    try:
        mlstm.check_gates(input_gate, forget_gate, eps)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_input(x: Tensor, weight: Tensor) -> None:
    """Hidden states [B, T, D] as the model's own norm `weight` [D] expects them; autocast may mix dtypes."""
    if x.ndim != 3 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x must be [batch, time, {weight.shape[0]}]; got {list(x.shape)}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"x is {x.dtype} and the model {weight.dtype}; use x.to({weight.dtype}), or torch.autocast")


def check_tokens(tokens: Tensor, vocab_size: int, reset: Tensor | None, mask: Tensor | None) -> None:
    """Token ids: int64 (or int32), [B, T], with flags to match, within the vocabulary wherever the mask is True.

    Values are looked at on the CPU only, and never while compiling; elsewhere the embedding's own check answers.
    """
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"tokens must be int64 ids of shape [batch, time]; got {tokens.dtype} {list(tokens.shape)}"
            + ("; for one sequence pass tokens[None]" if tokens.ndim == 1 else "")
        )
    check_flag("reset", reset, tokens.shape[0], tokens.shape[1])
    check_flag("mask", mask, tokens.shape[0], tokens.shape[1])
    if torch.compiler.is_compiling() or tokens.device.type != "cpu" or not tokens.numel():
        return
    outside = (tokens < 0) | (tokens >= vocab_size)
    if mask is not None:
        outside &= mask
    if outside.any():
        b, t = (int(index) for index in outside.nonzero()[0])
        raise ValueError(
            f"token id {int(tokens[b, t])} at [{b}, {t}] is outside the vocabulary of {vocab_size} "
            f"(ids 0 to {vocab_size - 1}); is this the tokenizer that the model was trained with?"
        )


def check_flag(name: str, flag: Tensor | None, batch: int, time: int) -> None:
    """`reset` and `mask` are bool [B, T]: anything narrower would broadcast and mean something else."""
    if flag is not None and (flag.dtype != torch.bool or flag.shape != (batch, time)):
        raise ValueError(
            f"{name} must be bool of shape [{batch}, {time}], one flag per token; got {flag.dtype} {list(flag.shape)}"
            + (f"; use {name}.bool()" if flag.shape == (batch, time) else "")
        )


def check_state(state: State, shapes: Shapes, batch: int, x: Tensor, *, one_device: bool = True) -> None:
    """The state belongs to this model, this batch, this device, and was never rounded below fp32.

    `shapes` maps the state's dotted paths to shapes without the batch axis; x is any activation of this call.
    `one_device` False: the model lies on several devices, and each block's state with its block.
    """
    tensors = dict(state.named_tensors())
    if tensors.keys() != shapes.keys():
        foreign = sorted(tensors.keys() - shapes.keys()) or sorted(shapes.keys() - tensors.keys())
        held = "has" if tensors.keys() - shapes.keys() else "lacks"
        raise ValueError(
            f"the state {held} {foreign[0]!r}, so it comes from another model: it holds {len(tensors)} tensors, "
            f"and this model's state {len(shapes)}; start from state=None or model.empty_state(batch)"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    for name, tensor in tensors.items():
        want = (batch, *shapes[name])
        if tuple(tensor.shape) != want:
            fix = "state.select(rows) picks rows" if tuple(tensor.shape[1:]) == want[1:] else "is it another model's?"
            raise ValueError(f"state {name} has shape {list(tensor.shape)}, and this call needs {list(want)}; {fix}")
        if tensor.dtype != dtype:
            raise ValueError(
                f"state {name} is {tensor.dtype} and must be {dtype}: a rounded memory drifts, so none is cast "
                f"silently; keep states as the model returned them"
            )
        if one_device and tensor.device != x.device:
            raise ValueError(f"state {name} is on {tensor.device}, the input on {x.device}; use state.to({x.device})")


def _fits(value: object, kind: Any) -> bool:
    """Whether a TOML or JSON value may stand in a field of this type; True is no number, 1 is a good float."""
    if typing.get_args(kind):  # int | None
        return any(_fits(value, option) for option in typing.get_args(kind))
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63  # as JSON and TOML have it
    return isinstance(value, kind)
