"""The workflow as Snakemake sees it: job counts of every shipped config, refusals, what reruns what.

The counts are derived by hand. Per seed, 3 reward models and 9 policies; with `idle_arms: prove` 2 + 4
in full and 2 + 8 proofs (tests/test_study.py says which). Every full run is evaluated.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("snakemake")

ROOT = Path(__file__).parent.parent
ALWAYS = {"tables": 1, "figures": 1, "all": 1}
EMBEDDED = ALWAYS | {
    "world_corpus": 1,
    "sft": 1,
    "world_pairs": 2,
    "prepare": 2,
    "reference": 2,
    "train_rm": 6,
    "train_dpo": 18,
    "evaluate": 24,
}
PROVED = ALWAYS | {"prepare": 1, "reference": 1, "train_rm": 8, "train_dpo": 24, "evaluate": 12}
SHIPPED = {
    "config": EMBEDDED,
    "smoke": EMBEDDED,
    "hh-rlhf": PROVED,
    "qwen3-0.6b": PROVED,
    "hh-rlhf hh-rlhf-tiny": ALWAYS
    | {"sft": 1, "prepare": 1, "reference": 1, "train_rm": 6, "train_dpo": 18, "evaluate": 24},
}


def dry_run(folder: Path, configs: list[Path], *words: str) -> subprocess.CompletedProcess:
    """`snakemake --dry-run` with `folder`, which holds the shipped configs and no results, as its working directory."""
    (folder / "config").symlink_to(ROOT / "config")
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile"]
    command += ["--dry-run", "--directory", folder, "--configfile", *configs, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def job_counts(output: str) -> dict[str, int]:
    """The table that follows `Job stats:`, without its total."""
    table = output.split("Job stats:")[1].split("\n\n")[0]
    counts = {name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)$", table, re.MULTILINE)}
    assert counts.pop("total") == sum(counts.values())
    return counts


def test_every_shipped_config_is_counted_here():
    names = {path.stem for path in (ROOT / "config").glob("*.yaml")} - {"datasets"}
    assert names == {name for configs in SHIPPED for name in configs.split()}


@pytest.mark.parametrize("configs, expected", SHIPPED.items(), ids=SHIPPED.keys())
def test_job_counts(configs: str, expected: dict[str, int], tmp_path: Path):
    done = dry_run(tmp_path, [ROOT / "config" / f"{name}.yaml" for name in configs.split()], "--quiet", "rules")
    assert done.returncode == 0, done.stdout + done.stderr
    assert job_counts(done.stdout) == expected


def test_the_command_line_changes_a_study(tmp_path: Path):
    """Snakemake hands over nested values as texts; a seed must still be a number and a size too."""
    words = ["--config", "seeds=[7]", "arms=[baseline, disco-used_beta-used]", "data={world: {train: 64}}"]
    done = dry_run(tmp_path, [ROOT / "config" / "smoke.yaml"], *words)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = job_counts(done.stdout)
    assert (counts["world_pairs"], counts["train_rm"], counts["train_dpo"], counts["evaluate"]) == (1, 2, 2, 4)
    assert "results/smoke/runs/dpo/disco-used_beta-used/seed-7/metrics.json" in done.stdout


def refusal(tmp_path: Path, study: dict) -> str:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    done = dry_run(tmp_path, [path])
    output = done.stdout + done.stderr
    assert done.returncode == 1
    assert "Traceback" not in output
    assert "Job stats" not in output
    return output


def test_a_flag_in_a_study_is_refused_before_anything_runs(tmp_path: Path):
    study = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    study["dpo"]["disco_pref"] = True
    message = refusal(tmp_path, study)
    assert f"{tmp_path}/study.yaml: dpo: disco_pref may not stand here: it comes from the grid" in message


def test_a_run_that_would_be_refused_stops_the_study(tmp_path: Path):
    study = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    study["dpo"]["pref_bta"] = study["dpo"].pop("pref_beta")
    message = refusal(tmp_path, study)
    assert "study.yaml: dpo, arm baseline, seed 1: unknown key 'pref_bta'; did you mean 'pref_beta'?" in message


def test_an_unknown_key_of_a_study_is_refused(tmp_path: Path):
    study = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text()) | {"seedz": [1]}
    assert "unknown key 'seedz'; did you mean 'seeds'?" in refusal(tmp_path, study)


def test_a_missing_config_file_is_named(tmp_path: Path):
    done = dry_run(tmp_path, [tmp_path / "nowhere.yaml"])
    assert done.returncode != 0
    assert "nowhere.yaml" in done.stdout + done.stderr


# --- the schema says what study.py says


def test_schema_and_study_know_the_same_keys():
    from discobeta import study

    schema = yaml.safe_load((ROOT / "workflow" / "schemas" / "config.schema.yaml").read_text())
    properties = schema["properties"]
    world, fixed = properties["data"]["oneOf"]
    assert set(properties) == set(study.KEYS)
    assert set(world["properties"]["world"]["properties"]) == set(study.WORLD_DEFAULTS)
    assert set(fixed["properties"]) == set(study.DATA_KEYS)
    assert set(properties["base"]["properties"]) == {"sft", *study.MODEL_KEYS}
    objects = [schema, world, world["properties"]["world"], fixed, properties["base"]]
    assert all(part["additionalProperties"] is False for part in objects)


# --- which package files a rule lists

BOOKKEEPING = {"__init__", "config", "errors", "files", "runs", "study", "report/figures"}
"""What decides how a step is asked for and written down, not what comes out of it."""

ELSEWHERE = {
    "train_rm": {"data/tokens"},
    "train_dpo": {"data/tokens"},
    "reference": {"data/tokens", "seeds"},
    "world_pairs": {"policy"},
    "prepare": set(),
    "sft": {"policy"},
    "evaluate": {"data/batches", "data/tokens", "heads", "policy", "seeds", "stages/__init__", "world"},
    "tables": {"flags"},
    "figures": {"flags"},
}
"""Imports that a rule need not list: an earlier step lists them, or only loading a model is taken from them."""


@pytest.fixture(scope="module")
def modules_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Rule -> the package modules among its input, as Snakemake lists them."""
    done = dry_run(tmp_path_factory.mktemp("plan"), [ROOT / "config" / "smoke.yaml"])
    inputs = re.findall(r"^(?:local)?rule (\w+):\n    input: (.*)$", done.stdout, re.MULTILINE)
    return {rule: set(re.findall(r"src/discobeta/([\w/]+)\.py", files)) for rule, files in inputs}


