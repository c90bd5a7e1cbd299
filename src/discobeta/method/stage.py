"""What differs between stages, and nothing else."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from discobeta import identity, record
from discobeta.data.batches import Batch, Pairs, cut
from discobeta.data.rows import Rows, TokenisedData
from discobeta.design.arms import IDEAS
from discobeta.design.config import RunConfig
from discobeta.design.schedule import Schedule, schedule_of
from discobeta.design.stages import STAGES, Reading
from discobeta.errors import UserError
from discobeta.method import heads as heads_module
from discobeta.method.heads import Heads
from discobeta.method.optim import Group, model_group
from discobeta.method.signals import Comparison, Signals

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


class Material(Protocol):
    """Rows in an order of their own: pairs, or the responses of an update."""

    def batch(self, indices: np.ndarray) -> Batch: ...


@dataclass
class Work:
    """What one step of the loop trains on."""

    material: Material
    minibatches: list[list[np.ndarray]]  # per optimiser step, the indices of this process's forward passes
    minibatch_rows: int  # rows of one optimiser step, over all processes
    rows: int  # and of the step as a whole, each counted once
    tokens: int
    statistics: dict[str, Tensor] = field(default_factory=dict)  # of the step itself, to be logged


class Stage(nn.Module):
    """The model and the heads of a run as one module, so that one wrapper sees all parameters.

    A stage says how it loads its model, which tensors it takes along beside the tokens, and how it
    compares pairs; everything else is the same for all stages.
    """

    task: str  # PEFT's name of the kind of model
    shown = ("loss", "accuracy")  # by the progress bar

    def __init__(self, config: RunConfig, model: nn.Module, heads: Heads):
        super().__init__()
        self.config = config
        self.model = model
        self.heads = heads
        self.signals = Signals(config.arm.trained_as(config.stage), heads, config)
        self.freeze_unused()

    @classmethod
    def start(cls, config: RunConfig) -> nn.Module:
        """The model as it stands at step 0: the base, with the adapter that is trained."""
        from discobeta.model.adapters import add_adapter

        return add_adapter(cls.load_base(config), config, cls.task)

    @classmethod
    def fresh(
        cls,
        config: RunConfig,
        columns: dict[str, Tensor],
        model: nn.Module | None = None,
        given: dict[str, Any] | None = None,
    ) -> Self:
        """The stage at step 0, its heads built from the run's architecture.

        model: `start`, if it is there already. given: run key -> what it names among other runs (`run.load.given`).
        """
        model = cls.start(config) if model is None else model
        stage = cls(config, model, cls.fresh_heads(config, model, columns, given or {}))
        stage.take(given or {})
        return stage

    def take(self, given: dict[str, Any]) -> None:
        """Keep what the stage needs of what it is given, at step 0."""

    @classmethod
    def trained(cls, config: RunConfig, directory: Path) -> Self:
        """The stage at the end of the run in `directory`."""
        from discobeta.model.adapters import load_adapter

        if config.finetuning_type == "lora":
            model = load_adapter(cls.load_base(config), directory / "adapter", fused=config.fused_lora)
        else:
            model = cls.load_base(config.replace(model_name_or_path=str(directory / "model")))
        return cls(config, model, heads_module.load(directory)).eval()

    @classmethod
    def fresh_heads(
        cls, config: RunConfig, model: nn.Module, columns: dict[str, Tensor], given: dict[str, Any]
    ) -> Heads:
        from discobeta.model.forward import width

        present = config.arm.heads_in(config.stage)
        starts = cls.head_starts(model, columns)
        return heads_module.build(present, width(model), config.seed, **starts)

    @classmethod
    def load_base(cls, config: RunConfig) -> PreTrainedModel:
        raise NotImplementedError

    @classmethod
    def head_starts(cls, model: nn.Module, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the heads start from, as keyword arguments of `heads.build`."""
        raise NotImplementedError

    @classmethod
    def columns(cls, config: RunConfig, parts: dict[str, Rows], *, write: bool = True) -> dict[str, dict[str, Tensor]]:
        """Per-row tensors that the stage needs beside the tokens, of each part (train, eval).

        write: whether they may be left on disk for other runs.
        """
        return {name: {} for name in parts}

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Refuse, before anything is loaded, a run whose reward model or heads of other runs do not belong to its arm.

        The flags of a run describe all that it is made from: a ppo run's disco state is that of its reward model, and
        its Beta Head is the one that dpo trained. With other inputs it would stand in the wrong cell of a table.
        """
        for reading in STAGES[config.stage].reads:
            named = getattr(config, reading.key)
            if reading.idea is None:
                if not config.reward_models:
                    raise UserError(
                        f"stage {config.stage} needs {reading.key}: an {reading.stage} run, a PEFT adapter with a "
                        "score, or a hub model"
                    )
                for judge in config.reward_models:
                    identity.check_local(judge, reading.key)
                    _check_reward_model(config, reading, Path(judge))
            elif named and config.arm.has(reading.idea):
                _check_head(config, reading, Path(named))

    @classmethod
    def hashes_of_inputs(cls, config: RunConfig) -> dict[str, str]:
        """Run key -> sha256 of what it names among our runs, as it is now; part of what `facts` has said."""
        hashes = {}
        for reading in STAGES[config.stage].reads:
            named = getattr(config, reading.key)
            directory = Path(named or "")
            if reading.idea is None:
                if ours := [Path(judge) for judge in config.reward_models if (Path(judge) / "config.yaml").exists()]:
                    found = [_weights_of(judge) for judge in ours]
                    if len(found) == len(config.reward_models):
                        hashes[reading.key] = identity.one_of(found)
            elif named and config.arm.has(reading.idea):
                hashes[reading.key] = identity.file_hash(directory / "heads.safetensors")
        return hashes

    def check_data(self, data: TokenisedData) -> None:
        """Refuse rows that another model than the one that is trained cannot read."""

    def facts(self) -> dict[str, str]:
        """What else than settings, data and base decides the outcome."""
        return {}

    def schedule(self, train: Pairs, processes: int) -> Schedule:
        """Which rows each step of the loop sees."""
        return schedule_of(self.config, len(train), processes)

    def collect(self, step: int, train: Pairs, schedule: Schedule, accelerator: Accelerator) -> Work:
        """The work of a step of the loop: one optimiser step on the next pairs."""
        rows = schedule.step_rows(step)
        mine = schedule.share(rows, train.places, accelerator.process_index)
        passes = cut(mine, train.places, self.config.tokens_per_pass)
        return Work(train, [passes], len(rows), len(rows), train.tokens(rows))

    def state(self) -> dict:
        """What a checkpoint must keep beside weights and optimiser."""
        return {"heads": dict(self.heads.named_buffers())}

    def restore(self, state: dict) -> None:
        """Go on from what `state` has returned."""
        self.heads.load_state_dict(state["heads"], strict=False)  # their weights are with those that are trained

    def end_step(self, accelerator: Accelerator) -> None:
        """After each optimiser step."""
        self.signals.end_step(lambda values: accelerator.reduce(values, "sum"))

    def compare(self, batch: Batch) -> Comparison:
        raise NotImplementedError

    def rewards_of_pairs(self, batch: Batch) -> Tensor:
        """(2, B) mean rewards of single responses, of B pairs; they may be compared with all others to their prompt."""
        return self.compare(batch).rewards

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) loss and the per-pair statistics of a batch."""
        comparison = self.compare(batch)
        return comparison.loss, comparison.statistics()

    def model_parameters(self) -> list[nn.Parameter]:
        """What is trained beside the variance and beta heads."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def freeze_unused(self) -> None:
        """Leave gradients to what this arm trains: an idle head has none, so no one waits for it."""
        trained = {id(weight) for group in self.parameter_groups().values() for weight in group.weights}
        for weight in self.parameters():
            weight.requires_grad_(id(weight) in trained)

    def parameter_groups(self) -> dict[str, Group]:
        """What is trained, by the name that its gradient's norm has in the log."""
        return {"model": model_group(self.model_parameters(), self.config), **self.signals.groups()}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    def save(self, directory: Path) -> None:
        """adapter/ (or model/), heads.safetensors and heads.json."""
        from discobeta.model.pretrained import save_model

        save_model(self.model, directory)
        heads_module.save(self.heads, directory)


