"""What a process of a study imports: its start is most of what a short run costs."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import discobeta
from discobeta import closure
from discobeta.cli import EXTRAS

SCRIPT = """
import json, os, sys
from discobeta import warm
from discobeta.cli import main
class Command:
    poll = staticmethod(lambda: None)
found = []
if sys.argv[1] == "warm":
    os.environ.clear(); os.environ.update(json.loads(sys.argv[3]))
    ready = warm._is_ready(Command)
    import torch, tqdm
    lock = hasattr(tqdm.tqdm, "_lock")
    threads = len(os.listdir("/proc/self/task"))
    found.append([ready, threads, lock, torch.cuda.is_initialized(), sorted(sys.modules)])
for words in json.loads(sys.argv[2]):
    found.append([main(words), sorted(sys.modules)])
print("found", json.dumps(found))
"""


def modules_of(kind, commands, folder, environment=os.environ):
    """What stands in sys.modules after each of the commands, one after the other in one process."""
    words = [sys.executable, "-c", SCRIPT, kind, json.dumps(commands), json.dumps(dict(environment))]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.rpartition("found ")[2])
    assert [status for status, _ in found[-len(commands) :]] == [0] * len(commands), done.stderr[-2000:]
    return found


def packages(modules):
    """The packages that modules are of, without Python's own and those that no file stands for."""
    found = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    return {name for name in found if not name.startswith("_")}


NEVER = {"matplotlib", "scipy", "sklearn", "pydantic", "datasets", "trl"}


@pytest.fixture
def commands(settings, tmp_path):
    """Those of a study of one seed: rows, reference pass, rm, dpo and ppo with loss.png asked for, and measuring."""
    shared = {"plot_loss": True, "tokenized_path": "tokens", "num_eval_generations": 4, "max_new_tokens": 4}
    used = {"add_disco_head": True, "disco_pref": True}
    runs = {
        "rm": settings("rm", **used) | {"plot_loss": True, "tokenized_path": "tokens"},
        "dpo": settings("dpo", **used, add_beta_head=True, use_dynamic_beta=True, reference_path="reference") | shared,
        "ppo": settings("ppo", **used, max_steps=1, reward_model="rm", beta_head="dpo", add_beta_head=True) | shared,
    }
    runs["ppo"] |= {"tokenized_path": "prompts"}
    for name, made in runs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(made | {"output_dir": name}))
    return {
        "shared": [["prepare", "rm.yaml"], ["prepare", "ppo.yaml"], ["reference", "dpo.yaml"]],
        "train": [["train", f"{name}.yaml", "--no-evaluate"] for name in runs],
        "evaluate": [["evaluate", name] for name in runs],
    }


def test_a_training_imports_what_it_needs_and_nothing_else(commands, tmp_path):
    """And measuring no more than training (pandas is pyarrow's wish, when an array becomes numpy's)."""
    modules_of("cold", commands["shared"], tmp_path)
    found = modules_of("cold", commands["train"] + commands["evaluate"], tmp_path)
    trained, measured = packages(found[2][1]), packages(found[-1][1])
    assert {"torch", "transformers", "peft", "accelerate", "pyarrow"} <= trained
    assert not measured & NEVER
    assert measured <= trained
    assert "pyarrow.dataset" not in found[2][1]
    assert not list(tmp_path.rglob("loss.png"))  # of a study that asks for it all the same


def test_the_commands_of_the_world_load_no_study(tmp_path):
    """All is said, as in the jobs of a study."""
    words = "--seed 1 --sft-examples 20 --noise topic --labels probit --flips 0.0 --qualities shared --no-own"
    found = modules_of("cold", [["world", "corpus", "--output", "w", *words.split()]], tmp_path)
    assert not packages(found[0][1]) & NEVER
    assert (tmp_path / "w" / "world.json").is_file()


