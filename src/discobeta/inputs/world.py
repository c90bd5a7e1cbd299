"""A small synthetic preference world whose truth is known.

A prompt asks for help with a topic; a response recommends three words for it. The true reward of a
response, the noise of its reward and so the probability of every label are programs over the text.
Topics cross two things exactly: how noisy their labels are, and how often the base has seen them.
See docs/world.md for why it looks like this and what was measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from discobeta import files, identity
from discobeta.design.stages import BASE_STAGE
from discobeta.errors import UserError
from discobeta.files import check_regular
from discobeta.seeds import derive, generator, uniforms

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Noise = Literal["heteroscedastic", "homoscedastic"]

OPENERS = ("hello", "hi", "hey", "morning", "evening", "sorry")
VERBS = ("help", "guide", "assist", "coach", "advise", "support")
GRAMMAR = ("<user>", "<assistant>", "me", "with", "at", "please", "use", "take", "try", ",", "and", "for", ".", "?")
PLACES = ("home", "work", "school", "camp", "sea", "market", "university", "church")

NOISE_LEVELS = (0.2, 0.4, 0.8, 1.6)
"""s*, the standard deviation of the noise on a response's reward, by topic."""

FAMILIARITY_WEIGHTS = (27, 9, 3, 1)
"""How often a topic of familiarity level 0, 1, 2, 3 stands in the corpus, relative to level 3."""

AMBIGUITY = 3.0
"""A response that ends in `?` has this many times its topic's noise: noise varies within a prompt."""

EQUAL_NOISE = 1.12
"""The homoscedastic control's noise: its Bayes accuracy (.749) is that of the heteroscedastic pairs."""

MAX_RESPONSE_TOKENS = 12
"""One more than the longest well-formed response and its <eos>: cutting there cuts no good response."""

MAKERS = {"world.json": "discobeta world corpus", "pairs.json": "discobeta world pairs"}
"""A folder's sealed record, which is written last, and the command that makes the folder."""

PAIR_BATCH = 1024
REDRAWS = 20


@dataclass(frozen=True)
class Topic:
    name: str
    noise: float
    familiarity: int  # 0 = most frequent in the corpus, 3 = rarest


TOPIC_NAMES = (
    ("soup", "bread", "salad", "stew"),
    ("curry", "pizza", "pasta", "cake"),
    ("pie", "rice", "tacos", "sushi"),
    ("jam", "tea", "ramen", "chili"),
)
"""A row per familiarity level, a column per noise level: the two are crossed, each combination once."""

TOPICS = tuple(
    Topic(name, noise, familiarity)
    for familiarity, names in enumerate(TOPIC_NAMES)
    for name, noise in zip(names, NOISE_LEVELS, strict=True)
)

WORDS = (
    "onion", "mint", "cumin", "sage", "honey", "garlic", "butter", "thyme", "lemon", "pepper", "ginger", "basil",
)  # fmt: skip
"""What a response recommends, from bad to good."""

QUALITY = {word: -1 + 2 * rank / 11 for rank, word in enumerate(WORDS)}
"""Word -> its quality, evenly spread over [-1, 1]."""

_TOPIC = {topic.name: topic for topic in TOPICS}
_WORD = "|".join(WORDS)
_RESPONSE = re.compile(rf"(?:please )?(?:use|take|try) (?:{_WORD}) , (?:{_WORD}) and (?:{_WORD}) for (\w+) [.?]")
_SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


# --- the truth: programs over text


def topic_of(prompt: str) -> Topic | None:
    """The first topic that the prompt names; None if it is not a prompt of this world."""
    return next((_TOPIC[word] for word in prompt.split() if word in _TOPIC), None)


def well_formed(prompt: str, response: str) -> bool:
    """Is it `[please] use|take|try W , W and W for TOPIC .|?`, with the prompt's topic?"""
    match = _RESPONSE.fullmatch(" ".join(_words(response)))
    topic = topic_of(prompt)
    return match is not None and topic is not None and match[1] == topic.name


def true_reward(prompt: str, response: str) -> float:
    """r* = sum of the first three content words' quality, -1 per missing word, -1 if malformed.

    Defined for any two texts; in [-4, 3]. A final <eos> is not counted as text.
    """
    qualities = [QUALITY[word] for word in _words(response) if word in QUALITY][:3]
    return sum(qualities) - (3 - len(qualities)) - (not well_formed(prompt, response))


