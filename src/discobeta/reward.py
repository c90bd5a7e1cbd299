"""Reward models as judges of single responses: runs of this project, PEFT adapters, whole models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from discobeta import identity, runs
from discobeta.config import RunConfig
from discobeta.data.batches import longest_first, pack
from discobeta.data.formats import Example
from discobeta.data.sources import RowReport
from discobeta.data.tokens import encode
from discobeta.errors import UserError, enough_memory, telling
from discobeta.files import read_mapping
from discobeta.heads import SIGMA0, Heads
from discobeta.policy import adapter_weights, load_adapter, load_scorer, load_tokenizer
from discobeta.preflight import check_ids, check_lengths, name_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from discobeta.stages.rm import RewardModelling


@dataclass
class RewardModel:
    """A trained reward model: a transformers (or PEFT) model, its heads, and `score`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Heads
    config: RunConfig
    stage: RewardModelling
    fingerprint: str
    """sha256 over its weight files."""

    def score(self, prompts: list[str], responses: list[str], batch_size: int = 64) -> tuple[Tensor, Tensor | None]:
        """(N,) float32 mean rewards and variances of N texts; variance is None where a reward is a number.

        Raises UserError for a text that cannot be scored, e.g. a prompt that fills cutoff_len.
        """
        pairs = zip(prompts, responses, strict=True)
        examples = [Example(prompt, response, source=f"text {i}") for i, (prompt, response) in enumerate(pairs)]
        report = RowReport("texts", len(examples))
        found = encode(examples, self.tokenizer, self.config.cutoff_len, "supervised", report)
        report.check(0.0)
        return self.score_ids(found.prompt_ids, found.chosen_ids, batch_size)

    @enough_memory("scoring", "the batch size or cutoff_len")
    @torch.no_grad()
    def score_ids(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], batch_size: int = 64
    ) -> tuple[Tensor, Tensor | None]:
        """`score` of N prompts and responses as token ids; results on the CPU."""
        device = next(self.stage.parameters()).device
        lengths = np.array([len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)])
        check_ids(self.stage.model, [*prompts, *responses], name_of(self.stage.model))
        check_lengths(self.stage.model, lengths, name_of(self.stage.model))
        means, log_sigmas = torch.empty(len(lengths)), None
        for indices in longest_first(lengths, batch_size):
            batch = pack([prompts[i] for i in indices], [responses[i] for i in indices])
            mean, log_sigma = self.stage.rewards(batch.to(device))
            means[indices] = mean.float().cpu()
            if log_sigma is not None:
                log_sigmas = torch.empty_like(means) if log_sigmas is None else log_sigmas
                log_sigmas[indices] = log_sigma.cpu()
        return means, None if log_sigmas is None else (SIGMA0 * log_sigmas.exp()).square()


def load_reward_model(source: str | Path, **settings) -> RewardModel:
    """A reward model, frozen, on the CPU, from any of

    - the directory of an rm run of this project (its base, its adapter, its heads),
    - a PEFT adapter with a `score` (a directory or a hub id), on the base that it names,
    - a model for sequence classification with one output, `score` (a directory or a hub id).

    settings: run keys that say how the latter two are loaded (bf16, flash_attn, cutoff_len, ...), and
    trust_remote_code and cache_dir, which hold for all three; what a run's own config says of these counts for nothing.
    Raises UserError for anything else, for one that has no score of its own, and for a run that is unfinished or
    damaged, or whose base has changed.
    """
    from discobeta.stages.rm import RewardModelling

    folder = Path(source)
    if (folder / "config.yaml").exists():
        reader = {key: settings[key] for key in ("trust_remote_code", "cache_dir") if key in settings}
        stage = runs.load_stage(runs.read_of(folder, "rm", **reader))
        weights = [part for part in (folder / "adapter", folder / "model") if part.exists()]
    else:
        config, adapter, weights = _foreign(str(source), settings)
        stage = RewardModelling(config, _with_score(config, adapter), Heads()).eval()
    stage.requires_grad_(False)
    tokenizer = load_tokenizer(stage.config)
    return RewardModel(stage.model, tokenizer, stage.heads, stage.config, stage, identity.folders_hash(*weights))


def loading(config: RunConfig) -> dict:
    """The settings of a run that a reward model of another make is loaded with."""
    return {
        name: getattr(config, name) for name in ("bf16", "flash_attn", "cache_dir", "trust_remote_code", "cutoff_len")
    }


def _foreign(source: str, settings: dict) -> tuple[RunConfig, str | None, list[Path]]:
    """The config that loads a reward model of another make, its adapter if it is one, and where its weights are."""
    from transformers.utils import cached_file

    identity.check_local(source, "reward_model")
    base, weights = source, []
    for name in ("adapter_config.json", "config.json"):
        with telling(f"reward_model: cannot load {source}"):
            found = cached_file(
                source, name, cache_dir=settings.get("cache_dir"), _raise_exceptions_for_missing_entries=False
            )
        if found is not None:
            weights.append(Path(found).parent)
            break
    else:
        raise UserError(
            f"reward_model: {source} is no run of stage rm, no PEFT adapter and no transformers model "
            "(it has no config.yaml, no adapter_config.json and no config.json)"
        )
    is_adapter = name == "adapter_config.json"
    if is_adapter:
        base = read_mapping(weights[0] / "adapter_config.json").get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            raise UserError(f"reward_model: {source}/adapter_config.json names no base model")
    config, _ = RunConfig.from_mapping({"stage": "rm", **settings, "model_name_or_path": base}, "reward_model")
    return config, str(weights[0]) if is_adapter else None, weights


def _with_score(config: RunConfig, adapter: str | None) -> torch.nn.Module:
    """The model, which must bring a trained score along: a fresh one would be noise."""
    if adapter is None:
        return load_scorer(config, must_have_score=True)
    if not any(name.endswith("score.weight") for name in adapter_weights(Path(adapter))):
        raise UserError(f"reward_model: the adapter {adapter} has no `score` (a reward model's last layer)")
    return load_adapter(load_scorer(config), Path(adapter))
