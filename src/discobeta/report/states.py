"""How far a run is, and a whole study: read off what stands on the disk, wherever its jobs are.

Nothing is asked of Snakemake or of a scheduler, and nothing is written. A process that writes a run holds its directory
(`lock`), so a run is known to be running by that; what has no directory of its own yet is known by its log. Weights are
not read here: whether a finished run is undamaged is what `discobeta report` looks at.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from discobeta import files, lock, processes, record
from discobeta.design.config import RunConfig, default_of
from discobeta.design.stages import STAGES
from discobeta.design.study import Run, Study
from discobeta.design.yaml_text import read_yaml
from discobeta.errors import UserError, shorten

Kind = Literal["done", "running", "interrupted", "waiting", "failed"]

STARTING = 120.0
"""Seconds for which a log that has just been begun stands for a job that has not come to its directory yet."""

RECENT = 5
"""Lines of speed.jsonl that a pace is the mean of."""

COMPLAINT = re.compile(
    r"discobeta: (?!interrupted;)|\w*(Error|Exception)\b|Traceback|Killed|Segmentation fault|CANCELLED|"
    r"command not found|No module named|No space left"
)
"""What the last line of a log has in it if its job has failed, and said so."""


@dataclass(frozen=True)
class State:
    """What became of a run so far.

    step, steps: of its training, None where they are not known; of an interrupted run the step that it goes on from.
    pace: seconds a step, over the last few; None if none is known.
    detail: for people: who writes it, why it failed or is not done.
    """

    kind: Kind
    step: int | None = None
    steps: int | None = None
    pace: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Job:
    """What a study does once: a job of its workflow."""

    kind: str  # world, base, pairs, tokens, prompts, reference, answers, rm, dpo, ppo, evaluate
    name: str  # which of its kind: baseline, seed 1
    target: Path  # its last output: what Snakemake is asked for
    log: Path
    run: Run | None = None  # of a training or an evaluation


# --- one run


def state_of(directory: str | Path, config: RunConfig | None = None, *, log: Path | None = None) -> State:
    """The state of the training whose directory this is.

    config: what is to be trained there; without it, whatever its config.yaml says. log: what the job printed.
    """
    directory = Path(directory)
    steps = steps_of(directory, config)
    if (directory / "provenance.json").exists() and (config is None or not (why := _other(directory, config))):
        return State("done", steps, steps)
    if (holder := living_holder(directory)) is not None:
        return State("running", last_step(directory) or 0, steps, _pace(directory), lock.said_of(holder))
    if (directory / "provenance.json").exists():
        return State("waiting", None, steps, detail=why)
    if log is not None and (complaint := complaint_in(log)):
        return State("failed", last_step(directory), steps, detail=complaint)
    if last_step(directory) is not None or (directory / lock.NAME).exists():
        kept = max(map(_number, directory.glob("checkpoints/step-*.pt")), default=0)
        return State("interrupted", kept, steps, _pace(directory), f"goes on from step {kept}" if kept else "")
    if log is not None and _is_fresh(log):
        return State("running", 0, steps, detail="starting")
    return State("waiting", None, steps)


def living_holder(directory: Path) -> dict[str, Any] | None:
    """Who writes `directory` now; None if nobody does.

    A process of this machine is looked up. One of another machine has touched its file a moment ago; the clocks of the
    two, and what a network file system is slow to tell, may be a minute apart.
    """
    path = directory / lock.NAME
    try:
        silent = time.time() - path.stat().st_mtime
    except OSError:
        return None
    holder = lock.read_holder(path)
    if holder is None or lock.is_dead(holder) or silent > 4 * lock.BEAT + 60:
        return None
    return holder


def complaint_in(log: Path) -> str:
    """The last line of a log, if it is one that says that its job has failed; else nothing."""
    line = next((line for line in reversed(last_lines(log, 5)) if line.strip()), "")
    return shorten(line.strip(), 200) if COMPLAINT.search(line) else ""


def last_lines(log: Path, count: int) -> list[str]:
    """The end of a text file, of which no more than that is read; a bar that was drawn over is as it was last."""
    try:
        with log.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(-min(stream.tell(), 200 * count + 4000), 2)
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n") if line.strip()][-count:]


def _is_fresh(log: Path) -> bool:
    try:
        return time.time() - log.stat().st_mtime < STARTING
    except OSError:
        return False


def _other(directory: Path, config: RunConfig) -> str:
    """Why the finished run in `directory` is not the one of `config`; nothing if it is, as far as its record says."""
    try:
        facts = files.read_sealed(directory / "provenance.json")
    except UserError as error:
        return f"damaged: {error}"
    if facts.get("settings") == record.settings_hash(config):
        return ""
    # another hash, of other settings or of a version that had other keys; thousands of files are read the quick way
    try:
        text = (directory / "config.yaml").read_text(encoding="utf-8")
        here = dict(yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return "its config.yaml cannot be read"
    wanted = record.trained_with(config)
    here = {name: here.get(name, default_of(name, config.stage)) for name in wanted}
    different = record.difference(here, wanted)
    return f"trained with other settings ({different})" if different else ""


def steps_of(directory: Path, config: RunConfig | None) -> int | None:
    """How many steps the run has: as its settings say, or, where they give epochs, as its log counts them."""
    if config is None:
        try:
            config = RunConfig.from_mapping(read_yaml(directory / "config.yaml"), str(directory))[0]
        except UserError:
            return None
    steps = config.max_steps
    if steps <= 0:
        last = _last_line(directory / "log.jsonl", "epoch")
        if not (last.get("epoch") and last.get("step")):
            return None
        steps = math.ceil(round(config.num_train_epochs * last["step"] / last["epoch"], 6))
    return min(steps, config.stop_after_steps or steps)


def last_step(directory: Path) -> int | None:
    step = _last_line(directory / "log.jsonl", "step").get("step")
    return step if isinstance(step, int) else None


def _last_line(path: Path, key: str) -> dict[str, Any]:
    """The last whole line of a file of JSON objects that has `key`; all are read where none near its end has."""
    lines = (values for count in (20, sys.maxsize) for values in reversed(list(_lines(path, count))))
    return next((values for values in lines if key in values), {})


def _lines(path: Path, count: int) -> Iterator[dict[str, Any]]:
    for line in last_lines(path, count):
        try:
            values = json.loads(line)
        except ValueError:  # half a line
            continue
        if isinstance(values, dict):
            yield values


def _pace(directory: Path) -> float | None:
    """Seconds a step, over the last lines of speed.jsonl, each of which counts from the line before."""
    lines = [(one.get("step"), one.get("seconds")) for one in _lines(directory / "speed.jsonl", RECENT + 2)]
    lines = [(step, seconds) for step, seconds in lines if isinstance(step, int) and isinstance(seconds, int | float)]
    lines = lines[-RECENT - 1 :]
    if len(lines) == 1:  # the first of a run, which began at step 0, or where it was resumed
        return lines[0][1] / lines[0][0] if lines[0][0] > 0 and not list(directory.glob("checkpoints/*")) else None
    if len(lines) < 2 or lines[-1][0] <= lines[0][0]:
        return None
    return sum(seconds for _, seconds in lines[1:]) / (lines[-1][0] - lines[0][0])


def _number(path: Path) -> int:
    digits = path.stem.partition("-")[2]
    return int(digits) if digits.isdecimal() else 0


# --- a study


def jobs_of(study: Study) -> list[Job]:
    """Every job of the study's workflow but its tables and figures, in the order of the chain."""
    logs, shared, found = study.directory / "logs", study.shared_directory, []

    def once(kind: str, draw: str, rule: str, target: Path, log: str | None = None) -> None:
        log = log or (f"{rule}/{draw}.log" if draw else f"{rule}.log")
        found.append(Job(kind, draw.replace("-", " "), target, logs / log))

    own = study.own_draws() if study.own_worlds else [""]
    for draw in own if study.world else []:
        once("world", draw, "world_corpus", shared / "world" / draw / "world.json")
    for draw in own if study.sft else []:
        once("base", draw, "sft", study.base_of(draw or study.draws()[0]) / "provenance.json")
    for draw in study.draws():
        if study.world:
            once("pairs", draw, "world_pairs", study.pairs(draw) / "eval.jsonl")
        if any(STAGES[stage].has_pairs for stage in study.stages):
            once("tokens", draw, "prepare", study.tokens(draw) / "tokens.json")
    if not all(STAGES[stage].has_pairs for stage in study.stages):
        for draw in dict.fromkeys(map(study.prompt_draw, study.seeds)):
            once("prompts", draw, "prepare_prompts", study.prompts(draw) / "tokens.json")
    for draw in study.draws() if study.reference_stage else []:
        once("reference", draw, "reference", study.reference(draw) / "reference.json")
    for folder, run in {study.answers(run): run for run in study.runs() if study.is_answered(run)}.items():
        log = f"answers/{run.stage}/seed-{run.seed}.log"
        found.append(Job("answers", f"{run.stage}, seed {run.seed}", folder / "answers.json", logs / log))
    for run in study.runs():
        place = Path(run.stage, run.arm.name, run.variant, f"seed-{run.seed}{'/proof' if run.proof else ''}.log")
        found.append(Job(run.stage, _name(run), run.directory / "provenance.json", logs / place, run))
        if not run.proof:
            target = run.directory / "metrics.json"
            found.append(Job("evaluate", f"{run.stage}, {_name(run)}", target, logs / "evaluate" / place, run))
    return sorted(found, key=lambda job: job.kind == "evaluate")