def imported_by(module: str) -> set[str]:
    """The modules of the package that the file imports, anywhere in it."""
    package = ROOT / "src" / "discobeta"
    found = set()
    for node in ast.walk(ast.parse((package / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "discobeta":
            parent = "/".join(node.module.split(".")[1:])
            children = {f"{parent}/{name.name}".strip("/") for name in node.names}
            modules = {name for name in children if (package / f"{name}.py").exists()}
            found |= modules or {parent if (package / f"{parent}.py").exists() else f"{parent}/__init__".strip("/")}
    return found


@pytest.mark.parametrize("rule, elsewhere", ELSEWHERE.items(), ids=ELSEWHERE.keys())
def test_a_rule_lists_the_files_that_it_is_made_of(rule: str, elsewhere: set[str], modules_of: dict[str, set[str]]):
    listed = modules_of[rule]
    other_stages = {"stages/rm", "stages/dpo", "stages/sft"} - listed
    needed = {name for module in listed for name in imported_by(module)}
    assert listed
    assert needed - listed - BOOKKEEPING - elsewhere - other_stages == set()


def test_editing_one_stage_leaves_the_other_alone(modules_of: dict[str, set[str]]):
    assert not {"stages/dpo", "reference"} & modules_of["train_rm"]
    assert "stages/rm" not in modules_of["train_dpo"]
    assert not {"evaluate", "metrics", "report/tables"} & (modules_of["train_rm"] | modules_of["train_dpo"])
