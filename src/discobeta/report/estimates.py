"""What seeds say of one number, as tables print it.

Below six seeds an interval helps nobody (of two, Student's is 12.7 times as wide as they lie apart from their mean), so
that what stands beside the mean is the seeds themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from discobeta.report.render import NOTHING, number
from discobeta.report.statistics import INTERVAL_FROM, mean_ci


def estimate(values: Mapping[int, float], seeds: Sequence[int], decimals: int, said: int | None = None) -> str:
    """Mean of the values (by seed) of the study's `seeds`, and how sure it is; – of none.

    From six values on `mean ± half-width` of the 95 % interval; of fewer `mean (value, value, …)`, in the order of the
    seeds. A seed without a value is a – in its place where the study has fewer than six; else `(n of N)` says so,
    N being how many values the row is `said` to have, if that is not all.
    """
    n, expected = len(values), len(seeds) if said is None or len(seeds) < INTERVAL_FROM else said
    if n == 0:
        return NOTHING
    mean, half_width = mean_ci(list(values.values()))
    text, lacking = number(mean, decimals), f"{n} of {expected}" if n != expected else ""
    if n >= INTERVAL_FROM:
        text += f" ± {number(half_width, decimals)}"
        return f"{text} ({lacking})" if lacking else text
    if len(seeds) == 1:
        return text
    if len(seeds) < INTERVAL_FROM:
        return f"{text} ({', '.join(number(values[seed], decimals) if seed in values else NOTHING for seed in seeds)})"
    each = ", ".join(number(value, decimals) for value in values.values()) if n > 1 else ""
    beside = "; ".join(filter(None, [each, lacking]))
    return f"{text} ({beside})" if beside else text


def interval_words(seeds: Sequence[int]) -> str:
    """How `estimate` is to be read, as a sentence of a caption."""
    if len(seeds) == 1:
        return "One seed: there is no interval to show, and no difference between arms to be believed."
    if len(seeds) < INTERVAL_FROM:
        return f"Mean over seeds, in brackets the value of each (seeds {', '.join(map(str, seeds))})."
    return f"Mean over {len(seeds)} seeds ± half-width of its 95 % confidence interval (Student's t)."


def interval_header(seeds: Sequence[int], what: str = "Mean") -> str:
    """The heading of a column of estimates."""
    return what if len(seeds) == 1 else f"{what}\n(each seed)" if len(seeds) < INTERVAL_FROM else f"{what}\n± 95 % CI"
