"""The world: its truth is what docs/world.md says, and its files are a function of their seed."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from discobeta.errors import UserError
from discobeta.inputs import world

PROMPT = "<user> hello help me with soup at home <assistant>"
NOISY = "<user> hello help me with stew at home <assistant>"  # noise 1.6


# --- the truth


@pytest.mark.parametrize(
    "response, reward",
    [
        # onion is the worst word (-1), basil the best (1), butter the seventh: -1 + 2 * 6/11 = 1/11
        ("please use basil , basil and basil for soup .", 3.0),
        ("take onion , butter and basil for soup ?", 1 / 11),
        ("take onion , butter and basil for soup ? <eos>", 1 / 11),
        ("use onion , onion and onion for soup .", -3.0),
        ("use basil , basil and basil for bread .", 3 - 1),  # another topic
        ("use basil , basil and basil for soup", 3 - 1),  # no end
        ("use basil , basil and basil for soup . .", 3 - 1),
        ("basil basil basil basil basil", 3 - 1),  # only the first three count
        ("use basil and basil for soup .", 2 - 1 - 1),  # a word short
        ("please please use basil , basil and basil for soup .", 3 - 1),
        ("use basil , basil and basil for soup . <pad>", 3 - 1),
        ("<pad> <pad>", -4.0),
        ("", -4.0),
        ("ünïcode \x00 garbage", -4.0),
    ],
)
def test_true_reward_by_hand(response, reward):
    assert world.DEFAULT.true_reward(PROMPT, response) == pytest.approx(reward, abs=1e-12)


def test_a_prompt_without_a_topic_makes_every_response_malformed():
    assert not world.DEFAULT.well_formed("no such prompt", "use basil , basil and basil for soup .")
    assert world.DEFAULT.true_reward("no such prompt", "use basil , basil and basil for soup .") == pytest.approx(2.0)
    with pytest.raises(ValueError, match="names no topic"):
        world.DEFAULT.response_sigma("no such prompt", "use basil , basil and basil for soup .")


def test_noise_comes_from_the_topic_and_from_a_question_mark():
    plain, question = "use basil , basil and basil for stew .", "use basil , basil and basil for stew ?"
    assert world.DEFAULT.response_sigma(NOISY, plain) == pytest.approx(1.6)
    assert world.DEFAULT.response_sigma(NOISY, question) == pytest.approx(4.8)
    assert world.DEFAULT.response_sigma(PROMPT, "garbage ?") == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("noise", "sigmas"),
    [
        ("heteroscedastic", [0.2, 0.6, 1.6, 4.8]),
        ("topic", [0.2, 0.2, 1.6, 1.6]),
        ("response", [0.56, 1.68, 0.56, 1.68]),
        ("homoscedastic", [1.12, 1.12, 1.12, 1.12]),
    ],
)
def test_each_noise_differs_by_what_its_name_says(noise, sigmas):
    """A clean topic (.2) without and with `?`, then a noisy one (1.6); the truth of a row names the topic's level."""
    import torch

    one = world.World(noise=noise)
    texts = [(prompt, text) for prompt in (PROMPT, NOISY) for text in ("a", "a ?")]
    assert [one.response_sigma(*text) for text in texts] == pytest.approx(sigmas)
    for prompt, level in ((PROMPT, sigmas[0]), (NOISY, sigmas[2])):
        assert one.label(prompt, "a", "b ?", torch.Generator().manual_seed(0))["truth"]["noise"] == level


def test_preference_probability_by_hand():
    """Rewards 3 and 1, noise 1.6 and 4.8: Phi(2 / sqrt(2.56 + 23.04)) = Phi(0.39528) = 0.65368 (normal table)."""
    best = "use basil , basil and basil for stew ."
    other = "use basil , basil and onion for stew ?"
    assert world.DEFAULT.preference_probability(NOISY, best, other) == pytest.approx(0.65368, abs=2e-5)
    assert world.DEFAULT.preference_probability(NOISY, other, best) == pytest.approx(0.34632, abs=2e-5)
    assert world.DEFAULT.preference_probability(NOISY, best, best) == 0.5


def test_topics_cross_noise_and_familiarity_exactly():
    cells = Counter((topic.noise, topic.familiarity) for topic in world.TOPICS)
    assert cells == {(noise, level): 1 for noise in (0.2, 0.4, 0.8, 1.6) for level in range(4)}
    assert sum(world.QUALITY.values()) == pytest.approx(0)
    steps = np.diff(sorted(world.QUALITY.values()))
    assert len(world.QUALITY) == 12 and steps == pytest.approx([2 / 11] * 11)


