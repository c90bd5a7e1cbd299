"""Our side: `discobeta train` in this process, and what a step took by its own speed.jsonl."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train the run. Returns seconds and loss of each step, and the sha256 of the tokens in the order of the steps."""
    from discobeta.design.config import RunConfig
    from discobeta.run.train import train as train_run

    config, _ = RunConfig.from_mapping(settings)
    rows = rows_in_order(config)
    train_run(config)
    output = Path(config.output_dir)
    return {
        "seconds": [line["seconds"] for line in read_lines(output / "speed.jsonl")],
        "losses": [line["loss"] for line in read_lines(output / "log.jsonl")],
        "tokens": hash_of([[prompt + chosen, prompt + rejected] for prompt, chosen, rejected in rows]),
        "lengths": [sum(map(len, part)) / len(rows) for part in zip(*rows, strict=True)],
    }


def start(settings: dict[str, Any], folder: Path) -> None:
    """Leave the adapter of step 0 as folder/adapter, and what each step sees, in its order, as folder/rows.jsonl."""
    from discobeta.design.config import RunConfig
    from discobeta.method.stage import stage_class
    from discobeta.model.pretrained import save_model

    config, _ = RunConfig.from_mapping(settings)
    save_model(stage_class(config.stage).start(config), folder)
    lines = Path(config.dataset).read_text().splitlines()
    (folder / "rows.jsonl").write_text("".join(f"{lines[i]}\n" for i in order(config, len(lines))))


def order(config, rows: int) -> list[int]:
    from discobeta.design.schedule import schedule_of

    schedule = schedule_of(config, rows, processes=1)
    return [row for step in range(config.max_steps) for row in schedule.step_rows(step).tolist()]


def rows_in_order(config) -> list[tuple[list[int], list[int], list[int]]]:
    from discobeta.data.tokens import tokenise
    from discobeta.model.pretrained import load_tokenizer

    rows = tokenise(config, load_tokenizer(config)).train
    columns = (rows.prompt_ids, rows.chosen_ids, rows.rejected_ids)
    return [tuple(column[i].tolist() for column in columns) for i in order(config, len(rows))]


def hash_of(sequences: list[list[list[int]]]) -> str:
    return hashlib.sha256(json.dumps(sequences).encode()).hexdigest()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def adapter_distance(first: Path, second: Path) -> float:
    """Relative L2 distance of two adapters, score included."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    if ours.keys() != theirs.keys():
        raise ValueError(f"{first} and {second} hold other weights: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    difference = sum((ours[name] - theirs[name]).double().square().sum() for name in ours)
    return float((difference / sum(weight.double().square().sum() for weight in ours.values())).sqrt())
