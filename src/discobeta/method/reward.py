"""Reward models as judges of single responses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from discobeta.data.batches import Responses
from discobeta.data.encode import encode
from discobeta.data.examples import Example
from discobeta.data.row_report import RowReport
from discobeta.design.config import RunConfig
from discobeta.method.heads import SIGMA0
from discobeta.method.translation import Translation, is_needed
from discobeta.model.forward import context_of, name_of, unwrapped
from discobeta.model.generation import stop_ids
from discobeta.model.inference import in_batches
from discobeta.model.preflight import check_ids, check_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from discobeta.method.heads import Heads
    from discobeta.method.rm import RewardModelling


@dataclass
class RewardModel:
    """A trained reward model: a transformers (or PEFT) model, its heads, and `score`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Heads
    config: RunConfig
    stage: RewardModelling
    fingerprint: str
    """sha256 over its weight files, and those of the base where it is an adapter that no run of ours vouches for."""

    def translation(
        self, config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Translation | None:
        """How this judge reads what policies of `config` write, which are like `model`; None: as it is."""
        if not is_needed(tokenizer, self.tokenizer):
            return None
        context = context_of(unwrapped(self.model).config) or sys.maxsize
        return Translation(config, tokenizer, self.tokenizer, context, stop_ids(model, tokenizer))

    def score(self, prompts: list[str], responses: list[str], batch_size: int = 64) -> tuple[Tensor, Tensor | None]:
        """(N,) float32 mean rewards and variances of N texts; variance is None where a reward is a number.

        Raises UserError for a text that cannot be scored, e.g. a prompt that fills cutoff_len.
        """
        pairs = zip(prompts, responses, strict=True)
        examples = [Example(prompt, response, source=f"text {i}") for i, (prompt, response) in enumerate(pairs)]
        report = RowReport("texts", len(examples))
        rows = encode(examples, self.tokenizer, self.config.cutoff_len, "supervised", report)
        report.check(0.0)
        return self.score_ids(rows.prompt_ids, rows.chosen_ids, batch_size)

    def score_ids(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], batch_size: int = 64
    ) -> tuple[Tensor, Tensor | None]:
        """`score` of N prompts and responses as token ids; results on the CPU."""
        rows = Responses(prompts, responses)
        check_ids(self.stage.model, [*prompts, *responses], name_of(self.stage.model))
        check_lengths(self.stage.model, rows.lengths, name_of(self.stage.model))

        def of_batch(indices: np.ndarray) -> dict[str, Tensor]:
            mean, log_sigma = self.stage.rewards(rows.batch(indices).to(self.stage.device))
            return {"mean": mean} if log_sigma is None else {"mean": mean, "log_sigma": log_sigma}

        scored = in_batches(
            rows.lengths, batch_size, of_batch,
            step="scoring", tokens_per_pass=self.config.tokens_per_pass, lower="the batch size or cutoff_len",
        )  # fmt: skip
        return scored["mean"], (SIGMA0 * scored["log_sigma"].exp()).square() if "log_sigma" in scored else None