def response_sigma(prompt: str, response: str, noise: Noise = "heteroscedastic") -> float:
    """s*, the standard deviation of the noise on the response's reward; same unit as `true_reward`.

    heteroscedastic: the topic's level, 3 times that if the response ends in `?`.
    homoscedastic:   EQUAL_NOISE for every text.
    Raises ValueError for a prompt without a topic of this world.
    """
    topic = topic_of(prompt)
    if topic is None:
        raise ValueError(f"the prompt {prompt!r} names no topic of the world")
    if noise == "homoscedastic":
        return EQUAL_NOISE
    return topic.noise * (AMBIGUITY if _words(response)[-1:] == ["?"] else 1.0)


def preference_probability(prompt: str, first: str, second: str, noise: Noise = "heteroscedastic") -> float:
    """P(first is preferred) = Phi((r1 - r2) / sqrt(s1^2 + s2^2))."""
    difference = true_reward(prompt, first) - true_reward(prompt, second)
    deviation = math.hypot(response_sigma(prompt, first, noise), response_sigma(prompt, second, noise))
    return 0.5 * math.erfc(-difference / (deviation * math.sqrt(2)))


def _words(text: str) -> list[str]:
    words = text.split()
    return words[:-1] if words[-1:] == ["<eos>"] else words


# --- prompts and the corpus


def is_held_out(opener: int, verb: int, topic: int, place: int) -> bool:
    """Every fifth combination, in every topic: never in a corpus or a training pair, whatever the seed."""
    return (opener + verb + topic + place) % 5 == 0


def draw_prompt(rng: random.Random, *, held_out: bool, topic_weights: Sequence[float] | None = None) -> str:
    """A prompt of the world, uniform over the combinations on one side of the held-out line.

    topic_weights: of the 16 topics; None for uniform.
    """
    topic = rng.choices(range(len(TOPICS)), topic_weights)[0]
    while True:
        opener, verb, place = (rng.randrange(len(words)) for words in (OPENERS, VERBS, PLACES))
        if is_held_out(opener, verb, topic, place) == held_out:
            break
    return f"<user> {OPENERS[opener]} {VERBS[verb]} me with {TOPICS[topic].name} at {PLACES[place]} <assistant>"


def draw_completion(rng: random.Random, topic: Topic) -> str:
    """A well-formed response: each free word uniform and independent, so the base knows no quality."""
    please = rng.choice(("", "please "))
    verb = rng.choice(("use", "take", "try"))
    first, second, third = rng.choices(WORDS, k=3)
    return f"{please}{verb} {first} , {second} and {third} for {topic.name} {rng.choice('.?')}"


def vocabulary() -> list[str]:
    """All tokens of the world, special ones first; a token's place is its id."""
    return [*_SPECIAL_TOKENS.values(), *GRAMMAR, *OPENERS, *VERBS, *_TOPIC, *PLACES, *WORDS]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word between spaces; an unknown word is <unk>. Adds nothing by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_SPECIAL_TOKENS)


def write_corpus(output: Path, *, seed: int, sft_examples: int, noise: Noise = "heteroscedastic") -> None:
    """Write what a base is trained on: sft.jsonl, tokenizer/ and, last, world.json.

    sft.jsonl:  {"prompt", "completion"} per line; topics by FAMILIARITY_WEIGHTS, no held-out prompt.
    world.json: the settings, which `write_pairs` reads, and the truth, for people to read; sealed.
    The noise is a property of labels: it leaves the corpus as it is. Raises UserError, before anything is changed,
    if one of these files is there and was not written by this command (see `_claim`).
    """
    if noise not in get_args(Noise):
        raise UserError(f"noise: {noise!r} should be {' or '.join(get_args(Noise))}")
    if sft_examples < 1:
        raise UserError(f"sft-examples: {sft_examples} should be at least 1")
    output = Path(output)
    rng = random.Random(derive(seed, "world", "corpus"))
    weights = [FAMILIARITY_WEIGHTS[topic.familiarity] for topic in TOPICS]
    prompts = [draw_prompt(rng, held_out=False, topic_weights=weights) for _ in range(sft_examples)]
    corpus = _lines([{"prompt": prompt, "completion": draw_completion(rng, topic_of(prompt))} for prompt in prompts])
    with files.replacing(output / "tokenizer") as folder:
        build_tokenizer().save_pretrained(folder)
        written = {"sft.jsonl": _digest(corpus)}
        written |= {f"tokenizer/{path.name}": files.sha256(path) for path in sorted(folder.iterdir())}
        _claim(output, "world.json", ("sft.jsonl", "tokenizer"), written)
    files.write_text(output / "sft.jsonl", corpus)
    settings = {"seed": seed, "sft_examples": sft_examples, "noise": noise}
    truth = {"topics": [asdict(topic) for topic in TOPICS], "quality": QUALITY, "ambiguity": AMBIGUITY}
    _write_record(output / "world.json", settings | truth | {"files": written})


