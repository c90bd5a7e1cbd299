"""What is known of held-out rows and of their prompts, as numbers; and metrics without what has no value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from discobeta import metrics
from discobeta.errors import say


def truth_numbers(
    examples: pd.DataFrame,
    name: str,
    wanted: str = "number",
    is_wanted: Callable[[np.ndarray], np.ndarray] = np.isfinite,
) -> np.ndarray:
    """(rows,) float64 of a truth column, NaN where a row holds nothing, text, or nothing `wanted`, which is said."""
    values = known(examples, name, is_wanted)
    values = np.full(len(examples), np.nan) if values is None else values
    if gaps := int(np.isnan(values).sum()):
        rest = "left out" if gaps == len(values) else "measured without them"
        column = name.removeprefix("oracle_")  # as the data call it
        say(f"truth column {column}: {gaps} of {len(values)} rows hold no {wanted}; what needs one is {rest}")
    return values


def known(
    examples: pd.DataFrame, name: str, is_wanted: Callable[[np.ndarray], np.ndarray] = np.isfinite
) -> np.ndarray | None:
    """`truth_numbers` without a word; None where no row holds one."""
    if name not in examples:
        return None
    values = pd.to_numeric(examples[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    values = np.where(np.isfinite(values) & is_wanted(values), values, np.nan)
    return None if np.isnan(values).all() else values


def is_probability(values: np.ndarray) -> np.ndarray:
    return (values >= 0) & (values <= 1)


def topic_name(topic: Any) -> str | None:
    """As text: 1 where gaps have made it 1.0; None of a row without one."""
    if pd.isna(topic) or topic == "":
        return None
    return str(int(topic)) if isinstance(topic, float) and topic.is_integer() else str(topic)


def without_gaps(measured: dict[str, Any]) -> dict[str, Any]:
    """Without what has no value, which is said."""
    infinite = [name for name, value in measured.items() if isinstance(value, float) and not math.isfinite(value)]
    undefined = [name for name, value in measured.items() if value is None]
    if undefined:
        say(f"not in metrics.json: {', '.join(undefined)} (too few rows that say enough, or nothing in them varies)")
    if infinite:
        say(f"not in metrics.json: {', '.join(infinite)} (no finite number)")
    return {name: value for name, value in measured.items() if name not in (*undefined, *infinite)}


def scale_metrics(examples: pd.DataFrame) -> dict[str, float | None]:
    """What s(x) does: its mean and spread, and what it follows; nothing where beta is one number."""
    if "log_s" not in examples:
        return {}
    log_s = examples["log_s"]
    measured = {"mean_log_s": float(log_s.mean()), "sd_log_s": float(log_s.std(ddof=0))}
    if {"noise", "familiarity"} & set(examples):
        noise = np.log(truth_numbers(examples, "noise", "number above 0", lambda noise: noise > 0))
        familiarity = truth_numbers(examples, "familiarity")
        measured["log_s_noise"] = metrics.partial_correlation(log_s, noise, given=familiarity)
        measured["log_s_familiarity"] = metrics.partial_correlation(log_s, familiarity, given=noise)
    return measured
