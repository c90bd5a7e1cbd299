"""Measures of responses: several per prompt, the reference's ranked (best-of-n), and the exact divergence per token."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import preference_rows, write_rows
from safetensors.torch import load_file

from discobeta import cli, files, metrics
from discobeta.data.batches import Responses
from discobeta.data.rows import Ragged
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.inputs import answers, world
from discobeta.inputs import reference as reference_pass
from discobeta.model.pretrained import load_causal_lm, load_tokenizer
from discobeta.run import responses
from discobeta.run.evaluate import evaluate
from discobeta.run.load import load_policy, load_reward_model
from discobeta.run.responses import divergences, noise_levels, policy_metrics, ranking_metrics

SAMPLING = {"num_eval_generations": 6, "max_new_tokens": 5}
LEDPO = {"add_beta_head": True, "use_dynamic_beta": True}


# --- best of m out of n


def best_of_subsets(scores, values, m: int) -> float:
    """The mean over all subsets of m, and in each over those that share its highest score."""
    of_subsets = []
    for subset in itertools.combinations(range(len(scores)), m):
        highest = max(scores[i] for i in subset)
        of_subsets.append(np.mean([values[i] for i in subset if scores[i] == highest]))
    return float(np.mean(of_subsets))


@pytest.mark.parametrize("most", [2, 4, 1000], ids=["many ties", "ties", "hardly a tie"])
def test_the_best_of_m_is_the_mean_over_all_subsets_ties_in_expectation(most):
    random = np.random.default_rng(most)
    scores, values = random.integers(0, most, (5, 7)), random.normal(size=(5, 7))
    for m in range(1, 8):
        expected = [best_of_subsets(*row, m) for row in zip(scores, values, strict=True)]
        np.testing.assert_allclose(metrics.best_of(scores, values, m), expected, rtol=1e-12)


def test_the_best_of_all_is_the_best_and_the_best_of_one_the_mean():
    scores, values = [[0.1, 0.3, 0.2]], [[5.0, -1.0, 2.0]]
    assert metrics.best_of(scores, values, 3) == [-1.0] and metrics.best_of(scores, values, 1) == pytest.approx([2.0])
    # of two: {0,1} -> -1, {0,2} -> 2, {1,2} -> -1
    assert metrics.best_of(scores, values, 2) == pytest.approx([0.0])


def test_the_rank_correlation_within_rows_is_that_of_every_row():
    random = np.random.default_rng(1)
    x, y = random.integers(0, 4, (6, 9)).astype(float), random.normal(size=(6, 9))
    x[2], y[4] = 1.0, -3.0
    found = metrics.spearman_within(x, y)
    for row in (0, 1, 3, 5):
        assert found[row] == pytest.approx(metrics.spearman(x[row], y[row]), abs=1e-12)
    assert np.isnan(found[[2, 4]]).all()


def test_ranking_metrics_by_hand():
    """Three prompts of noise .2, .2 and 1.6, four responses each; the last prompt's true rewards are all the same."""
    scores = np.array([[0.0, 1, 2, 3], [1, 0, 2, 3], [0, 2, 4, 6]])
    truth = np.array([[0.0, 1, 2, 3], [0, 1, 2, 3], [7, 7, 7, 7]])
    found = ranking_metrics(scores, truth, pd.DataFrame({"noise": [0.2, 0.2, 1.6]}))
    sd = np.sqrt(5 / 3)  # of 0, 1, 2, 3
    assert found == {
        "best_of_4": {"true_reward": pytest.approx((3 + 3 + 7) / 3)},
        "within_prompt_spearman": pytest.approx(0.9),  # of 1 and .8
        "score_spread": {"0.2": pytest.approx(sd / (4 * sd / 3)), "1.6": pytest.approx(2 * sd / (4 * sd / 3))},
        "score_spread_ratio": pytest.approx(0.5),
    }


