"""A small synthetic preference world whose truth is known.

A prompt asks for help with a topic; a response recommends three words for it. The true reward of a
response, the noise of its reward and so the probability of every label are programs over the text: a `World`.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from discobeta import files, identity
from discobeta.design.stages import BASE_STAGE
from discobeta.errors import UserError
from discobeta.files import check_regular
from discobeta.seeds import derive, generator, uniforms

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Noise = Literal["heteroscedastic", "homoscedastic", "topic", "response"]
Labels = Literal["probit", "logistic"]
Qualities = Literal["shared", "topic"]

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
"""The homoscedastic control's noise: its Bayes accuracy (.748) is that of the heteroscedastic pairs."""

RESPONSE_NOISE = 0.56
"""The noise of every topic where it differs by response alone: its Bayes accuracy (.749) is that of the heteroscedastic
pairs (.748), both enumerated over all pairs of ideal responses."""

LOGISTIC_SLOPE = math.sqrt(8 / math.pi)
"""c with which sigmoid(c z) has the probit's slope at z = 0: c / 4 = 1 / sqrt(2 pi)."""

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

_NAMES = frozenset(topic.name for topic in TOPICS)
_WORD = "|".join(WORDS)
_RESPONSE = re.compile(rf"(?:please )?(?:use|take|try) (?:{_WORD}) , (?:{_WORD}) and (?:{_WORD}) for (\w+) [.?]")
_SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


# --- the truth: programs over text


