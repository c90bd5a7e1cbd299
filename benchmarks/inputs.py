"""What both sides are given: a base with random weights, its tokenizer, and pairs of words, at two sizes.

Random weights cost what trained ones cost. In the files a token is a word, and every text that two tokens meet in is
split between them, so both sides read the same ids from the same lines.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Size:
    """A base and pairs for it. Lengths are mean tokens of prompt, chosen and rejected, <eos> included; None: those
    of the embedded world, whose sentences the pairs then are."""

    pairs_per_step: int
    model: dict[str, Any]
    lengths: tuple[int, int, int] | None
    learning_rates: dict[str, float]
    pref_beta: float
    steps: int  # that are counted
    tokens_per_pass: int | None = None


def embedded_model() -> dict[str, Any]:
    """The base's shape in config/config.yaml."""
    settings = yaml.safe_load((ROOT / "config/config.yaml").read_text())["base"]["sft"]["config_overrides"]
    return {key.strip(): yaml.safe_load(value) for key, value in (item.split("=") for item in settings.split(","))}


LONG = {
    "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 384, "tie_word_embeddings": True,
}  # fmt: skip

SIZES = {
    # config/config.yaml: its base, its batch, its learning rates and beta
    "embedded": Size(32, embedded_model(), None, {"dpo": 1e-3, "rm": 3e-3}, 0.5, steps=20, tokens_per_pass=2048),
    # the lengths of hh-rlhf's harmless subset
    "long": Size(8, LONG, (118, 44, 56), {"dpo": 2e-4, "rm": 2e-4}, 0.1, steps=4),
}
QUICK = {
    "embedded": Size(8, embedded_model(), None, {"dpo": 1e-3, "rm": 3e-3}, 0.5, steps=2),
    "long": Size(4, LONG | {"num_hidden_layers": 2}, (30, 11, 14), {"dpo": 2e-4, "rm": 2e-4}, 0.1, steps=2),
}


def make_base(folder: Path, size: Size) -> None:
    """Weights drawn from seed 0, and a tokenizer of one word per id."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from discobeta.inputs import world

    if size.lengths is None:
        tokenizer, words = world.build_tokenizer(), len(world.vocabulary())
    else:
        tokenizer, words = word_tokenizer(size.model["vocab_size"]), size.model["vocab_size"]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    shape = {"vocab_size": words, "max_position_embeddings": 2048} | size.model
    Qwen3ForCausalLM(Qwen3Config(**shape, **special)).save_pretrained(folder)


def word_tokenizer(words: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, words))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def write_pairs(path: Path, size: Size, count: int) -> None:
    """{"prompt", "chosen", "rejected"} per line; a prompt ends in a space, which no tokenizer here sees."""
    draws = random.Random(0)
    pairs = world_pairs(count, draws) if size.lengths is None else word_pairs(count, size, draws)
    with path.open("w") as stream:
        for prompt, chosen, rejected in pairs:
            stream.write(json.dumps({"prompt": f"{prompt} ", "chosen": chosen, "rejected": rejected}) + "\n")


def world_pairs(count: int, draws: random.Random) -> Iterator[tuple[str, str, str]]:
    """Prompts of the embedded world, each with two different completions."""
    from discobeta.inputs import world

    for _ in range(count):
        prompt = world.draw_prompt(draws, held_out=False)
        topic = world.DEFAULT.topic_of(prompt)
        chosen = rejected = world.draw_completion(draws, topic)
        while rejected == chosen:
            rejected = world.draw_completion(draws, topic)
        yield prompt, chosen, rejected


def word_pairs(count: int, size: Size, draws: random.Random) -> Iterator[tuple[str, ...]]:
    """Words at random. Lengths are quantiles of exponential distributions, shuffled: few of them have their mean."""
    columns = [[round(-mean * math.log(1 - (i + 0.5) / count)) for i in range(count)] for mean in size.lengths]
    for column in columns:
        draws.shuffle(column)
    for prompt, *responses in zip(*columns, strict=True):
        lengths = [prompt, *(length - 1 for length in responses)]  # an <eos> comes behind a response
        words = [[f"w{draws.randrange(2, size.model['vocab_size'])}" for _ in range(max(n, 2))] for n in lengths]
        yield tuple(map(" ".join, words))
