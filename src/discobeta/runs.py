"""A run's directory: opened, finished, and given back as ordinary objects."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discobeta import __version__
from discobeta.config import RunConfig, read_yaml, write_yaml
from discobeta.errors import UserError
from discobeta.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from discobeta.heads import Heads
    from discobeta.stages import Stage

STARTED = time.monotonic()
"""When the process began to work, as near as an import can tell."""

NOT_THE_RUN = frozenset(
    [
        "output_dir",
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "report_to",
        "run_name",
        "plot_loss",
        "save_steps",
        "cache_dir",
    ]
)
"""Settings that change how a run is done and not what comes out."""

PARTS = [
    "config.yaml",
    "adapter",
    "model",
    "heads.safetensors",
    "heads.json",
    "log.jsonl",
    "speed.jsonl",
    "loss.png",
    "metrics.json",
    "examples.parquet",
    "generations.jsonl",
    "cost.json",
    "evaluation_cost.json",
    "provenance.json",
    "checkpoints",
    "tracker",
]
"""What belongs to one run in its directory; nothing else in it is touched."""


def open_run(config: RunConfig) -> bool:
    """Whether `output_dir` is free for `config`; False if it holds this very run, finished.

    An unfinished run of the same settings is left for its checkpoint to be found. Another run, if it
    is finished or has a checkpoint, is refused, or removed with overwrite_output_dir: true, which
    also trains a finished run again. Nothing is changed here: a run that cannot start leaves no
    trace, and leaves the run that it would have replaced (see `begin`).
    """
    if not config.output_dir:
        raise UserError("output_dir is missing: where the run is to be written")
    directory = Path(config.output_dir)
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"output_dir: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise UserError(f"output_dir: {existing} may not be written to")
    if not (directory / "config.yaml").exists():
        return True
    here, wanted = _identity(read_yaml(directory / "config.yaml")), _identity(config.resolved())
    different = [name for name in wanted if here.get(name) != wanted[name]]
    finished = (directory / "provenance.json").exists()
    precious = finished or any((directory / "checkpoints").glob("step-*.pt"))
    if not different and finished and not config.overwrite_output_dir:
        return False
    if different and precious and not config.overwrite_output_dir:
        name = different[0]
        raise UserError(
            f"output_dir: {directory} holds another run ({name}: {here.get(name)!r} there, {wanted[name]!r} here); "
            "give another output_dir, or overwrite_output_dir: true"
        )
    return True


def is_finished(config: RunConfig) -> bool:
    """Whether `output_dir` holds this very run, made whole by this very code."""
    directory = Path(config.output_dir)
    try:
        here = read_yaml(directory / "config.yaml")
        made_by = read_json(directory / "provenance.json")["package"]
    except UserError:
        return False
    return _identity(here) == _identity(config.resolved()) and made_by == package_hash()


def begin(config: RunConfig) -> None:
    """The directory with the resolved settings in it, and nothing left of a run that this one replaces."""
    directory = Path(config.output_dir)
    before = directory / "config.yaml"
    is_other = before.exists() and _identity(read_yaml(before)) != _identity(config.resolved())
    if is_other or (directory / "provenance.json").exists():
        _clear(directory)
    write_yaml(config.resolved(), before)


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in NOT_THE_RUN}


def _clear(directory: Path) -> None:
    for name in PARTS:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def identity(config: RunConfig, facts: dict[str, str]) -> str:
    """sha256 of what decides the outcome: settings, data and base (`facts`), and this package's code."""
    text = repr((sorted(_identity(config.resolved()).items()), sorted(facts.items()), package_hash()))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def package_hash() -> str:
    """sha256 over the package's source files."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def write_provenance(directory: Path, config: RunConfig, facts: dict[str, Any]) -> None:
    """provenance.json, the last file of a run: its presence says that the run is whole."""
    commit, dirty = source_state()
    record = {
        "stage": config.stage,
        "arm": config.arm.name,
        "seed": config.seed,
        "commit": commit,
        "dirty": dirty,
        "package": package_hash(),
        "versions": {"discobeta": __version__, "python": platform.python_version(), **_versions()},
        "machine": {"system": platform.system(), "processor": platform.machine()},
        **facts,
    }
    write_json(directory / "provenance.json", record)


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


def read_run(directory: str | Path) -> RunConfig:
    """The settings of a finished run."""
    directory = Path(directory)
    for name in ("config.yaml", "provenance.json"):
        if not (directory / name).exists():
            raise UserError(f"{directory} is not a finished run of discobeta: it has no {name}")
    return RunConfig.from_mapping(read_yaml(directory / "config.yaml"), str(directory / "config.yaml"))[0]


def load_stage(directory: str | Path) -> Stage:
    """The trained stage of a run directory, in evaluation mode, on the CPU."""
    from discobeta.stages import stage_class

    config = read_run(directory)
    return stage_class(config.stage).trained(config, Path(directory))


@dataclass
class Policy:
    """A trained policy: a transformers model (with a PEFT adapter, if it has one) and its heads."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Heads
    config: RunConfig


def load_policy(directory: str | Path) -> Policy:
    """The policy of a dpo or ppo run directory."""
    from discobeta.policy import load_tokenizer

    stage = stage_of(directory, "dpo", "ppo")
    return Policy(stage.model, load_tokenizer(stage.config), stage.heads, stage.config)


def stage_of(directory: str | Path, *kinds: str) -> Stage:
    """`load_stage` of a run that must be of one of these stages."""
    stage = load_stage(directory)
    if stage.config.stage not in kinds:
        raise UserError(f"{directory} is a run of stage {stage.config.stage}, not {' or '.join(kinds)}")
    return stage


def remove_checkpoints(directory: Path) -> None:
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
