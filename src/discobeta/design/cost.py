"""What a study will take, before it is submitted: its runs, times rates that were measured.

A rate is device-seconds per row (pair, or ppo response) of training, per stage and arm, from the tables of
a study that has run: its `metrics.csv`, with the `config.yaml` that says what it ran. Each line says where its rate
comes from, and between which bounds it lies: the fastest and the slowest run that was measured. What was not measured
may be guessed (`run/flops`), which is said; without a guess its line says that it is not known.
"""

from __future__ import annotations

import math
import operator
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from discobeta.design.arms import Arm
from discobeta.design.schedule import schedule_of, total_steps
from discobeta.design.stages import STAGES
from discobeta.design.study import Run, Study
from discobeta.design.yaml_text import read_yaml
from discobeta.errors import UserError, telling
from discobeta.files import read_json

if TYPE_CHECKING:
    from discobeta.data.counts import Count
    from discobeta.run.flops import Arithmetic

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
    device: str = ""  # on which, where a benchmark has written it

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
    """Jobs of one kind. seconds: of all their devices together; None if not known. low, high: its bounds."""

    name: str
    jobs: int
    length: str = "–"
    seconds: float | None = None
    memory: float = math.nan
    devices: int = 1  # of a job
    low: float | None = None
    high: float | None = None
    rate: str = "not known"  # where it comes from

    def take(self, seconds: float, low: float, high: float, rate: str) -> None:
        self.seconds, self.low, self.high, self.rate = seconds, low, high, rate

    def guess(self, bounds: list[tuple[float, float] | None]) -> None:
        """One (low, high) for each job."""
        if bounds and None not in bounds:
            low, high = (sum(each[end] for each in bounds) for end in (0, 1))
            self.take((low + high) / 2, low, high, "estimate")

    def __str__(self) -> str:
        cells = ("?", "?")
        if self.seconds is not None:
            cells = (f"{self.seconds / self.jobs / self.devices / 60:.1f}", _hours(self.seconds))
        span = "?" if self.low is None else f"{_hours(self.low)}–{_hours(self.high)}"
        return _line(self.name, self.jobs, self.length, *cells, _gib(self.memory), span, self.rate)


def report(
    study: Study,
    folder: Path | None = None,
    rows: Count | None = None,
    guess: Arithmetic | None = None,
    unable: str = "",
) -> str:
    """The estimate as text.

    folder: tables to take rates from; default the study's own, then published ones. rows: those of the study, where
    they are not tokenised yet; guess: what is said of a step that was not measured; unable: why there is no guess.
    """
    measured = find(study, folder)
    steps = estimate(study, measured, rows, guess)
    on_gpu = measured.on_gpu if measured else guess is not None or study.environment == "cuda"
    unit = "GPU-hours" if on_gpu else "CPU-hours"
    known, unknown = ([step for step in steps if (step.seconds is None) == missing] for missing in (False, True))
    jobs, memory = sum(step.jobs for step in steps), pd.Series([step.memory for step in steps]).max()
    hours = _hours(sum(step.seconds for step in known))
    span = f"{_hours(sum(step.low for step in known))}–{_hours(sum(step.high for step in known))}" if known else "?"
    lines = [_line("step", "jobs", "steps per job", "minutes per job", unit, "memory, GiB", "between", "rate")]
    lines += map(str, steps)
    lines.append(_line("total", jobs, "", "", hours, _gib(memory), span, ""))
    lines.append("Not counted: start-up of jobs, queueing, tokenising and the world, tables and figures.")
    if measured:
        on = f" on {measured.device}" if measured.device else ""
        lines.append(f"Rates measured in {measured.folder} ({len(measured.runs)} runs{on}).")
        lines.append(
            "Between: as if every run were as fast as the fastest of them that was measured, or as slow as the slowest."
        )
        if measured.differs:
            lines.append(f"That study has another {', '.join(measured.differs)}: the rates may not carry over.")
    if rows:
        lines.append(
            f"{rows.train:,} rows to train on, {rows.held_out:,} held out: {rows.why}; unusable ones are left out."
        )
    if guess and any(step.rate == "estimate" for step in steps):
        lines.append(f"Estimate: {guess.said}")
    if unable and unknown:
        lines.append(f"No estimate of what was not measured: {unable}")
    if unknown or any(step.rate == "estimate" for step in steps):
        names = ", ".join(step.name for step in unknown)
        lines.append(
            f"Not measured, and in no sum: {names}. A pilot measures them:" if unknown else "A pilot measures it:"
        )
        lines.append(
            f"  snakemake … --config study=pilot 'seeds=[{study.seeds[0]}]' "
            "'common={max_steps: 20, eval_strategy: no}' 'ppo={max_steps: 2}'"
        )
        lines.append("  discobeta cost --configfile … --measured results/pilot/tables")
    return "\n".join(lines)


