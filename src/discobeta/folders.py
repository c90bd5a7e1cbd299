"""Whose a folder is, and what in it may be replaced or removed.

A folder is ours if it carries our mark, and only then is anything in it removed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from discobeta import files, lock
from discobeta.design.config import RunConfig
from discobeta.design.yaml_text import write_yaml
from discobeta.errors import UserError
from discobeta.record import AGAIN, EVALUATION, difference_in

MARK = ".discobeta.json"
"""In every directory that this package fills: by whom it was made and what in it is ours. Written first."""

CARD = "README.md"
"""A run's model card. It is ours as long as it is what we wrote, which its last line says; a user may make it his, and
it is then left alone (`is_our_card`)."""

_CARD_END = "\n<!-- discobeta; sha256 of all above: {} -->\n"

UNFINISHED = ("checkpoints", "log.jsonl", "speed.jsonl", "tracker", "config.yaml")
"""What a run that was killed goes on from."""

PARTS = (
    "provenance.json",
    AGAIN,
    *EVALUATION,
    "adapter",
    "model",
    "heads.safetensors",
    "heads.json",
    "loss.png",
    "cost.json",
    *UNFINISHED,
)
"""What belongs to one run in its directory, in the order in which it is cleared away; nothing else in it is touched."""

INSIDE = {
    "adapter": ("adapter_config.json", "adapter_model*.safetensors"),
    "model": ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    "checkpoints": ("step-*.pt", "step-*.pt.damaged", ".step-*"),
}
"""What is ours in the parts that are directories."""

FOLDERS = ("model_name_or_path", "adapter_name_or_path", "tokenizer_name", "reward_model", "beta_head")
"""Run keys that may name a local folder which a run reads, or (`reward_model`) several."""

MADE = ("tokenized_path", "reference_path", "reference_answers_path")
"""Run keys that name a folder of what this package makes for many runs."""


def open_run(config: RunConfig) -> bool:
    """Whether `output_dir` is free for `config`; False if it holds this very run, finished.

    An unfinished run of the same settings is left for its checkpoint to be found. Another run, if it is finished or
    has a checkpoint, is refused, or removed with overwrite_output_dir: true, which also trains a finished run again.
    Refused in any case is what this package did not write, and what the run itself reads. Nothing is changed here: a
    run that cannot start leaves no trace, and leaves the run that it would have replaced (see `begin`).
    """
    directory = writable(config)
    for key, read in _inputs(config):
        if key in FOLDERS and os.path.realpath(read) == os.path.realpath(directory):
            raise UserError(f"output_dir: {directory} is {key}, which this run reads; give another output_dir")
    if not _there(directory):
        return True
    _check_ours(directory)
    different = difference_in(directory, config)
    finished = (directory / "provenance.json").exists()
    if finished and not different and not config.overwrite_output_dir:
        return False
    if different and (finished or _checkpoints(directory)) and not config.overwrite_output_dir:
        raise another_run(directory, different)
    goes_on = not different and not finished
    check_inputs(config, [directory / name for name in _there(directory) if not (goes_on and name == "checkpoints")])
    return True


def another_run(directory: Path, different: str) -> UserError:
    return UserError(
        f"output_dir: {directory} holds another run ({different}); "
        "give another output_dir, or overwrite_output_dir: true"
    )


def finished_line(config: RunConfig) -> str:
    return f"{config.output_dir} holds this run, finished; overwrite_output_dir: true trains it again"


def writable(config: RunConfig) -> Path:
    """`output_dir`, which may not be there yet, but must be one that can be written."""
    if not config.output_dir:
        raise UserError("output_dir is missing: where the run is to be written")
    directory = Path(config.output_dir)
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"output_dir: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise UserError(f"output_dir: {existing} may not be written to")
    return directory


def _there(directory: Path) -> list[str]:
    """The parts of a run that the directory holds; empty folders do not count."""
    names = [name for name in PARTS if os.path.lexists(directory / name)]
    return [name for name in names if not ((directory / name).is_dir() and not any((directory / name).iterdir()))]


def _check_ours(directory: Path) -> None:
    """Refuse a directory whose parts were not written by a run of ours."""
    ours = mark_of(directory)
    for name in _there(directory):
        path = directory / name
        if ours is None or name not in ours["parts"]:
            raise UserError(
                f"output_dir: {path} is there, and no run of this version of discobeta has written it; "
                "give another output_dir, or move it away"
            )
        if name in INSIDE and not path.is_symlink():
            for inner in sorted(path.iterdir()):
                if not any(inner.match(pattern) for pattern in INSIDE[name]):
                    raise UserError(f"output_dir: {inner} was not written by a run; move it away")


def mark_of(directory: Path) -> dict[str, Any] | None:
    """What `write_mark` has left in a directory; None if it has not, or not in a form that can be trusted."""
    try:
        mark = files.read_sealed(directory / MARK)
    except UserError:
        return None
    return mark if isinstance(mark.get("parts"), list) else None


def write_mark(directory: Path, made_by: str, parts: list[str]) -> None:
    """Say that these entries of `directory` are ours, to be replaced and removed."""
    files.write_sealed(directory / MARK, {"made_by": made_by, "parts": sorted(parts)})


def claim(folder: Path, made_by: str, names: Iterable[str]) -> None:
    """Mark these files of `folder` as ours, to be written; refuse where somebody else's have their names."""
    ours = set((mark_of(folder) or {}).get("parts", []))
    for name in sorted(set(names) - ours):
        if os.path.lexists(folder / name):
            raise UserError(f"{folder / name} is there, and discobeta has not written it; move it away")
    write_mark(folder, made_by, sorted(ours.union(names)))


