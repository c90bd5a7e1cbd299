"""Post-hoc controls: what calibrating a finished run does for its probabilities, without training it again.

A run whose rewards are numbers says P = sigmoid(m) of a pair, m its margin. Of the frozen m are made

temperature  P = sigmoid(a m), one a for all pairs (Guo et al. 2017, arXiv:1706.04599): what a scale can do;
topic_scale  P = sigmoid(a_t m), an a for each topic t: what a scale of each prompt can do;
sigma        P = Phi(c m / sqrt(sigma_w^2 + sigma_l^2)), sigma = sigma0 exp(net(h - mean h)), net that of a Disco Head
             on the run's own pooled states h: what a variance can do that has not shaped the states that it reads.

Each is fitted by maximum likelihood on calibration pairs, which nothing else was trained on, and measured on the
held-out pairs. Everything is computed on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from discobeta import metrics, seeds
from discobeta.errors import say
from discobeta.losses import probit_loss
from discobeta.method.heads import SIGMA0, DiscoHead
from discobeta.method.signals import variance_sum

LARGEST = 1000.0
"""a is between 1 / LARGEST and LARGEST: where no pair has a negative margin, the likelihood has its maximum at
infinity, and where margins say nothing, at 0 or below."""

FEWEST = 20
"""Calibration pairs that a fit takes at the least; a topic with fewer has the a of all."""

STEPS, BATCH, RATE, DECAY = 400, 256, 3e-3, 3.0
"""How net and log c are trained: steps of AdamW at the most, pairs a step, learning rate, weight decay of net. Tried on
the rm and dpo baselines of three worlds whose seeds stand in no table: at a decay of 1 the held-out divergence was
.0007 larger on average, .0355 against .0348, and hung more on the draw of the folds."""

FOLDS, EVERY = 4, 10
"""How many steps: as many as lose least on pairs that are left out, each once; looked at after EVERY of them."""


@dataclass
class Margins:
    """What a run says of N pairs, and what is known of them."""

    margin: np.ndarray  # (N,) float64, m
    states: Tensor  # (N, 2, hidden_size) float32, pooled over the chosen and the rejected response
    topic: np.ndarray | None = None  # (N,) names, None of a pair without one
    oracle: np.ndarray | None = None  # (N,) true probability of the label, NaN where it is not known
    sigma: np.ndarray | None = None  # (N, 2) true standard deviation of both rewards, likewise


def measure(held_out: Margins, calibration: Margins, seed: int) -> dict[str, dict]:
    """Control -> nll, brier, ece and, with an oracle, excess_kl of the held-out pairs; and what was fitted.

    temperature/scale is a, topic_scale/scale/<topic> a_t, sigma/scale c; sigma/steps how many were taken,
    sigma/sd_log_sigma and sigma/sigma_spearman as they are of a Disco Head. topic_scale needs topics. Says where a
    fit is at its bound, or has too few pairs, and measures nothing if all have.
    """
    if len(calibration.margin) < FEWEST:
        say(f"not in metrics.json: posthoc ({len(calibration.margin)} calibration pairs, and {FEWEST} are needed)")
        return {}
    a = likeliest_scale(calibration.margin)
    if a == LARGEST:
        say(f"posthoc: no calibration pair has a negative margin; their scale is bounded, {LARGEST:g}")
    found = {"temperature": _scores(logistic_nll(a * held_out.margin), held_out) | {"scale": a}}
    if calibration.topic is not None and held_out.topic is not None:
        scales = topic_scales(calibration.margin, calibration.topic, otherwise=a)
        of_pair = np.array([scales.get(topic, a) for topic in held_out.topic])
        found["topic_scale"] = _scores(logistic_nll(of_pair * held_out.margin), held_out) | {"scale": scales}
    head, log_c, steps = fit_sigma(calibration.margin, calibration.states, seed)
    with torch.no_grad():
        nll = probit_nll(head, log_c, _float32(held_out.margin), held_out.states).double().numpy()
        log_sigma = _log_sigma(head, held_out.states).double().numpy()
    found["sigma"] = _scores(nll, held_out)
    found["sigma"] |= {"scale": math.exp(log_c), "steps": steps, "sd_log_sigma": float(log_sigma.std())}
    if held_out.sigma is not None:
        correlation = metrics.spearman(log_sigma.flatten(), held_out.sigma.flatten())
        found["sigma"] |= {} if correlation is None else {"sigma_spearman": correlation}
    return found


def _scores(nll: np.ndarray, pairs: Margins) -> dict[str, float]:
    found = metrics.classification(nll, pairs.margin)
    scores = {name: found[name] for name in ("nll", "brier", "ece")}
    if pairs.oracle is not None and not np.isnan(pairs.oracle).all():
        scores["excess_kl"] = metrics.against_oracle(nll, pairs.oracle)["excess_kl"]
    return scores


# --- scales


def logistic_nll(margin: np.ndarray) -> np.ndarray:
    """(N,) -log sigmoid(margin), in nats."""
    return np.logaddexp(0, -margin)


def logistic_slope(z: np.ndarray) -> np.ndarray:
    """(N,) -d/dz -log sigmoid(z) = sigmoid(-z)."""
    return np.exp(-np.logaddexp(0, z))


def probit_slope(z: np.ndarray) -> np.ndarray:
    """(N,) -d/dz -log Phi(z) = phi(z) / Phi(z)."""
    log_density = -(z**2) / 2 - math.log(2 * math.pi) / 2
    return np.exp(log_density - torch.special.log_ndtr(torch.from_numpy(z)).numpy())


def likeliest_scale(margin: np.ndarray, slope: Callable[[np.ndarray], np.ndarray] = logistic_slope) -> float:
    """argmin over a in [1/LARGEST, LARGEST] of sum L(a m), from (N,) margins; 1 if all of them are 0.

    slope: -L'. The sum is convex in a, and its derivative -sum m slope(a m); the interval in which that changes its
    sign is halved until no float64 is between its ends.
    """
    if not margin.any():
        return 1.0

    def rises(a: float) -> bool:
        return (margin * slope(a * margin)).sum() < 0  # 0 is all that float64 has left of a fall

    low, high = 1 / LARGEST, LARGEST
    if rises(low) or not rises(high):
        return low if rises(low) else high
    while low < (middle := math.sqrt(low * high)) < high:
        low, high = (low, middle) if rises(middle) else (middle, high)
    return high


def topic_scales(margin: np.ndarray, topic: np.ndarray, otherwise: float) -> dict[str, float]:
    """Topic -> `likeliest_scale` of its pairs; `otherwise` where they are fewer than FEWEST or bound it from nowhere.

    margin: (N,); topic: (N,) names, None of a pair without one.
    """
    scales, without = {}, []
    for name in sorted({name for name in topic if name is not None}):
        of_topic = margin[topic == name]
        scales[name] = likeliest_scale(of_topic) if len(of_topic) >= FEWEST else LARGEST
        if scales[name] == LARGEST:
            scales[name] = otherwise
            without.append(name)
    if without:
        say(
            f"posthoc/topic_scale: {len(without)} of {len(scales)} topics have the scale of all "
            f"({', '.join(without)}): fewer than {FEWEST} calibration pairs, or none with a negative margin"
        )
    return scales


# --- sigma


def fit_sigma(margin: np.ndarray, states: Tensor, seed: int) -> tuple[DiscoHead, float, int]:
    """The head whose net is fitted, log c, and the number of steps that were taken.

    margin: (N,); states: (N, 2, hidden_size), whose mean over both responses of all pairs is the head's. At step 0
    sigma = sigma0 for every response, and c is the likeliest. Then AdamW (STEPS, BATCH, RATE, DECAY) on mean -log P. A
    step count is chosen by FOLDS-fold cross-validation, and the head trained so long on all N pairs. It depends on its
    arguments alone.
    """
    start = likeliest_scale(margin / math.hypot(SIGMA0, SIGMA0), probit_slope)
    margin, order = _float32(margin), torch.randperm(len(margin), generator=seeds.generator(seed, *PURPOSE, "folds"))
    folds = [order[k::FOLDS] for k in range(FOLDS)]
    left_out = np.zeros(STEPS // EVERY + 1)
    for k, fold in enumerate(folds):
        rest = torch.cat(folds[:k] + folds[k + 1 :])
        for nth, (head, log_c) in enumerate(_training(margin, states, rest, start, seed)):
            if nth % EVERY == 0:
                with torch.no_grad():
                    left_out[nth // EVERY] += probit_nll(head, log_c, margin[fold], states[fold]).double().sum()
    steps = EVERY * int(left_out.argmin())
    head, log_c = next(islice(_training(margin, states, order, start, seed), steps, None))
    return head, float(log_c.detach()), steps


PURPOSE = ("post-hoc sigma",)
"""Of the random streams."""


def _training(margin: Tensor, states: Tensor, rows: Tensor, start: float, seed: int) -> Iterator[tuple]:
    """Head and log c at step 0, 1, ..., STEPS of training on `rows` of all pairs."""
    head = _fresh_head(states, seed)
    log_c = torch.tensor(math.log(start), requires_grad=True)
    groups = [{"params": head.net.parameters(), "weight_decay": DECAY}, {"params": [log_c], "weight_decay": 0.0}]
    optimiser, stream = torch.optim.AdamW(groups, lr=RATE), seeds.generator(seed, *PURPOSE, "batches")
    waiting = rows[:0]
    yield head, log_c
    for _ in range(STEPS):
        if len(waiting) < min(BATCH, len(rows)):
            waiting = rows[torch.randperm(len(rows), generator=stream)]
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        with torch.enable_grad():
            loss = probit_nll(head, log_c, margin[batch], states[batch]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield head, log_c


def _fresh_head(states: Tensor, seed: int) -> DiscoHead:
    """A Disco Head that has seen all states as those of one step."""
    with seeds.global_stream(seed, *PURPOSE, "head"):
        head = DiscoHead(states.shape[-1])
    with torch.enable_grad():
        _log_sigma(head, states)
    head.end_step(lambda sums: sums)
    return head.eval()


def _log_sigma(head: DiscoHead, states: Tensor) -> Tensor:
    """(N, 2) log(sigma/sigma0) from (N, 2, hidden_size) states."""
    return head.log_sigma(states.flatten(0, 1)).view(-1, 2)


def probit_nll(head: DiscoHead, log_c: Tensor | float, margin: Tensor, states: Tensor) -> Tensor:
    """(N,) float32, -log Phi(c m / sqrt(sigma_w^2 + sigma_l^2)), in nats."""
    c = log_c.exp() if isinstance(log_c, Tensor) else math.exp(log_c)
    return probit_loss(c * margin, variance_sum(_log_sigma(head, states).T))


def _float32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))
