"""The GPU path on a random-weight model of Qwen3-0.6B's exact shape: throughput, memory, idle = absent.

    python benchmarks/gpu_check.py                    # on a GPU; writes results/published/gpu-check/
    python benchmarks/gpu_check.py --small --output /tmp/check      # any machine, a small shape

Runs the first steps of config/qwen3-0.6b.yaml (its batch sizes, dtype, schedule and cutoff) by
`discobeta train`, in a process each: the dpo baseline, Disco + LeDPO, and the arm with both heads
idle, whose adapter and log must equal the baseline's byte for byte. Random weights cost what trained
ones cost; nothing here says anything about quality. Pairs have the lengths of hh-rlhf's harmless
subset (means: prompt 113, chosen 39, rejected 49 tokens), drawn from geometric distributions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

from discobeta.design.arms import Arm
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


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small shape, for a machine without a GPU")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=ROOT / "results/published/gpu-check")
    options = parser.parse_args(words)
    name = "small" if options.small else "qwen3-0.6b"

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_base(folder / "base", SHAPES[name])
        overrides = {
            "base": {"model_name_or_path": str(folder / "base")},
            "data": {"dataset": str(folder / "pairs.jsonl"), "eval_dataset": None, "val_size": 64},
        }
        settings = yaml.safe_load((ROOT / "config/qwen3-0.6b.yaml").read_text())
        for section, changes in overrides.items():
            kept = {key: value for key, value in (settings[section] | changes).items() if value is not None}
            settings[section] = {key: value for key, value in kept.items() if key != "eval_split"}
        if options.small:
            settings["common"] |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        settings["common"] |= {"eval_strategy": "no", "save_steps": 0, "logging_steps": 1, "plot_loss": False}
        common = settings["common"]
        per_step = common["per_device_train_batch_size"] * common["gradient_accumulation_steps"]
        write_pairs(folder / "pairs.jsonl", options.steps * per_step + 128, SHAPES[name]["vocab_size"])
        study = Study(settings)

        costs = {}
        for arm in ARMS:
            run = Run("dpo", Arm.from_name(arm), seed=1, directory=folder / arm)
            wanted = study.run_settings(run) | {
                "tokenized_path": str(folder / "tokens"),
                "reference_path": str(folder / "reference"),
                "stop_after_steps": options.steps,
            }
            write_text(folder / f"{arm}.yaml", yaml.safe_dump(wanted))
            train(folder / f"{arm}.yaml")
            costs[arm] = json.loads((folder / arm / "cost.json").read_text())
        verdicts = compare(folder / "disco-idle_beta-idle", folder / "baseline")
        commit, dirty = source_state()
        found = {
            "shape": name, "steps": options.steps, "pairs_per_step": per_step, "commit": commit, "dirty": dirty,
            "settings": wanted, "cost": costs, "idle against absent": verdicts,
        }  # fmt: skip
        write_json(options.output / "gpu-check.json", found)
        write_text(options.output / "gpu-check.md", as_markdown(found))
        print((options.output / "gpu-check.md").read_text())
    return int(set(verdicts.values()) != {EQUAL})


def as_markdown(found: dict) -> str:
    lines = [
        f"# GPU check: {found['steps']} steps of dpo, random weights of the shape {found['shape']}",
        "",
        f"Made by `python benchmarks/gpu_check.py` at commit {found['commit']} (dirty: {found['dirty']}); seed 1; "
        f"{found['pairs_per_step']} pairs a step.",
        "",
        "| arm | device | pairs/s | tokens/s | peak memory (GB) | seconds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for arm, cost in found["cost"].items():
        numbers = f"{cost['rows_per_second']:.1f} | {cost['tokens_per_second']:.0f}"
        memory = cost["peak_memory_bytes"] / 1e9
        lines.append(f"| {arm} | {cost['device']} | {numbers} | {memory:.1f} | {cost['seconds']:.1f} |")
    lines += ["", "Both heads idle against no heads:", ""]
    lines += [f"- {name}: {verdict}" for name, verdict in found["idle against absent"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
