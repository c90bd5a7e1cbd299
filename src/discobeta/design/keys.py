"""Every key of a run and of a study, said to people and to editors: pages, JSON schemas, `discobeta keys`.

Nothing is listed here. What a run key is stands in `config.RunConfig`, what a study key is in `study_file`, other
programs' names in `config_names`. `make keys` writes what `pages` makes of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from discobeta.design import config, variants
from discobeta.design.config_names import IGNORED, NEUTRAL, REFUSED, RENAMED, SAME_ADAMW
from discobeta.design.stages import BASE_STAGE, STAGES
from discobeta.design.study_sections import BELONGS, SET_OF_BASE, may_stand_in, places_of
from discobeta.design.values import NUMBER, in_words
from discobeta.errors import UserError, did_you_mean, shown

STEPS = {
    "data": "the rows",
    "model": "what is loaded",
    "training": "training",
    "evaluation": "measuring",
    "log": "the log's lines",
    "bookkeeping": "nothing",
}
"""What a run key belongs to (`config.option`) -> what a change of it changes."""


@dataclass(frozen=True)
class Key:
    """What is to be known of a key."""

    name: str
    group: str  # the heading that it stands under
    type: str
    default: dict[str, Any]  # by stage, or under "study"; nothing where it must be said
    meaning: str
    stages: tuple[str, ...] = ()  # that read it; this and what follows are of keys of a run
    decides: str = ""
    elsewhere: tuple[str, ...] = ()  # its names in other programs
    in_study: tuple[str, ...] = ()  # the sections of a study that it may stand in

    @property
    def title(self) -> str:
        """E.g. `pref_beta` of a run, `data: world: noise` of a study."""
        return self.name if self.stages else ": ".join(filter(None, [self.group, self.name]))

    @property
    def default_text(self) -> str:
        """E.g. `0.95`, or `0.01 (rm), 0.1 (dpo)`."""
        texts = {stage: json.dumps(value, ensure_ascii=False) for stage, value in self.default.items()}
        if len(set(texts.values())) < 2:
            return next(iter(texts.values()), "required")
        return ", ".join(f"{text} ({stage})" for stage, text in texts.items())


# --- keys of a run


def run_keys(stage: str | None = None) -> list[Key]:
    """Those that a stage reads; without one, all."""
    groups, elsewhere = _groups(), _elsewhere()
    return [
        Key(
            name,
            groups[name],
            in_words(config.schema_of(name)),
            {} if entry.default is MISSING else {reader: config.default_of(name, reader) for reader in readers},
            entry.metadata["help"],
            tuple(readers),
            _decides(entry.metadata),
            elsewhere[name],
            tuple(places_of(name)),
        )
        for name, entry in config.FIELDS.items()
        if (readers := [reader for reader in config.read_by(name) if stage in (None, reader)])
    ]


def _decides(metadata: Mapping[str, Any]) -> str:
    trains = f", training of {' and '.join(metadata['trains'])}" if metadata["trains"] else ""
    return f"{STEPS[metadata['of']]}{trains}"


def _groups() -> dict[str, str]:
    """Run key -> the `# --- heading` that it stands under in the source."""
    found, heading = dict.fromkeys(config.FIELDS, "what is trained"), None
    for line in Path(config.__file__).read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"    # --- (.*)", line):
            heading = match[1]
        elif heading and (match := re.match(r"    (\w+): ", line)) and match[1] in found:
            found[match[1]] = heading
    return found


def _elsewhere() -> dict[str, tuple[str, ...]]:
    """Run key -> other programs' names of it."""
    words = {name: re.findall(r"\w+", key) for name, key in RENAMED.items()}
    return {key: tuple(name for name in words if key in words[name]) for key in config.FIELDS}


def run_schema() -> dict[str, Any]:
    """The JSON schema of a run YAML: also of names that are ignored, and of refused ones that ask for nothing."""
    ignored = [(names, {"description": f"ignored: {why}"}) for why, names in _alike(IGNORED)]
    refused = [
        (names, {"description": f"not supported: {why}", "enum": neutral}) for (neutral, why), names in _alike(REFUSED)
    ]
    return {
        "$schema": DIALECT,
        "title": "A run of discobeta",
        "type": "object",
        "required": [name for name, entry in config.FIELDS.items() if entry.default is MISSING],
        "properties": {key.name: _described(key) for key in run_keys()},
        "patternProperties": {f"^({'|'.join(names)})$": values for names, values in ignored + refused},
        "additionalProperties": False,
    }


