"""Numbers of studies that have run, as they are committed: of each a folder with metrics.csv and config.yaml.

No run directory is read, no weights, and nothing that needs torch: everything in `hypotheses` and `paper` comes from
these two files.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from discobeta.design.arms import BY_NAME, CORNERS, Arm
from discobeta.design.config import FIELDS, default_of, value_of
from discobeta.design.stages import STAGES
from discobeta.design.study_file import StudyKeys
from discobeta.design.variants import TUNED, text_of
from discobeta.design.yaml_text import read_yaml
from discobeta.errors import UserError, shown, telling
from discobeta.files import check_regular
from discobeta.report.measures import POSTHOC
from discobeta.report.render import capitalised

CHOSEN_BY, SWEPT = "calibration/nll", "pref_beta"
COORDINATES = ["stage", "arm", "variant", "seed", "metric"]
POSTHOC_METRIC = re.compile(r"posthoc/([^/]+)/(.+)")


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
    It has what `effects.effects_frame` asks a study for.
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

    @property
    def seeds(self) -> list[int]:
        """Those of the config, whether their numbers are there or not."""
        return list(self.settings.get("seeds") or sorted(set(self.frame["seed"])))

    @property
    def stages(self) -> list[str]:
        """Those with any number."""
        there = {cell[0] for cell in self.by_cell}
        return [stage for stage in STAGES if stage in there]

    def arms_of(self, stage: str) -> list[Arm]:
        """The arms of the grid with any number."""
        return [Arm.from_name(source.arm) for source in self.sources(stage) if not source.variant]

    def sources(self, stage: str) -> list[Source]:
        """Arms and variants with any number, in the order of the file."""
        return list(dict.fromkeys(Source(arm, variant) for of, arm, variant, _ in self.by_cell if of == stage))

    def metrics(self, stage: str) -> set[str]:
        return {metric for of, _, _, metric in self.by_cell if of == stage}

    def metrics_of(self, stage: str, source: Source) -> set[str]:
        return {cell[3] for cell in self.by_cell if cell[:3] == (stage, source.arm, source.variant)}

    @property
    def made_by_line(self) -> str:
        n = len(self.seeds)
        of = f"Study {self.name}, {n} seed{'s' * (n != 1)}"
        return f"{of}, config {self.made_by['config']}, commit {self.made_by['commit']}."

    def setting(self, stage: str, key: str, control: str = "") -> Any:
        """What the grid's own runs have of a run key, or those of a control."""
        common, section = (self.settings.get(name) or {} for name in ("common", stage))
        of_control = (self.settings.get("controls") or {}).get(control) or {}
        given = common | section | (of_control.get("settings") or {})
        return given[key] if key in given else default_of(key, stage)


def label_of(source: Source, study: Published | None = None) -> str:
    """E.g. `Disco, probit`; a control's own label, where its study gives one."""
    return ", ".join(filter(None, [capitalised(BY_NAME[source.arm].label), variant_label(source, study)]))


def variant_label(source: Source, study: Published | None = None) -> str:
    """What a table calls the control, or the β that was tuned; nothing of an arm as it is in the grid."""
    variant, _, last = source.variant.rpartition(",")
    if last == TUNED:
        return ", ".join(filter(None, [variant_label(Source(source.arm, variant), study), "β tuned"]))
    control = ((study.settings.get("controls") or {}).get(source.variant) or {}) if study else {}
    return control.get("label") or source.variant


@dataclass(frozen=True)
class Printed:
    """A row of a table: runs, and (posthoc) under which fit their numbers are read."""

    source: Source
    posthoc: str = ""

    def metric(self, name: str) -> str:
        return f"posthoc/{self.posthoc}/{name}" if self.posthoc else name

    @property
    def fit(self) -> str:
        """What a table calls the fit; nothing of the runs as they are."""
        return self.posthoc and POSTHOC.get(self.posthoc, f"post-hoc {self.posthoc}")

    def label(self, study: Published) -> str:
        return ", ".join(filter(None, [label_of(self.source, study), self.fit]))


