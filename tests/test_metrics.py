"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from discobeta import metrics

pytestmark = pytest.mark.numeric


def logits(probability):
    """The margins that a logistic model gives with these probabilities."""
    p = np.asarray(probability)
    return np.log(p / (1 - p))


def test_the_mean_of_several_reward_models_is_taken_in_their_own_units():
    """The reference's scores 1, 3 (mean 2, deviation 1) and 10, 50 (30, 20): 5 and 0 are 3 and -1.5 deviations off."""
    scores, reference = metrics.mean_scores([[5.0, 0.0]], [[1.0, 10.0], [3.0, 50.0]])
    assert scores.tolist() == pytest.approx([0.75]) and reference.tolist() == pytest.approx([-1, 1])
    alone, before = metrics.mean_scores([[5.0], [7.0]], [[1.0], [3.0]])
    assert alone.tolist() == [5, 7] and before.tolist() == [1, 3]


def test_classification():
    # labels predicted with p = .9, .6, .2, .5: right, right, wrong, tie
    found = metrics.classification(-np.log([0.9, 0.6, 0.2, 0.5]), logits([0.9, 0.6, 0.2, 0.5]))
    assert found["accuracy"] == pytest.approx(2.5 / 4)
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.6) + math.log(0.2) + math.log(0.5)) / 4)
    assert found["brier"] == pytest.approx((0.01 + 0.16 + 0.64 + 0.25) / 4)
    # confidences .9 (right), .6 (right), .8 (wrong), .5 (half right), each alone in its bin
    assert found["ece"] == pytest.approx((0.1 + 0.4 + 0.8 + 0.0) / 4)


def test_accuracy_is_of_the_margins_sign_in_the_log_and_in_the_evaluation():
    margins = [0.0, -0.0, 1e-30, -1e-30, 2.0, -2.0]
    expected = [0.5, 0.5, 1, 0, 1, 0]
    assert metrics.correctness(np.array(margins)).tolist() == expected
    of_tensor = metrics.correctness(torch.tensor(margins, requires_grad=True))
    assert of_tensor.dtype == torch.float32 and not of_tensor.requires_grad and of_tensor.tolist() == expected
    no_data = metrics.correctness(torch.empty(6, device="meta"))  # would raise where its values are waited for
    assert no_data.shape == (6,) and no_data.device.type == "meta"


def test_all_ties_are_half_right():
    """In float32 exp(-log 2) is not 1/2, so that a probability would call all of them wrong."""
    nll = (-torch.nn.functional.logsigmoid(torch.zeros(6))).double().numpy()
    assert (np.exp(-nll) != 0.5).all()
    found = metrics.classification(nll, np.zeros(6))
    assert found["accuracy"] == 0.5 and found["ece"] == pytest.approx(0, abs=1e-7)


def test_calibration_bins_pool_pairs_of_equal_confidence():
    p, margin = [0.82, 0.84, 0.18, 1.0], [1.5, 1.7, -1.5, 40.0]
    table = metrics.reliability(p, margin, bins=5)  # bins of width .1; .8-.9 holds three
    assert table["count"].tolist() == [0, 0, 0, 3, 1]
    assert table["accuracy"][3] == pytest.approx(2 / 3) and table["confidence"][3] == pytest.approx(2.48 / 3)
    assert metrics.expected_calibration_error(p, margin, bins=5) == pytest.approx(0.75 * (0.16))


def test_a_calibrated_predictor_has_a_small_error_and_an_overconfident_one_has_not():
    random = np.random.default_rng(0)
    truth = random.uniform(0.5, 1, 20_000)
    won = random.uniform(size=20_000) < truth
    calibrated = np.where(won, truth, 1 - truth)
    error = metrics.expected_calibration_error(calibrated, logits(calibrated))
    assert error < 0.02  # sampling error, about 1/sqrt(2000) per bin
    overconfident = np.where(won, 0.99, 0.01)
    assert metrics.expected_calibration_error(overconfident, logits(overconfident)) == pytest.approx(0.24, abs=0.02)


def test_against_oracle():
    """Labels of true probability 1/4 and 1/2, to which the model gives 1/2 and 1/4. The divergences are
    1/4 log(1/2) + 3/4 log(3/2) = 3/4 log 3 - log 2 = .130812 and
    1/2 log 2 + 1/2 log(2/3) = log 2 - 1/2 log 3 = .143841.
    """
    found = metrics.against_oracle(nll=[math.log(2), math.log(4)], oracle_probability=[0.25, 0.5])
    assert found["bayes_accuracy"] == pytest.approx((0.75 + 0.5) / 2)
    assert found["oracle_nll"] == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert found["excess_kl"] == pytest.approx((0.130812 + 0.143841) / 2, abs=1e-6)


