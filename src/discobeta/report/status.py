"""Where a study stands, for people: counts, what runs, what failed and how to go on, and the time that is left.

The time is that of the study's own finished jobs, training by the step, over the jobs that run at once now. What has
not been measured yet is in no sum, and is named.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from discobeta import files
from discobeta.design.cost import length
from discobeta.design.stages import STAGES
from discobeta.design.study import Study
from discobeta.errors import UserError
from discobeta.progress import duration
from discobeta.report.states import Job, State, jobs_of, states_of

COUNTED = ("done", "running", "interrupted", "waiting", "failed")
QUICK = ("world", "pairs", "tokens", "prompts")
"""Kinds of jobs that take seconds, write no cost.json and are in no sum."""
SHOWN = 12
"""Jobs of one state that are listed one by one."""


@dataclass
class Status:
    """A study as it stands now.

    seconds_left: of all that is measured, at the jobs that run at once; None if nothing is measured.
    unmeasured: kinds of jobs that are left and of which none has finished.
    """

    study: Study
    states: dict[Job, State]
    again: Callable[[Job], str]
    seconds_left: float | None = None
    unmeasured: list[str] = field(default_factory=list)

    @property
    def at_once(self) -> int:
        return max(1, self.count("running"))

    def count(self, kind: str) -> int:
        return sum(state.kind == kind for state in self.states.values())

    def of(self, kind: str) -> list[tuple[Job, State]]:
        return [(job, state) for job, state in self.states.items() if state.kind == kind]

    @property
    def is_done(self) -> bool:
        return self.count("done") == len(self.states)


class Watched:
    """Looks at a study again and again, and reads what stays as it is once."""

    def __init__(self, study: Study, configfiles: list[str], changes: list[str]):
        self.study, self.jobs = study, jobs_of(study)
        self.configfiles, self.changes = configfiles, changes
        self.states: dict[Job, State] = {}
        self.costs: dict[Path, dict[str, float]] = {}
        self.steps: dict[Job, int | None] = {}

    def look(self) -> Status:
        self.states = states_of(self.study, self.jobs, self.states)
        found = Status(self.study, self.states, self.again)
        self._estimate(found)
        return found

    def again(self, job: Job) -> str:
        """The command that does this job, and what it needs, once more."""
        words = ["snakemake", str(job.target), "--cores", "all", "--configfile", *map(str, self.configfiles)]
        return shlex.join([*words, *(["--config", *self.changes] if self.changes else [])])

    # --- the time that is left

    def _estimate(self, found: Status) -> None:
        rates, starts = self._rates(found)
        left, unmeasured, is_known = 0.0, [], False
        for job, state in found.states.items():
            if state.kind == "done" or job.kind in QUICK:
                continue
            each = next((rates[key] for key in _keys(job) if key in rates), None)
            if job.kind not in STAGES:
                seconds = each
            else:
                steps = state.steps or self._length(job)
                to_go = None if steps is None else max(0, steps - (state.step or 0) * (state.kind != "failed"))
                rate = state.pace if state.kind == "running" and state.pace else each
                seconds = None if to_go is None or rate is None else to_go * rate
                if seconds is not None and state.kind != "running":
                    seconds += starts.get(job.kind, 0.0)
            if seconds is None:
                unmeasured.append(job.kind)
            else:
                left, is_known = left + seconds, True
        found.unmeasured = list(dict.fromkeys(unmeasured))
        found.seconds_left = left / found.at_once if is_known or found.is_done else None

    def _rates(self, found: Status) -> tuple[dict[tuple[str, ...], float], dict[str, float]]:
        """Seconds a step of (stage, arm) and of (stage,), and seconds a job of what else there is; and what a training
        takes before its first step. From jobs that are done; of a stage of which none is, from those that run."""
        sums: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        starts: dict[str, list[float]] = defaultdict(list)
        running: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for job, state in found.states.items():
            for key in _keys(job):
                if state.kind == "running" and state.pace:
                    running[key].append(state.pace)
                if state.kind != "done" or job.kind in QUICK:
                    continue
                cost = self._cost(job)
                amount = (state.steps or self._length(job) or 0) if job.kind in STAGES else 1
                if cost and amount:
                    sums[key][0] += cost["seconds"]
                    sums[key][1] += amount
                    if len(key) == 1:
                        starts[job.kind].append(cost.get("startup_seconds", 0.0))
        rates = {key: sum(paces) / len(paces) for key, paces in running.items()}
        rates |= {key: seconds / amount for key, (seconds, amount) in sums.items()}
        return rates, {kind: sum(values) / len(values) for kind, values in starts.items()}

    def _cost(self, job: Job) -> dict[str, float]:
        path = job.target.with_name("evaluation_cost.json" if job.kind == "evaluate" else "cost.json")
        if path not in self.costs:
            with suppress(UserError, TypeError, ValueError):
                cost = files.read_mapping(path)
                self.costs[path] = {key: float(cost.get(key, 0)) for key in ("seconds", "startup_seconds")}
        return self.costs.get(path, {})

    def _length(self, job: Job) -> int | None:
        """Steps of a training, where they can be told before its rows are tokenised."""
        if self.steps.get(job) is None:
            with suppress(UserError):
                self.steps[job] = length(self.study, job.run)[0]
        return self.steps.get(job)


def _keys(job: Job) -> list[tuple[str, ...]]:
    """By what its rate is known, the nearest first."""
    if job.run is None:
        return [(job.kind,)]
    if job.kind == "evaluate":
        return [(job.kind, job.run.stage)]
    return [(job.kind, job.run.arm.name), (job.kind,)]


# --- as text


def text(status: Status) -> str:
    """All of it, a screenful."""
    lines = [f"{status.study.name} in {status.study.directory}", ""]
    lines += _table(status)
    for kind, title in (("running", "Running"), ("interrupted", "Interrupted; the same command goes on with them")):
        if found := status.of(kind):
            lines += ["", f"{title}:", *_shortened([f"  {_line(job, state)}" for job, state in found])]
    if failed := status.of("failed"):
        lines += ["", "Failed; the same command tries them again, or one alone:"]
        blocks = [
            f"  {job.kind} {job.name}: {state.detail}\n    log:   {job.log}\n    again: {status.again(job)}"
            for job, state in failed
        ]
        lines += _shortened(blocks)
    if stale := [(job, state) for job, state in status.of("waiting") if "other settings" in state.detail]:
        lines += ["", f"{len(stale)} of another study, or of this one before it was changed, are made again:"]
        lines += _shortened([f"  {job.kind} {job.name}: {state.detail}" for job, state in stale], 3)
    return "\n".join([*lines, "", *_ending(status)])


def _table(status: Status) -> list[str]:
    counts: dict[str, Counter[str]] = {}
    for job, state in status.states.items():
        counts.setdefault(job.kind, Counter())[state.kind] += 1
    total = sum(counts.values(), Counter())
    shown = [kind for kind in COUNTED if kind in ("done", "waiting") or total[kind]]
    lines = ["".join([f"{'':10}", *(f"{kind:>12}" for kind in shown), f"{'of':>8}"])]
    for name, row in [*counts.items(), ("all", total)]:
        lines.append("".join([f"{name:10}", *(f"{row[kind] or '·':>12}" for kind in shown), f"{row.total():>8}"]))
    return lines


def _line(job: Job, state: State) -> str:
    parts = [f"{job.kind} {job.name}".strip()]
    if state.step is not None and state.steps:
        unit = STAGES[job.kind].step
        parts.append(f"{unit} {state.step} of {state.steps}")
        if state.pace and state.kind == "running":
            parts.append(f"{state.pace:.3g} s a {unit}")
            parts.append(f"about {duration((state.steps - state.step) * state.pace)} left")
    return ", ".join(parts) + (f" ({state.detail})" if state.detail else "")


def _shortened(blocks: list[str], most: int = SHOWN) -> list[str]:
    more = len(blocks) - most
    return [*blocks[:most], *([f"  … and {more} more (--json lists all)"] if more > 0 else [])]


def _ending(status: Status) -> list[str]:
    study = status.study
    if status.is_done:
        return [f"All is done. tables: {study.tables_directory}   figures: {study.figures_directory}"]
    lines = []
    if status.seconds_left is not None:
        how = f"with {status.at_once} jobs at once, as now" if status.at_once > 1 else "one job at a time"
        bound = "At least" if status.unmeasured else "About"
        lines.append(f"{bound} {duration(status.seconds_left)} left, {how}.")
    if status.unmeasured:
        lines.append(f"Not measured yet, and in no sum: {', '.join(status.unmeasured)}.")
    if not status.count("running"):
        lines.append("Nothing is running.")
    if queue := slurm_queue():
        lines.append(queue)
    return lines


def slurm_queue() -> str:
    """What Slurm says of the jobs that were submitted from here; nothing if there is none, or it does not answer."""
    if not shutil.which("squeue"):
        return ""
    command = ["squeue", "--me", "--noheader", "--format", "%T|%Z"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    here = os.path.realpath(".")
    states = [state for state, _, place in (line.partition("|") for line in done.stdout.splitlines()) if place == here]
    if done.returncode or not states:
        return ""
    return "Slurm, jobs of this folder: " + ", ".join(f"{n} {name.lower()}" for name, n in Counter(states).items())


def as_mapping(status: Status) -> dict[str, Any]:
    """For programs: the counts, the estimate, and every job."""
    jobs = []
    for job, state in status.states.items():
        run, of_run = job.run, {}
        if run is not None:
            of_run = {"stage": run.stage, "arm": run.arm.name, "variant": run.variant, "seed": run.seed}
            of_run |= {"proof": run.proof}
        jobs.append(
            {"kind": job.kind, "name": job.name, **of_run, "state": state.kind, "step": state.step,
             "steps": state.steps, "seconds_per_step": state.pace, "detail": state.detail, "log": str(job.log),
             "target": str(job.target), "again": status.again(job)}
        )  # fmt: skip
    return {
        "study": status.study.name,
        "directory": str(status.study.directory),
        "counts": {kind: status.count(kind) for kind in COUNTED} | {"all": len(status.states)},
        "jobs_at_once": status.at_once,
        "seconds_left": status.seconds_left,
        "unmeasured": status.unmeasured,
        "jobs": jobs,
    }


# --- again and again


def watch(watched: Watched, every: float, as_json: bool = False) -> None:
    """Until all is done or somebody interrupts: on a terminal redrawn in place, elsewhere a line for each change."""
    before: dict[Job, State] = {}
    screen = Screen(sys.stdout)
    with suppress(KeyboardInterrupt):
        while True:
            begun = time.monotonic()
            status = watched.look()
            if as_json:
                print(json.dumps(as_mapping(status), ensure_ascii=False), flush=True)
            elif screen.is_terminal:
                screen.draw(text(status))
            else:
                for line in changes(before, status.states) if before else text(status).splitlines():
                    print(line, flush=True)
            if status.is_done:
                return
            before = status.states
            spent = time.monotonic() - begun
            time.sleep(max(every, 5 * spent))
    screen.leave()


def changes(before: dict[Job, State], now: dict[Job, State]) -> list[str]:
    """A line for each job whose state is another one: `14:02:11 dpo baseline, seed 3: running -> done`."""
    clock = time.strftime("%H:%M:%S")
    found = []
    for job, state in now.items():
        if job in before and before[job].kind != state.kind:
            why = f" ({state.detail})" if state.kind == "failed" else ""
            found.append(f"{clock} {job.kind} {job.name}: {before[job].kind} -> {state.kind}{why}")
    return found


class Screen:
    """Text at the bottom of a terminal that is drawn over by the next."""

    def __init__(self, stream: Any):
        self.stream, self.height = stream, 0
        self.is_terminal = stream.isatty()

    def draw(self, text: str) -> None:
        """What does not fit on the terminal is left out: drawing over it would not be possible."""
        width, height = shutil.get_terminal_size()
        lines = [line[: width - 1] for line in text.splitlines()]
        if len(lines) >= height:
            lines = [*lines[: max(0, height - 3)], "…", lines[-1]]
        self.clear()
        self.stream.write("\n".join(lines))
        self.stream.flush()
        self.height = len(lines)

    def clear(self) -> None:
        if self.height:
            up = f"\x1b[{self.height - 1}A" if self.height > 1 else ""
            self.stream.write(f"\r{up}\x1b[J")
            self.height = 0

    def leave(self) -> None:
        """The cursor on a line of its own again."""
        if self.height:
            self.stream.write("\n")
            self.stream.flush()
            self.height = 0