def test_a_fifth_of_each_topics_prompts_is_held_out():
    for topic in range(16):
        held_out = [
            world.is_held_out(opener, verb, topic, place)
            for opener in range(6) for verb in range(6) for place in range(8)
        ]  # fmt: skip
        assert len(held_out) == 288
        assert sum(held_out) in (57, 58)  # 288 / 5 = 57.6


def bayes_accuracy(**settings) -> float:
    """E max(P, 1 - P) over all pairs of ideal responses, enumerated.

    Rewards of the one are the 34 sums of three ranks, each with its number of ways among 12^3; of the other likewise.
    The probability is the world's of texts that have these rewards, on each noise level, with each pair of marks.
    """
    one, ways = world.World(**settings), Counter(sum(ranks) for ranks in product(range(12), repeat=3))
    worded = {sum(ranks): ranks for ranks in product(range(12), repeat=3)}
    total = 0.0
    for topic in ("soup", "bread", "salad", "stew"):  # .2, .4, .8, 1.6
        prompt = PROMPT.replace("soup", topic)
        texts = {
            (rank, mark): "use {} , {} and {} for {} {}".format(*(world.WORDS[i] for i in worded[rank]), topic, mark)
            for rank in ways
            for mark in ".?"
        }
        for (first, of_first), (second, of_second) in product(texts, texts):
            p = one.preference_probability(prompt, texts[first, of_first], texts[second, of_second])
            total += ways[first] * ways[second] * max(p, 1 - p) / (12**6 * 4 * 4)
    return total


def test_the_worlds_that_are_meant_to_be_as_hard_are():
    """The levels have two digits, and one more in the last moves the accuracy by .003 (response) and .001."""
    accuracy = bayes_accuracy()
    assert accuracy == pytest.approx(0.7482, abs=1e-4)
    assert bayes_accuracy(noise="response") == pytest.approx(accuracy, abs=0.001)
    assert bayes_accuracy(noise="homoscedastic") == pytest.approx(accuracy, abs=0.001)
    # each label is right with .8 of what it was and wrong with .2: (1 - 2 f) A + f
    assert bayes_accuracy(flips=0.2) == pytest.approx(0.6 * accuracy + 0.2, abs=1e-9)


def test_logistic_labels_by_hand():
    """z = 2 / sqrt(2.56 + 23.04) = .39528 as above; 1.59577 z = .63078, and 1 / (1 + exp(-.63078)) = .65267."""
    best = "use basil , basil and basil for stew ."
    other = "use basil , basil and onion for stew ?"
    one = world.World(labels="logistic")
    assert one.preference_probability(NOISY, best, other) == pytest.approx(0.65267, abs=2e-5)
    assert one.preference_probability(NOISY, other, best) == pytest.approx(0.34733, abs=2e-5)
    assert one.preference_probability(NOISY, best, best) == 0.5


def test_logistic_labels_are_as_steep_as_probit_ones_where_rewards_are_equal_and_have_heavier_tails():
    """At z = h the excess over 1/2 is h phi(0) = h / sqrt(2 pi) of both, and far out the logistic one errs more."""
    reward = {"a": 1e-4, "b": 0.0, "c": 3.0}
    for labels, far in (("probit", 0.01696), ("logistic", 0.03276)):  # of z = 3 / sqrt(2) = 2.12132

        class Given(world.World):
            def true_reward(self, prompt, response):
                return reward[response]

            def response_sigma(self, prompt, response):
                return 1.0

        one = Given(labels=labels)
        slope = (one.preference_probability(PROMPT, "a", "b") - 0.5) / (1e-4 / math.sqrt(2))
        assert slope == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-6)
        assert one.preference_probability(PROMPT, "b", "c") == pytest.approx(far, abs=2e-5)


def test_flips_turn_labels_round():
    """.8 x .65368 + .2 x .34632 = .59221, and what is sure is .8."""
    best, other = "use basil , basil and basil for stew .", "use basil , basil and onion for stew ?"
    one = world.World(flips=0.2)
    assert one.preference_probability(NOISY, best, other) == pytest.approx(0.59221, abs=2e-5)
    assert one.preference_probability(NOISY, other, best) == pytest.approx(0.40779, abs=2e-5)
    sure = ("use basil , basil and basil for soup .", "use onion , onion and onion for soup .")
    assert one.preference_probability(PROMPT, *sure) == pytest.approx(0.8, abs=1e-9)


# --- worlds of their own


