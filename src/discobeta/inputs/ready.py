"""What a study needs that a run would miss an hour later: models, data, packages, a GPU. Nothing is downloaded here."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from discobeta.data.sources import Source, check_apart, named, resolve
from discobeta.design.config import RunConfig
from discobeta.design.study import Study
from discobeta.errors import UserError
from discobeta.identity import check_local
from discobeta.inputs.fetch import configs

GPUS = Path("/proc/driver/nvidia/gpus")
"""Where Linux lists NVIDIA's: to look costs nothing, and torch takes seconds to say the same."""


@dataclass(frozen=True)
class Need:
    """One thing that a study needs. here; fetch: from the hub, by `discobeta fetch` or the first job; missing: local,
    and not there; note: a machine without it plans, and other ones run."""

    state: Literal["here", "fetch", "missing", "note"]
    text: str

    @property
    def line(self) -> str:
        return f"{self.state:8} {self.text}"


def needs(study: Study) -> list[Need]:
    """Everything that the study reads and does not make itself, each once."""
    found = [need for config in configs(study) for need in (*_models(study, config), *_data(study, config))]
    return list(dict.fromkeys([*found, *_environment(study), *_devices(study)]))


def _models(study: Study, config: RunConfig) -> Iterator[Need]:
    for key in ("model_name_or_path", "adapter_name_or_path", "tokenizer_name"):
        name = getattr(config, key)
        if not name or Path(name).is_relative_to(study.directory):
            continue
        if os.path.isdir(name):
            member = {"model_name_or_path": "config.json", "adapter_name_or_path": "adapter_config.json"}.get(key)
            parts = {"model_name_or_path": "model", "adapter_name_or_path": "adapter"}
            places = [Path(name), Path(name, parts.get(key, ""))]
            if member and not any((place / member).is_file() for place in places):
                yield Need("missing", f"{key}: {name} is a folder without {member}")
            else:
                yield Need("here", f"{key}: {name}, a local folder")
            continue
        try:
            check_local(name, key)
        except UserError as error:
            yield Need("missing", str(error))
            continue
        is_cached = _is_cached("models", name, config.cache_dir)
        yield Need("here" if is_cached else "fetch", f"{key}: {name}, {_of_the_hub(is_cached)}")
    truth = config.ground_truth
    if truth not in ("none", "world") and not Path(truth).is_relative_to(study.directory):
        yield Need("here" if Path(truth).is_file() else "missing", f"ground_truth: {truth}")


def _data(study: Study, config: RunConfig) -> Iterator[Need]:
    for key, (names, split) in named(config).items():
        if all(Path(name).is_relative_to(study.directory) for name in names.split(",")):
            continue  # of a world, which the study makes
        try:
            for source in resolve(names, config, split):
                yield _rows(key, source, config)
        except UserError as error:
            yield Need("missing", _of(key, str(error)))
    try:
        check_apart(config)
    except UserError as error:
        if not str(error).startswith("dataset"):  # the others have been said
            yield Need("missing", str(error))


def _rows(key: str, source: Source, config: RunConfig) -> Need:
    if source.path:
        return Need("here", f"{key}: {source.path}")
    is_cached = _is_cached("datasets", source.hub, config.cache_dir)
    where = f"{source.hub}, split {source.split}, {_of_the_hub(is_cached)}"
    return Need("here" if is_cached else "fetch", f"{key}: {where}")


def _of(key: str, text: str) -> str:
    return text if text.startswith(key) else f"{key}: {text.removeprefix('dataset: ').removeprefix('dataset ')}"


def _of_the_hub(is_cached: bool) -> str:
    return "of the hub, in its cache" if is_cached else "of the hub: discobeta fetch, or a network for the first job"


def _is_cached(kind: str, name: str, cache_dir: str | None) -> bool:
    """Whether anything of a hub id is in the hub's cache, or, of data, in that of `datasets`."""
    from huggingface_hub import constants

    folder = f"{kind}--{name.replace('/', '--')}"
    if any(Path(place, folder, "snapshots").is_dir() for place in filter(None, (cache_dir, constants.HF_HUB_CACHE))):
        return True
    made = cache_dir or os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
    return kind == "datasets" and Path(made, name.replace("/", "___").lower()).is_dir()


def _environment(study: Study) -> Iterator[Need]:
    """The packages that ours requires, in the versions that it requires; the conda environment that the study names."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("discobeta") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    wrong, count = [], 0
    for requirement in map(Requirement, required):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is installed, and {requirement.specifier} is required")
    if wrong:
        yield Need("missing", f"packages: {'; '.join(wrong)}")
    elif required:
        yield Need("here", f"packages: the {count} that discobeta requires")
    folder = Path("envs")
    if folder.is_dir() and not (folder / f"{study.environment}.yaml").is_file():
        yield Need("missing", f"environment: there is no {folder / study.environment}.yaml")


def _devices(study: Study) -> Iterator[Need]:
    asks = [run.stage for run in study.largest_runs() if study.config(run).bf16]
    if not asks and study.gpus_per_run == 1:
        return
    there = len(os.listdir(GPUS)) if GPUS.is_dir() else 0
    wanted = f"{study.gpus_per_run} GPU{'s' * (study.gpus_per_run > 1)} for each run"
    asked = f"{wanted}, gpus_per_run" if study.gpus_per_run > 1 else f"a GPU, by bf16 of {', '.join(asks)}"
    if there < study.gpus_per_run:
        has = f"{there} of them" if there else "none"
        yield Need(
            "note", f"device: {asked}; this machine has {has}, so run it on one that has, or expect it to be slow"
        )
    else:
        yield Need("here", f"device: {asked}; this machine has {there}")
