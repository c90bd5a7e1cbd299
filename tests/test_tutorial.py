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
    for name in ("config", "envs", "src", "workflow"):  # no links: where paths are not the same, no start is warm
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in {"python": "", "snakemake": "-m snakemake", "discobeta": "-m discobeta"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    (folder / ".venv" / ".ready").touch()  # newer than what it is made from: nothing is installed
    return folder


def test_every_line_of_the_template_is_explained():
    """Each key stands on the page in a row of its table."""
    study = yaml.safe_load((ROOT / "config" / "own.yaml").read_text(encoding="utf-8"))
    keys = {key for section in study.values() if isinstance(section, dict) for key in section}
    keys |= {key for key, value in study.items() if not isinstance(value, dict)}
    rows = "".join(re.findall(r"^\| `.*$", PAGE, re.MULTILINE))
    assert {key for key in keys if not re.search(rf"`{key}[`:]", rows)} == set()
    assert study["arms"] == ARMS


def test_the_pairs_that_the_page_shows_are_read(tmp_path: Path):
    """One pair in three forms, each found from its columns."""
    from discobeta.data.sources import read_examples
    from discobeta.design.config import RunConfig

    (block,) = blocks("json")
    answers = []
    for number, line in enumerate(block.splitlines()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(line)
        config, _ = RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": "-", "dataset": str(path)})
        (example,), _ = read_examples(config.dataset, config, split="train", kind="pairs")
        answers.append(json.dumps([example.chosen, example.rejected]))
    assert len(answers) == 3
    assert all("Tea" in answer and "Yes." in answer and "Human" not in answer for answer in answers)


def test_at_most_five_commands_make_a_table(clone: Path, tmp_path: Path):
    """With one seed, as the work is the same for each."""
    rows = transcripts(64)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(tmp_path / "model", [row["chosen"] for row in rows])
    first, copy, *others = commands()
    assert len(others) <= 3 and first.startswith("git clone ")
    counts = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name and name != "MAKEFLAGS"}
    environment = counts | {"PYTHONPATH": str(clone / "src"), "CORES": "2", "HF_HUB_OFFLINE": "1"}

    def run(command: str) -> str:
        done = subprocess.run(["bash", "-ec", command], cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    run(copy)
    study = clone / copy.split()[-1]
    written = study.read_text().replace("seeds: [1, 2]", "seeds: [1]")
    for key, path in (("dataset", tmp_path / "pairs.jsonl"), ("model_name_or_path", tmp_path / "model")):
        written, edited = re.subn(rf"^(  {key}:) .*# <-.*$", rf"\1 {path}", written, flags=re.MULTILINE)
        assert edited == 1
    study.write_text(written)
    said = {command: run(command) for command in others}

    results = clone / "results" / "own"
    measured = pd.read_csv(results / "tables" / "metrics.csv").set_index(["stage", "arm", "seed", "metric"])["value"]
    runs = {(stage, arm, seed) for stage, arm, seed, _ in measured.index}
    of_rm = {("rm", arm, 1) for arm in ARMS if "beta-used" not in arm}  # no reference: nothing for a Beta Head to scale
    assert runs == of_rm | {("dpo", arm, 1) for arm in ARMS}
    for stage, arm, seed in runs:
        pairs = pd.read_parquet(results / "runs" / stage / arm / f"seed-{seed}" / "examples.parquet")
        assert len(pairs) == 6  # a tenth of 64
        assert measured[stage, arm, seed, "nll"] == pytest.approx(-np.log(pairs["probability"]).mean())
    (shown,) = (output for command, output in said.items() if command.startswith("cat "))
    numbers = np.array([float(number) for number in re.findall(r"\d\.\d+", shown)])
    for arm in ARMS:
        assert np.abs(numbers - measured["dpo", arm, 1, "nll"]).min() < 0.0006  # of three or four digits
