"""What a run is given by runs of earlier stages, and whether that is what its arm says.

The flags of a ppo run describe the whole chain: its disco state is that of the reward model, and its Beta Head is the
one that dpo trained. A run whose flags say one thing and whose inputs are another would stand in the wrong cell of a
table, so it is refused.
"""

from __future__ import annotations

from pathlib import Path

from discobeta import identity, record
from discobeta.design.arms import IDEAS
from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES, Reading
from discobeta.errors import UserError


def check(config: RunConfig) -> None:
    """Refuse a config whose reward model or heads of other runs do not belong to its arm."""
    for reading in STAGES[config.stage].reads:
        named = getattr(config, reading.key)
        if reading.idea is None:
            if not named:
                raise UserError(
                    f"stage {config.stage} needs {reading.key}: an {reading.stage} run, a PEFT adapter with a score, "
                    "or a hub model"
                )
            if not Path(named).is_dir():
                identity.check_local(named, reading.key)
            _check_reward_model(config, reading, Path(named))
        elif named and config.arm.has(reading.idea):
            _check_head(config, reading, Path(named))


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
    found = record.read(directory, trust_remote_code=config.trust_remote_code)
    arm, idea = found.config.arm, next(idea for idea in IDEAS if idea.key == reading.idea)
    if found.config.stage != reading.stage or not arm.has(idea.key):
        raise UserError(
            f"{reading.key}: {directory} is a {found.config.stage} run of arm {arm.name}, not a {reading.stage} run "
            f"with this head ({idea.add})"
        )
    if arm.used - {idea.key} != config.arm.trained_as(reading.stage).used - {idea.key}:
        raise UserError(
            f"{reading.key}: {directory} is of arm {arm.name}, and this run of {config.arm.name}: "
            "both must have used the same other heads"
        )
    if idea.key in config.arm.used - arm.used:
        raise UserError(f"{reading.key}: the head of {directory} was idle there, so it has learned nothing to use here")
    if found.facts.get("base") != identity.weights_hash(config):
        raise UserError(
            f"{reading.key}: {directory} was trained on another base than {config.model_name_or_path}, and its head "
            "reads other hidden states"
        )


def hashes(config: RunConfig) -> dict[str, str]:
    """Run key -> sha256 of what it names among our runs, as it is now."""
    known = {}
    for reading in STAGES[config.stage].reads:
        named = getattr(config, reading.key)
        directory = Path(named or "")
        if reading.idea is None:
            if named and (directory / "config.yaml").exists():
                parts = (directory / "adapter", directory / "model")
                known[reading.key] = identity.folders_hash(*(part for part in parts if part.exists()))
        elif named and config.arm.has(reading.idea):
            known[reading.key] = identity.file_hash(directory / "heads.safetensors")
    return known
