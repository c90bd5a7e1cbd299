"""Speed beside TRL: `make bench`, or python benchmarks/bench.py [--quick] [--only PART ...]

Optimiser steps of dpo and rm at two sizes (inputs.py), whole dpo processes, the grid of nine arms, and one ppo update
(ppo_vs_trl.py). TRL 1.16 is run as it comes (A0, R0: its defaults but for those that a CPU must have), tuned by hand
(A1, R1: no gradient checkpointing, and the microbatch that is fastest here) and with its reference precomputed (A2).

Equal on both sides: base, tokens, pairs of each step, adapter at the start, loss, AdamW with its settings, linear
decay, clipping, float32, one thread, a log line at every step. Not equal: what each does to get there. TRL asks its
reference at every step but in A2, scores every position on a CPU, pads the pairs of a microbatch in the order in which
they come and gathers more metrics; we ask the reference before the first step, as A2 does, and cut the step as we like.
Whole processes and the grid start from adapters and orders of each side's own, and log every tenth step.

**The gate.** A timing counts only if the same work was done: the same tokens, |loss - ours| <= 1e-4 at each step,
adapters at a relative L2 distance <= 1e-3 after the last; the arm with both heads idle must leave the baseline's bytes.
Otherwise the benchmark says who differs, and ends with status 1.

A step lasts from one log line to the next; the first two of a process are dropped and the median is taken. Sides take
turns (A0 A1 A2 ours A0 ...), each in a process forked from one that has imported everything and computed nothing.
Ratios are peer / ours, within a round; their median and range over the rounds are what is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import inputs
import ours
import peers
from inputs import QUICK, ROOT, SIZES, Size
from peers import STOCK, Peer

PARTS = ("steps", "whole", "grid", "ppo")
CASES = {f"{stage}-{size}": (stage, size) for stage in ("dpo", "rm") for size in SIZES}
DROPPED = 2
LOSS_TOLERANCE, ADAPTER_TOLERANCE = 1e-4, 1e-3
BOTH_USED = dict.fromkeys(("add_disco_head", "disco_pref", "add_beta_head", "use_dynamic_beta"), True)
BOTH_IDLE = dict.fromkeys(("add_disco_head", "add_beta_head"), True)
LEVERS = {
    "one pass": {"tokens_per_pass": 10**6}, "prompts twice": {"share_prompt": False},
    "PEFT's LoRA": {"fused_lora": False},
}  # fmt: skip
LEVERS["none of them"] = {key: value for changes in LEVERS.values() for key, value in changes.items()}
"""Ours without what makes it fast, one thing at a time."""
DISCOBETA, PEER = [sys.executable, "-m", "discobeta"], [sys.executable, peers.__file__]

# threads: as Snakemake has them in a job of one
LIBRARIES = ("OMP_NUM", "GOTO_NUM", "OPENBLAS_NUM", "MKL_NUM", "VECLIB_MAXIMUM", "NUMEXPR_NUM")
ENVIRONMENT = {f"{name}_THREADS": "1" for name in LIBRARIES} | {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip

Found = dict[str, Any]


class Bench:
    """The parts, in a scratch folder."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder, self.options = folder, options
        self.sizes: dict[str, Size] = QUICK if options.quick else SIZES
        self.microbatches: dict[tuple[str, str], dict[int, float]] = {}  # of a stage and size: tried -> ms
        self.failures: list[str] = []  # of the gate

    # --- optimiser steps

    def settings(self, stage: str, size: str, steps: int, name: str, **more: Any) -> dict[str, Any]:
        """A run of ours; `peers.train` reads it too."""
        of = self.sizes[size]
        dpo = {"pref_beta": of.pref_beta} if stage == "dpo" else {}
        return {
            "stage": stage, "model_name_or_path": str(self.folder / size / "base"),
            "dataset": str(self.folder / size / f"pairs-{steps * of.pairs_per_step}.jsonl"),
            "output_dir": str(self.folder / size / stage / name), "per_device_train_batch_size": of.pairs_per_step,
            "tokens_per_pass": of.tokens_per_pass, "max_steps": steps, "learning_rate": of.learning_rates[stage],
            "lr_scheduler_type": "linear", "lora_rank": 8, "lora_alpha": 16, "lora_target": "all", "cutoff_len": 2048,
            "seed": 1, "logging_steps": 1,
            "eval_strategy": "no", "save_steps": 0, "plot_loss": False, **dpo, **more,
        }  # fmt: skip

    def make_inputs(self, size: str, steps: int) -> None:
        of, folder = self.sizes[size], self.folder / size
        if not (folder / "base").exists():
            in_child(partial(inputs.make_base, folder / "base", of), folder / "base.log")
        pairs = folder / f"pairs-{steps * of.pairs_per_step}.jsonl"
        if not pairs.exists():
            in_child(partial(inputs.write_pairs, pairs, of, steps * of.pairs_per_step), folder / "pairs.log")

    def steps(self, stage: str, size: str) -> Found:
        """What a step of each side takes, and how far its losses and adapter are from ours."""
        of, folder = self.sizes[size], self.folder / size / stage
        steps, start = DROPPED + of.steps, folder / "start"
        self.make_inputs(size, steps)
        in_child(partial(ours.start, self.settings(stage, size, steps, "start"), start), folder / "start.log")
        tuned = self.tuned(stage, size)
        letter, arms = ("A" if stage == "dpo" else "R"), {"ours": {}, "heads used": BOTH_USED, "heads idle": BOTH_IDLE}
        arms |= {} if self.options.quick else LEVERS
        sides = {f"{letter}0": STOCK, f"{letter}1": tuned}
        if stage == "dpo":
            sides["A2"] = replace(tuned, precomputed=True)
        found: dict[str, list[Found]] = {name: [] for name in [*sides, *arms]}
        for i in range(self.options.rounds):
            for name, runs in found.items():
                settings = self.settings(stage, size, steps, f"{name}-{i}", **arms.get(name, {}))
                work = partial(ours.train, settings)
                if name in sides:
                    work = partial(peers.train, settings, sides[name], start)
                runs.append(in_child(work, folder / f"{name}-{i}.log"))
            say(f"{stage}, {size}: round {i + 1} of {self.options.rounds}")
        milliseconds = {name: [milliseconds_of(run) for run in runs] for name, runs in found.items()}
        lengths = dict(zip(("prompt", "chosen", "rejected"), found["ours"][0]["lengths"], strict=True))
        same_work = [name for name in found if name not in ("ours", "heads used")]
        return compared(milliseconds, "ms") | {
            "pairs per step": of.pairs_per_step, "mean tokens": lengths, "counted steps": of.steps,
            "microbatch": tuned.microbatch, "ms by microbatch": self.microbatches[stage, size],
            "gate": {name: self.gate(stage, size, name, found) for name in same_work},
        }  # fmt: skip

    def tuned(self, stage: str, size: str) -> Peer:
        """TRL without checkpointing, with the microbatch that is fastest here: the batch and its halves are tried."""
        of = self.sizes[size]
        if (stage, size) not in self.microbatches:
            steps, tried = DROPPED + min(of.steps, 4), {}
            self.make_inputs(size, steps)
            for microbatch in [of.pairs_per_step >> n for n in range(2 if self.options.quick else 4)]:
                name = f"microbatch-{microbatch}"
                work = partial(peers.train, self.settings(stage, size, steps, name), Peer(microbatch=microbatch))
                tried[microbatch] = milliseconds_of(in_child(work, self.folder / size / stage / f"{name}.log"))
            self.microbatches[stage, size] = tried
        tried = self.microbatches[stage, size]
        return Peer(microbatch=min(tried, key=tried.get))

    def gate(self, stage: str, size: str, name: str, found: dict[str, list[Found]]) -> dict[str, float]:
        """How far a side is from ours, at most, over steps and rounds. What is too far is noted as a failure."""
        who, losses, adapters = f"{stage}, {size}: {name}", [], []
        for i, (mine, theirs) in enumerate(zip(found["ours"], found[name], strict=True)):
            if theirs["tokens"] != mine["tokens"]:
                self.failures.append(f"{who}: other tokens than ours, or in another order")
            if len(theirs["losses"]) != len(mine["losses"]):
                self.failures.append(f"{who}: {len(theirs['losses'])} steps, ours {len(mine['losses'])}")
                continue
            losses += [abs(a - b) for a, b in zip(mine["losses"], theirs["losses"], strict=True)]
            places = [self.folder / size / stage / f"{side}-{i}/adapter" for side in ("ours", name)]
            adapters.append(ours.adapter_distance(*places))
            weights = [(place / "adapter_model.safetensors").read_bytes() for place in places]
            if name == "heads idle" and (weights[0] != weights[1] or mine["losses"] != theirs["losses"]):
                self.failures.append(f"{who}: not the adapter and losses of the arm without heads")
        distances = {"loss": largest(losses), "adapter": largest(adapters)}
        for what, most in (("loss", LOSS_TOLERANCE), ("adapter", ADAPTER_TOLERANCE)):
            if not distances[what] <= most:  # nor is NaN
                self.failures.append(f"{who}: {what} at {distances[what]:.2g} from ours (at most {most:g})")
        return distances

    # --- whole processes

    @property
    def run_steps(self) -> int:
        """Of a run of the embedded study."""
        return 4 if self.options.quick else 300

    def run_file(self, name: str, peer: Peer | None = None, **more: Any) -> Path:
        """The settings of one dpo run of the embedded size as a file, beside which its outputs will be."""
        settings = self.settings("dpo", "embedded", self.run_steps, name, **more) | {"logging_steps": 10}
        path = Path(f"{settings['output_dir']}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings | ({"peer": asdict(peer)} if peer else {})))
        return path

    def whole(self) -> Found:
        """One dpo run from the start of its process to its end: tokenising and the reference pass are in it."""
        tuned = self.tuned("dpo", "embedded")
        self.make_inputs("embedded", self.run_steps)
        sides: dict[str, Peer | None] = {"A0": STOCK, "A1": tuned, "A2": replace(tuned, precomputed=True), "ours": None}
        if self.options.quick:
            sides = {"A1": tuned, "ours": None}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(self.options.whole_rounds):
            for name, peer in sides.items():
                path = self.run_file(f"whole-{name}-{i}", peer)
                command = [*PEER, str(path)] if peer else [*DISCOBETA, "train", str(path), "--no-evaluate"]
                cache = {"HF_DATASETS_CACHE": f"{path}.cache"}
                seconds[name].append(timed(command, path.with_suffix(".log"), **cache))
            say(f"whole processes: round {i + 1} of {self.options.whole_rounds}")
        return compared(seconds, "s") | {"steps per run": self.run_steps}

    def grid(self) -> Found:
        """Nine arms and a seed, as many processes at once as there are cores; each round is a seed of its own.

        Ours start as in `make ablation`; they tokenise and compute the reference once, which is in the time. TRL has
        nothing to compare arms with: its side is the baseline nine times, whose tokenised rows it finds in its cache
        after the first.
        """
        from discobeta.design.arms import ARMS

        tuned = self.tuned("dpo", "embedded")
        self.make_inputs("embedded", self.run_steps)
        arms = ARMS[:2] if self.options.quick else ARMS
        seconds: dict[str, list[float]] = {"A1": [], "ours": []}
        each = f"xargs -P {self.options.cores} -I FILE"
        for seed in range(1, 2 if self.options.quick else 3):
            folder = self.folder / f"grid-{seed}"
            folder.mkdir()
            theirs = [self.run_file(f"grid-A1-{arm.name}-{seed}", tuned, seed=seed) for arm in arms]
            command = ["sh", "-c", f"{each} {shlex.join(PEER)} FILE"]
            seconds["A1"].append(timed(command, folder / "A1.log", theirs, HF_DATASETS_CACHE=str(folder / "cache")))

            shared = {"tokenized_path": str(folder / "tokens"), "reference_path": str(folder / "reference")}
            mine = [self.run_file(f"grid-ours-{arm.name}-{seed}", seed=seed, **shared, **arm.flags) for arm in arms]
            before = [shlex.join([*DISCOBETA, name, str(mine[0])]) for name in ("prepare", "reference")]
            script = " && ".join([*before, f"{each} {shlex.join(DISCOBETA)} train FILE --no-evaluate"])
            warm = [sys.executable, "-m", "discobeta.warm"] if find_spec("discobeta.warm") else []
            seconds["ours"].append(timed([*warm, "sh", "-c", script], folder / "ours.log", mine))
            say(f"grid: seed {seed}")
        facts = {"steps per run": self.run_steps, "processes at once": self.options.cores}
        return compared(seconds, "s") | facts

    def ppo(self) -> Found:
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


def milliseconds_of(run: Found) -> float:
    """Of a step of a run, its first ones not counted."""
    return 1000 * statistics.median(run["seconds"][DROPPED:])


def largest(distances: list[float]) -> float:
    """0 of none, and NaN if one is."""
    return max(distances, key=lambda distance: (math.isnan(distance), distance), default=0.0)


def compared(values: dict[str, list[float]], unit: str) -> Found:
    """Each side's value per round, and its ratio to ours within the rounds: median, lowest, highest."""
    spread = {}
    for name, of in values.items():
        if name != "ours":
            ratios = [theirs / mine for theirs, mine in zip(of, values["ours"], strict=True)]
            spread[name] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {"unit": unit, "values": values, "ratio to ours": spread}


# --- processes


def in_child(work: Callable[[], Any], log: Path) -> Any:
    """What `work` returns in a process forked from this one; what it prints goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        import torch

        torch.set_num_threads(1)
        with log.open("w", buffering=1) as stream, redirect_stdout(stream), redirect_stderr(stream):
            try:
                sender.send((True, work()))
            except BaseException as error:
                traceback.print_exc()
                sender.send((False, f"{type(error).__name__}: {error}"))

    child = context.Process(target=run)
    child.start()
    sender.close()
    try:
        worked, value = receiver.recv()
    except EOFError:
        worked, value = False, "it was killed"
    child.join()
    if not worked:
        stop(f"{log.stem} failed: {value}")
    return value


def timed(command: list[str], log: Path, files: Sequence[Path] = (), **environment: str) -> float:
    """Seconds of a command that reads the names of `files`, a line each, and leaves what it says in `log`."""
    names = "".join(f"{path}\n" for path in files)
    with log.open("w") as stream:
        started = time.perf_counter()
        done = subprocess.run(
            command, input=names, stdout=stream, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
        )
        seconds = time.perf_counter() - started
    if done.returncode:
        said = [line for line in log.read_text().splitlines() if line.strip()] or ["no output"]
        stop(f"{log.stem} failed: {said[-1]}")
    return seconds


def stop(why: str) -> None:
    say(why)
    raise SystemExit(2)


def say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


def machine() -> Found:
    from discobeta.record import source_state

    commit, dirty = source_state()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    names = ("torch", "transformers", "peft", "accelerate", "trl", "datasets")
    return {
        "commit": commit, "dirty": dirty, "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "cpu": cpu[0] if cpu else platform.machine(), "cores": os.cpu_count(), "threads": 1,
    }  # fmt: skip


# --- the table


def as_markdown(found: Found) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        "# Speed beside TRL",
        "",
        f"Made by `make bench` at commit {found['commit']} (package files changed since: {found['dirty']}); "
        f"{found['cpu']}, {found['cores']} cores, 1 thread; Python {found['python']}, {versions}.",
        "",
        "Ratios are peer / ours within a round: median (lowest–highest). A0, R0: TRL as it comes; A1, R1: without "
        "checkpointing and with its fastest microbatch; A2: A1 with the reference precomputed. "
        "[benchmarks/bench.py](../../../benchmarks/bench.py) says what is equal on both sides and what is not.",
    ]
    if found["quick"]:
        lines += ["", "**Quick: small shapes and a few steps. These numbers say nothing about speed.**"]
    for title, part in (("Optimiser steps", "steps"), ("Whole processes", "whole"), ("The grid", "grid")):
        if part in found:
            rows = found[part]
            if part != "steps":
                rows = {f"dpo, embedded, {rows['steps per run']} steps": rows}
            lines += ["", f"## {title}", "", *table_of(rows, lambda name: name not in LEVERS)]
    if "steps" in found:
        if not found["quick"]:
            lines += ["", "## Ours without what makes it fast", "", *table_of(found["steps"], LEVERS.__contains__)]
        lines += ["", "## The gate", "", "Largest distances from ours over steps and rounds.", ""]
        lines += ["| | side | loss (≤ 1e-4) | adapter, relative L2 (≤ 1e-3) |", "|---|---|---:|---:|"]
        lines += [
            f"| {case} | {name} | {of['loss']:.1e} | {of['adapter']:.1e} |"
            for case, row in found["steps"].items()
            for name, of in row["gate"].items()
        ]
        lines += [f"\n**Failed**: {failure}." for failure in found["failures"]]
    if "ppo" in found:
        lines += ["", "## One ppo update", "", found["ppo"].get("markdown") or f"Skipped: {found['ppo']['skipped']}."]
    return "\n".join(lines) + "\n"


def table_of(rows: dict[str, Found], is_shown: Callable[[str], bool]) -> list[str]:
    """A line per case, a column per side."""
    sides = list(dict.fromkeys(name for row in rows.values() for name in row["ratio to ours"] if is_shown(name)))
    lines = [f"| | ours | {' | '.join(sides)} |", f"|---|---:|{'---:|' * len(sides)}"]
    for case, row in rows.items():
        cells = [f"{statistics.median(row['values']['ours']):.1f} {row['unit']}"]
        for name in sides:
            of = row["ratio to ours"].get(name)
            cells.append(f"{of['median']:.2f} ({of['low']:.2f}–{of['high']:.2f})" if of else "")
        if "pairs per step" in row:
            tokens = "/".join(f"{mean:.0f}" for mean in row["mean tokens"].values())
            case += f": {row['pairs per step']} pairs of {tokens} tokens"
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes and few steps: does it work, not how fast")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, help="of steps (default 5; quick: 2)")
    parser.add_argument("--whole-rounds", type=int, help="of whole processes (default 2; quick: 1)")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="processes at once in the grid")
    parser.add_argument("--ppo-python", type=Path, help="python of an environment with trl 1.12 (default: make one)")
    parser.add_argument("--output", type=Path, default=ROOT / "results/published/bench")
    options = parser.parse_args(words)
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.whole_rounds = options.whole_rounds or (1 if options.quick else 2)
    if find_spec("discobeta") is None:
        stop("discobeta is not installed in this environment: pip install -c constraints.txt -e .")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= ENVIRONMENT | {"HF_DATASETS_CACHE": f"{scratch}/datasets"}
        import_everything()
        bench, found = Bench(Path(scratch), options), machine()
        found |= {"quick": options.quick, "rounds": options.rounds, "whole rounds": options.whole_rounds}
        if "steps" in options.only:
            found["steps"] = {", ".join(CASES[name]): bench.steps(*CASES[name]) for name in options.cases}
        for part in PARTS[1:]:
            if part in options.only:
                found[part] = getattr(bench, part)()
    found["failures"] = bench.failures
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "bench.md").write_text(as_markdown(found))
    print(as_markdown(found))
    for failure in bench.failures:
        say(failure)
    return int(bool(bench.failures))


def import_everything() -> None:
    """What a side would import in the middle of its work, before any is forked."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen3ForCausalLM  # noqa: F401
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer  # noqa: F401

    import discobeta.run.loop
    import discobeta.run.train  # noqa: F401


if __name__ == "__main__":
    raise SystemExit(main())
