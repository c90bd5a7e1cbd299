"""Whatever befalls a command, and however often: the same command again leaves what one that was never disturbed does.

Every file operation of every command is one at which it is killed, or at which the system refuses. What is compared
is all that the folder holds, so that a temporary file left behind, a mode, or somebody else's file that is gone is a
difference like any other.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import harness
import pytest
from conftest import SCALE
from harness import Fault, differences, run, snapshot, start

STUDY = ["--configfile", "study.yaml"]
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "sft": (["train", "sft.yaml"], ["runs/sft"]),
    "rm": (["train", "rm.yaml"], ["runs/rm"]),
    "dpo": (["train", "dpo.yaml"], ["runs/dpo"]),
    "full": (["train", "full.yaml"], ["runs/full", "shared/tokens", "shared/reference"]),
    "ppo": (["train", "ppo.yaml"], ["runs/ppo"]),
    "rm in the place of another": (["train", "rm.yaml", "--set", "overwrite_output_dir=true", "seed=8"], []),
    "sft in the place of another": (["train", "sft.yaml", "--set", "overwrite_output_dir=true", "seed=8"], []),
    "prepare": (["prepare", "full.yaml"], ["shared/tokens"]),
    "reference": (["reference", "full.yaml"], ["shared/reference"]),
    "answers": (["answers", "dpo.yaml"], ["shared/answers"]),
    "evaluate": (["evaluate", "runs/dpo"], []),
    "evaluate other rows": (["evaluate", "runs/rm", "--set", "eval_dataset=data/eval.jsonl"], []),
    "merge": (["merge", "runs/rm", "merged"], []),
    "tables": (["tables", *STUDY], []),
    "figures": (["figures", *STUDY], []),
    "corpus": (["world", "corpus", "--output", "world", "--sft-examples", "64"], ["world"]),
    "pairs": (["world", "pairs", "--world", "world", "--base", "world-base", "--output", "pairs", "--train", "8"]
              + ["--eval", "4"], []),
}  # fmt: skip
"""Name -> the command, and what of the finished folder it is to make."""

SLOW = {"figures": 0.15}
"""Share of the operations that are tried."""
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
RIGHT = {signal.SIGKILL: {-9}, signal.SIGTERM: {143}, signal.SIGINT: {130}}
REFUSALS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EACCES)


class Attempts:
    """A command in fresh copies of the folder that it starts from, and what it leaves undisturbed."""

    def __init__(self, name: str, finished: Path, folder: Path):
        self.words, made = COMMANDS[name]
        self.folder, self.template = folder / "place", folder / "template"
        shutil.copytree(finished, self.template)
        for part in made:
            shutil.rmtree(self.template / part)
        self.fresh()
        undisturbed = run(self.words, self.folder)
        assert undisturbed.status == 0, undisturbed.output
        self.operations, self.seconds = len(undisturbed.operations), undisturbed.seconds
        self.wanted = snapshot(self.folder)
        before = snapshot(self.template)
        modes = {path: mode for path, (mode, _) in self.wanted.items() if path not in before}
        assert not {path for path, mode in modes.items() if mode not in (oct(0o100644), oct(0o40755))}

    def fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder)

    def finish(self) -> list[str]:
        """Run the command to its end. Returns what is not as it should be."""
        last = run(self.words, self.folder)
        wrong = [] if last.status == 0 else [f"status {last.status}: {last.output[-600:]}"]
        return wrong + differences(self.wanted, snapshot(self.folder))


@pytest.fixture(scope="session")
def attempts(finished, tmp_path_factory) -> Callable[[str], Attempts]:
    known: dict[str, Attempts] = {}

    def of(name: str) -> Attempts:
        if name not in known:
            known[name] = Attempts(name, finished, tmp_path_factory.mktemp("attempts"))
        return known[name]

    return of


def chosen(attempt: Attempts, name: str, purpose: str, share: float = 1) -> tuple[list[int], random.Random]:
    """Operations, all of them in a full run, and what decides the rest."""
    dice = random.Random(f"{name} {purpose}")
    share *= min(1.0, SCALE * SLOW.get(name, 1))
    return sorted(dice.sample(range(1, attempt.operations + 1), max(1, round(attempt.operations * share)))), dice


def check(failures: list[str], tally) -> None:
    tally["different"] += len(failures)
    assert not failures, "\n\n".join(failures[:20])


def of(*names: str) -> pytest.MarkDecorator:
    """All tests of one command run in one process, which finds out once what it leaves undisturbed."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names])


