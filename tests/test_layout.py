"""The layout: which module may import which. Imports within functions count, those of a type checker do not."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import discobeta
from discobeta import closure

PACKAGE = Path(discobeta.__file__).parent

LAYERS = [
    {"__init__", "losses", "metrics", "files", "errors", "seeds", "processes", "progress", "devices"},
    {"design"},
    {"data", "record", "folders", "identity", "closure", "lock"},
    {"model"},
    {"inputs"},
    {"method"},
    {"run"},
    {"report"},
    {"cli", "launch"},
    {"__main__", "worker", "warm"},
]
"""From the ground up: folders, and modules at the top. `__init__` has the version and imports nothing by itself."""

HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    names = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")]
    return {name: set(closure.imports_of(name)) for name in names}


def test_imports_run_down():
    found = imports()
    assert {name.partition("/")[0] for name in found} == set(HEIGHT)
    height = {name: HEIGHT[name.partition("/")[0]] for name in found}
    assert not [(name, other) for name in found for other in found[name] if height[other] > height[name]]


def test_no_imports_run_in_a_circle():
    TopologicalSorter(imports()).prepare()  # raises CycleError, which names the circle


def test_what_decides_what_is_run_needs_no_torch():
    """Also not inside of what it imports: the workflow loads it for every dry run."""
    seen, waiting = set(), [name for name in imports() if name.startswith("design/")]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting += imports()[name] - seen
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not {"torch", "transformers", "peft", "trl"} & {module.partition(".")[0] for module in top}, name
