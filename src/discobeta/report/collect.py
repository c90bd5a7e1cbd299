"""The numbers of the runs that count, in one frame, and what made them. Nothing is averaged here."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Any

import pandas as pd
import yaml

from discobeta.design.study import Study
from discobeta.report.render import Table
from discobeta.report.results import Results, enumerate_seeds

UNKNOWN = "unknown"
COMMIT = re.compile(r"[0-9a-f]{7,64}")
VERSION = re.compile(r"\d[0-9A-Za-z.+!-]{0,30}")
KERNELS = re.compile(r"[0-9A-Za-z_-]{1,30}")


@lru_cache(maxsize=1)  # most tables begin with it
def collect(results: Results) -> pd.DataFrame:
    """Every number of every run that counts, long: one row per (stage, arm, variant, seed, metric).

    variant: "" of the grid's own runs, of which `of_grid` takes the rows; else a control or a point of a sweep.
    Metrics have the names of metrics.json, nested ones with slashes (`by_topic/<topic>/nll`); costs
    begin with `cost/` and `evaluation_cost/`. Proofs are not whole runs and not in here.
    """
    rows = [
        (run.stage, run.arm.name, run.variant, run.seed, f"{prefix}{name}", value)
        for run, found in results.found.items()
        if not run.proof
        for prefix, values in (
            ("", found.metrics), ("cost/", found.cost), ("evaluation_cost/", found.evaluation_cost),
        )
        for name, value in values.items()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["stage", "arm", "variant", "seed", "metric", "value"])


def of_grid(numbers: pd.DataFrame) -> pd.DataFrame:
    """The rows of the grid's own runs; of a frame that knows no variants, all."""
    if "variant" not in numbers:
        return numbers
    return numbers[numbers.variant.fillna("") == ""]


def metrics_table(results: Results) -> Table:
    """`collect`, as a file."""
    return Table(collect(results), [], [], {})


# --- what made the numbers


def config_text(study: Study) -> str:
    """The study's merged config, in one canonical order."""
    return yaml.safe_dump(study.settings, sort_keys=True, allow_unicode=True)


def provenance(results: Results) -> dict[str, str]:
    """What made the numbers: study, seeds, config digest, commits, package versions and CPU kernels.

    config: the first 12 digits of the sha256 of `config_text`. The last three are read from the runs that count;
    several values mean that the runs were made by different versions, or on different machines.
    """
    study = results.study
    commits, versions, kernels = set(), set(), set()
    for found in results.found.values():
        if found.fault:
            continue
        commit = _of_form(COMMIT, found.facts.get("commit"))[:12]
        commits.add(f"{commit} (dirty)" if found.facts.get("dirty") is True else commit)
        versions.add(_of_form(VERSION, _inside(found.facts, "versions", "discobeta")))
        kernels.add(_of_form(KERNELS, _inside(found.facts, "machine", "kernels")))
        if found.evaluation:
            kernels.add(_of_form(KERNELS, found.evaluation.get("kernels")))
    return {
        "study": study.name,
        "seeds": " ".join(map(str, study.seeds)),
        "config": hashlib.sha256(config_text(study).encode()).hexdigest()[:12],
        "commit": ", ".join(sorted(commits)) or UNKNOWN,
        "version": ", ".join(sorted(versions)) or UNKNOWN,
        "kernels": ", ".join(sorted(kernels)) or UNKNOWN,
    }


def _inside(facts: dict[str, Any], outer: str, inner: str) -> Any:
    return facts[outer].get(inner) if isinstance(facts.get(outer), dict) else None


def _of_form(form: re.Pattern, value: Any) -> str:
    """What came with a run is printed if it looks like what it should be."""
    return value if isinstance(value, str) and form.fullmatch(value) else UNKNOWN


def provenance_line(results: Results) -> str:
    made_by = provenance(results)
    return (
        f"Study {made_by['study']}, {enumerate_seeds(results.study.seeds)}, config {made_by['config']}, "
        f"commit {made_by['commit']}, discobeta {made_by['version']}, CPU kernels {made_by['kernels']}."
    )