of_every_command = of(*COMMANDS)


@of_every_command
def test_killed_at_any_file_operation(attempts, name, tally):
    attempt, failures = attempts(name), []
    places, dice = chosen(attempt, name, "kill")
    for at in places:
        attempt.fresh()
        faults = [Fault(at, dice.choice(SIGNALS), torn=dice.random() < 0.5)]
        while dice.random() < 0.3:
            faults.append(Fault(dice.randint(1, attempt.operations), dice.choice(SIGNALS)))
        told = []
        for fault in faults:
            outcome = run(attempt.words, attempt.folder, fault)
            was_there = len(outcome.operations) >= fault.at
            tally["kills"] += was_there
            told.append(f"{fault} before {outcome.operations[-1] if outcome.operations else None}")
            if outcome.status not in (RIGHT[fault.signal] if was_there else {0}) or "Traceback" in outcome.output:
                failures.append(f"{name}: {told}: status {outcome.status}: {outcome.output[-600:]}")
        if wrong := attempt.finish():
            failures.append(f"{name}: {told}: {wrong[:8]}")
    check(failures, tally)


@of_every_command
def test_killed_at_any_time(attempts, name, tally):
    attempt, failures, dice = attempts(name), [], random.Random(f"{name} time")
    for _ in range(max(1, round(16 * SCALE * SLOW.get(name, 1)))):
        attempt.fresh()
        told = []
        for _ in range(dice.choice((1, 1, 2, 4))):
            kind, after = dice.choice(SIGNALS), attempt.seconds * dice.uniform(0.05, 1)
            outcome = run(attempt.words, attempt.folder, kill_after=(after, kind))
            was_there = outcome.status != 0
            tally["kills"] += was_there
            told.append(f"{kind.name} after {after:.3f} of {attempt.seconds:.3f} s")
            is_early = not outcome.operations  # it may not have come so far as to say anything itself
            if was_there and not is_early and (outcome.status not in RIGHT[kind] or "Traceback" in outcome.output):
                failures.append(f"{name}: {told}: status {outcome.status}: {outcome.output[-600:]}")
        if wrong := attempt.finish():
            failures.append(f"{name}: {told}: {wrong[:8]}")
    check(failures, tally)


@of_every_command
def test_refused_at_any_file_operation(attempts, name, tally):
    """A full disk, a read-only one, an error of the device: said in one line, nothing half-written."""
    attempt, failures = attempts(name), []
    places, dice = chosen(attempt, name, "refuse", 0.6)
    for at in places:
        attempt.fresh()
        fault = Fault(at, error=dice.choice(REFUSALS))
        outcome = run(attempt.words, attempt.folder, fault)
        tally["errors"] += 1
        told = f"{name}: {errno.errorcode[fault.error]} at {at}, {outcome.operations[at - 1]}"
        if fault_of := faults_of_a_refusal(outcome, attempt.folder):
            failures.append(f"{told}: {fault_of}")
        if wrong := attempt.finish():
            failures.append(f"{told}: afterwards {wrong[:8]}")
    check(failures, tally)


