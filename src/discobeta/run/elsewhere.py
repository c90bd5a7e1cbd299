"""An evaluation that is not the run's own: of other rows, or into another folder, where no table looks for a run's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from discobeta import files, folders, lock
from discobeta.data.sources import is_same, named, resolve
from discobeta.design.config import RunConfig, keys_of, read_by, value_of
from discobeta.errors import UserError, did_you_mean, shown
from discobeta.record import EVALUATION

OTHER_ROWS = ("eval_dataset", "calibration_dataset", "eval_split", "dataset_dir", "max_samples", "max_unusable_rows")
"""Run keys that say on which rows a run is measured; `eval_dataset` makes them others than the run's own."""

MADE_BY = "discobeta evaluate"

EVALUATIONS = "evaluations"
"""In a run's directory: a folder for each of the other rows that it was measured on."""


def with_settings(config: RunConfig, settings: dict[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """The run's config with other settings of its evaluation; and those of other rows, if it is measured on such.

    Of its own data such a run reads nothing: what it says of other rows depends on the rows, and on its weights.
    """
    keys = keys_of("evaluation", config.stage)
    others = [name for name in OTHER_ROWS if config.stage in read_by(name)]
    for name in settings:
        if name not in (*keys, *others):
            hint = did_you_mean(name, (*keys, *others))
            hint = hint or f"; of a run of {config.stage} it may be {', '.join((*keys, *others))}"
            raise UserError(f"--set {shown(name)}: this is no setting of an evaluation{hint}")
    rows = rows_of(settings)
    settings = settings | rows
    if rows and not settings.get("eval_dataset"):
        raise UserError(f"--set {next(iter(rows))}: of which rows? Say eval_dataset=NAME, too: a file or hub id")
    if not rows:
        return RunConfig.from_mapping(config.resolved() | settings, "--set")[0], {}
    others = {
        "dataset": settings["eval_dataset"],  # read in its place, and trained on by nobody
        "split": settings.get("eval_split", config.eval_split),
        "eval_dataset": None,
        "calibration_dataset": None,
        "max_samples": None,
        "val_size": 0.0,
        "eval_strategy": "no",
        **dict.fromkeys(folders.MADE),
    }
    rest = {name: value for name, value in settings.items() if name != "eval_dataset"}
    return RunConfig.from_mapping(config.resolved() | others | rest, "--set")[0], rows


def rows_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What settings say of other rows, typed; nothing if these are the run's own."""
    rows = {}
    for name in OTHER_ROWS:
        if name in settings:
            try:
                rows[name] = value_of(name, settings[name])
            except ValueError as error:
                raise UserError(f"--set {name}: {error}") from None
    return rows


def check_unseen(own: RunConfig, config: RunConfig) -> None:
    """Refuse rows that a run was trained on. own: its config as it was; config: that of the rows that are asked for."""
    try:
        trained_on = resolve(own.dataset, own, own.split) if own.dataset else []
    except UserError:  # they are not here: what of them is known are the tokens' hashes
        return
    for key, (names, split) in named(config).items():
        for source in resolve(names, config, split):
            if any(is_same(source, other) for other in trained_on):
                raise seen("eval_dataset" if key == "dataset" else key, source.name)


def seen(key: str, name: str) -> UserError:
    return UserError(
        f"--set {key}={name}: the run was trained on these rows, so it would be measured on what it has seen"
    )


def output_of(directory: Path, output: str | Path | None, other_rows: dict[str, Any]) -> Path:
    """The folder for what is measured: the run's own, unless rows or the caller say otherwise.

    Raises UserError for a folder that holds a run, or somebody else's files of these names.
    """
    if output is None and not other_rows:
        return directory
    if output is None:
        output = directory / EVALUATIONS / _name_of(other_rows["eval_dataset"])
        if (there := _rows_in(output)) not in (None, other_rows):
            said = ", ".join(f"{name}={value}" for name, value in there.items())
            raise UserError(f"{output} holds what was measured of other rows ({said}): give another folder by --output")
        return output
    output = Path(output)
    if os.path.realpath(output) == os.path.realpath(directory) and not other_rows:
        return directory
    if os.path.lexists(output) and not output.is_dir():
        raise UserError(f"--output {output} is a file")
    mark = (folders.mark_of(output) if output.is_dir() else None) or {"made_by": MADE_BY, "parts": []}
    if (output / "provenance.json").exists() or mark["made_by"] != MADE_BY:
        raise UserError(f"--output {output} is a folder of something else: what is measured here has one of its own")
    if foreign := [name for name in EVALUATION if name not in mark["parts"] and os.path.lexists(output / name)]:
        raise UserError(f"--output {output}: {foreign[0]} is there, and discobeta has not written it; move it away")
    return output


def _rows_in(output: Path) -> dict[str, Any] | None:
    """Of which rows the folder holds an evaluation; None if it holds none that can be read."""
    try:
        return files.read_sealed(output / "evaluation.json").get("rows")
    except UserError:
        return None


def _name_of(rows: str) -> str:
    """A name for a folder, of what `eval_dataset` says."""
    names = [Path(name.strip()) for name in rows.split(",") if name.strip()]
    stems = [re.sub(r"(\.jsonl?|\.parquet)?(\.gz)?$", "", path.name) for path in names]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "+".join(stems)).strip(".-")[:100] or "rows"


@contextmanager
def holding(output: Path) -> Iterator[None]:
    """Hold the folder; nothing of it stays if the evaluation comes to nothing."""
    try:
        with lock.holding(output):
            yield
    finally:
        with suppress(OSError):
            if output.parent.name == EVALUATIONS:
                output.parent.rmdir()  # if it is empty


def claim(output: Path) -> None:
    """Mark the folder as that of an evaluation, right before it is written."""
    folders.claim(output, MADE_BY, EVALUATION)
