"""The result of a study in a few lines for a terminal: each stage's used arms by what they are compared by."""

from __future__ import annotations

from discobeta.design.stages import STAGES
from discobeta.design.study import Study
from discobeta.report.measures import METRICS
from discobeta.report.published import read_metrics


def headline(study: Study) -> str:
    """Means over the seeds, and where all of it stands. Raises UserError where there are no tables."""
    frame = read_metrics(study.tables_directory / "metrics.csv")
    frame = frame[(frame.variant == "") & frame.seed.isin(study.seeds)]
    lines = []
    for stage in study.stages:
        of_stage = frame[frame.stage == stage]
        means = of_stage.groupby(["arm", "metric"]).value.mean().unstack()
        seeds = of_stage.groupby("arm").seed.nunique()
        metrics = [METRICS[name] for name in STAGES[stage].compared if name in means and name in METRICS]
        if not metrics:
            continue
        rows = [[STAGES[stage].title, *(" ".join(metric.header.split()) for metric in metrics)]]
        for arm in study.arms_of(stage):
            if not arm.is_idle and arm.name in means.index:
                values = [(means.at[arm.name, metric.name], metric.decimals) for metric in metrics]
                n, all_of_them = seeds[arm.name], len(study.seeds)
                name = arm.label if n == all_of_them else f"{arm.label} ({n} of {all_of_them} seeds)"
                rows.append([f"  {name}", *(f"{v:.{n}f}" if v == v else "–" for v, n in values)])
        widths = [max(map(len, column)) + 3 for column in zip(*rows, strict=True)]
        for first, *cells in rows:
            numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            lines.append("".join([first.ljust(max(30, widths[0])), *numbers]))
        lines.append("")
    seeds = "1 seed" if len(study.seeds) == 1 else f"{len(study.seeds)} seeds"
    lines.append(f"Means over {seeds}; intervals, paired effects and neutrality are in the tables.")
    lines.append(f"tables: {study.tables_directory}   figures: {study.figures_directory}")
    if (page := study.directory / "report.html").exists():
        lines.append(f"to read, in a browser: {page}")
    return "\n".join(lines)