def _weights_of(directory: Path) -> str:
    """sha256 over the weights of a run."""
    parts = (directory / "adapter", directory / "model")
    return identity.folders_hash(*(part for part in parts if part.exists()))


def _check_reward_model(config: RunConfig, reading: Reading, directory: Path) -> None:
    """It must have used the heads that the run's arm uses and that act in its stage."""
    wanted = config.arm.trained_as(reading.stage).used
    if not (directory / "config.yaml").exists():
        if wanted:
            idea = next(idea for idea in IDEAS if idea.key in wanted)
            raise UserError(
                f"{idea.use}: true needs an {reading.stage} run that used its {idea.label} Head; {directory} is none"
            )
        return
    arm = record.read(directory, trust_remote_code=config.trust_remote_code, weights=False).config.arm
    if arm.trained_as(reading.stage).used != wanted:
        acting = [idea for idea in IDEAS if idea.acts_in(reading.stage)]
        flags = " and ".join(idea.use for idea in acting)
        raise UserError(
            f"{reading.key}: {directory} is of arm {arm.name}, and this run of {config.arm.name}: "
            f"in {config.stage}, {flags} says what kind of reward model it is given"
        )


def _check_head(config: RunConfig, reading: Reading, directory: Path) -> None:
    """It must be one that `reading.stage` made on the same base, and have been used there if it is used here."""
    run = record.read(directory, trust_remote_code=config.trust_remote_code)
    arm, idea = run.config.arm, next(idea for idea in IDEAS if idea.key == reading.idea)
    if run.config.stage != reading.stage or not arm.has(idea.key):
        raise UserError(
            f"{reading.key}: {directory} is a {run.config.stage} run of arm {arm.name}, not a {reading.stage} run "
            f"with this head ({idea.add})"
        )
    if arm.used - {idea.key} != config.arm.trained_as(reading.stage).used - {idea.key}:
        raise UserError(
            f"{reading.key}: {directory} is of arm {arm.name}, and this run of {config.arm.name}: "
            "both must have used the same other heads"
        )
    if idea.key in config.arm.used - arm.used:
        raise UserError(f"{reading.key}: the head of {directory} was idle there, so it has learned nothing to use here")
    if run.facts.get("base") != identity.weights_hash(config):
        raise UserError(
            f"{reading.key}: {directory} was trained on another base than {config.model_name_or_path}, and its head "
            "reads other hidden states"
        )


def stage_class(stage: str) -> type[Stage]:
    """The implementation of a stage of the grid."""
    module, _, name = STAGES[stage].implementation.partition(":")
    return getattr(importlib.import_module(module), name)