def kl(q, nll):
    return metrics.against_oracle([nll], [q])["excess_kl"]


def test_the_divergence_from_a_truth_that_is_sure_is_of_the_label_that_had_to_come():
    """p = 1/4: of a label that had to come log 4; of one that could not, -log(3/4)."""
    assert kl(1, math.log(4)) == pytest.approx(math.log(4))
    assert kl(0, math.log(4)) == pytest.approx(math.log(4 / 3))
    assert kl(1, 0) == 0 and kl(0, 1000) == 0  # and the model knows it
    assert kl(1, 1000) == 1000


def test_the_divergence_is_zero_where_the_model_is_the_truth():
    for q in (1e-9, 0.3, 0.5, 0.999):
        assert kl(q, -math.log(q)) == pytest.approx(0, abs=1e-15)


def test_the_divergence_is_finite_and_exact_where_the_model_is_nearly_sure():
    """q = 1/2 has the entropy log 2 and the divergence -log 2 + nll/2 - log(1-p)/2, where 1-p is nll if that is small,
    though 1 - exp(-1e-20) is 0 in float64. What float32 rounds to 0 is at most 2^-149, its smallest positive number."""
    assert kl(0.5, 1e-20) == pytest.approx(-math.log(2) + 10 * math.log(10), rel=1e-12)
    assert kl(0.5, 1e-10) == pytest.approx(-math.log(2) + 5 * math.log(10), rel=1e-10)
    assert kl(0.5, 1000) == pytest.approx(-math.log(2) + 500)
    least = float(np.nextafter(np.float32(0), np.float32(1)))
    for rounded in (0.0, -0.0):
        assert kl(0.5, rounded) == kl(0.5, least) == pytest.approx(73.5 * math.log(2))
        assert kl(0, rounded) == pytest.approx(149 * math.log(2))


@pytest.mark.parametrize("margin", [-200.0, -15.0, 15.0, 200.0])
def test_the_divergence_of_every_float32_loss_is_finite(margin):
    for loss in (-torch.nn.functional.logsigmoid(torch.tensor(margin)), -torch.special.log_ndtr(torch.tensor(margin))):
        for q in (0, 0.5, 1):
            assert math.isfinite(kl(q, float(loss))) and kl(q, float(loss)) >= 0


def test_the_divergence_is_the_mean_excess_over_drawn_labels_and_the_same_whatever_was_drawn():
    """Labels of 400 pairs, drawn 4,000 times: mean(-log p) - mean(-log q) of the label has the divergence as its mean.
    Tolerance: four standard errors of that mean, which must be small beside the divergence to tell it from another."""
    random = np.random.default_rng(5)
    truth = random.uniform(0.02, 0.98, 400)
    model = 1 / (1 + np.exp(-(0.6 * np.log(truth / (1 - truth)) + random.normal(scale=0.5, size=400))))
    sampled, exact = [], []
    for _ in range(4_000):
        first = random.uniform(size=400) < truth
        q, p = np.where(first, truth, 1 - truth), np.where(first, model, 1 - model)
        sampled.append(np.log(q).mean() - np.log(p).mean())
        exact.append(metrics.against_oracle(-np.log(p), q)["excess_kl"])
    standard_error = np.std(sampled) / 4_000**0.5
    assert standard_error < 0.005 * exact[0]
    assert np.mean(sampled) == pytest.approx(exact[0], abs=4 * standard_error)
    assert exact == pytest.approx([exact[0]] * 4_000, rel=1e-12)


def test_an_oracle_that_is_sure_or_does_not_say():
    """q = 1, 0, NaN, .5 and p = 1/2, 1/4, 1/8, 1/2: the best predictor is right with 1, 1 and .5; -log q is 0,
    infinite, not known and log 2, so that only the first row and the last have one; the divergences are log 2,
    -log(3/4), not known and 0."""
    found = metrics.against_oracle(-np.log([1 / 2, 1 / 4, 1 / 8, 1 / 2]), [1, 0, np.nan, 0.5])
    assert found["bayes_accuracy"] == pytest.approx(2.5 / 3)
    assert found["oracle_nll"] == pytest.approx(math.log(2) / 2)
    assert found["excess_kl"] == pytest.approx((math.log(2) + math.log(4 / 3)) / 3)
    sure = metrics.against_oracle([1.0], [1.0])
    assert sure == {"bayes_accuracy": 1, "oracle_nll": 0, "excess_kl": 1} and math.copysign(1, sure["oracle_nll"]) == 1
    nothing = {"bayes_accuracy": None, "oracle_nll": None, "excess_kl": None}
    assert metrics.against_oracle([1.0], [np.nan]) == nothing
    impossible = metrics.against_oracle([math.log(4)], [0.0])
    assert impossible == {"bayes_accuracy": 1, "oracle_nll": None, "excess_kl": pytest.approx(math.log(4 / 3))}