def estimate(
    study: Study, measured: Measured | None, rows: Count | None = None, guess: Arithmetic | None = None
) -> list[Step]:
    """One step for each kind of job, in the order of the workflow."""
    labels = [label.split(",") for label, _ in study.shared()]
    shared = [words[0] for words in labels]
    steps = [Step(work, shared.count(work)) for work in dict.fromkeys(shared)]
    for step in steps:
        known = measured.shared.seconds[measured.shared.work == step.name] if measured else []
        if len(known):
            step.take(*(step.jobs * one for one in (known.iloc[0], known.min(), known.max())), "measured, whole")
        elif guess:
            stages = [words[1].strip() if len(words) > 2 else None for words in labels if words[0] == step.name]
            runs = [[run for run in study.runs() if stage in (None, run.stage)] for stage in stages]
            step.guess([guess.shared(step.name, of_stage) for of_stage in runs])
    evaluate = Step("evaluate", 0)
    evaluate.take(0.0, 0.0, 0.0, "")
    for stage in study.stages:
        for name, runs in _kinds(study, stage).items():
            lengths = [length(study, run, rows) for run in runs]
            step = Step(name, len(runs), _span([n for n, _ in lengths]), devices=study.gpus_per_run)
            known = [measured.of(stage, run.arm) for run in runs] if measured else []
            if known and not any(found.empty for found in known):
                rates = [(found.seconds * found.processes).sum() / found.rows.sum() for found in known]
                each = [found.seconds * found.processes / found.rows for found in known]
                counts = [count for _, count in lengths]
                step.take(
                    *(
                        sum(rate * count for rate, count in zip(of_runs, counts, strict=True))
                        for of_runs in (rates, [one.min() for one in each], [one.max() for one in each])
                    ),
                    f"measured, {len(pd.concat(each).index.unique())} runs",
                )
                step.memory = max(found.memory.max() for found in known)
            elif guess:
                step.guess([guess.training(run, count, n) for run, (n, count) in zip(runs, lengths, strict=True)])
            steps.append(step)
            if not runs[0].proof:
                evaluate.jobs += len(runs)
                _add_evaluation(evaluate, step, runs, known, guess)
    return [*steps, evaluate]


def _add_evaluation(total: Step, trained: Step, runs: list[Run], known: list[Any], guess: Arithmetic | None) -> None:
    """The evaluations of these runs on top of those before; one that is not known makes the sum unknown."""
    one = Step("evaluate", len(runs))
    means = [found.evaluation for found in known]
    if trained.rate.startswith("measured") and not any(math.isnan(found.mean()) for found in means):
        one.take(
            *(sum(of(found) for found in means) for of in (pd.Series.mean, pd.Series.min, pd.Series.max)), "measured"
        )
    elif guess:
        one.guess([guess.evaluation(run) for run in runs])
    if total.seconds is None or one.seconds is None:
        total.seconds = total.low = total.high = None
        total.rate = "not known"
    else:
        rates = dict.fromkeys(filter(None, [*total.rate.split(" and "), one.rate]))
        sums = (total.seconds + one.seconds, total.low + one.low, total.high + one.high)
        total.take(*sums, " and ".join(rates))


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
    benchmark = folder / "gpu-check.json"
    device = read_json(benchmark)["device"] if benchmark.exists() else ""
    return Measured(runs, shared, folder, differs, device)


def length(study: Study, run: Run, rows: Count | None = None) -> tuple[int, int]:
    """(steps, rows) of a run: steps of the loop, and rows that it trains on, each as often as it comes.

    rows: of the study, where they are not tokenised.
    """
    config = study.config(run)
    schedule = schedule_of(config, _rows(study, run, rows, is_needed=config.max_steps < 0), study.gpus_per_run)
    steps = total_steps(config, schedule)
    steps = min(steps, config.stop_after_steps or steps)
    return steps, schedule.rows_of(steps)


def _rows(study: Study, run: Run, rows: Count | None, is_needed: bool) -> int:
    """Training rows of the run's data, as tokenised; if that is not known and not needed, more than any run sees."""
    if study.world:
        return study.world["train"]
    record = study.rows_of(run) / "tokens.json"
    if not record.exists():
        if rows is not None and STAGES[run.stage].has_pairs:
            return rows.train
        if rows is not None:
            return rows.train if rows.prompts is None else rows.prompts
        if not is_needed:
            return sys.maxsize
        rule = "prepare" if STAGES[run.stage].has_pairs else "prepare_prompts"
        raise UserError(
            "how many steps num_train_epochs makes is known when the rows are, and they are not here: give --rows "
            f"train=N eval=M, run `discobeta fetch` or `snakemake … --until {rule}` first (on a login node), or set "
            "max_steps"
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


def _line(step: str, jobs: int | str, length: str, minutes: str, hours: str, memory: str, span: str, rate: str) -> str:
    cells = f"{step:12} {jobs:>5} {length:>14} {minutes:>16} {hours:>10} {memory:>12} {span:>14}  {rate}"
    return cells.rstrip()


def _gib(memory: float) -> str:
    return "?" if math.isnan(memory) else f"{memory / 2**30:.1f}"


def _span(values: list[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,}–{max(values):,}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f}"