@dataclass(frozen=True)
class World:
    """What is true: how noisy and how familiar each topic is, how good each word, and how labels are drawn.

    topics:         16, in the order of `TOPICS`, each combination of noise and familiarity once
    own_qualities:  topic -> word -> quality, of topics whose words are not as good as `QUALITY` says
    noise, labels:  see `response_sigma` and `preference_probability`
    flips:          share of the labels that are turned round after they are drawn, in [0, 1/2)

    Raises UserError for settings that cannot be.
    """

    topics: tuple[Topic, ...] = TOPICS
    own_qualities: Mapping[str, Mapping[str, float]] = field(default_factory=dict, hash=False)
    noise: Noise = "heteroscedastic"
    labels: Labels = "probit"
    flips: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (("noise", Noise), ("labels", Labels)):
            _check_choice(name, getattr(self, name), choices)
        if not (isinstance(self.flips, int | float) and 0 <= self.flips < 0.5):
            raise UserError(f"flips: {self.flips!r} should be a share of the labels, at least 0 and below 0.5")

    @classmethod
    def drawn(cls, seed: int, *, qualities: Qualities = "shared", own: bool = False, **of_labels: Any) -> Self:
        """The world of these settings; of_labels: noise, labels, flips.

        own: the topics stand in another order in the cells of noise and familiarity, a permutation drawn from the seed.
        qualities: topic: in each topic the words share out the qualities anew, a permutation drawn from the seed.
        """
        _check_choice("qualities", qualities, Qualities)
        topics, ranked = TOPICS, {}
        if own:
            cells = random.Random(derive(seed, "world", "topics")).sample(TOPICS, len(TOPICS))
            pairs = zip(TOPICS, cells, strict=True)
            topics = tuple(Topic(topic.name, cell.noise, cell.familiarity) for topic, cell in pairs)
        if qualities == "topic":
            for topic in TOPICS:
                words = random.Random(derive(seed, "world", "qualities", topic.name)).sample(WORDS, len(WORDS))
                ranked[topic.name] = dict(zip(words, QUALITY.values(), strict=True))
        return cls(topics, ranked, **of_labels)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The world that a world.json describes. Raises UserError if that is not what `write_corpus` wrote."""
        record = _read_record(Path(path))
        try:
            topics = tuple(Topic(**topic) for topic in record["topics"])
            own = record["quality"] if record["qualities"] == "topic" else {}
            return cls(topics, own, record["noise"], record["labels"], record["flips"])
        except (KeyError, TypeError):
            raise UserError(f"{path} does not say all of a world: another version of discobeta wrote it") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def described(self) -> dict[str, Any]:
        """The truth, for world.json."""
        quality = self.own_qualities or QUALITY
        return {"topics": [asdict(topic) for topic in self.topics], "quality": quality, "ambiguity": AMBIGUITY}

    @cached_property
    def _by_name(self) -> dict[str, Topic]:
        return {topic.name: topic for topic in self.topics}

    def topic_of(self, prompt: str) -> Topic | None:
        """The first topic that the prompt names; None if it is not a prompt of this world."""
        return self._by_name.get(_topic_name(prompt))

    def true_reward(self, prompt: str, response: str) -> float:
        """r* = sum of the first three content words' quality, -1 per missing word, -1 if malformed.

        Defined for any two texts; in [-4, 3]. A final <eos> is not counted as text. The prompt's topic counts where
        topics have qualities of their own.
        """
        quality = self.own_qualities.get(_topic_name(prompt), QUALITY)
        qualities = [quality[word] for word in _words(response) if word in quality][:3]
        return sum(qualities) - (3 - len(qualities)) - (not self.well_formed(prompt, response))

    @staticmethod
    def well_formed(prompt: str, response: str) -> bool:
        """Is it `[please] use|take|try W , W and W for TOPIC .|?`, with the prompt's topic?"""
        match = _RESPONSE.fullmatch(" ".join(_words(response)))
        return match is not None and match[1] == _topic_name(prompt)

    def topic_noise(self, topic: Topic) -> float:
        """s* of a response about the topic that does not end in `?`."""
        return {"homoscedastic": EQUAL_NOISE, "response": RESPONSE_NOISE}.get(self.noise, topic.noise)

    def response_sigma(self, prompt: str, response: str) -> float:
        """s*, the standard deviation of the noise on the response's reward; same unit as `true_reward`.

        heteroscedastic: the topic's level, 3 times that if the response ends in `?`.
        topic:           the topic's level.
        response:        RESPONSE_NOISE, 3 times that if the response ends in `?`.
        homoscedastic:   EQUAL_NOISE for every text.
        Raises ValueError for a prompt without a topic of this world.
        """
        topic = self.topic_of(prompt)
        if topic is None:
            raise ValueError(f"the prompt {prompt!r} names no topic of the world")
        is_ambiguous = self.noise in ("heteroscedastic", "response") and _words(response)[-1:] == ["?"]
        return self.topic_noise(topic) * (AMBIGUITY if is_ambiguous else 1.0)

    def preference_probability(self, prompt: str, first: str, second: str) -> float:
        """P(the label says that first is preferred) = (1 - f) q + f (1 - q), f being `flips`.

        With z = (r1 - r2) / sqrt(s1^2 + s2^2), q is Phi(z) of probit labels, and of logistic ones sigmoid(c z) with c =
        LOGISTIC_SLOPE: as steep where the two rewards are equal, with heavier tails.
        """
        difference = self.true_reward(prompt, first) - self.true_reward(prompt, second)
        deviation = math.hypot(self.response_sigma(prompt, first), self.response_sigma(prompt, second))
        if self.labels == "logistic":
            probability = 0.5 * (1 + math.tanh(0.5 * LOGISTIC_SLOPE * difference / deviation))
        else:
            probability = 0.5 * math.erfc(-difference / (deviation * math.sqrt(2)))
        return (1 - self.flips) * probability + self.flips * (1 - probability)

    def label(self, prompt: str, first: str, second: str, uniform: Any) -> dict[str, Any]:
        """One preference row; which response is `chosen` is drawn from `preference_probability`.

        uniform: torch.Generator that one number in [0, 1) is drawn from.
        `truth.probability` is the probability that the label comes out as it did.
        """
        import torch

        probability = self.preference_probability(prompt, first, second)
        if float(torch.rand((), generator=uniform, dtype=torch.float64)) < probability:
            chosen, rejected = first, second
        else:
            chosen, rejected = second, first
        topic = self.topic_of(prompt)
        truth = {
            "topic": topic.name,
            "noise": self.topic_noise(topic),
            "familiarity": topic.familiarity,
            "chosen_reward": self.true_reward(prompt, chosen),
            "rejected_reward": self.true_reward(prompt, rejected),
            "chosen_sigma": self.response_sigma(prompt, chosen),
            "rejected_sigma": self.response_sigma(prompt, rejected),
            "probability": self.preference_probability(prompt, chosen, rejected),
        }
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "truth": truth}


def _topic_name(prompt: str) -> str | None:
    return next((word for word in prompt.split() if word in _NAMES), None)


def _words(text: str) -> list[str]:
    words = text.split()
    return words[:-1] if words[-1:] == ["<eos>"] else words


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise UserError(f"{name}: {value!r} should be {' or '.join(get_args(choices))}")


DEFAULT = World()
"""The world of the embedded study, which `ground_truth: world` names."""


def ground_truth(name: str) -> World:
    """The world that the run key `ground_truth` names: `world`, or the path of a world.json."""
    return DEFAULT if name == "world" else World.read(Path(name))


# --- the oracle: what a policy that knows the truth can reach