def test_correlations_are_over_the_rows_where_all_is_known():
    nan, inf = np.nan, np.inf
    assert metrics.spearman([1, nan, 2, 9, 3], [3, 7, 1, inf, 2]) == pytest.approx(-0.5)  # of (1, 2, 3) and (3, 1, 2)
    assert metrics.spearman([1, nan], [nan, 2]) is None
    z, u = np.array([1.0, 1, -1, -1, nan, 5]), np.array([1.0, -1, 1, -1, 3, inf])
    assert metrics.partial_correlation(z + u, z - u, given=z) == pytest.approx(-1)
    assert metrics.partial_correlation([nan] * 3, [1, 2, 3], given=[1, 2, 4]) is None


def test_a_constant_has_no_partial_correlation_whatever_its_size():
    random = np.random.default_rng(0)
    x, z = random.normal(size=50), random.normal(size=50)
    for constant in (0.0, 0.7, 1e12):  # a regression leaves about 1e-16 of it in each row
        assert metrics.partial_correlation(x, np.full(50, constant), given=z) is None
    assert metrics.partial_correlation(x * 1e-9, x * 1e-9, given=z) == pytest.approx(1)  # small, and not constant
    assert metrics.partial_correlation(x * 1e200, x * 1e200, given=z) is None  # its squares are infinite


def test_spearman_sees_order_only():
    assert metrics.spearman([1, 2, 3, 4], [10, 20, 30, 4000]) == pytest.approx(1)
    assert metrics.spearman([1, 2, 3], [3, 1, 2]) == pytest.approx(-0.5)  # 1 - 6*(4+1+1)/(3*8)
    assert metrics.spearman([1, 1, 1], [1, 2, 3]) is None


def test_partial_correlation_takes_the_common_cause_away():
    # x = z + u, y = z - u: r_xy = 0 for equal variances, given z it is -1
    z, u = np.array([1.0, 1, -1, -1]), np.array([1.0, -1, 1, -1])
    assert np.corrcoef(z + u, z - u)[0, 1] == pytest.approx(0)
    assert metrics.partial_correlation(z + u, z - u, given=z) == pytest.approx(-1)
    assert metrics.partial_correlation(z, u, given=z) is None


def test_what_is_measured_of_the_heads():
    """sigma in the opposite order of the truth; log s = -log noise, whatever the familiarity."""
    import pandas as pd

    from discobeta.run.evaluate import preference_metrics

    examples = pd.DataFrame(
        {
            "nll": [0.1, 0.2, 0.3, 0.4],
            "mean_margin": [4.0, 3.0, 2.0, 1.0],
            "variance_sum": [1.0] * 4,
            "sigma_chosen": [4.0, 3.0, 2.0, 1.0],
            "sigma_rejected": [8.0, 7.0, 6.0, 5.0],
            "chosen_sigma": [5.0, 6.0, 7.0, 8.0],
            "rejected_sigma": [1.0, 2.0, 3.0, 4.0],
            "log_s": -np.log([1.0, 1.0, 2.0, 2.0]),
            "noise": [1.0, 1.0, 2.0, 2.0],
            "familiarity": [0, 1, 0, 1],
            "oracle_probability": [0.5, 0.5, 0.5, 0.5],
            "topic": ["a", "a", "b", "b"],
        }
    )
    found = preference_metrics(examples)
    assert found["sigma_spearman"] == pytest.approx(-1)
    assert found["mean_log_sigma"] == pytest.approx(
        np.log([4, 3, 2, 1, 8, 7, 6, 5]).mean() - math.log(2 / math.pi**0.5)
    )
    assert found["log_s_noise"] == pytest.approx(-1) and "log_s_familiarity" not in found  # no residual left
    assert found["mean_log_s"] == pytest.approx(-math.log(2) / 2) and found["sd_log_s"] == pytest.approx(
        math.log(2) / 2
    )
    # the mean of -log 2 + nll/2 - log(1 - exp(-nll))/2, with thirty digits and rounded
    assert found["excess_kl"] == pytest.approx(0.2468276702)
    assert found["by_topic"]["b"]["nll"] == pytest.approx(0.35) and found["by_topic"]["b"]["examples"] == 2
