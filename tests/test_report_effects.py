"""Effects of the 2x2 design from run directories written by hand; expected values are worked out beside them."""

import math

import pandas as pd
import pytest
from report_study import finish, results, study

from discobeta.report import figures, tables

ARMS = ["baseline", "disco-used_beta-absent", "disco-absent_beta-used", "disco-used_beta-used"]
NLL = {1: [0.60, 0.50, 0.56, 0.50], 2: [0.58, 0.50, 0.56, 0.46]}
"""Seed -> the NLL of ARMS. Disco: ((0.50 - 0.60) + (0.50 - 0.56)) / 2 = -0.08 in seed 1, and -0.09 in seed 2;
LeDPO: -0.02 and -0.03; interaction: (0.50 - 0.56) - (0.50 - 0.60) = 0.04, and -0.02."""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finished(stage="dpo", metric="nll", values=NLL, *, but=(), arms=None, **settings):
    """A study whose runs of `stage` have these values; `but` names (arm, seed) that are left out."""
    made = study(arms=arms or ARMS, seeds=sorted(values), **settings)
    for run in made.runs():
        if stage == "ppo" and run.stage != "ppo":
            finish(made, run, None)  # what a ppo run has read
        if run.stage == stage and not run.proof and run.arm.name in ARMS and (run.arm.name, run.seed) not in but:
            finish(made, run, {metric: values[run.seed][ARMS.index(run.arm.name)]})
    return made


def csv(made, name):
    tables.write(results(made))
    return pd.read_csv(made.directory / "tables" / f"{name}.csv", keep_default_na=False, na_values=[""])


def lines(made, name):
    """The cells of the Markdown table's rows."""
    text = (made.directory / "tables" / f"{name}.md").read_text()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]


def test_effects_are_paired_over_seeds():
    made = finished()
    frame = csv(made, "effects")
    assert frame.contrast.tolist() == ["Disco", "LeDPO", "Disco × LeDPO"]
    assert frame.difference.tolist() == pytest.approx([-0.085, -0.025, 0.01])
    t = 12.706205  # 97.5 % quantile of Student's t with one degree of freedom; half the range is sd / sqrt(2)
    assert frame.ci95.tolist() == pytest.approx([t * 0.005, t * 0.005, t * 0.03])
    assert frame.p.tolist() == [0.5, 0.5, 1.0]  # of 4 ways to choose the signs: 2, 2, all
    assert frame.p_holm.tolist() == [1.0, 1.0, 1.0]
    assert lines(made, "effects") == [
        ["dpo", "NLL (nats)\u00a0↓", "Disco", "2", "−0.0850 (−0.0800, −0.0900)", "0.500", "1.000"],
        ["dpo", "NLL (nats)\u00a0↓", "LeDPO", "2", "−0.0250 (−0.0200, −0.0300)", "0.500", "1.000"],
        ["dpo", "NLL (nats)\u00a0↓", "Disco × LeDPO", "2", "0.0100 (0.0400, −0.0200)", "1.000", "1.000"],
    ]


def test_every_seed_has_a_column_of_the_file():
    made = finished(but=[("disco-absent_beta-used", 2)])
    frame = csv(made, "effects").set_index("contrast")
    assert frame["seed-1"].to_dict() == pytest.approx({"Disco": -0.08, "LeDPO": -0.02, "Disco × LeDPO": 0.04})
    assert frame["seed-2"].isna().all()
    pairs = csv(made, "comparisons").set_index("contrast")
    assert pairs.loc["both − baseline", ["seed-1", "seed-2"]].tolist() == pytest.approx([-0.10, -0.12])


def test_comparisons_are_paired_over_seeds():
    made = finished()
    frame = csv(made, "comparisons")
    assert dict(zip(frame.contrast, frame.difference, strict=True)) == pytest.approx({
        "Disco − baseline": -0.09,  # -0.10 and -0.08
        "LeDPO − baseline": -0.03,  # -0.04 and -0.02
        "both − baseline": -0.11,  # -0.10 and -0.12
        "both − Disco": -0.02,  # 0 and -0.04
        "both − LeDPO": -0.08,  # -0.06 and -0.10
    })  # fmt: skip
    assert not {"p", "p_holm"} & set(frame)
    assert lines(made, "comparisons")[3] == [
        "dpo", "NLL (nats)\u00a0↓", "both − Disco", "2", "−0.0200 (0.0000, −0.0400)",
    ]  # fmt: skip


def test_a_reward_model_has_one_effect():
    """Its arms differ by Disco only, so all comparisons that remain are one."""
    made = finished("rm")
    assert csv(made, "effects").contrast.tolist() == ["Disco"]
    assert csv(made, "comparisons").contrast.tolist() == ["Disco − baseline"]
    assert csv(made, "effects").difference.tolist() == pytest.approx([-0.09])


