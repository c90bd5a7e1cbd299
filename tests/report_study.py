"""A study whose run directories are written by hand: what the tests of the report read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from discobeta.study import Run, Study

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STEPS = ({"step": 1, "loss": 0.75, "accuracy": 0.5}, {"step": 2, "eval_loss": 0.5, "eval_accuracy": 0.75})


def study(**settings) -> Study:
    """A study of real runs on paper: neither the data nor the model is ever opened."""
    base = {
        "data": {"dataset": "rows.jsonl", "eval_dataset": "held-out.jsonl"},
        "base": {"model_name_or_path": "a/model"},
    }
    return Study({"study": "fixture", "seeds": [1, 2], **base, **settings})


def finish(
    run: Run | Path,
    metrics: dict | None,
    *,
    weights: bytes = b"weights",
    log: tuple[dict, ...] = STEPS,
    examples: dict[str, Sequence] = {"probability": (0.9, 0.4), "mean_margin": (2.2, -0.4)},  # noqa: B006, never changed
    cost: dict | None = None,
    evaluation_seconds: float = 1.0,
) -> Path:
    """What `train` leaves and, with metrics, what `evaluate` leaves."""
    directory = Path(getattr(run, "directory", run))
    (directory / "adapter").mkdir(parents=True)
    (directory / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (directory / "cost.json").write_text(json.dumps(cost or {"seconds": 10.0, "device": "cpu"}))
    if metrics is not None:
        (directory / "metrics.json").write_text(json.dumps(metrics))
        (directory / "evaluation_cost.json").write_text(json.dumps({"seconds": evaluation_seconds}))
        pd.DataFrame(examples).to_parquet(directory / "examples.parquet")
    record = {"commit": COMMIT, "dirty": False, "versions": {"discobeta": "9.8.7"}}
    (directory / "provenance.json").write_text(json.dumps(record))
    return directory
