"""From the names in a run's `dataset` to usable examples, and an account of the rows that are not.

A name is (1) an entry of dataset_info.json or datasets.yaml in `dataset_dir`, (2) a local .json,
.jsonl or .parquet file, or (3) a hub id. Local files are read row by row, so that one broken row
costs that row and not the file; every unusable row is counted by reason, and too many are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from discobeta.data.examples import Example, Kind, Reason, Unusable
from discobeta.data.formats import read_example
from discobeta.data.layouts import COLUMNS, TAGS, find_layout
from discobeta.data.local_files import Row, beginning, cells, file_rows
from discobeta.data.row_report import RowReport
from discobeta.design.config import RunConfig, read_by
from discobeta.design.yaml_text import read_yaml
from discobeta.errors import UserError, did_you_mean, shorten, shown, telling
from discobeta.files import check_regular, read_json, sha256

FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
TEXTS = ("file_name", "hf_hub_url", "subset", "folder", "split", "script_url")
ENTRY = (*TEXTS, "file_sha1", "num_samples", "ranking", "formatting", "columns", "tags")
HUB_ID = r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?"
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
LONGEST_NAME = 200
"""Characters of the name of a column."""
ELSEWHERE = ("ms_hub_url", "om_hub_url")
"""Other hubs' addresses of the same data, which LLaMA-Factory's entries carry along."""
SCRIPTS = {"hh_rlhf_en": "Anthropic/hh-rlhf", "ultra_chat": "HuggingFaceH4/ultrachat_200k"}
"""LLaMA-Factory's loading scripts, which current `datasets` cannot run, and the data that they load."""

LISTS = ("dataset_info.json", "datasets.yaml")
NO_JSON = (Reason.NOT_JSON, Reason.NOT_UTF8)


