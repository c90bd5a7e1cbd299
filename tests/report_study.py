"""A study whose run directories are written by hand: what the tests of the report read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from discobeta import files, identity, record
from discobeta.design.config import RunConfig
from discobeta.design.study import Run, Study
from discobeta.design.yaml_text import read_yaml, write_yaml
from discobeta.report.results import Results

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STEPS = ({"step": 1, "loss": 0.75, "accuracy": 0.5}, {"step": 2, "eval_loss": 0.5, "eval_accuracy": 0.75})
HEADS = b"heads"
FACTS = {
    "commit": COMMIT,
    "dirty": False,
    "versions": {"discobeta": "9.8.7"},
    "machine": {"kernels": "AVX2"},
    "base": "b" * 64,
    "tokenizer": "c" * 64,
    "data": "d" * 64,
    "held_out": "e" * 64,
}
"""Of every run here: base, tokenizer and rows are nowhere to be found, so that runs can but agree on them."""


def study(**settings) -> Study:
    """A study of real runs on paper: neither the data nor the model is ever opened."""
    base = {
        "data": {"dataset": "rows.jsonl", "eval_dataset": "held-out.jsonl"},
        "base": {"model_name_or_path": "a/model"},
    }
    return Study({"study": "fixture", "seeds": [1, 2], **base, **settings})


def results(of: Study) -> Results:
    """What the tables and figures are made of, as it stands on the disk now."""
    return Results(of, curves=True)


EXAMPLES = {"probability": (0.9, 0.4), "mean_margin": (2.2, -0.4)}


def finish(of: Study, run: Run, metrics: dict | None, **options) -> Path:
    """What `train` leaves of a run of the study and, with metrics, what `evaluate` leaves; options: of `write_run`."""
    return write_run(of.config(run), metrics, **options)


def write_run(
    config: RunConfig | Path,
    metrics: dict | None = None,
    *,
    weights: bytes = b"weights",
    log: tuple[dict, ...] = STEPS,
    examples: dict[str, Sequence] = EXAMPLES,
    cost: dict | None = None,
    evaluation_seconds: float = 1.0,
    **facts,
) -> Path:
    """config: or the directory of some dpo run. facts: of its provenance, where they are not those of all runs."""
    if isinstance(config, Path):
        settings = {"stage": "dpo", "model_name_or_path": "a/model", "output_dir": str(config)}
        config, _ = RunConfig.from_mapping(settings)
    directory = Path(config.output_dir)
    (directory / "adapter").mkdir(parents=True)
    (directory / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    (directory / "heads.safetensors").write_bytes(HEADS)
    (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (directory / "cost.json").write_text(json.dumps(cost or {"seconds": 10.0, "device": "cpu"}))
    write_yaml(config.resolved(), directory / "config.yaml")
    read = _read_by_ppo(config) if config.stage == "ppo" else {}
    record.write_provenance(directory, config, FACTS | read | facts)
    if metrics is not None:
        evaluate(directory, metrics, examples, evaluation_seconds)
    return directory


def _read_by_ppo(config: RunConfig) -> dict[str, str]:
    judges, head = config.reward_model.split(","), Path(config.beta_head or "") / "heads.safetensors"
    hashes = [identity.folders_hash(Path(judge, "adapter")) for judge in judges if Path(judge, "adapter").exists()]
    of_all = hashlib.sha256("".join(f"{place} {digest}\n" for place, digest in enumerate(hashes)).encode()).hexdigest()
    found = {"reward_model": hashes[0] if len(judges) == 1 else of_all} if len(hashes) == len(judges) else {}
    return found | ({"beta_head": files.sha256(head)} if config.beta_head and head.exists() else {})


def evaluate(
    directory: Path,
    metrics: dict,
    examples: dict[str, Sequence] = EXAMPLES,
    seconds: float = 1.0,
    config: RunConfig | None = None,
) -> None:
    """config: with the settings of the evaluation, where they are not those in the run's."""
    (directory / "evaluation_cost.json").write_text(json.dumps({"seconds": seconds}))
    pd.DataFrame(examples).to_parquet(directory / "examples.parquet")
    own, _ = RunConfig.from_mapping(read_yaml(directory / "config.yaml"))
    record.write_evaluation(directory, config or own, metrics, {}, directory)
    evaluation = files.read_sealed(directory / "evaluation.json")
    files.write_sealed(directory / "evaluation.json", evaluation | {"kernels": "AVX2"})


def reseal(directory: Path, **changes) -> None:
    """Another provenance or evaluation of the same run, sealed as if it had been written so."""
    path = directory / "provenance.json"
    files.write_sealed(path, files.read_sealed(path) | changes)
    if (directory / "metrics.json").exists():
        evaluation = files.read_sealed(directory / "evaluation.json")
        files.write_sealed(directory / "evaluation.json", evaluation | {"run": files.sha256(path)})


def rewrite(directory: Path, name: str, content: str | bytes) -> None:
    """Another content of a file, with records that say that it was written so."""
    path = directory / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    evaluation = directory / "evaluation.json"
    record_of = directory / "provenance.json"
    if name in files.read_sealed(record_of)["files"]:
        reseal(directory, files=files.read_sealed(record_of)["files"] | {name: files.sha256(path)})
    else:
        found = files.read_sealed(evaluation)
        files.write_sealed(evaluation, found | {"files": found["files"] | {name: files.sha256(path)}})
