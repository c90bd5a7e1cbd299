"""The ideas of the study, and the arms that switch them: architecture (is the head there?) and use (is it read?).

Each idea has three states, absent / idle / used, so of the 2^(2k) settings of k ideas' flags 3^k are arms (9 of 16
for two). This module is the truth table. It builds nothing and decides nothing about training: which heads exist is
read by `heads` alone (`Arm.heads_in`), which are used by `signals` alone (`Arm.used`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from discobeta.design.stages import STAGES
from discobeta.errors import UserError


@dataclass(frozen=True)
class Idea:
    """A head, and whether the algorithm reads it: two flags, of which the second needs the first."""

    key: str  # in the names of arms
    add: str  # the flag of the architecture
    use: str  # the flag of the use
    label: str  # in tables and figures
    head: str  # what `add` adds
    effect: str  # what `use` does
    stages: tuple[str, ...]  # whose runs have the head
    given: tuple[str, ...] = ()  # whose runs have none, and are given a reward model that may have used it
    decides: tuple[str, ...] = ()  # run keys that its use stands in the place of, and that keep their defaults then
    says: str = ""  # what the head says of a prompt or a response, if figures compare it with the truth
    elsewhere: str = ""  # why it changes nothing in the other stages

    def acts_in(self, stage: str) -> bool:
        """Whether the idea can change what is trained there."""
        return stage in (*self.stages, *self.given)


IDEAS = (
    Idea(
        "disco", "add_disco_head", "disco_pref", "Disco",
        head="a Disco Head exists",
        effect="the loss reads the Disco Head",
        says="sigma",
        stages=("rm", "dpo"),
        given=("ppo",),
        decides=("pref_loss", "dpo_label_smoothing"),
    ),
    Idea(
        "beta", "add_beta_head", "use_dynamic_beta", "LeDPO",
        head="a Beta Head exists on the reference",
        effect="beta becomes pref_beta * s(x)",
        says="scale",
        stages=("dpo", "ppo"),
        decides=("beta_rule",),
        elsewhere="a reward model has no reference, so the beta flags have nothing to act on",
    ),
)  # fmt: skip

FLAGS = tuple(flag for idea in IDEAS for flag in (idea.add, idea.use))


class State(StrEnum):
    """What has become of one idea in one arm."""

    ABSENT = "absent"
    IDLE = "idle"
    USED = "used"


@dataclass(frozen=True)
class Arm:
    """One legal cell of the grid: a state for each of IDEAS, in their order. No state is a use without its head."""

    states: tuple[State, ...] = (State.ABSENT,) * len(IDEAS)

    @classmethod
    def from_flags(cls, **flags: bool) -> Arm:
        """The arm of these flags; those that are left out are false. Raises UserError for a use without its head."""
        if unknown := flags.keys() - set(FLAGS):
            raise TypeError(f"no flag is called {min(unknown)}")
        states = []
        for idea in IDEAS:
            add, use = flags.get(idea.add, False), flags.get(idea.use, False)
            if use and not add:
                raise UserError(f"{idea.use}: true needs {idea.add}: true (a head that is not there cannot be used)")
            states.append(State.USED if use else State.IDLE if add else State.ABSENT)
        return cls(tuple(states))

    @classmethod
    def of(cls, config: Any) -> Arm:
        """The arm that an object with the flags as attributes asks for."""
        return cls.from_flags(**{flag: getattr(config, flag) for flag in FLAGS})

    @classmethod
    def from_states(cls, **states: State | str) -> Arm:
        """The arm with these states by key of idea; what is left out is absent."""
        if unknown := states.keys() - {idea.key for idea in IDEAS}:
            raise TypeError(f"no idea is called {min(unknown)}")
        return cls(tuple(State(states.get(idea.key, State.ABSENT)) for idea in IDEAS))

    @classmethod
    def from_name(cls, name: str) -> Arm:
        if name not in BY_NAME:
            raise UserError(f"no arm is called {name!r}; the arms are {', '.join(BY_NAME)}")
        return BY_NAME[name]

    def state(self, key: str) -> State:
        """What has become of the idea with this key."""
        return self.states[KEYS.index(key)]

    def has(self, key: str) -> bool:
        """Whether the head of this idea is there, used or not."""
        return self.state(key) is not State.ABSENT

    @property
    def used(self) -> frozenset[str]:
        """Keys of the ideas whose head the algorithm reads."""
        return frozenset(key for key, state in zip(KEYS, self.states, strict=True) if state is State.USED)

    @property
    def flags(self) -> dict[str, bool]:
        pairs = zip(IDEAS, self.states, strict=True)
        return {
            flag: value
            for idea, state in pairs
            for flag, value in ((idea.add, state is not State.ABSENT), (idea.use, state is State.USED))
        }

    @cached_property
    def name(self) -> str:
        if set(self.states) == {State.ABSENT}:
            return "baseline"
        return "_".join(f"{key}-{state}" for key, state in zip(KEYS, self.states, strict=True))

    @property
    def label(self) -> str:
        """What it uses, e.g. Disco + LeDPO; nothing of idle heads."""
        return " + ".join(idea.label for idea in IDEAS if idea.key in self.used) or "baseline"

    @property
    def is_idle(self) -> bool:
        """True if some head is there and not used: such an arm must equal its `twin`."""
        return State.IDLE in self.states

    @property
    def twin(self) -> Arm:
        """This arm with every idle head taken away: the run that it must equal bit for bit."""
        return Arm(tuple(State.ABSENT if state is State.IDLE else state for state in self.states))

    def heads_in(self, stage: str) -> frozenset[str]:
        """Keys of the ideas whose head the run of this arm has in `stage`.

        A ppo run has no Disco Head of its own: its disco state says which reward model it is given.
        """
        return frozenset(idea.key for idea in IDEAS if stage in idea.stages and self.has(idea.key))

    def trained_as(self, stage: str) -> Arm:
        """The arm whose run stands for this one in `stage`: without the ideas that change nothing there."""
        acting = zip(IDEAS, self.states, strict=True)
        return Arm(tuple(state if idea.acts_in(stage) else State.ABSENT for idea, state in acting))


KEYS = tuple(idea.key for idea in IDEAS)

ARMS = tuple(Arm(states) for states in itertools.product(State, repeat=len(IDEAS)))

BY_NAME = {arm.name: arm for arm in ARMS}

CORNERS = tuple(arm for arm in ARMS if not arm.is_idle)
"""The factorial design of the uses; of two ideas: baseline, LeDPO, Disco, both."""


@dataclass(frozen=True)
class Cell:
    """One setting of the flags in one stage, and what becomes of it."""

    stage: str
    flags: dict[str, bool]
    status: str  # run | same-as | refused
    arm: str | None  # whose run the cell shows; None if refused
    reason: str  # why it is not a run of its own; empty for a run

    def row(self) -> dict[str, Any]:
        """As the row of a table, with a column for each flag."""
        return {"stage": self.stage, **self.flags, "status": self.status, "arm": self.arm, "reason": self.reason}


def cell(stage: str, flags: dict[str, bool]) -> Cell:
    try:
        arm = Arm.from_flags(**flags)
    except UserError as refusal:
        return Cell(stage, flags, "refused", None, str(refusal))
    trained = arm.trained_as(stage)
    if trained == arm:
        return Cell(stage, flags, "run", arm.name, "")
    reasons = [idea.elsewhere for idea in IDEAS if arm.has(idea.key) and not idea.acts_in(stage)]
    return Cell(stage, flags, "same-as", trained.name, "; ".join(reasons))


def grid(stages: tuple[str, ...] = tuple(STAGES)) -> list[Cell]:
    """Every setting of the flags in each stage, in the order of the flags counted up."""
    settings = [dict(zip(FLAGS, bits, strict=True)) for bits in itertools.product((False, True), repeat=len(FLAGS))]
    return [cell(stage, flags) for stage in stages for flags in settings]


def arms_of(stage: str) -> list[Arm]:
    """The arms that `stage` trains: 3 in rm, 9 in dpo and ppo."""
    return [arm for arm in ARMS if arm.trained_as(stage) == arm]
