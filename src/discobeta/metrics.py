"""Measurements of preference probabilities, as pure functions of arrays.

Each held-out pair is labelled: the chosen response won. A model gives that label the probability p;
it predicts the label if its margin (mean reward of chosen minus rejected) is positive, which is p > 1/2,
with confidence max(p, 1 - p). NaN stands for what is not known of a row.
"""

from __future__ import annotations

from math import comb
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Margin = TypeVar("Margin")  # a numpy array or a torch tensor

EVALUATION_COLUMNS = frozenset(
    [
        "row", "source", "nll", "mean_margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected",
        "variance_sum", "sigma_chosen", "sigma_rejected", "log_s", "oracle_probability",
        "votes_chosen", "votes_rejected", "votes_tie",
        "prompt", "sample", "response", "reference_response", "length", "ended", "log_ratio",
        "reward", "reference_reward", "true_reward", "reference_true_reward", "well_formed", "reference_well_formed",
    ]
)  # fmt: skip
"""What an evaluation calls its own columns, of pairs and of sampled responses: the names that a truth column may not
have. Not among them is `probability`, which a truth may hold and which then stands as `oracle_probability`."""

CONSTANT = 1e-9
"""A residual of a smaller norm, in units of the norm of what it is left of, is rounding, and has no correlation."""

SMALLEST_FLOAT32 = 2.0**-149
"""The smallest positive float32, a subnormal one."""

BINS = 10
"""Equal bins of confidence over [1/2, 1] in the calibration error and the reliability diagram."""


def correctness(margin: Margin) -> Margin:
    """(N,) 1 where margin > 0, 1/2 for a tie, 0 otherwise; of an array or a tensor, on its device.

    From the margin and not from p, because in float32 exp(-log 2) is not 1/2. A margin that is only rounding
    has become 0 where it arose (`signals.TIE`).
    """
    return 0.5 * (margin > 0) + 0.5 * (margin >= 0)


def reliability(
    probability: ArrayLike, margin: ArrayLike, bins: int = BINS, *, share: ArrayLike = 1.0
) -> dict[str, Array]:
    """Per bin of confidence: `low`, `high`, `count`, mean `confidence` and `accuracy` (NaN if empty).

    share: of several labels of a pair those that are the one that p and margin speak of.
    """
    p, q = np.asarray(probability, float), np.asarray(share, float)
    confidence, correct = np.maximum(p, 1 - p), correctness(np.asarray(margin, float))
    correct = q * correct + (1 - q) * (1 - correct)
    edges = np.linspace(0.5, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins).astype(float)
    with np.errstate(invalid="ignore"):
        return {
            "low": edges[:-1],
            "high": edges[1:],
            "count": count,
            "confidence": np.bincount(place, confidence, bins) / count,
            "accuracy": np.bincount(place, correct, bins) / count,
        }


def expected_calibration_error(
    probability: ArrayLike, margin: ArrayLike, bins: int = BINS, *, share: ArrayLike = 1.0
) -> float:
    """sum_b n_b/N * |accuracy_b - confidence_b| (Guo et al. 2017, arXiv:1706.04599); share as in `reliability`."""
    table = reliability(probability, margin, bins, share=share)
    gap = np.abs(table["accuracy"] - table["confidence"])
    return float(np.nansum(table["count"] * gap) / table["count"].sum())


def classification(nll: ArrayLike | None, margin: ArrayLike) -> dict[str, float]:
    """Accuracy, mean NLL (nats), Brier score and calibration error from (N,) nll = -log p of the label and margins.

    nll: None of a model whose loss is no likelihood; then there is the accuracy alone.
    """
    margin = np.asarray(margin, float)
    measured = {"examples": len(margin), "accuracy": float(correctness(margin).mean())}
    if nll is None:
        return measured
    nll = np.asarray(nll, float)
    p = np.exp(-nll)
    return measured | {
        "nll": float(nll.mean()),
        "brier": float(((1 - p) ** 2).mean()),
        "ece": expected_calibration_error(p, margin),
    }


def mean_scores(scores: ArrayLike, reference: ArrayLike) -> tuple[Array, Array]:
    """(N,) scores and (R,) scores of the reference's responses, as one number each, of M reward models.

    scores: (N, M); reference: (R, M). Of one model they stay what they are. Several have units of their own: each is
    taken in deviations of its scores of the reference's responses from their mean, and then they are averaged.
    """
    scores, reference = np.asarray(scores, float), np.asarray(reference, float)
    if scores.shape[1] == 1:
        return scores[:, 0], reference[:, 0]
    mean, deviation = reference.mean(0), np.maximum(reference.std(0), 1e-6)
    return ((scores - mean) / deviation).mean(1), ((reference - mean) / deviation).mean(1)