def oracle_frontier(lambdas: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(KL, true reward) of the policies that maximise lambda E[r*] - KL(policy || base), in closed form.

    lambdas: any shape, each at least 0; both results have that shape, the KL is in nats per response.
    The ideal base writes each of the three words independently and uniformly, and r* is the sum of their qualities
    q_w, so the best policy, base(y) exp(lambda r*(y)) / Z, tilts each word on its own, p_w = exp(lambda q_w) / z. With
    m = sum p_w q_w the reward is 3 m and the KL is 3 (lambda m - log(z / 12)). A permutation of the qualities changes
    neither, so all topics have this frontier, and by its concavity no policy is above it at its mean KL either.
    Source: the optimum of KL-regularised reward, e.g. Rafailov et al. 2023 (arXiv:2305.18290), eq. 4.
    """
    quality = np.array([*QUALITY.values()])
    exponents = np.asarray(lambdas, float)[..., None] * quality
    highest = exponents.max(-1, keepdims=True)  # so that no exponential overflows
    weights = np.exp(exponents - highest)
    total = weights.sum(-1)
    mean = (weights * quality).sum(-1) / total
    log_mean_weight = highest[..., 0] + np.log(total / len(quality))
    return 3 * (np.asarray(lambdas, float) * mean - log_mean_weight), 3 * mean


def frontier_reward(kl: float) -> float:
    """The most true reward that a policy can have at this KL to the ideal base, in nats per response.

    By bisection on lambda, in which both grow; 0 at a KL of 0 or below, as sampled ones can be, and 3, every word the
    best, from 3 log 12 on.
    """
    low, high = 0.0, 1.0
    if kl <= 0:
        return 0.0
    if kl >= 3 * math.log(len(QUALITY)):
        return 3.0
    while high < MOST_TILT and oracle_frontier(high)[0] < kl:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if oracle_frontier(middle)[0] < kl else (low, middle)
    return float(oracle_frontier(high)[1])


MOST_TILT = 2.0**10
"""Of a word: the second best then has probability exp(-186), so the KL is 3 log 12 to the last digit."""

BISECTIONS = 60


def regret(kl: float, true_reward: float) -> float:
    """What a policy of this KL and mean true reward falls short of the oracle's frontier, in units of the reward.

    The frontier starts at an ideal base, of reward 0; that of a trained base is a little lower from the start.
    """
    return frontier_reward(kl) - true_reward


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
    return _prompt(opener, verb, topic, place)


def held_out_prompts() -> list[str]:
    """All 922 of them, each once."""
    places = product(*(range(len(words)) for words in (OPENERS, VERBS, TOPICS, PLACES)))
    return [_prompt(*place) for place in places if is_held_out(*place)]


def rounds_of_prompts(rng: random.Random, count: int) -> list[str]:
    """`count` held-out prompts, all of them in random order again and again."""
    prompts, drawn = held_out_prompts(), []
    while len(drawn) < count:
        drawn += rng.sample(prompts, len(prompts))
    return drawn[:count]


def _prompt(opener: int, verb: int, topic: int, place: int) -> str:
    return f"<user> {OPENERS[opener]} {VERBS[verb]} me with {TOPICS[topic].name} at {PLACES[place]} <assistant>"


def draw_completion(rng: random.Random, topic: Topic) -> str:
    """A well-formed response: each free word uniform and independent, so the base knows no quality."""
    please = rng.choice(("", "please "))
    verb = rng.choice(("use", "take", "try"))
    first, second, third = rng.choices(WORDS, k=3)
    return f"{please}{verb} {first} , {second} and {third} for {topic.name} {rng.choice('.?')}"


def vocabulary() -> list[str]:
    """All tokens of the world, special ones first; a token's place is its id."""
    return [*_SPECIAL_TOKENS.values(), *GRAMMAR, *OPENERS, *VERBS, *(topic.name for topic in TOPICS), *PLACES, *WORDS]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word between spaces; an unknown word is <unk>. Adds nothing by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_SPECIAL_TOKENS)


