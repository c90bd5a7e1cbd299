"""One run = one flat YAML: read, checked, and saved resolved.

The names are those that users of LLaMA-Factory already have in their files. Names of theirs that are
no keys here are ignored with one line, or refused where they would change the result
(`config_names.py`); an unknown name is an error that offers the nearest known one, if one is near.
This module imports neither torch nor transformers: the workflow checks every run of a study with it
before anything starts.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from discobeta.design.arms import FLAGS, IDEAS, Arm
from discobeta.design.config_names import IGNORED, REFUSED, RENAMED, SAME_ADAMW, is_neutral
from discobeta.design.stages import BASE_STAGE, STAGES, having
from discobeta.design.values import as_schema, finite_number, typed
from discobeta.design.yaml_text import parse_overrides, read_yaml
from discobeta.errors import UserError, did_you_mean, shown

STAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    BASE_STAGE: {"num_eval_generations": 0},
    **{name: row.defaults for name, row in STAGES.items()},
}

TOKENS_PER_PASS, TOKENS_PER_PASS_BF16 = 1024, 8192
"""Of a float32 run, as on CPUs, whose caches hold the activations of few tokens; and of a bf16 run, as on GPUs, which
small passes leave idle. They follow from the config alone: what a machine measures would be another number each time,
and sums in another order."""


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    of: Literal["data", "model", "training", "evaluation", "log", "bookkeeping"] = "training",
    stages: str = "base grid",
    trains: str = "",
) -> Any:
    """A key of a run.

    of: the step that it belongs to. data, model and training decide what is trained; evaluation, what is measured of
    it; log, at which steps a line of the log stands; bookkeeping, nothing that comes out.
    stages: traits (`stages.having`) of those that read it; any other is told that it does not.
    trains: of those whose training reads a key of evaluation.
    """
    keywords = {"help": help, "least": least, "most": most, "of": of, "stages": having(stages)}
    return field(default=default, metadata=keywords | {"trains": having(trains)})


@dataclass(frozen=True, kw_only=True)
class _WhatIsTrained:
    stage: Literal[(BASE_STAGE, *STAGES)] = option(dataclasses.MISSING, "what is trained")
    output_dir: str = option("", "directory of this run", of="bookkeeping")
    seed: int = option(42, "every random stream of the run is derived from it", least=0)


_FLAGS = [
    (flag, bool, option(False, help, stages="grid"))
    for idea in IDEAS
    for flag, help in ((idea.add, f"architecture: {idea.head}"), (idea.use, f"use: {idea.effect}"))
]


@dataclass(frozen=True, kw_only=True)
class RunConfig(dataclasses.make_dataclass("_Flags", _FLAGS, bases=(_WhatIsTrained,), frozen=True, kw_only=True)):
    """One run. Construct it with `from_mapping` or `read`, which check; never by hand."""

    # --- model
    model_name_or_path: str | None = option(None, "hub id or directory of the base model", of="model")
    model_revision: str = option("main", "revision of a hub model", of="model")
    adapter_name_or_path: str | None = option(None, "LoRA adapter to start from", of="model")
    trust_remote_code: bool = option(False, "run code that comes with a hub model", of="model")
    cache_dir: str | None = option(None, "hub cache", of="bookkeeping")
    reward_model: str | None = option(
        None,
        "ppo: an rm run, or a score or value head of another make; several, comma-separated: their mean",
        stages="prompts",
    )
    beta_head: str | None = option(None, "ppo: the dpo run whose Beta Head scales the KL coefficient", stages="prompts")
    finetuning_type: Literal["lora", "full"] = option("lora", "LoRA or all weights")
    lora_rank: int | None = option(8, "LoRA rank; null: that of adapter_name_or_path", least=1, stages="grid")
    lora_alpha: int | None = option(
        None, "LoRA alpha; default twice the rank, or the adapter's", least=1, stages="grid"
    )
    lora_dropout: float | None = option(0.0, "LoRA dropout; null: the adapter's", least=0, most=0.99, stages="grid")
    lora_target: str | None = option(
        "all", "comma-separated names of layers, or all; null: the adapter's", stages="grid"
    )
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2"] = option("auto", "attention implementation")
    gradient_checkpointing: bool = option(False, "recompute activations to save memory")

    # --- a base trained from scratch (stage sft without model_name_or_path)
    model_type: str | None = option(None, "architecture of a new base, e.g. qwen3", stages="base")
    config_overrides: str = option("", "its sizes: hidden_size=64,num_hidden_layers=2", stages="base")
    tokenizer_name: str | None = option(None, "tokenizer of a new base; default: one trained on the data", of="model")
    vocab_size: int = option(2048, "size of a byte-level BPE tokenizer trained on the data", least=260, stages="base")

    # --- method
    pref_beta: float = option(0.1, "beta: weight of the prior against the feedback", least=1e-6, stages="policy")
    pref_loss: Literal["sigmoid", "probit", "ipo", "robust"] = option(
        "sigmoid", "the loss of an arm whose rewards are numbers; ipo: dpo only; robust: rDPO", stages="pairs"
    )
    dpo_label_smoothing: float = option(
        0.0, "share of labels taken to be flipped, below 0.5; sigmoid: cDPO, robust: rDPO", least=0, stages="pairs"
    )
    beta_rule: Literal["fixed", "learned", "mallows", "batch"] = option(
        "fixed",
        "what scales pref_beta: nothing, one learned number, the dispersion of MallowsPO, beta-DPO's batch rule",
        stages="reference",
    )
    head_pooling: Literal["last", "mean"] = option("last", "what the Disco Head's variance reads", stages="pairs")
    disco_learning_rate: float | None = option(None, "default 3 x learning_rate", least=0, stages="pairs")
    beta_learning_rate: float | None = option(
        None, "also of beta_rule: learned; default 5 x learning_rate", least=0, stages="reference"
    )
    head_max_grad_norm: float = option(1.0, "clipping of each head's gradient", least=0, stages="grid")

    # --- data
    dataset: str | None = option(None, "comma-separated names (dataset_dir), local files or hub ids", of="data")
    eval_dataset: str | None = option(None, "held-out data, named likewise", of="data")
    calibration_dataset: str | None = option(
        None,
        "data for what is fitted after training (temperatures), neither trained nor measured on; named likewise",
        of="data",
        stages="pairs",
    )
    dataset_dir: str = option("data", "folder of dataset_info.json or datasets.yaml", of="data")
    split: str = option("train", "split of a hub dataset", of="data")
    eval_split: str = option("test", "split of a hub dataset that eval_dataset or calibration_dataset names", of="data")
    cutoff_len: int = option(2048, "longest prompt + response, in tokens", least=2, of="data")
    max_samples: int | None = option(None, "use the first n rows of each dataset", least=1, of="data")
    val_size: float = option(0.0, "held-out share (< 1) or number of rows (>= 1) of dataset", least=0, of="data")
    max_unusable_rows: float = option(
        0.05, "refuse the data above this share of unusable rows", least=0, most=1, of="data"
    )
    tokenized_path: str | None = option(None, "folder of tokenised rows: read if there, else written", of="data")
    reference_path: str | None = option(
        None, "folder of the reference pass: read if there, else written", of="data", stages="reference"
    )

    # --- optimisation
    per_device_train_batch_size: int = option(
        8, "with gradient_accumulation_steps: pairs (ppo: responses) per optimiser step and device", least=1
    )
    per_device_eval_batch_size: int = option(
        8,
        "pairs per pass without gradient, at most; responses are sampled 8 x as many",
        least=1,
        of="evaluation",
        stages="grid",
        trains="base policy",
    )
    gradient_accumulation_steps: int = option(1, "factor of per_device_train_batch_size", least=1)
    tokens_per_pass: int | None = option(
        None, "tokens of a forward pass, padding included; default 8192 with bf16, else 1024", least=1, stages="grid"
    )
    share_prompt: bool = option(
        True, "chosen and rejected behind one prompt, in models where that computes the same", stages="pairs"
    )
    fused_lora: bool = option(True, "LoRA as one step of autograd; false: PEFT's own", stages="grid")
    learning_rate: float = option(5e-5, "of the adapter (or the model)", least=0)
    num_train_epochs: float = option(3.0, "passes over the data", least=0)
    max_steps: int = option(-1, "optimiser steps; -1: by num_train_epochs", least=-1)
    stop_after_steps: int | None = option(None, "stop early, with the schedule of the whole run", least=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        option("linear", "schedule of the learning rate after warm-up")
    )
    warmup_ratio: float = option(0.0, "share of the steps", least=0, most=1)
    warmup_steps: int = option(0, "overrides warmup_ratio if positive; below 1: a share, as warmup_ratio", least=0)
    optim: Literal["adamw_torch"] = option("adamw_torch", "optimiser")
    adam_beta1: float = option(0.9, "AdamW", least=0, most=0.999999)
    adam_beta2: float = option(0.999, "AdamW", least=0, most=0.999999)
    adam_epsilon: float = option(1e-8, "AdamW", least=1e-16)
    weight_decay: float = option(0.0, "AdamW, also of biases and norms (sft: as HF's Trainer, not); no head's", least=0)
    max_grad_norm: float = option(1.0, "clipping of the model's gradient", least=0)
    bf16: bool = option(False, "bf16 autocast; sums, losses and heads stay float32")
    deterministic: bool = option(False, "deterministic kernels on a GPU")

    # --- bookkeeping
    logging_steps: int = option(10, "optimiser steps between log lines", least=1, of="log")
    save_steps: int = option(500, "optimiser steps between checkpoints; 0: none", least=0, of="bookkeeping")
    eval_strategy: Literal["no", "steps", "epoch"] = option("no", "held-out loss during training")
    eval_steps: int | None = option(None, "for eval_strategy: steps; default logging_steps", least=1, of="log")
    plot_loss: bool = option(False, "draw loss.png; in a study only the base's", of="bookkeeping")
    report_to: Literal["none", "tensorboard", "wandb"] = option("none", "tracker", of="bookkeeping")
    run_name: str | None = option(None, "name in the tracker", of="bookkeeping")
    resume_from_checkpoint: str | bool | None = option(
        None, "default: from the run's own checkpoint, if any", of="bookkeeping"
    )
    overwrite_output_dir: bool = option(False, "replace another run that output_dir holds", of="bookkeeping")

    # --- generation (evaluation of policies; rollouts of ppo)
    max_new_tokens: int = option(
        64, "longest sampled response", least=1, of="evaluation", stages="grid", trains="prompts"
    )
    temperature: float = option(1.0, "of sampling", least=1e-3, of="evaluation", stages="grid", trains="prompts")
    top_p: float = option(1.0, "of sampling", least=1e-6, most=1, of="evaluation", stages="grid", trains="prompts")
    top_k: int = option(0, "of sampling; 0: off", least=0, of="evaluation", stages="grid", trains="prompts")
    num_eval_generations: int | None = option(
        None,
        "prompts answered in evaluation (rm: by the reference, for best_of)",
        least=0,
        of="evaluation",
        stages="grid",
    )
    generations_per_prompt: int = option(
        1,
        "responses to each of these prompts, of the policy and of the reference",
        least=1,
        of="evaluation",
        stages="policy",
    )
    best_of: int = option(
        0,
        "the reference's responses to each of these prompts that the run ranks (best-of-n); 0: none",
        least=0,
        of="evaluation",
        stages="pairs",
    )
    reference_answers_path: str | None = option(
        None,
        "folder of the reference's answers, which `discobeta answers` writes: read in evaluation if they are there",
        of="bookkeeping",
        stages="grid",
    )
    ground_truth: str = option(
        "none",
        "the true reward of a sampled response, if known: none, world (the embedded one) or a path to a world.json",
        of="evaluation",
        stages="grid",
    )

    # --- PPO
    ppo_epochs: int = option(4, "passes over the buffer", least=1, stages="prompts")
    ppo_buffer_size: int = option(1, "optimiser steps' worth of responses in the buffer", least=1, stages="prompts")
    ppo_target: float | None = option(None, "KL per sequence to steer the coefficient to", least=1e-6, stages="prompts")
    ppo_score_norm: bool = option(
        False, "standardise scores by those of the reference's own responses", stages="prompts"
    )
    uncertainty_penalty: float = option(
        0.0, "k: score = mu - k sigma; with several reward models, their mean - k variance", least=0, stages="prompts"
    )
    ppo_whiten_rewards: bool = option(False, "scale the tokens' rewards to variance 1", stages="prompts")
    missing_eos_penalty: float = option(
        1.0, "subtracted from the score of a response that does not end", least=0, stages="prompts"
    )
    cliprange: float = option(0.2, "of the policy's ratio", least=1e-6, stages="prompts")
    cliprange_value: float = option(0.2, "of the value's step", least=1e-6, stages="prompts")
    gamma: float = option(1.0, "discount", least=0, most=1, stages="prompts")
    lam: float = option(0.95, "lambda of the generalised advantages", least=0, most=1, stages="prompts")
    value_learning_rate: float | None = option(
        None, "of the value head; default 5 x learning_rate", least=0, stages="prompts"
    )

    @classmethod
    def from_mapping(cls, settings: dict[str, Any], where: str = "run config") -> tuple[RunConfig, list[str]]:
        """The checked config, and one line for each setting that was accepted and means nothing here.

        A key that the stage does not read keeps its default, whatever was written.
        """
        settings, notes = _as_spelled_here(settings)
        values = {}
        for name, value in settings.items():
            if name in FIELDS:
                try:
                    values[name] = value_of(name, value)
                except ValueError as error:
                    raise UserError(f"{where}: {name}: {error}") from None
            elif name in IGNORED:
                if name == "deepspeed":
                    _check_deepspeed(value, where)
                notes.append(f"{name} is ignored: {IGNORED[name]}")
            elif name in REFUSED:
                neutral, why = REFUSED[name]
                if not is_neutral(value, neutral):
                    raise UserError(f"{where}: {name}: {shown(value)} is not supported: {why}")
            else:
                raise UserError(f"{where}: {unknown(name, settings.get('stage'))}")
        if "stage" not in values:
            raise UserError(f"{where}: stage is missing ({BASE_STAGE}, {', '.join(STAGES)})")
        stage = values["stage"]
        for name in [name for name in values if stage not in read_by(name) and name not in FLAGS]:  # flags are refused
            if (value := values.pop(name)) is not None and value != default_of(name, stage):
                notes.append(f"{name} is unused: {stage} does not read it ({who_reads(name)})")
        for name, value in STAGE_DEFAULTS[stage].items():
            if values.get(name) is None:
                values[name] = value
        for name in ("lora_rank", "lora_dropout", "lora_target"):  # what is not written is as the adapter has it
            if values.get(name) is None:
                values[name] = None if values.get("adapter_name_or_path") else FIELDS[name].default
        if values.get("tokens_per_pass") is None and stage in read_by("tokens_per_pass"):
            values["tokens_per_pass"] = TOKENS_PER_PASS_BF16 if values.get("bf16") else TOKENS_PER_PASS
        config = cls(**values)
        try:
            config.check()
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return config, notes

    @classmethod
    def read(cls, path: str | Path, overrides: list[str] = ()) -> tuple[RunConfig, list[str]]:
        """From a YAML file, with `key=value` overrides on top."""
        return cls.from_mapping(read_yaml(path) | parse_overrides(overrides), str(path))

    @property
    def arm(self) -> Arm:
        return Arm.of(self)

    @property
    def reference_samples(self) -> int:
        """How many responses of the reference to each answered prompt the evaluation reads; 0: to none."""
        if self.stage == BASE_STAGE or not self.num_eval_generations:
            return 0
        return max(self.best_of, self.generations_per_prompt if STAGES[self.stage].is_policy else 0)

    def replace(self, **changes: Any) -> RunConfig:
        return dataclasses.replace(self, **changes)

    def resolved(self) -> dict[str, Any]:
        """Every key with the value that the run uses, as plain YAML types."""
        return dict(vars(self))  # in the order of the fields; all values are plain, and asdict copies for long

    def settings_of(self, *steps: str) -> dict[str, Any]:
        """The keys, resolved, on which the outcome of these steps depends in a run of this stage; see `option`.

        training: with the keys of data and model.
        """
        return {name: getattr(self, name) for step in steps for name in keys_of(step, self.stage)}

    def rate(self, key: str) -> float:
        """The learning rate of a head: its own or, by default, `RATES` times the model's."""
        own = getattr(self, key)
        return RATES[key] * self.learning_rate if own is None else own

    def as_trained(self) -> dict[str, Any]:
        """`settings_of("training")`, equal in two configs that would be trained alike: what is left to a default is
        written out, and what the run does not read is not there."""
        settings = self.settings_of("training")
        settings |= {key: self.rate(key) for key in RATES if key in settings}
        used, row = self.arm.trained_as(self.stage).used, STAGES[self.stage]
        unread = {"num_train_epochs"} if self.max_steps > 0 else set()
        unread |= {"warmup_ratio"} if self.warmup_steps > 0 else set()
        if self.finetuning_type == "full":
            unread |= {"lora_rank", "lora_alpha", "lora_dropout", "lora_target", "fused_lora"}
        elif self.lora_alpha is None and self.lora_rank:
            settings["lora_alpha"] = 2 * self.lora_rank
        # an idea's head, or what stands in its place
        trained = {idea.key for idea in IDEAS if idea.key in used or any(self._says(name) for name in idea.decides)}
        unread |= {f"{idea.key}_learning_rate" for idea in IDEAS if idea.key not in trained}
        if row.has_pairs and not trained:
            unread.add("head_max_grad_norm")
        return {key: value for key, value in settings.items() if key not in unread}

    def _says(self, name: str) -> bool:
        return getattr(self, name) != FIELDS[name].default

    def check(self) -> None:
        arm = self.arm  # raises on a use without its head
        is_base = self.stage == BASE_STAGE
        if is_base and arm != Arm():
            raise UserError(f"stage {BASE_STAGE} trains the base, before any head: leave {', '.join(FLAGS)} out")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise UserError(
                f"lr_scheduler_type: polynomial ends at {POLYNOMIAL_END:g}, so learning_rate should be above it, not "
                f"{self.learning_rate:g}"
            )
        if self.val_size and self.eval_dataset:
            raise UserError("val_size and eval_dataset contradict each other: give one of them")
        if self.eval_strategy != "no" and not (self.val_size or self.eval_dataset or self.tokenized_path):
            raise UserError(f"eval_strategy: {self.eval_strategy} needs eval_dataset or val_size")
        if self.val_size >= 1 and self.val_size != int(self.val_size):
            raise UserError(f"val_size: {self.val_size}: a share below 1, or a whole number of rows")
        if self.ground_truth not in ("none", "world") and not self.ground_truth.endswith("world.json"):
            raise UserError(
                f"ground_truth: {shown(self.ground_truth)} is neither none nor world nor a path to a world.json"
            )
        if self.adapter_name_or_path and self.finetuning_type == "full":
            raise UserError("adapter_name_or_path needs finetuning_type: lora")
        if not is_base and not self.model_name_or_path:
            raise UserError(f"stage {self.stage} needs model_name_or_path (a hub id or a directory)")
        if is_base and bool(self.model_name_or_path) == bool(self.model_type):
            raise UserError(f"stage {BASE_STAGE} needs either model_name_or_path or model_type (a base from scratch)")
        if is_base and self.finetuning_type != "full":
            raise UserError(f"stage {BASE_STAGE} trains all weights of the base: set finetuning_type: full")
        if is_base and isinstance(self.resume_from_checkpoint, str):
            raise UserError(f"stage {BASE_STAGE} writes no checkpoints: leave resume_from_checkpoint out")
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs == 0):
            raise UserError("max_steps and num_train_epochs leave nothing to train")
        if is_base:
            return
        if self.best_of == 1:
            raise UserError("best_of: 1: a single response is no choice; 2 or more, or 0 for none")
        if self.best_of and not self.num_eval_generations:
            raise UserError(
                f"best_of: {self.best_of} needs num_eval_generations: how many prompts the reference answers"
            )
        self._check_method()
        row = STAGES[self.stage]
        if not row.has_pairs and self.eval_strategy != "no":
            raise UserError(f"stage {self.stage} is measured after training: set eval_strategy: no")
        for reading in row.reads:
            idea = next((idea for idea in IDEAS if idea.key == reading.idea), None)
            if idea and idea.key in arm.used and not getattr(self, reading.key):
                raise UserError(
                    f"{idea.use}: true in stage {self.stage} needs {reading.key}: a {reading.stage} run that used "
                    "its head"
                )

    @property
    def reward_models(self) -> list[str]:
        """What `reward_model` names, one by one; `,key=value` is a part of a run's directory in a sweep."""
        return [name.strip() for name in re.split(r",(?!\w+=)", self.reward_model or "") if name.strip()]

    def _check_method(self) -> None:
        """Refuse a loss, a rule of beta or a penalty that its stage, its arm or another one leaves no meaning."""
        used = [idea for idea in IDEAS if idea.key in self.arm.trained_as(self.stage).used]
        for idea in used:
            for name in idea.decides:
                if (value := getattr(self, name)) != FIELDS[name].default:
                    raise UserError(f"{name}: {value} is for arms without {idea.use}: true, which stands in its place")
        if self.pref_loss == "ipo" and not STAGES[self.stage].reference_pass:
            raise UserError(f"pref_loss: ipo is a loss of log-ratios to a reference, and stage {self.stage} has none")
        if self.pref_loss == "ipo" and (self.beta_rule != "fixed" or any("beta_rule" in idea.decides for idea in used)):
            raise UserError(
                "pref_loss: ipo needs a fixed beta: the margin that it aims at, 1/(2 beta), is no likelihood's"
            )
        if self.dpo_label_smoothing >= 0.5:
            raise UserError(
                f"dpo_label_smoothing: {self.dpo_label_smoothing}: below 0.5, at which a label says nothing"
            )
        if self.dpo_label_smoothing and self.pref_loss not in ("sigmoid", "robust"):
            raise UserError(f"dpo_label_smoothing needs pref_loss: sigmoid or robust, not {self.pref_loss}")
        if self.pref_loss == "robust" and not self.dpo_label_smoothing:
            raise UserError("pref_loss: robust needs dpo_label_smoothing above 0: without it, it is sigmoid")
        if len(set(self.reward_models)) < len(self.reward_models):
            raise UserError(f"reward_model: {self.reward_model} names one of them twice")
        if len(self.reward_models) > 1 and not self.ppo_score_norm:
            raise UserError("several reward models need ppo_score_norm: true: each has a unit of its own")
        has_variance = len(self.reward_models) > 1 or any(self.stage in idea.given for idea in used)
        if self.uncertainty_penalty and not has_variance:
            uses = " or ".join(idea.use for idea in IDEAS if self.stage in idea.given)
            raise UserError(
                f"uncertainty_penalty needs a reward model with a variance ({uses}: true), or several of them"
            )


