"""What is attacked: a folder with a base, data, runs of all stages, a world and a study, all tiny; and the count."""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections import Counter
from pathlib import Path

import harness
import hypothesis
import pytest
import yaml

SCALE = float(os.environ.get("FAULTS", "1"))
"""Share of the kills and inputs of a full run."""

COMMON = {
    "model_name_or_path": "base",
    "dataset": "data/train.jsonl",
    "eval_dataset": "data/eval.jsonl",
    "cutoff_len": 32,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "logging_steps": 2,
    "save_steps": 1,
    "lora_rank": 2,
    "seed": 7,
}
DISCO = {"add_disco_head": True, "disco_pref": True}
BETA = {"add_beta_head": True, "use_dynamic_beta": True}
SAMPLED = {"num_eval_generations": 2, "max_new_tokens": 4}
RUNS = {
    "sft": {
        "stage": "sft", "finetuning_type": "full", "model_type": "qwen3", "vocab_size": 300,
        "dataset": "data/train.jsonl",
        "config_overrides": "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=1,head_dim=8,"
        "intermediate_size=16", "per_device_train_batch_size": 8, "max_steps": 2, "logging_steps": 1,
    },
    "rm": COMMON | DISCO | {"stage": "rm"},
    "dpo": COMMON | DISCO | BETA | SAMPLED | {"stage": "dpo", "pref_beta": 0.5, "lora_dropout": 0.1}
    | {"reference_answers_path": "shared/answers"},
    "full": COMMON | {"stage": "dpo", "finetuning_type": "full", "max_steps": 2, "tokenized_path": "shared/tokens"}
    | {"reference_path": "shared/reference"},
    "ppo": COMMON | DISCO | BETA | SAMPLED | {"stage": "ppo", "reward_model": "runs/rm", "beta_head": "runs/dpo"}
    | {"max_steps": 3, "ppo_epochs": 1, "per_device_train_batch_size": 2},
}  # fmt: skip
STUDY = {
    "study": "tiny",
    "seeds": [1],
    "stages": ["rm"],
    "arms": ["baseline", "disco-idle_beta-absent", "disco-used_beta-absent"],
    "data": {"dataset": "data/train.jsonl", "eval_dataset": "data/eval.jsonl", "cutoff_len": 32},
    "base": {"model_name_or_path": "base"},
    "common": {"max_steps": 2, "per_device_train_batch_size": 8, "lora_rank": 2, "logging_steps": 1},
}
WORLD_BASE = {
    "stage": "sft", "finetuning_type": "full", "model_type": "qwen3", "tokenizer_name": "world/tokenizer",
    "dataset": "world/sft.jsonl", "max_steps": 1, "per_device_train_batch_size": 8, "max_samples": 16,
    "config_overrides": RUNS["sft"]["config_overrides"],
}  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_study.py")  # the longest first


def done(words, folder: Path) -> harness.Outcome:
    outcome = harness.run(words, folder, limit=300)
    assert outcome.status == 0, outcome.output
    return outcome


@pytest.fixture(scope="session")
def inputs(base, pairs, tmp_path_factory) -> Path:
    """A base, data and configs, with files of somebody else's beside them."""
    harness.load()
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(base, folder / "base")
    (folder / "data").mkdir()
    for name, path in pairs.items():
        shutil.copy(path, folder / "data" / f"{name}.jsonl")
    for name, settings in RUNS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings | {"output_dir": f"runs/{name}"}))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (folder / "world-base.yaml").write_text(yaml.safe_dump(WORLD_BASE | {"output_dir": "world-base"}))
    for place in (".", "data", "runs", "runs/foreign", "shared", "results/tiny/tables"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "notes.txt").write_text(f"mine, in {place}\n")
        (folder / place / ".notes.partial-mine.txt").write_text("mine too\n")
    return folder


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory) -> Path:
    """The same, with a run of every stage, a world and its base, and a study that is trained."""
    folder = tmp_path_factory.mktemp("finished") / "all"
    shutil.copytree(inputs, folder)
    for name in ("rm", "dpo", "ppo", "sft", "full"):
        done(["train", f"{name}.yaml"], folder)
    done(["answers", "dpo.yaml"], folder)
    done(["world", "corpus", "--output", "world", "--sft-examples", "64"], folder)
    done(["train", "world-base.yaml"], folder)
    done(_train_study, folder)
    return folder


def _train_study() -> None:
    """What Snakemake would have run, short of the tables."""
    from discobeta.data.tokens import load_or_tokenise
    from discobeta.design.config import RunConfig
    from discobeta.design.study import Study
    from discobeta.model.pretrained import load_tokenizer
    from discobeta.run.evaluate import evaluate
    from discobeta.run.train import train

    study = Study.read(["study.yaml"], [])
    for draw in study.draws():
        config, _ = RunConfig.from_mapping(study.prepare_settings(draw))
        load_or_tokenise(config, load_tokenizer(config))
    for run in study.runs():
        train(study.config(run))
        evaluate(study.config(run).output_dir)


# --- what is told at the end

TALLY: Counter[str] = Counter()


@pytest.fixture
def tally(record_property):
    """tally["kills"] += 1: summed over all tests and processes, and told at the end."""
    found: Counter[str] = Counter()
    yield found
    for name, count in found.items():
        record_property(name, count)


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        TALLY.update({name: value for name, value in report.user_properties if isinstance(value, int)})


def pytest_terminal_summary(terminalreporter):
    wrong = ("tracebacks", "hangs", "half-written", "foreign files lost", "silently wrong", "unforeseen")
    terminalreporter.write_line(
        f"{TALLY['kills']:,} kills, {TALLY['errors']:,} errors of the system: {TALLY['different']} ended differently; "
        f"{TALLY['inputs']:,} hostile inputs: {', '.join(f'{TALLY[name]} {name}' for name in wrong)}"
    )


# --- hostile inputs


@pytest.fixture
def fuzz(request, tally):
    """fuzz(count, strategy, attempt): attempt(case) -> (kind, text) of all that is wrong, for `count` cases.

    The cases follow from the name of the test, and from --hypothesis-seed where that is given.
    """

    def go(count: int, strategy, attempt) -> None:
        wrong: dict[str, str] = {}
        start = zlib.crc32(f"{request.node.name} {request.config.getoption('--hypothesis-seed') or 0}".encode())

        @hypothesis.seed(start)
        @hypothesis.settings(
            max_examples=max(2, round(count * SCALE)), database=None, deadline=None, phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(strategy)
        def each(case):
            tally["inputs"] += 1
            for kind, text in attempt(case):
                tally[kind] += 1
                alike = re.sub(r"\d+|'[^']*'|\S*/\S*", "", text.strip().splitlines()[-1] if text.strip() else "")[-120:]
                if len(wrong) < 60:
                    wrong.setdefault(f"{kind} {alike}", f"{kind}: {str(case)[:700]!r}\n  {text}")

        each()
        assert not wrong, "\n\n".join(wrong.values())

    return go
