"""What a ppo run is given by earlier runs, and whether that is what its arm says.

The flags of a ppo run describe the whole chain: its disco state is that of the reward model, and
its Beta Head is the one that dpo trained. A run whose flags say one thing and whose inputs are
another would stand in the wrong cell of a table, so it is refused.
"""

from __future__ import annotations

from pathlib import Path

from discobeta import identity, record
from discobeta.config import RunConfig
from discobeta.errors import UserError
from discobeta.flags import State


def check(config: RunConfig) -> None:
    """Refuse a ppo config whose reward model or Beta Head does not belong to its arm."""
    if not config.reward_model:
        raise UserError("stage ppo needs reward_model: an rm run, a PEFT adapter with a score, or a hub model")
    if not Path(config.reward_model).is_dir():
        identity.check_local(config.reward_model, "reward_model")
    _check_reward_model(config, Path(config.reward_model))
    if config.beta_head and config.arm.beta is not State.ABSENT:
        _check_beta_head(config, Path(config.beta_head))


def _check_reward_model(config: RunConfig, directory: Path) -> None:
    is_gaussian = config.arm.disco is State.USED
    if not (directory / "config.yaml").exists():
        if is_gaussian:
            raise UserError(f"disco_pref: true needs an rm run that used its Disco Head; {directory} is none")
        return
    rm = record.read(directory, trust_remote_code=config.trust_remote_code, weights=False).config
    if is_gaussian != (rm.arm.disco is State.USED):
        raise UserError(
            f"reward_model: {directory} is of arm {rm.arm.name}, and this run of {config.arm.name}: "
            "in ppo, disco_pref says whether the reward model is a Gaussian one"
        )


def _check_beta_head(config: RunConfig, directory: Path) -> None:
    """It must be one that dpo made on the same base, and have been used there if it is used here."""
    found = record.read(directory, trust_remote_code=config.trust_remote_code)
    dpo = found.config
    if dpo.stage != "dpo" or dpo.arm.beta is State.ABSENT:
        raise UserError(
            f"beta_head: {directory} is a {dpo.stage} run of arm {dpo.arm.name}, not a dpo run with a Beta Head"
        )
    if (config.arm.disco is State.USED) != (dpo.arm.disco is State.USED):
        raise UserError(
            f"beta_head: {directory} is of arm {dpo.arm.name}, and this run of {config.arm.name}: "
            "both must have used a Disco Head, or neither"
        )
    if config.arm.beta is State.USED and dpo.arm.beta is not State.USED:
        raise UserError(
            f"beta_head: the Beta Head of {directory} was idle there, so it has learned nothing to use here"
        )
    if found.facts.get("base") != identity.weights_hash(config):
        raise UserError(
            f"beta_head: {directory} was trained on another base than {config.model_name_or_path}, and its Beta Head "
            "reads other hidden states"
        )


def hashes(config: RunConfig) -> dict[str, str]:
    """Run key -> sha256 of what it names among our runs, as it is now."""
    known, judge = {}, Path(config.reward_model)
    if (judge / "config.yaml").exists():
        parts = (judge / "adapter", judge / "model")
        known["reward_model"] = identity.folders_hash(*(part for part in parts if part.exists()))
    if config.beta_head and config.arm.beta is not State.ABSENT:
        known["beta_head"] = identity.file_hash(Path(config.beta_head) / "heads.safetensors")
    return known
