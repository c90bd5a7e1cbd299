"""Finished runs that a study would train again with other settings than they had: mostly a forgotten `study:`.

Two studies of one name share one folder. Snakemake sees that what is there is out of date and makes it anew, which
costs the first study its runs. So the workflow asks here before it starts; what is meant is said with
`--config retrain=true` ([decision 0033](../../../docs/decisions/0033-what-is-refused-as-an-accident.md)).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from discobeta import files
from discobeta.design.config import RunConfig
from discobeta.design.study import Run, Study
from discobeta.design.yaml_text import read_yaml
from discobeta.errors import UserError
from discobeta.record import difference, package_hash, settings_hash, trained_with

MEANT = "retrain"
"""The word of `--config` by which it is meant."""


def retrained(study: Study) -> dict[Run, str]:
    """The study's whole runs that are finished there with other settings, and the first one that differs.

    Settings of the base and of the world count for all runs on them. No other settings are those that a run does not
    have in its record (it is of an older version), and, where the package is another one, those that the study leaves
    to their defaults: code may change what it will. Runs that are unfinished, unreadable or only proofs lose nothing.
    Of a cell one seed is read as a whole, so that thousands of runs take a second.
    """
    found: dict[Run, str] = {}
    of_cell: dict[tuple, str] = {}
    shared = {draw: _shared_difference(study, draw) for draw in study.draws()}
    for run in study.runs():
        if run.proof or (facts := _mapping(run.directory / "provenance.json")) is None:
            continue
        different, cell = shared[study.draw(run.seed)], (run.stage, run.arm, run.variant)
        if not different and facts.get("settings") != settings_hash(study.config(run)):
            if cell not in of_cell:
                of_cell[cell] = _difference(run.directory, study.config(run), facts, study.run_settings(run))
            different = of_cell[cell]
        if different:
            found[run] = different
    return found


def refusal(study: Study, found: dict[Run, str]) -> str:
    """What the runs of `retrained` are, in one line, and in another what to do."""
    run, different = next(iter(found.items()))
    runs = "1 finished run" if len(found) == 1 else f"{len(found)} finished runs"
    return (
        f"{study.directory} holds {runs} with other settings than this study's, which would be trained again "
        f"({run.stage}, {run.name}, seed {run.seed}: {different}).\n"
        "A study of its own needs a name of its own: `study:` in its config, or --config study=NAME. "
        f"If what is there may go: --config {MEANT}=true (with make: RETRAIN=true)"
    )


def among(found: dict[Run, str], outputs: Collection[str]) -> dict[Run, str]:
    """Those that are trained when these files are made."""
    made = {Path(path) for path in outputs}
    return {run: different for run, different in found.items() if run.directory / "provenance.json" in made}


def _mapping(path: Path) -> dict[str, Any] | None:
    """What a record says; None if there is none. Whether it is damaged is asked elsewhere."""
    try:
        return files.read_mapping(path)
    except UserError:
        return None


def _difference(directory: Path, config: RunConfig, facts: dict[str, Any], said: Collection[str]) -> str:
    """The first setting of training that is another one there, e.g. `seed: 1 there, 2 here`; "" if there is none.

    said: the keys that the study gives, or that follow from it.
    """
    try:
        there = read_yaml(directory / "config.yaml")
    except UserError:
        return ""
    is_same_code = facts.get("package") == package_hash()  # which has the defaults, as the code of a stage has not
    return _first({key: value for key, value in trained_with(config).items() if is_same_code or key in said}, there)


def _first(wanted: dict[str, Any], there: dict[str, Any]) -> str:
    """`record.difference`, of the settings that are there at all."""
    return difference(there, {key: value for key, value in wanted.items() if key in there})


def _shared_difference(study: Study, draw: str) -> str:
    """The first setting of a draw's world, or of the base that the study trains, that is another one there."""
    if study.world:
        records = {"corpus": study.world_of(draw) / "world.json", "pairs": study.pairs(draw) / "pairs.json"}
        for step, path in records.items():
            if different := _first(study.decides_world(step, draw), _mapping(path) or {}):
                return f"data: world: {different}"
    folder = study.base_of(draw)
    if study.sft and (facts := _mapping(folder / "provenance.json")) is not None:
        config = study.base_config(draw)
        if facts.get("settings") != settings_hash(config):
            different = _difference(folder, config, facts, study.base_settings(draw))
            return different and f"base: sft: {different}"
    return ""
