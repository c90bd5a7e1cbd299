"""The GPU path on a random-weight model of Qwen3-0.6B's exact shape: throughput, memory, idle = absent.

    python benchmarks/gpu_check.py                    # on a GPU; writes results/published/gpu-check/
    python benchmarks/gpu_check.py --small --no-trl --output /tmp/check      # any machine, a small shape

Runs the first steps of config/qwen3-0.6b.yaml (its batch sizes, dtype, schedule and cutoff) by `discobeta train`, in a
process each: rm; the dpo baseline, Disco + LeDPO, and the arm with both heads idle, whose adapter and log must equal
the baseline's byte for byte; the baseline in larger passes; one update of ppo. And TRL's RewardTrainer and DPOTrainer
on the same rows, with the same LoRA, batch and dtype: as they come (A0, R0), tuned by hand (A1, R1: no checkpointing,
and without cuDNN's attention, which plans anew for each shape; A1 in larger passes, too), and A1 with the reference
precomputed (A2). A step lasts from one log line to the next, a process counts as the median of its steps
after the first ones. Beside the measured peak of memory stands the one that `discobeta cost --memory` works out.

Random weights cost what trained ones cost; nothing here says anything about quality. Pairs have the lengths of
hh-rlhf's harmless subset (means: prompt 113, chosen 39, rejected 49 tokens), drawn from geometric distributions.
metrics.csv and config.yaml are the rates that `discobeta cost` reads. What was measured is written after each process.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from floors import flops_per_pair

from discobeta.design.arms import Arm
from discobeta.design.config import RunConfig
from discobeta.design.study import Run, Study
from discobeta.files import write_json, write_text
from discobeta.record import source_state
from discobeta.report.compare import EQUAL, compare
from discobeta.run import flops

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "qwen3-0.6b": flops.SHAPES["Qwen/Qwen3-0.6B"],
    "small": {
        "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384, "max_position_embeddings": 1024,
        "model_type": "qwen3", "tie_word_embeddings": True,
    },
}  # fmt: skip
ARMS = ("baseline", "disco-used_beta-used", "disco-idle_beta-idle")
LARGE = 2  # times the tokens of a pass
RUNS = {
    "rm baseline": {},
    **{f"dpo {arm}": {} for arm in ARMS},
    "dpo baseline, larger passes": {"tokens_per_pass": LARGE},
    "ppo baseline": {},
}
"""What is trained: stage and arm, and the settings that are multiplied."""
LENGTHS = {"prompt": (113, 300), "chosen": (39, 200), "rejected": (49, 200)}
"""Tokens of a pair: the mean of a geometric distribution, and the most."""
TUNED = {"checkpointing": False, "cudnn": False}
TRL = {
    "TRL dpo A1": TUNED,
    "TRL dpo A2": TUNED | {"precompute": True},
    "TRL rm R1": TUNED,
    "TRL dpo A1, larger passes": TUNED | {"times": LARGE},
    "TRL dpo A0": {"checkpointing": True},
    "TRL rm R0": {"checkpointing": True},
}
WARMING = 4
"""Steps at the start of a process, of which the first ones load kernels and find sizes, that do not count."""


def make_base(folder: Path, shape: dict[str, Any]) -> None:
    """Random weights of `shape` (rope and norms as in Qwen3-0.6B), and a tokenizer of one word per id."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

    vocabulary = {f"w{i}": i for i in range(shape["vocab_size"] - 2)}
    vocabulary |= {"<pad>": len(vocabulary), "<eos>": len(vocabulary) + 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape, eos_token_id=vocabulary["<eos>"])
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_pairs(path: Path, count: int, vocab_size: int) -> None:
    random = np.random.default_rng(0)

    def words(mean: int, most: int) -> str:
        size = min(int(random.geometric(1 / mean)), most)
        return " ".join(f"w{i}" for i in random.integers(1, vocab_size - 2, size))

    with path.open("w") as stream:
        for _ in range(count):
            stream.write(json.dumps({name: words(*size) for name, size in LENGTHS.items()}) + "\n")


