"""What a paper prints, from the committed numbers of published studies: tables, figures, and a macro per number.

`write` reads metrics.csv and config.yaml of every study below a folder and the registered hypotheses, trains nothing,
and writes the same bytes from the same numbers. A study that a hypothesis asks for and that is not there is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from discobeta.design.arms import BY_NAME, CORNERS
from discobeta.design.stages import STAGES
from discobeta.design.variants import AS_IN_THE_GRID
from discobeta.errors import UserError
from discobeta.files import remove, write_text
from discobeta.folders import claim, mark_of, write_mark
from discobeta.report import across, effects, frontier, hypotheses, published
from discobeta.report.cells import estimates, frames, metric_column, panels_of
from discobeta.report.effects import p_value, with_seeds
from discobeta.report.estimates import estimate, interval_header, interval_words
from discobeta.report.frontier import REWARD, frontiers, has_frontier, kl_of
from discobeta.report.hypotheses import Registered, Verdict
from discobeta.report.measures import FURTHER, MEASURES, one_line
from discobeta.report.published import Published, Source, label_of, printed_rows, variant_label
from discobeta.report.render import Column, Panel, Row, Table, capitalised, escape, number, seeds_column
from discobeta.report.statistics import INTERVAL_FROM, mean_ci, sign_flip_p

MADE_BY = "discobeta paper"


@dataclass
class Paper:
    """All that is printed. tables, figures: name of the file -> what is in it. absent: study -> who asks for it."""

    studies: list[Published]
    tables: dict[str, Table]
    figures: dict[str, Any]
    macros: dict[str, str]
    absent: dict[str, list[str]]


def make(folder: Path, registered: Registered, digest: str) -> Paper:
    """Raises UserError where what is there cannot be read."""
    names = published.studies(folder)
    studies = [published.read(folder, name) for name in names]
    verdicts = hypotheses.judge(registered, hypotheses.from_folder(folder))
    absent: dict[str, list[str]] = {}
    for hypothesis in registered.hypotheses:
        for name in published.missing(folder, hypothesis.studies):
            absent.setdefault(name, []).append(hypothesis.id)
    tables = {"hypotheses": hypotheses.verdicts_table(registered, verdicts, {"hypotheses": digest})}
    for study in studies:
        for stage in study.stages:
            tables[f"{_file(study)}-{stage}"] = numbers_table(study, stage)
            if published.swept(study, stage):
                tables[f"{_file(study)}-{stage}-sweep"] = sweep_table(study, stage)
            if has_frontier(study, stage):
                tables[f"{_file(study)}-{stage}-matched"] = matched_table(study, stage)
        effects_there = effects_table(study)
        if len(effects_there.frame):
            tables[f"{_file(study)}-effects"] = effects_there
    shared = {stage: found for stage in STAGES if (found := across.shared(studies, stage))}
    tables |= {f"across-{stage}": across.table(found, stage) for stage, found in shared.items()}
    from discobeta.report import paper_figures

    figures = {"hypotheses": paper_figures.forest(verdicts, studies, digest)}
    if shared:
        figures["across"] = paper_figures.across_figure(shared)
    for study in studies:
        for stage in study.stages:
            if has_frontier(study, stage):
                figures[f"{_file(study)}-{stage}-frontier"] = paper_figures.frontier_figure(study, stage)
    return Paper(studies, tables, figures, dict(macros(studies, verdicts, tables)), absent)


def write(folder: Path, registered: Registered, digest: str, output: Path) -> Paper:
    """`make`, into `output`; files of ours of a study that is gone are removed."""
    from discobeta.report.figures import save

    paper = make(folder, registered, digest)
    tables = {f"{name}.{ending}": (name, ending) for name in paper.tables for ending in ("csv", "md", "tex")}
    figures = {f"{name}.{ending}": name for name in paper.figures for ending in ("pdf", "png")}
    names = [*tables, *figures, "numbers.tex", "README.md"]
    before = (mark_of(output) or {}).get("parts", [])
    claim(output, MADE_BY, names)
    for name in set(before) - set(names):
        remove(output / name)
    write_mark(output, MADE_BY, names)
    for file, (name, ending) in tables.items():
        write_text(output / file, paper.tables[name].text(ending, name))
    for name, figure in paper.figures.items():
        save(figure, [output / f"{name}.{ending}" for ending in ("pdf", "png")])
    write_text(output / "numbers.tex", macros_text(paper))
    write_text(output / "README.md", index(paper, digest))
    return paper


def _file(study: Published) -> str:
    return study.name.replace("/", "-")


# --- a study's numbers


def numbers_table(study: Published, stage: str) -> Table:
    """What was measured of every arm and control at the study's own settings.

    What was fitted to a control stands in the CSV alone: printed are the fits to the baseline.
    """
    rows = printed_rows(study, stage)
    names = [name for name in MEASURES if not name.startswith(("posthoc/", "calibration/"))]
    records = []
    for row in rows:
        record: dict[str, Any] = {"arm": row.source.arm, "variant": row.source.variant, "posthoc": row.posthoc}
        record["label"] = row.label(study)
        record["beside"] = row.fit or variant_label(row.source, study)
        record |= _of_seeds(study, stage, row.source, {name: row.metric(name) for name in names})
        records.append(record)
    frame, printed = frames(records)
    printed = printed[(printed.posthoc == "") | (printed.variant == "")]
    which = [Column("Arm", lambda row: BY_NAME[row["arm"]].label, is_number=False)]
    if printed.beside.any():
        which.append(Column("Variant", lambda row: row["beside"] or AS_IN_THE_GRID, is_number=False))
    if printed.n_seeds.nunique() > 1 or (printed.n_seeds != len(study.seeds)).any():
        which.append(seeds_column())
    title = f"{STAGES[stage].title}, {study.name}"
    panels = panels_of(stage, which, title, study.seeds)
    further = [metric for metric in FURTHER if not metric.name.startswith("posthoc/")]
    columns = [*which, *(metric_column(metric.name, study.seeds) for metric in further)]
    panels.append(
        Panel(f"{title}: what else is known of the runs. {interval_words(study.seeds)}", columns, "more", len(which))
    )
    notes = ["Arms share their seeds: whether two differ is said by paired differences."]
    if (printed.posthoc != "").any():
        notes.append(
            "What is post hoc was fitted to the frozen baseline on calibration pairs: it says other probabilities of "
            "the same choices between responses, and has no accuracy and no policy of its own."
        )
    if any((frame[name].between(1, frame.n_seeds - 1)).any() for name in frame if name.endswith("_n")):
        notes.append("(n of N): what is measured is undefined in the other seeds, e.g. a correlation with a constant.")
    notes.append(study.made_by_line)
    return Table(frame.drop(columns="beside"), panels, notes, study.made_by, ["arm"], printed, title)


def _of_seeds(study: Published, stage: str, source: Source, metrics: dict[str, str]) -> dict[str, Any]:
    """`estimates` of metrics (what they are called in the table -> in the file), and of how many seeds they are."""
    by_seed = {name: study.values(stage, source, metric) for name, metric in metrics.items()}
    n = max(map(len, by_seed.values()), default=0)
    return estimates(by_seed) | {"n_seeds": n, "n_expected": len(study.seeds)}


# --- sweeps and what is matched


def sweep_table(study: Published, stage: str) -> Table:
    """Every point of a sweep: mean ± CI over seeds."""
    names = [kl_of(study, stage), REWARD, "regret", "well_formed", "excess_kl"]
    names = [name for name in names if name in study.metrics(stage) and name in MEASURES]
    records = []
    for source, points in published.swept(study, stage).items():
        for run, setting in points.items():
            record = {
                "arm": source.arm,
                "variant": source.variant,
                "label": label_of(source, study),
                "pref_beta": setting,
            }
            records.append(record | _of_seeds(study, stage, run, {name: name for name in names}))
    order = {source.text: place for place, source in enumerate(published.swept(study, stage))}
    records.sort(key=lambda row: (order[Source(row["arm"], row["variant"]).text], row["pref_beta"]))
    which = [
        Column("Arm", lambda row: row["label"], is_number=False),
        Column("β", lambda row: f"{row['pref_beta']:g}"),
    ]
    frame, printed = frames(records)
    if (printed.n_seeds != len(study.seeds)).any():
        which.append(seeds_column())
    columns = [*which, *(metric_column(name, study.seeds) for name in names)]
    title = f"{STAGES[stage].title}, {study.name}: the sweep over β"
    panels = [Panel(f"{title}. {interval_words(study.seeds)}", columns, keys=len(which))]
    return Table(frame, panels, [study.made_by_line], study.made_by, ["label"], printed, title)


def remarks(found: dict[Source, dict[int, list[frontier.Point]]]) -> list[str]:
    """Which runs are left out, and which lines are not in the order of β."""
    dropped, unordered = frontier.remarks(found)
    texts = [f"Dropped, of fewer than 90 % well-formed responses (their share): {dropped}."] if dropped else []
    return texts + ([f"KL does not fall along β, points are joined by their KL: {unordered}."] if unordered else [])


def matched_table(study: Published, stage: str) -> Table:
    """What arms differ by at matched KL: each from the baseline, a control from its own arm too, the interaction."""
    found = frontiers(study, stage)
    pairs: list[tuple[str, str, dict[Source, float]]] = []
    for source in found:
        others = [Source(CORNERS[0].name), *([Source(source.arm)] if source.variant else [])]
        for other in dict.fromkeys(others):
            if other != source and other in found:
                name = f"{label_of(source, study)} − {label_of(other, study)}"
                key = f"{label_of(source)} − {label_of(other)}"
                pairs.append((name, key, {source: 1.0, other: -1.0}))
    for name, weights in effects.factorial().items():
        if " × " in name and all(Source(arm.name) in found for arm in weights):
            pairs.append((name, name, {Source(arm.name): weight for arm, weight in weights.items()}))
    records, found_of, notes = [], [], []
    for name, key, weights in pairs:
        result = frontier.matched(weights, {source: found[source] for source in weights})
        values = list(result.differences.values())
        mean, half_width = mean_ci(values)
        ranges = list(result.ranges.values())
        records.append(
            {
                "contrast": name,
                "key": key,
                "n_seeds": len(values),
                "n_expected": len(study.seeds),
                "difference": mean,
                "ci95": half_width,
                "p": sign_flip_p(values),
                "kl_low": mean_ci([low for low, _ in ranges])[0],
                "kl_high": mean_ci([high for _, high in ranges])[0],
                "undecidable": frontier.reasons(result.undecidable),
            }
        )
        found_of.append(result.differences)
        notes += [f"{name}: not compared: {records[-1]['undecidable']}."] if result.undecidable else []
    notes += remarks(found)
    decimals = MEASURES[REWARD].decimals
    columns = [
        Column("Difference", lambda row: row["contrast"], is_number=False, widest=0.4),
        seeds_column(),
        Column("Common KL\n(nats)", lambda row: f"{number(row['kl_low'], 2)} to {number(row['kl_high'], 2)}"),
        Column(
            interval_header(study.seeds, "Mean difference"),
            lambda row: estimate(row["values"], list(row["values"]), decimals),
        ),
        Column("p", lambda row: p_value(row["p"])),
    ]
    notes = [
        "True reward at matched KL: along the sweep over β, linear between points in the order of their KL, averaged "
        "per seed over the range of KL that all arms of the difference have; nothing beyond it. p: two-sided sign-flip "
        f"test, not corrected. KL: {kl_of(study, stage)}.",
        *notes,
        study.made_by_line,
    ]
    title = f"{STAGES[stage].title}, {study.name}: true reward at matched KL"
    frame = with_seeds(pd.DataFrame(records), study.seeds, found_of)
    printed = pd.DataFrame([row | {"values": of} for row, of in zip(records, found_of, strict=True)])
    return Table(frame, [Panel(f"{title}.", columns, keys=2)], notes, study.made_by, [], printed, title)


def effects_table(study: Published) -> Table:
    """The factorial effects of the grid's own runs, and Holm's p over those of a stage."""
    frame = effects.tested_effects(study, study.frame)
    columns = [
        Column("Stage", lambda row: row["stage"], is_number=False),
        Column("Metric", lambda row: one_line(MEASURES[row["metric"]].header), is_number=False),
        Column("Effect", lambda row: row["contrast"], is_number=False),
        seeds_column(),
        Column(interval_header(study.seeds), lambda row: effects.difference(row, study.seeds)),
        Column("p", lambda row: p_value(row["p"])),
        Column("p\n(Holm)", lambda row: p_value(row["p_holm"])),
    ]
    notes = [
        "Main effects and interaction of the 2×2 design at the study's own β, paired over seeds. p: two-sided "
        "sign-flip test; Holm's correction is over the tests of a stage. Exploratory beside the registered hypotheses.",
        study.made_by_line,
    ]
    title = f"What the two ideas do, {study.name}"
    by_seed = (dict(zip(*of, strict=True)) for of in zip(frame.seeds, frame.differences, strict=True))
    kept = with_seeds(frame.drop(columns=["seeds", "differences"]), study.seeds, by_seed)
    panels = [Panel(f"{title}.", columns, keys=4)]
    return Table(kept, panels, notes, study.made_by, ["stage", "metric"], frame, title)


# --- macros

DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
WORDS = {str(digit): word for digit, word in enumerate(DIGITS)} | {"=": "Is"}


def macro_name(*parts: str) -> str:
    r"""A name of letters only: `val`, and the words of the parts, e.g. \valBothRmDiscoExcessKl."""
    words = []
    for part in parts:
        part = re.sub(r"(?<=\d)\.(?=\d)", "Point", part)
        for word in re.split(r"[^A-Za-z0-9=]+", part):
            spelled = "".join(WORDS.get(letter, letter) for letter in word)
            words.append(capitalised(spelled))
    return "val" + "".join(words)


def macros(studies: list[Published], verdicts: list[Verdict], tables: dict[str, Table]) -> Iterator[tuple[str, str]]:
    """Name -> what it prints, of every number that a text would quote. Raises UserError where two have one name."""
    seen: dict[str, str] = {}
    for name, text, of in _macros(studies, verdicts, tables):
        if name in seen and seen[name] != of:
            raise UserError(f"{of} and {seen[name]} would both be \\{name}: rename a study, a control or a hypothesis")
        seen[name] = of
        yield name, text


def _macros(
    studies: list[Published], verdicts: list[Verdict], tables: dict[str, Table]
) -> Iterator[tuple[str, str, str]]:
    def of_row(names: list[str], row: Row, key: str, decimals: int) -> Iterator[tuple[str, str, str]]:
        if math.isnan(row[key]):
            return
        of = " ".join(names)
        yield macro_name(*names), number(row[key], decimals), of
        of_difference = key == "difference"
        interval = row.get("ci95" if of_difference else f"{key}_ci95", math.nan)
        if not math.isnan(interval) and row["n_seeds" if of_difference else f"{key}_n"] >= INTERVAL_FROM:
            yield macro_name(*names, "ci"), number(interval, decimals), f"{of} ci"

    for study in studies:
        yield macro_name(study.name, "seeds"), str(len(study.seeds)), f"{study.name} seeds"
        for stage in study.stages:
            rows = _rows(tables, f"{_file(study)}-{stage}")
            for row in rows + _rows(tables, f"{_file(study)}-{stage}-sweep"):
                of = f"beta={row['pref_beta']:g}" if "pref_beta" in row else _posthoc(row)
                who = [study.name, stage, BY_NAME[row["arm"]].label, row["variant"], of]
                for name in MEASURES:
                    if name in row:
                        yield from of_row([*filter(None, who), name], row, name, MEASURES[name].decimals)
            for row in _rows(tables, f"{_file(study)}-{stage}-matched"):
                who = [study.name, stage, "matched", _words(row["key"])]
                yield from of_row(who, row, "difference", MEASURES[REWARD].decimals)
                if not math.isnan(row["p"]):
                    yield macro_name(*who, "p"), p_value(row["p"]), " ".join([*who, "p"])
        for row in _rows(tables, f"{_file(study)}-effects"):
            who = [study.name, row["stage"], "effect", _words(row["contrast"]), row["metric"]]
            yield from of_row(who, row, "difference", MEASURES[row["metric"]].decimals)
            for key in ("p", "p_holm"):
                if not math.isnan(row[key]):
                    yield macro_name(*who, key), p_value(row[key]), " ".join([*who, key])
    for stage in STAGES:
        for row in _rows(tables, f"across-{stage}"):
            fit = _posthoc(row)
            who = [row["study"], stage, BY_NAME[row["arm"]].label, row["variant"], fit, "minus baseline", across.METRIC]
            yield from of_row([*filter(None, who)], row, "difference", MEASURES[across.METRIC].decimals)
    for verdict in verdicts:
        name, decimals = verdict.hypothesis.id, verdict.hypothesis.decimals
        yield macro_name(name, "verdict"), verdict.verdict, f"{name} verdict"
        yield macro_name(name, "seeds"), str(verdict.n), f"{name} seeds"
        found = {"difference": verdict.difference, "detectable": verdict.detectable}
        found |= {"ci": verdict.ci95} if verdict.n >= INTERVAL_FROM else {}
        for key, value in found.items():
            if math.isfinite(value):
                yield macro_name(name, key), number(value, decimals), f"{name} {key}"
        for key, value in (("p", verdict.p), ("p holm", verdict.p_holm), ("p against holm", verdict.against_holm)):
            if not math.isnan(value):
                yield macro_name(name, key), p_value(value), f"{name} {key}"
    for of in hypotheses.VERDICTS:
        yield macro_name(of), str(sum(verdict.verdict == of for verdict in verdicts)), of


def _posthoc(row: Row) -> str:
    return f"posthoc {row['posthoc']}" if row["posthoc"] else ""


def _rows(tables: dict[str, Table], name: str) -> list[dict[str, Any]]:
    return tables[name].frame.to_dict("records") if name in tables else []


def _words(contrast: str) -> str:
    return contrast.replace(" × ", " times ").replace(" − ", " minus ").replace(" + ", " plus ")


def macros_text(paper: Paper) -> str:
    lines = ["% every number that a text would quote, made by `discobeta paper`"]
    lines += [f"% {study.made_by_line}" for study in paper.studies]
    lines += [f"\\newcommand{{\\{name}}}{{{escape(text)}}}" for name, text in paper.macros.items()]
    return "\n".join(lines) + "\n"


# --- what there is


def index(paper: Paper, digest: str) -> str:
    """The first page: verdicts, what there is, and what is not there."""
    lines = ["# Tables, figures and numbers", ""]
    lines += [f"Made by `make paper` from the committed numbers; hypotheses {digest}.", ""]
    if paper.absent:
        texts = (f"{name} ({', '.join(ids)})" for name, ids in sorted(paper.absent.items()))
        lines += [f"**Not there**, though hypotheses ask for it: {'; '.join(texts)}.", ""]
    lines += [f"- {study.made_by_line}" for study in paper.studies] or ["No study is there."]
    lines += ["", "| table | |", "|---|---|"]
    for name, table in paper.tables.items():
        links = ", ".join(f"[{ending}]({name}.{ending})" for ending in ("md", "csv", "tex"))
        lines.append(f"| {table.title} | {links} |")
    lines += ["", f"Every number as a LaTeX macro: [numbers.tex](numbers.tex), {len(paper.macros):,} of them.", ""]
    for name in paper.figures:
        lines += [f"![{name}]({name}.png)", ""]
    return "\n".join(lines)
