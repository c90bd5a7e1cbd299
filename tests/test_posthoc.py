"""Post-hoc controls: fits against closed forms and planted values, and where an evaluation has them."""

import json
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import preference_rows, write_rows

from discobeta.run import posthoc
from discobeta.run.evaluate import evaluate
from discobeta.run.posthoc import LARGEST, Margins, likeliest_scale, measure, topic_scales

pytestmark = pytest.mark.numeric

SCORES = {"nll", "brier", "ece", "excess_kl"}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def erf_cdf(z):
    """Phi, by the error function of the standard library."""
    return np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z])


def as_labelled(margin, probability, random):
    """Margins and probabilities of the labels that are drawn: the first response wins with `probability`."""
    sign = np.where(random.uniform(size=len(margin)) < probability, 1.0, -1.0)
    return sign * margin, np.where(sign > 0, probability, 1 - probability)


# --- scales


def test_the_scale_of_margins_of_one_size_is_the_logit_of_the_share_that_is_right():
    """Margins +-b of which a share r is positive: sigmoid(a b) = r at the maximum, so a = log(r / (1 - r)) / b."""
    for size, right, wrong in ((2.0, 3, 1), (0.01, 60, 40), (50.0, 999, 1)):
        margin = np.array([size] * right + [-size] * wrong)
        assert likeliest_scale(margin) == pytest.approx(math.log(right / wrong) / size, rel=1e-12)


@pytest.mark.parametrize("planted", [0.3, 1.0, 4.0])
def test_a_planted_temperature_is_found(planted):
    """Within four standard errors, 1 / sqrt(sum m^2 p (1 - p)) by the Fisher information of a, which are small."""
    random = np.random.default_rng(3)
    margin = random.normal(scale=1.5, size=5_000)
    p = sigmoid(planted * margin)
    error = 1 / math.sqrt((margin**2 * p * (1 - p)).sum())
    assert error < 0.08 * planted
    assert likeliest_scale(as_labelled(margin, p, random)[0]) == pytest.approx(planted, abs=4 * error)


def test_separable_margins_and_margins_that_say_nothing_give_a_scale_at_its_bound():
    assert likeliest_scale(np.array([0.5, 2.0, 0.0])) == LARGEST
    assert likeliest_scale(np.array([-0.5, -2.0, 1.0])) == 1 / LARGEST  # the derivative at 0, -mean(m)/2, is positive
    assert likeliest_scale(np.zeros(3)) == 1  # every a has the same likelihood


def test_topics_have_scales_of_their_own_where_their_pairs_decide_them(capsys):
    """log 4 and (log 2)/2 by the closed form above; the others, and a pair without a topic, have that of all."""
    topic = np.array(["a"] * 30 + ["b"] * 30 + ["few"] * 19 + ["right"] * 30 + [None] * 5, object)
    margin = np.concatenate([[1.0] * 24 + [-1.0] * 6, [2.0] * 20 + [-2.0] * 10, [-1.0] * 19, [1.0] * 30, [9.0] * 5])
    found = topic_scales(margin, topic, otherwise=0.7)
    assert found == {"a": pytest.approx(math.log(4)), "b": pytest.approx(math.log(2) / 2), "few": 0.7, "right": 0.7}
    assert "2 of 4 topics have the scale of all (few, right)" in capsys.readouterr().err


def test_planted_scales_of_topics_are_found_and_their_divergence_is_less_than_that_of_one_scale():
    random = np.random.default_rng(4)
    planted = {"calm": 2.5, "loud": 0.4}

    def drawn(count):
        topic = np.array(random.choice(list(planted), count), object)
        margin = random.normal(scale=1.5, size=count)
        labelled, q = as_labelled(margin, sigmoid(margin * [planted[name] for name in topic]), random)
        return Margins(labelled, torch.zeros(count, 2, 3), topic, q)

    calibration = drawn(4_000)
    found = measure(drawn(2_000), calibration, seed=1)
    for name, scale in planted.items():
        p = sigmoid(scale * (margin := calibration.margin[calibration.topic == name]))
        error = 1 / math.sqrt((margin**2 * p * (1 - p)).sum())  # as above
        assert found["topic_scale"]["scale"][name] == pytest.approx(scale, abs=4 * error)
    assert found["topic_scale"]["excess_kl"] < 0.002 < 0.03 < found["temperature"]["excess_kl"]