def against_oracle(nll: ArrayLike, oracle_probability: ArrayLike) -> dict[str, float | None]:
    """How far a model is from the truth that drew the labels.

    nll: (N,) finite -log p of the label as it came out, computed in float32.
    oracle_probability: (N,) true probability q that the label comes out as it did, NaN where it is not known.

    bayes_accuracy is the expected accuracy of the best predictor, mean max(q, 1 - q). excess_kl is the mean KL
    divergence from truth to model in nats, q log(q/p) + (1-q) log((1-q)/(1-p)) with 0 log 0 = 0. It is the
    expectation of -log p + log q, the label's excess over the oracle, given the pair; so which labels were drawn
    does not matter. oracle_nll, mean -log q, is without rows of q = 0. None where there is no row.
    """
    known = ~np.isnan(np.asarray(oracle_probability, float))
    nll, q = np.asarray(nll, float)[known], np.asarray(oracle_probability, float)[known]
    if not len(q):
        return {"bayes_accuracy": None, "oracle_nll": None, "excess_kl": None}
    possible = q[q > 0]
    return {
        "bayes_accuracy": float(np.maximum(q, 1 - q).mean()),
        "oracle_nll": float(-np.log(possible).mean()) + 0.0 if len(possible) else None,  # if all are 1: 0 and not -0
        "excess_kl": float(divergence(nll, q).mean()),
    }


def divergence(nll: Array, q: Array) -> Array:
    """(N,) KL((q, 1-q) || (p, 1-p)) = q log(q/p) + (1-q) log((1-q)/(1-p)) in nats, p = exp(-nll) from float32 nll."""
    # log(1-p), by expm1 because 1 - exp(-nll) is 0 from nll = 1e-16 down. An nll that float32 has rounded to 0 says
    # that 1-p is below the smallest positive one, not that it is 0: that number keeps the row's KL, and the mean,
    # finite, and bounds it from below.
    log_other = np.log(-np.expm1(-np.maximum(nll, SMALLEST_FLOAT32)))
    return _x_log_x(q) + q * nll + _x_log_x(1 - q) - (1 - q) * log_other


def entropy(q: Array) -> Array:
    """(N,) -q log q - (1-q) log(1-q), nats."""
    return -_x_log_x(q) - _x_log_x(1 - q)


def _x_log_x(x: Array) -> Array:
    return x * np.log(np.where(x > 0, x, 1))


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Rank correlation over the rows where both are known; None if one of the two is constant there."""
    import pandas as pd

    x, y = (pd.Series(values).rank() for values in _where_all_are_known(x, y))
    return None if x.nunique() < 2 or y.nunique() < 2 else float(x.corr(y))


def best_of(scores: ArrayLike, values: ArrayLike, m: int) -> Array:
    """(P,) expected value of the item with the highest score among m of n, drawn without replacement.

    scores, values: (P, n), n >= m. sum_i v_i * (W(<=i) - W(<i)) / t_i with W(k) = C(k, m) / C(n, m), the probability
    that all m are among the k lowest scores, and k the number of scores up to that of i, or below it; t_i items share
    its score, each of which is as likely to be taken. So it is the mean over all C(n, m) subsets, without ties
    sum_i v_(i) C(i-1, m-1) / C(n, m) over the order statistics.
    """
    scores, values = np.asarray(scores, float), np.asarray(values, float)
    n = scores.shape[1]
    below, up_to = _counts(scores)
    share = np.array([comb(k, m) / comb(n, m) for k in range(n + 1)])
    return (values * (share[up_to] - share[below]) / (up_to - below)).sum(1)


def spearman_within(x: ArrayLike, y: ArrayLike) -> Array:
    """(P,) rank correlation of x and y, (P, n), within each row; NaN where one of the two is constant."""
    ranks = (sum(_counts(np.asarray(values, float))) / 2 for values in (x, y))  # but for 1/2, means of tied ranks
    a, b = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def _counts(values: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(P, n) how many values of its row are less than each, and how many are not greater."""
    others = values[:, None, :]
    return (others < values[:, :, None]).sum(2), (others <= values[:, :, None]).sum(2)


def partial_correlation(x: ArrayLike, y: ArrayLike, given: ArrayLike) -> float | None:
    """Pearson correlation of x and y after a linear regression of both on `given`, where all three are known.

    (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2)); None where a residual is constant.
    """
    x, y, z = _where_all_are_known(x, y, given)
    if len(z) < 3:
        return None
    design = np.stack([np.ones_like(z), z], 1)

    def residual(values: Array) -> Array:
        return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]

    a, b = residual(x), residual(y)
    with np.errstate(over="ignore", invalid="ignore"):
        if any(np.linalg.norm(rest) <= CONSTANT * np.linalg.norm(values) for rest, values in ((a, x), (b, y))):
            return None
        correlation = a @ b / np.sqrt((a @ a) * (b @ b))
    return float(correlation) if np.isfinite(correlation) else None  # values around 1e154, whose squares are infinite


def _where_all_are_known(*columns: ArrayLike) -> Array:
    """(columns, rows) float64, without the rows in which a value is NaN or infinite."""
    values = np.stack([np.asarray(column, float) for column in columns])
    return values[:, np.isfinite(values).all(0)]