def test_where_no_truth_is_known_the_spread_alone_is_measured_and_a_single_level_has_no_ratio(capsys):
    scores = np.array([[0.0, 1, 2, 4], [0, 1, 2, 3]])
    found = ranking_metrics(scores, None, pd.DataFrame({"noise": [1.12, 1.12]}))
    assert found == {"score_spread": {"1.12": pytest.approx(1.0)}}
    assert "score_spread_ratio" in capsys.readouterr().err
    assert ranking_metrics(scores, None, pd.DataFrame(index=range(2))) == {}


def test_a_noise_that_every_prompt_has_its_own_of_has_no_levels():
    assert list(noise_levels(pd.DataFrame({"noise": [1.6, 0.2, 1.6, np.nan]}))) == ["0.2", "1.6"]
    assert noise_levels(pd.DataFrame({"noise": np.arange(1, 18) / 10})) == {}


# --- the divergence at every token


@pytest.fixture
def two_models(settings):
    """The base, and one whose weights are a little different; a config, and the tokenizer."""
    config, _ = RunConfig.from_mapping(settings("dpo", **SAMPLING))
    reference, policy = load_causal_lm(config).eval(), load_causal_lm(config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return policy, reference, config, load_tokenizer(config)


def next_log_probabilities(model, prompt, response) -> torch.Tensor:
    """(T, V) float64, by transformers' own forward pass on one unpadded sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("at_once", [2**26, 40])
def test_divergences_are_those_of_the_whole_softmax_at_every_place(two_models, monkeypatch, at_once):
    monkeypatch.setattr(responses, "LOGITS_AT_ONCE", at_once)  # 40: one token's logits of both models
    policy, reference, config, _ = two_models
    prompts = [np.array(ids, np.int32) for ids in ([4, 6, 5], [4, 7, 8, 6, 5], [4, 5])]
    texts = [np.array(ids, np.int32) for ids in ([9, 10, 17, 2], [2], [11, 11, 12, 18, 9])]
    found = divergences(policy, reference, Responses(prompts, texts), config)
    assert [len(terms) for terms in found["kl_terms"]] == [4, 1, 5]
    for i, (prompt, response) in enumerate(zip(prompts, texts, strict=True)):
        log_p, log_q = (next_log_probabilities(model, prompt, response) for model in (policy, reference))
        expected = (log_p.exp() * (log_p - log_q)).sum(-1)
        torch.testing.assert_close(found["kl_terms"][i].double(), expected, rtol=1e-4, atol=1e-5)
        chosen = torch.arange(len(response)), torch.tensor(response.astype(np.int64))
        assert found["log_ratio"][i].item() == pytest.approx((log_p - log_q)[chosen].sum().item(), abs=1e-4)
        assert expected.min() > 1e-3  # so that a mixed-up place would be seen


def test_a_model_has_no_divergence_from_itself(two_models):
    policy, _, config, _ = two_models
    texts = Responses([np.array([4, 6, 5])], [np.array([9, 10, 2])])
    found = divergences(policy, policy, texts, config)
    assert found["kl_terms"][0].tolist() == [0.0, 0.0, 0.0] and found["log_ratio"].tolist() == [0.0]


def test_both_estimators_have_the_divergence_as_their_mean_and_the_exact_one_varies_less(two_models):
    """Over all responses of at most two tokens, each with its probability under the policy."""
    policy, reference, config, tokenizer = two_models
    prompt, size, eos = np.array([4, 7, 5], np.int32), len(tokenizer), tokenizer.eos_token_id
    texts = [[eos]] + [[a, b] for a in range(size) if a != eos for b in range(size)]
    log_p, log_q = (
        torch.stack(
            [next_log_probabilities(model, prompt, text)[range(len(text)), torch.tensor(text)].sum() for text in texts]
        ).numpy()
        for model in (policy, reference)
    )
    p = np.exp(log_p)
    assert p.sum() == pytest.approx(1, abs=1e-6)
    divergence = float((p * (log_p - log_q)).sum())
    rows = Responses([prompt] * len(texts), [np.array(text, np.int32) for text in texts])
    found = divergences(policy, reference, rows, config)
    plain = found["log_ratio"].double().numpy()
    exact = np.array([terms.double().sum().item() for terms in found["kl_terms"]])
    assert divergence > 0.05
    assert float(p @ plain) == pytest.approx(divergence, rel=1e-4)
    assert float(p @ exact) == pytest.approx(divergence, rel=1e-4)
    assert exact.min() >= 0 and p @ (exact - divergence) ** 2 < 0.5 * (p @ (plain - divergence) ** 2)


def test_question_metrics_and_regret_by_hand(monkeypatch):
    monkeypatch.setattr(world, "frontier_reward", lambda kl: 10 * kl)
    frame = pd.DataFrame(
        {
            "log_ratio": [0.5, 0.1, 0.3, 0.3], "kl": [0.1, 0.2, 0.3, 0.4], "mark_kl": [0.05, 0.0, 0.02, 0.01],
            "length": 5, "ended": True, "response": ["use mint ?", "use", "use sage .", "sage ?"],
            "true_reward": [1.0, 0, 0, 1], "reference_true_reward": 0.0, "well_formed": True,
            "noise": [0.2, 0.2, 1.6, 1.6],
        }
    )  # fmt: skip
    found = policy_metrics(frame)
    assert found["kl_per_sequence"] == pytest.approx(0.3)
    assert found["kl_rao_blackwell"] == pytest.approx(0.25)
    assert found["question_share"] == 0.5 and found["question_kl"] == pytest.approx(0.02)
    assert found["regret"] == pytest.approx(2.5 - 0.5)
    assert found["kl_by_noise"] == {"0.2": pytest.approx(0.15), "1.6": pytest.approx(0.35)}


# --- runs


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]


@pytest.fixture
def truth(monkeypatch):
    """A true reward that differs between texts, of a base that knows nothing of the world."""

    def true_reward(prompt, response):
        return float(sum(ord(letter) for letter in prompt + response) % 17)

    monkeypatch.setattr(world.World, "true_reward", lambda world, *text: true_reward(*text))
    monkeypatch.setattr(world, "frontier_reward", lambda kl: 3.0 + kl)
    return true_reward


@pytest.mark.numeric
def test_more_responses_to_a_prompt_leave_the_first_ones_as_they_are(run, truth):
    directory = run("dpo", **SAMPLING, ground_truth="world", learning_rate=0.05)
    single = evaluate(directory)
    one = lines(directory)
    found = evaluate(directory, {"generations_per_prompt": 3})
    three = lines(directory)
    assert [line.pop("sample") for line in three] == [0, 1, 2] * 6
    assert three[::3] == one and not any("sample" in line for line in one)
    for side in ("response", "reference_response"):  # each sample has a stream of its own
        columns = [tuple(line[side] for line in three[j::3]) for j in range(3)]
        assert len(set(columns)) == 3
    assert [line["prompt"] for line in three] == [line["prompt"] for line in one for _ in range(3)]
    assert found["generations"] == 18 and single["generations"] == 6
    assert found["kl_per_sequence"] == pytest.approx(np.mean([line["log_ratio"] for line in three]))
    assert found["true_reward"] == pytest.approx(np.mean([truth(line["prompt"], line["response"]) for line in three]))
    assert found["question_share"] == np.mean([line["response"].split()[-1:] == ["?"] for line in three])
    assert found["regret"] == pytest.approx(3.0 + found["kl_rao_blackwell"] - found["true_reward"])


@pytest.mark.numeric
def test_the_exact_divergence_of_a_run_and_its_part_at_the_mark(run, settings):
    directory = run("dpo", **SAMPLING, learning_rate=0.05, ground_truth="world", num_train_epochs=1)
    world_metrics = evaluate(directory, {"generations_per_prompt": 4})
    config, _ = RunConfig.from_mapping(settings("dpo", **SAMPLING))
    policy, reference, tokenizer = load_policy(directory).model, load_causal_lm(config), load_tokenizer(config)
    sums, marks = [], []
    for line in lines(directory):
        response = tokenizer.encode(line["response"]) + [tokenizer.eos_token_id] * line["ended"]
        log_p, log_q = (
            next_log_probabilities(model, tokenizer.encode(line["prompt"]), response) for model in (policy, reference)
        )
        terms = (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        sums.append(sum(terms))
        ends_in_a_mark = line["response"].split()[-1:] in (["."], ["?"])
        marks.append(terms[len(line["response"].split()) - 1] if ends_in_a_mark else 0.0)
    assert world_metrics["kl_rao_blackwell"] == pytest.approx(np.mean(sums), rel=1e-3)
    assert 0 < np.mean(marks) < np.mean(sums)
    assert world_metrics["question_kl"] == pytest.approx(np.mean(marks), rel=1e-3)


def stored(folder, count: int, each: int) -> list[list[np.ndarray]]:
    columns = load_file(folder / "responses.safetensors")
    flat = Ragged(columns["values"].numpy(), columns["offsets"].numpy())
    assert len(flat) == count * each
    return [[flat[i * each + j] for j in range(each)] for i in range(count)]


@pytest.fixture
def let_answer(settings, tmp_path):
    """let_answer(stage, **changes): `discobeta answers` with the config of a run; its exit status."""

    def make(stage: str, **changes) -> int:
        file = tmp_path / "answers.yaml"
        file.write_text(json.dumps(settings(stage, **SAMPLING | changes)))
        return cli.main(["answers", str(file)])

    return make


def measured_by_hand(scores, true_rewards, noise) -> dict:
    """What ranking_metrics should say, by subsets and row by row."""
    spread = scores.std(1, ddof=1)
    correlations = [metrics.spearman(*row) for row in zip(scores, true_rewards, strict=True)]
    return {
        "best_of_4": np.mean([best_of_subsets(*row, 4) for row in zip(scores, true_rewards, strict=True)]),
        "within_prompt_spearman": np.mean(correlations),
        "score_spread_ratio": spread[noise == 0.5].mean() / spread[noise == 1.5].mean(),
        "score_spread/0.5": spread[noise == 0.5].mean() / spread.mean(),
    }


@pytest.mark.numeric
@pytest.mark.parametrize("stage", ["rm", "dpo", "LeDPO"])
def test_a_run_ranks_the_references_responses_by_its_own_reward(run, settings, let_answer, truth, tmp_path, stage):
    """Of five, an odd number; scores by `RewardModel.score`, and by transformers' own forward passes."""
    folder, arm = tmp_path / "answers", LEDPO if stage == "LeDPO" else {}
    stage = "rm" if stage == "rm" else "dpo"
    changes = {**SAMPLING, "best_of": 5, "reference_answers_path": str(folder), "ground_truth": "world"}
    directory = run(stage, **changes, **arm, learning_rate=0.02)
    assert let_answer(stage, **changes) == 0
    found = evaluate(directory)
    config, _ = RunConfig.from_mapping(settings(stage, **changes))
    tokenizer, rows = load_tokenizer(config), preference_rows(12, 2)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:6]
    noise = np.array([next(row["truth"]["noise"] for row in rows if row["prompt"] == prompt) for prompt in prompts])
    responses = stored(folder, 6, 5)
    texts = [[answers_text(tokenizer, ids) for ids in of_prompt] for of_prompt in responses]
    if stage == "rm":
        judge = load_reward_model(directory)
        ids = [np.array(tokenizer.encode(prompt), np.int32) for prompt in prompts for _ in range(5)]
        scores = judge.score_ids(ids, [r for of_prompt in responses for r in of_prompt])[0].numpy().reshape(6, 5)
    else:
        policy, reference = load_policy(directory), load_causal_lm(config)
        scores = np.empty((6, 5))
        for i, j in itertools.product(range(6), range(5)):
            prompt, response = tokenizer.encode(prompts[i]), responses[i][j].astype(np.int64)
            of_policy, of_reference = (
                next_log_probabilities(model, prompt, response)[range(len(response)), response].sum().item()
                for model in (policy.model, reference)
            )
            scores[i, j] = 0.5 * (of_policy - of_reference)
            if arm:
                with torch.no_grad():
                    state = reference.model(torch.tensor([prompt])).last_hidden_state[:, -1]
                    scores[i, j] *= policy.heads.beta.log_s(state).exp().item()
    true_rewards = np.array([[truth(prompts[i], text) for text in texts[i]] for i in range(6)])
    expected = measured_by_hand(scores.astype(float), true_rewards, noise)
    assert found["best_of_4"]["true_reward"] == pytest.approx(expected["best_of_4"], rel=1e-6)
    assert "best_of_16" not in found
    assert found["within_prompt_spearman"] == pytest.approx(expected["within_prompt_spearman"], abs=1e-6)
    assert found["score_spread_ratio"] == pytest.approx(expected["score_spread_ratio"], rel=2e-3)
    assert found["score_spread"]["0.5"] == pytest.approx(expected["score_spread/0.5"], rel=2e-3)


