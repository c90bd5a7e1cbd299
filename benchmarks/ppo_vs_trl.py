"""One update of stage ppo against one of TRL 1.12's PPOTrainer: the same tiny model, lengths and batch, on a CPU.

    python benchmarks/ppo_vs_trl.py                      # makes the peer's environment in a temporary folder
    python benchmarks/ppo_vs_trl.py --peer-python PATH   # takes one that has trl 1.12

The peer has an environment of its own, as later TRL has no PPOTrainer; its packages but TRL have the
versions of constraints.txt, and pip's own settings say where they come from. The sides take turns, a process
each. An update is all that happens from one log line to the next; a process counts as the median of its
updates but for the first two.

Equal: a random Qwen3 (2 layers of width 64, vocabulary 1000), LoRA r=8 on every linear layer of the policy,
a reward model of this shape that the values start from, prompts of 9 tokens, 192 sampled responses of at
most 12 new tokens per update, 2 passes over them in minibatches of 64 (6 steps of AdamW), 192 rows in a pass
without gradient, float32, threads; no evaluation, samples, checkpoints or tracker. <eos> comes once in about
1000 tokens, so nearly all responses have 12.

Not equal, as each side is what it is:
- TRL trains all 163k weights of a value model; here values are read from the frozen reward model's states by a
  small head, so there is no second trunk to train.
- TRL takes log pi from the sampler's logits, and makes logits of prompts too when it trains; here log pi is a
  pass of its own, and there are logits only where a response token is predicted.
- Here sampling is by inverse CDF in float64, and gradients are clipped; TRL does neither, and it calls the
  garbage collector twice per update (a row of the table, and a ratio of its own without them).
- TRL's reference is given as a model of its own; its default, the policy with LoRA off, says the same.

TRL's "per device" batch is the 192 rows, without accumulation, in 3 minibatches of 64: under its accumulation
steps, several minibatches share one optimiser step. The table shows how many steps there were.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, PROMPT, RESPONSE = 1000, 9, 12
MINIBATCH, MINIBATCHES, EPOCHS = 64, 3, 2
ROLLOUTS = MINIBATCH * MINIBATCHES
RATE, KL_COEFFICIENT = 1e-5, 0.05  # small, so that the lengths stay what they are
DROPPED = 2
GARBAGE = "rollouts: explicit garbage collection (s)"


def make_inputs(folder: Path, updates: int) -> None:
    """base/ and reward/, random weights with a tokenizer of one word per id, and prompts.jsonl."""
    import numpy as np
    import torch
    from inputs import word_tokenizer
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = word_tokenizer(VOCABULARY)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=192, tie_word_embeddings=True, max_position_embeddings=64,
        initializer_range=0.125, pad_token_id=0, eos_token_id=1, num_labels=1,
    )  # fmt: skip
    for seed, (name, kind) in enumerate({"base": Qwen3ForCausalLM, "reward": Qwen3ForSequenceClassification}.items()):
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    ids = np.random.default_rng(0).integers(2, VOCABULARY, (ROLLOUTS * updates, PROMPT))
    rows = (json.dumps({"prompt": " ".join(f"w{i}" for i in row)}) + "\n" for row in ids)
    (folder / "prompts.jsonl").write_text("".join(rows))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timed(owner, name: str) -> list[float]:
    """Seconds of each call of owner.name from now on."""
    original, seconds = getattr(owner, name), []

    def call(*positional, **named):
        started = time.perf_counter()
        found = original(*positional, **named)
        seconds.append(time.perf_counter() - started)
        return found

    setattr(owner, name, call)
    return seconds


def ours(folder: Path, output: Path, updates: int) -> tuple[list[float], ...]:
    """Seconds per update, those of rollouts, of sampling and of garbage collection, and response lengths."""
    from discobeta.design.config import RunConfig
    from discobeta.method.ppo import ProximalPolicy
    from discobeta.run.train import train

    sampling, rollouts = timed(ProximalPolicy, "respond"), timed(ProximalPolicy, "collect")
    settings = {
        "stage": "ppo", "model_name_or_path": str(folder / "base"), "reward_model": str(folder / "reward"),
        "dataset": str(folder / "prompts.jsonl"), "output_dir": str(output), "max_steps": updates,
        "per_device_train_batch_size": MINIBATCH, "ppo_buffer_size": MINIBATCHES, "ppo_epochs": EPOCHS,
        "per_device_eval_batch_size": ROLLOUTS, "tokens_per_pass": 2048,  # a minibatch in one pass, as in config.yaml
        "lora_rank": 8, "lora_alpha": 16, "max_new_tokens": RESPONSE,
        "learning_rate": RATE, "pref_beta": KL_COEFFICIENT, "ppo_score_norm": False, "logging_steps": 1,
        "save_steps": 0,
    }  # fmt: skip
    train(RunConfig.from_mapping(settings)[0])
    seconds = [line["seconds"] for line in read_lines(output / "speed.jsonl")]
    lengths = [line["response_length"] for line in read_lines(output / "log.jsonl")]
    return seconds, rollouts, sampling, [], lengths


def peer(folder: Path, output: Path, updates: int) -> tuple[list[float], ...]:
    """As `ours`."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    sampling, ends, whitened, responses = timed(ppo_trainer, "batch_generation"), [], [], []
    truncate, whiten = ppo_trainer.truncate_response, ppo_trainer.masked_whiten

    def truncate_and_keep(*positional):
        responses.append(truncate(*positional))
        return responses[-1]

    def whiten_and_note(*positional):  # of the advantages: what follows is optimisation
        whitened.append(time.perf_counter())
        return whiten(*positional)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            ends.append(time.perf_counter())

        on_step_end = on_train_begin

    ppo_trainer.truncate_response, ppo_trainer.masked_whiten = truncate_and_keep, whiten_and_note
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    prompts = [row["prompt"] for row in read_lines(folder / "prompts.jsonl")]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "base") for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(folder / "reward") for _ in range(2))
    settings = PPOConfig(
        output_dir=str(output), total_episodes=ROLLOUTS * updates, per_device_train_batch_size=ROLLOUTS,
        gradient_accumulation_steps=1, num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS,
        local_rollout_forward_batch_size=ROLLOUTS, response_length=RESPONSE, stop_token="eos", temperature=1.0,
        missing_eos_penalty=1.0, learning_rate=RATE, kl_coef=KL_COEFFICIENT, num_sample_generations=0,
        bf16=False, gradient_checkpointing=False, use_cpu=True, save_strategy="no", report_to="none",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    dataset = Dataset.from_list([{"input_ids": ids} for ids in tokenizer(prompts).input_ids])
    trainer = PPOTrainer(
        args=settings, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=value, train_dataset=dataset, callbacks=[Clock()], peft_config=lora,
    )  # fmt: skip
    garbage = timed(ppo_trainer.gc, "collect")
    trainer.train()
    seconds = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    rollouts = [now - start for start, now in zip(ends, whitened, strict=False)]
    lengths = [(ids != tokenizer.pad_token_id).sum(1).double().mean().item() for ids in responses]
    return seconds, rollouts, sampling, garbage, lengths


SIDES = {"ours": ours, "peer": peer}


def worker(side: str, folder: Path, output: Path, updates: int, threads: int) -> None:
    """One process of one side; its numbers go to output/found.json."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    steps = []
    register_optimizer_step_post_hook(lambda *_: steps.append(1))
    seconds, rollouts, sampling, garbage, lengths = SIDES[side](folder, output, updates)

    def median(values) -> float:
        return statistics.median(list(values)[DROPPED:])

    length = statistics.mean(lengths[DROPPED:])
    found = {
        "seconds": median(seconds),
        "optimiser steps": len(steps) / updates,
        "responses": ROLLOUTS,
        "mean response length (tokens)": length,
        "response tokens": ROLLOUTS * length,
        "rollouts: sampling (s)": median(sampling),
        GARBAGE: sum(garbage) / updates,
        "rollouts: all (s)": median(rollouts),
        "optimisation (s)": median(whole - part for whole, part in zip(seconds, rollouts, strict=True)),
        **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "trl")},
    }
    (output / "found.json").write_text(json.dumps(found))


def make_peer(folder: Path) -> Path:
    constraints = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("trl=")]
    (folder / "constraints.txt").write_text("\n".join(constraints))
    python = folder / "peer/bin/python"
    checked([sys.executable, "-m", "venv", str(folder / "peer")], folder / "venv.log")
    wanted = ["-c", str(folder / "constraints.txt"), "trl==1.12.*", "peft", "torch"]
    checked([str(python), "-m", "pip", "install", *wanted], folder / "pip.log")
    return python


def checked(command: list[str], log: Path, **environment: str) -> None:
    """Run to the end, or leave with status 2 and the last line that the command said."""
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | environment)
    if done.returncode:
        said = log.read_text().strip().splitlines() or ["no output"]
        missing(f"{Path(command[0]).name} {' '.join(command[1:4])} failed: {said[-1]}")


def missing(what: str) -> None:
    print(f"ppo_vs_trl: {what}", file=sys.stderr)
    raise SystemExit(2)


def compared(found: dict[str, list[dict]]) -> dict:
    """Seconds per update by round, and TRL / here within the rounds, with TRL's garbage collections and without."""
    seconds = {side: [run["seconds"] for run in runs] for side, runs in found.items()}
    ratios = {}
    for name, part in (("as it is", 0), ("its garbage collections taken out", 1)):
        pairs = zip(found["ours"], found["peer"], strict=True)
        of = [(peer["seconds"] - part * peer[GARBAGE]) / ours["seconds"] for ours, peer in pairs]
        ratios[name] = {"median": statistics.median(of), "low": min(of), "high": max(of)}
    return {"seconds": seconds, "TRL / here": ratios, "trl": found["peer"][0]["trl"]}


def as_markdown(found: dict[str, list[dict]], updates: int, threads: int) -> str:
    summary = compared(found)
    rounds = list(zip(*summary["seconds"].values(), strict=True))
    lines = [f"One PPO update, {threads} thread(s), median of updates {DROPPED + 1} to {updates}, in seconds:\n"]
    lines += ["| round | here | TRL | TRL / here |", "|---|---:|---:|---:|"]
    lines += [f"| {i + 1} | {ours:.3f} | {peer:.3f} | {peer / ours:.2f} |" for i, (ours, peer) in enumerate(rounds)]
    for name, of in summary["TRL / here"].items():
        lines += [f"\nTRL / here, {name}: {of['median']:.2f} ({of['low']:.2f}–{of['high']:.2f}).\n"]
    lines += ["| per update, median of the rounds | here | TRL |", "|---|---:|---:|"]
    for name, first in found["ours"][0].items():
        if name == "seconds":
            continue
        shown = [runs[0][name] for runs in found.values()]
        if not isinstance(first, str):
            shown = [f"{statistics.median(run[name] for run in runs):.5g}" for runs in found.values()]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join([*lines, f"\nPython {sys.version.split()[0]}, {os.cpu_count()} CPU cores."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", type=Path, help="python of an environment with trl 1.12 (default: make one)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=12, help=f"per process; the first {DROPPED} are not counted")
    parser.add_argument("--json", type=Path, help="write what was found here too, for bench.py")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "INPUTS", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, *folders = options.worker
        return worker(side, *map(Path, folders), options.updates, options.threads)
    if min(options.updates - DROPPED, options.rounds, options.threads) < 1:
        missing(f"takes more than {DROPPED} updates, a round or more and a thread or more")
    if find_spec("discobeta") is None:
        missing("discobeta is not installed in this environment: pip install -c constraints.txt -e .")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        python = options.peer_python or make_peer(folder)
        if not python.exists():
            missing(f"there is no {python}")
        is_there = "from importlib.metadata import version as v; assert v('trl').startswith('1.12.'), v('trl')"
        checked([str(python), "-c", is_there], folder / "version.log")
        make_inputs(folder, options.updates)
        found, pythons = {"ours": [], "peer": []}, {"ours": sys.executable, "peer": str(python)}
        numbers = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        for i in range(options.rounds):
            for side, runs in found.items():
                output = folder / f"{side}-{i}"
                command = [pythons[side], __file__, "--worker", side, str(folder), str(output)]
                command += ["--updates", str(options.updates), "--threads", str(options.threads)]
                checked(command, folder / f"{side}-{i}.log", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", **numbers)
                runs.append(json.loads((output / "found.json").read_text()))
        markdown = as_markdown(found, options.updates, options.threads)
        if options.json:
            options.json.write_text(json.dumps(compared(found) | {"markdown": markdown}))
        print(markdown)


if __name__ == "__main__":
    main()
