"""The GPU path on a random-weight model of Qwen3-0.6B's exact shape: throughput, memory, idle = absent.

    python benchmarks/gpu_check.py                    # on a GPU; writes results/published/gpu-check/
    python benchmarks/gpu_check.py --small --no-trl --output /tmp/check      # any machine, a small shape

Runs the first steps of config/qwen3-0.6b.yaml (its batch sizes, dtype, schedule and cutoff) by `discobeta train`, in a
process each: rm; the dpo baseline, Disco + LeDPO, and the arm with both heads idle, whose adapter and log must equal
the baseline's byte for byte; one update of ppo; and TRL's RewardTrainer and DPOTrainer on the same rows, with the same
LoRA, batch and dtype, without checkpointing and with. Beside the measured peak of memory stands the one that
`discobeta cost --memory` works out. Random weights cost what trained ones cost; nothing here says anything about
quality. Pairs have the lengths of hh-rlhf's harmless subset (means: prompt 113, chosen 39, rejected 49 tokens), drawn
from geometric distributions. metrics.csv and config.yaml are the rates that `discobeta cost` reads.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

from discobeta.design.arms import Arm
from discobeta.design.config import RunConfig
from discobeta.design.study import Run, Study
from discobeta.files import write_json, write_text
from discobeta.record import source_state
from discobeta.report.compare import EQUAL, compare

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "qwen3-0.6b": {
        "vocab_size": 151_936, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "max_position_embeddings": 40_960,
    },
    "small": {
        "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384, "max_position_embeddings": 1024,
    },
}  # fmt: skip
ARMS = ("baseline", "disco-used_beta-used", "disco-idle_beta-idle")
RUNS = (("rm", "baseline"), *(("dpo", arm) for arm in ARMS), ("ppo", "baseline"))
FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}
"""Dense bf16 FLOP a second at most, by what stands in the device's name (NVIDIA's data sheets)."""
TRL = (("rm", False), ("rm", True), ("dpo", False), ("dpo", True))
"""Its trainers, without and with gradient checkpointing."""


def make_base(folder: Path, shape: dict[str, int]) -> None:
    """Random weights of `shape` (rope and norms as in Qwen3-0.6B), and a tokenizer of one word per id."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocabulary = {f"w{i}": i for i in range(shape["vocab_size"] - 2)}
    vocabulary |= {"<pad>": len(vocabulary), "<eos>": len(vocabulary) + 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(**shape, tie_word_embeddings=True, eos_token_id=vocabulary["<eos>"])
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_pairs(path: Path, count: int, vocab_size: int) -> None:
    random = np.random.default_rng(0)

    def words(mean: int, most: int) -> str:
        size = min(int(random.geometric(1 / mean)), most)
        return " ".join(f"w{i}" for i in random.integers(1, vocab_size - 2, size))

    with path.open("w") as stream:
        for _ in range(count):
            row = {"prompt": words(113, 300), "chosen": words(39, 200), "rejected": words(49, 200)}
            stream.write(json.dumps(row) + "\n")


def train(path: Path) -> None:
    """In a process of its own, whose peak of memory is the run's."""
    subprocess.run([sys.executable, "-m", "discobeta", "train", str(path), "--no-evaluate"], check=True)


def train_with_trl(wanted: dict) -> dict:
    """Rows and tokens a second and the peak of memory of TRL's trainer for the stage, tuned by hand: bf16, its fused
    AdamW, no evaluation, no saving. In a process of its own, to which `wanted` comes as JSON."""
    import time

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    is_dpo = wanted["stage"] == "dpo"
    tokenizer = AutoTokenizer.from_pretrained(wanted["base"])
    maker = AutoModelForCausalLM if is_dpo else AutoModelForSequenceClassification
    dtype = torch.bfloat16 if wanted["bf16"] else torch.float32
    model = maker.from_pretrained(wanted["base"], dtype=dtype, **({} if is_dpo else {"num_labels": 1}))
    model.config.pad_token_id = tokenizer.pad_token_id
    settings = (DPOConfig if is_dpo else RewardConfig)(
        output_dir=wanted["output_dir"], max_steps=wanted["steps"], bf16=wanted["bf16"],
        max_length=wanted["cutoff_len"],
        per_device_train_batch_size=wanted["batch"], gradient_accumulation_steps=wanted["passes"],
        gradient_checkpointing=wanted["checkpointing"], learning_rate=1e-4, save_strategy="no", report_to="none",
        logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM" if is_dpo else "SEQ_CLS",
    )  # fmt: skip
    rows = load_dataset("json", data_files=wanted["dataset"], split="train")
    trainer = (DPOTrainer if is_dpo else RewardTrainer)(
        model=model, args=settings, train_dataset=rows, processing_class=tokenizer, peft_config=lora
    )
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    pairs = wanted["steps"] * wanted["batch"] * wanted["passes"]
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"seconds": seconds, "rows": pairs, "rows_per_second": pairs / seconds, "peak_memory_bytes": memory}