def answers_text(tokenizer, ids) -> str:
    ids = list(map(int, ids))
    return tokenizer.decode(ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids)


@pytest.mark.numeric
def test_the_references_responses_are_sampled_and_rated_once_for_all_arms(run, let_answer, monkeypatch, tmp_path):
    """And are, byte for byte, what each would sample and rate by itself."""
    calls = []
    for module, name in ((answers, "generate"), (reference_pass, "compute")):
        original = getattr(module, name)

        def counted(*arguments, name=name, original=original, **options):
            calls.append((name, options.get("description") or arguments[-1]))
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, counted)
    changes = SAMPLING | {"best_of": 4, "generations_per_prompt": 2}
    rm_changes = SAMPLING | {"best_of": 4}
    folders = {stage: {"reference_answers_path": str(tmp_path / f"{stage}-answers")} for stage in ("rm", "dpo")}
    arms = {"one": {}, "other": LEDPO, "rm": {}}
    directories = {}
    for name, arm in arms.items():
        stage = "rm" if name == "rm" else "dpo"
        settings = rm_changes if stage == "rm" else changes
        for shared in (False, True):
            folder = folders[stage] if shared else {}
            directories[name, shared] = run(stage, name=f"{name}-{shared}", **settings, **arm, **folder)
    calls.clear()
    assert let_answer("dpo", **changes, **folders["dpo"]) == 0
    rounds = [("generate", f"reference samples {j} of 4") for j in (1, 2, 3, 4)]
    assert calls == [*rounds, ("compute", "of its answers")]
    calls.clear()
    assert let_answer("rm", **rm_changes, **folders["rm"]) == 0
    assert calls == rounds  # a reward model has no use for the reference's log-probabilities
    hashes = set()
    for name in arms:
        calls.clear()
        evaluate(directories[name, True])
        of_policy = [("generate", f"policy samples {j} of 2") for j in (1, 2)] if name != "rm" else []
        assert [call for call in calls if call[1] != "eval"] == of_policy
        evaluate(directories[name, False])
        for file in ("metrics.json", "examples.parquet"):
            assert (directories[name, True] / file).read_bytes() == (directories[name, False] / file).read_bytes()
        for shared in (False, True):
            hashes.add(files.read_sealed(directories[name, shared] / "evaluation.json")["reference_answers"])
    assert len(hashes) == 1
    one, other = (json.loads((directories[name, True] / "metrics.json").read_text()) for name in ("one", "other"))
    assert one["score_spread"] != other["score_spread"]