def mean_lengths(path: Path) -> list[float]:
    """Tokens of prompt, chosen and rejected, a word each, on average."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [statistics.mean(len(row[name].split()) for row in rows) for name in LENGTHS]


def seconds_of(steps: list[float], warming: int) -> dict[str, float]:
    """The median second of a step and its range, the first steps left out."""
    counted = steps[min(warming, len(steps) - 1) :]
    return {"step": statistics.median(counted), "least": min(counted), "most": max(counted)}


def train(path: Path) -> None:
    """In a process of its own, whose peak of memory is the run's."""
    subprocess.run([sys.executable, "-m", "discobeta", "train", str(path), "--no-evaluate"], check=True)


def train_with_trl(wanted: dict) -> dict:
    """Seconds of each step and the peak of memory of TRL's trainer for the stage: bf16, its fused AdamW, no evaluation,
    no saving. In a process of its own, to which `wanted` comes as JSON."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, *_, **__):
            self.ends.append(time.monotonic())

        def on_log(self, *_, **__):  # what is logged has been computed
            self.ends.append(time.monotonic())

    is_dpo, on_gpu = wanted["stage"] == "dpo", torch.cuda.is_available()
    torch.backends.cuda.enable_cudnn_sdp(wanted.get("cudnn", True))
    tokenizer = AutoTokenizer.from_pretrained(wanted["base"])
    maker = AutoModelForCausalLM if is_dpo else AutoModelForSequenceClassification
    dtype = torch.bfloat16 if wanted["bf16"] else torch.float32
    model = maker.from_pretrained(wanted["base"], dtype=dtype, **({} if is_dpo else {"num_labels": 1}))
    model.config.pad_token_id = tokenizer.pad_token_id
    microbatch = wanted["batch"] * wanted.get("times", 1)
    settings = (DPOConfig if is_dpo else RewardConfig)(
        output_dir=wanted["output_dir"], max_steps=wanted["steps"], bf16=wanted["bf16"],
        max_length=wanted["cutoff_len"],
        per_device_train_batch_size=microbatch, gradient_accumulation_steps=wanted["pairs_per_step"] // microbatch,
        gradient_checkpointing=wanted["checkpointing"], learning_rate=1e-4, save_strategy="no", report_to="none",
        logging_steps=1, disable_tqdm=True, use_cpu=not on_gpu, dataloader_pin_memory=on_gpu,
        **({"precompute_ref_log_probs": True} if wanted.get("precompute") else {}),
    )  # fmt: skip
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM" if is_dpo else "SEQ_CLS",
    )  # fmt: skip
    rows = load_dataset("json", data_files=wanted["dataset"], split="train")
    watch = Watch()
    trainer = (DPOTrainer if is_dpo else RewardTrainer)(
        model=model, args=settings, train_dataset=rows, processing_class=tokenizer, peft_config=lora, callbacks=[watch]
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    ends = watch.ends[: wanted["steps"] + 1]  # the last line is a summary
    memory = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {
        "seconds_of_steps": [end - start for start, end in zip(ends, ends[1:], strict=False)],
        "microbatch": microbatch, "peak_memory_bytes": memory,
    }  # fmt: skip


def run_trl(wanted: dict) -> dict:
    words = [sys.executable, __file__, "--one-of-trl", json.dumps(wanted)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:  # out of memory is a finding, too
        return {"error": done.stderr.strip().splitlines()[-1][:200]}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found |= seconds_of(found["seconds_of_steps"], WARMING)
    return found | {"rows_per_second": wanted["pairs_per_step"] / found["step"]}


def utilisation(stage: str, pairs_per_second: float, lengths: list[float], shape: dict[str, Any], device: str):
    """Share of the device's FLOP that the work needs: of a LoRA step with a cached reference, each prompt once
    (`floors.flops_per_pair`). What is computed beyond it does not count, so that all can be compared; None in ppo."""
    device = device.replace("RTX ", "RTX")
    most = next((peak for name, (peak, _) in flops.CARDS.items() if re.search(rf"{name}\b", device)), None)
    if most is None or stage == "ppo":
        return None
    found = flops.shape_of(shape if stage == "dpo" else shape | {"vocab_size": 0})
    return pairs_per_second * flops_per_pair(found, lengths, live_reference=False, shared_prompt=True) / most


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def estimate(config) -> int:
    """The peak of memory that `discobeta cost --memory` works out for training."""
    from transformers import AutoConfig

    from discobeta.run import memory

    found = memory.peaks(config, AutoConfig.from_pretrained(config.model_name_or_path))
    return max(found.values()) if config.stage == "ppo" else found["training"]  # ppo samples while it trains


def settings_of(published: dict, base: Path, pairs: Path, *, small: bool) -> dict:
    """The study's settings, with this base and these pairs, a log line a step, and nothing but training."""
    settings = copy.deepcopy(published)
    settings["base"] |= {"model_name_or_path": str(base)}
    settings["data"] |= {"dataset": str(pairs), "val_size": 64}
    for key in ("eval_dataset", "eval_split"):
        settings["data"].pop(key)
    common = settings["common"]
    if small:
        common |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}
        settings["ppo"] |= {"per_device_train_batch_size": 2, "ppo_buffer_size": 1, "max_new_tokens": 8}
    common |= {"eval_strategy": "no", "save_steps": 0, "logging_steps": 1, "plot_loss": False}
    return settings