def test_scores_are_those_of_held_out_pairs_under_the_fitted_scale():
    """a = (log 3)/2 says 3/4 and 1/4 of margins of 2 and -2, which is the truth of the first two and, of the third,
    1/4 where it is 1/2: its divergence is 1/2 log 2 + 1/2 log(2/3). Confidences are 3/4, and 1 of 3 is right."""
    calibration = Margins(np.array([2.0, 2, 2, -2] * 5), torch.zeros(20, 2, 3))
    oracle = np.array([0.75, 0.25, 0.5, np.nan])
    found = measure(Margins(np.array([2.0, -2, -2, 2]), torch.zeros(4, 2, 3), None, oracle), calibration, seed=1)
    assert set(found) == {"temperature", "sigma"}  # no topics
    temperature = found["temperature"]
    assert temperature["scale"] == pytest.approx(math.log(3) / 2)
    assert temperature["nll"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert temperature["brier"] == pytest.approx((0.25**2 + 0.75**2) / 2)
    assert temperature["ece"] == pytest.approx(0.75 - 0.5)
    assert temperature["excess_kl"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 3)


def test_without_an_oracle_there_is_no_divergence_and_with_few_pairs_nothing(capsys):
    pairs = Margins(np.array([1.0, -1.0] * 10), torch.zeros(20, 2, 3), None, np.full(20, np.nan))
    assert set(measure(pairs, pairs, seed=1)["temperature"]) == {"nll", "brier", "ece", "scale"}
    few = Margins(pairs.margin[:19], pairs.states[:19])
    assert capsys.readouterr().err == ""
    assert measure(pairs, few, seed=1) == {}
    assert "not in metrics.json: posthoc (19 calibration pairs, and 20 are needed)" in capsys.readouterr().err


def test_separable_calibration_pairs_give_finite_scores_and_say_so(capsys):
    random = np.random.default_rng(5)
    calibration = Margins(random.uniform(0.1, 2, 60), torch.randn(60, 2, 4), np.array(["a"] * 60, object))
    held_out = Margins(np.array([1.0, -1.0]), torch.randn(2, 2, 4), np.array(["a", "b"], object), np.array([0.9, 0.2]))
    found = measure(held_out, calibration, seed=1)
    assert found["temperature"]["nll"] == pytest.approx(LARGEST / 2)  # log(1 + e^-1000) and 1000
    assert all(math.isfinite(found[control][score]) for control in found for score in SCORES)
    assert "no calibration pair has a negative margin; their scale is bounded, 1000" in capsys.readouterr().err


# --- sigma


def world_of_pairs(count, random, weight):
    """Pairs whose rewards have log-deviations `weight` times a feature, and margins of a run that knows the means."""
    states = random.normal(size=(count, 2, 8))
    deviation = 0.8 * np.exp(weight * states[:, :, 0])
    margin = random.normal(scale=1.5, size=count)
    probability = erf_cdf(margin / np.sqrt((deviation**2).sum(1)))
    labelled, q = as_labelled(margin, probability, random)
    is_first = (labelled == margin)[:, None, None]
    states = np.where(is_first, states, states[:, ::-1])
    deviation = np.where(is_first[:, 0], deviation, deviation[:, ::-1])
    return Margins(labelled, torch.from_numpy(states.astype(np.float32) + 5), None, q, deviation)


def test_a_planted_sigma_is_found():
    """The deviations range over a factor of 30; of their order nothing may be lost that 2,400 labels can show."""
    random = np.random.default_rng(6)
    calibration, held_out = world_of_pairs(2_400, random, 0.9), world_of_pairs(1_600, random, 0.9)
    found = measure(held_out, calibration, seed=2)
    assert found["sigma"]["sigma_spearman"] > 0.85
    assert found["sigma"]["excess_kl"] < 0.3 * found["temperature"]["excess_kl"]
    assert found["sigma"]["steps"] > 0


def test_where_there_is_no_variance_to_be_found_few_pairs_invent_none():
    """Trained to the end on these 200 pairs, net makes a divergence of .5 out of their labels' noise."""
    random = np.random.default_rng(9)
    calibration, held_out = world_of_pairs(200, random, 0.0), world_of_pairs(1_600, random, 0.0)
    found = measure(held_out, calibration, seed=2)
    assert found["sigma"]["excess_kl"] < 0.02
    assert "sigma_spearman" not in found["sigma"]  # the true one is constant


def test_without_a_step_all_responses_have_sigma0_and_the_likeliest_scale(monkeypatch):
    """Of margins +-b, of which 3/4 are positive, Phi(c b / sqrt(8/pi)) = 3/4, as sigma0 is 2/sqrt(pi)."""
    monkeypatch.setattr(posthoc, "STEPS", 0)
    margin = np.array([0.2, 0.2, 0.2, -0.2] * 5)
    pairs = Margins(margin, torch.randn(20, 2, 3), None, np.where(margin > 0, 0.75, 0.25))
    found = measure(pairs, pairs, seed=1)["sigma"]
    assert found["steps"] == 0 and found["sd_log_sigma"] == 0
    c = NormalDist().inv_cdf(0.75) * math.sqrt(8 / math.pi) / 0.2
    assert found["scale"] == pytest.approx(c, rel=1e-6)  # it is kept as a float32
    assert found["nll"] == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4, rel=1e-6)
    assert found["excess_kl"] == pytest.approx(0, abs=1e-6)


