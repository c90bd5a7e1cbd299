"""The table of neutrality: what each run with an idle head computed, against its twin's, byte for byte."""

from __future__ import annotations

from functools import lru_cache

import pandas as pd

from discobeta.design.study import Run, Study
from discobeta.identity import WEIGHTS, file_hash
from discobeta.report.collect import provenance, provenance_line
from discobeta.report.compare import EQUAL, OUTCOMES, files_of, verdict
from discobeta.report.measures import arm_text
from discobeta.report.render import NOTHING, Column, Panel, Table
from discobeta.report.results import Results, kind_of, seeds_text


@lru_cache(maxsize=1)  # the tables of the stages read it too
def neutrality_frame(results: Results) -> pd.DataFrame:
    """One row per run with an idle head: what of it equals its twin, the run without that head.

    In a study that proves its idle arms, the proofs of both are compared. `result` is equal, differs, stale, damaged
    or missing.
    """
    study = results.study
    by_place = {(run.stage, run.arm, run.seed, run.proof): run for run in study.grid_runs()}
    rows = []
    for run in study.grid_runs():
        if run.arm.is_idle:
            twin = by_place.get((run.stage, run.arm.twin, run.seed, run.proof))
            verdicts = _verdicts(results, run, twin)
            row = {"stage": run.stage, "arm": run.arm.name, "twin": run.arm.twin.name, "seed": run.seed}
            rows.append(row | {"proof": run.proof, "result": _result(verdicts, run.proof)} | verdicts)
    return pd.DataFrame(rows, columns=["stage", "arm", "twin", "seed", "proof", "result", *OUTCOMES])


def _verdicts(results: Results, run: Run, twin: Run | None) -> dict[str, str]:
    not_measured = dict.fromkeys(MEASURED_ALONE, NOTHING) if run.proof else {}
    if twin is None:
        return dict.fromkeys(OUTCOMES, "twin not in this study") | not_measured
    if not (results.counts(run) and results.counts(twin)):
        return dict.fromkeys(OUTCOMES, _absent(results, twin if results.counts(run) else run, twin)) | not_measured
    verdicts = {}
    for outcome in OUTCOMES:
        ours, theirs = files_of(outcome, run.directory), files_of(outcome, twin.directory)
        if outcome in MEASURED_ALONE:
            if run.proof and not (ours or theirs):
                verdicts[outcome] = NOTHING
                continue
            lacking = [one for one in (run, twin) if not (run.proof or results.is_measured(one))]
            if lacking:
                verdicts[outcome] = _absent(results, lacking[0], twin)
                continue
        if ours and theirs:
            pairs = [_verdict(results, run, twin, name) for name in dict.fromkeys(ours + theirs)]
            verdicts[outcome] = next((text for text in pairs if text != EQUAL), EQUAL)
        else:
            verdicts[outcome] = "twin missing" if ours else "missing" if theirs or not run.proof else NOTHING
    return verdicts


MEASURED_ALONE = ("metrics", "examples")
"""Outcomes that `discobeta evaluate` leaves; the others are training's."""


def _absent(results: Results, run: Run, twin: Run) -> str:
    kind = kind_of(results.absence(run))
    return f"twin {kind}" if run is twin else kind


def _verdict(results: Results, run: Run, twin: Run, name: str) -> str:
    """`compare.verdict` of two files, after a look at whether they are those that the runs have left.

    Everything but weights has been looked at when the records were read.
    """
    if name.endswith(WEIGHTS):
        written = [results[one].facts["files"].get(name) for one in (run, twin)]
        there = [file_hash(one.directory / name) if (one.directory / name).exists() else None for one in (run, twin)]
        for text, was, now in zip(("damaged", "twin damaged"), written, there, strict=True):
            if was != now:
                return text
        if there[0] == there[1]:
            return EQUAL
    if name == "log.jsonl" and results[run].facts.get("log") != results[twin].facts.get("log"):
        return "of other steps"
    return verdict(run.directory / name, twin.directory / name)


def _result(verdicts: dict[str, str], proof: bool) -> str:
    """A proof is trained and not evaluated, so its weights and log decide."""
    texts = [text.removeprefix("twin ") for text in verdicts.values()]
    for result in ("damaged", "stale"):
        if result in texts:
            return result
    if any(text.startswith("differs") for text in texts):
        return "differs"
    needed = ("weights", "log") if proof else tuple(OUTCOMES)
    return EQUAL if all(verdicts[outcome] == EQUAL for outcome in needed) else "missing"


def neutrality_table(results: Results) -> Table:
    """Printed with the seeds of an arm that have the same verdicts in one row; the CSV has a row for each."""
    study, frame = results.study, neutrality_frame(results)
    columns = [
        Column("Stage", lambda row: row["stage"], is_number=False),
        Column("Idle arm", lambda row: arm_text(row["arm"]), is_number=False),
        Column("Twin", lambda row: arm_text(row["twin"]), is_number=False),
        Column("Seeds", lambda row: row["seed"], is_number=False, widest=0.15),
        Column(
            "Compared", lambda row: study.proof_text(row["stage"]) if row["proof"] else "whole run", is_number=False
        ),
        *(
            Column(name.capitalize(), lambda row, name=name: row[name], is_number=False, widest=0.18)
            for name in OUTCOMES
        ),
    ]
    caption = "Runs with an idle head against their twin, the run without that head: what each computed, byte for byte."
    alike = [name for name in frame if name != "seed"]
    printed = frame.groupby(alike, sort=False).seed.agg(lambda of: seeds_text(list(of))).reset_index()
    counts = frame.result.value_counts()
    summary = (
        "This study trains no arm with an idle head"
        if frame.empty
        else f"{counts.get(EQUAL, 0)} of {len(frame)} {_idle_runs(study)} byte for byte"
    )
    summary += "".join(f"; {words}: {counts[result]}" for result, words in OTHERWISE.items() if result in counts) + "."
    if study.idle_arms == "prove":
        summary += " A proof is trained for its first steps only, and not measured."
    notes = [f"{summary} Offsets of bytes are counted from 0.", provenance_line(results)]
    panels = [Panel(caption, columns, keys=5)]
    return Table(frame, panels, notes, provenance(results), ["stage"], printed, "Neutrality of idle heads")


def _idle_runs(study: Study) -> str:
    return "proofs of an idle head equal their twin's" if study.idle_arms == "prove" else "idle runs equal their twin"


OTHERWISE = {
    "differs": "different",
    "missing": "not comparable, because something is missing",
    "stale": "stale",
    "damaged": "damaged",
}
