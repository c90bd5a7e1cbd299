"""How often the whole pipeline errs where nothing is to be found: simulated studies, from frame to verdict.

A simulated study has the runs that the hypotheses name, with numbers drawn so that every claim is false by as little as
it can be: no arm differs from another, and at an equivalence the difference is the margin. What is then supported,
equivalent or contradicted is an error, and should be so with probability alpha at most, in each family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from discobeta.errors import UserError
from discobeta.report.frontier import WELL_FORMED
from discobeta.report.hypotheses import Hypothesis, Registered, judge
from discobeta.report.published import COORDINATES, Published, Source
from discobeta.report.render import Column, Panel, Table, number

Noise = Callable[[np.random.Generator, int, bool], np.ndarray]
"""(generator, n, whether it is the first run of the study) -> n numbers of mean 0 and standard deviation 1."""

NOISES: dict[str, Noise] = {
    "normal": lambda rng, n, first: rng.standard_normal(n),
    "t3": lambda rng, n, first: rng.standard_t(3, n) / math.sqrt(3),
    "skewed": lambda rng, n, first: rng.standard_normal(n) if first else rng.exponential(size=n) - 1,
}
"""Of the numbers of a run over seeds. t3 has heavy tails. With `skewed` the first run's numbers are normal and the
others' are exponential, so that differences are not symmetric about their mean: what the tests assume does not hold."""

SPREAD = 0.3  # of a run's numbers over seeds, in units of a margin where there is one
SWEEP = (0.5, 1.0, 2.0, 4.0)  # coefficients; the second is the grid's


def planted(hypotheses: list[Hypothesis], seeds: list[int], rng: np.random.Generator, noise: Noise) -> Published:
    """A study with the runs of these hypotheses and no difference between any; of an equivalence, the margin's."""
    asked = hypotheses[0]
    names = list(dict.fromkeys((h.stage, term.source) for h in hypotheses for term in h.contrast))
    of_seed = rng.standard_normal(len(seeds))
    rows: list[tuple[Any, ...]] = []

    def write(stage: str, source: Source, metric: str, values: np.ndarray) -> None:
        rows.extend((stage, source.arm, source.variant, seed, metric, v) for seed, v in zip(seeds, values, strict=True))

    def drawn(stage: str, source: Source) -> np.ndarray:
        scale = SPREAD * (asked.margin if asked.direction == "equivalent" else 1)
        return scale * noise(rng, len(seeds), (stage, source) == names[0])

    def shift(hypothesis: Hypothesis, weight: float) -> float:
        if hypothesis.direction != "equivalent":
            return 0.0
        return hypothesis.margin * weight / sum(term.weight**2 for term in hypothesis.contrast)

    written: set[tuple[Any, ...]] = set()
    sections: dict[str, dict[str, Any]] = {}
    for hypothesis in hypotheses:
        for term in hypothesis.contrast:
            metric = term.metric or hypothesis.metric
            cell = (hypothesis.stage, term.source, metric or hypothesis.matched)
            if cell in written:
                continue
            written.add(cell)
            if metric:
                values = of_seed + drawn(hypothesis.stage, term.source) + shift(hypothesis, term.weight)
                write(hypothesis.stage, term.source, metric, values)
                continue
            key = hypothesis.matched.vary
            sections[hypothesis.stage] = {key: SWEEP[1]}
            for setting in SWEEP:
                swept = "" if setting == SWEEP[1] else f"{key}={setting}"
                source = Source(term.arm, ",".join(filter(None, [term.variant, swept])))
                kl = np.exp(0.1 * rng.standard_normal(len(seeds))) / setting
                values = np.sqrt(kl) + of_seed + drawn(hypothesis.stage, term.source) + shift(hypothesis, term.weight)
                write(hypothesis.stage, source, hypothesis.matched.over, kl)
                write(hypothesis.stage, source, hypothesis.matched.value, values)
                write(hypothesis.stage, source, WELL_FORMED, np.ones(len(seeds)))
    frame = pd.DataFrame(rows, columns=[*COORDINATES, "value"])
    return Published("simulated", frame, {"seeds": seeds, **sections}, {})


