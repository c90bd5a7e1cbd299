"""What a study would take on a GPU that nobody has measured: arithmetic over the card's peak, as a range.

A pass forward over n tokens is 2 n (weights that tokens go through) floating-point operations and, with causal
attention over T tokens, 2 n T (layers x width of all heads) more (Kaplan et al. 2020, section 2.1); a pass backward is
as much again where only an adapter is trained, twice as much where all weights are, and recomputed activations are one
forward pass more. What a GPU reaches of its peak is not known here: `UTILISATION` is a judgement. At worst a pass takes
what the host needs to launch its kernels, `HOST`, which was measured. No torch: of a model only config.json is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from discobeta import identity
from discobeta.data.counts import Count
from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.design.study import Run, Study
from discobeta.errors import UserError
from discobeta.files import read_json

CARDS = {
    "A100": (312e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "L40S": (362e12, 0.864e12),
    "L40": (181e12, 0.864e12),
    "A10": (125e12, 0.6e12),
    "RTX4090": (165e12, 1.01e12),
    "RTX3090": (71e12, 0.936e12),
}
"""Card -> (operations a second of dense bf16 matrices, bytes a second of its memory), of the makers' data sheets."""

UTILISATION = 0.15, 0.45
"""Of the peak, in training and in passes without gradients: at worst and at best. A judgement, not measured."""

HOST = 3.3e-3
"""Seconds that a layer takes at worst, of a pass forward or of one more token of a batch, however few its tokens are:
Python and the launches of small kernels; a pass backward takes two. Measured on one machine (results/published/
gpu-check): a step of three passes forward and backward through 28 layers .63 to .78 s, .0025 to .0031 a layer; a ppo
update of 28.5 s, less some 5 for judging and training, 256 tokens through as many layers, .0033."""

SHAPES = {
    "Qwen/Qwen3-0.6B": {
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151_936, "model_type": "qwen3",
        "tie_word_embeddings": True, "max_position_embeddings": 40_960,
    },
}  # fmt: skip
"""Of the config.json of the shipped studies' base, so that they can be estimated where it has not been downloaded."""


@dataclass(frozen=True)
class Shape:
    """A decoder, as far as arithmetic goes."""

    body: int  # weights that every token goes through, embeddings and head left out
    head: int  # those of the head, for the tokens whose logits are wanted
    attention: int  # layers x width of all heads
    layers: int

    def forward(self, tokens: float, longest: float, with_logits: float = 0.0) -> float:
        """Operations of a pass over `tokens` tokens, in rows of `longest`; with_logits: how many need logits."""
        return 2 * tokens * self.body + 2 * tokens * longest * self.attention + 2 * with_logits * self.head


UNGATED = {
    "apertus", "arcee", "biogpt", "gpt_neox", "jais2", "nanochat", "nemotron", "persimmon", "phi", "starcoder2",
}  # fmt: skip
"""Kinds of model whose feed-forward layers are two matrices, and whose config.json has the keys of those with three."""


