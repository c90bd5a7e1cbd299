"""What a study takes from the hub, downloaded ahead: compute nodes often have no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from discobeta.data.sources import named, resolve
from discobeta.design.config import RunConfig
from discobeta.errors import UserError, telling
from discobeta.identity import check_local

if TYPE_CHECKING:  # a run downloads its base, too, and loads no study
    from discobeta.design.study import Study

PARTS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "value_head.bin"]
"""The files of a model: weights in one format, and what is needed to load them."""
OLDER = ["pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin"]
"""Weights of the format before, which are taken where there are none in the other."""


def fetch(study: Study) -> None:
    """Leave models, tokenizers and data of every kind of run in the hub's cache, and say what is there.

    Local files are read too, so that one that is missing is missed here and not on a node. Raises
    UserError for what cannot be had.
    """
    models: dict[tuple, str] = {}
    rows: dict[tuple, tuple] = {}
    for config in configs(study):
        for key in ("model_name_or_path", "tokenizer_name", "adapter_name_or_path"):
            name = getattr(config, key)
            if name and not Path(name).is_relative_to(study.directory):  # what the study makes itself is no download
                models.setdefault((name, config.model_revision, config.cache_dir), key)
        if not study.world:
            for names, split in named(config).values():
                rows |= {(source.name, source.split): (source, config) for source in resolve(names, config, split)}
    for model, key in models.items():
        print(f"{model[0]}: {download(*model, key)}")
    for source, config in rows.values():
        print(f"{source.name}{f' ({source.split})' if source.hub else ''}: {len(source.rows(config)):,} rows")


def configs(study: Study) -> Iterator[RunConfig]:
    """One config for each kind of run: the base's, if it is trained here, and one of each stage."""
    settings = [study.base_settings()] if study.sft else []
    settings += [study.run_settings(next(run for run in study.runs() if run.stage == stage)) for stage in study.stages]
    return (RunConfig.from_mapping(each)[0] for each in settings)


def download(name: str, revision: str, cache_dir: str | None, key: str) -> str:
    """The folder of a model, downloaded if need be; run key `key` names it.

    What there is is seen in the folder, as a cache without a network can list nothing else.
    """
    from huggingface_hub import snapshot_download

    if os.path.isdir(name):
        return "a local folder"
    check_local(name, key)
    with telling(f"{key}: cannot fetch {name}"):  # the hub's client has dozens of classes
        folder = snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=PARTS)
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=PARTS + OLDER)
    if key != "tokenizer_name" and not any(any(Path(folder).glob(part)) for part in ("*.safetensors", *OLDER)):
        raise UserError(f"{key}: {name} has no weights that transformers loads (*.safetensors or {', '.join(OLDER)})")
    return folder
