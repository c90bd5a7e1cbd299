"""What a study will take, before it is submitted: its runs, times rates that were measured.

A rate is device-seconds per row (pair, or ppo response) of training, per stage and arm, from the tables of
a study that has run: its `metrics.csv`, with the `config.yaml` that says what it ran. Nothing is
guessed: without a measurement of a stage its line says so.
"""

from __future__ import annotations

import math
import operator
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from discobeta.design.arms import Arm
from discobeta.design.schedule import schedule_of, total_steps
from discobeta.design.stages import STAGES
from discobeta.design.study import Run, Study
from discobeta.design.yaml_text import read_yaml
from discobeta.errors import UserError, telling
from discobeta.files import read_json

PUBLISHED = Path("results/published")
METRICS = "metrics.csv"
TEXTS = ("stage", "arm", "variant", "metric")
RATES = {
    "seconds": "cost/seconds",
    "processes": "cost/processes",
    "rows": "cost/rows",
    "gpu_seconds": "cost/gpu_seconds",
    "memory": "cost/peak_memory_bytes",
    "evaluation": "evaluation_cost/seconds",
}


@dataclass
class Measured:
    """The runs that rates come from, one row each, and where they stand."""

    runs: pd.DataFrame  # stage, arm, and the columns of RATES
    shared: pd.DataFrame  # work, seconds per job
    folder: Path
    differs: list[str]  # sections of the config in which that study differs from this one

    @property
    def on_gpu(self) -> bool:
        return bool((self.runs.gpu_seconds > 0).any())

    def of(self, stage: str, arm: Arm) -> pd.DataFrame:
        """The runs of this stage and arm; of its twin or else of all arms if this one was not measured."""
        of_stage = self.runs[self.runs.stage == stage]
        by_arm = (of_stage[of_stage.arm == name] for name in (arm.name, arm.twin.name))
        return next((found for found in by_arm if len(found)), of_stage)


@dataclass
class Step:
    """Jobs of one kind. seconds: of all their devices together; None if not measured."""

    name: str
    jobs: int
    length: str = "–"
    seconds: float | None = None
    memory: float = math.nan
    devices: int = 1  # of a job

    def __str__(self) -> str:
        cells = ("?", "?")
        if self.seconds is not None:
            cells = (f"{self.seconds / self.jobs / self.devices / 60:.1f}", _hours(self.seconds))
        return _line(self.name, self.jobs, self.length, *cells, _gib(self.memory))


def report(study: Study, folder: Path | None = None) -> str:
    """The estimate as text. folder: tables to take rates from; default the study's own, then published ones."""
    measured = find(study, folder)
    steps = estimate(study, measured)
    unit = "GPU-hours" if measured and measured.on_gpu else "CPU-hours"
    known, unknown = ([step for step in steps if (step.seconds is None) == missing] for missing in (False, True))
    jobs, memory = sum(step.jobs for step in steps), pd.Series([step.memory for step in steps]).max()
    hours = _hours(sum(step.seconds for step in known))
    lines = [_line("step", "jobs", "steps per job", "minutes per job", unit, "memory, GiB")]
    lines += map(str, steps)
    lines.append(_line("total", jobs, "", "", hours, _gib(memory)))
    lines.append("Not counted: start-up of jobs, queueing, tokenising and the world, tables and figures.")
    if measured:
        lines.append(f"Rates measured in {measured.folder} ({len(measured.runs)} runs).")
        if measured.differs:
            lines.append(f"That study has another {', '.join(measured.differs)}: the rates may not carry over.")
    if unknown:
        lines.append(f"Not measured, and in no sum: {', '.join(step.name for step in unknown)}. A pilot measures them:")
        lines.append(
            f"  snakemake … --config study=pilot 'seeds=[{study.seeds[0]}]' "
            "'common={max_steps: 20, eval_strategy: no}' 'ppo={max_steps: 2}'"
        )
        lines.append("  discobeta cost --configfile … --measured results/pilot/tables")
    return "\n".join(lines)


def estimate(study: Study, measured: Measured | None) -> list[Step]:
    """One step for each kind of job, in the order of the workflow."""
    shared = [label.partition(",")[0] for label, _ in study.shared()]
    steps = [Step(work, shared.count(work)) for work in dict.fromkeys(shared)]
    for step in steps:
        known = measured.shared.seconds[measured.shared.work == step.name] if measured else []
        step.seconds = step.jobs * known.iloc[0] if len(known) else None
    evaluate = Step("evaluate", 0, seconds=0.0)
    for stage in study.stages:
        for name, runs in _kinds(study, stage).items():
            lengths = [length(study, run) for run in runs]
            step = Step(name, len(runs), _span([n for n, _ in lengths]), devices=study.gpus_per_run)
            known = [measured.of(stage, run.arm) for run in runs] if measured else []
            if known and not any(found.empty for found in known):
                rates = [(found.seconds * found.processes).sum() / found.rows.sum() for found in known]
                step.seconds = sum(rate * rows for rate, (_, rows) in zip(rates, lengths, strict=True))
                step.memory = max(found.memory.max() for found in known)
            steps.append(step)
            if not runs[0].proof:
                evaluate.jobs += len(runs)
                more = sum(found.evaluation.mean() for found in known)
                is_known = evaluate.seconds is not None and step.seconds is not None and not math.isnan(more)
                evaluate.seconds = evaluate.seconds + more if is_known else None
    return [*steps, evaluate]


