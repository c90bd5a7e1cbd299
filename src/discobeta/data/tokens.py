"""The rows of a run as token ids: made once per (data, tokenizer, cutoff), kept in a folder, shared by all arms."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from discobeta import files
from discobeta.data.encode import encode
from discobeta.data.examples import Kind
from discobeta.data.formats import KINDS
from discobeta.data.row_report import RowReport
from discobeta.data.rows import FACTS, Ragged, Rows, TokenisedData, fingerprints, hold_out, offsets_of
from discobeta.data.sources import check_apart, named, read_examples, resolve
from discobeta.data.templates import TODAY
from discobeta.design.config import RunConfig
from discobeta.errors import UserError, telling
from discobeta.files import check_regular

LAYOUT = 3
"""The version of the folder. Raised when tokenisation or the files change, so that old folders are refused."""

REMEDY = "delete the folder and it is made again"


def tokenise(config: RunConfig, tokenizer: Any, kind: Kind | None = None) -> TokenisedData:
    """The run's data as token ids, without touching the disk; kind: default what the stage trains on.

    report: "train", "eval" and "calibration" (row reports as dicts), "shared_prompts" (distinct held-out prompts
    that also occur in the training rows), "shared_calibration" (distinct calibration rows that also are training or
    held-out rows, on which nothing may be fitted and then measured).
    Raises UserError for data that cannot be read, that has too many unusable rows, or that has two roles
    (`sources.check_apart`).
    """
    kind = kind or KINDS[config.stage]
    if not config.dataset:
        raise UserError("dataset is missing: comma-separated names, local files or hub ids")
    check_apart(config)
    train, account = _read_rows(config.dataset, config, tokenizer, split=config.split, kind=kind)
    report: dict[str, Any] = {"train": account.as_dict()}
    held_out = None
    if config.eval_dataset:
        held_out, account = _read_rows(config.eval_dataset, config, tokenizer, split=config.eval_split, kind=kind)
        report["eval"] = account.as_dict()
    elif config.val_size:
        train, held_out = hold_out(train, config.val_size, config.seed)
    if held_out is not None:
        both = [np.unique(fingerprints([rows.prompt_ids])) for rows in (train, held_out)]
        report["shared_prompts"] = len(np.intersect1d(*both))
    calibration = None
    if "calibration_dataset" in (sources := named(config)):
        names, split = sources["calibration_dataset"]
        calibration, account = _read_rows(names, config, tokenizer, split=split, kind=kind)
        others = [rows.fingerprints() for rows in (train, held_out) if rows is not None]
        report["calibration"] = account.as_dict()
        report["shared_calibration"] = len(np.intersect1d(calibration.fingerprints(), np.concatenate(others)))
    return TokenisedData(train, held_out, report, calibration)


def _read_rows(names: str, config: RunConfig, tokenizer: Any, *, split: str, kind: Kind) -> tuple[Rows, RowReport]:
    examples, report = read_examples(names, config, split=split, kind=kind)
    rows = encode(examples, tokenizer, config.cutoff_len, kind, report)
    report.check(config.max_unusable_rows)
    return rows, report


def load_or_tokenise(
    config: RunConfig, tokenizer: Any, kind: Kind | None = None, *, write: bool = True
) -> TokenisedData:
    """`tokenise`, through the folder config.tokenized_path when that is set: read if there, else written.

    The folder holds train.parquet, eval.parquet and calibration.parquet (if there are such rows) and tokens.json (what
    they were made from, and their sha256; sealed). Raises UserError, naming what differs, for a folder that was made
    from something else, and for one that was changed since. Without `dataset` the folder is taken for what it says it
    is.
    write: False leaves the disk alone; rows that are not there are made in memory.
    """
    kind = kind or KINDS[config.stage]
    if not config.tokenized_path:
        return tokenise(config, tokenizer, kind)
    folder = Path(config.tokenized_path)
    if write:
        files.sweep(folder)
    if os.path.lexists(folder / "tokens.json"):
        return load(folder, config, tokenizer, kind)
    _check_free(folder)
    if not write:
        return tokenise(config, tokenizer, kind)
    recipe = made_from(config, tokenizer, kind)
    data = tokenise(config, tokenizer, kind)
    if made_from(config, tokenizer, kind) != recipe:
        raise UserError(f"dataset: {config.dataset} was changed while it was being read")
    try:
        with files.replacing(folder, lambda: _check_free(folder)) as temporary:
            temporary.mkdir()
            write_folder(data, recipe, temporary)
    except UserError:
        if not os.path.lexists(folder / "tokens.json"):
            raise
        return load(folder, config, tokenizer, kind)  # another process has written it meanwhile: its is kept
    return data


def _check_free(folder: Path) -> None:
    """Refuse to write a folder that is there, unless it is empty."""
    with telling(f"tokenized_path: cannot read {folder}"):
        is_free = not os.path.lexists(folder) or folder.is_dir() and not any(folder.iterdir())
    if not is_free:
        raise UserError(f"tokenized_path: {folder} is there and holds no tokenised rows (no tokens.json)")


def made_from(config: RunConfig, tokenizer: Any, kind: Kind) -> dict[str, Any]:
    """Everything that the tokenised rows depend on. The seed is part of it only where it draws a split."""
    recipe = {"layout": LAYOUT, "kind": kind, "cutoff_len": config.cutoff_len, "tokenizer": tokenizer_hash(tokenizer)}
    recipe["date_string"] = TODAY.strftime("%d %b %Y")
    if config.dataset:
        recipe["dataset"] = [source.identity() for source in resolve(config.dataset, config, config.split)]
        recipe["max_samples"] = config.max_samples
        recipe["val_size"] = config.val_size
        recipe["seed"] = config.seed if config.val_size else None
        recipe["eval_dataset"] = [
            source.identity() for source in resolve(config.eval_dataset, config, config.eval_split)
        ] if config.eval_dataset else []  # fmt: skip
        if "calibration_dataset" in (sources := named(config)):
            names, split = sources["calibration_dataset"]
            recipe["calibration_dataset"] = [source.identity() for source in resolve(names, config, split)]
    return recipe


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what decides the token ids: the backend, the special tokens, the chat template.

    Equal in every process, and after saving and loading. Padding and truncation are left out: they
    are a call's settings that the backend happens to remember.
    """
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend |= {"padding": None, "truncation": None}
    else:
        backend = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = json.dumps([backend, special, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()


def load(folder: Path, config: RunConfig, tokenizer: Any, kind: Kind = "pairs") -> TokenisedData:
    """The rows of a folder, after checking that they are what this run would make, and what was written."""
    if config.dataset:
        check_apart(config)
    try:
        check_regular(folder / "tokens.json")
        saved = files.read_sealed(folder / "tokens.json")
    except UserError as error:
        raise UserError(f"tokenized_path: {error}; {REMEDY}") from None
    try:
        _check_recipe(saved["made_from"], made_from(config, tokenizer, kind), folder)
        report, digests = saved["report"], saved["files"]
        for part in report.keys() & FACTS:
            RowReport.of(report[part]).check(config.max_unusable_rows)
        rows = {part: _read(folder / f"{part}.parquet", digests[part]) for part in digests}
        return TokenisedData(rows["train"], rows.get("eval"), report, rows.get("calibration"))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{folder}/tokens.json is incomplete; {REMEDY}") from None


def _check_recipe(saved: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    if "dataset" in asked:  # there is none of calibration rows in a recipe without them
        saved, asked = ({"calibration_dataset": [], **recipe} for recipe in (saved, asked))
    differing = [name for name, value in asked.items() if _content(saved[name]) != _content(value)]
    if differing:
        details = "; ".join(_difference(name, saved[name], asked[name]) for name in differing)
        raise UserError(
            f"tokenized_path: {folder} was made from something else: {details}.\n"
            "Name another folder, or delete this one and it is made again"
        )


def _content(value: Any) -> Any:
    """What a dataset is, whatever it is called: a file that was moved is still the same rows."""
    if not isinstance(value, list):
        return value
    return [{key: item for key, item in source.items() if key != "name"} for source in value]


def _difference(name: str, saved: Any, asked: Any) -> str:
    if name == "tokenizer":
        return f"another tokenizer (hash {saved[:8]}, here {asked[:8]})"
    if name in ("dataset", "eval_dataset", "calibration_dataset"):
        if [source["name"] for source in saved] == [source["name"] for source in asked]:
            return f"{name} has changed since ({', '.join(source['name'] for source in asked)})"
        saved, asked = (", ".join(source["name"] for source in sources) or "none" for sources in (saved, asked))
    return f"{name} was {saved}, here {asked}"


def write_folder(data: TokenisedData, recipe: dict[str, Any], folder: Path) -> None:
    for part, rows in data.parts().items():
        _write_rows(rows, folder / f"{part}.parquet")
    files.write_sealed(
        folder / "tokens.json",
        {
            "made_from": recipe,
            "counts": {part: len(rows) for part, rows in data.parts().items()},
            "keys": {part: rows.key() for part, rows in data.parts().items()},
            "files": {part: files.sha256(folder / f"{part}.parquet") for part in data.parts()},
            "report": data.report,
        },
    )


def _write_rows(rows: Rows, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        name: pa.LargeListArray.from_arrays(pa.array(part.offsets), pa.array(part.values))
        for name, part in rows.parts().items()
    }
    columns["source"] = pa.array(rows.source, pa.large_string())
    columns |= {f"truth.{name}": pa.array(column) for name, column in rows.truth.items()}
    columns |= {f"votes.{name}": pa.array(column) for name, column in rows.votes.items()}
    pq.write_table(pa.table(columns), path, compression="zstd")


def _read(path: Path, digest: str) -> Rows:
    """The rows of a file whose sha256 is `digest`. It is read once, so what is checked is what is used."""
    import pyarrow.parquet as pq

    check_regular(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {REMEDY}") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{path} was changed after it was written; {REMEDY}")
    with telling(f"cannot read {path}"):
        table = pq.ParquetFile(io.BytesIO(content)).read()  # read_table would import pyarrow.dataset
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        source = columns.pop("source").to_pylist()
        truth, votes = (
            {name.removeprefix(start): _array(columns.pop(name)) for name in [*columns] if name.startswith(start)}
            for start in ("truth.", "votes.")
        )
        parts = {name: _ragged(column) for name, column in columns.items()}
        return Rows(**parts, source=source, truth=truth, votes=votes)


def _ragged(column: Any) -> Ragged:
    # Arrow's memory is read-only, and torch warns of tensors over such memory: copy once.
    values = column.flatten().to_numpy(zero_copy_only=False, writable=True)
    return Ragged(values, offsets_of(column.value_lengths().to_numpy()))


def _array(column: Any) -> np.ndarray:
    array = column.to_numpy(zero_copy_only=False)
    return array.astype(str) if array.dtype == object else array
