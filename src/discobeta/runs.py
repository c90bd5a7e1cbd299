"""Finished runs, given back as ordinary objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discobeta import record
from discobeta.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from discobeta.heads import Heads
    from discobeta.record import Record
    from discobeta.stages import Stage


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
    from discobeta.policy import load_tokenizer

    policies = [row.name for row in STAGES.values() if row.is_policy]
    stage = load_stage(read_of(directory, *policies, trust_remote_code=trust_remote_code, cache_dir=cache_dir))
    return Policy(stage.model, load_tokenizer(stage.config), stage.heads, stage.config)


def read_of(directory: str | Path, *kinds: str, **reader: Any) -> Record:
    """`record.read` of a run that must be of one of these stages, on the base that it was trained on."""
    found = record.read(directory, **reader)
    if found.config.stage not in kinds:
        raise UserError(f"{directory} is a run of stage {found.config.stage}, not {' or '.join(kinds)}")
    found.check_base()
    return found


def load_stage(found: Record) -> Stage:
    """The trained stage of a run, in evaluation mode, on the CPU."""
    from discobeta.stages import stage_class

    return stage_class(found.config.stage).trained(found.config, found.directory)
