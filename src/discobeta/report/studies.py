"""Two studies, cell by cell and seed by seed: what another base, world or commit has changed.

Of each is read what its tables hold, metrics.csv and config.yaml, and no run: a study's folder or one of
results/published. Equal cells (stage, arm, variant) of equal seeds are paired, and of each metric stands the
difference B − A per seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from discobeta.design.stages import STAGES
from discobeta.errors import UserError, shorten
from discobeta.report import published
from discobeta.report.collect import UNKNOWN
from discobeta.report.effects import JUDGED_BY_THE_ARM, p_value
from discobeta.report.measures import LANDMARKS, MEASURES, TESTED, Metric, one_line
from discobeta.report.published import Published, Source, label_of
from discobeta.report.render import NOTHING, Column, Panel, Row, Table, number
from discobeta.report.results import enumerate_seeds
from discobeta.report.statistics import BOOTSTRAP_FROM, beyond_rounding, holm, mean_ci, sign_flip_p

COLUMNS = ["stage", "arm", "variant", "metric", "n_seeds", "seeds", "mean_a", "mean_b", "difference", "ci95", "p",
           "p_holm", "differences"]  # fmt: skip
SHOWN = 12
"""Settings that differ which are printed; `--json` has all."""


@dataclass
class Pairing:
    """frame: a row for each paired cell and metric. settings: key -> values of A and B. unpaired: what has no
    counterpart, in words."""

    a: Published
    b: Published
    places: tuple[Path, Path]
    frame: pd.DataFrame
    settings: dict[str, tuple[Any, Any]]
    unpaired: list[str]
    notes: list[str]

    def table(self) -> Table:
        is_tested = sorted(set(self.frame.metric[self.frame.p.notna()]))
        few = bool((self.frame.n_seeds < BOOTSTRAP_FROM).any())
        columns = [
            Column("Stage", lambda row: row["stage"], is_number=False),
            Column("Cell", self._cell, is_number=False),
            Column("Metric", lambda row: one_line(_metric(row).header), is_number=False),
            Column("Seeds", lambda row: str(row["n_seeds"])),
            Column("A", lambda row: number(row["mean_a"], _metric(row).decimals)),
            Column("B", lambda row: number(row["mean_b"], _metric(row).decimals)),
            Column("B − A", _estimate),
            Column("p", lambda row: p_value(row["p"])),
            Column("p (Holm)", lambda row: p_value(row["p_holm"])),
        ]
        least = p_value(2.0 ** (1 - self.frame.n_seeds.max()))
        notes = [
            f"A: {self.places[0]}, {_made_by(self.a)}",
            f"B: {self.places[1]}, {_made_by(self.b)}",
            "Means and differences are over the seeds that both have; ± is the half-width of Student's 95 % interval "
            "of the mean difference"
            + (f", and below {BOOTSTRAP_FROM} seeds the difference of each seed stands in its place." if few else "."),
            f"p: two-sided sign-flip test of the differences per seed, which can be {least} at the least; of "
            f"{', '.join(is_tested) or 'nothing'}. Holm's correction is over the tests of a stage.",
            *self.notes,
        ]
        shown = [f"{key} ({_value(a)} | {_value(b)})" for key, (a, b) in [*self.settings.items()][:SHOWN]]
        more = f" and {len(self.settings) - SHOWN} more" if len(self.settings) > SHOWN else ""
        if self.a.settings and self.b.settings:
            notes.append(f"Settings that differ (A | B): {'; '.join(shown)}{more}." if shown else "No settings differ.")
        notes += [f"Not paired: {text}." for text in self.unpaired]
        made_by = {
            f"{key}_{name}": of.made_by[key] for name, of in (("a", self.a), ("b", self.b)) for key in of.made_by
        }
        frame = self.frame.assign(differences=[" ".join(map(repr, values)) for values in self.frame.differences])
        caption = f"{self.b.name} (B) against {self.a.name} (A): equal cells, paired over seeds."
        return Table(frame, [Panel(caption, columns)], notes, made_by, ["stage", "arm", "variant"], self.frame)

    def _cell(self, row: Row) -> str:
        return label_of(Source(row["arm"], row["variant"]), self.a)

    def json(self) -> str:
        rows = [
            {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
            for row in self.frame.to_dict("records")
        ]
        sides = {
            name: of.made_by | {"folder": str(place)}
            for name, of, place in zip("ab", (self.a, self.b), self.places, strict=True)
        }
        said = {"settings": self.settings, "unpaired": self.unpaired, "notes": self.notes}
        return json.dumps(sides | {"rows": rows} | said, indent=1, ensure_ascii=False, default=str)


def read(folder: Path) -> tuple[Published, Path]:
    """A study by its folder, and the folder of its numbers: that one, or tables/ in it."""
    places = [folder, folder / "tables"]
    place = next((place for place in places if (place / "metrics.csv").is_file()), None)
    if place is None:
        raise UserError(
            f"{folder} has no metrics.csv, nor has its tables/: name a study whose tables are written "
            "(discobeta tables --configfile …) or a folder of published numbers"
        )
    if not (place / "config.yaml").exists():  # of a study that was published before configs were
        unknown = {"study": folder.name, "config": UNKNOWN, "commit": UNKNOWN}
        return Published(folder.name, published.read_metrics(place / "metrics.csv"), {}, unknown), place
    study = published.read(place.parent, place.name)
    name = study.settings.get("study")
    name = name if isinstance(name, str) else folder.name
    return replace(study, name=name, made_by=study.made_by | {"study": name}), place


def pair(folders: tuple[Path, Path], metrics: Iterable[str] = ()) -> Pairing:
    """The two studies, paired. metrics: which ones, all of them tested; else those by which a stage's arms are
    compared, of which NLL and true reward are tested, as in the table of effects.

    Raises UserError where the two have nothing in common.
    """
    (a, place_a), (b, place_b) = map(read, folders)
    metrics, rows = tuple(metrics), []
    for name in metrics:
        if not any(name in study.metrics(stage) for study in (a, b) for stage in study.stages):
            raise UserError(f"--metrics {name}: neither study has measured it")
    for stage in [stage for stage in a.stages if stage in b.stages]:
        for source in [source for source in a.sources(stage) if source in b.sources(stage)]:
            rows += list(_rows(a, b, stage, source, metrics))
    if not rows:
        raise UserError(
            f"{place_a} and {place_b} have no stage, arm, variant, metric and seed in common: {_holds(a)}; {_holds(b)}"
        )
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame["p_holm"] = frame.groupby("stage").p.transform(lambda p: holm(p.tolist()))
    named = [{key: value for key, value in study.settings.items() if key != "study"} for study in (a, b)]
    settings = dict(_differing(*named)) if all(named) else {}
    notes = list(_notes(a, b, frame))
    return Pairing(a, b, (place_a, place_b), frame, settings, list(_unpaired(a, b)), notes)


def _rows(a: Published, b: Published, stage: str, source: Source, metrics: tuple[str, ...]) -> Iterator[dict]:
    for metric in metrics or [name for name in STAGES[stage].compared if name not in JUDGED_BY_THE_ARM]:
        ours, theirs = a.values(stage, source, metric), b.values(stage, source, metric)
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            continue
        differences = [beyond_rounding(theirs[seed] - ours[seed], ours[seed]) for seed in seeds]
        mean, half_width = mean_ci(differences)
        yield {
            "stage": stage, "arm": source.arm, "variant": source.variant, "metric": metric,
            "n_seeds": len(seeds), "seeds": " ".join(map(str, seeds)),
            "mean_a": mean_ci([ours[seed] for seed in seeds])[0],
            "mean_b": mean_ci([theirs[seed] for seed in seeds])[0],
            "difference": mean, "ci95": half_width,
            "p": sign_flip_p(differences) if metrics or metric in TESTED else math.nan,
            "differences": differences,
        }  # fmt: skip


def _unpaired(a: Published, b: Published) -> Iterator[str]:
    for name, ours, theirs in (("A", a, b), ("B", b, a)):
        if stages := [stage for stage in ours.stages if stage not in theirs.stages]:
            yield f"only {name} has {', '.join(stages)}"
        for stage in [stage for stage in ours.stages if stage in theirs.stages]:
            if cells := [source for source in ours.sources(stage) if source not in theirs.sources(stage)]:
                yield f"in {stage} only {name} has {'; '.join(source.text for source in cells)}"
            seeds: dict[tuple[int, ...], list[str]] = {}
            for source in [source for source in ours.sources(stage) if source in theirs.sources(stage)]:
                of_both = [_seeds(study, stage, source) for study in (ours, theirs)]
                if missing := tuple(sorted(of_both[0] - of_both[1])):
                    seeds.setdefault(missing, []).append(source.text)
            for missing, cells in seeds.items():
                of = "all cells" if len(cells) == len(ours.sources(stage)) else "; ".join(cells)
                yield f"in {stage} only {name} has {enumerate_seeds(list(missing))} of {of}"


def _seeds(study: Published, stage: str, source: Source) -> set[int]:
    return {seed for metric in study.metrics_of(stage, source) for seed in study.values(stage, source, metric)}


def _notes(a: Published, b: Published, frame: pd.DataFrame) -> Iterator[str]:
    """What tells that a pair of runs had other rows: what is the same in all arms is not the same in both studies."""
    for place, study in zip("AB", (a, b), strict=True):
        if not study.settings:
            yield f"{place} has no config.yaml, so settings are not compared."
    other = []
    for name, title in LANDMARKS.items():
        for row in frame.drop_duplicates("stage").itertuples():
            source = Source(row.arm, row.variant)
            ours, theirs = (study.values(row.stage, source, name) for study in (a, b))
            seeds = ours.keys() & theirs.keys()
            if any(not math.isclose(ours[seed], theirs[seed], rel_tol=1e-9) for seed in seeds):
                other.append(title)
                break
    if other:
        yield (
            "A seed has not the same held-out rows, truth or reference in both: "
            f"{', '.join(other)} {'differs' if len(other) == 1 else 'differ'}. What a pair shares is then its seed and "
            "its settings; differences include what other rows make."
        )


# --- settings


def _differing(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(key, values of both) where they differ; a section that only one of them has is one value."""
    for key in [*a, *(key for key in b if key not in a)]:
        values = a.get(key), b.get(key)
        if all(isinstance(value, dict) for value in values):
            yield from _differing(*values, f"{prefix}{key}: ")
        elif values[0] != values[1]:
            yield f"{prefix}{key}", values


# --- as text


def _metric(row: Row) -> Metric:
    """How it is printed; one that no table shows, under its own name."""
    return MEASURES.get(row["metric"]) or Metric(row["metric"], row["metric"], 4)


def _estimate(row: Row) -> str:
    decimals = _metric(row).decimals
    text = number(row["difference"], decimals)
    if row["n_seeds"] >= BOOTSTRAP_FROM:
        return f"{text} ± {number(row['ci95'], decimals)}"
    return f"{text} ({', '.join(number(value, decimals) for value in row['differences'])})"


def _value(value: Any) -> str:
    if value is None:
        return NOTHING
    return shorten(str(value).lower() if isinstance(value, bool) else str(value), 60)


def _made_by(study: Published) -> str:
    made_by = study.made_by
    return f"study {study.name}, {len(study.seeds)} seeds, config {made_by['config']}, commit {made_by['commit']}."


def _holds(study: Published) -> str:
    cells = ", ".join(f"{stage} ({len(study.sources(stage))} cells)" for stage in study.stages) or "nothing"
    return f"{study.name} holds {cells}, {enumerate_seeds(study.seeds)}"