# --- preference pairs


def write_pairs(world: Path, base: Path, output: Path, *, seed: int, train: int, evaluation: int) -> None:
    """Write train.jsonl and eval.jsonl: two samples of the base per prompt and a label from the truth.

    world: folder of `write_corpus`; base: the model trained on its corpus. Topics are uniform, the
    prompts of eval.jsonl are held-out combinations, sampling is at temperature 1. The rows hold
    prompt, chosen, rejected and `truth` (see `label`). Runs on the CPU, so that a seed gives the
    same pairs with and without a GPU. pairs.json, written last and sealed, says what they were made from.
    Raises UserError if world and base do not fit together or were changed since they were written, if the base
    hardly varies its responses, and, before anything is changed, if one of these files is there and was not
    written by this command (see `_claim`).
    """
    from discobeta.data.tokens import tokenizer_hash

    world, base, output = Path(world), Path(base), Path(output)
    noise = _read_record(world / "world.json").get("noise")
    if noise not in get_args(Noise):
        raise UserError(f"{world / 'world.json'}: noise: {noise!r} should be {' or '.join(get_args(Noise))}")
    if train < 1 or evaluation < 1:
        raise UserError(f"train: {train}, eval: {evaluation}: both should be at least 1")
    names = ("train.jsonl", "eval.jsonl")
    _check_ours(output, "pairs.json", names)
    model, tokenizer = _load_base(base)
    made_from = {
        "world": files.sha256(world / "world.json"),
        "base": identity.folders_hash(base),
        "tokenizer": tokenizer_hash(tokenizer),
    }
    texts = {}
    for name, split, size in zip(names, ("train", "eval"), (train, evaluation), strict=True):
        rng = random.Random(derive(seed, "world", "prompts", split))
        prompts = [draw_prompt(rng, held_out=split == "eval") for _ in range(size)]
        pairs = sample_pairs(model, tokenizer, prompts, seed=seed, split=split)
        uniform = generator(seed, "world", "labels", split)
        texts[name] = _lines(
            [label(prompt, *pair, noise, uniform) for prompt, pair in zip(prompts, pairs, strict=True)]
        )
    written = {name: _digest(text) for name, text in texts.items()}
    _claim(output, "pairs.json", names, written)
    for name, text in texts.items():
        files.write_text(output / name, text)
    settings = {"seed": seed, "train": train, "evaluation": evaluation}
    _write_record(output / "pairs.json", settings | made_from | {"files": written})


def sample_pairs(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], *, seed: int, split: str
) -> list[tuple[str, str]]:
    """Two different, non-empty responses per prompt, exchangeable, at temperature 1.

    A pair that is equal or holds an empty response is drawn again as a whole, so what remains is
    the base's own distribution, given that the two differ. Raises UserError after REDRAWS rounds.
    """
    from discobeta.model.generation import generate, response_text

    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    pairs: list[tuple[str, str]] = [("", "")] * len(prompts)
    for attempt in range(1 + REDRAWS):
        missing = [index for index, (a, b) in enumerate(pairs) if a == b or not a or not b]
        if not missing:
            return pairs
        shape = (2 * len(missing), MAX_RESPONSE_TOKENS)
        responses = generate(
            model,
            tokenizer,
            [prompt_ids[index] for index in missing for _ in range(2)],
            uniforms(seed, "world", "responses", split, attempt, shape=shape),
            batch_size=PAIR_BATCH,
            description=f"{split} responses" if attempt == 0 else None,
        )
        texts = [response_text(tokenizer, ids) for ids in responses]
        for index, pair in zip(missing, zip(texts[::2], texts[1::2], strict=True), strict=True):
            pairs[index] = pair
    raise UserError(
        f"the base gives no two different responses to {prompts[missing[0]]!r} in {1 + REDRAWS} draws: train it less"
    )


