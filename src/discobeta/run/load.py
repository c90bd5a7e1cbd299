"""Finished runs, given back as ordinary objects: record -> model. Nothing in a stage imports this."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discobeta import identity, record
from discobeta.data.examples import Message, Prompt, Response, texts_of
from discobeta.data.formats import has_words
from discobeta.data.layouts import ROLES
from discobeta.design.config import RunConfig
from discobeta.design.stages import REWARD_STAGE, STAGES
from discobeta.errors import UserError, shown
from discobeta.method import reward
from discobeta.run import places

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from discobeta.method.heads import Heads
    from discobeta.method.stage import Stage
    from discobeta.record import Record


@dataclass
class Policy:
    """A trained policy: a transformers model (with a PEFT adapter, if it has one) and its heads."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Heads
    config: RunConfig


Prompts = Prompt | list[Prompt]


class RewardModel(reward.RewardModel):
    """A trained reward model: `model`, `tokenizer`, `heads`, `config`, and `score`."""

    def score(
        self, prompts: Prompts, responses: str | Message | list[str | Message], batch_size: int = 64
    ) -> tuple[Tensor, Tensor | None]:
        """Mean reward(s) and variance(s) of a response, or of N, each to its prompt.

        prompts: a text, as it stands in the data, or a conversation, a list of {"role", "content"} that ends before the
        response, which goes through the tokenizer's chat template (without one: hh-rlhf's "Human: … Assistant:").
        responses: a text, or the assistant's message. For one of each the results are () float32, for lists of N they
        are (N,); the variance is None where a reward is a number. Raises UserError for what cannot be scored.
        """
        is_one = isinstance(responses, str | dict)
        if is_one:
            prompts, responses = [prompts], [responses]
        elif not isinstance(responses, Iterable):
            raise UserError(f"score: responses should be a text, a message or a list of such, not {shown(responses)}")
        elif isinstance(prompts, str):
            raise UserError(f"score: one prompt and {len(list(responses))} responses: give a list of as many prompts")
        prompts, responses = list(prompts), list(responses)
        if len(prompts) != len(responses):
            raise UserError(
                f"score: {len(prompts)} prompts and {len(responses)} responses: one of each, or lists alike"
            )
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            check_prompt(prompt, f"score: prompt {place}")
            if not _is_message(response) and not isinstance(response, str):
                raise UserError(f"score: response {place} should be a text or a message, not {type(response).__name__}")
            check_text(response, f"score: response {place}")
        mean, variance = super().score(prompts, responses, batch_size)
        if is_one:
            mean, variance = mean[0], None if variance is None else variance[0]
        return mean, variance


def check_prompt(prompt: Any, what: str) -> None:
    """Refuse what is neither a text nor a conversation that somebody is to answer, and what says nothing."""
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and all(map(_is_message, prompt))):
        roles = ", ".join(sorted(set(ROLES.values())))
        raise UserError(
            f'{what} should be a text, or a conversation: a list of {{"role": "user", "content": "…"}}, … (roles: '
            f"{roles})"
        )
    if not has_words(prompt):
        raise UserError(f"{what} is empty")
    for turn in [prompt] if isinstance(prompt, str) else prompt:
        check_text(turn, what)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise UserError(f"{what} ends with the assistant's turn, and the response is one: leave it to the response")


def check_text(turn: Response, what: str) -> None:
    """Refuse a text or a message that no tokenizer takes: JSON can spell half a surrogate pair ("\\ud83d")."""
    try:
        "".join(texts_of(turn)).encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} holds characters that no text has: {shown(turn)}") from None


def _is_message(turn: Any) -> bool:
    is_message = isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
    return is_message and turn["role"] in ROLES.values()


def load_policy(
    directory: str | Path,
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
) -> Policy:
    """The policy of a dpo or ppo run directory, wherever it lies now.

    base: a folder or hub id to take for its base, where that is not found (`run.places`); it must be the one that the
    run was trained on, by its hash. trust_remote_code: whether code that comes with the base may be run; cache_dir: the
    hub's cache. What the run's own config says of these counts for nothing. Raises UserError for a run that is
    unfinished or damaged, or whose base is not here or has changed.
    """
    from discobeta.model.pretrained import load_tokenizer

    policies = [row.name for row in STAGES.values() if row.is_policy]
    reader = {"base": base, "trust_remote_code": trust_remote_code, "cache_dir": cache_dir}
    stage = load_stage(read_run(directory, *policies, **reader))
    return Policy(stage.model, load_tokenizer(stage.config), stage.heads, stage.config)


