"""The world: its truth is what docs/world.md says, and its files are a function of their seed."""

from __future__ import annotations

import json
import math
from collections import Counter
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
    assert world.true_reward(PROMPT, response) == pytest.approx(reward, abs=1e-12)


def test_a_prompt_without_a_topic_makes_every_response_malformed():
    assert not world.well_formed("no such prompt", "use basil , basil and basil for soup .")
    assert world.true_reward("no such prompt", "use basil , basil and basil for soup .") == pytest.approx(2.0)
    with pytest.raises(ValueError, match="names no topic"):
        world.response_sigma("no such prompt", "use basil , basil and basil for soup .")


def test_noise_comes_from_the_topic_and_from_a_question_mark():
    plain, question = "use basil , basil and basil for stew .", "use basil , basil and basil for stew ?"
    assert world.response_sigma(NOISY, plain) == pytest.approx(1.6)
    assert world.response_sigma(NOISY, question) == pytest.approx(4.8)
    assert world.response_sigma(PROMPT, "garbage ?") == pytest.approx(0.6)
    equal = {world.response_sigma(prompt, text, "homoscedastic") for prompt in (PROMPT, NOISY) for text in ("a", "a ?")}
    assert len(equal) == 1


def test_preference_probability_by_hand():
    """Rewards 3 and 1, noise 1.6 and 4.8: Phi(2 / sqrt(2.56 + 23.04)) = Phi(0.39528) = 0.65368 (normal table)."""
    best = "use basil , basil and basil for stew ."
    other = "use basil , basil and onion for stew ?"
    assert world.preference_probability(NOISY, best, other) == pytest.approx(0.65368, abs=2e-5)
    assert world.preference_probability(NOISY, other, best) == pytest.approx(0.34632, abs=2e-5)
    assert world.preference_probability(NOISY, best, best) == 0.5


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


def test_the_homoscedastic_control_is_as_hard_as_the_world():
    """Bayes accuracy, E max(p, 1 - p), over pairs of ideal samples: .749 in both, within 3 standard errors."""
    import random

    rng, certainty = random.Random(0), {"heteroscedastic": [], "homoscedastic": []}
    for _ in range(15_000):
        prompt = world.draw_prompt(rng, held_out=False)
        pair = [world.draw_completion(rng, world.topic_of(prompt)) for _ in range(2)]
        for noise, values in certainty.items():
            p = world.preference_probability(prompt, *pair, noise)
            values.append(max(p, 1 - p))
    for values in certainty.values():
        assert np.mean(values) == pytest.approx(0.749, abs=0.005)


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
    assert all(world.well_formed(row["prompt"], row["completion"]) for row in rows)
    assert not any(world.is_held_out(*combination(row["prompt"])) for row in rows)


def test_corpus_frequencies(corpus):
    """Familiarity 27 : 9 : 3 : 1 (of 40), noise uniform; 4 standard errors of 2,000 draws."""
    topics = [world.topic_of(row["prompt"]) for row in read_lines(corpus / "sft.jsonl")]
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


@pytest.mark.parametrize("change", [{"sft_examples": 0}, {"noise": "loud"}])
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
        topics = Counter(world.topic_of(row["prompt"]).familiarity for row in rows)
        assert all(abs(topics[level] - size / 4) < 4 * math.sqrt(size * 3 / 16) for level in range(4))  # uniform


def test_truth_of_the_rows(pairs):
    for row in read_lines(pairs / "train.jsonl")[:50]:
        truth, prompt = row["truth"], row["prompt"]
        topic = next(topic for topic in world.TOPICS if topic.name == truth["topic"])
        assert topic.name in prompt.split()
        assert (truth["noise"], truth["familiarity"]) == (topic.noise, topic.familiarity)
        for side in ("chosen", "rejected"):
            assert truth[f"{side}_reward"] == world.true_reward(prompt, row[side])
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
    rows = [world.label(NOISY, best, other, "heteroscedastic", uniform) for _ in range(4000)]
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