def test_holm_is_over_what_is_tested_in_the_stage():
    """Eight seeds that agree: 2 of 256 ways. Six tests: NLL and true reward; accuracy has an interval only."""
    values = [0.6, 0.5, 0.56, 0.4]
    made = study(arms=ARMS, seeds=list(range(8)), stages=["dpo"])
    for run in made.runs():
        value = values[ARMS.index(run.arm.name)] + 0.01 * run.seed
        finish(made, run, {"nll": value, "accuracy": value, "true_reward": value, "kl_per_sequence": value})
    frame = csv(made, "effects").set_index(["metric", "contrast"])
    assert len(frame) == 12
    for metric in ("nll", "true_reward"):
        assert frame.loc[metric].p.tolist() == [2 / 256] * 3
        assert frame.loc[metric].p_holm.tolist() == pytest.approx([6 * 2 / 256] * 3)
    for metric in ("accuracy", "kl_per_sequence"):
        assert frame.loc[metric].p.isna().all() and frame.loc[metric].p_holm.isna().all()
    assert lines(made, "effects")[0][5:] == ["−0.1300 to −0.1300", "0.0078", "0.047"]  # every seed has -0.13


def test_a_seed_counts_where_all_arms_of_a_difference_are_there():
    made = finished(but=[("disco-absent_beta-used", 2)])
    frame = csv(made, "effects").set_index("contrast")
    assert frame.n_seeds.tolist() == [1, 1, 1]
    assert frame.difference["Disco"] == pytest.approx(-0.08)  # of seed 1
    assert math.isnan(frame.ci95["Disco"])
    assert lines(made, "effects")[0][3:5] == ["1 of 2", "−0.0800 (−0.0800, –)"]
    assert "Missing: dpo: seed 2." in (made.directory / "tables" / "effects.md").read_text()
    pairs = csv(made, "comparisons").set_index("contrast")
    assert pairs.n_seeds[["Disco − baseline", "LeDPO − baseline"]].tolist() == [2, 1]


def test_arms_that_the_study_has_not_are_in_no_difference():
    made = finished(arms=["baseline", "disco-used_beta-used"], stages=["rm", "dpo"])
    assert csv(made, "effects").empty
    assert csv(made, "comparisons").contrast.tolist() == ["both − baseline"]
    assert "No two arms of this study" in (made.directory / "tables" / "effects.md").read_text()


def test_gains_are_compared_under_one_kind_of_judge():
    made = finished("ppo", "reward_gain")
    assert csv(made, "effects").empty
    assert csv(made, "comparisons").contrast.tolist() == ["LeDPO − baseline", "both − Disco"]


def test_what_rounding_leaves_of_equal_numbers_is_no_difference():
    """0.84 + 0.76 - 0.84 - 0.76 in another order is 1e-16 in both seeds, whose signs would have a p of 0.5."""
    made = finished(values={1: [0.84, 0.76, 0.84, 0.76], 2: [0.48, 0.58, 0.48, 0.58]})
    frame = csv(made, "effects").set_index("contrast")
    assert frame.difference[["LeDPO", "Disco × LeDPO"]].tolist() == [0, 0]
    assert frame.p[["LeDPO", "Disco × LeDPO"]].tolist() == [1, 1]


def test_proved_idle_arms_change_nothing():
    arms = [*ARMS, "disco-idle_beta-absent", "disco-idle_beta-used"]
    made = finished(arms=arms, idle_arms="prove")
    assert csv(made, "effects").difference.tolist() == pytest.approx([-0.085, -0.025, 0.01])


def test_interaction_figure_shows_seeds_means_and_the_sum():
    made = finished(stages=["dpo"])
    (axes,) = figures.interaction(results(made), "dpo").axes
    drawn = {tuple(round(float(y), 6) for y in line.get_ydata()) for line in axes.lines}
    # without Disco: LeDPO - baseline; with: Disco - baseline and both - baseline. Per seed, then the means.
    assert {(0, -0.04), (0, -0.02), (0, -0.03)} <= drawn
    assert {(-0.10, -0.10), (-0.08, -0.12), (-0.09, -0.11)} <= drawn
    assert (-0.12,) in drawn  # -0.09 - 0.03, if they added up
    assert axes.get_ylabel() == "NLL (nats per pair)\nminus the baseline's\n↓ better"


def test_an_interaction_of_which_nothing_is_there_says_missing():
    made = study(arms=ARMS, stages=["dpo"])
    (axes,) = figures.interaction(results(made), "dpo").axes
    assert "missing" in [text.get_text() for text in axes.texts]
