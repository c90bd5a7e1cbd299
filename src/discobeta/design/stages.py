"""The stages of the grid: what is to be known of one without loading it.

The mathematics of a stage stands in its own file (`implementation`). What holds of all stages, and no other module asks
for one by its name: whatever differs between stages differs by a field of this table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Reading:
    """A run that a run of a later stage reads."""

    key: str  # run key that names its directory
    stage: str
    idea: str | None = None  # whose head is read, where the arm has it; None: a reward model, always


@dataclass(frozen=True)
class StageRow:
    """A stage as the study, the tables and the commands see it."""

    name: str
    title: str
    implementation: str  # module:class
    rows: Literal["pairs", "prompts"]  # what it is trained on
    trains: Literal["reward", "policy"]  # and what it trains
    compared: tuple[str, ...]  # metrics by which arms are compared, seed by seed
    defaults: dict[str, Any]  # of run keys whose default depends on the stage
    step: str = "step"  # what one step of the loop is called
    step_factors: tuple[str, ...] = ()  # run keys whose product is the number of optimiser steps in it
    reference_pass: bool = False  # whether it reads log-probabilities of the reference
    reads: tuple[Reading, ...] = field(default=())

    @property
    def has_pairs(self) -> bool:
        """Whether its runs are measured on held-out pairs."""
        return self.rows == "pairs"

    @property
    def is_policy(self) -> bool:
        """Whether its runs are measured by the responses that they sample."""
        return self.trains == "policy"

    @property
    def judge(self) -> Reading | None:
        """The reward model that its runs are given."""
        return next((reading for reading in self.reads if reading.idea is None), None)


_ROWS = (
    StageRow(
        "rm",
        "Reward models",
        "discobeta.method.rm:RewardModelling",
        rows="pairs",
        trains="reward",
        compared=("nll", "excess_kl", "accuracy"),
        defaults={"num_eval_generations": 0},
    ),
    StageRow(
        "dpo",
        "Direct preference optimisation",
        "discobeta.method.dpo:DirectPreference",
        rows="pairs",
        trains="policy",
        compared=("nll", "excess_kl", "accuracy", "true_reward", "kl_per_sequence"),
        defaults={"num_eval_generations": 0},
        reference_pass=True,
    ),
    StageRow(
        "ppo",
        "Proximal policy optimisation",
        "discobeta.method.ppo:ProximalPolicy",
        rows="prompts",
        trains="policy",
        compared=("true_reward", "kl_per_sequence", "reward_gain"),
        defaults={"num_eval_generations": 64},
        step="update",
        step_factors=("ppo_epochs", "ppo_buffer_size"),
        reads=(Reading("reward_model", "rm"), Reading("beta_head", "dpo", idea="beta")),
    ),
)

STAGES = {row.name: row for row in _ROWS}
"""Name -> row, in the order in which they are run: a stage reads earlier ones only."""

READ_KEYS = tuple(dict.fromkeys(reading.key for row in _ROWS for reading in row.reads))
"""Run keys that name other runs."""

REWARD_STAGE = next(row.name for row in _ROWS if row.trains == "reward")
"""The stage whose runs score single responses."""

BASE_STAGE = "sft"
"""What trains the base that all stages start from; not in the grid."""

TRAITS = {
    "base": [BASE_STAGE],
    "grid": list(STAGES),
    "pairs": [name for name, row in STAGES.items() if row.has_pairs],
    "prompts": [name for name, row in STAGES.items() if not row.has_pairs],
    "policy": [name for name, row in STAGES.items() if row.is_policy],
    "reference": [name for name, row in STAGES.items() if row.reference_pass],
}
"""What stages have in common -> their names."""


def having(traits: str) -> list[str]:
    """Names of the stages that have one of these traits, e.g. "base policy"."""
    return list(dict.fromkeys(name for trait in traits.split() for name in TRAITS[trait]))