@dataclass(frozen=True)
class Source:
    """One named dataset: a local file (`path`) or a hub dataset (`hub`, `subset`, `folder`, `split`)."""

    name: str
    path: Path | None = None
    hub: str | None = None
    subset: str | None = None
    folder: str | None = None
    split: str | None = None
    limit: int | None = None
    entry: dict[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What the rows come from: the file's content, or the hub dataset's address."""
        if self.path:
            origin = {"sha256": sha256(self.path)}
        else:
            origin = {"hub": self.hub, "subset": self.subset, "folder": self.folder, "split": self.split}
        reading = {key: self.entry[key] for key in ("formatting", "columns", "tags") if self.entry.get(key)}
        return {"name": self.name, **origin, **({"limit": self.limit} if self.limit else {}), **reading}

    def rows(self, config: RunConfig) -> list[Row]:
        """The first rows, as many as the entry and max_samples allow."""
        limit = min(n for n in (self.limit, config.max_samples, sys.maxsize) if n)
        if self.path:
            return list(islice(file_rows(self.path), limit))
        return _hub_rows(self, config, limit)


def read_examples(names: str, config: RunConfig, *, split: str, kind: Kind) -> tuple[list[Example], RowReport]:
    """All usable examples of the comma-separated datasets, in order, and the account of their rows.

    split: of hub datasets whose entry names none (config.split; of rows that are not trained on, config.eval_split).
    Raises UserError for a dataset that is not there, cannot be read or has no known format, that
    has no usable row at all, and when more than config.max_unusable_rows of all rows are unusable.
    """
    report, examples = RowReport(names), []
    for source in resolve(names, config, split):
        rows, own, before = source.rows(config), RowReport(source.name), len(examples)
        readable = [row for _, row in rows if isinstance(row, dict)]
        if source.path and rows and all(isinstance(row, Unusable) and row.reason in NO_JSON for _, row in rows):
            raise UserError(
                f"{source.path} is neither one JSON array nor JSON objects, one a line: "
                f"it begins {beginning(source.path)}"
            )
        layout = find_layout(readable, source.entry, kind, source.name) if readable else None
        if layout is not None:
            report.not_read += [name for name in layout.not_read if name not in report.not_read]
            report.no_votes += [name for name in (layout.no_votes,) if name and name not in report.no_votes]
        for where, row in rows:
            own.total, report.total = own.total + 1, report.total + 1
            try:
                if isinstance(row, Unusable):
                    raise row
                examples.append(read_example(row, layout, kind, where))
            except Unusable as unusable:
                own.count_unusable(unusable, where)
                report.count_unusable(unusable, where)
        own.check(1.0)
        _check_truth_names(examples[before:], str(source.path or source.hub))
    report.check(config.max_unusable_rows)
    return examples, report


def _check_truth_names(examples: list[Example], where: str) -> None:
    names = {name: None for example in examples for name in example.truth}
    if not names:
        return
    from discobeta.metrics import EVALUATION_COLUMNS

    for name in names:
        if name in EVALUATION_COLUMNS:
            raise UserError(f"{where}: truth: {name!r} is the name of a column that the evaluation writes: rename it")
        if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
            raise UserError(f"{where}: truth: {shown(name)} is no name for a column: rename it")


def resolve(names: str | None, config: RunConfig, split: str) -> list[Source]:
    """The datasets behind comma-separated names. Reads no data; raises UserError for what cannot be."""
    words = [word.strip() for word in (names or "").split(",") if word.strip()]
    if not words:
        raise UserError("dataset is missing, or names none: comma-separated names, local files or hub ids")
    entries = _entries(Path(config.dataset_dir))
    return [_resolve(word, entries, config, split) for word in words]


def named(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Run key -> (names, split of a hub dataset whose entry names none), of all rows that the run's stage reads."""
    splits = {"dataset": config.split, "eval_dataset": config.eval_split, "calibration_dataset": config.eval_split}
    there = {key: split for key, split in splits.items() if config.stage in read_by(key)}
    return {key: (names, split) for key, split in there.items() if (names := getattr(config, key))}


def check_apart(config: RunConfig) -> None:
    """Refuse rows of one source in two roles: what a run is trained on, measured on and (calibration) fitted on.

    The same are a file and itself, under whatever name and entry, or a copy of it, and one split of one hub dataset.
    Rows of different sources may still be the same: overlaps are counted once they are read.
    """
    roles = [(key, source) for key, (names, split) in named(config).items() for source in resolve(names, config, split)]
    for place, (key, source) in enumerate(roles):
        for other_key, other in roles[:place]:
            if key != other_key and is_same(source, other):
                names = other.name if source.name == other.name else f"{other.name} and {source.name}"
                what = f"split {source.split} of {source.hub}" if source.hub else str(source.path)
                instead = "another split or file" if source.hub else "another file"
                val = (
                    f", or leave {key} out and give val_size" if (other_key, key) == ("dataset", "eval_dataset") else ""
                )
                raise UserError(
                    f"{key} and {other_key} are the same rows ({names}: {what}), so the run would be measured on what "
                    f"it has seen: give {key} {instead}{val}"
                )


def is_same(a: Source, b: Source) -> bool:
    if a.path and b.path:
        if os.path.samefile(a.path, b.path):
            return True
        return os.path.getsize(a.path) == os.path.getsize(b.path) and sha256(a.path) == sha256(b.path)
    address = [(source.hub, source.subset, source.folder, source.split) for source in (a, b)]
    return a.hub is not None and address[0] == address[1]


def contents_hash(config: RunConfig) -> str:
    """sha256 over what all rows of the run come from: contents of files, addresses on the hub."""
    sources = [source.identity() for names, split in named(config).values() for source in resolve(names, config, split)]
    contents = [{key: value for key, value in source.items() if key != "name"} for source in sources]
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _resolve(name: str, entries: dict[str, Any], config: RunConfig, split: str) -> Source:
    if name in entries:
        return _from_entry(name, entries[name], config, split)
    if CONTROL.search(name):
        raise UserError(f"dataset: no such file: {shown(name)}")
    if "://" in name:
        raise UserError(
            f"dataset: {shorten(name, 200)} is an address: download the file, or name the hub id of the data"
        )
    places = [Path(name), Path(config.dataset_dir) / name]
    for path in places:
        if os.path.isfile(path):
            return Source(name, path=_known_file(path))
    hint = did_you_mean(name, filter(_is_text, entries), "the entry ", likeness=0.6)
    for path in places:
        if os.path.isdir(path):
            raise UserError(f"dataset {name!r} is a directory; name a {', '.join(FILES)} file in it{hint}")
        check_regular(path)
    if name.endswith(FILES) or not re.fullmatch(HUB_ID, name):
        looked = " or ".join(dict.fromkeys(map(str, places)))
        hint = "; patterns are not expanded: name the files, with commas" if re.search(r"[*?\[]", name) else hint
        raise UserError(f"dataset: no such file: {looked}{hint}")
    if hint and "/" not in name:
        raise UserError(f"dataset {name!r} is neither an entry of {config.dataset_dir} nor a file{hint}")
    return Source(name, hub=name, split=split)


def _is_text(value: Any) -> bool:
    """Half a surrogate pair, which JSON can spell, can be written into no file."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _entries(folder: Path) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for path in (folder / name for name in LISTS):
        check_regular(path)
        if os.path.isfile(path):
            listed = read_json(path) if path.suffix == ".json" else read_yaml(path)
            if not isinstance(listed, dict):
                raise UserError(f"{path} must map names to datasets, not be a {type(listed).__name__}")
            entries |= listed
    return entries


def _from_entry(name: str, entry: Any, config: RunConfig, split: str) -> Source:
    where = f"dataset {name!r} in {config.dataset_dir}"
    _check_entry(entry, where)
    limit = entry.get("num_samples")
    if hub := entry.get("hf_hub_url"):
        if not re.fullmatch(HUB_ID, hub):
            raise UserError(f"{where}: hf_hub_url: {shown(hub)} is no hub id, such as owner/name")
        if os.path.exists(hub):  # datasets would take it, whatever is in it
            raise UserError(f"{where}: hf_hub_url: {hub} is here too, as a file or folder; use file_name")
        address = {"subset": entry.get("subset"), "folder": entry.get("folder"), "split": entry.get("split") or split}
        return Source(name, hub=hub, **address, limit=limit, entry=entry)
    path = Path(config.dataset_dir) / entry["file_name"]
    check_regular(path)
    if not os.path.isfile(path):
        raise UserError(f"{where}: no such file: {path}")
    return Source(name, path=_known_file(path), limit=limit, entry=entry)


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: its entry must be a mapping with file_name or hf_hub_url")
    for key in TEXTS:
        if entry.get(key) is not None and (not _is_text(entry[key]) or CONTROL.search(entry[key])):
            raise UserError(f"{where}: {key}: {shown(entry[key])} should be text")
    if script := entry.get("script_url"):
        instead = SCRIPTS.get(script)
        hint = f"use dataset: {instead}" if instead else "use the hub id of the data that the script loads"
        raise UserError(f"{where} is a loading script ({shown(script)}), which datasets no longer runs; {hint}")
    for key, allowed in ((None, ENTRY), ("columns", COLUMNS), ("tags", TAGS)):
        part = entry if key is None else entry.get(key) or {}
        if not isinstance(part, dict):
            raise UserError(f"{where}: {key} must be a mapping")
        for word in part:
            if word not in allowed and not (key is None and word in ELSEWHERE):
                raise UserError(f"{where}: {shown(word)} is not supported; known: {', '.join(allowed)}")
            if key and part[word] is not None and not _is_text(part[word]):
                raise UserError(f"{where}: {key}: {word}: {shown(part[word])} should be text")
    if entry.get("formatting") not in (None, "alpaca", "sharegpt", "openai"):
        raise UserError(f"{where}: formatting: {shown(entry['formatting'])} should be alpaca, sharegpt or openai")
    limit = entry.get("num_samples")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UserError(f"{where}: num_samples: {shown(limit)} should be a whole number of rows")
    if not (entry.get("hf_hub_url") or entry.get("file_name")):
        raise UserError(f"{where}: its entry needs file_name or hf_hub_url")


def _known_file(path: Path) -> Path:
    if not _is_text(path.name):
        raise UserError(f"dataset: the name of the file {path} is not UTF-8")
    if not path.name.endswith(FILES):
        raise UserError(f"dataset {path}: unknown kind of file; known: {', '.join(FILES)}")
    return path


def _hub_rows(source: Source, config: RunConfig, limit: int) -> list[Row]:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # of which a log would keep every state
    is_listed = any(os.path.isfile(Path(config.dataset_dir) / name) for name in LISTS)
    listed = "" if is_listed or source.entry else f", no entry ({config.dataset_dir} has no {' or '.join(LISTS)})"
    with telling(  # the hub, its cache and its parsers raise whatever they like
        f"dataset {source.name!r} is no local file{listed}, and cannot be loaded from the hub or its cache "
        f"as {source.hub!r}, split {source.split!r}"
    ):
        dataset = datasets.load_dataset(
            source.hub, source.subset, data_dir=source.folder, split=source.split, cache_dir=config.cache_dir
        )
        if limit < len(dataset):
            dataset = dataset.select(range(limit))
        try:
            rows = dataset.to_list()
        except Exception:  # of a value that Python cannot hold: look column by column
            columns = [_hub_cells(dataset, name) for name in dataset.column_names]
            rows = [dict(zip(dataset.column_names, values, strict=True)) for values in zip(*columns, strict=True)]
        return [(f"{source.hub}:{index}", row) for index, row in enumerate(rows)]


def _hub_cells(dataset: Any, name: str) -> list[Any]:
    column = dataset.select_columns(name)
    try:
        return [row[name] for row in column.to_list()]
    except Exception:
        return cells(column.with_format("arrow")[:][name])
