"""Committed numbers of studies, written by hand."""

from pathlib import Path

import pandas as pd
import yaml

BASELINE, DISCO, LEDPO, BOTH = (
    "baseline",
    "disco-used_beta-absent",
    "disco-absent_beta-used",
    "disco-used_beta-used",
)


def write_study(folder: Path, name: str, rows, seeds, **settings) -> Path:
    """rows: (stage, arm, variant, seed, metric, value)."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    columns = ["stage", "arm", "variant", "seed", "metric", "value"]
    pd.DataFrame(list(rows), columns=columns).to_csv(place / "metrics.csv", index=False)
    (place / "config.yaml").write_text(yaml.safe_dump({"study": name, "seeds": list(seeds)} | settings))
    return place


def cell(stage, arm, metric, values, variant=""):
    """Rows of one cell; values by seed, or of seeds 1, 2, …"""
    values = values if isinstance(values, dict) else dict(enumerate(values, start=1))
    return [(stage, arm, variant, seed, metric, value) for seed, value in values.items()]


def sweep(stage, arm, points, seed=1, control=""):
    """Rows of a seed's sweep: variant -> (KL, true reward) or (KL, true reward, well-formed share)."""
    rows = []
    for setting, (kl, reward, *formed) in points.items():
        variant = ",".join(filter(None, [control, setting]))
        values = {"kl_rao_blackwell": kl, "true_reward": reward, "well_formed": formed[0] if formed else 1.0}
        rows += [(stage, arm, variant, seed, metric, value) for metric, value in values.items()]
    return rows
