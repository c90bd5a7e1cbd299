"""What differs between stages, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from discobeta import heads as heads_module
from discobeta.config import RunConfig
from discobeta.data.batches import Batch
from discobeta.data.tokens import Rows
from discobeta.heads import Heads
from discobeta.signals import Comparison, Signals

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stage(nn.Module):
    """The model and the heads of a run as one module, so that one wrapper sees all parameters.

    A stage says how it loads its model, which tensors it takes along beside the tokens, and how it
    compares pairs; everything else is the same for all stages.
    """

    task: str  # PEFT's name of the kind of model

    def __init__(self, config: RunConfig, model: nn.Module, heads: Heads):
        super().__init__()
        self.config = config
        self.model = model
        self.heads = heads
        self.signals = Signals(config.arm.trained_as(config.stage), heads, config)
        self.freeze_unused()

    @classmethod
    def fresh(cls, config: RunConfig, columns: dict[str, Tensor]) -> Self:
        """The stage at step 0, its heads built from the run's architecture."""
        from discobeta.policy import add_adapter

        model = add_adapter(cls.load_base(config), config, cls.task)
        architecture = config.arm.trained_as(config.stage).architecture
        size = model.config.hidden_size
        return cls(
            config, model, heads_module.build(architecture, size, config.seed, **cls.head_starts(model, columns))
        )

    @classmethod
    def trained(cls, config: RunConfig, directory: Path) -> Self:
        """The stage at the end of the run in `directory`."""
        from discobeta.policy import load_adapter

        if config.finetuning_type == "lora":
            model = load_adapter(cls.load_base(config), directory / "adapter")
        else:
            model = cls.load_base(config.replace(model_name_or_path=str(directory / "model")))
        return cls(config, model, heads_module.load(directory)).eval()

    @classmethod
    def load_base(cls, config: RunConfig) -> PreTrainedModel:
        raise NotImplementedError

    @classmethod
    def head_starts(cls, model: nn.Module, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the heads start from, as keyword arguments of `heads.build`."""
        raise NotImplementedError

    @classmethod
    def columns(cls, config: RunConfig, train: Rows, held_out: Rows | None) -> tuple[dict, dict]:
        """Per-row tensors that the stage needs beside the tokens, of the training and held-out rows."""
        raise NotImplementedError

    def compare(self, batch: Batch) -> Comparison:
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) objective and the per-pair statistics of a batch."""
        comparison = self.compare(batch)
        return comparison.objective, comparison.statistics()

    def model_parameters(self) -> list[nn.Parameter]:
        """What is trained beside the variance and beta heads."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def freeze_unused(self) -> None:
        """Leave gradients to what this arm trains: an idle head has none, so no one waits for it."""
        trained = {id(weight) for group in self.parameter_groups().values() for weight in group}
        for weight in self.parameters():
            weight.requires_grad_(id(weight) in trained)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"model": self.model_parameters(), **self.signals.parameters()}

    def autocast(self) -> torch.autocast:
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.bf16)

    def save(self, directory: Path) -> None:
        """adapter/ (or model/), heads.safetensors and heads.json."""
        from discobeta.policy import save_model

        save_model(self.model, directory)
        heads_module.save(self.heads, directory)


def stage_class(stage: str) -> type[Stage]:
    from discobeta.errors import UserError

    if stage == "rm":
        from discobeta.stages.rm import RewardModelling

        return RewardModelling
    if stage == "dpo":
        from discobeta.stages.dpo import DirectPreference

        return DirectPreference
    raise UserError(f"stage {stage} is not available in this version (rm, dpo and sft are)")
