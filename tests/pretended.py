"""A study whose jobs only leave their files: a copy of workflow and package in which no command computes anything.

So Snakemake has its records of everything within seconds, and what it would do next can be tried. A trained run has
the record and the config that a true one has, as far as they say which run it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = "config/smoke.yaml"
STUDY = {"arms": "[baseline,disco-used_beta-absent]", "seeds": "[1]", "stages": "[rm,dpo]"}

MAIN = '''
import json, os, signal, sys, time
from pathlib import Path

command, *words = sys.argv[1:]

def leave(folder, *names):
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(path))

if command == "evaluate":
    leave(words[0], "metrics.json", "examples.parquet", "evaluation.json", "evaluation_cost.json")
elif command == "world":
    folder = words[words.index("--output") + 1]
    of = {"corpus": ("sft.jsonl", "tokenizer/tokenizer.json"), "pairs": ("train.jsonl", "eval.jsonl")}
    leave(folder, *of[words[0]])
    keys = dict(zip(words[1::2], words[2::2]))
    known = {"corpus": {"noise": keys.get("--noise")}, "pairs": {"train": int(keys.get("--train", 0))}}
    Path(folder, {"corpus": "world.json", "pairs": "pairs.json"}[words[0]]).write_text(json.dumps(known[words[0]]))
else:
    from discobeta import files
    from discobeta.design.config import RunConfig
    from discobeta.design.yaml_text import write_yaml
    given = json.loads(sys.stdin.read()) if command in ("train", "prepare", "reference", "answers") else None
    if command in ("tables", "figures"):
        import yaml
        from discobeta.design.study import Study
        from discobeta.report import outputs
        study = Study(yaml.safe_load(sys.stdin.read()))
        for output in getattr(outputs, command)(study):
            leave(getattr(study, f"{command}_directory"), *output.files)
        if command == "tables":
            leave(study.tables_directory, "config.yaml")
    elif command == "page":
        import yaml
        from discobeta.design.study import Study
        leave(Study(yaml.safe_load(sys.stdin.read())).tables_directory.parent, "report.html")
    elif command == "train":
        from discobeta.record import package_hash, settings_hash
        config, _ = RunConfig.from_mapping(given)
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        Path("started").mkdir(exist_ok=True)
        Path("started", str(folder).replace("/", ":")).write_text(str(os.getpid()))
        while Path("wait").exists():
            time.sleep(0.02)
        with open("trained", "a") as stream:
            stream.write(f"{folder}\\n")
        write_yaml(config.resolved(), folder / "config.yaml")
        record = {"settings": settings_hash(config), "package": package_hash()}
        files.write_sealed(folder / "provenance.json", record)
    else:
        names = {"prepare": ("tokenized_path", "tokens.json", "train.parquet", "eval.parquet"),
                 "reference": ("reference_path", "reference.json", "train.safetensors", "eval.safetensors"),
                 "answers": ("reference_answers_path", "answers.json", "responses.safetensors")}
        key, *made = names[command]
        leave(given[key], *made)
'''  # fmt: skip


def make(folder: Path) -> Path:
    """The copy, in which nothing has run yet."""
    for name in ("src", "workflow", "config", "envs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "src" / "discobeta" / "__main__.py").write_text(MAIN)
    return folder


def command(*words: str, **settings: str) -> list[str]:
    given = [f"{key}={value}" for key, value in (STUDY | settings).items()]
    start = [sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile", "--cores", "2"]
    return [*start, "--configfile", CONFIG, *words, "--config", *given]


def environment() -> dict[str, str]:
    """The one of a shell, in which nothing says where a package is."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def snakemake(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess:
    found = command(*words, **settings)
    return subprocess.run(found, capture_output=True, text=True, cwd=folder, timeout=300, env=environment())


def planned(folder: Path, *words: str, **settings: str) -> Counter:
    """Jobs of a dry run, by rule, without the target."""
    done = snakemake(folder, "--dry-run", *words, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return Counter(re.findall(r"^(?:local)?rule (\w+):$", done.stdout + done.stderr, re.M)) - Counter(["all"])


def trained(folder: Path) -> list[str]:
    """The runs that have been trained since the study was made, once for each time."""
    path = folder / "trained"
    return sorted(path.read_text().splitlines()) if path.exists() else []