def test_a_seed_can_be_a_world_whose_topics_cross_noise_and_familiarity_in_another_order():
    worlds = [world.World.drawn(seed, own=True) for seed in range(20)]
    for one in worlds:
        cells = Counter((topic.noise, topic.familiarity) for topic in one.topics)
        assert cells == {(noise, level): 1 for noise in (0.2, 0.4, 0.8, 1.6) for level in range(4)}
        assert [topic.name for topic in one.topics] == [topic.name for topic in world.TOPICS]
        assert one.own_qualities == {}
    assert len({one.topics for one in worlds}) == 20
    assert world.World.drawn(3, own=True) == worlds[3]
    assert world.World.drawn(3) == world.World() == world.DEFAULT
    # every topic stands everywhere: 200 seeds, each cell with 1/16; 4.5 standard errors of the count are 15.4
    of_soup = Counter(world.World.drawn(seed, own=True).topics[0] for seed in range(200))
    assert len(of_soup) == 16 and max(of_soup.values()) < 12.5 + 15.4


def test_an_own_worlds_noise_is_that_of_its_topics():
    one = next(one for seed in range(20) if (one := world.World.drawn(seed, own=True)).topics[0].noise != 0.2)
    assert one.topics[0].name == "soup"
    assert one.response_sigma(PROMPT, "a ?") == pytest.approx(3 * one.topics[0].noise)


def test_topics_can_have_qualities_of_their_own():
    """Each topic has the twelve qualities, in an order of its own, and one true reward differs from topic to topic."""
    one = world.World.drawn(1, qualities="topic")
    assert one.topics == world.TOPICS and set(one.own_qualities) == {topic.name for topic in world.TOPICS}
    assert len({tuple(quality[word] for word in world.WORDS) for quality in one.own_qualities.values()}) == 16
    for name, quality in one.own_qualities.items():
        assert sorted(quality.values()) == pytest.approx([-1 + 2 * rank / 11 for rank in range(12)])
        best, worst = max(quality, key=quality.get), min(quality, key=quality.get)
        prompt = PROMPT.replace("soup", name)
        assert one.true_reward(prompt, f"use {best} , {best} and {best} for {name} .") == pytest.approx(3)
        assert one.true_reward(prompt, f"use {best} , {best} and {worst} for {name} .") == pytest.approx(1)
    assert world.World.drawn(2, qualities="topic") != one == world.World.drawn(1, qualities="topic")


@pytest.mark.parametrize(
    "settings",
    [
        {"own": True, "noise": "topic"},
        {"qualities": "topic", "labels": "logistic", "flips": 0.1, "noise": "response"},
        {"own": True, "qualities": "topic"},
        {},
    ],
)
def test_a_world_is_read_from_its_record(settings, tmp_path):
    world.write_corpus(tmp_path, seed=5, sft_examples=10, **settings)
    read = world.ground_truth(str(tmp_path / "world.json"))
    assert read == world.World.drawn(5, **settings)
    assert (read == world.DEFAULT) == (settings == {})
    assert world.ground_truth("world") == world.DEFAULT


def test_what_is_no_record_of_a_world_is_refused(tmp_path):
    from discobeta import files

    with pytest.raises(UserError, match=r"world\.json"):
        world.World.read(tmp_path / "world.json")
    made_by = {"made_by": "discobeta world corpus"}
    files.write_sealed(tmp_path / "world.json", {"seed": 1, **made_by})
    with pytest.raises(UserError, match=r"world\.json does not say all of a world"):
        world.World.read(tmp_path / "world.json")
    world.write_corpus(tmp_path / "made", seed=1, sft_examples=10, flips=0.2)
    text = (tmp_path / "made" / "world.json").read_text()
    (tmp_path / "made" / "world.json").write_text(text.replace('"flips": 0.2', '"flips": 0.1'))
    with pytest.raises(UserError, match="was changed after it was written"):
        world.World.read(tmp_path / "made" / "world.json")


# --- the oracle


@pytest.mark.parametrize("tilt", [0.0, 0.1, 1.0, 3.0, 12.0, 200.0])
def test_the_oracles_frontier_is_that_of_all_responses(tilt):
    """Brute force over the 12^3 responses: p(y) = exp(lambda r(y)) / Z, KL to 1/1728 and E r."""
    q = [-1 + 2 * rank / 11 for rank in range(12)]
    rewards = np.array([sum(words) for words in product(q, repeat=3)])
    weights = np.exp(tilt * (rewards - 3))
    p = weights / weights.sum()
    kl = sum(x * math.log(x * 1728) for x in p if x > 0)
    found = world.oracle_frontier([tilt, 0.0])
    assert found[0][0] == pytest.approx(kl, abs=1e-9) and found[1][0] == pytest.approx(p @ rewards, abs=1e-9)
    assert found[0][1] == pytest.approx(0, abs=1e-12) and found[1][1] == pytest.approx(0, abs=1e-12)
    assert world.frontier_reward(kl) == pytest.approx(p @ rewards, abs=1e-6)