def faults_of_a_refusal(outcome: harness.Outcome, folder: Path) -> list[str]:
    said = [line for line in outcome.output.replace("\r", "\n").splitlines() if line.startswith("discobeta: ")]
    wrong = []
    if outcome.status not in (0, 2) or "Traceback" in outcome.output or (outcome.status == 2 and not said):
        wrong.append(f"status {outcome.status}: {outcome.output[-600:]}")
    if "DISCOBETA_TRACEBACK" in outcome.output:
        wrong.append(f"unforeseen: {said}")
    return wrong


@of_every_command
def test_a_full_disk_at_any_size(attempts, name, tally):
    """No file may be longer than this: also what is written by code that tells Python nothing."""
    attempt, failures, dice = attempts(name), [], random.Random(f"{name} size")
    before = snapshot(attempt.template)
    new = [path for path, state in attempt.wanted.items() if before.get(path) != state]
    attempt.fresh()
    run(attempt.words, attempt.folder)
    sizes = sorted({size for path in new if (size := (attempt.folder / path).stat().st_size)})
    for size in dice.sample(sizes, round(len(sizes) * min(1, SCALE * SLOW.get(name, 1)))):
        attempt.fresh()
        limit = dice.choice((size - 1, size // 2, 0))
        outcome = run(attempt.words, attempt.folder, largest_file=limit)
        tally["errors"] += 1
        if wrong := faults_of_a_refusal(outcome, attempt.folder):
            failures.append(f"{name}: no file above {limit} bytes: {wrong}")
        if partial := [path for path in snapshot(attempt.folder) if "partial-" in path and "-mine" not in path]:
            failures.append(f"{name}: no file above {limit} bytes: left {partial}")
        if wrong := attempt.finish():
            failures.append(f"{name}: no file above {limit} bytes, afterwards: {wrong[:8]}")
    check(failures, tally)


@of("sft", "rm", "dpo", "full", "ppo", "prepare", "reference", "answers", "evaluate")
def test_of_two_copies_one_is_killed(attempts, name, tally):
    attempt, failures, dice = attempts(name), [], random.Random(f"{name} copies")
    for _ in range(max(1, round(8 * SCALE))):
        attempt.fresh()
        fault = Fault(dice.randint(1, attempt.operations), dice.choice(SIGNALS))
        copies = [start(attempt.words, attempt.folder, fault), start(attempt.words, attempt.folder)]
        ended = [copy.wait(60) for copy in copies]
        tally["kills"] += ended[0].status != 0
        if ended[1].status != 0 or any("Traceback" in copy.output for copy in ended):
            failures.append(f"{name}: {fault}: {[(copy.status, copy.output[-600:]) for copy in ended]}")
        if wrong := attempt.finish():
            failures.append(f"{name}: {fault}: {wrong[:8]}")
    check(failures, tally)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@of_every_command
def test_a_disk_that_is_full_for_real(attempts, name, tally, tmp_path):
    attempt, failures, dice = attempts(name), [], random.Random(f"{name} disk")
    for _ in range(max(1, round(6 * SCALE * SLOW.get(name, 1)))):
        attempt.fresh()
        shutil.rmtree(attempt.folder)
        attempt.folder.mkdir()
        used = sum(4096 * (1 + path.lstat().st_size // 4096) for path in attempt.template.rglob("*"))
        disk = used + 4096 * dice.randint(0, 60)
        if os.system(f"mount -t tmpfs -o size={disk} none {attempt.folder}"):
            pytest.skip("may not mount a small disk here")
        try:
            shutil.copytree(attempt.template, attempt.folder, dirs_exist_ok=True)
            outcome = run(attempt.words, attempt.folder)
            tally["errors"] += 1
            wrong = faults_of_a_refusal(outcome, attempt.folder)
            os.system(f"mount -o remount,size={disk * 4} {attempt.folder}")
            wrong += attempt.finish()
        finally:
            os.system(f"umount {attempt.folder}")
        if wrong:
            failures.append(f"{name}: a disk of {disk} bytes, of which {used} are used: {wrong[:8]}")
    check(failures, tally)
