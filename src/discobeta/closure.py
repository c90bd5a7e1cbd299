"""Which of the package's files decide what comes out of a step: found by following imports, not listed.

A step starts in its entry modules (`ENTRIES`); what they import, at the top or inside a function, belongs to it, and
what that imports. Left out is `BOOKKEEPING`, and what only a type checker imports. An entry `module:function` counts
the file, and of its imports those that the function reaches by name. A stage is chosen by name when a run starts, which
is no import: the module of the step's own stage is an entry too. So is what makes a table or figure (`report/outputs`).

The files are read with `ast` and never imported: no torch here, and a plan of thousands of jobs asks once a step.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from discobeta.design.stages import BASE_STAGE, STAGES

ROOT = Path(__file__).parent

REPORT = ("report/results", "record", "identity", "design/study")
"""What says which runs count, for tables and figures alike."""

ENTRIES = {
    "world_corpus": ("inputs/world:write_corpus",),
    "world_pairs": ("inputs/world:write_pairs",),
    BASE_STAGE: ("inputs/base",),
    "prepare": ("data/tokens", "model/pretrained:load_tokenizer"),
    "reference": ("inputs/reference", "data/tokens"),
    "answers": ("inputs/answers", "data/tokens"),
    "train": ("run/train",),
    "evaluate": ("run/evaluate", "metrics"),
    "tables": ("report/tables", *REPORT),
    "figures": ("report/figures", "metrics", *REPORT),
    "page": ("report/page", *REPORT),
}
"""Step -> where its command begins. An entry belongs to its step also where it is bookkeeping for others."""

BOOKKEEPING = {
    "__init__": "the version, and names that load when they are asked for",
    "cli/run": "what a command of a run is asked for",
    "cli/study": "what a command of a study is asked for",
    "closure": "says which files a step is made of",
    "design/config": "reads and checks the settings; what they are when resolved is compared itself",
    "design/config_names": "other programs' names of them",
    "design/__init__": "a docstring",
    "design/described": "an arm in words",
    "design/stages": "which stages there are; what it says of a run is among its settings, which are compared",
    "design/study": "makes the settings of every run, which are compared themselves",
    "design/study_file": "reads and checks what a study says, of which its runs' settings are made",
    "design/study_sections": "which keys may stand where in a study, of which its runs' settings are made",
    "design/values": "reads and checks a setting's value, which is compared itself",
    "design/yaml_text": "how settings are read of a text and written; what they are is compared itself",
    "errors": "how a refusal is worded",
    "files": "how a file is written whole",
    "folders": "whose a folder is, and what in it may be replaced",
    "identity": "whether a base is still the one that a run was trained on: the hash is compared itself",
    "launch": "starts the processes of one run",
    "lock": "who may write a directory",
    "metrics": "what is said of a trained model; `evaluate` and `figures` begin with it",
    "model/preflight": "refuses a model or rows before anything is computed",
    "processes": "ends what was started here",
    "progress": "what is shown meanwhile",
    "record": "what stands in a run's directory",
    "report/outputs": "which tables and figures there are; what makes each is compared itself",
    "run/card": "describes a run in words; nothing reads it",
    "run/elsewhere": "other rows and another folder than the run's own, whose measurement does not ask for either",
    "run/load": "gives a finished run back; how is said by its stage, and a judge is of the stage that reads it",
    "run/places": "where what a run names is now; what it is, is compared by its hash",
}
"""Module -> why no result depends on it. Nothing is followed through it."""


def files_of(step: str, stage: str | None = None, makers: tuple[str, ...] = ()) -> dict[str, str]:
    """Module -> sha256 of its file, of `step` as it is for a run of `stage`, or with these makers; sorted.

    makers: `module:function` of what tables or figures load by name.
    """
    loaded = [*makers, *([] if stage is None else [STAGES[stage].implementation])]
    entries = [*ENTRIES[step], *(_module(name.partition(":")[0]) for name in loaded)]
    return {name: _digest(name) for name in sorted(_reached(entries))}


@cache
def code(step: str, stage: str | None = None, makers: tuple[str, ...] = ()) -> str:
    """`files_of` as one line, the digests cut to eight digits: two of them side by side show which file differs."""
    return " ".join(f"{name}:{digest[:8]}" for name, digest in files_of(step, stage, makers).items())


@cache
def code_hash(stage: str) -> str:
    """sha256 of the code that trains `stage`."""
    found = files_of(stage) if stage in ENTRIES else files_of("train", stage)  # sft has a loop of its own
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _reached(entries: Iterable[str]) -> set[str]:
    """The entries and the modules that they reach."""
    reached, waiting = set(), list(entries)
    while waiting:
        name, _, function = waiting.pop().partition(":")
        reached.add(name)
        waiting += imports_of(name, function) - reached - BOOKKEEPING.keys()
    return reached


@cache
def imports_of(name: str, function: str = "") -> frozenset[str]:
    """The modules of the package that a module imports, or those of its imports that one function of it uses."""
    tree = ast.parse((ROOT / f"{name}.py").read_bytes())
    if not function:
        return frozenset(module for statement in _statements(tree) for _, module in bound_by(statement))
    parts = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    modules, named, waiting = set(), {function}, [function]
    while waiting:
        part = parts[waiting.pop()]
        modules |= {module for statement in _statements(part) for _, module in bound_by(statement)}
        names = {node.id for node in ast.walk(part) if isinstance(node, ast.Name)} - named
        waiting += names & parts.keys()
        named |= names
    return frozenset(modules | {module for node in tree.body for bound, module in bound_by(node) if bound in named})


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements in one, but for those under `if TYPE_CHECKING:`, which never run."""
    is_typing = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    for block in ("orelse",) if is_typing else ("body", "orelse", "finalbody", "handlers", "cases"):
        for statement in getattr(node, block, ()):
            yield statement
            yield from _statements(statement)


def bound_by(node: ast.AST) -> list[tuple[str, str]]:
    """(name that an import binds, module of the package that it stands for)."""
    if isinstance(node, ast.Import):
        words = [(alias.asname or "discobeta", alias.name) for alias in node.names]
        return [(bound, _module(word)) for bound, word in words if word.split(".")[0] == "discobeta"]
    if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "discobeta":
        return []
    modules = []
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        modules.append((alias.asname or alias.name, _module(inner if _is_module(inner) else node.module)))
    return modules


def _module(dotted: str) -> str:
    """`discobeta.data.tokens` as `data/tokens`, a package as its `__init__`."""
    name = "/".join(dotted.split(".")[1:])
    return f"{name}/__init__".lstrip("/") if (ROOT / name).is_dir() else name


def _is_module(dotted: str) -> bool:
    name = "/".join(dotted.split(".")[1:])
    return (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()


def _digest(name: str) -> str:
    return hashlib.sha256((ROOT / f"{name}.py").read_bytes()).hexdigest()