def test_no_policy_is_above_the_oracles_frontier():
    """Thousands of policies over the 12^3 responses, from nearly uniform to nearly certain, a third of them tilted."""
    rng = np.random.default_rng(0)
    rewards = np.array([sum(words) for words in product([-1 + 2 * rank / 11 for rank in range(12)], repeat=3)])
    above = []
    for number in range(3000):
        scores = rng.normal(size=1728) * rng.choice([0.1, 1.0, 5.0]) + rewards * rng.choice([0.0, 1.0, 4.0])
        p = np.exp(scores - scores.max())
        p /= p.sum()
        kl = float((p * np.log(np.maximum(p, 1e-300) * 1728)).sum())
        if number % 100 == 0:
            assert world.regret(kl, p @ rewards) == pytest.approx(world.frontier_reward(kl) - p @ rewards)
        above.append(p @ rewards - world.frontier_reward(kl))
    assert max(above) < 1e-6
    assert max(above) > -0.02  # some come near it, so the frontier is no loose bound


def test_the_frontiers_ends():
    assert world.frontier_reward(-0.1) == world.frontier_reward(0.0) == 0.0
    assert world.frontier_reward(3 * math.log(12)) == world.frontier_reward(50.0) == 3.0
    assert world.frontier_reward(3 * math.log(12) - 1e-3) == pytest.approx(3, abs=1e-3)
    # near 0 the reward is sqrt(2 KL Var r), with Var r = 3 x 13/33
    assert world.frontier_reward(1e-6) == pytest.approx(math.sqrt(2e-6 * 39 / 33), rel=1e-3)


# --- the corpus


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world.write_corpus(folder, seed=1, sft_examples=2000)
    return folder


def combination(prompt: str) -> tuple[int, int, int, int]:
    user, opener, verb, me, with_, topic, at, place, assistant = prompt.split()
    assert (user, me, with_, at, assistant) == ("<user>", "me", "with", "at", "<assistant>")
    names = [topic.name for topic in world.TOPICS]
    return (
        world.OPENERS.index(opener),
        world.VERBS.index(verb),
        names.index(topic),
        world.PLACES.index(place),
    )


def test_the_corpus_is_well_formed_and_holds_no_held_out_prompt(corpus):
    rows = read_lines(corpus / "sft.jsonl")
    assert len(rows) == 2000
    assert all(world.DEFAULT.well_formed(row["prompt"], row["completion"]) for row in rows)
    assert not any(world.is_held_out(*combination(row["prompt"])) for row in rows)


def test_corpus_frequencies(corpus):
    """Familiarity 27 : 9 : 3 : 1 (of 40), noise uniform; 4 standard errors of 2,000 draws."""
    topics = [world.DEFAULT.topic_of(row["prompt"]) for row in read_lines(corpus / "sft.jsonl")]
    for level, weight in enumerate((27, 9, 3, 1)):
        share = weight / 40
        found = sum(topic.familiarity == level for topic in topics)
        assert abs(found - 2000 * share) < 4 * math.sqrt(2000 * share * (1 - share))
    for noise in (0.2, 0.4, 0.8, 1.6):
        assert abs(sum(topic.noise == noise for topic in topics) - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)


def test_completions_say_nothing_of_quality(corpus):
    """Every word equally often: the base must not know what is good. 6,000 words, 500 each, 4.5 standard errors."""
    counts = Counter(word for row in read_lines(corpus / "sft.jsonl") for word in row["completion"].split())
    for word in world.WORDS:
        assert abs(counts[word] - 500) < 4.5 * math.sqrt(6000 / 12 * 11 / 12)
    assert abs(counts["?"] - 1000) < 4.5 * math.sqrt(500)


def test_a_corpus_is_a_function_of_its_seed(corpus, tmp_path):
    world.write_corpus(tmp_path / "again", seed=1, sft_examples=2000)
    world.write_corpus(tmp_path / "other", seed=2, sft_examples=2000)
    assert folder_bytes(tmp_path / "again") == folder_bytes(corpus)
    assert (tmp_path / "other" / "sft.jsonl").read_bytes() != (corpus / "sft.jsonl").read_bytes()


def test_in_an_own_world_familiarity_and_frequency_go_together(tmp_path):
    """Familiarity 27 : 9 : 3 : 1 of the seed's own topics; 4 standard errors of 2,000 draws."""
    world.write_corpus(tmp_path / "one", seed=1, sft_examples=2000, own=True)
    world.write_corpus(tmp_path / "other", seed=2, sft_examples=2000, own=True)
    names = [world.DEFAULT.topic_of(row["prompt"]).name for row in read_lines(tmp_path / "one" / "sft.jsonl")]
    own = world.World.read(tmp_path / "one" / "world.json")
    for level, weight in enumerate((27, 9, 3, 1)):
        share, frequent = weight / 40, {topic.name for topic in own.topics if topic.familiarity == level}
        assert abs(sum(name in frequent for name in names) - 2000 * share) < 4 * math.sqrt(2000 * share * (1 - share))
    assert own.topics != world.World.read(tmp_path / "other" / "world.json").topics


