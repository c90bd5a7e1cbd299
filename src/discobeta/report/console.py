"""What is shown while Snakemake works: one line that is redrawn on a terminal, elsewhere a line now and then.

A job that fails is shown with the end of its log and how to do it again. Everything that Snakemake says is in its log.
"""

from __future__ import annotations

import shlex
import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from discobeta.progress import duration

REDRAWN = 0.5
"""Seconds between two states of the line on a terminal."""

LEAST, MOST = 30.0, 600.0
"""Seconds after which a line is printed elsewhere: at first, and after hours; sooner if 5 % more is done."""

TOLD = (
    "Nothing to be done", "Complete log", "Trying to restart", "Shutting down", "Will exit after finishing",
    "Terminating processes", "Unlocked", "SLURM run ID",
)  # fmt: skip
"""How those of Snakemake's notes begin that are shown too."""

KNOWN_BY_NOW = (
    "Exiting because a job execution failed",
    "At least one job did not complete",
    "WorkflowError:\nAt least",
)


@dataclass
class Running:
    """A job under way."""

    begun: float
    rule: str = ""
    name: str = ""
    kind: tuple[str, bool] = ("", False)  # rule, and whether it is a proof
    directory: Path | None = None  # of a training


class Console:
    """Told of each job by Snakemake's events, in its thread; draws in one of its own."""

    def __init__(self, stream: TextIO):
        self.stream, self.is_terminal = stream, stream.isatty()
        self.study: list[str] = []  # the words of the command line that say which
        self.begun = self.printed_at = time.monotonic()
        self.printed = 0
        self.total: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.running: dict[int, Running] = {}
        self.took: dict[tuple[str, bool], list[float]] = defaultdict(list)
        self.failures = 0
        self.is_drawn = False
        self.lock = threading.RLock()
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True)
        self.thread.start()

    # --- what Snakemake tells

    def planned(self, stats: Mapping[str, int]) -> None:
        """stats: rule -> jobs, and their total."""
        with self.lock:
            self.total = Counter({rule: count for rule, count in stats.items() if rule not in ("total", "all")})
            kinds = ", ".join(f"{_short(rule)} {count}" for rule, count in self.total.items())
            self.say(f"{self.total.total()} jobs: {kinds}")

    def started(self, numbers: Iterable[int]) -> None:
        with self.lock:
            for number in numbers:
                self.running[number] = Running(time.monotonic())

    def described(self, number: int, rule: str, wildcards: Mapping[str, Any] | None, output: Iterable[str]) -> None:
        with self.lock:
            job = self.running.setdefault(number, Running(time.monotonic()))
            words = dict(wildcards or {})
            target = next(iter(map(str, output or [])), "")
            job.rule, job.kind = rule, (rule, bool(words.get("proof")))
            job.name = " ".join([_short(rule), *(_said(name, str(value)) for name, value in words.items() if value)])
            job.directory = Path(target).parent if Path(target).name == "provenance.json" else None

    def finished(self, number: int) -> None:
        with self.lock:
            if (job := self.running.pop(number, None)) is not None and job.rule in self.total:
                self.done[job.rule] += 1
                self.took[job.kind].append(time.monotonic() - job.begun)

    def failed(self, number: int, rule: str, output: Iterable[str], logs: Iterable[str]) -> None:
        from discobeta.report.states import last_lines

        with self.lock:
            job = self.running.pop(number, None)
            target, logs = next(iter(map(str, output or [])), ""), list(map(str, logs or []))
            self.failures += 1
            lines = [f"FAILED: {job.name if job and job.name else _short(rule)}"]
            for log in logs:
                ending = last_lines(Path(log), 8) or ["(nothing is in it)"]
                lines += [f"  the end of {log}:", *(f"  | {line[:400]}" for line in ending)]
            if target and rule not in ("tables", "figures"):
                alone = shlex.join(["snakemake", target, "--cores", "all", *self.study])
                lines.append(f"  again: the same command, which goes on with the rest too; it alone: {alone}")
            self.say("\n".join(lines))

    def told(self, text: str) -> None:
        """A note, most of which nobody needs to see."""
        if text.startswith("Complete log"):
            self.say(f"Snakemake's log: {text.partition(': ')[2]}")
        elif text.startswith(TOLD):
            self.say(text)

    def say(self, text: str) -> None:
        """Lines that stay."""
        if not text or text.startswith(KNOWN_BY_NOW):
            return
        with self.lock:
            self._wipe()
            self._write(f"{text.rstrip()}\n")

    def close(self) -> None:
        if self.end.is_set():
            return
        self.end.set()
        self.thread.join()
        with self.lock:
            self._wipe()
            done, total = self.done.total(), self.total.total()
            if total:
                failed = f", {self.failures} failed" if self.failures else ""
                self._write(f"{done} of {total} jobs in {duration(time.monotonic() - self.begun)}{failed}\n")

    # --- what is shown of it

    def _tick(self) -> None:
        while not self.end.wait(REDRAWN if self.is_terminal else 1.0):
            with self.lock:
                if not (self.total or self.is_terminal):
                    continue
                if self.is_terminal:
                    line = self.line(with_running=True) if self.total else "reading the study and planning its jobs"
                    line = line[: shutil.get_terminal_size().columns - 1]
                    self._write(f"\r{line}\x1b[K")
                    self.is_drawn = True
                elif self._is_due():
                    self._write(f"{self.line()}\n")
                    self.printed, self.printed_at = self.done.total(), time.monotonic()

    def _is_due(self) -> bool:
        now = time.monotonic()
        silent, more = now - self.printed_at, self.done.total() - self.printed
        if more >= 0.05 * self.total.total() and silent >= 5:
            return True
        return silent >= min(MOST, max(LEAST, (now - self.begun) / 20))

    def line(self, *, with_running: bool = False) -> str:
        """`120 of 387 jobs (31 %), 2 min 10 s, about 4 min left: rm 20 of 24, dpo 30 of 72`, of what has begun."""
        done, total = self.done.total(), self.total.total()
        parts = [f"{done} of {total} jobs ({100 * done // total} %)", duration(time.monotonic() - self.begun)]
        left, is_whole = self.seconds_left()
        if left is not None and done < total:
            parts.append(f"{'about' if is_whole else 'at least'} {duration(left)} left")
        if self.failures:
            parts.append(f"{self.failures} failed")
        under_way = {job.rule for job in self.running.values()} | self.done.keys()
        kinds = [
            f"{_short(rule)} {self.done[rule]} of {n}"
            for rule, n in self.total.items()
            if self.done[rule] < n and rule in under_way
        ]
        shown = f"{', '.join(parts)}: {', '.join(kinds)}" if kinds else ", ".join(parts)
        now = [self._running(job) for job in self.running.values() if job.rule] if with_running else []
        return f"{shown} | {'; '.join(now)}" if now else shown

    def seconds_left(self) -> tuple[float | None, bool]:
        """What is left, of jobs like which one has finished, at the jobs that run at once; and whether that is all.

        Of a rule whose whole runs and proofs are not told apart in its count, the mean of all that have finished.
        """
        left, is_whole, is_known = 0.0, True, False
        means: dict[str, list[float]] = defaultdict(list)
        for (rule, _), seconds in self.took.items():
            means[rule] += seconds
        now = time.monotonic()
        for rule, count in self.total.items():
            if not (to_go := count - self.done[rule]):
                continue
            if not means[rule]:
                is_whole = False
                continue
            mean = sum(means[rule]) / len(means[rule])
            under_way = sum(min(mean, now - job.begun) for job in self.running.values() if job.rule == rule)
            left, is_known = left + max(0.0, to_go * mean - under_way), True
        return (left / max(1, len(self.running)) if is_known else None), is_whole

    def _running(self, job: Running) -> str:
        if job.directory is None:
            return job.name
        from discobeta.report.states import state_of

        with suppress(Exception):  # whatever half of a file is there
            state = state_of(job.directory)
            if state.kind == "running" and state.steps:
                return f"{job.name} {state.step}/{state.steps}"
        return job.name

    def _wipe(self) -> None:
        if self.is_drawn:
            self._write("\r\x1b[K")
            self.is_drawn = False

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # nobody reads any more
            self.stream.write(text)
            self.stream.flush()


def _short(rule: str) -> str:
    return rule.removeprefix("train_")


def _said(name: str, value: str) -> str:
    """A wildcard: `baseline`, `seed-3`, `proof`."""
    value = value.strip("/")
    return f"seed-{value}" if name == "seed" else value
