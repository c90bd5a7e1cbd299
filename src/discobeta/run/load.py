"""Finished runs, given back as ordinary objects: record -> model. Nothing in a stage imports this."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discobeta import identity, record
from discobeta.design.config import RunConfig
from discobeta.design.stages import REWARD_STAGE, STAGES
from discobeta.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from discobeta.method.heads import Heads
    from discobeta.method.reward import RewardModel
    from discobeta.method.stage import Stage
    from discobeta.record import Record


@dataclass
class Policy:
    """A trained policy: a transformers model (with a PEFT adapter, if it has one) and its heads."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Heads
    config: RunConfig


def load_policy(directory: str | Path, *, trust_remote_code: bool = False, cache_dir: str | None = None) -> Policy:
    """The policy of a dpo or ppo run directory.

    trust_remote_code: whether code that comes with the run's base may be run; cache_dir: the hub's cache. What the
    run's own config says of these counts for nothing. Raises UserError for a run that is unfinished or damaged, or
    whose base has changed.
    """
    from discobeta.model.pretrained import load_tokenizer

    policies = [row.name for row in STAGES.values() if row.is_policy]
    stage = load_stage(read_run(directory, *policies, trust_remote_code=trust_remote_code, cache_dir=cache_dir))
    return Policy(stage.model, load_tokenizer(stage.config), stage.heads, stage.config)


def read_run(directory: str | Path, *stages: str, **reader: Any) -> Record:
    """`record.read` of a run that must be of one of these stages, on the base that it was trained on."""
    run = record.read(directory, **reader)
    if run.config.stage not in stages:
        raise UserError(f"{directory} is a run of stage {run.config.stage}, not {' or '.join(stages)}")
    run.check_base()
    return run


def load_stage(run: Record) -> Stage:
    """The trained stage of a run, in evaluation mode, on the CPU."""
    from discobeta.method.stage import stage_class

    return stage_class(run.config.stage).trained(run.config, run.directory)


def load_reward_model(source: str | Path, **settings) -> RewardModel:
    """A reward model, frozen, on the CPU, from any of

    - the directory of an rm run of this project (its base, its adapter, its heads),
    - a PEFT adapter with a `score` (a directory or a hub id), on the base that it names,
    - a model for sequence classification with one output, `score` (a directory or a hub id),
    - a reward model of LLaMA-Factory, a language model or an adapter with a value head (a directory or a hub id).

    settings: run keys that say how the others than ours are loaded (bf16, flash_attn, cutoff_len, ...), and
    trust_remote_code and cache_dir, which hold for all; what a run's own config says of these counts for nothing.
    Raises UserError for anything else, for one that has no score of its own, and for a run that is unfinished or
    damaged, or whose base has changed.
    """
    from discobeta.method import judges
    from discobeta.method.heads import Heads
    from discobeta.method.reward import RewardModel
    from discobeta.method.stage import stage_class
    from discobeta.model.pretrained import load_tokenizer

    folder = Path(source)
    if (folder / "config.yaml").exists():
        reader = {key: settings[key] for key in ("trust_remote_code", "cache_dir") if key in settings}
        stage = load_stage(read_run(folder, REWARD_STAGE, **reader))
        weights = [part for part in (folder / "adapter", folder / "model") if part.exists()]
    else:
        config, model, weights = judges.load(str(source), settings)
        stage = stage_class(REWARD_STAGE)(config, model, Heads()).eval()
    stage.requires_grad_(False)
    tokenizer = load_tokenizer(stage.config)
    return RewardModel(stage.model, tokenizer, stage.heads, stage.config, stage, identity.folders_hash(*weights))


def load_reward_models(config: RunConfig) -> list[RewardModel]:
    """Those that `reward_model` of a run names, in its order."""
    return [load_reward_model(name, **judge_settings(config)) for name in config.reward_models]


def judge_settings(config: RunConfig) -> dict:
    """The settings of a run that a reward model of another make is loaded with."""
    return {
        name: getattr(config, name) for name in ("bf16", "flash_attn", "cache_dir", "trust_remote_code", "cutoff_len")
    }


def given(config: RunConfig) -> dict[str, Any]:
    """Run key -> what a run of `config` is given by runs of earlier stages: `RewardModel`s, or their `Heads`."""
    from discobeta.method import heads

    inputs: dict[str, Any] = {}
    for reading in STAGES[config.stage].reads:
        if reading.idea is None:
            inputs[reading.key] = load_reward_models(config)
        elif getattr(config, reading.key) and config.arm.has(reading.idea):
            inputs[reading.key] = heads.load(Path(getattr(config, reading.key)))
    return inputs