def write_corpus(
    output: Path,
    *,
    seed: int,
    sft_examples: int,
    noise: Noise = "heteroscedastic",
    labels: Labels = "probit",
    flips: float = 0.0,
    qualities: Qualities = "shared",
    own: bool = False,
) -> None:
    """Write what a base is trained on: sft.jsonl, tokenizer/ and, last, world.json.

    sft.jsonl:  {"prompt", "completion"} per line; topics by FAMILIARITY_WEIGHTS, no held-out prompt.
    world.json: the settings, and the truth that `write_pairs` and evaluations read (`World.read`); sealed.
    Of the settings (see `World.drawn`) only `own` changes the corpus: which topics are how frequent. The others are
    properties of the labels. Raises UserError, before anything is changed, if one of these files is there and was not
    written by this command (see `_claim`).
    """
    of_labels = {"noise": noise, "labels": labels, "flips": flips}
    world = World.drawn(seed, qualities=qualities, own=own, **of_labels)
    if sft_examples < 1:
        raise UserError(f"sft-examples: {sft_examples} should be at least 1")
    output = Path(output)
    rng = random.Random(derive(seed, "world", "corpus"))
    weights = [FAMILIARITY_WEIGHTS[topic.familiarity] for topic in world.topics]
    prompts = [draw_prompt(rng, held_out=False, topic_weights=weights) for _ in range(sft_examples)]
    corpus = _lines(
        [{"prompt": prompt, "completion": draw_completion(rng, world.topic_of(prompt))} for prompt in prompts]
    )
    with files.replacing(output / "tokenizer") as folder:
        build_tokenizer().save_pretrained(folder)
        written = {"sft.jsonl": _digest(corpus)}
        written |= {f"tokenizer/{path.name}": files.sha256(path) for path in sorted(folder.iterdir())}
        _claim(output, "world.json", ("sft.jsonl", "tokenizer"), written)
    files.write_text(output / "sft.jsonl", corpus)
    settings = {"seed": seed, "sft_examples": sft_examples, **of_labels, "qualities": qualities, "own": own}
    _write_record(output / "world.json", settings | world.described() | {"files": written})


# --- preference pairs


PAIRS = ("train.jsonl", "eval.jsonl", "calibration.jsonl")


def write_pairs(
    world: Path,
    base: Path,
    output: Path,
    *,
    seed: int,
    train: int,
    evaluation: int,
    calibration: int = 0,
    every_prompt: bool = False,
) -> None:
    """Write train.jsonl, eval.jsonl and, if any are asked for, calibration.jsonl: two samples of the base per prompt
    and a label from the truth.

    world: folder of `write_corpus`; base: the model trained on its corpus. Topics are uniform, the prompts of
    eval.jsonl are held-out combinations and only those, each file has random streams of its own, sampling is at
    temperature 1. every_prompt: eval.jsonl goes through all held-out prompts in random order, again and again, so that
    its first 922 rows ask each once. The rows hold prompt, chosen, rejected and `truth` (see `World.label`). Runs on
    the CPU, so that a seed gives the same pairs with and without a GPU. pairs.json, written last and sealed, says what
    they were made from.
    Raises UserError if world and base do not fit together or were changed since they were written, if the base
    hardly varies its responses, and, before anything is changed, if one of these files is there and was not
    written by this command (see `_claim`).
    """
    from discobeta.data.tokens import tokenizer_hash

    world, base, output = Path(world), Path(base), Path(output)
    truth = World.read(world / "world.json")
    if train < 1 or evaluation < 1 or calibration < 0:
        raise UserError(
            f"train: {train}, eval: {evaluation}, calibration: {calibration}: the first two should be at least 1, the "
            "last at least 0"
        )
    _check_ours(output, "pairs.json", PAIRS)
    model, tokenizer = _load_base(base)
    made_from = {
        "world": files.sha256(world / "world.json"),
        "base": identity.folders_hash(base),
        "tokenizer": tokenizer_hash(tokenizer),
    }
    texts = {}
    for name, size in zip(PAIRS, (train, evaluation, calibration), strict=True):
        split = name.partition(".")[0]
        if size:
            rng = random.Random(derive(seed, "world", "prompts", split))
            if split == "eval" and every_prompt:
                prompts = rounds_of_prompts(rng, size)
            else:
                prompts = [draw_prompt(rng, held_out=split == "eval") for _ in range(size)]
            pairs = sample_pairs(model, tokenizer, prompts, seed=seed, split=split)
            uniform = generator(seed, "world", "labels", split)
            rows = [truth.label(prompt, *pair, uniform) for prompt, pair in zip(prompts, pairs, strict=True)]
            texts[name] = _lines(rows)
    written = {name: _digest(text) for name, text in texts.items()}
    _claim(output, "pairs.json", PAIRS, written)
    for name in PAIRS:
        if name in texts:
            files.write_text(output / name, texts[name])
        else:
            files.remove(output / name)  # ours, of other settings
    settings = {"seed": seed, "train": train, "evaluation": evaluation}
    settings |= {"calibration": calibration, "every_prompt": every_prompt}
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
