"""What both sides are given: a base with random weights, its tokenizer, and pairs of words, at two sizes.

Random weights cost what trained ones cost. In the files a token is a word, and every text that two tokens meet in is
split between them, so both sides read the same ids from the same lines.
"""

from __future__ import annotations

import json
import random
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
    steps: int  # that are counted


def embedded_model() -> dict[str, Any]:
    """The base's shape in config/config.yaml."""
    settings = yaml.safe_load((ROOT / "config/config.yaml").read_text())["base"]["sft"]["config_overrides"]
    return {key.strip(): yaml.safe_load(value) for key, value in (item.split("=") for item in settings.split(","))}


LONG = {
    "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 384, "tie_word_embeddings": True,
}  # fmt: skip

SIZES = {
    # config/config.yaml: its base, its batch, its learning rates
    "embedded": Size(32, embedded_model(), None, {"dpo": 1e-3, "rm": 3e-3}, steps=30),
    # the lengths of hh-rlhf's harmless subset
    "long": Size(8, LONG, (118, 44, 56), {"dpo": 2e-4, "rm": 2e-4}, steps=6),
}
QUICK = {
    "embedded": Size(8, embedded_model(), None, {"dpo": 1e-3, "rm": 3e-3}, steps=2),
    "long": Size(4, LONG | {"num_hidden_layers": 2}, (30, 11, 14), {"dpo": 2e-4, "rm": 2e-4}, steps=2),
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
    import numpy as np

    draw = world_pair if size.lengths is None else words_pair
    of_words, of_lengths = random.Random(0), np.random.default_rng(0)
    with path.open("w") as stream:
        for _ in range(count):
            prompt, chosen, rejected = draw(size, of_words, of_lengths)
            stream.write(json.dumps({"prompt": f"{prompt} ", "chosen": chosen, "rejected": rejected}) + "\n")


def world_pair(size: Size, of_words: random.Random, _) -> tuple[str, str, str]:
    """A prompt of the embedded world and two different completions."""
    from discobeta.inputs import world

    prompt = world.draw_prompt(of_words, held_out=False)
    chosen = rejected = world.draw_completion(of_words, world.topic_of(prompt))
    while rejected == chosen:
        rejected = world.draw_completion(of_words, world.topic_of(prompt))
    return prompt, chosen, rejected


def words_pair(size: Size, of_words: random.Random, of_lengths: Any) -> tuple[str, ...]:
    """Words at random, as many as geometric distributions say, up to 5 times the mean; a response gets an <eos>."""
    prompt, chosen, rejected = (min(int(of_lengths.geometric(1 / mean)), 5 * mean) for mean in size.lengths)
    lengths = (prompt, max(chosen - 1, 1), max(rejected - 1, 1))
    return tuple(" ".join(f"w{of_words.randrange(2, size.model['vocab_size'])}" for _ in range(n)) for n in lengths)
