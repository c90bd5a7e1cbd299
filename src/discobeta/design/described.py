"""An arm in words, for those who read about one run and not the grid."""

from __future__ import annotations

from discobeta.design.arms import IDEAS, Arm, State

STATES = {State.ABSENT: "absent", State.IDLE: "there and not read (a control)", State.USED: "used"}


def arm_in_words(arm: Arm, stage: str) -> str:
    """A table in Markdown: each idea, its flags, and what they mean in a run of `stage`."""
    lines = ["| idea | flags | here |", "|---|---|---|"]
    for idea in IDEAS:
        state = arm.state(idea.key)
        said = ", ".join(f"`{flag}: {str(arm.flags[flag]).lower()}`" for flag in (idea.add, idea.use))
        effect = f": {idea.effect}" if state is State.USED and stage in idea.stages else ""
        here = STATES[state] + effect if idea.acts_in(stage) else f"nothing ({idea.elsewhere})"
        lines.append(f"| {idea.label} | {said} | {here} |")
    return "\n".join(lines)


def heads_read(arm: Arm, stage: str) -> list[str]:
    """Keys of the heads that a run of `stage` reads."""
    return sorted(arm.trained_as(stage).used)
