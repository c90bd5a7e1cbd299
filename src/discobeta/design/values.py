"""A setting's value in the type of its key, between its bounds; or an error that says what would be right.

`typed` reads one, `as_schema` says the same as a JSON schema, `in_words` the same to a person.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from discobeta.errors import shown

LARGEST = 2**63 - 1
"""The largest whole number that the tables can hold."""


def typed(value: Any, hint: Any, bounds: Mapping[str, Any]) -> Any:
    """The value in the type `hint`. Raises ValueError that says what would be right.

    bounds: `least` and `most` of a number; None where it has none.
    """
    for kind in _options(hint):
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
            return _bounded(float(number), bounds)
        elif kind is int and (number := finite_number(value)) is not None and number == int(number):
            return _bounded(int(number), bounds)
        elif kind is str and isinstance(value, str):
            return value
        elif kind is str and isinstance(value, list) and all(isinstance(word, str) for word in value):
            return ",".join(value)  # `dataset: [a, b]` is `dataset: a,b`
    raise ValueError(f"{shown(value)} should be {in_words(as_schema(hint, {}))}")


WHOLE, NUMBER = r"^[-+]?[0-9]+(\.0*)?$", r"^[-+]?[0-9]*\.?[0-9]+\.?([eE][-+]?[0-9]+)?$"
"""Numbers that are read from texts, since YAML 1.1 takes `1e-4` for one."""


def as_schema(hint: Any, bounds: Mapping[str, Any]) -> dict[str, Any]:
    """What `typed` takes, as a JSON schema; of a number that stands there as a text the bounds are not said."""
    found: dict[str, Any] = {"type": []}
    for kind in _options(hint):
        if typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            return {"enum": [*choices, False] if "no" in choices else list(choices)}
        if kind is str:
            found["items"] = {"type": "string"}
        elif kind in (int, float):
            found["pattern"] = WHOLE if kind is int else NUMBER
            found |= {word: bounds[key] for key, word in BOUNDS.items() if bounds.get(key) is not None}
        found["type"] += TYPES[kind]
    return found


TYPES = {
    types.NoneType: ["null"],
    bool: ["boolean"],
    int: ["integer", "string"],
    float: ["number", "string"],
    str: ["string", "array"],  # `dataset: [a, b]` is `dataset: a,b`
}
BOUNDS = {"least": "minimum", "most": "maximum"}


def in_words(schema: dict[str, Any]) -> str:
    """E.g. "a whole number, at least 1, or null"; of the schemas of `as_schema` and of study_file."""
    if "anyOf" in schema:
        return ", or ".join(map(in_words, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        choices = schema.get("enum") or [schema["const"]]
        return " or ".join(str(choice) for choice in choices if choice is not False)
    kinds = schema.get("type", "object")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds == ["array"]:
        items = schema["items"]
        names = f": {', '.join(items['enum'])}" if "enum" in items else ""
        return f"a list of different {'whole numbers' if items['type'] == 'integer' else 'names'}{names}"
    least, most = schema.get("minimum"), schema.get("maximum")
    span = "" if least is None else f", at least {least}"
    if most not in (None, LARGEST):
        span = f" between {least} and {most}"
    nouns = {"boolean": "true or false", "integer": f"a whole number{span}", "number": f"a number{span}"}
    nouns |= {"string": "text", "object": "a mapping", "null": "null"}
    unsaid = {"array", "string"} if {"integer", "number"} & set(kinds) else {"array"}
    return ", or ".join(nouns[kind] for kind in kinds if kind not in unsaid)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


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


def _bounded(value: float, bounds: Mapping[str, Any]) -> float:
    least, most = bounds["least"], bounds["most"]
    if isinstance(value, int):
        most = LARGEST if most is None and value > LARGEST else most  # not said where nobody comes near it
    if (least is not None and value < least) or (most is not None and value > most):
        span = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{shown(value)} should be {span}")
    return value
