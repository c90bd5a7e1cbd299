"""How a run agrees with several people who have judged the same pairs: with their shares, and with their disagreement.

Of n votes on a pair with values v = 1 (for the chosen response), 1/2 (tie) and 0, q is the mean: the share. Every
pair counts alike, however many votes it has.

All measures of the shares stay the same if the two responses of a pair change places, so that it does no harm that
`chosen` is the one that more people took. What they measure is a vote drawn at random, and they are linear in the
votes: therefore they are unbiased for what people at large would say, with few votes a pair too. Only the entropy is
not: of n votes it is too small, by about 1/(2n) nats where people do disagree (Miller 1955), and the divergence from
the shares too large by as much, in every run alike. Smoothing q would trade this for a prior; differences between
runs need neither. Pairs without a majority have no chosen response and are not here, so that the deepest doubts are
missing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from discobeta import metrics
from discobeta.data.examples import Votes
from discobeta.errors import say

COLUMNS = [f"votes_{side}" for side in Votes._fields]


def vote_metrics(examples: pd.DataFrame) -> dict[str, Any]:
    """What the votes say of a run, over the held-out pairs that have some; nothing if none has. None: undefined.

    pairs, entropy: how many have votes; mean entropy of (q, 1 - q), nats. Properties of the data, as unanimous is.
    kl, brier:  mean KL((q, 1-q) || (p, 1-p)), nats, which is the mean -log of what p gives a vote minus the entropy;
                mean q (1-p)^2 + (1-q) p^2. p the model's probability of the chosen response.
    ece:        calibration error, whose accuracy is the share of people on the side that the model takes.

    Of pairs with two votes and more:

    unanimous:  share of pairs of which all voted for the chosen response; accuracy_unanimous, accuracy_split: of these,
                and of the others, the accuracy.
    sigma_spearman, log_s_spearman:  rank correlation of sqrt(sigma_w^2 + sigma_l^2), and of log s, with the
                disagreement, sum (v - q)^2 / (n - 1), which is unbiased for the variance of a vote. Heads that see it
                have sigma rise and log s fall with it.
    sigma_partial, log_s_partial:    the same of the ranks, given that of |margin|/s: people also disagree where two
                responses are equally good, and that is no noise.
    """
    if not set(COLUMNS) <= set(examples):
        return {}
    votes = examples[COLUMNS].to_numpy(float)
    if gaps := int((votes.sum(1) == 0).sum()):
        say(f"votes: {gaps} of {len(votes)} held-out pairs have none; what is measured of votes is without them")
    examples, votes = examples[votes.sum(1) > 0], votes[votes.sum(1) > 0]
    if not len(votes):
        return {}
    value, number = np.array([1, 0, 0.5]), votes.sum(1)
    share = votes @ value / number
    margin = examples["mean_margin"].to_numpy(float)
    measured: dict[str, Any] = {"pairs": len(votes)}
    if "nll" in examples:
        nll = examples["nll"].to_numpy(float)
        p = np.exp(-nll)
        measured |= {
            "kl": float(metrics.divergence(nll, share).mean()),
            "brier": float((share * (1 - p) ** 2 + (1 - share) * p**2).mean()),
            "ece": metrics.expected_calibration_error(p, margin, share=share),
        }
    measured["entropy"] = float(metrics.entropy(share).mean())

    several = number > 1
    examples, votes, number, margin, share = (part[several] for part in (examples, votes, number, margin, share))
    disagreement = (votes * (value - share[:, None]) ** 2).sum(1) / (number - 1)
    unanimous, correct = share == 1, metrics.correctness(margin)
    measured |= {
        "unanimous": float(unanimous.mean()) if len(share) else None,
        "accuracy_unanimous": float(correct[unanimous].mean()) if unanimous.any() else None,
        "accuracy_split": float(correct[~unanimous].mean()) if not unanimous.all() else None,
    }
    of_heads = {}
    if "variance_sum" in examples:
        of_heads["sigma"] = examples["variance_sum"].to_numpy(float)  # whose root has the same ranks
    if "log_s" in examples:
        of_heads["log_s"] = examples["log_s"].to_numpy(float)
        margin = margin * np.exp(-of_heads["log_s"])
    for name, said in of_heads.items():
        ranks = [pd.Series(values).rank() for values in (said, disagreement, np.abs(margin))]
        measured[f"{name}_spearman"] = metrics.spearman(said, disagreement)
        measured[f"{name}_partial"] = metrics.partial_correlation(*ranks[:2], given=ranks[2])
    return measured