def train_one(label: str, study: Study, steps: int, folder: Path) -> dict:
    """What the run has cost."""
    stage, arm = label.partition(",")[0].split()
    run = Run(stage, Arm.from_name(arm), seed=1, directory=folder / label.replace(" ", "_").replace(",", ""))
    wanted = study.run_settings(run) | {
        "tokenized_path": str(folder / f"tokens-{stage == 'ppo'}"),
        "stop_after_steps": 1 if stage == "ppo" else steps,
    }
    if stage == "ppo":
        wanted |= {"reward_model": str(folder / "rm_baseline"), "ppo_score_norm": False, "num_eval_generations": 0}
    if stage == "dpo":
        wanted["reference_path"] = str(folder / "reference")
    resolved, _ = RunConfig.from_mapping(wanted)
    for key, times in RUNS[label].items():
        wanted[key] = times * getattr(resolved, key)
    path = folder / f"{run.directory.name}.yaml"
    write_text(path, yaml.safe_dump(wanted))
    train(path)
    cost = json.loads((run.directory / "cost.json").read_text())
    lines = [json.loads(line) for line in (run.directory / "speed.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines]
    of_step = seconds_of(seconds, WARMING)
    rates = {f"{name}_per_second": cost[name] / len(seconds) / of_step["step"] for name in ("rows", "tokens")}
    estimated = estimate(RunConfig.from_mapping(wanted)[0])
    return cost | of_step | rates | {"seconds_of_steps": seconds, "estimated_peak_bytes": estimated}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small shape, for a machine without a GPU")
    parser.add_argument("--steps", type=int, default=16, help="optimiser steps of rm and dpo; half of it of TRL's")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL's trainers out")
    parser.add_argument("--one-of-trl", metavar="JSON", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "results/published/gpu-check")
    options = parser.parse_args(words)
    if options.one_of_trl:
        print(json.dumps(train_with_trl(json.loads(options.one_of_trl))))
        return 0
    name = "small" if options.small else "qwen3-0.6b"

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_base(folder / "base", SHAPES[name])
        published = yaml.safe_load((ROOT / "config/qwen3-0.6b.yaml").read_text())
        settings = settings_of(published, folder / "base", folder / "pairs.jsonl", small=options.small)
        common = settings["common"]
        per_step = common["per_device_train_batch_size"] * common["gradient_accumulation_steps"]
        write_pairs(folder / "pairs.jsonl", options.steps * per_step + 128, SHAPES[name]["vocab_size"])
        lengths, device, study = mean_lengths(folder / "pairs.jsonl"), device_name(), Study(settings)
        commit, dirty = source_state()
        found = {
            "shape": name, "steps": options.steps, "pairs_per_step": per_step, "mean_lengths": lengths,
            "commit": commit, "dirty": dirty, "device": device, "versions": versions(), "settings": settings,
            "cost": {}, "trl": {},
        }  # fmt: skip

        def add(part: str, label: str, cost: dict) -> None:
            """Written at once: an hour of a GPU may end before the last process does."""
            if "error" not in cost:
                stage = label.removeprefix("TRL ").split()[0]
                cost["utilisation"] = utilisation(stage, cost["rows_per_second"], lengths, SHAPES[name], device)
            found[part][label] = cost
            write_json(options.output / "gpu-check.json", found)
            write_text(options.output / "gpu-check.md", as_markdown(found))
            write_text(options.output / "metrics.csv", as_rates(found))

        write_text(options.output / "config.yaml", yaml.safe_dump(published))
        for label in RUNS:
            add("cost", label, train_one(label, study, options.steps, folder))
            if label == "dpo disco-idle_beta-idle":
                found["idle against absent"] = compare(folder / label.replace(" ", "_"), folder / "dpo_baseline")
        for label, changes in {} if options.no_trl else TRL.items():
            add("trl", label, run_trl({
                "stage": label.split()[1], "base": str(folder / "base"), "dataset": str(folder / "pairs.jsonl"),
                "output_dir": str(folder / "trl"), "steps": max(2, options.steps // 2), "pairs_per_step": per_step,
                "batch": common["per_device_train_batch_size"], "cutoff_len": settings["data"]["cutoff_len"],
                "bf16": common["bf16"], **changes,
            }))  # fmt: skip
        print((options.output / "gpu-check.md").read_text())
    return int(set(found["idle against absent"].values()) != {EQUAL})


def versions() -> dict[str, str]:
    import accelerate
    import peft
    import torch
    import transformers
    import trl

    return {module.__name__: module.__version__ for module in (torch, transformers, peft, accelerate, trl)}


def as_rates(found: dict) -> str:
    """What `discobeta cost` takes its rates from, as in a study's metrics.csv: seconds at the pace of the median step.
    Evaluation was not measured."""
    lines = ["stage,arm,seed,metric,value"]
    for label, cost in found["cost"].items():
        if "," in label:
            continue
        stage, arm = label.split()
        seconds = cost["rows"] / cost["rows_per_second"]
        numbers = cost | {"seconds": seconds, "gpu_seconds": seconds * cost["processes"] * bool(cost["gpu_seconds"])}
        for name in ("seconds", "processes", "rows", "gpu_seconds", "peak_memory_bytes"):
            lines.append(f"{stage},{arm},1,cost/{name},{numbers[name]}")
    return "\n".join(lines) + "\n"


def as_markdown(found: dict) -> str:
    lines = [
        f"# GPU check: {found['steps']} steps of rm and dpo, an update of ppo, random weights of the shape "
        f"{found['shape']}",
        "",
        f"Made by `python benchmarks/gpu_check.py` at commit {found['commit']} (dirty: {found['dirty']}) on "
        f"{found['device']}, {', '.join(f'{name} {version}' for name, version in found['versions'].items())}; seed 1; "
        f"{found['pairs_per_step']} pairs a step. A step: median and range after the first {WARMING}; ppo: the first. "
        "Tokens: of all sequences, each with its prompt. Utilisation: of the FLOP that the work needs, prompts once.",
        "",
        "| run | s a step | rows/s | tokens/s | peak memory (GB) | estimated | FLOP utilisation |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, cost in (found["cost"] | found["trl"]).items():
        if "error" in cost:
            lines.append(f"| {label} | {cost['error']} | | | | | |")
            continue
        tokens = f"{cost['tokens_per_second']:.0f}" if "tokens_per_second" in cost else ""
        memory, estimated = (
            f"{cost[key] / 1e9:.1f}" if cost.get(key) else "" for key in ("peak_memory_bytes", "estimated_peak_bytes")
        )
        used = "–" if cost["utilisation"] is None else f"{cost['utilisation']:.0%}"
        name = f"{label} ({cost['microbatch']} pairs a pass)" if "microbatch" in cost else label
        step = f"{cost['step']:.3f} ({cost['least']:.3f}–{cost['most']:.3f})"
        lines.append(
            f"| {name} | {step} | {cost['rows_per_second']:.1f} | {tokens} | {memory} | {estimated} | {used} |"
        )
    lines += ["", "Both heads idle against no heads:", ""]
    lines += [f"- {name}: {verdict}" for name, verdict in found.get("idle against absent", {}).items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
