"""YAML as text, in a file or in a word of `--set`: read as plain values, and written."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from discobeta.errors import UserError, first_line, shorten, shown

LONGEST_FILE = 4_000_000
"""Bytes of a YAML file: what is larger is no config."""

MOST_VALUES = 100_000
"""In a YAML file, each counted as often as aliases repeat it."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A mapping from a YAML file; `-` is standard input."""
    import sys

    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else Path(path).open("rb") as stream:
            content = stream.read(LONGEST_FILE + 1)
        text = content.decode("utf-8-sig")
        if str(path).endswith(".json"):
            text = text.replace("\t", " ")  # of which YAML makes no indentation, and JSON no part of a text
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    if len(content) > LONGEST_FILE:
        raise UserError(f"{path} is no config: it is larger than {LONGEST_FILE:,} bytes")
    try:
        settings = parse_yaml(text)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold `key: value` lines, not {type(settings).__name__}")
    return settings


def parse_yaml(text: str) -> Any:
    """Texts, numbers, true, false and null, in lists and in mappings whose keys are texts.

    Raises UserError ("is not valid YAML: …") for anything else, e.g. a key that stands twice.
    """
    try:
        value = yaml.load(text, _PlainValues)
        _count_values(value, {})
    except yaml.YAMLError as error:
        raise UserError(f"is not valid YAML: {shorten(' '.join(str(error).split()))}") from None
    except RecursionError:
        raise UserError("is not valid YAML: nested too deeply, or in itself") from None
    except UserError:
        raise
    except Exception as error:  # of a constructor: !!int abc, !!timestamp x, !!bool maybe, a number of 5,000 digits
        raise UserError(f"is not valid YAML: {first_line(error)}") from None
    return value


def _count_values(value: Any, counted: dict[int, int]) -> int:
    """How many values there are when every alias is written out; checks that all are plain."""
    if isinstance(value, dict | list):
        if (known := counted.get(id(value))) is not None:
            return known
        for name in value if isinstance(value, dict) else ():
            if not isinstance(name, str):
                raise UserError(f"is no config: the key {shown(name)} should be text (write it in quotes)")
        parts = value.values() if isinstance(value, dict) else value
        counted[id(value)] = total = 1 + sum(_count_values(part, counted) for part in parts)
        if total > MOST_VALUES:
            raise UserError(f"is no config: it holds more than {MOST_VALUES:,} values")
        return total
    if not isinstance(value, str | int | float | None):
        raise UserError(f"is no config: {shown(value)} is neither text nor a number")
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):  # half a surrogate pair is no character
        raise UserError(f"is no config: {shown(value)} holds characters that no text has")
    return 1


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key, anything else is replaced: what Snakemake does with its config files."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`key=value` words; the value is what was written, read as YAML where YAML reads all of it.

    Words of one key are merged as files are, and as Snakemake merges those of its `--config`.
    """
    settings: dict[str, Any] = {}
    for word in overrides:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise UserError(f"--set {shorten(word, 80)}: write key=value")
        try:
            settings = merge(settings, {name.strip(): as_written(value)})
        except UserError as error:
            raise UserError(f"--set {shorten(word, 80)}: the value {error}") from None
    return settings


def as_written(text: str) -> Any:
    """A number, true, false, null, a quoted text or a `[list]` or `{mapping}`; else the text, all of it.

    YAML itself would refuse `%s` and `a: b: c`, drop a comment (`a #b`), an anchor (`&a b`) or a line's end, and see
    a list in `- a`.
    """
    written = text.strip()
    try:
        yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        if written[:1] not in ("'", '"', "[", "{") and not isinstance(error, yaml.reader.ReaderError):
            return written
    except RecursionError:
        pass
    value = parse_yaml(text)
    tokens = list(yaml.scan(text))
    if any("#" in text[one.end_mark.index : other.start_mark.index] for one, other in pairwise(tokens)):
        return written
    if not all(isinstance(token, _IN_A_WORD) for token in tokens):
        return written
    return written if isinstance(value, str) and written[:1] not in ("'", '"') else value


_IN_A_WORD = (
    yaml.StreamStartToken, yaml.StreamEndToken, yaml.ScalarToken, yaml.KeyToken, yaml.ValueToken, yaml.FlowEntryToken,
    yaml.FlowSequenceStartToken, yaml.FlowSequenceEndToken, yaml.FlowMappingStartToken, yaml.FlowMappingEndToken,
)  # fmt: skip


def as_yaml(value: Any) -> str:
    """A value as it would stand in a YAML, on a line."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def write_yaml(settings: dict[str, Any], path: Path) -> None:
    from discobeta.files import write_text

    write_text(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


class _PlainValues(yaml.SafeLoader):
    """SafeLoader keeps the last of two equal keys in silence, which a config must not, and makes dates of texts."""

    yaml_implicit_resolvers = {
        start: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for start, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise UserError(f"line {key.start_mark.line + 1}: key {shown(key.value)} stands twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)