def run_trl(wanted: dict) -> dict:
    words = [sys.executable, __file__, "--one-of-trl", json.dumps(wanted)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:  # out of memory is a finding, too
        return {"error": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def utilisation(cost: dict, shape: dict[str, int], device: str) -> float | None:
    """Share of the device's FLOP that tokens of a LoRA step need, 4 per weight of a linear layer and token: 2 forward,
    2 backward for the states and none for frozen weights. Attention and the output layer are not counted."""
    most = next((flops for name, flops in FLOPS.items() if name in device), None)
    if most is None:
        return None
    width, heads = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    block = 2 * width * heads + 2 * width * keys + 3 * width * shape["intermediate_size"]
    return 4 * block * shape["num_hidden_layers"] * cost["tokens_per_second"] / most


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def estimate(config) -> int:
    """The peak of memory that `discobeta cost --memory` works out for training."""
    from transformers import AutoConfig

    from discobeta.run import memory

    found = memory.peaks(config, AutoConfig.from_pretrained(config.model_name_or_path))
    return max(found.values()) if config.stage == "ppo" else found["training"]  # ppo samples while it trains


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small shape, for a machine without a GPU")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of rm and dpo")
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
        overrides = {
            "base": {"model_name_or_path": str(folder / "base")},
            "data": {"dataset": str(folder / "pairs.jsonl"), "eval_dataset": None, "val_size": 64},
        }
        published = yaml.safe_load((ROOT / "config/qwen3-0.6b.yaml").read_text())
        settings = copy.deepcopy(published)
        for section, changes in overrides.items():
            kept = {key: value for key, value in (settings[section] | changes).items() if value is not None}
            settings[section] = {key: value for key, value in kept.items() if key != "eval_split"}
        if options.small:
            settings["common"] |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
            settings["common"] |= {"per_device_eval_batch_size": 2}
            settings["ppo"] |= {"per_device_train_batch_size": 2, "ppo_buffer_size": 1, "max_new_tokens": 8}
        settings["common"] |= {"eval_strategy": "no", "save_steps": 0, "logging_steps": 1, "plot_loss": False}
        common = settings["common"]
        per_step = common["per_device_train_batch_size"] * common["gradient_accumulation_steps"]
        write_pairs(folder / "pairs.jsonl", options.steps * per_step + 128, SHAPES[name]["vocab_size"])
        study = Study(settings)

        costs, estimates = {}, {}
        for stage, arm in RUNS:
            label = f"{stage} {arm}"
            run = Run(stage, Arm.from_name(arm), seed=1, directory=folder / stage / arm)
            wanted = study.run_settings(run) | {
                "tokenized_path": str(folder / f"tokens-{stage == 'ppo'}"),
                "stop_after_steps": 1 if stage == "ppo" else options.steps,
            }
            if stage == "ppo":
                wanted |= {"reward_model": str(folder / "rm" / "baseline"), "ppo_score_norm": False}
                wanted |= {"num_eval_generations": 0}
            if stage == "dpo":
                wanted["reference_path"] = str(folder / "reference")
            write_text(folder / f"{label}.yaml", yaml.safe_dump(wanted))
            train(folder / f"{label}.yaml")
            costs[label] = json.loads((run.directory / "cost.json").read_text())
            estimates[label] = estimate(RunConfig.from_mapping(wanted)[0])
        verdicts = compare(folder / "dpo" / "disco-idle_beta-idle", folder / "dpo" / "baseline")
        theirs = {}
        for stage, checkpointing in () if options.no_trl else TRL:
            passes = common["gradient_accumulation_steps"]
            theirs[f"TRL {stage}{', checkpointing' if checkpointing else ''}"] = run_trl({
                "stage": stage, "checkpointing": checkpointing, "base": str(folder / "base"), "passes": passes,
                "dataset": str(folder / "pairs.jsonl"), "output_dir": str(folder / "trl"), "steps": options.steps,
                "batch": per_step // passes, "cutoff_len": settings["data"]["cutoff_len"], "bf16": common["bf16"],
            })  # fmt: skip
        commit, dirty = source_state()
        device = device_name()
        found = {
            "shape": name, "steps": options.steps, "pairs_per_step": per_step, "commit": commit, "dirty": dirty,
            "device": device, "settings": settings, "cost": costs, "estimated_peak_bytes": estimates, "trl": theirs,
            "utilisation": {label: utilisation(cost, SHAPES[name], device) for label, cost in costs.items()},
            "idle against absent": verdicts,
        }  # fmt: skip
        write_json(options.output / "gpu-check.json", found)
        write_text(options.output / "gpu-check.md", as_markdown(found))
        write_text(options.output / "metrics.csv", as_rates(found))
        write_text(options.output / "config.yaml", yaml.safe_dump(published))
        print((options.output / "gpu-check.md").read_text())
    return int(set(verdicts.values()) != {EQUAL})


def as_rates(found: dict) -> str:
    """What `discobeta cost` takes its rates from, as in a study's metrics.csv. Evaluation was not measured."""
    lines = ["stage,arm,seed,metric,value"]
    for label, cost in found["cost"].items():
        stage, arm = label.split()
        for name in ("seconds", "processes", "rows", "gpu_seconds", "peak_memory_bytes"):
            lines.append(f"{stage},{arm},1,cost/{name},{cost[name]}")
    return "\n".join(lines) + "\n"


def as_markdown(found: dict) -> str:
    lines = [
        f"# GPU check: {found['steps']} steps of rm and dpo, an update of ppo, random weights of the shape "
        f"{found['shape']}",
        "",
        f"Made by `python benchmarks/gpu_check.py` at commit {found['commit']} (dirty: {found['dirty']}) on "
        f"{found['device']}; seed 1; {found['pairs_per_step']} pairs a step.",
        "",
        "| run | device | rows/s | tokens/s | peak memory (GB) | estimated | seconds | FLOP utilisation |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, cost in found["cost"].items():
        numbers = f"{cost['rows_per_second']:.1f} | {cost['tokens_per_second']:.0f}"
        memory, estimated = (x / 1e9 for x in (cost["peak_memory_bytes"], found["estimated_peak_bytes"][label]))
        share = found["utilisation"][label]
        used = "–" if share is None else f"{share:.0%}"
        sizes = f"{memory:.1f} | {estimated:.1f}"
        lines.append(f"| {label} | {cost['device']} | {numbers} | {sizes} | {cost['seconds']:.1f} | {used} |")
    for label, cost in found["trl"].items():
        if "error" in cost:
            lines.append(f"| {label} | | | | | | | {cost['error']} |")
        else:
            memory = f"{cost['peak_memory_bytes'] / 1e9:.1f}" if cost["peak_memory_bytes"] else "–"
            lines.append(f"| {label} | | {cost['rows_per_second']:.1f} | | {memory} | | {cost['seconds']:.1f} | |")
    lines += ["", "Both heads idle against no heads:", ""]
    lines += [f"- {name}: {verdict}" for name, verdict in found["idle against absent"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