def _alike(fates: dict[str, Any]) -> list[tuple[Any, list[str]]]:
    """Each fate or reason, with the names that follow each other and share it."""
    return [(fate, list(names)) for fate, names in groupby(fates, fates.get)]


DIALECT = "https://json-schema.org/draft/2020-12/schema"

SPELLED_OTHERWISE = {
    "optim": {"enum": SAME_ADAMW},
    "report_to": {"type": ["null", "array"], "items": {"type": "string"}, "maxItems": 1},
    "warmup_steps": {"type": ["number", "string"], "pattern": NUMBER, "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "output_dir": {"type": "null"},
    "gradient_checkpointing": {"type": "null"},
}
"""Run key -> values of transformers' that are read as ours before the type is asked for."""


def _described(key: Key) -> dict[str, Any]:
    described = {"description": f"{key.meaning} ({', '.join(key.stages)})"}
    first, *others = key.default.values() or [MISSING]
    if first is not MISSING and all(value == first for value in others):
        described["default"] = first
    values = config.schema_of(key.name)
    if key.name in SPELLED_OTHERWISE:
        values = {"anyOf": [values, SPELLED_OTHERWISE[key.name]]}
    return described | values


# --- keys of a study


def study_keys() -> list[Key]:
    """The keys of a study's sections; what keys of a run a section holds is no part of it."""
    schema = study_schema()
    parts = {"": schema} | {place: schema["$defs"][model] for place, model in MODELS.items()}
    return [
        Key(name, place, in_words(key), {"study": key["default"]} if "default" in key else {}, key["description"])
        for place, part in parts.items()
        for name, key in part["properties"].items()
    ]


MODELS = {
    "data": "Data", "data: world": "World", "prompts": "Prompts", "base": "Base", "controls: <name>": "Control",
    "sweep": "Sweep",
}  # fmt: skip
"""Section of a study -> its model in study_file."""


def study_schema() -> dict[str, Any]:
    """The JSON schema of a study's file. It requires nothing, since a file may be a layer on top of another."""
    from discobeta.design import study_file

    schema = _without_titles(study_file.json_schema())
    for section in ("common", *STAGES, BASE_STAGE):
        properties = (schema["$defs"]["Base"] if section == BASE_STAGE else schema)["properties"]
        own = config.STAGE_DEFAULTS.get(section, {})
        properties[section] |= {
            "type": ["object", "null"],
            "properties": {
                key: {"$ref": f"run.schema.json#/properties/{key}"} | ({"default": own[key]} if key in own else {})
                for key in may_stand_in(section)
            },
            "additionalProperties": False,
        }
    control, sweep = (schema["$defs"][name]["properties"] for name in ("Control", "Sweep"))
    varying = {stage: [key for key in config.FIELDS if variants.fault_of(key, stage) is None] for stage in STAGES}
    control["settings"] |= {
        "type": ["object", "null"],
        "properties": {
            key: {"$ref": f"run.schema.json#/properties/{key}"}
            for key in config.FIELDS
            if any(key in keys for keys in varying.values())
        },
        "additionalProperties": False,
    }
    for stage, keys in varying.items():
        values = {
            key: {"type": ["array", "null"], "items": {"$ref": f"run.schema.json#/properties/{key}"}, "minItems": 1}
            for key in keys
        }
        arms = {"arms": study_file.ARMS_SCHEMA}
        sweep[stage] |= {"type": ["object", "null"], "properties": values | arms, "additionalProperties": False}
    schema["properties"]["controls"]["type"] = ["object", "null"]
    named = schema["properties"]["controls"]
    named["propertyNames"] = {"pattern": study_file.PLAIN_NAME, "maxLength": study_file.LONGEST_NAME}
    schema["$defs"]["Control"].pop("required")
    named["additionalProperties"] = {"anyOf": [named["additionalProperties"], {"type": "null"}]}
    schema["properties"]["sweep"] = {
        "anyOf": [{"$ref": "#/$defs/Sweep"}, {"type": "null"}],
        "default": {},
        "description": schema["properties"]["sweep"]["description"],
    }
    schema.pop("required")
    return {"$schema": DIALECT, "title": "A study of discobeta"} | schema


def _without_titles(schema: Any) -> Any:
    """pydantic gives every key one, which says no more than its name."""
    if isinstance(schema, dict):
        return {key: _without_titles(part) for key, part in schema.items() if key != "title"}
    return [_without_titles(part) for part in schema] if isinstance(schema, list) else schema


# --- looking one up


def listed(of: str | None) -> list[Key]:
    """The keys of a run (`run`), those that a stage reads, those of a study (`study`), or all."""
    of_run = [] if of == "study" else run_keys(None if of == "run" else of)
    return of_run + (study_keys() if of in (None, "study") else [])


def other_names() -> list[Key]:
    """Names of other programs that are no keys: what they are called here, or what becomes of them."""
    found = [Key(name, "elsewhere", "", {}, f"called {key} here") for name, key in RENAMED.items()]
    found += [Key(name, "elsewhere", "", {}, f"ignored: {why}") for name, why in IGNORED.items()]
    return found + [
        Key(name, "elsewhere", "", {}, f"not supported{_unless(neutral)}: {why}")
        for name, (neutral, why) in REFUSED.items()
    ]


def find(words: list[str], of: str | None = None) -> tuple[list[Key], list[Key]]:
    """(those that are called so, here or elsewhere; the others that have all the words in what is said of them).

    Raises UserError where there are neither.
    """
    keys, others = listed(of), other_names()
    named = [key for key in [*others, *keys] if [key.name] == words or key.title == " ".join(words)]
    called = {RENAMED[word] for word in words if word in RENAMED}
    named += [key for key in keys if key not in named and any(key.name in re.findall(r"\w+", text) for text in called)]

    def said(key: Key) -> str:
        return " ".join([key.title, key.meaning, *key.elsewhere]).lower()

    rest = [key for key in keys if key not in named and all(word.lower() in said(key) for word in words)]
    if not named and not rest and of in config.STAGE_DEFAULTS and " ".join(words) in config.FIELDS:
        raise UserError(f"{of} does not read {words[0]} ({config.who_reads(words[0])})")
    if not named and not rest:
        rest = [key for key in others if all(word.lower() in key.name for word in words)]
    if not named and not rest:
        near = did_you_mean(" ".join(words), [key.name for key in [*keys, *others]])
        of_stage = f" of {of}" if of else ""
        every = "" if near else "; `discobeta keys` lists all, of runs and studies"
        raise UserError(f"no key{of_stage} has {shown(' '.join(words))} in its name or meaning{near or every}")
    return named, rest


def _unless(neutral: tuple) -> str:
    if neutral is NEUTRAL:
        return ""
    return f" unless {' or '.join(json.dumps(value) for value in neutral)}"


# --- pages


def pages() -> dict[str, str]:
    """File of the repository -> what stands in it."""
    return {
        "docs/reference/run.md": _run_page(),
        "docs/reference/study.md": _study_page(),
        "docs/reference/names.md": _names_page(),
        "workflow/schemas/run.schema.json": _json_text(run_schema()),
        "workflow/schemas/study.schema.json": _json_text(study_schema()),
    }


def _code(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


MADE = "<!-- written by `make keys`: change the key in src/discobeta/design, not this page -->"

RUN_PAGE = f"""{MADE}
# Keys of a run

A run is one flat YAML. Types and bounds are checked before anything is loaded; an unknown key is refused with the
nearest known one, and a key that the stage does not read is named as unused and keeps its default. *Decides* says what
a change of the key changes, and so [what runs again](../workflow.md#the-rules). *Elsewhere* are names in other
programs, which are refused with the name here; those that are the same there are in
[llama-factory.md](../llama-factory.md), those that are no keys in [names.md](names.md). The same in a terminal:
`discobeta keys STAGE`; for editors: `workflow/schemas/run.schema.json`.
"""

STUDY_PAGE = f"""{MADE}
# Keys of a study

A study is one YAML with sections, or several, later ones on top key by key. It is checked whole, with every run that
it holds, before anything runs. In `data:`, `prompts:` and `base:`, null is as if the key were not there, and so takes
away what an earlier file says. The same in a terminal: `discobeta keys study`; for editors:
`workflow/schemas/study.schema.json`.
"""

RUN_KEYS_OF_A_STUDY = f"""
## Keys of a run in a study

A stage's section holds keys of [run.md](run.md) that the stage reads; one of `common:` goes to the stages that read it.
`base: sft:` holds those that sft reads, but not {_code(SET_OF_BASE)}, which the study sets.
These stand in neither a stage's section nor `common:`:

"""

NAMES_PAGE = f"""{MADE}
# Names that are no keys

Files of LLaMA-Factory and of transformers' Trainer hold names on which nothing of a result depends here: they are
ignored, with a line. Others would change the result: they are refused, unless their value asks for nothing. Others
again are keys that have another name here, which is said. What is used, and how it differs, is in
[llama-factory.md](../llama-factory.md). The same in a terminal: `discobeta keys NAME`.
"""


def _run_page() -> str:
    def cells(key: Key) -> list[str]:
        stages = "all" if key.stages == config.read_by("stage") else " ".join(key.stages)
        return [f"`{key.name}`", key.type, key.default_text, stages, key.decides, key.meaning, _code(key.elsewhere)]

    heads = ["key", "type", "default", "stages", "decides", "meaning", "elsewhere"]
    groups = groupby(run_keys(), key=lambda key: key.group)
    return RUN_PAGE + "".join(
        _titled(f"{group[0].upper()}{group[1:]}", heads, map(cells, keys)) for group, keys in groups
    )


def _study_page() -> str:
    def cells(key: Key) -> list[str]:
        return [f"`{key.name}`", key.type, key.default_text, key.meaning]

    heads = ["key", "type", "default", "meaning"]
    groups = groupby(study_keys(), key=lambda key: key.group)
    parts = [_titled(f"`{place}:`" if place else "The study", heads, map(cells, keys)) for place, keys in groups]
    rows = [[_code(names), why] for why, names in _alike(BELONGS)]
    return STUDY_PAGE + "".join(parts) + RUN_KEYS_OF_A_STUDY + _table(["keys", "why not there"], rows)


def _names_page() -> str:
    ignored = [[why, _code(names)] for why, names in _alike(IGNORED)]
    refused = []
    for (neutral, why), names in _alike(REFUSED):
        values = [] if neutral is NEUTRAL else neutral
        unless = f" unless {' or '.join(_code([json.dumps(value)]) for value in values)}" if values else ""
        refused.append([why, f"{_code(names)}{unless}"])
    heads = ["because", "names"]
    renamed = [
        [key, _code(name for name, of in RENAMED.items() if of == key)] for key in dict.fromkeys(RENAMED.values())
    ]
    return (
        NAMES_PAGE
        + _titled("Called otherwise here", ["here", "names elsewhere"], renamed)
        + _titled("Ignored", heads, ignored)
        + _titled("Refused", heads, refused)
    )


def _titled(title: str, heads: list[str], rows: Iterable[list[str]]) -> str:
    return f"\n## {title}\n\n{_table(heads, rows)}"


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _json_text(schema: dict[str, Any]) -> str:
    """Indented down to the keys, each of which is a line."""

    def written(value: Any, indent: str) -> str:
        line = json.dumps(value, ensure_ascii=False)
        if not isinstance(value, dict) or len(line) <= 240:
            return line
        parts = [f"{indent} {json.dumps(key)}: {written(part, indent + ' ')}" for key, part in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"

    return written(schema, "") + "\n"


def as_lines(keys: list[Key]) -> str:
    """One line a key, for a terminal: name, type, default, stages, meaning."""
    rows = [
        [key.title, key.type, key.default_text if key.type else "", " ".join(key.stages) or "study", key.meaning]
        for key in keys
    ]
    widths = [min(40, max(len(row[column]) for row in rows)) for column in range(4)]
    return "\n".join("  ".join([*map(str.ljust, row[:4], widths), row[4]]) for row in rows)


def in_full(key: Key) -> str:
    """All that is known of a key, a line for each part."""
    if not key.type:
        return f"{key.name} (of another program): {key.meaning}"
    place = ", ".join(f"`{place}:`" for place in key.in_study) or "no section: the study, or its arms, say it"
    parts = {
        "type": key.type,
        "default": key.default_text,
        "stages": " ".join(key.stages),
        "decides": key.decides,
        "in a study": place if key.stages else "",
        "elsewhere": " ".join(key.elsewhere),
    }
    lines = [f"  {name:11} {text}" for name, text in parts.items() if text]
    return "\n".join([f"{key.title} ({'run' if key.stages else 'study'}): {key.meaning}", *lines])


if __name__ == "__main__":
    from discobeta.files import write_text

    for name, text in pages().items():
        write_text(Path(name), text)