def printed_rows(study: Published, stage: str) -> list[Printed]:
    """The arms that use their heads, their controls, and what was fitted afterwards, by arm; no swept points."""
    sources = [source for source in study.sources(stage) if "=" not in source.variant]
    sources = [source for source in sources if not BY_NAME[source.arm].is_idle]
    order = {arm.name: place for place, arm in enumerate(CORNERS)}
    sources.sort(key=lambda source: (order[source.arm], source.variant))
    rows = []
    for source in sources:
        rows.append(Printed(source))
        found = {match[1] for name in study.metrics_of(stage, source) if (match := POSTHOC_METRIC.fullmatch(name))}
        rows += [Printed(source, fit) for fit in sorted(found, key=lambda fit: [*POSTHOC, *sorted(found)].index(fit))]
    return rows


def studies(folder: Path) -> list[str]:
    """Names of the studies under `folder`: the folders with a metrics.csv, nested ones with slashes."""
    check_is_above(folder)
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


def check_is_above(folder: Path) -> None:
    """Refuse a folder that is none of studies."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; it should hold one with metrics.csv and config.yaml of each study")
    if (folder / "metrics.csv").exists():
        raise UserError(f"{folder} is a study itself: name the folder above it, {folder.resolve().parent}")


def missing(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the studies whose numbers are not there."""
    return [name for name in names if not (folder / name / "metrics.csv").is_file()]


@functools.lru_cache(maxsize=64)
def _read_one(folder: Path, name: str) -> Published:
    frame = read_metrics(folder / name / "metrics.csv")
    config = folder / name / "config.yaml"
    settings = {"seeds": StudyKeys.model_fields["seeds"].default} | read_yaml(config)
    _check_settings(config, settings)
    if strange := sorted(set(frame["seed"]) - set(settings["seeds"])):
        raise UserError(f"{folder / name / 'metrics.csv'} holds seed {strange[0]}, which {config} does not name")
    digest = hashlib.sha256(config.read_bytes()).hexdigest()[:12]
    study = Published(name, frame, settings, {"study": name, "config": digest, "commit": _commit(folder / name)})
    tuned = pd.DataFrame(tuned_rows(study), columns=[*COORDINATES, "value"])
    return replace(study, frame=pd.concat([frame, tuned], ignore_index=True)) if len(tuned) else study


def _check_settings(config: Path, settings: dict[str, Any]) -> None:
    """What is read of a study's config has the form that it should have."""
    seeds = settings["seeds"]
    if not (isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)):
        raise UserError(f"{config}: seeds: {shown(seeds)} should be a list of whole numbers")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{config}: seeds: {shown(seeds)} names a seed twice")

    def mapping(value: Any, *place: str) -> dict[str, Any]:
        if not isinstance(value or {}, dict):
            raise UserError(f"{config}: {': '.join(place)} should hold `key: value` lines, not {shown(value)}")
        return value or {}

    for key in ("common", *STAGES):
        mapping(settings.get(key), key)
    for name, control in mapping(settings.get("controls"), "controls").items():
        mapping(mapping(control, "controls", name).get("settings"), "controls", name, "settings")
        if control and not isinstance(control.get("label", ""), str):
            raise UserError(f"{config}: controls: {name}: label: {shown(control['label'])} should be text")
    for stage, sweep in mapping(settings.get("sweep"), "sweep").items():
        for key, values in mapping(sweep, "sweep", stage).items():
            if not isinstance(values or [], list):
                raise UserError(f"{config}: sweep: {stage}: {key}: {shown(values)} should be a list of values")


def tuned_rows(study: Published) -> list[tuple[str, str, str, int, str, float]]:
    """Of every arm and control that was swept, a variant `tuned-beta`: of each seed the numbers of `chosen`'s run.

    `tuned/pref_beta` is what was chosen.
    """
    rows = []
    for stage in study.stages:
        for source, points in swept(study, stage).items():
            for seed, run in chosen(study, stage, points).items():
                place = (stage, source.arm, ",".join(filter(None, [source.variant, TUNED])), seed)
                rows += [
                    (*place, metric, study.values(stage, run, metric)[seed])
                    for metric in sorted(study.metrics_of(stage, run))
                    if seed in study.values(stage, run, metric) and not metric.startswith("posthoc/")
                ]
                rows.append((*place, f"tuned/{SWEPT}", points[run]))
    return rows


