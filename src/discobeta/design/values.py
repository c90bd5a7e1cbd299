"""The value of a setting in the type of its key, between its bounds; or an error that says what would be right."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from discobeta.errors import UserError, shown

LARGEST = 2**63 - 1
"""Of whole numbers: what the tables can hold."""


def typed(name: str, value: Any, hint: Any, entry: dataclasses.Field, where: str) -> Any:
    """The value in the field's type, or an error that names both."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in options:
        if kind is types.NoneType:
            if value is None or value == "null":
                return None
        elif typing.get_origin(kind) is Literal:
            choice = "no" if value is False and "no" in typing.get_args(kind) else value
            if isinstance(choice, str) and choice in typing.get_args(kind):
                return choice
        elif kind is bool and isinstance(value, bool):
            return value
        elif kind is float and (number := finite_number(value)) is not None:
            return _bounded(name, float(number), entry, where)
        elif kind is int and (number := finite_number(value)) is not None and number == int(number):
            return _bounded(name, int(number), entry, where)
        elif kind is str and isinstance(value, str):
            return value
        elif kind is str and isinstance(value, list) and all(isinstance(word, str) for word in value):
            return ",".join(value)  # `dataset: [a, b]` is `dataset: a,b`
    names = [
        " or ".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal
        else "null" if kind is types.NoneType
        else {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}[kind.__name__]
        for kind in options
    ]  # fmt: skip
    raise UserError(f"{where}: {name}: {shown(value)} should be {', or '.join(names)}")


def finite_number(value: Any) -> int | float | None:
    """A finite number, also one that YAML reads as text: `1e-4` has no dot, so YAML 1.1 says str.

    A whole number stays one: as a float it would be rounded beyond 2^53.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    for kind in (int, float) if isinstance(value, str) else (type(value),):
        try:
            number = kind(value)
            return number if math.isfinite(number) else None
        except (ValueError, OverflowError):
            continue
    return None


def _bounded(name: str, value: float, entry: dataclasses.Field, where: str) -> float:
    least, most = entry.metadata["least"], entry.metadata["most"]
    if isinstance(value, int):
        most = LARGEST if most is None and value > LARGEST else most  # not said where nobody comes near it
    if (least is not None and value < least) or (most is not None and value > most):
        span = f"at least {least}" if most is None else f"between {least} and {most}"
        raise UserError(f"{where}: {name}: {shown(value)} should be {span}")
    return value
