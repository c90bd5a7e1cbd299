"""What stands in a run's directory: which run, whether it is whole and still what was written.

A finished run has provenance.json, written last and sealed, with the sha256 of every file that is read later; its
presence alone says nothing. No torch here: tables read many records.
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

from discobeta import __version__, files, identity
from discobeta.closure import code_hash
from discobeta.design.config import RunConfig
from discobeta.design.yaml_text import read_yaml
from discobeta.errors import UserError, shown

STARTED = time.monotonic()
"""When the process began to work, as near as an import can tell."""

THE_RUN = ("training", "log")
"""Steps whose settings a directory's run is known by. For a study those of its log do not matter: `fault`."""

EVALUATION = ("evaluation.json", "metrics.json", "examples.parquet", "generations.jsonl", "evaluation_cost.json")
"""What `discobeta evaluate` leaves in a run's directory."""

AGAIN = ".finished.json"
"""provenance.json once more. A workflow removes what a job makes when the job is killed before its end is noted, or is
done again; then this says that the run is finished: `restore`."""

READ_LATER = ("config.yaml", "adapter", "model", "heads.safetensors", "heads.json", "log.jsonl", "cost.json")
"""Parts whose sha256 is in provenance.json."""


def difference_in(directory: Path, config: RunConfig) -> str:
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


# --- which run is it


def identity_of(config: RunConfig, facts: dict[str, str]) -> str:
    """sha256 of what decides the outcome: settings, data and base (`facts`), and the code that trains this stage."""
    settings = config.settings_of(*THE_RUN)
    text = repr((sorted(settings.items()), sorted(facts.items()), code_hash(config.stage)))
    return hashlib.sha256(text.encode()).hexdigest()


def settings_hash(config: RunConfig) -> str:
    """sha256 of the settings that decide what is trained."""
    return hashlib.sha256(repr(sorted(trained_with(config).items())).encode()).hexdigest()


def trained_with(config: RunConfig) -> dict[str, Any]:
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
        run = read(directory)
    except UserError:
        return False
    return not difference_in(directory, config) and run.facts.get("code") == code_hash(config.stage)


# --- is it whole, and what was written


def write_provenance(
    directory: Path, config: RunConfig, facts: dict[str, Any], parts: Iterable[str] = READ_LATER
) -> None:
    """provenance.json, the last file of a run: what made it, and the sha256 of what it left in `parts`."""
    _name_base(directory / "adapter" / "adapter_config.json", config)
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
    files.write_sealed(directory / AGAIN, record)
    files.write_sealed(directory / "provenance.json", record)


def _name_base(description: Path, config: RunConfig) -> None:
    """Have an adapter name its base so that plain PEFT finds it from any working directory: a local one by its whole
    path, one of the hub by its id and revision.

    Done here, before the adapter is sealed, as no weight and no result depends on it.
    """
    if not description.is_file():
        return
    if Path(config.model_name_or_path).is_dir():
        named = {"base_model_name_or_path": os.path.abspath(config.model_name_or_path)}
    else:
        named = {"base_model_name_or_path": config.model_name_or_path}
        named |= {"revision": config.model_revision} if config.model_revision != "main" else {}
    files.write_json(description, files.read_mapping(description) | named)


def restore(directory: Path, config: RunConfig, facts: dict[str, Any], processes: int | None = None) -> bool:
    """Bring provenance.json back where nothing but that is gone of this very run; False, and nothing done, if not.

    The same run: its settings, those of its log too, code, number of processes, and `facts`, which say what it is
    made from; and every file is what it was. What has to be done over is then nothing.
    """
    if (directory / "provenance.json").exists():  # it is to be trained again
        return False
    same = {"settings": settings_hash(config), "code": code_hash(config.stage), "log": config.settings_of("log")}
    try:
        before = files.read_sealed(directory / AGAIN)
        written = dict(before["files"])
        if any(before.get(name) != value for name, value in (same | facts).items()):
            return False
        if any(files.sha256(directory / name) != digest for name, digest in written.items()):
            return False
        if processes and files.read_mapping(directory / "cost.json").get("processes") != processes:
            return False
    except (UserError, KeyError, TypeError, ValueError):
        return False
    files.write_sealed(directory / "provenance.json", before)
    return True


def manifest(directory: Path, parts: Iterable[str] = READ_LATER) -> dict[str, str]:
    """File -> sha256, of what is read later of the run in `directory`."""
    paths = [path for name in parts for path in _files_in(directory / name)]
    return {path.relative_to(directory).as_posix(): files.sha256(path) for path in paths}


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
    written_to: str = ""  # `output_dir` when it was trained

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
    return Record(directory, config.replace(output_dir=str(directory)), facts, config.output_dir)


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


def cost(seconds: float, startup_seconds: float, counts: dict[str, int], device: str, processes: int) -> dict[str, Any]:
    """cost.json: what training took, over all attempts: time, throughput of what was counted, memory.

    startup_seconds: from the start of the last attempt to its first step; device: cpu or cuda.
    """
    import resource

    import torch

    on_gpu = device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "startup_seconds": startup_seconds,
        **counts,
        **{f"{name}_per_second": count / seconds for name, count in counts.items()},
        "peak_memory_bytes": peak,
        "gpu_seconds": seconds * processes if on_gpu else 0.0,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "processes": processes,
    }


def write_evaluation(
    directory: Path, config: RunConfig, measured: dict[str, Any], facts: dict[str, Any], run: Path
) -> None:
    """evaluation.json, which says what of which run was measured and how, and then metrics.json, whose presence says
    that it was measured whole.

    config: with the settings of this evaluation; run: the directory of the run that was measured.
    """
    text = files.json_text(measured)
    written = {name: files.sha256(directory / name) for name in EVALUATION[2:] if (directory / name).is_file()}
    written["metrics.json"] = hashlib.sha256(text.encode()).hexdigest()
    measured_run = files.sha256(run / "provenance.json")
    settings = config.settings_of("evaluation")
    record = {"run": measured_run, "settings": settings, "files": written, "kernels": _kernels(), **facts}
    files.write_sealed(directory / "evaluation.json", record)
    files.write_text(directory / "metrics.json", text)


def measurement_fault(directory: Path, wanted: RunConfig | None = None) -> str | None:
    """Why the metrics in `directory` are not to be read, in a few words; None if they are those of its run.

    wanted: the config whose settings of evaluation they must have been made with.
    """
    if not (directory / "metrics.json").is_file():
        return "not evaluated"
    try:
        evaluation = files.read_sealed(directory / "evaluation.json")
        if evaluation.get("run") != files.sha256(directory / "provenance.json"):
            return "evaluated before it was trained again"
        if wanted and not isinstance(evaluation.get("settings"), dict):
            return "evaluated by another version of discobeta"
        if wanted and (different := difference(evaluation["settings"], wanted.settings_of("evaluation"))):
            return f"evaluated with other settings ({different})"
        for name, digest in dict(evaluation["files"]).items():
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
        run = read(directory, weights=weights)
    except UserError as error:
        return f"damaged: {error}"
    if different := difference(run.config.resolved(), trained_with(wanted)):
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
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