def _name(run: Run) -> str:
    proof = ", proof" if run.proof else ""
    return f"{run.arm.name}{f', {run.variant}' if run.variant else ''}, seed {run.seed}{proof}"


def states_of(study: Study, jobs: list[Job], settled: dict[Job, State] | None = None) -> dict[Job, State]:
    """The state of each job. settled: an earlier answer, of which what was done is believed."""
    found: dict[Job, State] = {}
    trained: dict[Path, State] = {}
    for job in jobs:
        if settled and settled.get(job, State("waiting")).kind == "done" and job.target.exists():
            state = settled[job]
        elif job.run is None:
            state = _once(job)
        elif job.kind == "evaluate":
            state = _evaluation(job, study.config(job.run), trained[job.run.directory])
        else:
            state = state_of(job.run.directory, study.config(job.run), log=job.log)
        if job.run is not None and job.kind != "evaluate":
            trained[job.run.directory] = state
        found[job] = state
    return found


def _once(job: Job) -> State:
    """Of a shared step: its target appears when it is whole; until then it is written beside, or in its log."""
    if job.target.exists():
        return State("done")
    folder = job.target.parent
    partial = [path.name for place in (folder, folder.parent) for path in place.glob(".*.partial-*")]
    tags = [
        name.partition(".partial-")[2].rpartition("-")[0] for name in partial if name.startswith(f".{folder.name}.")
    ]
    here = processes.tag().partition("-")[0]
    if any(re.fullmatch(rf"{here}-\d+", tag) and not processes.tag_is_dead(tag) for tag in tags):
        return State("running")
    if complaint := complaint_in(job.log):
        return State("failed", detail=complaint)
    return State("running", detail="by its log") if _is_fresh(job.log) else State("waiting")


def _evaluation(job: Job, config: RunConfig, training: State) -> State:
    """Of an evaluation: it holds the directory of the run, which is finished."""
    if training.kind != "done":
        return State("waiting", detail="its run is not done")
    directory = job.target.parent
    try:
        measured = files.read_sealed(directory / "evaluation.json")
        settings, of_run = measured.get("settings"), measured.get("run")
    except UserError:
        settings = of_run = None
    if job.target.exists() and isinstance(settings, dict):
        why = record.difference(settings, config.settings_of("evaluation"))
        if not why and of_run == files.sha256(directory / "provenance.json"):
            return State("done")
    else:
        why = ""
    if (holder := living_holder(directory)) is not None:
        return State("running", detail=lock.said_of(holder))
    if complaint := complaint_in(job.log):
        return State("failed", detail=complaint)
    if not job.target.exists() and _is_fresh(job.log):
        return State("running", detail="starting")
    return State("waiting", detail=f"evaluated with other settings ({why})" if why else "")
