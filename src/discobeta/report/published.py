"""Numbers of studies that have run, as they are committed: of each a folder with metrics.csv and config.yaml.

No run directory is read, no weights, and nothing that needs torch: everything in `hypotheses` and `paper` comes from
these two files.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from discobeta.design.config import default_of
from discobeta.design.stages import STAGES
from discobeta.design.yaml_text import read_yaml
from discobeta.errors import UserError, shown, telling
from discobeta.files import check_regular

COORDINATES = ["stage", "arm", "variant", "seed", "metric"]


@dataclass(frozen=True)
class Source:
    """Arm and variant of runs, "" being the grid's own; as a row of a table, e.g. `baseline, probit`."""

    arm: str
    variant: str = ""

    @property
    def text(self) -> str:
        return f"{self.arm}, {self.variant}" if self.variant else self.arm


@dataclass
class Published:
    """The numbers of one study, or of several parts of one.

    frame: long, `COORDINATES` and value. settings: the merged config. made_by: study, config digest and commit.
    """

    name: str
    frame: pd.DataFrame
    settings: dict[str, Any]
    made_by: dict[str, str]

    @functools.cached_property
    def by_cell(self) -> dict[tuple[str, str, str, str], dict[int, float]]:
        """(stage, arm, variant, metric) -> seed -> value."""
        found: dict[tuple[str, str, str, str], dict[int, float]] = {}
        columns = (self.frame[name].tolist() for name in (*COORDINATES, "value"))
        for stage, arm, variant, seed, metric, value in zip(*columns, strict=True):
            found.setdefault((stage, arm, variant, metric), {})[seed] = value
        return found

    def values(self, stage: str, source: Source, metric: str) -> dict[int, float]:
        """Seed -> value, of the seeds that have one."""
        return self.by_cell.get((stage, source.arm, source.variant, metric), {})

    def seeds(self, stage: str) -> list[int]:
        """Those that any run of the stage is there of."""
        return sorted({seed for (of, *_), cell in self.by_cell.items() if of == stage for seed in cell})

    def stages(self) -> list[str]:
        there = {cell[0] for cell in self.by_cell}
        return [stage for stage in STAGES if stage in there]

    def sources(self, stage: str) -> list[Source]:
        """Arms and variants with any number, in the order of the file."""
        return list(dict.fromkeys(Source(arm, variant) for of, arm, variant, _ in self.by_cell if of == stage))

    def metrics(self, stage: str) -> set[str]:
        return {metric for of, _, _, metric in self.by_cell if of == stage}

    def setting(self, stage: str, key: str, control: str = "") -> Any:
        """What the grid's own runs have of a run key, or those of a control."""
        common, section = (self.settings.get(name) or {} for name in ("common", stage))
        of_control = (self.settings.get("controls") or {}).get(control) or {}
        given = common | section | (of_control.get("settings") or {})
        return given[key] if key in given else default_of(key, stage)


def studies(folder: Path) -> list[str]:
    """Names of the studies under `folder`: the folders with a metrics.csv, nested ones with slashes."""
    return sorted(path.parent.relative_to(folder).as_posix() for path in folder.rglob("metrics.csv"))


def read(folder: Path, names: str | Iterable[str]) -> Published:
    """A study, or the parts of one put together, which must not measure one run twice."""
    names = [names] if isinstance(names, str) else list(names)
    parts = [_read_one(folder, name) for name in names]
    if len(parts) == 1:
        return parts[0]
    frame = pd.concat([part.frame for part in parts], ignore_index=True)
    if twice := frame[frame.duplicated(COORDINATES)].to_dict("records"):
        first = twice[0]
        where = ", ".join(str(first[name]) for name in COORDINATES if first[name] != "")
        raise UserError(f"{folder}: {' and '.join(names)} both hold {where}: parts of a study have runs of their own")
    made_by = {key: " ".join(dict.fromkeys(part.made_by[key] for part in parts)) for key in parts[0].made_by}
    seeds = sorted({seed for part in parts for seed in part.settings.get("seeds", [])})
    return Published(" + ".join(names), frame, parts[0].settings | {"seeds": seeds}, made_by)


def missing(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the studies whose numbers are not there."""
    return [name for name in names if not (folder / name / "metrics.csv").is_file()]


@functools.lru_cache(maxsize=64)
def _read_one(folder: Path, name: str) -> Published:
    frame = read_metrics(folder / name / "metrics.csv")
    config = folder / name / "config.yaml"
    settings = read_yaml(config)
    digest = hashlib.sha256(config.read_bytes()).hexdigest()[:12]
    return Published(name, frame, settings, {"study": name, "config": digest, "commit": _commit(folder / name)})


def read_metrics(path: Path) -> pd.DataFrame:
    """`collect`'s frame of a file. One from before runs had variants has none of them."""
    check_regular(path)
    with telling(f"cannot read {path}"):
        frame = pd.read_csv(path, keep_default_na=False, na_values={"value": [""]}, dtype={"seed": "int64"})
    frame = frame if "variant" in frame else frame.assign(variant="")
    for name in (*COORDINATES, "value"):
        if name not in frame:
            raise UserError(f"{path} has no column {name!r}: it should be the metrics.csv that `discobeta tables` writes")
    if not pd.api.types.is_numeric_dtype(frame["value"]):
        raise UserError(f"{path}: value should be numbers")
    frame = frame[[*COORDINATES, "value"]].dropna(subset="value")
    if len(unknown := frame[~frame["stage"].isin(list(STAGES))]):
        raise UserError(f"{path}: no stage is called {shown(unknown['stage'].iloc[0])}")
    if frame.duplicated(COORDINATES).any():
        raise UserError(f"{path} holds a number twice: {frame[frame.duplicated(COORDINATES)].iloc[0].to_dict()}")
    return frame


def _commit(folder: Path) -> str:
    """The commit that the study's tables beside say, if any of them is there."""
    for path in sorted(folder.glob("*.csv")):
        if path.name != "metrics.csv":
            with telling(f"cannot read {path}"):
                table = pd.read_csv(path, dtype=str, keep_default_na=False)
            if len(table) and "commit" in table:
                return " ".join(sorted(set(table["commit"])))
    return "unknown"
