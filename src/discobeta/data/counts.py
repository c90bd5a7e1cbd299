"""How many rows a run's data has, as far as that can be known before it is read and tokenised.

Counted are rows as they stand in the data. What is trained on are the usable ones, which may be fewer.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discobeta.data.local_files import file_rows
from discobeta.data.sources import Source, resolve
from discobeta.design.config import RunConfig
from discobeta.errors import UserError, telling

KNOWN = {
    "Anthropic/hh-rlhf": {"train": 160_800, "test": 8_552},
    "trl-lib/ultrafeedback_binarized": {"train": 62_135, "test": 1_000},
    "nvidia/HelpSteer3": {"train": 38_459, "validation": 2_017},
    "allenai/multipref": {"train": 10_461},
}
"""Hub id -> rows of its splits, of the data sets that config/datasets.yaml names (HelpSteer3: its preference part)."""


@dataclass(frozen=True)
class Count:
    """Rows to train on and held-out rows, before they are tokenised; how they are known, in words."""

    train: int
    held_out: int
    why: str
    prompts: int | None = None  # of ppo, if not those of the pairs
    tokens: float | None = None  # of a row, on average; of a pair with both responses


def rows_given(words: list[str]) -> Count | None:
    """What `--rows train=160800 eval=8552 tokens=300` says; None if nothing. Raises UserError."""
    given: dict[str, int] = {}
    for word in words:
        name, _, number = word.partition("=")
        if name not in ("train", "eval", "prompts", "tokens") or not re.fullmatch(r"[0-9][0-9_,]{0,15}", number):
            raise UserError(f"--rows: {word!r} should be train=N, eval=N, prompts=N or tokens=N (of a row, on average)")
        given[name] = int(re.sub("[_,]", "", number))
    if not given:
        return None
    if not given.get("train") or 0 in (given.get("prompts", 1), given.get("tokens", 1)):
        raise UserError("--rows: say how many rows are trained on: train=N, at least 1")
    return Count(given["train"], given.get("eval", 0), "as --rows says", given.get("prompts"), given.get("tokens"))


def rows_of(config: RunConfig) -> Count | None:
    """The rows of a run's `dataset` and `eval_dataset`, or of `val_size`; None where they cannot be known without
    downloading them. Raises UserError for data that is named and not there."""
    if not config.dataset:
        return None
    of_training = _of(config.dataset, config, config.split)
    if of_training is None:
        return None
    train, why = of_training
    held_out = 0
    if config.eval_dataset:
        of_held_out = _of(config.eval_dataset, config, config.eval_split)
        if of_held_out is None:
            return None
        held_out = of_held_out[0]
        why = why if of_held_out[1] == why else f"{why}; held out: {of_held_out[1]}"
    elif config.val_size:
        held_out = round(config.val_size * train) if config.val_size < 1 else int(config.val_size)
        train -= held_out
    return Count(train, held_out, why) if train > 0 else None


def _of(names: str, config: RunConfig, split: str) -> tuple[int, str] | None:
    total, known = 0, []
    for source in resolve(names, config, split):
        found = _in_file(source.path) if source.path else _on_the_hub(source, config)
        if found is None:
            return None
        rows, why = found
        total += min(number for number in (rows, source.limit, config.max_samples) if number is not None)
        known.append(why)
    return total, ", ".join(dict.fromkeys(known))


def _in_file(path: Path) -> tuple[int, str]:
    with telling(f"cannot read {path}"):
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_metadata(path).num_rows, f"rows of {path}"
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            if re.match(rb"\s*\{", file.read(4096).removeprefix(b"\xef\xbb\xbf")):  # an object a line
                file.seek(0)
                return sum(bool(line.strip()) for line in file), f"rows of {path}"
        return sum(1 for _ in file_rows(path)), f"rows of {path}"


def _on_the_hub(source: Source, config: RunConfig) -> tuple[int, str] | None:
    """From what `datasets` has written of it beside the rows in its cache; else as known here."""
    known = [info for info in infos(source.hub, config.cache_dir) if source.subset in (None, info.get("config_name"))]
    sizes = {size for info in known if (size := _examples(info, source.split)) is not None}
    if len(sizes) == 1 and not source.folder:
        return sizes.pop(), f"rows of {source.hub} in the hub's cache"
    if not source.folder and (rows := KNOWN.get(source.hub or "", {}).get(source.split or "")):
        return rows, f"rows of {source.hub} as published"
    return None


def infos(hub: str | None, cache_dir: str | None) -> Iterator[dict[str, Any]]:
    """What the cache of `datasets` says of each part of a hub data set that has been loaded, without importing it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface")
    cache = Path(cache_dir or os.environ.get("HF_DATASETS_CACHE") or Path(home, "datasets"))
    folders = [folder for folder in cache.glob("*___*") if _letters(folder.name) == _letters(hub or "")]
    for path in [path for folder in folders for path in sorted(folder.rglob("dataset_info.json"))]:
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(info, dict):
            yield info


def _letters(name: str) -> str:
    """Letters and digits: `datasets` makes a folder of owner/HelpSteer3 that is called owner___help_steer3."""
    return re.sub("[^a-z0-9]", "", name.lower())


def _examples(info: dict[str, Any], split: str | None) -> int | None:
    part = info.get("splits")
    part = part.get(split) if isinstance(part, dict) else None
    number = part.get("num_examples") if isinstance(part, dict) else None
    return number if type(number) is int and number > 0 else None