def test_a_warm_process_has_imported_what_its_forks_need(commands, tmp_path):
    """And nothing of it has started a thread, a bar's lock, or a GPU: then a fork would not be a new process."""
    environment = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    every = [words for part in commands.values() for words in part]
    (ready, threads, lock, gpu, before), *found = modules_of("warm", every, tmp_path, environment)
    assert (ready, threads, lock, gpu) == (True, 1, False, False)
    after = found[-1][1]
    assert not packages(after) - packages(before)
    assert not {name for name in set(after) - set(before) if name.startswith("discobeta")}
    assert len(set(after) - set(before)) < 30, sorted(set(after) - set(before))
    assert not packages(before) & NEVER


def test_no_result_depends_on_how_a_process_starts():
    reached = {name for step in closure.ENTRIES for name in closure.files_of(step)}
    assert not reached & {"warm", "__main__", "worker", "cli", "processes"}


# --- what is declared in pyproject.toml

ROOT = Path(__file__).parent.parent
PACKAGE = Path(discobeta.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORTED_AS = {"pyyaml": "yaml"}
COMES_WITH = {"pydantic_core": "pydantic", "referencing": "snakemake"}
"""Parts of a package that have a name of their own."""

ONLY_IN = {
    "trl": {"inputs/base"},
    "mpmath": {"report"},
    "matplotlib": {"report"},
    "pydantic": {"design", "report"},
    "datasets": {"data", "inputs"},
    "tokenizers": {"inputs"},
    "peft": {"model"},
    "accelerate": {"inputs", "method", "run"},
    "huggingface_hub": {"identity", "inputs", "report"},
    "pyarrow": {"data", "report"},
}
"""Package -> the folders and modules of ours that may import it."""


def declared(*requirements: str) -> set[str]:
    """What requirements let one import."""
    names = {re.match(r"[\w-]+", text)[0].lower() for text in requirements}
    return {IMPORTED_AS.get(name, name) for name in names}


def imported_by(folder: Path) -> dict[str, set[str]]:
    """Package that is not Python's and not ours -> modules in `folder` that import it, anywhere in them."""
    modules = {path: path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.py")}
    beside = {path.stem for path in modules}
    found: dict[str, set[str]] = {}
    for path, module in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"discobeta", *beside}:
                found.setdefault(COMES_WITH.get(name, name), set()).add(module)
    return found


def test_the_package_imports_what_it_declares_and_declares_what_it_imports():
    found, always = imported_by(PACKAGE), declared(*PROJECT["dependencies"])
    assert set(found) - always == set(EXTRAS)
    assert always <= set(found)
    for package, extra in EXTRAS.items():
        assert package in declared(*PROJECT["optional-dependencies"][extra])


def test_a_package_is_imported_only_where_it_serves():
    found = imported_by(PACKAGE)
    wrong = {
        (package, module)
        for package, places in ONLY_IN.items()
        for module in found[package]
        if module not in places and module.partition("/")[0] not in places
    }
    assert not wrong


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_tests_and_benchmarks_import_what_dev_declares(folder):
    extras = PROJECT["optional-dependencies"]
    assert extras["dev"][0] == "discobeta[workflow,sft,slurm]"
    more = [text for name in ("dev", "workflow", "sft", "slurm") for text in extras[name]]
    assert set(imported_by(ROOT / folder)) <= declared(*PROJECT["dependencies"], *more)


WITHOUT_EXTRAS = """
import pkgutil, sys, discobeta
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # None: neither imported nor found
from importlib import import_module
for found in pkgutil.walk_packages(discobeta.__path__, "discobeta."):
    if not found.name.endswith("__main__"):
        import_module(found.name)
from discobeta.cli import main
sys.exit(main(["train", "run.yaml"]))
"""


def test_a_plain_installation_has_all_but_stage_sft_and_there_says_what_to_install(settings, tmp_path):
    """Every module is imported, and a base is asked for, in a process in which no package of an extra can be found."""
    absent = {name for requirements in PROJECT["optional-dependencies"].values() for name in declared(*requirements)}
    absent -= {"discobeta"}
    assert {"trl", "snakemake", "pytest", "tensorboard"} <= absent
    made = settings("sft", finetuning_type="full").items()
    run = {key: value for key, value in made if key not in ("pref_beta", "lora_rank")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *absent]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "discobeta: trl is not installed: pip install -c constraints.txt -e '.[sft]'"
    )
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()
