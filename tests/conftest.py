"""A tiny random-weight Qwen3, a word tokenizer and a few preference rows, made once for all tests."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

# Under nohup, and in the background of a script, signals are ignored, which the processes that tests start would
# inherit; a handler that does nothing is inherited by none.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "user",
    "assistant",
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    ".",
    "?",
]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Qwen3 with 2 layers of width 32 and random weights, and of its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("base")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=64, tie_word_embeddings=True, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def preference_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of varying length in which the chosen response holds lower number words than the rejected one."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        colours = random.choice(WORDS[6:9], size=random.integers(1, 5))
        low, high = random.choice(WORDS[9:13], 3), random.choice(WORDS[13:17], 3)
        keep = random.integers(1, 4, size=2)
        end = random.choice([".", "?"], 2)
        rows.append(
            {
                "prompt": f"user {' '.join(colours)} assistant",
                "chosen": f"{' '.join(low[: keep[0]])} {end[0]}",
                "rejected": f"{' '.join(high[: keep[1]])} {end[1]}",
                "truth": {"topic": f"topic-{number % 2}", "noise": 0.5 + number % 2, "familiarity": number // 2 % 2},
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two jsonl files of 40 and 12 pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    return {
        "train": write_rows(folder / "train.jsonl", preference_rows(40, 1)),
        "eval": write_rows(folder / "eval.jsonl", preference_rows(12, 2)),
    }


@pytest.fixture
def settings(base: Path, pairs: dict[str, Path], tmp_path: Path):
    """settings(stage, **changes): the flat config of a run of a few steps in a folder of its own."""

    def make(stage: str, **changes) -> dict:
        name = changes.pop("name", "run")
        return {
            "stage": stage,
            "model_name_or_path": str(base),
            "dataset": str(pairs["train"]),
            "eval_dataset": str(pairs["eval"]),
            "output_dir": str(tmp_path / name),
            "cutoff_len": 32,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "logging_steps": 2,
            **({} if stage == "rm" else {"pref_beta": 0.5}),  # which rm does not read
            "lora_rank": 4,
            "seed": 7,
        } | changes

    return make


@pytest.fixture
def run(settings):
    """run(stage, **changes): train (in this process) and return the run directory."""
    from discobeta.design.config import RunConfig
    from discobeta.inputs import base
    from discobeta.run.train import train as train_run

    def go(stage: str, **changes) -> Path:
        config, _ = RunConfig.from_mapping(settings(stage, **changes))
        train = base.train if stage == "sft" else train_run
        train(config)
        return Path(config.output_dir)

    return go


def reseal(directory: Path, **facts) -> None:
    """As if the run in `directory` had ended with the files that are there now, and on the base that is there now."""
    from discobeta import files, identity, record
    from discobeta.design.config import RunConfig
    from discobeta.design.yaml_text import read_yaml

    config, _ = RunConfig.from_mapping(read_yaml(directory / "config.yaml"))
    now = {"files": record.manifest(directory), "base": identity.weights_hash(config)}
    now |= {"tokenizer": identity.tokenizer_hash(config)} | facts
    files.write_sealed(directory / "provenance.json", files.read_sealed(directory / "provenance.json") | now)


@pytest.fixture
def clock_of(monkeypatch):
    """clock_of(module): what it takes for `time`, a clock that goes when it is told to."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    def replaced(module) -> Clock:
        monkeypatch.setattr(module, "time", clock := Clock())
        return clock

    return replaced
