"""Measurements of preference probabilities, as pure functions of arrays.

Each held-out pair is labelled: the chosen response won. A model gives that label the probability p;
it predicts the label if p > 1/2, with confidence max(p, 1 - p).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

EVALUATION_COLUMNS = frozenset(
    [
        "row", "source", "nll", "mean_margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected",
        "variance_sum", "sigma_chosen", "sigma_rejected", "log_s", "oracle_probability",
        "prompt", "response", "reference_response", "length", "ended", "log_ratio", "reward", "reference_reward",
        "true_reward", "reference_true_reward", "well_formed", "reference_well_formed",
    ]
)  # fmt: skip
"""What an evaluation calls its own columns, of pairs and of sampled responses: the names that a truth column may not
have. Not among them is `probability`, which a truth may hold and which then stands as `oracle_probability`."""

BINS = 10
"""Equal bins of confidence over [1/2, 1] in the calibration error and the reliability diagram."""


def correctness(probability: ArrayLike) -> Array:
    """(N,) 1 where the label was predicted, 0 where not, 1/2 for a tie at p = 1/2."""
    p = np.asarray(probability, float)
    return np.where(p == 0.5, 0.5, p > 0.5)


def reliability(probability: ArrayLike, bins: int = BINS) -> dict[str, Array]:
    """Per bin of confidence: `low`, `high`, `count`, mean `confidence` and `accuracy` (NaN if empty)."""
    p = np.asarray(probability, float)
    confidence, correct = np.maximum(p, 1 - p), correctness(p)
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


def expected_calibration_error(probability: ArrayLike, bins: int = BINS) -> float:
    """sum_b n_b/N * |accuracy_b - confidence_b| (Guo et al. 2017, arXiv:1706.04599)."""
    table = reliability(probability, bins)
    gap = np.abs(table["accuracy"] - table["confidence"])
    return float(np.nansum(table["count"] * gap) / table["count"].sum())


def classification(nll: ArrayLike) -> dict[str, float]:
    """Accuracy, mean NLL (nats), Brier score and calibration error from (N,) nll = -log p of the label."""
    nll = np.asarray(nll, float)
    p = np.exp(-nll)
    return {
        "examples": len(p),
        "accuracy": float(correctness(p).mean()),
        "nll": float(nll.mean()),
        "brier": float(((1 - p) ** 2).mean()),
        "ece": expected_calibration_error(p),
    }


def against_oracle(nll: ArrayLike, oracle_probability: ArrayLike) -> dict[str, float]:
    """How far a model is from the truth that drew the labels.

    oracle_probability: (N,) true probability q that the label comes out as it did.
    bayes_accuracy is the expected accuracy of the best predictor, mean max(q, 1 - q); excess_nll is
    mean(-log p) - mean(-log q), whose expectation is the mean KL divergence from truth to model.
    """
    q = np.asarray(oracle_probability, float)
    oracle = float(-np.log(q).mean())
    return {
        "bayes_accuracy": float(np.maximum(q, 1 - q).mean()),
        "oracle_nll": oracle,
        "excess_nll": float(np.asarray(nll, float).mean()) - oracle,
    }


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Rank correlation; None if one of the two is constant, where it has no value."""
    x, y = (pd.Series(np.asarray(values, float)).rank() for values in (x, y))
    return None if x.nunique() == 1 or y.nunique() == 1 else float(x.corr(y))


def partial_correlation(x: ArrayLike, y: ArrayLike, given: ArrayLike) -> float | None:
    """Pearson correlation of x and y after a linear regression of both on `given`.

    (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2)); None where a residual is constant.
    """
    z = np.asarray(given, float)
    design = np.stack([np.ones_like(z), z], 1)

    def residual(values: ArrayLike) -> Array:
        values = np.asarray(values, float)
        return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]

    a, b = residual(x), residual(y)
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 1e-12 else None
