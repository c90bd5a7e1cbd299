"""What stands in a run's directory: whose it is, which run, whether it is whole and still what was written.

A directory is ours if it carries our mark, and only then is anything in it removed. A finished run has
provenance.json, written last and sealed, with the sha256 of every file that is read later; its presence alone says
nothing. No torch here: tables read many records.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from discobeta import __version__, files, identity, lock
from discobeta.closure import code_hash
from discobeta.design.config import RunConfig
from discobeta.design.yaml_text import read_yaml, write_yaml
from discobeta.errors import UserError, shown

STARTED = time.monotonic()
"""When the process began to work, as near as an import can tell."""

MARK = ".discobeta.json"
"""In every directory that this package fills: by whom it was made and what in it is ours. Written first."""

THE_RUN = ("training", "log")
"""Steps whose settings a directory's run is known by. For a study those of its log do not matter: `fault`."""

EVALUATION = ("evaluation.json", "metrics.json", "examples.parquet", "generations.jsonl", "evaluation_cost.json")
"""What `discobeta evaluate` leaves in a run's directory."""

UNFINISHED = ("checkpoints", "log.jsonl", "speed.jsonl", "tracker", "config.yaml")
"""What a run that was killed goes on from."""

PARTS = (
    "provenance.json",
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

READ_LATER = ("config.yaml", "adapter", "model", "heads.safetensors", "heads.json", "log.jsonl", "cost.json")
"""Parts whose sha256 is in provenance.json."""

FOLDERS = ("model_name_or_path", "adapter_name_or_path", "tokenizer_name", "reward_model", "beta_head")
"""Run keys that may name a local folder which a run reads."""


# --- whose is it


def open_run(config: RunConfig) -> bool:
    """Whether `output_dir` is free for `config`; False if it holds this very run, finished.

    An unfinished run of the same settings is left for its checkpoint to be found. Another run, if it is finished or
    has a checkpoint, is refused, or removed with overwrite_output_dir: true, which also trains a finished run again.
    Refused in any case is what this package did not write, and what the run itself reads. Nothing is changed here: a
    run that cannot start leaves no trace, and leaves the run that it would have replaced (see `begin`).
    """
    directory = writable(config)
    if not _there(directory):
        return True
    _check_ours(directory)
    different = _difference(directory, config)
    finished = (directory / "provenance.json").exists()
    if finished and not different and not config.overwrite_output_dir:
        return False
    if different and (finished or _checkpoints(directory)) and not config.overwrite_output_dir:
        raise UserError(
            f"output_dir: {directory} holds another run ({different}); "
            "give another output_dir, or overwrite_output_dir: true"
        )
    goes_on = not different and not finished
    check_inputs(config, [directory / name for name in _there(directory) if not (goes_on and name == "checkpoints")])
    return True


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
    from discobeta.data.sources import resolve

    named = {key: getattr(config, key) for key in FOLDERS}
    if isinstance(config.resume_from_checkpoint, str):
        named["resume_from_checkpoint"] = config.resume_from_checkpoint
    found = [(key, Path(name)) for key, name in named.items() if name and os.path.exists(name)]
    made = {key: getattr(config, key) for key in ("tokenized_path", "reference_path")}  # here, if they are not there
    found += [(key, Path(name)) for key, name in made.items() if name]
    for key, split in (("dataset", config.split), ("eval_dataset", config.eval_split)):
        try:
            sources = resolve(getattr(config, key) or "", config, split)
        except UserError:  # said when the data is read
            continue
        found += [(key, source.path) for source in sources if source.path]
    return found


def begin(config: RunConfig) -> None:
    """The directory with our mark and the resolved settings in it, and nothing left of a run that this one replaces.

    To be called by the holder of the directory, after `open_run` has allowed it.
    """
    directory = Path(config.output_dir)
    goes_on = not (directory / "provenance.json").exists() and not _difference(directory, config)
    for name in _there(directory):
        if not (goes_on and name in UNFINISHED):
            files.remove(directory / name)
    left_out = {"adapter" if config.finetuning_type == "full" else "model"}
    left_out |= set() if config.report_to != "none" or "tracker" in _there(directory) else {"tracker"}
    write_mark(directory, f"discobeta train, stage {config.stage}", [name for name in PARTS if name not in left_out])
    write_yaml(config.resolved(), directory / "config.yaml")


def _difference(directory: Path, config: RunConfig) -> str:
    """In what the settings that stand in `directory` differ from the run's, e.g. `seed: 1 there, 2 here`; "" if not."""
    try:
        here = read_yaml(directory / "config.yaml")
    except UserError:
        return "its config.yaml cannot be read"
    return difference(here, config.settings_of(*THE_RUN))


def difference(here: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first of the wanted settings that is another one here; "" if there is none."""
    for name in wanted:
        if here.get(name) != wanted[name]:
            return f"{name}: {shown(here.get(name))} there, {shown(wanted[name])} here"
    return ""


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


# --- which run is it


def identity_of(config: RunConfig, facts: dict[str, str]) -> str:
    """sha256 of what decides the outcome: settings, data and base (`facts`), and the code that trains this stage."""
    settings = config.settings_of(*THE_RUN)
    text = repr((sorted(settings.items()), sorted(facts.items()), code_hash(config.stage)))
    return hashlib.sha256(text.encode()).hexdigest()


def settings_hash(config: RunConfig) -> str:
    """sha256 of the settings that decide what is trained."""
    return hashlib.sha256(repr(sorted(_trained_with(config).items())).encode()).hexdigest()


def _trained_with(config: RunConfig) -> dict[str, Any]:
    """The settings of training, without trust_remote_code, which is the reader's word."""
    return {name: value for name, value in config.settings_of("training").items() if name != "trust_remote_code"}


@cache
def package_hash() -> str:
    """sha256 over the package's source files."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def is_finished(config: RunConfig) -> bool:
    """Whether `output_dir` holds this very run, made whole by this very code of its stage."""
    directory = Path(config.output_dir)
    try:
        found = read(directory)
    except UserError:
        return False
    return not _difference(directory, config) and found.facts.get("code") == code_hash(config.stage)


# --- is it whole, and what was written


def write_provenance(
    directory: Path, config: RunConfig, facts: dict[str, Any], parts: Iterable[str] = READ_LATER
) -> None:
    """provenance.json, the last file of a run: what made it, and the sha256 of what it left in `parts`."""
    commit, dirty = source_state()
    record = {
        "stage": config.stage,
        "arm": config.arm.name,
        "seed": config.seed,
        "commit": commit,
        "dirty": dirty,
        "package": package_hash(),
        "code": code_hash(config.stage),
        "settings": settings_hash(config),
        "log": config.settings_of("log"),
        "versions": {"discobeta": __version__, "python": platform.python_version(), **_versions()},
        "machine": {"system": platform.system(), "processor": platform.machine(), "kernels": _kernels()},
        "files": manifest(directory, parts),
        **facts,
    }
    files.write_sealed(directory / "provenance.json", record)


def manifest(directory: Path, parts: Iterable[str] = READ_LATER) -> dict[str, str]:
    """File -> sha256, of what is read later of the run in `directory`."""
    found = [path for name in parts for path in _files_in(directory / name)]
    return {path.relative_to(directory).as_posix(): files.sha256(path) for path in found}


def _files_in(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []


def _kernels() -> str:
    """Which of its CPU kernels torch used: they differ in the last bit."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


@dataclass(frozen=True)
class Record:
    """A finished run, as it was written."""

    directory: Path
    config: RunConfig  # with output_dir where the run is now, and the reader's trust_remote_code and cache_dir
    facts: dict[str, Any]  # of provenance.json

    def check_base(self) -> None:
        """Refuse a run whose base, tokenizer or start adapter is not the one that it was trained on."""
        for key, hash_now in (("base", identity.weights_hash), ("tokenizer", identity.tokenizer_hash)):
            now = hash_now(self.config)
            if self.facts.get(key) != now:
                raise UserError(_changed(self.directory, key, self.facts.get(key), now, self.config.model_name_or_path))

    def check_fact(self, key: str, now: str, name: str) -> None:
        """Refuse a run that was made with another `key` (of its provenance) than `name` is now."""
        if self.facts.get(key) != now:
            raise UserError(_changed(self.directory, key, self.facts.get(key), now, name))


def _changed(directory: Path, key: str, there: Any, now: str, name: str) -> str:
    return (
        f"{directory} was trained with another {key.replace('_', ' ')} than {name} is now "
        f"(sha256 {str(there)[:12]} then, {now[:12]} now)"
    )


def read(
    directory: str | Path, *, trust_remote_code: bool = False, cache_dir: str | None = None, weights: bool = True
) -> Record:
    """The finished run in `directory`, after checking that it is what was written.

    trust_remote_code, cache_dir: the caller's word on what may run and where may be written; that of the run's config
    counts for nothing, because it came with the run.
    weights: False leaves weight files unread, for those who read none.
    Raises UserError, in one line that names the file, for a run that is unfinished, or damaged.
    """
    directory = Path(directory)
    facts = read_facts(directory, weights=weights)
    settings = read_yaml(directory / "config.yaml")
    settings |= {"trust_remote_code": trust_remote_code, "cache_dir": cache_dir}
    config, _ = RunConfig.from_mapping(settings, str(directory / "config.yaml"))
    return Record(directory, config.replace(output_dir=str(directory)), facts)


def read_facts(directory: Path, *, weights: bool) -> dict[str, Any]:
    """provenance.json of a finished run, after checking that its files are those that were written."""
    for name in ("config.yaml", "provenance.json"):
        if not (directory / name).is_file():
            raise UserError(f"{directory} is not a finished run of discobeta: it has no {name}")
    facts = files.read_sealed(directory / "provenance.json")
    written = facts.get("files")
    if not isinstance(written, dict):
        raise UserError(f"{directory}/provenance.json lists no files: it is of another version of discobeta")
    for name, digest in written.items():
        if (weights or not name.endswith(identity.WEIGHTS)) and identity.file_hash(directory / name) != digest:
            raise UserError(f"{directory / name} was changed after the run was finished: train it again")
    for path in [path for name in ("adapter", "model") for path in _files_in(directory / name)]:
        if path.relative_to(directory).as_posix() not in written and path.suffix in (*identity.WEIGHTS, ".json", ".py"):
            raise UserError(f"{path} was put there after the run was finished: move it away")
    return facts


def write_evaluation(directory: Path, config: RunConfig, measured: dict[str, Any], facts: dict[str, str]) -> None:
    """evaluation.json, which says what of which run was measured and how, and then metrics.json, whose presence says
    that it was measured whole.

    config: with the settings of this evaluation.
    """
    text = files.json_text(measured)
    written = {name: files.sha256(directory / name) for name in EVALUATION[2:] if (directory / name).is_file()}
    written["metrics.json"] = hashlib.sha256(text.encode()).hexdigest()
    run = files.sha256(directory / "provenance.json")
    settings = config.settings_of("evaluation")
    record = {"run": run, "settings": settings, "files": written, "kernels": _kernels(), **facts}
    files.write_sealed(directory / "evaluation.json", record)
    files.write_text(directory / "metrics.json", text)


def measurement_fault(directory: Path, wanted: RunConfig | None = None) -> str | None:
    """Why the metrics in `directory` are not to be read, in a few words; None if they are those of its run.

    wanted: the config whose settings of evaluation they must have been made with.
    """
    if not (directory / "metrics.json").is_file():
        return "not evaluated"
    try:
        found = files.read_sealed(directory / "evaluation.json")
        if found.get("run") != files.sha256(directory / "provenance.json"):
            return "evaluated before it was trained again"
        if wanted and not isinstance(found.get("settings"), dict):
            return "evaluated by another version of discobeta"
        if wanted and (different := difference(found["settings"], wanted.settings_of("evaluation"))):
            return f"evaluated with other settings ({different})"
        for name, digest in dict(found["files"]).items():
            if files.sha256(directory / name) != digest:
                return f"damaged: {name} was changed after the evaluation"
    except (KeyError, TypeError, ValueError):
        return "damaged: evaluation.json"
    except UserError as error:
        return f"damaged: {error}"
    return None


def fault(directory: Path, wanted: RunConfig, *, weights: bool = False) -> str | None:
    """Why `directory` does not hold the finished run `wanted`, in a few words; None if it does.

    A log that is written more often, or less, makes no other run of it.
    weights: whether weight files are read too.
    """
    directory = Path(directory)
    if not (directory / "provenance.json").exists():
        return "not finished" if (directory / "log.jsonl").exists() else "not trained"
    try:
        if read_facts(directory, weights=weights).get("settings") == settings_hash(wanted):
            return None  # config.yaml is what it was, by its sha256, and thirty times as slow to read
        found = read(directory, weights=weights)
    except UserError as error:
        return f"damaged: {error}"
    if different := difference(found.config.resolved(), _trained_with(wanted)):
        return f"stale: {different}"
    return None


@cache
def source_state() -> tuple[str | None, bool | None]:
    """The commit of the package's checkout and whether package files differ from it; None outside git."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", str(root)))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _versions() -> dict[str, str]:
    names = ["torch", "transformers", "peft", "trl", "accelerate", "tokenizers", "datasets", "safetensors", "numpy"]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