def label(prompt: str, first: str, second: str, noise: Noise, uniform: Any) -> dict[str, Any]:
    """One preference row; which response is `chosen` is drawn from `preference_probability`.

    uniform: torch.Generator that one number in [0, 1) is drawn from.
    `truth.probability` is the probability that the label comes out as it did.
    """
    import torch

    probability = preference_probability(prompt, first, second, noise)
    if float(torch.rand((), generator=uniform, dtype=torch.float64)) < probability:
        chosen, rejected = first, second
    else:
        chosen, rejected = second, first
    topic = topic_of(prompt)
    truth = {
        "topic": topic.name,
        "noise": EQUAL_NOISE if noise == "homoscedastic" else topic.noise,
        "familiarity": topic.familiarity,
        "chosen_reward": true_reward(prompt, chosen),
        "rejected_reward": true_reward(prompt, rejected),
        "chosen_sigma": response_sigma(prompt, chosen, noise),
        "rejected_sigma": response_sigma(prompt, rejected, noise),
        "probability": preference_probability(prompt, chosen, rejected, noise),
    }
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "truth": truth}


def _load_base(base: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    from discobeta.design.config import RunConfig
    from discobeta.model.pretrained import load_causal_lm, load_tokenizer

    if not os.path.isfile(base / "config.json"):
        raise UserError(
            f"base: {base} is not a model folder (no config.json); `discobeta train` with stage: sft makes one"
        )
    config, _ = RunConfig.from_mapping(
        {"stage": BASE_STAGE, "finetuning_type": "full", "model_name_or_path": str(base)}
    )
    tokenizer, words = load_tokenizer(config), vocabulary()
    if tokenizer.convert_tokens_to_ids(words) != list(range(len(words))):
        raise UserError(f"base: {base} does not have the world's tokenizer (tokenizer_name: <world>/tokenizer)")
    model = load_causal_lm(config).eval()
    if (size := model.get_input_embeddings().num_embeddings) < len(words):
        raise UserError(f"base: {base} has {size} tokens, fewer than the world's {len(words)} words")
    return model, tokenizer


# --- the folders: what is ours in them


def _claim(output: Path, record: str, parts: Sequence[str], written: dict[str, str]) -> None:
    """Say that the files whose sha256 are `written` are ours; they are about to be written.

    A hidden file of the folder holds the sha256 of all that was ever written there. It comes first, so that after a
    kill, and after a workflow has removed some of the files, what is left is known to be ours, whatever is missing.
    """
    ours = _check_ours(output, record, parts, written)
    files.write_sealed(_mark(output, record), {"made_by": MAKERS[record], "sha256": sorted(ours | {*written.values()})})


def _check_ours(output: Path, record: str, parts: Sequence[str], written: dict[str, str] | None = None) -> set[str]:
    """The sha256 of all that was written into the folder. Raises UserError for a file in it that is not ours to
    replace: neither one of those nor the same as `written`."""
    instead = "give another --output, or move it away"
    mark, ours = _mark(output, record), set()
    for path in (mark, output / record):
        if os.path.lexists(path):
            try:
                contents = _read_record(path, MAKERS[record])
                ours |= {*contents.get("sha256", ()), *contents.get("files", {}).values()}
            except (UserError, TypeError, AttributeError) as error:
                raise UserError(f"{error}; {instead}") from None
    for path in _there(output, parts):
        name = path.relative_to(output).as_posix()
        is_plain = path.is_file() and not path.is_symlink()
        if not is_plain or files.sha256(path) not in ours | {(written or {}).get(name)}:
            raise UserError(f"{path} was not written by `{MAKERS[record]}`, or was changed since; {instead}")
    return ours


def _there(output: Path, parts: Sequence[str]) -> Iterator[Path]:
    """The files that are there; a directory stands for what is in it, unless a file is to come in its place."""
    for path in (output / part for part in parts):
        if os.path.isdir(path) and not path.is_symlink() and not path.suffix:
            yield from sorted(path.iterdir())
        elif os.path.lexists(path):
            yield path


def _mark(output: Path, record: str) -> Path:
    return output / f".{MAKERS[record].replace(' ', '-')}.json"


def _write_record(path: Path, value: dict[str, Any]) -> None:
    files.write_sealed(path, {"made_by": MAKERS[path.name], **value})


def _read_record(path: Path, made_by: str | None = None) -> dict[str, Any]:
    check_regular(path)
    value, made_by = files.read_sealed(path), made_by or MAKERS[path.name]
    if value.get("made_by") != made_by:
        raise UserError(f"{path} was not written by `{made_by}`")
    return value


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