def _kinds(study: Study, stage: str) -> dict[str, list[Run]]:
    """Runs of a stage by what the table calls them: the grid's, those beside it, proofs."""
    runs = [run for run in study.runs() if run.stage == stage]
    kinds = {
        stage: [run for run in runs if not (run.proof or run.variant)],
        f"{stage}, beside": [run for run in runs if run.variant],
        f"{stage}, proof": [run for run in runs if run.proof],
    }
    return {name: those for name, those in kinds.items() if those}


def find(study: Study, folder: Path | None) -> Measured | None:
    """The measurements in `folder`; else the study's own; else published ones on the same base."""
    if folder is not None:
        if not (folder / METRICS).is_file():
            raise UserError(f"--measured: {folder} has no {METRICS} (the tables of a study that has run have one)")
        return read(study, folder)
    if (study.tables_directory / METRICS).exists():
        return read(study, study.tables_directory)
    published = [read(study, path.parent) for path in sorted(PUBLISHED.glob(f"*/{METRICS}"))]
    alike = [found for found in published if "base" not in found.differs]
    return min(alike, key=lambda found: len(found.differs), default=None)


def read(study: Study, folder: Path) -> Measured:
    """The rates of one folder of tables. Raises UserError if they are none."""
    with telling(f"{folder} does not hold the tables of a study"):
        return _read(study, folder)


def _read(study: Study, folder: Path) -> Measured:
    types = dict.fromkeys(TEXTS, str) | {"value": float}
    long = pd.read_csv(folder / METRICS, dtype=types, keep_default_na=False, na_values=[""])  # "null" is a name too
    if "variant" in long:
        long = long[long.variant.isna()]  # what is trained otherwise may take longer, or shorter
    wide = long.pivot_table(index=["stage", "arm", "seed"], columns="metric", values="value").reset_index()
    # what was measured before rows were counted under this name says nothing here
    wide = wide.reindex(columns=["stage", "arm", *RATES.values()]).dropna(subset=[RATES["rows"]])
    runs = wide.rename(columns={metric: name for name, metric in RATES.items()})
    amounts = runs[list(RATES)].astype(float)
    if ((amounts < 0) | amounts.isin([math.inf])).any(axis=None) or not (amounts.rows > 0).all():
        raise UserError(f"{folder / METRICS}: costs should be positive numbers")
    shared = pd.DataFrame(columns=["work", "seconds"])
    if (folder / "cost.csv").exists():
        costs = pd.read_csv(folder / "cost.csv")
        shared = costs.loc[costs.stage == "shared", ["work", "seconds"]].dropna().astype({"seconds": float})
    theirs = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    sections = ["base", "data", "prompts", "common", *study.stages, "gpus_per_run"]
    differs = [name for name in sections if theirs.get(name) != study.settings.get(name)]
    return Measured(runs, shared, folder, differs)


def length(study: Study, run: Run) -> tuple[int, int]:
    """(steps, rows) of a run: steps of the loop, and rows that it trains on, each as often as it comes."""
    config = study.config(run)
    schedule = schedule_of(config, _rows(study, run, is_needed=config.max_steps < 0), study.gpus_per_run)
    steps = total_steps(config, schedule)
    steps = min(steps, config.stop_after_steps or steps)
    return steps, schedule.rows_of(steps)


def _rows(study: Study, run: Run, is_needed: bool) -> int:
    """Training rows of the run's data, as tokenised; if that is not known and not needed, more than any run sees."""
    if study.world:
        return study.world["train"]
    record = study.rows_of(run) / "tokens.json"
    if not record.exists():
        if not is_needed:
            return sys.maxsize
        rule = "prepare" if STAGES[run.stage].has_pairs else "prepare_prompts"
        raise UserError(
            f"how many steps num_train_epochs makes is known when the rows are: run `snakemake … --until {rule}` first "
            "(on a login node), or set max_steps"
        )
    with telling(f"{record} does not say how many rows there are"):
        rows = operator.index(read_json(record)["counts"]["train"])
        if rows < 1:
            raise ValueError(rows)
        return rows


UNITS = {"MB": 1e6, "GB": 1e9, "MIB": 2.0**20, "GIB": 2.0**30}


def bytes_of(text: str) -> float:
    """24GB -> 24e9, 80GiB -> 80 * 2^30. Raises UserError for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text.strip(), re.ASCII)
    size = float(match[1]) * UNITS.get(match[2].upper(), 0) if match else 0
    if not size:
        raise UserError(f"--memory: {text!r} should be a size such as 24GB or 80GiB")
    return size


def _line(step: str, jobs: int | str, length: str, minutes: str, hours: str, memory: str) -> str:
    return f"{step:12} {jobs:>5} {length:>14} {minutes:>16} {hours:>10} {memory:>12}"


def _gib(memory: float) -> str:
    return "?" if math.isnan(memory) else f"{memory / 2**30:.1f}"


def _span(values: list[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,}–{max(values):,}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f}"