def check_replaceable(folder: Path, key: str) -> None:
    """Refuse a folder that is to be replaced as a whole and holds what this package did not write.

    key: the run key that names it.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is a file")
    ours = {MARK, *((mark_of(folder) or {}).get("parts", []))}
    if other := sorted(name for name in os.listdir(folder) if name not in ours):
        raise UserError(
            f"{key}: {folder} would be replaced, and {other[0]} in it was not written by discobeta; name another folder"
        )


def check_inputs(config: RunConfig, replaced: list[Path]) -> None:
    """Refuse to replace what the run itself reads."""
    for key, read in _inputs(config):
        for path in replaced:
            target, source = Path(os.path.realpath(path)), Path(os.path.realpath(read))
            holds = source == target or target in source.parents
            if holds or (key in FOLDERS and target.parent == source):
                raise UserError(
                    f"output_dir: {path} would be replaced, and this run reads {key}: {read}; give another output_dir"
                )


def _inputs(config: RunConfig) -> list[tuple[str, Path]]:
    from discobeta.data.sources import named as named_data
    from discobeta.data.sources import resolve

    named = [(key, getattr(config, key)) for key in FOLDERS]
    named += [("reward_model", name) for name in config.reward_models]
    if isinstance(config.resume_from_checkpoint, str):
        named.append(("resume_from_checkpoint", config.resume_from_checkpoint))
    inputs = [(key, Path(name)) for key, name in named if name and os.path.exists(name)]
    made = {key: getattr(config, key) for key in MADE}  # here, if they are not there
    inputs += [(key, Path(name)) for key, name in made.items() if name]
    for key, (names, split) in named_data(config).items():
        try:
            sources = resolve(names, config, split)
        except UserError:  # said when the data is read
            continue
        inputs += [(key, source.path) for source in sources if source.path]
    return inputs


def write_card(directory: Path, text: str) -> bool:
    """Write a model card; False, and nothing is written, where one stands that somebody has written or edited."""
    path = directory / CARD
    text += _CARD_END.format(hashlib.sha256(text.encode()).hexdigest())
    if os.path.lexists(path):
        if not is_our_card(path):
            return False
        if path.read_text(encoding="utf-8") == text:
            return True
    files.write_text(path, text)
    return True


def is_our_card(path: Path) -> bool:
    """Whether a file is a card as `write_card` left it."""
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() and not path.is_symlink() else ""
    except (OSError, ValueError):
        return False
    own, begins, _ = text.rpartition(_CARD_END.partition("{")[0])
    return bool(begins) and text == own + _CARD_END.format(hashlib.sha256(own.encode()).hexdigest())


def begin(config: RunConfig) -> None:
    """The directory with our mark and the resolved settings in it, and nothing left of a run that this one replaces.

    To be called by the holder of the directory, after `open_run` has allowed it.
    """
    directory = Path(config.output_dir)
    goes_on = not (directory / "provenance.json").exists() and not difference_in(directory, config)
    for name in _there(directory):
        if not (goes_on and name in UNFINISHED):
            files.remove(directory / name)
    if is_our_card(directory / CARD):
        files.remove(directory / CARD)  # of a run that this one replaces; it gets one when it ends
    left_out = {"adapter" if config.finetuning_type == "full" else "model"}
    left_out |= set() if config.report_to != "none" or "tracker" in _there(directory) else {"tracker"}
    write_mark(directory, f"discobeta train, stage {config.stage}", [name for name in PARTS if name not in left_out])
    write_yaml(config.resolved(), directory / "config.yaml")


def _checkpoints(directory: Path) -> bool:
    return any((directory / "checkpoints").glob("step-*.pt"))


def named_checkpoint(config: RunConfig) -> Path | None:
    """The file that resume_from_checkpoint names, or None. UserError for a path that is none, with those that are."""
    if not isinstance(config.resume_from_checkpoint, str):
        return None
    path, folder = Path(config.resume_from_checkpoint), Path(config.output_dir) / "checkpoints"
    if path.is_file():
        return path
    what = "is a directory and no checkpoint of a run" if path.is_dir() else "is not there"
    there = sorted(folder.glob("step-*.pt"), key=lambda path: (len(path.name), path.name))
    own = f"{', '.join(map(str, there))} is there" if there else f"{config.output_dir} holds no checkpoint"
    raise UserError(f"resume_from_checkpoint: {path} {what}; {own}, and a run goes on from its own without this key")


def restored_line(config: RunConfig) -> str:
    return (
        f"{config.output_dir} holds this run, finished: only its record was gone. To train it anew, delete the folder"
    )


def has_leftovers(directory: Path) -> bool:
    """Whether a kill has left something in a finished run that `remove_checkpoints` would clear away."""
    names = os.listdir(directory)
    return {"checkpoints", lock.NAME} & set(names) or any(".partial-" in name or ".before-" in name for name in names)


def remove_checkpoints(directory: Path) -> None:
    """The checkpoints of a run that is finished."""
    folder = directory / "checkpoints"
    for path in [path for pattern in INSIDE["checkpoints"] for path in folder.glob(pattern)]:
        files.remove(path)
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