def simulate(registered: Registered, times: int, n_seeds: int, noise: Noise) -> pd.DataFrame:
    """One row per hypothesis and family: how many of `times` studies of `n_seeds` seeds were judged, and erred.

    below_alpha: p <= alpha of the test alone. supported, contradicted: verdicts, of a family any.
    """
    rng = np.random.default_rng([n_seeds, times])
    seeds = list(range(1, n_seeds + 1))
    groups: dict[Any, list[Hypothesis]] = {}
    for hypothesis in registered.hypotheses:  # an equivalence has numbers of its own, which its margin moves
        own = hypothesis.id if hypothesis.direction == "equivalent" else None
        groups.setdefault((tuple(hypothesis.studies), own), []).append(hypothesis)
    names = [*((h.id, h.stage) for h in registered.hypotheses)]
    names += [("any", stage) for stage in dict.fromkeys(h.stage for h in registered.hypotheses)]
    counts = {name: dict.fromkeys(("below_alpha", "supported", "contradicted"), 0) for name in names}
    for _ in range(times):
        study = {h.id: made for group in groups.values() for made in [planted(group, seeds, rng, noise)] for h in group}
        verdicts = judge(registered, lambda hypothesis, study=study: study[hypothesis.id])
        if all(verdict.why for verdict in verdicts):
            raise UserError(f"--simulate: nothing is judged of {n_seeds} seeds: {verdicts[0].why}")
        erred: dict[tuple[str, str], set[str]] = {}
        for verdict in verdicts:
            found = {"supported": verdict.verdict in ("supported", "equivalent")}
            found |= {"below_alpha": verdict.p <= registered.alpha, "contradicted": verdict.verdict == "contradicted"}
            for kind in (kind for kind, is_so in found.items() if is_so):
                for name in (verdict.hypothesis.id, "any"):
                    erred.setdefault((name, verdict.hypothesis.stage), set()).add(kind)
        for name, kinds in erred.items():
            for kind in kinds:
                counts[name][kind] += 1
    facts = {"seeds": n_seeds, "studies": times}
    return pd.DataFrame([{"id": name, "stage": stage} | facts | of for (name, stage), of in counts.items()])


def error_rates(
    registered: Registered, times: int, made_by: dict[str, str], seeds: tuple[int, ...] = (12, 16)
) -> Table:
    """The rates with all noises, as a table. made_by: the digest of the file of hypotheses."""
    frames = [simulate(registered, times, n, noise).assign(noise=name) for name, noise in NOISES.items() for n in seeds]
    frame = pd.concat(frames, ignore_index=True)
    titles = {"below_alpha": "p ≤ alpha", "supported": "supported", "contradicted": "contradicted"}
    columns = [
        Column("Noise", lambda row: row["noise"], is_number=False),
        Column("Seeds", lambda row: str(row["seeds"])),
        Column("Hypothesis", lambda row: f"{row['id']} of {row['stage']}" if row["id"] == "any" else row["id"], False),
        *(Column(title, lambda row, name=name: rate(row[name], row["studies"])) for name, title in titles.items()),
    ]
    notes = [
        f"Share of {times} simulated studies in which no arm differs from another (an equivalence: by its margin), ± "
        "its standard error. p ≤ alpha: the test alone; supported (or equivalent) and contradicted: the verdict, after "
        f"Holm's correction; any: of a stage, which should be {registered.alpha:g} at most. Noise: of the numbers of a "
        "run over seeds; with the skewed one differences are not symmetric, which the tests assume.",
        f"Hypotheses {made_by['hypotheses']}.",
    ]
    return Table(frame, [Panel("How often the pipeline errs.", columns)], notes, made_by, ["noise", "seeds"])


def rate(count: int, of: int) -> str:
    share = count / of
    return f"{number(share, 3)} ± {number(math.sqrt(share * (1 - share) / of), 3)}"