def along(
    study: Published, stage: str, runs: Iterable[Source] | None = None, key: str = SWEPT
) -> dict[Source, dict[Source, float]]:
    """Arm or control -> those of its runs (of all, by default) that differ in `key` alone -> its value in them.

    A swept setting that is the section's own is none: with a learning rate of 5e-05, `learning_rate=5e-05` is "".
    """
    found: dict[Source, dict[Source, float]] = {}
    for run in study.sources(stage) if runs is None else runs:
        variant, setting = split_variant(run.variant, key)
        control = control_of(variant)
        rest = [part for part in variant.split(",") if not _is_own(study, stage, part, control)]
        setting = study.setting(stage, key, control) if setting is None else setting
        if setting is None:
            continue
        try:
            value = float(setting)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            where = f"{study.name}: {stage}, {run.text}"
            raise UserError(f"{where}: a sweep over {key} should be over numbers, not {shown(setting)}")
        found.setdefault(Source(run.arm, ",".join(filter(None, rest))), {})[run] = value
    return found


def swept(
    study: Published, stage: str, runs: Iterable[Source] | None = None, key: str = SWEPT
) -> dict[Source, dict[Source, float]]:
    """`along`, of what has been run at more than one value of `key`."""
    return {source: points for source, points in along(study, stage, runs, key).items() if len(points) > 1}


def control_of(variant: str) -> str:
    """The control that a variant is a point of; "" where it is a point of the arm's own sweep."""
    return next((part for part in variant.split(",") if part and "=" not in part), "")


def _is_own(study: Published, stage: str, part: str, control: str) -> bool:
    key, equals, value = part.partition("=")
    if not equals or key not in FIELDS:
        return False
    own = study.setting(stage, key, control)
    try:
        return text_of(value_of(key, own)) == value
    except ValueError:
        return str(own) == value


def chosen(study: Published, stage: str, points: dict[Source, float]) -> dict[int, Source]:
    """Seed -> the run whose coefficient is the tuned one: the lowest NLL on the calibration pairs.

    No held-out number has to do with these. A seed that lacks any point has none, since the least of fewer is another
    choice; of equal ones the first counts, which is the section's own.
    """
    nll = {run: study.values(stage, run, CHOSEN_BY) for run in points}
    seeds = sorted(set.intersection(*map(set, nll.values()))) if nll else []
    return {seed: min(points, key=lambda run, seed=seed: nll[run][seed]) for seed in seeds}


def split_variant(variant: str, key: str) -> tuple[str, str | None]:
    """The variant without its swept setting of `key`, and that setting; None if there is none.

    `probit,pref_beta=0.35` is ("probit", "0.35"), and `probit` is ("probit", None): the section's own point.
    """
    parts = variant.split(",") if variant else []
    rest = [part for part in parts if not part.startswith(f"{key}=")]
    values = [part.partition("=")[2] for part in parts if part.startswith(f"{key}=")]
    return ",".join(rest), values[0] if values else None


def read_metrics(path: Path) -> pd.DataFrame:
    """`collect`'s frame of a file. One from before runs had variants has none of them."""
    check_regular(path)
    with telling(f"cannot read {path}"):
        frame = pd.read_csv(path, keep_default_na=False, na_values={"value": [""]}, dtype={"seed": "int64"})
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        if stream.read() != b"\n":
            raise UserError(f"{path} ends within a line: it is not whole")
    frame = frame if "variant" in frame else frame.assign(variant="")
    for name in (*COORDINATES, "value"):
        if name not in frame:
            raise UserError(f"{path} has no column {name!r}: is it a metrics.csv that `discobeta tables` has written?")
    there = frame["value"].notna()
    values = pd.to_numeric(frame["value"], errors="coerce").astype(float)
    if len(bad := frame[there & ~np.isfinite(values)]):
        line, value = bad.index[0] + 2, shown(bad["value"].tolist()[0])
        raise UserError(f"{path} line {line}: value: {value} should be a finite number")
    frame = frame.assign(value=values)[[*COORDINATES, "value"]][there]
    for name, known in (("stage", STAGES), ("arm", BY_NAME)):
        if len(unknown := frame[~frame[name].isin(list(known))]):
            raise UserError(f"{path} line {unknown.index[0] + 2}: no {name} is called {shown(unknown[name].iloc[0])}")
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
