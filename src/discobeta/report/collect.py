"""What the runs of a study left behind. Nothing is averaged here, and what is not there is named."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from discobeta.files import read_json
from discobeta.study import Run, Study

SOURCES = {"metrics.json": "", "cost.json": "cost/", "evaluation_cost.json": "evaluation_cost/"}


def collect(study: Study) -> pd.DataFrame:
    """Every number of every run, long: one row per (stage, arm, seed, metric).

    Metrics have the names of metrics.json, nested ones with slashes (`by_topic/<topic>/nll`); costs
    begin with `cost/` and `evaluation_cost/`. Proofs are not whole runs and not in here.
    """
    rows = [
        (run.stage, run.arm.name, run.seed, metric, value)
        for run in study.runs()
        if not run.proof
        for file, prefix in SOURCES.items()
        for metric, value in numbers(read_if_there(run.directory / file), prefix)
    ]
    return pd.DataFrame(rows, columns=["stage", "arm", "seed", "metric", "value"])


def numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers in nested mappings, with their path; texts and nulls are left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def absence(run: Run) -> str | None:
    """Why a run has no metrics; None if it has."""
    if (run.directory / "metrics.json").exists():
        return None
    if is_trained(run):
        return "not evaluated"
    return "not finished" if (run.directory / "log.jsonl").exists() else "not trained"


def is_trained(run: Run) -> bool:
    return (run.directory / "provenance.json").exists()  # written last


def describe_missing(runs: Iterable[Run]) -> str:
    """The runs without metrics, e.g. `baseline: seeds 2, 3 (not trained)`; empty if there are none."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for run in runs:
        if reason := absence(run):
            seeds.setdefault((run.arm.name, reason), []).append(run.seed)
    return "; ".join(f"{arm}: {enumerate_seeds(missing)} ({reason})" for (arm, reason), missing in seeds.items())


def enumerate_seeds(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def config_text(study: Study) -> str:
    """The study's merged config, in one canonical order."""
    return yaml.safe_dump(study.settings, sort_keys=True, allow_unicode=True)


def provenance(study: Study) -> dict[str, str]:
    """What made the numbers: study, seeds, config digest, commit and package version.

    config: the first 12 digits of the sha256 of `config_text`. commit and version are read from the
    runs; several values mean that the runs were made by different versions.
    """
    commits, versions = set(), set()
    for run in study.runs():
        record = read_if_there(run.directory / "provenance.json")
        if record:
            commit = str(record.get("commit") or "unknown")[:12]
            commits.add(f"{commit} (dirty)" if record.get("dirty") else commit)
            versions.add(str((record.get("versions") or {}).get("discobeta", "unknown")))
    return {
        "study": study.name,
        "seeds": " ".join(map(str, study.seeds)),
        "config": hashlib.sha256(config_text(study).encode()).hexdigest()[:12],
        "commit": ", ".join(sorted(commits)) or "unknown",
        "version": ", ".join(sorted(versions)) or "unknown",
    }


def provenance_line(study: Study) -> str:
    made_by = provenance(study)
    return (
        f"Study {made_by['study']}, {enumerate_seeds(study.seeds)}, config {made_by['config']}, "
        f"commit {made_by['commit']}, discobeta {made_by['version']}."
    )