def test_the_tokenizer_knows_every_word_and_gives_texts_back(corpus):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    for row in read_lines(corpus / "sft.jsonl")[:200]:
        for text, lengths in ((row["prompt"], {9}), (row["completion"], {9, 10})):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) in lengths and tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
    assert tokenizer("unheard")["input_ids"] == [tokenizer.unk_token_id]


@pytest.mark.parametrize(
    "change",
    [
        {"sft_examples": 0},
        {"noise": "loud"},
        {"labels": "cauchy"},
        {"qualities": "own"},
        {"flips": 0.5},
        {"flips": -0.1},
        {"flips": float("nan")},
    ],
)
def test_a_corpus_that_cannot_be(change, tmp_path):
    with pytest.raises(UserError, match="should be"):
        world.write_corpus(tmp_path, **({"seed": 1, "sft_examples": 10} | change))
    assert not list(tmp_path.iterdir())


# --- pairs


@pytest.fixture(scope="module")
def untrained(corpus, tmp_path_factory) -> Path:
    """A base of the world's vocabulary with random weights: its responses are garbage of every kind."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("untrained")
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, intermediate_size=32, tie_word_embeddings=True, max_position_embeddings=64, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def write_pairs(corpus, base, folder, seed=3, train=300, evaluation=100) -> Path:
    world.write_pairs(corpus, base, folder, seed=seed, train=train, evaluation=evaluation)
    return folder


@pytest.fixture(scope="module")
def pairs(corpus, untrained, tmp_path_factory) -> Path:
    return write_pairs(corpus, untrained, tmp_path_factory.mktemp("pairs"))


def test_pairs_differ_and_keep_to_their_side_of_the_held_out_line(pairs):
    for split, size in (("train", 300), ("eval", 100)):
        rows = read_lines(pairs / f"{split}.jsonl")
        assert len(rows) == size
        assert all(row["chosen"] != row["rejected"] and row["chosen"] and row["rejected"] for row in rows)
        assert {world.is_held_out(*combination(row["prompt"])) for row in rows} == {split == "eval"}
        topics = Counter(world.DEFAULT.topic_of(row["prompt"]).familiarity for row in rows)
        assert all(abs(topics[level] - size / 4) < 4 * math.sqrt(size * 3 / 16) for level in range(4))  # uniform


def test_truth_of_the_rows(pairs):
    for row in read_lines(pairs / "train.jsonl")[:50]:
        truth, prompt = row["truth"], row["prompt"]
        topic = next(topic for topic in world.TOPICS if topic.name == truth["topic"])
        assert topic.name in prompt.split()
        assert (truth["noise"], truth["familiarity"]) == (topic.noise, topic.familiarity)
        for side in ("chosen", "rejected"):
            assert truth[f"{side}_reward"] == world.DEFAULT.true_reward(prompt, row[side])
            assert truth[f"{side}_sigma"] in (topic.noise, 3 * topic.noise)
        z = (truth["chosen_reward"] - truth["rejected_reward"]) / math.hypot(
            truth["chosen_sigma"], truth["rejected_sigma"]
        )
        assert truth["probability"] == pytest.approx(0.5 * (1 + math.erf(z / math.sqrt(2))), abs=1e-12)


def test_labels_come_out_as_often_as_their_probability_says():
    """4,000 labels of one pair whose first response wins with Phi(0.39528) = .65368 (see above)."""
    import torch

    best, other = "use basil , basil and basil for stew .", "use basil , basil and onion for stew ?"
    uniform = torch.Generator().manual_seed(0)
    rows = [world.DEFAULT.label(NOISY, best, other, uniform) for _ in range(4000)]
    wins = sum(row["chosen"] == best for row in rows)
    assert abs(wins - 4000 * 0.65368) < 4 * math.sqrt(4000 * 0.65368 * 0.34632)
    for row in rows[:20]:
        assert row["truth"]["probability"] == pytest.approx(0.65368 if row["chosen"] == best else 0.34632, abs=2e-5)


def test_pairs_are_a_function_of_their_seed_and_leave_torch_alone(corpus, untrained, pairs, tmp_path):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = write_pairs(corpus, untrained, tmp_path / "again")
    assert torch.equal(torch.rand(3), expected)
    other = write_pairs(corpus, untrained, tmp_path / "other", seed=4)
    assert folder_bytes(again) == folder_bytes(pairs)
    assert not {row["prompt"] + row["chosen"] for row in read_lines(other / "train.jsonl")} & {
        row["prompt"] + row["chosen"] for row in read_lines(pairs / "train.jsonl")
    }


def test_homoscedastic_pairs(corpus, untrained, pairs, tmp_path):
    """The same prompts and responses with another label noise, so the two worlds differ in one thing."""
    world.write_corpus(tmp_path / "world", seed=1, sft_examples=10, noise="homoscedastic")
    rows = read_lines(write_pairs(tmp_path / "world", untrained, tmp_path / "pairs") / "train.jsonl")
    sigmas = {row["truth"][name] for row in rows for name in ("noise", "chosen_sigma", "rejected_sigma")}
    assert len(sigmas) == 1

    def unordered(rows):
        return [(row["prompt"], {row["chosen"], row["rejected"]}) for row in rows]

    assert unordered(rows) == unordered(read_lines(pairs / "train.jsonl"))


def test_calibration_pairs_are_pairs_of_their_own(corpus, untrained, pairs, tmp_path):
    """From streams of their own on the training side of the line: the other files stay as they are without them."""
    folder = tmp_path / "pairs"
    world.write_pairs(corpus, untrained, folder, seed=3, train=300, evaluation=100, calibration=120)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (folder / name).read_bytes() == (pairs / name).read_bytes()
    assert not (pairs / "calibration.jsonl").exists()
    rows = read_lines(folder / "calibration.jsonl")
    assert len(rows) == 120 and all("truth" in row for row in rows)
    assert not any(world.is_held_out(*combination(row["prompt"])) for row in rows)
    assert [row["prompt"] for row in rows] != [row["prompt"] for row in read_lines(folder / "train.jsonl")[:120]]

    def said(name):
        return {(row["prompt"], row["chosen"], row["rejected"]) for row in read_lines(folder / name)}

    assert not said("calibration.jsonl") & (said("train.jsonl") | said("eval.jsonl"))
    write_pairs(corpus, untrained, folder)  # without them again
    assert folder_bytes(folder).keys() - folder_bytes(pairs).keys() == set()


def test_every_held_out_prompt_is_asked_before_one_is_asked_again():
    import random

    all_of_them = world.held_out_prompts()
    assert len(all_of_them) == len(set(all_of_them)) == 922
    assert all(world.is_held_out(*combination(prompt)) for prompt in all_of_them)
    drawn = world.rounds_of_prompts(random.Random(0), 2000)
    assert len(drawn) == 2000
    assert set(drawn[:922]) == set(drawn[922:1844]) == set(all_of_them)
    assert len({tuple(drawn[:922]), tuple(drawn[922:1844]), tuple(all_of_them)}) == 3  # each round in another order


def test_every_prompt_is_of_the_held_out_pairs_alone(corpus, untrained, pairs, tmp_path):
    folder = tmp_path / "pairs"
    world.write_pairs(corpus, untrained, folder, seed=3, train=300, evaluation=100, every_prompt=True)
    assert (folder / "train.jsonl").read_bytes() == (pairs / "train.jsonl").read_bytes()
    prompts = [row["prompt"] for row in read_lines(folder / "eval.jsonl")]
    assert len(set(prompts)) == 100 > len({row["prompt"] for row in read_lines(pairs / "eval.jsonl")})
    assert all(world.is_held_out(*combination(prompt)) for prompt in prompts)


@pytest.mark.parametrize(
    "settings",
    [{"flips": 0.2}, {"labels": "logistic"}, {"noise": "response"}, {"own": True}, {"qualities": "topic"}],
)
def test_labels_come_out_as_often_as_the_rows_say(settings, corpus, untrained, pairs, tmp_path):
    """`probability` is of the label as it came out. Over 300 independent pairs the labels agree with the likelier one
    as often as sum max(P, 1 - P) says, within 4 standard errors (of Poisson's binomial, sqrt(sum P (1 - P)))."""
    world.write_corpus(tmp_path / "world", seed=1, sft_examples=10, **settings)
    rows = read_lines(write_pairs(tmp_path / "world", untrained, tmp_path / "pairs") / "train.jsonl")
    p = np.array([row["truth"]["probability"] for row in rows])
    assert abs((p > 0.5).sum() - np.maximum(p, 1 - p)[p != 0.5].sum()) < 4 * math.sqrt((p * (1 - p)).sum())
    usual = np.array([row["truth"]["probability"] for row in read_lines(pairs / "train.jsonl")])
    assert np.abs(np.maximum(p, 1 - p) - np.maximum(usual, 1 - usual)).max() > 0.01  # it is another world
    if "flips" in settings:
        assert p.min() >= 0.2 and p.max() <= 0.8


def test_equal_responses_are_drawn_again(corpus, monkeypatch):
    """The first draw gives equal texts for the first prompt and an empty one for the second; both pairs are redrawn."""
    draws = iter([["a", "a", "b", "", "c", "d"], ["e", "e", "f", "g"], ["h", "i"]])
    asked, drawn = [], []

    def generate(model, tokenizer, prompt_ids, uniforms, **options):
        asked.append(len(prompt_ids))
        drawn.append(uniforms)
        return next(draws)

    monkeypatch.setattr("discobeta.model.generation.generate", generate)
    monkeypatch.setattr("discobeta.model.generation.response_text", lambda tokenizer, ids: ids)
    found = world.sample_pairs(None, world.build_tokenizer(), [PROMPT] * 3, seed=1, split="train")
    assert found == [("h", "i"), ("f", "g"), ("c", "d")]
    assert asked == [6, 4, 2]
    assert len({number for uniforms in drawn for number in uniforms.flat}) == (6 + 4 + 2) * world.MAX_RESPONSE_TOKENS


def test_a_base_that_always_says_the_same_is_refused(monkeypatch):
    monkeypatch.setattr("discobeta.model.generation.generate", lambda *args, **options: ["a", "a"])
    monkeypatch.setattr("discobeta.model.generation.response_text", lambda tokenizer, ids: ids)
    with pytest.raises(UserError, match="no two different responses"):
        world.sample_pairs(None, world.build_tokenizer(), [PROMPT], seed=1, split="train")


def test_a_world_without_its_base_is_refused(corpus, base, tmp_path):
    with pytest.raises(UserError, match=r"world\.json"):
        write_pairs(tmp_path, base, tmp_path / "pairs")
    with pytest.raises(UserError, match="not a model folder"):
        write_pairs(corpus, tmp_path, tmp_path / "pairs")
    with pytest.raises(UserError, match="tokenizer"):
        write_pairs(corpus, base, tmp_path / "pairs")  # conftest's base: another vocabulary
    assert not (tmp_path / "pairs").exists()


# --- whose files are they


@pytest.mark.parametrize(
    "name", ["sft.jsonl", "world.json", "tokenizer/notes.txt", "tokenizer/tokenizer.json", "tokenizer"]
)
def test_a_corpus_replaces_nobodys_file(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = folder_bytes(tmp_path)
    with pytest.raises(UserError, match=f"{name}.* (was not written|is not valid JSON).*; give another --output"):
        world.write_corpus(tmp_path, seed=1, sft_examples=10)
    assert folder_bytes(tmp_path) == before


def test_a_corpus_replaces_no_link_and_no_directory(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "tokenizer.json").write_text("mine")
    for name in ("tokenizer", "sft.jsonl"):
        output = tmp_path / f"output-{name}"
        output.mkdir()
        (output / name).symlink_to(theirs)
        with pytest.raises(UserError, match=f"{name} was not written by"):
            world.write_corpus(output, seed=1, sft_examples=10)
        (output / name).unlink()
        (output / name).mkdir()
        (output / name / "mine.txt").write_text("mine")
        with pytest.raises(UserError, match="was not written by"):
            world.write_corpus(output, seed=1, sft_examples=10)
        assert (output / name / "mine.txt").read_text() == "mine" and not (output / "world.json").exists()
    assert (theirs / "tokenizer.json").read_text() == "mine"


def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "world.json")
    for write in (
        lambda: world.write_corpus(tmp_path, seed=1, sft_examples=10),
        lambda: write_pairs(tmp_path, tmp_path, tmp_path / "pairs"),
    ):
        with pytest.raises(UserError, match="world.json is not a regular file"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["world.json"]


def test_a_corpus_of_ours_is_replaced_by_another(tmp_path):
    for seed in (1, 2):
        world.write_corpus(tmp_path / "one", seed=seed, sft_examples=10)
    world.write_corpus(tmp_path / "two", seed=2, sft_examples=10)
    for name in ("sft.jsonl", "world.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    (tmp_path / "one" / "sft.jsonl").write_text("my own corpus")
    with pytest.raises(UserError, match="sft.jsonl was not written by `discobeta world corpus`, or was changed since"):
        world.write_corpus(tmp_path / "one", seed=2, sft_examples=10)
    assert (tmp_path / "one" / "sft.jsonl").read_text() == "my own corpus"


def test_what_a_workflow_or_a_kill_has_left_of_a_corpus_is_ours(tmp_path):
    """Snakemake removes the outputs that it knows before it runs a job again; the tokenizer's other files stay."""
    world.write_corpus(tmp_path / "whole", seed=2, sft_examples=10)
    gone = ["sft.jsonl", "world.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
    for number in range(2 ** len(gone)):
        output = tmp_path / str(number)
        world.write_corpus(output, seed=1, sft_examples=10)
        for place, name in enumerate(gone):
            if number >> place & 1:
                (output / name).unlink()
        world.write_corpus(output, seed=2, sft_examples=10)
        for name in gone:
            assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_corpus_that_is_killed_at_any_write_is_made_again(tmp_path, monkeypatch):
    from discobeta import files

    world.write_corpus(tmp_path / "whole", seed=2, sft_examples=10)
    replacing, left = files.replacing, [0]

    class Killed(BaseException):
        pass

    def count_down(path):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return replacing(path)

    for writes in range(4):  # the tokenizer's beginning, the mark, the texts, the record
        output = tmp_path / str(writes)
        world.write_corpus(output, seed=1, sft_examples=10)
        (output / "world.json").unlink()
        left[0] = writes
        monkeypatch.setattr(files, "replacing", count_down)
        with pytest.raises(Killed):
            world.write_corpus(output, seed=2, sft_examples=10)
        monkeypatch.setattr(files, "replacing", replacing)
        world.write_corpus(output, seed=2, sft_examples=10)
        assert (output / "sft.jsonl").read_bytes() == (tmp_path / "whole" / "sft.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl", "pairs.json"])
def test_pairs_replace_nobodys_file(corpus, untrained, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}.* (was not written|is not valid JSON).*; give another --output"):
        write_pairs(corpus, untrained, tmp_path)
    assert folder_bytes(tmp_path) == {name: b"mine"}


def test_pairs_of_ours_are_replaced_whatever_is_left_of_them(corpus, untrained, tmp_path):
    output = write_pairs(corpus, untrained, tmp_path / "pairs")
    expected = folder_bytes(output)
    for gone in (["train.jsonl", "eval.jsonl"], ["pairs.json"], []):
        for name in gone:
            (output / name).unlink()
        assert folder_bytes(write_pairs(corpus, untrained, output)) == expected
    (output / "eval.jsonl").write_text("mine")
    with pytest.raises(UserError, match="eval.jsonl was not written by `discobeta world pairs`, or was changed since"):
        write_pairs(corpus, untrained, output)


def test_corpus_and_pairs_may_share_a_folder(untrained, tmp_path):
    for _ in range(2):
        world.write_corpus(tmp_path, seed=1, sft_examples=10)
        write_pairs(tmp_path, untrained, tmp_path)


def test_pairs_say_what_they_were_made_from(corpus, untrained, pairs, tmp_path):
    import hashlib

    from discobeta import files

    record = files.read_sealed(pairs / "pairs.json")
    assert record["made_by"] == "discobeta world pairs"
    for name in ("train.jsonl", "eval.jsonl"):
        assert record["files"][name] == hashlib.sha256((pairs / name).read_bytes()).hexdigest()
    assert record["world"] == hashlib.sha256((corpus / "world.json").read_bytes()).hexdigest()
    other = write_pairs(corpus, untrained, tmp_path / "other", seed=4)
    again = files.read_sealed(other / "pairs.json")
    assert again["seed"] == 4 and (again["base"], again["tokenizer"]) == (record["base"], record["tokenizer"])


def test_pairs_of_a_world_that_was_changed_are_refused(untrained, tmp_path):
    world.write_corpus(tmp_path / "world", seed=1, sft_examples=10)
    text = (tmp_path / "world" / "world.json").read_text()
    for changed in (
        text.replace('"noise": "heteroscedastic"', '"noise": "homoscedastic"'),
        json.dumps({"noise": "heteroscedastic", "seed": 1}),
        "null", "[]", "5", '"noise"', "{}", '{"seal": null}', '{"noise": 3}', "", "{",
        "[" * 3000, "9" * 5000, text[:200],
    ):  # fmt: skip
        assert changed != text
        (tmp_path / "world" / "world.json").write_text(changed)
        with pytest.raises(UserError, match=r"^[^\n]*world\.json [^\n]*$"):
            write_pairs(tmp_path / "world", untrained, tmp_path / "pairs")
    (tmp_path / "world" / "world.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"world\.json "):
        write_pairs(tmp_path / "world", untrained, tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()


def test_pairs_of_a_base_that_is_not_whole_are_refused(corpus, untrained, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(untrained, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model.layers.0.mlp.up_proj.weight"):
        write_pairs(corpus, tmp_path / "base", tmp_path / "pairs")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"^cannot load the model [^\n]*$"):
        write_pairs(corpus, tmp_path / "base", tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()
