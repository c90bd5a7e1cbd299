"""What a change of the code, of a default or of the study makes Snakemake do again: the table in docs/workflow.md.

The study is config/smoke.yaml with two arms. It is run once, by a copy of the workflow and of the package whose
commands do nothing but leave what they should (`STUB`), so that Snakemake has its records; every change is then made to
that copy and planned. Counts are by hand: of each stage two arms and two seeds, so 4 runs and 4 evaluations.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("snakemake")

ROOT = Path(__file__).parent.parent
STUDY = {"arms": "[baseline,disco-used_beta-used]"}
STUB = """
import json, os
for path in json.load(open("made.json"))[os.path.relpath(os.readlink("/proc/self/fd/1"))]:
    open(path, "w").write(path)
"""
"""In place of `python -m discobeta`: the job is known by its log, which is where its output goes."""

REPORT = {"tables": 1, "figures": 1, "page": 1}
MEASURED = {"evaluate rm": 4, "evaluate dpo": 4, "evaluate ppo": 4} | REPORT
PPO = {"train_ppo": 4, "evaluate ppo": 4} | REPORT
DPO = {"train_dpo": 4, "evaluate dpo": 4, "train_ppo": 2, "evaluate ppo": 2} | REPORT  # ppo of the Beta Head's arm
RM = {"train_rm": 4, "evaluate rm": 4} | PPO
TRAINED = DPO | RM
TOKENS = {"prepare": 2, "prepare_prompts": 2, "reference": 2, "answers": 4} | TRAINED
EVERYTHING = {"world_corpus": 1, "sft": 1, "world_pairs": 2} | TOKENS


def snakemake(folder: Path, *words: str, **settings: str) -> str:
    command = [sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile", "--cores", "2"]
    command += ["--configfile", "config/smoke.yaml", *words]
    command += ["--config", *(f"{key}={value}" for key, value in (STUDY | settings).items())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def planned(folder: Path, **settings: str) -> Counter:
    """Jobs of a dry run, by rule; evaluations by rule and stage."""
    text = snakemake(folder, "--dry-run", **settings)
    assert "missing provenance" not in text
    counts = Counter()
    for rule, outputs in re.findall(r"^(?:local)?rule (\w+):\n(?:    input: .*\n)?    output: (.*)$", text, re.M):
        stage = re.search("/runs/([a-z]+)/", outputs)
        counts[f"{rule} {stage[1]}" if rule == "evaluate" else rule] += 1
    return counts


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    for name in ("src", "workflow", "config", "envs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "src" / "discobeta" / "__main__.py").write_text(STUB)
    text = snakemake(folder, "--dry-run")
    jobs = re.findall(r"^    output: (.*)\n    log: (.*)$", text, re.M)
    assert len(jobs) == EVERYTHING_COUNT
    (folder / "made.json").write_text(json.dumps({log: outputs.split(", ") for outputs, log in jobs}))
    snakemake(folder)
    assert planned(folder) == {}
    return folder


EVERYTHING_COUNT = sum(EVERYTHING.values())


@pytest.fixture
def copy(finished: Path) -> Iterator[Path]:
    """The finished study, whose source may be edited, and what its page has in it beside."""
    sources = [*(finished / "src").rglob("*.py"), *(finished / "src").rglob("page.*s")]
    before = {path: path.read_bytes() for path in [*sources, *(finished / "workflow" / "report").iterdir()]}
    yield finished
    for path, content in before.items():
        if path.read_bytes() != content:
            path.write_bytes(content)


def edit(folder: Path, name: str, old: str = "", new: str = "") -> None:
    """A new text in a file of the package, or a comment at its end."""
    path = folder / "src" / "discobeta" / f"{name}.py"
    text = path.read_text()
    assert text.count(old) == 1 or not old
    path.write_text(text.replace(old, new) if old else f"{text}\n# another comment\n")


ALL_BUT_THE_CORPUS = {rule: count for rule, count in EVERYTHING.items() if rule != "world_corpus"}

ANSWERED = {"answers": 2, "evaluate dpo": 4} | REPORT
DEFAULTS = {
    "lam": ("lam: float = option(0.95", "lam: float = option(0.9", PPO),
    "head_max_grad_norm": ("head_max_grad_norm: float = option(1.0", "head_max_grad_norm: float = option(2.0", TRAINED),
    "top_k": (
        "top_k: int = option(0",
        "top_k: int = option(5",
        {"answers": 4, "evaluate rm": 4, "evaluate dpo": 4} | PPO,
    ),
    "cutoff_len": ("cutoff_len: int = option(2048", "cutoff_len: int = option(1024", TOKENS),
    "plot_loss": ("plot_loss: bool = option(False", "plot_loss: bool = option(True", {}),
}


@pytest.mark.parametrize("old, new, expected", DEFAULTS.values(), ids=DEFAULTS.keys())
def test_a_changed_default_reruns_what_reads_it(copy: Path, old: str, new: str, expected: dict):
    edit(copy, "design/config", old, new)
    assert planned(copy) == expected


CHANGES = {
    "num_eval_generations of dpo": ({"dpo": "{num_eval_generations: 32}"}, ANSWERED),
    "generations_per_prompt of dpo": ({"dpo": "{generations_per_prompt: 4}"}, ANSWERED),
    "best_of of rm": ({"rm": "{best_of: 4, num_eval_generations: 8}"}, {"answers": 2, "evaluate rm": 4} | REPORT),
    "temperature of dpo": ({"dpo": "{temperature: 0.7}"}, ANSWERED),
    "temperature of ppo": ({"ppo": "{temperature: 0.7}"}, {"answers": 2} | PPO),
    "what rm does not read": ({"common": "{lam: 0.5}"}, PPO),
    "what ppo does not read": ({"common": "{disco_learning_rate: 0.1}"}, TRAINED),
    "what no training reads": ({"common": "{ground_truth: none}"}, {"evaluate dpo": 4, "evaluate ppo": 4} | REPORT),
    "logging": ({"common": "{logging_steps: 3, save_steps: 7, plot_loss: true, report_to: none}"}, REPORT),
    "rows of the world": ({"data": "{world: {train: 700}}"}, {"world_pairs": 2} | TOKENS),
    "a seed": (
        {"seeds": "[1,2,3]"},
        {
            "world_pairs": 1,
            "prepare": 1,
            "prepare_prompts": 1,
            "reference": 1,
            "answers": 2,
            "train_rm": 2,
            "train_dpo": 2,
        }
        | {"train_ppo": 2, "evaluate rm": 2, "evaluate dpo": 2, "evaluate ppo": 2}
        | REPORT,
    ),
}


@pytest.mark.parametrize("changes, expected", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_study_reruns_what_reads_it(finished: Path, changes: dict, expected: dict):
    """Tables and figures say which study they are of, so they are written anew in any case."""
    assert planned(finished, **changes) == expected


CODE = {
    "report/figures": {"figures": 1, "page": 1},
    "report/curves": {"figures": 1, "page": 1},
    "report/cells": {"tables": 1, "page": 1},
    "report/html": {"page": 1},
    "report/outputs": {},
    "design/cost": {},
    "lock": {},
    "metrics": MEASURED,
    "losses": TRAINED,
    "method/dpo": DPO,
    "inputs/base": ALL_BUT_THE_CORPUS,
    "inputs/answers": {"answers": 4} | MEASURED,
}


@pytest.mark.parametrize("name, expected", CODE.items(), ids=CODE.keys())
def test_edited_code_reruns_what_is_made_of_it(copy: Path, name: str, expected: dict):
    edit(copy, name)
    assert planned(copy) == expected


ROW = 'Row("cost", "discobeta.report.costs:cost_table", "cost", "cost", TABLE),'
ROWS = {
    "a table more": (ROW, ROW + ROW.replace('"cost", "disco', '"again", "disco'), {"tables": 1, "page": 1}),
    "another maker": ("figures:reliability_diagram", "figures:interaction", {"figures": 1, "page": 1}),
    "another title": ('"reward by noise"', '"rewards"', {}),
}


@pytest.mark.parametrize("old, new, expected", ROWS.values(), ids=ROWS.keys())
def test_a_row_reruns_what_it_is_a_row_of(copy: Path, old: str, new: str, expected: dict):
    edit(copy, "report/outputs", old, new)
    assert planned(copy) == expected
    assert ("tables/again.tex" in snakemake(copy, "--dry-run")) == ("again" in new)


def test_what_the_page_has_in_it_beside_code_makes_it_anew(copy: Path):
    style = copy / "src" / "discobeta" / "report" / "page.css"
    style.write_text(style.read_text() + "p { color: red; }\n")
    assert planned(copy) == {"page": 1}
    style.write_text(style.read_text().replace("p { color: red; }\n", ""))
    text = copy / "workflow" / "report" / "cost.rst"
    text.write_text(text.read_text() + "More.\n")
    assert planned(copy) == {"page": 1}


def test_what_an_edit_has_taken_back_is_done(copy: Path):
    """Files are known by what is in them, not by when they were written."""
    for path in (copy / "src" / "discobeta").rglob("*.py"):
        os.utime(path)
    assert planned(copy) == {}