def read_run(
    directory: str | Path, *stages: str, base: str | Path | None = None, also: tuple[str, ...] = (), **reader: Any
) -> Record:
    """`record.read` of a run that must be of one of these stages, on the base that it was trained on, with all that its
    config names by the names that they have here (`places.here`)."""
    run = record.read(directory, **reader)
    if run.config.stage not in stages:
        raise UserError(f"{directory} is a run of stage {run.config.stage}, not {' or '.join(stages)}")
    return places.here(run, None if base is None else str(base), also)


def load_stage(run: Record) -> Stage:
    """The trained stage of a run, in evaluation mode, on the CPU."""
    from discobeta.method.stage import stage_class

    return stage_class(run.config.stage).trained(run.config, run.directory)


def together(stage: Stage, *others: nn.Module) -> torch.device:
    """Bring models to the device that there is, which it returns. What several of them hold of frozen weights is there
    once, and no model twice on the way; and each has been asked whether it obeys masks, so that on a GPU all that do
    attend by the same kernel (`attention.mask_of`) and their differences are none of kernels."""
    import torch

    from discobeta.method.stage import Stage
    from discobeta.model.forward import share_frozen_weights
    from discobeta.model.layout import obeys_masks

    for one in (stage, *others):
        obeys_masks(one.model if isinstance(one, Stage) else one)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    share_frozen_weights(stage, *others, device=device)
    for one in (stage, *others):
        one.to(device)
    return device


def judges_together(judges: Iterable[RewardModel], stage: Stage, *others: nn.Module) -> list[RewardModel]:
    """Bring judges that are still to be loaded beside models that are together, one after the other."""
    found: list[RewardModel] = []
    for judge in judges:
        found.append(judge)
        together(stage, *others, *(each.stage for each in found))
    return found


def load_reward_model(source: str | Path, *, base: str | Path | None = None, **settings) -> RewardModel:
    """A reward model, frozen, on the CPU, from any of

    - the directory of an rm run of this project (its base, its adapter, its heads),
    - a PEFT adapter with a `score` (a directory or a hub id), on the base that it names,
    - a model for sequence classification with one output, `score` (a directory or a hub id),
    - a reward model of LLaMA-Factory, a language model or an adapter with a value head (a directory or a hub id).

    settings: run keys that say how the others than ours are loaded (bf16, flash_attn, cutoff_len, ...), and
    trust_remote_code and cache_dir, which hold for all; what a run's own config says of these counts for nothing.
    base: of a run, as for `load_policy`.
    Raises UserError for anything else, for one that has no score of its own, and for a run that is unfinished or
    damaged, or whose base is not here or has changed.
    """
    return _load_reward_model(source, settings, base)


def _load_reward_model(
    source: str | Path, settings: dict[str, Any], base: str | Path | None = None, also: tuple[str, ...] = ()
) -> RewardModel:
    """also: folders that may be the base of a run, if it is not where it was."""
    from discobeta.method import judges
    from discobeta.method.heads import Heads
    from discobeta.method.stage import stage_class
    from discobeta.model.pretrained import load_tokenizer

    folder = Path(source)
    if (folder / "config.yaml").exists():
        reader = {key: settings[key] for key in ("trust_remote_code", "cache_dir") if key in settings}
        stage = load_stage(read_run(folder, REWARD_STAGE, base=base, also=also, **reader))
        weights = [part for part in (folder / "adapter", folder / "model") if part.exists()]
    elif base is not None:
        raise UserError(f"base: {source} is no run of discobeta, and names its base itself")
    else:
        config, model, weights = judges.load(str(source), settings)
        stage = stage_class(REWARD_STAGE)(config, model, Heads()).eval()
    stage.requires_grad_(False)
    tokenizer = load_tokenizer(stage.config)
    return RewardModel(stage.model, tokenizer, stage.heads, stage.config, stage, identity.folders_hash(*weights))


def load_reward_models(config: RunConfig) -> Iterator[RewardModel]:
    """Those that `reward_model` of a run names, in its order, one when the one before has been taken."""
    for name in config.reward_models:
        yield _load_reward_model(name, judge_settings(config), also=(config.model_name_or_path,))


def judge_settings(config: RunConfig) -> dict:
    """The settings of a run that a reward model of another make is loaded with."""
    return {
        name: getattr(config, name) for name in ("bf16", "flash_attn", "cache_dir", "trust_remote_code", "cutoff_len")
    }


def given(config: RunConfig) -> dict[str, Any]:
    """Run key -> what a run of `config` is given by runs of earlier stages: `RewardModel`s, or their `Heads`."""
    from discobeta.method import heads

    inputs: dict[str, Any] = {}
    for reading in STAGES[config.stage].reads:
        if reading.idea is None:
            inputs[reading.key] = list(load_reward_models(config))
        elif getattr(config, reading.key) and config.arm.has(reading.idea):
            inputs[reading.key] = heads.load(Path(getattr(config, reading.key)))
    return inputs