def test_sigma_is_of_the_difference_from_the_mean_state(monkeypatch):
    """The level of all states is nothing that the net can read, up to rounding: of states near 100, 4e-6 of 1."""
    monkeypatch.setattr(posthoc, "STEPS", 60)
    random = np.random.default_rng(9)
    pairs = world_of_pairs(300, random, 0.9)
    moved = Margins(pairs.margin, pairs.states + 100, None, pairs.oracle, pairs.sigma)
    found, of_moved = (measure(one, one, seed=1)["sigma"] for one in (pairs, moved))
    assert found["steps"] > 0 and of_moved["nll"] == pytest.approx(found["nll"], rel=1e-3)


def test_a_fit_is_a_function_of_pairs_and_seed_and_leaves_the_global_stream_alone(monkeypatch):
    monkeypatch.setattr(posthoc, "STEPS", 60)
    random = np.random.default_rng(10)
    pairs = world_of_pairs(300, random, 0.9)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = measure(pairs, pairs, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert measure(pairs, pairs, seed=1) == first
    other = measure(pairs, pairs, seed=2)
    assert other["temperature"] == first["temperature"] and other["sigma"] != first["sigma"]


# --- in an evaluation


@pytest.fixture
def quick(monkeypatch):
    """Fewer steps, where it does not matter how good the fit is."""
    monkeypatch.setattr(posthoc, "STEPS", 20)


@pytest.fixture(scope="session")
def known_pairs(tmp_path_factory):
    """Files of 40 and 12 pairs whose probability is known, for calibration and held out."""
    folder = tmp_path_factory.mktemp("known")
    files = {}
    for name, count, seed in (("calibration", 40, 3), ("eval", 12, 2)):
        random, rows = np.random.default_rng(seed), preference_rows(count, seed)
        for row in rows:
            row["truth"] |= {"probability": float(random.uniform(0.1, 0.9))}
        files[f"{name}_dataset"] = str(write_rows(folder / f"{name}.jsonl", rows))
    return files


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_a_baseline_has_them_and_a_second_evaluation_the_same_bytes(run, quick, stage, known_pairs):
    path = run(stage, **known_pairs)
    found = evaluate(path)
    assert set(found["posthoc"]) == {"temperature", "topic_scale", "sigma"}
    assert all(set(scores) >= SCORES for scores in found["posthoc"].values())
    assert set(found["calibration"]) == {"accuracy", "nll", "excess_kl"}
    files = [path / "metrics.json", path / "examples.parquet"]
    first = [file.read_bytes() for file in files]
    evaluate(path)
    assert [file.read_bytes() for file in files] == first
    examples = pd.read_parquet(files[1])
    assert len(examples) == 12 and "states" not in examples
    nll = np.logaddexp(0, -found["posthoc"]["temperature"]["scale"] * examples.mean_margin)
    assert found["posthoc"]["temperature"]["nll"] == pytest.approx(nll.mean())


def test_calibration_metrics_are_what_a_run_that_held_these_pairs_out_has(run, known_pairs):
    """To the last bit; and of 12 calibration pairs there are no fits."""
    swapped = {"eval_dataset": known_pairs["calibration_dataset"], "calibration_dataset": known_pairs["eval_dataset"]}
    found = {name: evaluate(run("rm", name=name, **data)) for name, data in (("a", known_pairs), ("b", swapped))}
    for one, other in ("ab", "ba"):
        assert found[one]["calibration"] == {name: found[other][name] for name in ("accuracy", "nll", "excess_kl")}
    assert "posthoc" in found["a"] and "posthoc" not in found["b"]


def test_without_calibration_pairs_a_run_has_neither_and_all_else_is_the_same(run, quick, known_pairs):
    bare = evaluate(run("dpo", name="bare", eval_dataset=known_pairs["eval_dataset"]))
    found = evaluate(run("dpo", name="calibrated", **known_pairs))
    assert found.pop("posthoc") and found.pop("calibration")
    assert found == bare


DISCO = {"add_disco_head": True, "disco_pref": True}
LEDPO = {"add_beta_head": True, "use_dynamic_beta": True}


@pytest.mark.parametrize(("stage", "flags"), [("rm", DISCO), ("dpo", DISCO), ("dpo", LEDPO)])
def test_an_arm_that_uses_an_idea_has_calibration_metrics_alone(run, quick, known_pairs, stage, flags):
    found = evaluate(run(stage, **known_pairs, **flags))
    assert "posthoc" not in found and set(found["calibration"]) == {"accuracy", "nll", "excess_kl"}


def test_an_idle_head_changes_no_bit_of_them(run, quick, known_pairs):
    plain = run("rm", name="plain", **known_pairs)
    idle = run("rm", name="idle", **known_pairs, add_disco_head=True)
    assert evaluate(plain)["posthoc"] == evaluate(idle)["posthoc"]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_states_are_the_last_hidden_ones_of_each_response_pooled(run, quick, known_pairs, pooling, monkeypatch):
    """Against transformers' own hidden states of a prompt and a response, one row at a time, without padding."""
    seen = {}
    monkeypatch.setattr(posthoc, "measure", lambda held_out, calibration, seed: seen.update(of=held_out) or {})
    path = run("dpo", **known_pairs, head_pooling=pooling)
    evaluate(path)
    import discobeta

    policy, examples = discobeta.load_policy(path), pd.read_parquet(path / "examples.parquet")
    rows = [json.loads(line) for line in Path(known_pairs["eval_dataset"]).read_text().splitlines()]
    assert seen["of"].margin.tolist() == examples.mean_margin.tolist()
    for index, row in enumerate(rows[:4]):
        for side, name in enumerate(("chosen", "rejected")):
            prompt = policy.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            response = [*policy.tokenizer(row[name], add_special_tokens=False)["input_ids"], 2]  # and <eos>
            with torch.no_grad():
                output = policy.model(torch.tensor([prompt + response]), output_hidden_states=True)
            states = output.hidden_states[-1][0, len(prompt) :]
            expected = states.mean(0) if pooling == "mean" else states[-1]
            # float32 sums in another order, of numbers around 1
            assert torch.allclose(seen["of"].states[index, side], expected, atol=1e-5)
