"""A study under Snakemake, killed as a whole or its head alone, and started again: the same tables."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import SCALE, STUDY
from harness import differences, snapshot

pytest.importorskip("snakemake")

ROOT = Path(__file__).parent.parent.parent
PARTS = ("logs", "figures", "report.html", "tables/cost.", "tables/metrics.csv")
LEFT = (".snakemake", *(f"results/tiny/{part}" for part in PARTS))
"""What is of Snakemake, figures, which hold their date, and what the jobs took, which the page says too."""


def snakemake(place: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile", "--cores", "2"]
    command += ["--directory", place, "--configfile", place / "study.yaml", "--nolock", "--rerun-incomplete", "--quiet"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = (place.parent / "snakemake.log").open("w")
    return subprocess.Popen(
        list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True, env=environment
    )


def finish(place: Path) -> dict:
    """Run it to its end. What it leaves, without what is Snakemake's."""
    ended = snakemake(place).wait(600)
    logs = "".join(path.read_text(errors="replace")[-300:] for path in place.glob("results/tiny/logs/**/*.log"))
    assert ended == 0, (place.parent / "snakemake.log").read_text()[-3000:] + logs
    return {name: state for name, state in snapshot(place).items() if not name.startswith(LEFT)}


def test_a_study_that_is_killed(inputs, tmp_path, tally):
    template, place, failures, dice = tmp_path / "template", tmp_path / "place", [], random.Random("study")
    shutil.copytree(inputs, template)
    two = STUDY | {"arms": ["baseline", "disco-used_beta-absent"]}
    (template / "study.yaml").write_text(yaml.safe_dump(two))
    shutil.copytree(template, place)
    started = time.monotonic()
    wanted = finish(place)
    took = time.monotonic() - started
    for _ in range(max(1, round(10 * SCALE))):
        shutil.rmtree(place)
        shutil.copytree(template, place)
        told = []
        for _ in range(dice.choice((1, 1, 2))):
            after, whole = took * dice.uniform(0.2, 0.95), dice.random() < 0.5
            process = snakemake(place)
            time.sleep(after)
            tally["kills"] += process.poll() is None
            if process.poll() is None:
                (os.killpg if whole else os.kill)(process.pid, signal.SIGKILL)
            process.wait()
            told.append(f"{'all' if whole else 'its head'} after {after:.1f} of {took:.1f} s")
        if wrong := differences(wanted, finish(place)):
            failures.append(f"{told}: {wrong[:9]}")
    tally["different"] += len(failures)
    assert not failures, "\n".join(failures)