def shape_of(settings: dict[str, Any]) -> Shape:
    """Of a config.json of a decoder through which every token goes alike (Llama, Qwen, Mistral, Gemma, Phi, …).

    Raises KeyError where it says too little, and for experts, of which a token sees a few.
    """
    if experts := next((name for name in settings if "expert" in name and settings[name]), None):
        raise KeyError(experts)
    matrices = 2 if settings.get("model_type") in UNGATED else 3
    hidden, layers, heads = (settings[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    size = settings.get("head_dim") or hidden // heads
    groups = settings.get("num_key_value_heads") or heads
    of_attention = hidden * size * (2 * heads + 2 * groups)
    body = layers * (of_attention + matrices * hidden * settings["intermediate_size"])
    return Shape(body, hidden * settings["vocab_size"], layers * heads * size, layers)


def read_shape(study: Study) -> Shape:
    """Of the study's base. Raises UserError where its config.json is not here or says too little."""
    name = study.model["model_name_or_path"]
    config = study.config(study.runs()[0])
    try:
        settings = read_json(identity.folder_of(name, "config.json", config, "model_name_or_path") / "config.json")
    except UserError:
        if name not in SHAPES:
            raise
        settings = SHAPES[name]
    try:
        return shape_of(settings)
    except (KeyError, TypeError, ZeroDivisionError):
        raise UserError(f"config.json of {name} does not say the sizes of layers that all tokens pass") from None


class Arithmetic:
    """Seconds of the jobs of a study on one card, at best and at worst; None of a job of which that cannot be said.

    rows: of the study; where their mean tokens are not said, each is taken to be as long as `cutoff_len` lets it be,
    which those of no data set are.
    """

    def __init__(self, study: Study, card: str, rows: Count) -> None:
        if card not in CARDS:
            raise UserError(f"--card: {card} is none of {', '.join(CARDS)}")
        self.study, self.train, self.held_out, self.tokens = study, rows.train, rows.held_out, rows.tokens
        self.shape = read_shape(study)
        self.peak, self.bandwidth = CARDS[card]
        long = f"rows of {rows.tokens:,.0f} tokens" if rows.tokens else "every row as long as cutoff_len lets it be"
        low, high = UTILISATION
        self.said = (
            f"arithmetic, not measured. One {card} at {low:.0%} to {high:.0%} of {self.peak / 1e12:.0f} TFLOP/s in "
            f"bf16;\n  at worst {HOST * 1e3:g} ms a layer of a pass or of a sampled token; "
            + long
            + ("." if rows.tokens else ",\n  which makes all of it an upper bound: --rows … tokens=N says the mean.")
        )

    def training(self, run: Run, rows: int, steps: int) -> tuple[float, float] | None:
        """Of one run, with what is measured of it while it trains."""
        config = self.study.config(run)
        if not config.bf16:
            return None
        row = STAGES[config.stage]
        if not row.has_pairs:
            return self._updates(config, rows)
        operations = rows * self._pass(config) * self._factor(config)
        launches = max(steps, self._passes(config, rows)) * self._launches(config)
        if config.eval_strategy != "no":
            every = config.eval_steps or config.logging_steps
            times = math.ceil(config.num_train_epochs) if config.eval_strategy == "epoch" else math.ceil(steps / every)
            operations += times * self.held_out * self._pass(config)
            launches += times * self._passes(config, self.held_out)
        return self._of(operations, launches)

    def shared(self, work: str, runs: list[Run]) -> tuple[float, float] | None:
        """Of one job that many runs read: the reference pass, or the reference's answers to one seed of a stage."""
        stage = next((run for run in runs if STAGES[run.stage].reference_pass), None)
        if work == "reference" and stage is not None:
            config = self.study.config(stage)
            rows = self.train + self.held_out
            return self._of(rows * self._pass(config), self._passes(config, rows)) if config.bf16 else None
        answered = [self.study.config(run) for run in runs if self.study.is_answered(run)]
        if work == "answers" and answered and answered[0].bf16:
            config = answered[0]
            return self._sampling(config, config.num_eval_generations, config.reference_samples)
        return None

    def evaluation(self, run: Run) -> tuple[float, float] | None:
        config = self.study.config(run)
        if not config.bf16:
            return None
        row = STAGES[config.stage]
        low, high = 0.0, 0.0
        if row.has_pairs:
            low, high = self._of(self.held_out * self._pass(config), self._passes(config, self.held_out))
        if row.is_policy and config.num_eval_generations:
            more = self._sampling(config, config.num_eval_generations, config.generations_per_prompt)
            low, high = low + more[0], high + more[1]
        return low, high

    def _row(self, config: RunConfig) -> float:
        """Tokens of a row: of a pair both responses."""
        pairs = STAGES[config.stage].has_pairs
        most = (2 if pairs else 1) * config.cutoff_len
        return most if self.tokens is None else min(most, self.tokens if pairs else self.tokens / 2)

    def _pass(self, config: RunConfig) -> float:
        """Operations of a pass forward over a pair. Logits are those of responses: half of the tokens."""
        tokens, row = self._row(config), STAGES[config.stage]
        return self.shape.forward(tokens, min(tokens, config.cutoff_len), tokens / 2 if row.is_policy else 0)

    def _passes(self, config: RunConfig, rows: float) -> float:
        """Passes forward over so many rows, at the fewest."""
        return rows * self._row(config) / config.tokens_per_pass

    def _launches(self, config: RunConfig) -> float:
        """Passes forward whose launches those of a pass in training are."""
        return 3 + bool(config.gradient_checkpointing)

    def _factor(self, config: RunConfig) -> float:
        """Passes forward that a step of training is worth."""
        return 1 + (1 if config.finetuning_type == "lora" else 2) + bool(config.gradient_checkpointing)

    def _updates(self, config: RunConfig, rows: int) -> tuple[float, float]:
        """Of ppo: each response is sampled, judged by policy, reference and reward model, and trained on ppo_epochs
        times."""
        tokens = self._row(config) + config.max_new_tokens
        one = self.shape.forward(tokens, tokens, config.max_new_tokens)
        passes = rows * tokens / config.tokens_per_pass
        low, high = self._of(
            rows * one * (3 + config.ppo_epochs * self._factor(config)),
            passes * (3 + config.ppo_epochs * self._launches(config)),
        )
        update = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.ppo_buffer_size
        sampled = self._sampling(config, update)
        updates = rows / update
        return low + updates * sampled[0], high + updates * sampled[1]

    def _sampling(self, config: RunConfig, prompts: int, each: int = 1) -> tuple[float, float]:
        """`each` responses to every prompt, one after the other, and 8 x per_device_eval_batch_size prompts at a time;
        all responses are as long as max_new_tokens."""
        batches = each * math.ceil(prompts / (8 * config.per_device_eval_batch_size))
        reading = 2 * (self.shape.body + self.shape.head) / self.bandwidth
        read = self._of(each * prompts * self.shape.forward(self._row(config), self._row(config)), batches)
        steps = batches * config.max_new_tokens
        return read[0] + steps * reading, read[1] + steps * max(reading, HOST * self.shape.layers)

    def _of(self, operations: float, launches: float) -> tuple[float, float]:
        """Seconds at best and at worst. launches: as how many passes forward its kernels are launched."""
        worst, best = UTILISATION
        at_worst = max(operations / self.peak / worst, launches * self.shape.layers * HOST)
        return operations / self.peak / best, at_worst