@pytest.mark.numeric
def test_a_folder_with_more_of_them_serves_and_one_with_fewer_does_not(run, let_answer, tmp_path, capsys):
    folder = {"reference_answers_path": str(tmp_path / "answers")}
    directory, alone = run("dpo", **SAMPLING, **folder), run("dpo", name="alone", **SAMPLING)
    assert let_answer("dpo", **folder, generations_per_prompt=3) == 0
    capsys.readouterr()
    evaluate(directory)
    assert "the reference answers anew" not in capsys.readouterr().err
    evaluate(alone)
    assert lines(directory) == lines(alone)
    evaluate(directory, {"best_of": 4})
    assert "is of another best_of (nothing there, 4 here): the reference answers anew" in capsys.readouterr().err
    assert let_answer("dpo", **folder, generations_per_prompt=5) == 2
    assert "another generations_per_prompt (3 there, 5 here)" in capsys.readouterr().err


def test_a_score_that_is_no_finite_number_is_refused(run, monkeypatch):
    directory = run("rm", **SAMPLING, best_of=2)
    original = type(responses.runs.load_stage(responses.record.read(directory))).rewards_of_pairs

    def diverged(self, batch):
        return original(self, batch) * torch.nan

    monkeypatch.setattr("discobeta.method.stage.Stage.rewards_of_pairs", diverged)
    with pytest.raises(UserError, match="12 of 12 of the reference's responses have a score that is no finite number"):
        evaluate(directory)


