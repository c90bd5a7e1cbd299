"""Speed beside TRL: `make bench`, or python benchmarks/bench.py [--quick] [--only PART ...]

Optimiser steps of dpo and rm at two sizes (inputs.py), whole dpo processes, the grid of nine arms, and one ppo update
(ppo_vs_trl.py). TRL 1.16 is run as it comes (A0, R0: its defaults but for those that a CPU must have), tuned by hand
(A1, R1: no gradient checkpointing, and the microbatch that is fastest here) and with its reference precomputed (A2).

Equal on both sides: base, tokens, pairs of each step, adapter at the start, loss, AdamW with its settings, linear decay,
clipping, float32, one thread, a log line at every step. Not equal: what each does to get there. TRL keeps a live
reference but in A2, scores every position on a CPU, pads the pairs of a microbatch in the order in which they come and
gathers more metrics; we compute the reference before the first step (as A2 does) and cut a step into passes by length.

**The gate.** A peer's timing counts only if it has done our work: the same tokens, |loss - ours| <= 1e-4 at each step,
adapters at a relative L2 distance <= 1e-3 after the last; the arm with both heads idle must leave the baseline's bytes.
Otherwise the benchmark says who differs, and ends with status 1.

A step lasts from its log line to the next one; the first two of a process are dropped and the median is taken. Sides
take turns (A0 A1 A2 ours A0 ...), each in a process forked from one that has imported everything and computed nothing.
Ratios are peer / ours, within a round; their median and range over the rounds are what is reported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
os.environ |= ONE_THREAD | {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip

import inputs
import ours
import peers
from inputs import QUICK, ROOT, SIZES, Size
from peers import STOCK, Peer

PARTS = ("steps", "whole", "grid", "ppo")
DROPPED = 2
LOSS_TOLERANCE, ADAPTER_TOLERANCE = 1e-4, 1e-3
BETA = 0.5
BOTH_USED = dict.fromkeys(("add_disco_head", "disco_pref", "add_beta_head", "use_dynamic_beta"), True)
BOTH_IDLE = {"add_disco_head": True, "add_beta_head": True}


class Bench:
    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder, self.options = folder, options
        self.sizes: dict[str, Size] = QUICK if options.quick else SIZES
        self.microbatches: dict[tuple[str, str], dict[str, float]] = {}  # (stage, size): microbatch -> ms
        self.failures: list[str] = []

    # --- optimiser steps

    def settings(self, stage: str, size: str, steps: int, name: str, **more: Any) -> dict[str, Any]:
        """A run of ours; `peers.train` reads it too."""
        of = self.sizes[size]
        dpo = {"pref_beta": BETA} if stage == "dpo" else {}
        return {
            "stage": stage, "model_name_or_path": str(self.folder / size / "base"),
            "dataset": str(self.folder / size / f"pairs-{steps * of.pairs_per_step}.jsonl"),
            "output_dir": str(self.folder / size / stage / name), "per_device_train_batch_size": of.pairs_per_step,
            "max_steps": steps, "learning_rate": of.learning_rates[stage], "lr_scheduler_type": "linear",
            "lora_rank": 8, "lora_alpha": 16, "lora_target": "all", "cutoff_len": 2048, "seed": 1, "logging_steps": 1,
            "eval_strategy": "no", "save_steps": 0, "plot_loss": False, **dpo, **more,
        }  # fmt: skip

    def make_inputs(self, size: str, steps: int) -> None:
        of, folder = self.sizes[size], self.folder / size
        if not (folder / "base").exists():
            in_child(partial(inputs.make_base, folder / "base", of), folder / "base.log")
        pairs = Path(self.settings("dpo", size, steps, "any")["dataset"])
        if not pairs.exists():
            inputs.write_pairs(pairs, of, steps * of.pairs_per_step)

    def steps(self, stage: str, size: str) -> dict[str, Any]:
        """One table row: what each side's step takes beside ours, round by round."""
        steps = DROPPED + self.sizes[size].steps
        self.make_inputs(size, steps)
        folder = self.folder / size / stage
        start = folder / "start"
        in_child(partial(ours.start, self.settings(stage, size, steps, "start"), start), folder / "start.log")
        microbatch = self.tuned(stage, size)
        letter = "A" if stage == "dpo" else "R"
        sides = {f"{letter}0": STOCK, f"{letter}1": Peer(microbatch=microbatch)}
        arms: dict[str, dict[str, bool]] = {"ours": {}}
        if stage == "dpo":
            sides["A2"] = Peer(microbatch=microbatch, precomputed=True)
            arms |= {"heads used": BOTH_USED, "heads idle": BOTH_IDLE}
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in [*sides, *arms]}
        for i in range(self.options.rounds):
            for name in found:
                settings = self.settings(stage, size, steps, f"{name}-{i}", **arms.get(name, {}))
                work = partial(peers.train, settings, sides[name], start) if name in sides else partial(ours.train, settings)
                found[name].append(in_child(work, folder / f"{name}-{i}.log"))
            say(f"{stage}, {size}: round {i + 1} of {self.options.rounds}")
        gate = {name: self.gate(stage, size, name, found) for name in found if name not in ("ours", "heads used")}
        ms = {name: [1000 * statistics.median(run["seconds"][DROPPED:]) for run in runs] for name, runs in found.items()}
        tried = self.microbatches[stage, size]
        facts = {
            "pairs per step": self.sizes[size].pairs_per_step,
            "mean tokens": dict(zip(("prompt", "chosen", "rejected"), found["ours"][0]["lengths"], strict=True)),
            "counted steps": self.sizes[size].steps, "microbatch": microbatch, "ms by microbatch": tried, "gate": gate,
        }  # fmt: skip
        return compared(ms, "ms") | facts

    def tuned(self, stage: str, size: str) -> int:
        """The microbatch with which TRL's steps are fastest here; the whole batch and its halves are tried."""
        if (stage, size) not in self.microbatches:
            of = self.sizes[size]
            steps = DROPPED + min(of.steps, 4)
            self.make_inputs(size, steps)
            candidates = [of.pairs_per_step >> n for n in range(2 if self.options.quick else 4)]
            tried = self.microbatches[stage, size] = {}
            for microbatch in candidates:
                name = f"microbatch-{microbatch}"
                work = partial(peers.train, self.settings(stage, size, steps, name), Peer(microbatch=microbatch))
                run = in_child(work, self.folder / size / stage / f"{name}.log")
                tried[str(microbatch)] = 1000 * statistics.median(run["seconds"][DROPPED:])
        tried = self.microbatches[stage, size]
        return int(min(tried, key=tried.get))

    def gate(self, stage: str, size: str, name: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
        """How far a side is from ours, at most, over the rounds. What is too far is said, and fails the benchmark."""
        folder = self.folder / size / stage
        loss = adapter = 0.0
        for i, (mine, theirs) in enumerate(zip(found["ours"], found[name], strict=True)):
            who = f"{stage}, {size}: {name}"
            if theirs["tokens"] != mine["tokens"]:
                self.failures.append(f"{who} sees other tokens than ours, or in another order")
            if len(theirs["losses"]) != len(mine["losses"]):
                self.failures.append(f"{who} makes {len(theirs['losses'])} steps, ours {len(mine['losses'])}")
                continue
            places = [folder / f"{side}-{i}/adapter" for side in ("ours", name)]
            loss = max([loss, *(abs(a - b) for a, b in zip(mine["losses"], theirs["losses"], strict=True))])
            adapter = max(adapter, ours.adapter_distance(*places))
            weights = [(place / "adapter_model.safetensors").read_bytes() for place in places]
            if name == "heads idle" and (weights[0] != weights[1] or mine["losses"] != theirs["losses"]):
                self.failures.append(f"{who} does not leave the adapter and the losses of the arm without heads")
        if not loss <= LOSS_TOLERANCE:
            self.failures.append(f"{stage}, {size}: a loss of {name} is {loss:.2g} from ours (at most {LOSS_TOLERANCE:g})")
        if not adapter <= ADAPTER_TOLERANCE:
            self.failures.append(
                f"{stage}, {size}: the adapter of {name} is {adapter:.2g} from ours (at most {ADAPTER_TOLERANCE:g})"
            )
        return {"loss": loss, "adapter": adapter}

    # --- whole processes

    def run_steps(self) -> int:
        """Of a run of the embedded study."""
        return DROPPED + 2 if self.options.quick else 300

    def commands(self, name: str, peer: Peer | None, seed: int = 1, **more: Any) -> tuple[list[str], dict[str, Any]]:
        """The command of one dpo run of the embedded size, evaluation off, and its settings."""
        settings = self.settings("dpo", "embedded", self.run_steps(), name, seed=seed, **more) | {"logging_steps": 10}
        path = Path(f"{settings['output_dir']}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings | ({"peer": asdict(peer)} if peer else {})))
        if peer:
            return [sys.executable, str(Path(peers.__file__)), str(path)], settings
        return [sys.executable, "-m", "discobeta", "train", str(path), "--no-evaluate"], settings

    def whole(self) -> dict[str, Any]:
        """One dpo run from the start of its process to its end: tokenising and the reference pass are in it."""
        self.make_inputs("embedded", self.run_steps())
        tuned = Peer(microbatch=self.tuned("dpo", "embedded"))
        sides: dict[str, Peer | None] = {"A0": STOCK, "A1": tuned, "A2": replace(tuned, precomputed=True), "ours": None}
        if self.options.quick:
            sides = {"A1": tuned, "ours": None}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(self.options.whole_rounds):
            for name, peer in sides.items():
                command, settings = self.commands(f"whole-{name}-{i}", peer)
                cache = self.folder / f"cache-{name}-{i}"
                seconds[name].append(timed([command], Path(f"{settings['output_dir']}.log"), HF_DATASETS_CACHE=str(cache)))
            say(f"whole processes: round {i + 1} of {self.options.whole_rounds}")
        return compared(seconds, "seconds") | {"steps per run": self.run_steps()}

    def grid(self) -> dict[str, Any]:
        """Nine arms and a seed, as many processes at once as there are cores; each round is a seed of its own.

        Ours tokenise and compute the reference once, which is in the time. TRL has nothing to compare arms with: its
        side is the baseline nine times, whose tokenised rows it finds in its cache after the first.
        """
        from discobeta.design.arms import ARMS

        self.make_inputs("embedded", self.run_steps())
        tuned = Peer(microbatch=self.tuned("dpo", "embedded"))
        arms = ARMS[:2] if self.options.quick else ARMS
        seconds: dict[str, list[float]] = {"A1": [], "ours": []}
        for seed in range(1, 2 if self.options.quick else 3):
            folder = self.folder / f"grid-{seed}"
            folder.mkdir()
            theirs = [self.commands(f"grid-A1-{arm.name}-{seed}", tuned, seed)[0] for arm in arms]
            log, cache = folder / "A1.log", str(folder / "cache")
            seconds["A1"].append(timed(theirs, log, self.options.cores, HF_DATASETS_CACHE=cache))

            shared = {"tokenized_path": str(folder / "tokens"), "reference_path": str(folder / "reference")}
            mine = [self.commands(f"grid-ours-{arm.name}-{seed}", None, seed, **shared, **arm.flags) for arm in arms]
            first = f"{mine[0][1]['output_dir']}.yaml"
            before = [[sys.executable, "-m", "discobeta", name, first] for name in ("prepare", "reference")]
            log = folder / "ours.log"
            prepared = timed(before, log)
            seconds["ours"].append(prepared + timed([command for command, _ in mine], log, self.options.cores))
            say(f"grid: seed {seed}")
        return compared(seconds, "seconds") | {"steps per run": self.run_steps(), "cores": self.options.cores}

    def ppo(self) -> dict[str, Any]:
        """ppo_vs_trl.py, whose TRL 1.12 has an environment of its own; without one, the line that says why."""
        output = self.folder / "ppo.json"
        command = [sys.executable, str(Path(__file__).with_name("ppo_vs_trl.py")), "--json", str(output)]
        if self.options.ppo_python:
            command += ["--peer-python", str(self.options.ppo_python)]
        if self.options.quick:
            command += ["--rounds", "1", "--updates", "3"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"skipped": (done.stderr.strip().splitlines() or ["no output"])[-1]}
        return json.loads(output.read_text())


def compared(values: dict[str, list[float]], unit: str) -> dict[str, Any]:
    """Each side's value per round, and its ratio to ours within the rounds: median, lowest, highest."""
    ratios = {name: [a / b for a, b in zip(of, values["ours"], strict=True)] for name, of in values.items() if name != "ours"}
    spread = {name: {"median": statistics.median(of), "low": min(of), "high": max(of)} for name, of in ratios.items()}
    return {unit: values, "ratio to ours": spread}


def in_child(work: partial, log: Path) -> Any:
    """What `work` returns in a process forked from this one; its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        import torch

        torch.set_num_threads(1)
        with log.open("w", buffering=1) as stream, redirect_stdout(stream), redirect_stderr(stream):
            try:
                sender.send((True, work()))
            except BaseException:
                traceback.print_exc()
                sender.send((False, traceback.format_exc().strip().splitlines()[-1]))

    child = context.Process(target=run)
    child.start()
    sender.close()
    try:
        worked, value = receiver.recv()
    except EOFError:
        worked, value = False, "it was killed"
    child.join()
    if not worked:
        stop(f"{log.stem}: {value}")
    return value


def timed(commands: list[list[str]], log: Path, at_once: int = 1, **environment: str) -> float:
    """Seconds until all commands have ended, `at_once` of them at a time."""
    waiting, running = list(commands), []
    started = time.perf_counter()
    with log.open("a") as stream:
        while waiting or running:
            while waiting and len(running) < at_once:
                command = waiting.pop(0)
                where = os.environ | environment
                running.append(subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=where))
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # until one of them has ended
            ended = [process for process in running if process.poll() is not None]
            running = [process for process in running if process not in ended]
            if failed := [process for process in ended if process.returncode]:
                for process in running:
                    process.kill()
                said = log.read_text().strip().splitlines() or ["no output"]
                stop(f"{' '.join(failed[0].args[1:4])} failed: {said[-1]}")
    return time.perf_counter() - started


def stop(why: str) -> None:
    print(f"bench: {why}", file=sys.stderr)
    raise SystemExit(2)


def say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    from discobeta.record import source_state

    commit, dirty = source_state()
    cpu = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    names = ("torch", "transformers", "peft", "accelerate", "trl", "datasets")
    return {
        "commit": commit, "dirty": dirty, "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "cpu": cpu[0] if cpu else platform.machine(), "cores": os.cpu_count(), "threads": 1,
    }  # fmt: skip


# --- the table


def as_markdown(found: dict[str, Any]) -> str:
    lines = [
        "# Speed beside TRL",
        "",
        f"Made by `make bench` at commit {found['commit']} (package files changed since: {found['dirty']}); "
        f"{found['cpu']}, {found['cores']} cores, 1 thread; Python {found['python']}, "
        f"{', '.join(f'{name} {number}' for name, number in found['versions'].items())}.",
        "",
        "Ratios are peer / ours within a round: median (lowest–highest). A0, R0: TRL as it comes; A1, R1: without "
        "checkpointing and with its fastest microbatch; A2: A1 with the reference precomputed. benchmarks/bench.py says "
        "what is equal on both sides and what is not.",
    ]
    for title, part in (("Optimiser steps", "steps"), ("Whole processes", "whole"), ("The grid", "grid")):
        if part in found:
            rows = found[part] if part == "steps" else {f"dpo, embedded, {found[part]['steps per run']} steps": found[part]}
            lines += ["", f"## {title}", "", *table_of(rows)]
    if "steps" in found:
        lines += ["", "## The gate", "", "Largest distances from ours over steps and rounds.", ""]
        lines += ["| | side | loss (≤ 1e-4) | adapter, relative L2 (≤ 1e-3) |", "|---|---|---:|---:|"]
        lines += [
            f"| {case} | {name} | {of['loss']:.1e} | {of['adapter']:.1e} |"
            for case, row in found["steps"].items()
            for name, of in row["gate"].items()
        ]
        lines += [f"\nFailed: {failure}." for failure in found["failures"]]
    if "ppo" in found:
        lines += ["", "## One ppo update", ""]
        lines += [f"Skipped: {found['ppo']['skipped']}"] if "skipped" in found["ppo"] else [found["ppo"]["markdown"]]
    return "\n".join(lines) + "\n"


def table_of(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A line per case, a column per side."""
    sides = list(dict.fromkeys(name for row in rows.values() for name in row["ratio to ours"]))
    lines = [f"| | pairs | ours | {' | '.join(sides)} |", f"|---|---:|---:|{'---:|' * len(sides)}"]
    for case, row in rows.items():
        unit = "ms" if "ms" in row else "seconds"
        cells = [f"{row.get('pairs per step', '')}", f"{statistics.median(row[unit]['ours']):.1f} {unit[:2].strip('e')}"]
        for name in sides:
            of = row["ratio to ours"].get(name)
            cells.append(f"{of['median']:.2f} ({of['low']:.2f}–{of['high']:.2f})" if of else "")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes and few steps: does it work, not how fast")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--cases", nargs="+", metavar="STAGE-SIZE", help="of the part steps, e.g. dpo-long")
    parser.add_argument("--rounds", type=int, help="of steps (default 5; quick: 2)")
    parser.add_argument("--whole-rounds", type=int, help="of whole processes (default 3; quick: 1)")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="processes at once in the grid")
    parser.add_argument("--ppo-python", type=Path, help="python of an environment with trl 1.12 (default: make one)")
    parser.add_argument("--output", type=Path, default=ROOT / "results/published/bench")
    options = parser.parse_args(words)
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.whole_rounds = options.whole_rounds or (1 if options.quick else 3)
    cases = {f"{stage}-{size}": (stage, size) for stage in ("dpo", "rm") for size in SIZES}
    for name in options.cases or ():
        if name not in cases:
            parser.error(f"--cases: {name!r} is none of {', '.join(cases)}")
    if find_spec("discobeta") is None:
        stop("discobeta is not installed in this environment: pip install -c constraints.txt -e .")

    import datasets  # noqa: F401  so that no forked process imports it again
    import peft  # noqa: F401
    import trl

    import discobeta.run.train  # noqa: F401

    for name in ("DPOTrainer", "RewardTrainer"):
        getattr(trl, name)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = f"{scratch}/datasets"
        datasets.config.HF_DATASETS_CACHE = Path(scratch) / "datasets"
        bench = Bench(Path(scratch), options)
        found = machine() | {"quick": options.quick, "rounds": options.rounds}
        if "steps" in options.only:
            wanted = options.cases or cases
            found["steps"] = {", ".join(cases[name]): bench.steps(*cases[name]) for name in wanted}
        for part in ("whole", "grid", "ppo"):
            if part in options.only:
                found[part] = getattr(bench, part)()
    found["failures"] = bench.failures
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "bench.md").write_text(as_markdown(found))
    print(as_markdown(found))
    for failure in bench.failures:
        print(f"bench: {failure}", file=sys.stderr)
    return int(bool(bench.failures))


if __name__ == "__main__":
    raise SystemExit(main())
