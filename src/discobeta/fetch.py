"""What a study takes from the hub, downloaded ahead: compute nodes often have no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from discobeta.config import RunConfig
from discobeta.data.sources import resolve
from discobeta.errors import UserError
from discobeta.study import Study

PARTS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
"""Of a model's files: weights in one format, and what is needed to load them."""


def fetch(study: Study) -> None:
    """Leave models, tokenizers and data of every kind of run in the hub's cache, and say what is there.

    Local files are read too, so that one that is missing is missed here and not on a node. Raises
    UserError for what cannot be had.
    """
    models: dict[tuple, None] = {}
    rows: dict[tuple, tuple] = {}
    for config in configs(study):
        for name in filter(None, (config.model_name_or_path, config.tokenizer_name, config.adapter_name_or_path)):
            if not Path(name).is_relative_to(study.directory):  # what the study makes itself is no download
                models[name, config.model_revision, config.cache_dir] = None
        if not study.world:
            for names, split in ((config.dataset, config.split), (config.eval_dataset, config.eval_split)):
                rows |= {(source.name, source.split): (source, config) for source in _sources(names, split, config)}
    for model in models:
        print(f"{model[0]}: {_model(*model)}")
    for source, config in rows.values():
        print(f"{source.name}{f' ({source.split})' if source.hub else ''}: {len(source.rows(config)):,} rows")


def configs(study: Study) -> Iterator[RunConfig]:
    """One config for each kind of run: the base's, if it is trained here, and one of each stage."""
    settings = [study.base_settings()] if study.sft else []
    settings += [study.run_settings(next(run for run in study.runs() if run.stage == stage)) for stage in study.stages]
    return (RunConfig.from_mapping(each)[0] for each in settings)


def _sources(names: str | None, split: str, config: RunConfig):
    return resolve(names, config, split) if names else []


def _model(name: str, revision: str, cache_dir: str | None) -> str:
    """The folder of a model, downloaded if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if Path(name).is_dir():
        return "a local folder"
    try:
        return snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=PARTS)
    except HFValidationError:
        raise UserError(f"model_name_or_path: there is no directory {name}, and no hub model has such a name") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"cannot fetch {name}: {str(error).strip().splitlines()[0]}") from None
