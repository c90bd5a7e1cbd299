"""docs/tutorial.md does what it says: its commands are run as they stand there, on a clone without results.

What the page leaves to the reader is done here: the clone is a copy, the environment is the one that runs the tests,
and the two lines that the page says to edit name a file of transcripts like hh-rlhf's and a tiny model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
ARMS = ["baseline", "disco-absent_beta-used", "disco-used_beta-absent", "disco-used_beta-used"]


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in the order of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """All commands of the page, each a line."""
    return [line for block in blocks("sh") for line in block.splitlines() if line and not line.startswith("#")]


def transcripts(count: int) -> list[dict[str, str]]:
    """Rows in the form of hh-rlhf, in which the friendlier answer is the chosen one."""
    random = np.random.default_rng(5)
    rows = []
    for number in range(count):
        things = " and ".join(random.choice(["tea", "rice", "rain", "snow", "bread"], 2))
        prompt = f"\n\nHuman: Tell me about {things}.\n\nAssistant: Which?\n\nHuman: Number {number}.\n\nAssistant:"
        kind, rude = random.choice(["Gladly.", "Of course.", "With pleasure."]), random.choice(["No.", "Go away."])
        rows.append({"chosen": f"{prompt} {kind} {things} are good.", "rejected": f"{prompt} {rude} I hate {things}."})
    return rows


def save_model(folder: Path, texts: list[str]) -> None:
    """A Qwen3 of 2 layers and width 32 with random weights, and a byte-level tokenizer of 300 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=special, initial_alphabet=alphabet
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64, tie_word_embeddings=True, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What `git clone` gives, as far as a study reads it, with an environment that is ready."""
    folder = tmp_path / "discobeta"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, folder)
    for name in ("config", "envs", "workflow"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "src").symlink_to(ROOT / "src")
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in {"python": "", "snakemake": "-m snakemake", "discobeta": "-m discobeta"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    (folder / ".venv" / ".ready").touch()  # newer than what it is made from: nothing is installed
    return folder


def test_the_commands_of_the_page_end_with_a_table(clone: Path, tmp_path: Path):
    rows = transcripts(64)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(tmp_path / "model", [row["chosen"] for row in rows])
    first, copy, *others = commands()
    assert first.startswith("git clone ")
    environment = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name and name != "MAKEFLAGS"}
    environment |= {"PYTHONPATH": str(clone / "src"), "CORES": "2", "HF_HUB_OFFLINE": "1"}
    said = []

    def run(command: str) -> None:
        done = subprocess.run(["bash", "-ec", command], cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        said.append(done.stdout)

    run(copy)
    study = clone / copy.split()[-1]
    written = study.read_text()
    for key, path in (("dataset", tmp_path / "pairs.jsonl"), ("model_name_or_path", tmp_path / "model")):
        written, edited = re.subn(rf"^(  {key}:) .*# <-.*$", rf"\1 {path}", written, flags=re.MULTILINE)
        assert edited == 1
    study.write_text(written)
    for command in others:
        run(command)

    tables = clone / "results" / "own" / "tables"
    measured = pd.read_csv(tables / "metrics.csv").set_index(["stage", "arm", "seed", "metric"])["value"]
    runs = {(stage, arm, seed) for stage, arm, seed, _ in measured.index}
    of_rm = [arm for arm in ARMS if "beta-used" not in arm]  # rm has no reference, so nothing that a Beta Head scales
    assert runs == {(stage, arm, seed) for stage, arms in (("rm", of_rm), ("dpo", ARMS)) for arm in arms for seed in (1, 2)}
    for stage, arm, seed in runs:
        pairs = pd.read_parquet(clone / "results" / "own" / "runs" / stage / arm / f"seed-{seed}" / "examples.parquet")
        assert len(pairs) == 6  # a tenth of 64 rows
        mean = np.mean(np.where(pairs["margin"] == 0, 0.5, pairs["margin"] > 0))
        assert measured[stage, arm, seed, "accuracy"] == pytest.approx(mean)
    accuracy = {arm: np.mean([measured["dpo", arm, seed, "accuracy"] for seed in (1, 2)]) for arm in ARMS}
    print(accuracy, said[-2], said[-1], said[0])
