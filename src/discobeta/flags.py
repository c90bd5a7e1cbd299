"""The four flags: architecture (is the head there?) and use (does the algorithm read it?).

Each idea (Disco, dynamic beta) has three states, absent / idle / used, so 9 of the 16 cells of
a stage are legal. This module is the truth table. It builds nothing and decides nothing about
training: `heads` alone reads `Architecture`, `signals` alone reads `Use`.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from discobeta.errors import UserError

FLAGS = ("add_disco_head", "disco_pref", "add_beta_head", "use_dynamic_beta")
STAGES = ("rm", "dpo", "ppo")


class State(StrEnum):
    """What has become of one idea in one arm."""

    ABSENT = "absent"
    IDLE = "idle"
    USED = "used"

    @classmethod
    def of(cls, *, add: bool, use: bool) -> State:
        return cls.USED if use else cls.IDLE if add else cls.ABSENT


@dataclass(frozen=True)
class Architecture:
    """Which heads exist."""

    add_disco_head: bool = False
    add_beta_head: bool = False


@dataclass(frozen=True)
class Use:
    """Which heads the algorithm reads."""

    disco_pref: bool = False
    use_dynamic_beta: bool = False


@dataclass(frozen=True)
class Arm:
    """One legal cell of the grid. A use without its head cannot be constructed."""

    architecture: Architecture = Architecture()
    use: Use = Use()

    def __post_init__(self) -> None:
        for use, add in (("disco_pref", "add_disco_head"), ("use_dynamic_beta", "add_beta_head")):
            if getattr(self.use, use) and not getattr(self.architecture, add):
                raise UserError(f"{use}: true needs {add}: true (a head that is not there cannot be used)")

    @classmethod
    def from_flags(
        cls,
        add_disco_head: bool = False,
        disco_pref: bool = False,
        add_beta_head: bool = False,
        use_dynamic_beta: bool = False,
    ) -> Arm:
        return cls(Architecture(add_disco_head, add_beta_head), Use(disco_pref, use_dynamic_beta))

    @classmethod
    def of(cls, config: Any) -> Arm:
        """The arm that an object with the four flags as attributes asks for."""
        return cls.from_flags(**{flag: getattr(config, flag) for flag in FLAGS})

    @classmethod
    def from_states(cls, disco: State, beta: State) -> Arm:
        return cls.from_flags(
            disco is not State.ABSENT, disco is State.USED, beta is not State.ABSENT, beta is State.USED
        )

    @classmethod
    def from_name(cls, name: str) -> Arm:
        for arm in ARMS:
            if arm.name == name:
                return arm
        raise UserError(f"no arm is called {name!r}; the arms are {', '.join(arm.name for arm in ARMS)}")

    @property
    def flags(self) -> dict[str, bool]:
        both = asdict(self.architecture) | asdict(self.use)
        return {flag: both[flag] for flag in FLAGS}

    @property
    def disco(self) -> State:
        return State.of(add=self.architecture.add_disco_head, use=self.use.disco_pref)

    @property
    def beta(self) -> State:
        return State.of(add=self.architecture.add_beta_head, use=self.use.use_dynamic_beta)

    @property
    def name(self) -> str:
        if self.disco is self.beta is State.ABSENT:
            return "baseline"
        return f"disco-{self.disco}_beta-{self.beta}"

    @property
    def is_idle(self) -> bool:
        """True if some head is there and not used: such an arm must equal its `twin`."""
        return State.IDLE in (self.disco, self.beta)

    @property
    def twin(self) -> Arm:
        """This arm with every idle head taken away: the run that it must equal bit for bit."""
        absent = {State.IDLE: State.ABSENT}
        return Arm.from_states(absent.get(self.disco, self.disco), absent.get(self.beta, self.beta))

    def architecture_in(self, stage: str) -> Architecture:
        """The heads that the run of this arm has in `stage`.

        A ppo run has no Disco Head of its own: its disco state says which reward model it is given.
        """
        absent = {"ppo": {"add_disco_head": False}, "rm": {"add_beta_head": False}}
        return replace(self.architecture, **absent.get(stage, {}))

    def trained_as(self, stage: str) -> Arm:
        """The arm whose run stands for this one in `stage`.

        A reward model has no reference model, so the beta flags have nothing to act on in rm.
        """
        return Arm.from_states(self.disco, State.ABSENT) if stage == "rm" else self


ARMS = tuple(Arm.from_states(disco, beta) for disco, beta in itertools.product(State, State))

CORNERS = tuple(arm for arm in ARMS if not arm.is_idle)
"""The 2x2 design of the uses: baseline, dynamic beta, Disco, both."""


@dataclass(frozen=True)
class Cell:
    """One of the 48 cells: a stage, four flags, and what becomes of them."""

    stage: str
    add_disco_head: bool
    disco_pref: bool
    add_beta_head: bool
    use_dynamic_beta: bool
    status: str  # run | same-as | refused
    arm: str | None  # whose run the cell shows; None if refused
    reason: str  # why it is not a run of its own; empty for a run


def cell(stage: str, flags: dict[str, bool]) -> Cell:
    try:
        arm = Arm.from_flags(**flags)
    except UserError as refusal:
        return Cell(stage, **flags, status="refused", arm=None, reason=str(refusal))
    trained = arm.trained_as(stage)
    if trained == arm:
        return Cell(stage, **flags, status="run", arm=arm.name, reason="")
    reason = "a reward model has no reference, so the beta flags have nothing to act on"
    return Cell(stage, **flags, status="same-as", arm=trained.name, reason=reason)


def grid(stages: tuple[str, ...] = STAGES) -> list[Cell]:
    """All 16 cells of each stage, in the order of the flags counted up."""
    settings = [dict(zip(FLAGS, bits, strict=True)) for bits in itertools.product((False, True), repeat=4)]
    return [cell(stage, flags) for stage in stages for flags in settings]


def arms_of(stage: str) -> list[Arm]:
    """The arms that `stage` trains: 3 in rm, 9 in dpo and ppo."""
    return [arm for arm in ARMS if arm.trained_as(stage) == arm]
