"""Reward modelling: a trunk with LoRA and a scalar score, or a Gaussian in its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from discobeta.data.batches import Batch
from discobeta.design.config import RunConfig
from discobeta.identity import folder_of
from discobeta.method.heads import full_precision
from discobeta.method.judges import has_value_head, value_head
from discobeta.method.signals import Comparison, Evidence
from discobeta.method.stage import Stage
from discobeta.model.adapters import start_adapter
from discobeta.model.forward import hidden_states, score_place, state_at, unwrapped
from discobeta.model.pretrained import load_scorer


class RewardModelling(Stage):
    """-log sigmoid(r_w - r_l), or -log Phi((mu_w - mu_l) / sqrt(sigma_w^2 + sigma_l^2)).

    r and mu are linear maps of the trunk's last hidden state at the last response token (see `score_place`).
    """

    task = "SEQ_CLS"

    @classmethod
    def load_base(cls, config: RunConfig):
        """A value head that comes along is what the score starts as, without its constant, on which no comparison
        depends."""
        scorer = load_scorer(config)
        if config.adapter_name_or_path:
            start = start_adapter(config)
        else:
            start = folder_of(config.model_name_or_path, "config.json", config, "model_name_or_path")
        if has_value_head(start):
            scorer.score.weight.data.copy_(value_head(start, scorer.score.in_features).weight)
        return scorer

    @classmethod
    def head_starts(cls, model: nn.Module, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"score_weight": score_layer(model).weight.detach()}

    def model_parameters(self) -> list[nn.Parameter]:
        without_score = [
            weight
            for name, weight in self.model.named_parameters()
            if weight.requires_grad and ".score." not in f".{name}"
        ]
        return [*without_score, *self.signals.reward_map(score_layer(self.model)).parameters()]

    def rewards(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(N,) mean rewards and (N,) log(sigma/sigma0), or None where a reward is a number."""
        return self.rewards_of(self.hidden(batch), batch)

    def hidden(self, batch: Batch) -> Tensor:
        """(N, T, hidden_size), the trunk's last hidden states."""
        with self.autocast():
            return hidden_states(self.model, batch)

    def rewards_of(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """`rewards`, from `hidden` states."""
        batch = self.ending_at_score(batch)
        return self.mean_rewards(hidden, batch), self.signals.log_sigma(hidden, batch)

    def ending_at_score(self, batch: Batch) -> Batch:
        """The batch with the place where a reward is read as the end of its response."""
        return replace(batch, response_end=score_place(self.model, batch))

    def mean_rewards(self, hidden: Tensor, batch: Batch) -> Tensor:
        """(N,) float32 mean rewards of responses that are `ending_at_score`."""
        with full_precision(hidden):
            return self.signals.reward_map(score_layer(self.model))(state_at(hidden, batch.response_end)).squeeze(-1)

    def compare(self, batch: Batch) -> Comparison:
        hidden, batch = self.hidden(batch), self.ending_at_score(batch)
        return self.signals.compare(Evidence(self.mean_rewards(hidden, batch).view(2, -1), batch, hidden))

    @torch.no_grad()
    def save(self, directory: Path) -> None:
        """The score is saved as the map that is used, so that plain PEFT reads mu from a Disco run."""
        scalar = score_layer(self.model)
        scalar.weight.copy_(self.signals.reward_map(scalar).weight)
        super().save(directory)


def score_layer(model: nn.Module) -> nn.Linear:
    """The scalar score; with an adapter, the copy of it that is trained and saved."""
    layer = unwrapped(model).score
    return layer.modules_to_save["default"] if hasattr(layer, "modules_to_save") else layer