@pytest.mark.parametrize(
    "stage, changes, said",
    [
        ("rm", {"best_of": 1, "num_eval_generations": 4}, "best_of: 1: a single response is no choice"),
        ("dpo", {"best_of": 4, "num_eval_generations": 0}, "best_of: 4 needs num_eval_generations"),
        ("dpo", {"best_of": -1}, "best_of: "),
        ("dpo", {"generations_per_prompt": 0}, "generations_per_prompt: "),
    ],
)
def test_what_cannot_be_ranked_is_refused(settings, stage, changes, said):
    with pytest.raises(UserError, match=said):
        RunConfig.from_mapping(settings(stage, **changes))


def test_answers_of_a_reward_model_need_something_to_rank(let_answer, capsys, tmp_path):
    assert let_answer("rm", reference_answers_path=str(tmp_path / "a")) == 2
    assert "answers of stage rm needs best_of" in capsys.readouterr().err


def test_candidates_stand_where_they_were():
    for each in (2, 3, 4, 5):
        prompts = [np.array([1], np.int32), np.array([2, 2], np.int32)]
        given = [np.array([10 * i + j], np.int32) for i in range(2) for j in range(each)]
        rows = answers.candidates(prompts, given, each)
        pairs = np.array(
            [[first[0], second[0]] for first, second in zip(rows.chosen_ids, rows.rejected_ids, strict=True)]
        )
        assert len(rows) == 2 * ((each + 1) // 2)
        for prompt, (first, second) in zip(rows.prompt_ids, pairs, strict=True):
            assert len(prompt) == first // 10 + 1 == second // 10 + 1
        expected = [[10 * i + j for j in range(each)] for i in range(2)]
        assert answers.of_candidates(pairs, each).tolist() == expected


def test_held_out_rows_of_a_noise_are_found_by_prompt(run, tmp_path):
    """The noise of a prompt is that of the row that it stands in, not of the row with its number."""
    rows = [row | {"truth": row["truth"] | {"noise": 9.0}} for row in preference_rows(12, 2)]
    seen = {}
    for row in rows:
        row["truth"]["noise"] = seen.setdefault(row["prompt"], 0.5 + len(seen) % 2)
    rows = [rows[0], rows[0], *rows[1:]]  # the second row is no prompt of its own
    held_out = write_rows(tmp_path / "twice.jsonl", rows)
    found = evaluate(run("rm", **SAMPLING, best_of=3, eval_dataset=str(held_out)))
    assert set(found["score_spread"]) == {"0.5", "1.5"}
    shares = [found["score_spread"][level] for level in ("0.5", "1.5")]
    assert np.mean(shares) == pytest.approx(1)  # three prompts of each