def _as_spelled_here(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings with transformers' spellings of a value in ours, and a line where one is another word."""
    settings, notes = dict(settings), []
    report_to = settings.get("report_to", "none")
    if report_to in (None, []):
        settings["report_to"] = "none"
    elif isinstance(report_to, list) and len(report_to) == 1:
        settings["report_to"] = report_to[0]
    share = finite_number(settings.get("warmup_steps"))
    if share is not None and 0 < share < 1:
        settings |= {"warmup_steps": 0, "warmup_ratio": share}
    optim = settings.get("optim")
    if isinstance(optim, str) and optim in SAME_ADAMW:
        settings["optim"] = "adamw_torch"
        notes.append(f"optim: {optim} is ignored: adamw_torch computes the same")
    for name in ("output_dir", "gradient_checkpointing"):  # transformers' defaults
        if name in settings and settings[name] is None:
            del settings[name]
    return settings, notes


def _check_deepspeed(value: Any, where: str) -> None:
    """Refuse a DeepSpeed config, a mapping or its file, that does more than share memory: what else it says is either
    `auto` or, as the Trainer insists, what the YAML says."""
    settings = value
    if isinstance(value, str) and Path(value).is_file():
        settings = read_yaml(value)
    if not isinstance(settings, dict):
        return
    optimizer, half = settings.get("optimizer"), settings.get("fp16")
    if optimizer and (not isinstance(optimizer, dict) or optimizer.get("type") not in ("Adam", "AdamW")):
        fault = "only AdamW is supported"  # which its Adam is too
    elif settings.get("scheduler"):
        fault = "the schedule is lr_scheduler_type"
    elif isinstance(half, dict) and half.get("enabled") is True:
        fault = REFUSED["fp16"][1]
    else:
        return
    raise UserError(f"{where}: deepspeed: {shown(value)} is not supported: {fault}")


FIELDS = {entry.name: entry for entry in dataclasses.fields(RunConfig)}
"""Every key of a run -> its field."""


_hints = cache(typing.get_type_hints)  # which compiles every annotation anew


def value_of(name: str, value: Any) -> Any:
    """What is written under a key of a run, in the key's type. Raises ValueError that says what would be right."""
    return typed(value, _hints(RunConfig)[name], FIELDS[name].metadata)


def schema_of(name: str) -> dict[str, Any]:
    """The JSON schema of what a key of a run may be."""
    return as_schema(_hints(RunConfig)[name], FIELDS[name].metadata)


@cache
def keys_of(step: str, stage: str) -> tuple[str, ...]:
    """The keys of the run config that decide the outcome of `step` in `stage`, in their order; see `option`."""
    parts = ("data", "model", "training") if step == "training" else (step,)
    found = []
    for entry in FIELDS.values():
        of, stages, trains = (entry.metadata[key] for key in ("of", "stages", "trains"))
        if (of in parts and stage in stages) or (step == "training" and stage in trains):
            found.append(entry.name)
    return tuple(found)


@cache
def read_by(name: str) -> tuple[str, ...]:
    """The stages that read a key of the run config, for whatever step."""
    metadata = FIELDS[name].metadata
    return tuple(stage for stage in (BASE_STAGE, *STAGES) if stage in (*metadata["stages"], *metadata["trains"]))


def who_reads(name: str) -> str:
    """E.g. "ppo does", "rm, dpo and ppo do"."""
    *others, last = read_by(name)
    return f"{', '.join(others)} and {last} do" if others else f"{last} does"


def unknown(name: str, stage: Any = None) -> str:
    """What is to be said of a name that is no key of a run: what it is called here, or what it may be a slip of."""
    what = f"unknown key {shown(name)}"
    if name in RENAMED:
        return f"{what}: it is {RENAMED[name]} here"
    if name in IGNORED:
        return f"{what}: nothing depends on it ({IGNORED[name]})"
    if name in REFUSED:
        return f"{what}: it is not supported: {REFUSED[name][1]}"
    section, dot, key = name.rpartition(".")
    if dot and section in ("common", BASE_STAGE, *STAGES) and key in FIELDS:
        return f"{what}: a run has one stage and flat keys: write {key}"
    near = did_you_mean(name, FIELDS) or did_you_mean(name, (*IGNORED, *REFUSED))
    listed = f" {stage}" if isinstance(stage, str) and stage in STAGE_DEFAULTS else ""
    return f"{what}{near or f'; `discobeta keys{listed}` lists them all'}"


POLYNOMIAL_END = 1e-7
"""Learning rate at which transformers' polynomial schedule ends."""

RATES = {"disco_learning_rate": 3, "beta_learning_rate": 5, "value_learning_rate": 5}
"""Learning rates of heads, by default as many times the model's."""


def default_of(name: str, stage: str) -> Any:
    """What a key is in a run of `stage` that does not say it."""
    return STAGE_DEFAULTS[stage].get(name, FIELDS[name].default)
