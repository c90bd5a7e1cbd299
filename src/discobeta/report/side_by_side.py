"""Two runs, or more, side by side: which settings differ, what they were made from, what was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from discobeta import files
from discobeta.design.config import FIELDS
from discobeta.design.yaml_text import read_yaml
from discobeta.errors import UserError, shorten
from discobeta.folders import MADE
from discobeta.report.compare import EQUAL, OUTCOMES, compare, files_of
from discobeta.report.measures import LANDMARKS, METRICS
from discobeta.report.render import NOTHING, number, printable
from discobeta.report.results import numbers

LEFT_OUT = {*MADE, *(name for name, key in FIELDS.items() if key.metadata["of"] == "bookkeeping")}
"""Settings that say where something stands, and nothing of what a run is."""

MADE_FROM = ("base", "tokenizer", "data", "held_out", "calibration", "sources", "reward_model", "beta_head", "code",
             "commit")  # fmt: skip
"""What of provenance.json says what a run was made from. Of hashes eight digits are shown."""

ABSENT = "-"
WIDEST = 44


@dataclass
class SideBySide:
    """Run directories, and of each difference a value for each of them; None where a run has none."""

    runs: list[Path]
    files: dict[str, str] = field(default_factory=dict)  # of two runs: file -> verdict, `compare`
    settings: dict[str, list[Any]] = field(default_factory=dict)
    made_from: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)  # all, nested ones with slashes
    not_there: list[str] = field(default_factory=list)  # files without which there is nothing to say

    @property
    def status(self) -> int:
        """1 where a file of two runs is another one, or only one of them has it."""
        return int(any(verdict != EQUAL for verdict in self.files.values()))

    def json(self) -> str:
        return json.dumps(vars(self) | {"runs": list(map(str, self.runs))}, indent=1, ensure_ascii=False)

    def text(self) -> str:
        names = [chr(ord("A") + place) if len(self.runs) <= 26 else str(place + 1) for place in range(len(self.runs))]
        lines = [f"{name}: {verdict}" for name, verdict in self.files.items()]
        lines += ["", *(f"{name}  {run}" for name, run in zip(names, self.runs, strict=True))]
        lines += [f"not there: {name}" for name in self.not_there]
        for title, rows in (("settings that differ", self.settings), ("made from", self.made_from)):
            shown = [[name, *map(_short, values)] for name, values in rows.items()]
            lines += ["", *_aligned([title, *names], shown)] if shown else ["", f"{title}: no differences"]
        rows = [self._measured(name) for name in (*METRICS, *LANDMARKS) if name in self.metrics]
        header = ["metrics", *names, *(["B − A"] if len(self.runs) == 2 else [])]
        lines += ["", *_aligned(header, rows)] if rows else ["", "metrics: none"]
        held_out = self.made_from.get("held_out")
        if rows and held_out and len(set(filter(None, held_out))) > 1:
            lines.append("The held-out rows are not the same, so neither is what was measured.")
        return "\n".join(lines) + "\n"

    def _measured(self, name: str) -> list[str]:
        metric, values = METRICS.get(name), self.metrics[name]
        decimals = metric.decimals if metric else 4
        row = [" ".join(filter(None, [name, metric.better if metric else ""]))]
        row += [NOTHING if value is None else number(value, decimals) for value in values]
        if len(values) == 2:
            row.append(NOTHING if None in values else number(values[1] - values[0], decimals))
        return row


def side_by_side(directories: list[Path]) -> SideBySide:
    """What is to be said of run directories, finished or not. Raises UserError for one that holds no run."""
    for directory in directories:
        if not any(files_of(outcome, directory) for outcome in OUTCOMES):
            raise UserError(f"{directory} holds no run (no adapter/, model/, log.jsonl, metrics.json)")
    found = SideBySide(directories)
    if len(directories) == 2:
        found.files = compare(*directories)
    settings = [_read(read_yaml, directory / "config.yaml", found) for directory in directories]
    facts = [_read(files.read_mapping, directory / "provenance.json", found) for directory in directories]
    measured = [
        dict(numbers(_read(files.read_mapping, directory / "metrics.json", found))) for directory in directories
    ]
    there = [run for run in settings if run]
    keys = [*(key for key in FIELDS if any(key in run for run in there)), *(key for run in there for key in run)]
    found.settings = _differing(dict.fromkeys(key for key in keys if key not in LEFT_OUT), settings)
    found.made_from = _differing(MADE_FROM, facts)
    names = dict.fromkeys(name for run in measured for name in run)
    found.metrics = {name: [run.get(name) for run in measured] for name in names}
    return found


def _read(read, path: Path, found: SideBySide) -> dict[str, Any]:
    if not path.is_file():
        found.not_there.append(str(path))
        return {}
    return read(path)


def _differing(keys, records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Key -> value in each record, of keys in which those records differ that are there at all."""
    there = [record for record in records if record]
    differing = [key for key in keys if any(record.get(key) != there[0].get(key) for record in there)]
    return {key: [record.get(key) for record in records] for key in differing}


def _short(value: Any) -> str:
    if value is None:
        return ABSENT
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if len(text) in (40, 64) and set(text) <= set("0123456789abcdef"):
        return text[:8]
    return shorten(printable(text), WIDEST)


def _aligned(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table in plain text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in (header, *rows)
    ]
