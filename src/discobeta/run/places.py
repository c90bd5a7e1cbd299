"""Where the files that a run was made from are now, when it was moved, copied, or is read from another directory.

A run's config names folders as they were called where it was trained. Each is looked for where it lay in relation to
the run, as a study that is moved as a whole keeps its insides, and then by its name. A base is found by its hash too,
which the run's provenance has; nothing of another hash is ever taken for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from discobeta import identity
from discobeta.data.sources import resolve
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.folders import MADE
from discobeta.record import Record

LEVELS = 6
"""Folders above a run in which its base is looked for by its hash: runs/STAGE/ARM/VARIANT/seed-N of a study, and one
more."""

SAY = "say where it is: --base DIR for a command, base=DIR in Python"

ROWS = ("dataset", "eval_dataset", "calibration_dataset")


def here(run: Record, base: str | None = None, also: tuple[str, ...] = ()) -> Record:
    """The run with its base, and all else that its config names, by the names that they have here and now.

    base: a folder or hub id to take for its base; also: further folders that may be it. Raises UserError where the base
    is not found, with what was looked for, and for one that is not that of the run.
    """
    return with_base(replace(run, config=moved(run, run.config)), base, also)


def moved(run: Record, config: RunConfig) -> RunConfig:
    """`config` of a run with folders and files other than its base under the names that they have now."""
    found = {}
    for key in ("adapter_name_or_path", "beta_head", "dataset_dir", *MADE):
        found[key] = _now(run, getattr(config, key))
    if config.ground_truth not in ("none", "world"):
        found["ground_truth"] = _now(run, config.ground_truth)
    if config.reward_model:
        found["reward_model"] = ",".join(_now(run, name) for name in config.reward_models)
    for key in ROWS:
        names = [name.strip() for name in (getattr(config, key) or "").split(",") if name.strip()]
        folder = found["dataset_dir"]
        found[key] = ",".join(n if (Path(folder) / n).is_file() else _now(run, n) for n in names) or None
    changed = {key: value for key, value in found.items() if value != getattr(config, key)}
    return without_lost_rows(config.replace(**changed))


def without_lost_rows(config: RunConfig) -> RunConfig:
    """`config` without the names of rows that are not on this machine, if they are there as tokens, whose hashes are
    compared with those that the run was trained on."""
    if not config.tokenized_path or not os.path.lexists(Path(config.tokenized_path) / "tokens.json"):
        return config
    try:
        for key in ROWS:
            if names := getattr(config, key):
                resolve(names, config, config.split)
    except UserError:
        return config.replace(**dict.fromkeys(ROWS), val_size=0.0)
    return config


def with_base(run: Record, base: str | None, also: tuple[str, ...] = ()) -> Record:
    """The run on the base that it was trained on, by the name that it has here; see `here`.

    A base that is still where it was, and is another one now, is refused: it is looked for by its hash only where there
    is none.
    """
    if base is not None:
        if not os.path.isdir(base):
            _download(base, run.config)
        run = replace(run, config=run.config.replace(model_name_or_path=str(base)))
        run.check_base()
        return run
    name = run.config.model_name_or_path
    where_it_was = [path for path in (Path(name), *_all_beside(run, name)) if path.is_dir()]
    near = [] if where_it_was else [*map(Path, also), *_near(run, Path(name).name)]
    near = [path for path in near if (path / "config.json").is_file()]
    others: list[tuple[Path, UserError]] = []
    for folder in where_it_was or near:
        there = replace(run, config=run.config.replace(model_name_or_path=_called(folder, name)))
        try:
            there.check_base()
        except UserError as error:
            others.append((folder, error))
            continue
        return there
    if where_it_was:
        raise others[-1][1]  # which says how it differs
    if _may_be_hub_id(name):
        try:
            _download(name, run.config)
        except UserError as error:
            raise UserError(f"{error}; {SAY}") from None
        run.check_base()
        return run
    another = f"; {others[0][0]} is another" if others else ""
    raise UserError(
        f"{run.directory}: its base {name} is not here: not by that name, not at {_beside(run, name) or name}, and "
        f"none of sha256 {str(run.facts.get('base'))[:12]} in the {LEVELS} folders above the run{another}; {SAY}"
    )


def _near(run: Record, last: str) -> Iterator[Path]:
    """Folders above the run, and in each the base by its own name, and what a study calls its shared bases."""
    for folder in Path(os.path.abspath(run.directory)).parents[:LEVELS]:
        yield folder / last
        yield folder / "base"
        if (bases := folder / "shared" / "base").is_dir():
            yield from (bases, *sorted(path for path in bases.iterdir() if path.is_dir()))


def _now(run: Record, name: str | None) -> str | None:
    """What the run's config calls `name`, by the name that it has here; unchanged where nothing else is there.

    What lies beside the run comes first: under a relative name, the working directory may hold another study's.
    """
    found = next((path for path in _all_beside(run, name) if path.exists()), None) if name else None
    return name if found is None else _called(found, name)


def _called(path: Path, name: str) -> str:
    """A path by the name that it was given, if it still has that; else by its whole one, which no hub id looks like."""
    return name if os.path.exists(name) and os.path.samefile(path, name) else os.path.abspath(path)


def _all_beside(run: Record, name: str) -> list[Path]:
    """Where `name` lies if it and the run were moved together: as the run is named, and where a link leads."""
    return [path for at in (os.path.abspath, os.path.realpath) if (path := _beside(run, name, at)) is not None]


def _beside(run: Record, name: str, at=os.path.abspath) -> Path | None:
    was = run.written_to
    if not was or os.path.isabs(name) != os.path.isabs(was):
        return None  # their relation is not known
    return Path(os.path.normpath(os.path.join(at(run.directory), os.path.relpath(name, was))))


def _may_be_hub_id(name: str) -> bool:
    try:
        identity.check_local(name, "model_name_or_path")
    except UserError:
        return False
    return not os.path.exists(name)


def _download(name: str, config: RunConfig) -> None:
    """Have the files of a hub's model here: a hash is one of files, and a new machine has none of them."""
    folder = identity.folder_of(name, "config.json", config, "model_name_or_path")
    if not any(path.suffix in identity.WEIGHTS for path in folder.iterdir()):
        from discobeta.inputs.fetch import download

        download(name, config.model_revision, config.cache_dir, "model_name_or_path")
