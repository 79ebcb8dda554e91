"""Values in the configs of others: of the kind that they must have, before a formula meets them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def checked(data: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`data`, every value of the kind of its default; a default of None or text says nothing about a kind.

    A number in quotes is a number where one is wanted: YAML 1.1 reads 1e-6, without a point, as text.

    Raises:
        ValueError: a value of another kind, by name.
    """
    return {key: _checked(value, defaults.get(key), f"{where}: {key}") for key, value in data.items()}


def _checked(value: Any, default: Any, name: str) -> Any:
    if isinstance(default, bool):
        return _require(value, isinstance(value, bool), name, "true or false")
    if isinstance(default, int):
        value = _require(value, isinstance(value, int) and not isinstance(value, bool), name, "a whole number")
        return _require(value, value > 0 or "multiple" not in name, name, "a whole number above 0")
    if isinstance(default, float):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        return _require(number if math.isfinite(number) else value, math.isfinite(number), name, "a finite number")
    if isinstance(default, list):
        numbers = isinstance(value, (list, tuple)) and all(type(item) is int for item in value)
        return _require(value, numbers or value == "all", name, "a list of whole numbers, or 'all'")
    return value


def _require(value: Any, fits: bool, name: str, kind: str) -> Any:
    if not fits:
        raise ValueError(f"{name} must be {kind}; got {value!r}")
    return value
