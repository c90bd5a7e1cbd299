"""Verdicts on planted numbers, from the files to the table; expected values are worked out beside them."""

import json
import math

import pandas as pd
import pytest
import yaml
from published_study import BASELINE, BOTH, DISCO, LEDPO, cell, sweep, write_study

from discobeta import cli
from discobeta.errors import UserError
from discobeta.report import error_rates, hypotheses
from discobeta.report.published import Source

PAIR = [{"weight": 1, "arm": DISCO}, {"weight": -1, "arm": BASELINE}]
ONE = {
    "id": "R1", "stage": "rm", "study": "both", "text": "Disco predicts better", "metric": "excess_kl",
    "contrast": PAIR, "direction": "less",
}  # fmt: skip
BASE = [0.05, 0.06, 0.04, 0.055, 0.045, 0.05]


def registered(tmp_path, *changes, **settings):
    path = tmp_path / "hypotheses.yaml"
    path.write_text(yaml.safe_dump({"hypotheses": [ONE | change for change in changes or ({},)], **settings}))
    return hypotheses.read(path)


def judged(tmp_path, *changes, **settings):
    found = hypotheses.judge(registered(tmp_path, *changes, **settings), hypotheses.from_folder(tmp_path / "world"))
    return found[0] if len(found) == 1 else found


def planted(tmp_path, differences, *, name="both", stage="rm", metric="excess_kl", seeds=None, **settings):
    """A baseline and Disco, which differs from it by these."""
    base = (BASE * 4)[: len(differences)]
    rows = cell(stage, BASELINE, metric, base)
    rows += cell(stage, DISCO, metric, [value + d for value, d in zip(base, differences, strict=True)])
    return write_study(tmp_path / "world", name, rows, seeds or range(1, len(base) + 1), **settings)


# --- verdicts


def test_seeds_that_agree_support_the_claim(tmp_path):
    """Six that agree: p = 1/64, in a family of one. t(.975, 5) = 2.5706; sd of .01 .02 .03 .01 .02 .03 is .0089443."""
    planted(tmp_path, [-0.01, -0.02, -0.03, -0.01, -0.02, -0.03])
    verdict = judged(tmp_path)
    assert (verdict.verdict, verdict.n) == ("supported", 6)
    assert verdict.difference == pytest.approx(-0.02)
    assert verdict.sd == pytest.approx(0.0089443, abs=1e-7)
    assert verdict.ci95 == pytest.approx(2.5706 * 0.0089443 / math.sqrt(6), abs=1e-6)
    assert (verdict.p, verdict.p_holm) == (1 / 64, 1 / 64)
    assert verdict.p_against == 1


def test_seeds_that_agree_on_the_other_side_contradict_it(tmp_path):
    planted(tmp_path, [0.01, 0.02, 0.03, 0.01, 0.02, 0.03])
    verdict = judged(tmp_path)
    assert (verdict.verdict, verdict.p_against, verdict.p) == ("contradicted", 1 / 64, 1)
    assert judged(tmp_path, {"direction": "greater"}).verdict == "supported"


def test_seeds_that_disagree_leave_it_undecided(tmp_path):
    planted(tmp_path, [0.01, -0.02, 0.03, -0.01, 0.02, -0.03])
    verdict = judged(tmp_path)
    assert verdict.verdict == "undecided" and verdict.difference == pytest.approx(0)
    assert judged(tmp_path, {"direction": "different"}).verdict == "undecided"


def test_a_claim_without_direction_has_a_two_sided_p(tmp_path):
    planted(tmp_path, [0.01, 0.02, 0.03, 0.01, 0.02, 0.03])
    verdict = judged(tmp_path, {"direction": "different"})
    assert (verdict.verdict, verdict.p) == ("supported", 2 / 64)
    assert math.isnan(verdict.p_against)


@pytest.mark.parametrize(
    ("differences", "verdict", "p"),
    [
        ([0.001, -0.001, 0.002, 0.0, -0.002, 0.001], "equivalent", 1 / 64),
        ([0.01, 0.02, 0.01, 0.03, 0.01, 0.02], "contradicted", 1),  # all beyond +.003: 1/64, doubled
        ([-0.01, -0.02, -0.01, -0.03, -0.01, -0.02], "contradicted", 1),
        ([0.01, -0.02, 0.01, -0.01, 0.01, 0.0], "undecided", None),
    ],
)
def test_equivalence_is_within_the_margin(differences, verdict, p, tmp_path):
    planted(tmp_path, differences)
    found = judged(tmp_path, {"direction": "equivalent", "margin": 0.003})
    assert found.verdict == verdict
    if p is not None:
        assert found.p == pytest.approx(p)
    if verdict == "contradicted":
        assert found.p_against == 2 / 64


def test_the_difference_may_weigh_several_arms_and_metrics(tmp_path):
    """Both − Disco − LeDPO + post-hoc: .4 - .2 - .1 + .05 in every seed."""
    rows = []
    for arm, metric, value in ((BOTH, "excess_kl", 0.4), (DISCO, "excess_kl", 0.2), (LEDPO, "excess_kl", 0.1)):
        rows += cell("dpo", arm, metric, [value] * 6)
    rows += cell("dpo", BASELINE, "posthoc/sigma/excess_kl", [0.05] * 6, variant="probit")
    write_study(tmp_path / "world", "both", rows, range(1, 7))
    contrast = [{"weight": 1, "arm": BOTH}, {"weight": -1, "arm": DISCO}, {"weight": -1, "arm": LEDPO}]
    contrast += [{"weight": 1, "arm": BASELINE, "variant": "probit", "metric": "posthoc/sigma/excess_kl"}]
    verdict = judged(tmp_path, {"stage": "dpo", "contrast": contrast, "direction": "greater"})
    assert verdict.found.values == {seed: pytest.approx(0.15) for seed in range(1, 7)}
    assert hypotheses.contrast_text(verdict.hypothesis) == (
        f"{BOTH} − {DISCO} − {LEDPO} + {BASELINE}, probit (posthoc/sigma/excess_kl)"
    )


def test_what_rounding_leaves_of_equal_numbers_is_no_difference(tmp_path):
    """.1 + .2 - .3 is 5e-17 in all seeds, which would agree."""
    rows = []
    for arm, value in ((BASELINE, 0.1), (LEDPO, 0.2), (DISCO, 0.3), (BOTH, 0.0)):
        rows += cell("dpo", arm, "excess_kl", [value] * 6)
    write_study(tmp_path / "world", "both", rows, range(1, 7))
    weights = {BASELINE: 1, LEDPO: 1, DISCO: -1, BOTH: -1}
    contrast = [{"weight": weight, "arm": arm} for arm, weight in weights.items()]
    verdict = judged(tmp_path, {"stage": "dpo", "contrast": contrast, "direction": "greater"})
    assert set(verdict.found.values.values()) == {0.0} and verdict.verdict == "undecided"


# --- corrections


AGREEING = [-0.01] * 8  # p = 1/256
ONE_TURNED = [0.001, *[-0.01] * 7]  # its sum, or that with the least one turned: 2/256
TWO_TURNED = [0.001, 0.002, *[-0.01] * 6]  # 4/256, of .001 and .002 as they are, either, or both turned


def test_holm_corrects_over_all_that_is_registered_of_a_stage(tmp_path):
    """Of four: 4·1/256, 3·2/256, 2·4/256 = 8/256, and the last, whose study is not there, at p = 1."""
    for name, differences in (("a", AGREEING), ("b", TWO_TURNED), ("c", ONE_TURNED)):
        planted(tmp_path, differences, name=name)
    changes = [{"id": f"R{name}", "study": name} for name in ("a", "b", "c", "absent")]
    planted(tmp_path, AGREEING, name="d", stage="dpo")
    found = judged(tmp_path, *changes, {"id": "D1", "study": "d", "stage": "dpo"})
    assert [verdict.p for verdict in found[:3]] == [1 / 256, 4 / 256, 2 / 256]
    assert [verdict.p_holm for verdict in found[:3]] == pytest.approx([4 / 256, 8 / 256, 6 / 256])
    assert math.isnan(found[3].p_holm) and found[3].verdict == "undecidable"
    assert found[4].p_holm == 1 / 256  # of another stage
    without = judged(tmp_path, *changes[:3])
    assert [verdict.p_holm for verdict in without] == pytest.approx([3 / 256, 4 / 256, 4 / 256])


def test_a_p_below_alpha_supports_nothing_that_holm_does_not(tmp_path):
    """1/64 · 4 = .0625 of six seeds in a family of four."""
    planted(tmp_path, [-0.01] * 6)
    absent = [{"id": f"R{i}", "study": "absent"} for i in (2, 3, 4)]
    found = judged(tmp_path, {}, *absent)
    assert found[0].p < 0.05 < found[0].p_holm == 4 / 64
    assert found[0].verdict == "undecided"


def test_what_could_be_found_is_in_units_of_the_seeds_spread(tmp_path):
    """Ten times the differences, ten times the detectable one; a family of two: alpha / 2 = 1/64 + .009, so all six
    must agree: Φ(δ)^6 = .8, δ = 1.794 standard deviations."""
    planted(tmp_path, [-0.01, -0.02, -0.03, -0.01, -0.02, -0.03])
    planted(tmp_path, [-0.1, -0.2, -0.3, -0.1, -0.2, -0.3], name="large")
    small, large = judged(tmp_path, {}, {"id": "R2", "study": "large"})
    assert small.detectable == pytest.approx(1.794 * 0.0089443, rel=0.03)
    assert large.detectable == pytest.approx(10 * small.detectable)


# --- what cannot be decided


def test_what_is_not_there_is_undecidable_and_says_why(tmp_path):
    planted(tmp_path, [-0.01] * 6)
    assert judged(tmp_path, {"study": "homoscedastic"}).why == "homoscedastic is not there"
    absent = [{"weight": 1, "arm": DISCO}, {"weight": -1, "arm": BASELINE, "variant": "probit"}]
    assert judged(tmp_path, {"contrast": absent}).why == "both has no excess_kl of baseline, probit"
    verdict = judged(tmp_path, {"metric": "brier"})
    assert verdict.why.startswith("both has no brier") and verdict.verdict == "undecidable"


def test_nothing_is_judged_before_all_seeds_are_there(tmp_path):
    """Else one could look until it is significant. The numbers that are there are shown."""
    planted(tmp_path, [-0.01] * 7, seeds=range(1, 9))
    verdict = judged(tmp_path)
    assert verdict.why.startswith("not complete: seed 8") and verdict.verdict == "undecidable"
    assert verdict.n == 7 and math.isnan(verdict.p)


def test_too_few_seeds_are_undecidable(tmp_path):
    planted(tmp_path, [-0.01] * 5)
    assert judged(tmp_path).why == "5 seeds can be compared, fewer than 6"
    assert judged(tmp_path, least_seeds=5).verdict == "supported"  # 1/32


def test_seeds_that_cannot_reach_alpha_are_undecidable_for_that_reason(tmp_path):
    """Of six seeds that all agree p is 1/64 = .0156."""
    planted(tmp_path, [-0.01] * 6)
    assert judged(tmp_path, alpha=0.01).why == "6 seeds can be compared, whose p is never below 0.016"


# --- at matched KL

MATCHED = {
    "id": "P1", "stage": "ppo", "metric": None, "matched": {"value": "true_reward", "over": "kl_rao_blackwell"},
    "direction": "greater",
}  # fmt: skip


COLLAPSED = {"pref_beta=0.1": (3.0, 9.0, 0.2), "": (2.0, 9.0, 0.89)}


def frontiers(tmp_path, seeds=6, baseline_of_seed_one=None):
    """reward = KL for the baseline, and a tenth of the seed more for Disco, at other KLs."""
    rows = []
    for seed in range(1, seeds + 1):
        for arm, kls, more in ((BASELINE, (1.0, 2.0, 3.0), 0.0), (DISCO, (1.5, 2.6, 3.5), seed / 10)):
            points = {
                name: (kl, kl + more) for name, kl in zip(("pref_beta=0.3", "", "pref_beta=0.1"), kls, strict=True)
            }
            if arm == BASELINE and seed == 1:
                points |= baseline_of_seed_one or {}
            rows += sweep("ppo", arm, points, seed)
    write_study(tmp_path / "world", "both", rows, range(1, seeds + 1), ppo={"pref_beta": 0.2})


def test_policies_are_compared_at_matched_kl(tmp_path):
    """The mean of .1, .2, … .6; at equal coefficients the difference would be half a nat more."""
    frontiers(tmp_path)
    verdict = judged(tmp_path, MATCHED)
    assert verdict.found.values == {seed: pytest.approx(seed / 10) for seed in range(1, 7)}
    assert (verdict.verdict, verdict.p) == ("supported", 1 / 64)
    assert verdict.hypothesis.words == "True reward at matched KL"


def test_a_seed_without_a_common_range_is_named_and_not_compared(tmp_path):
    """Of seven, seed 1's baseline has collapsed but for one point; six are left."""
    frontiers(tmp_path, 7, COLLAPSED)
    verdict = judged(tmp_path, MATCHED)
    assert sorted(verdict.found.values) == [2, 3, 4, 5, 6, 7] and verdict.verdict == "supported"
    assert verdict.found.remarks[0] == "not compared: seed 1: baseline has 1 of 3 points left"
    assert "baseline, pref_beta=0.2: seed 1 (0.890)" in verdict.found.remarks[1]
    frontiers(tmp_path / "six", 6, COLLAPSED)
    verdict = judged(tmp_path / "six", MATCHED)
    assert verdict.verdict == "undecidable"
    assert verdict.why == "5 seeds can be compared, fewer than 6 (seed 1: baseline has 1 of 3 points left)"


def test_a_point_that_has_not_been_run_is_no_collapse(tmp_path):
    frontiers(tmp_path)
    path = tmp_path / "world" / "both" / "metrics.csv"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"ppo,{BASELINE},pref_beta=0.1,4,")]
    path.write_text("\n".join([*lines, ""]))
    assert judged(tmp_path, MATCHED).why == "not complete: seed 4 (no baseline, pref_beta=0.1)"


def test_a_point_of_which_nobody_knows_whether_it_has_collapsed_is_missing(tmp_path):
    frontiers(tmp_path)
    path = tmp_path / "world" / "both" / "metrics.csv"
    without = [line for line in path.read_text().splitlines() if f"{DISCO},pref_beta=0.1,3,well_formed" not in line]
    path.write_text("\n".join([*without, ""]))
    assert judged(tmp_path, MATCHED).why == f"not complete: seed 3 (no well_formed of {DISCO}, pref_beta=0.1)"


def test_points_of_one_kl_are_no_line(tmp_path):
    alike = {"pref_beta=0.3": (1.0, 1.0), "": (1.0, 2.0), "pref_beta=0.1": (1.0, 3.0)}
    frontiers(tmp_path, 7, alike)
    remarks = judged(tmp_path, MATCHED).found.remarks
    assert remarks[0] == "not compared: seed 1: baseline has 3 of 3 points left, all of one KL"


def test_a_point_that_no_seed_has_is_missing_where_the_study_asks_for_it(tmp_path):
    """Of an arm that is swept, and of a control; what `arms:` leaves out is not asked for."""
    frontiers(tmp_path)
    config = tmp_path / "world" / "both" / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    of_ppo = {"pref_beta": [0.1, 0.15, 0.3]}
    config.write_text(yaml.safe_dump(settings | {"sweep": {"ppo": of_ppo}}))
    verdict = judged(tmp_path, MATCHED)
    assert verdict.verdict == "undecidable"
    assert verdict.why.startswith(f"not complete: seed 1 (no {DISCO}, pref_beta=0.15)")
    config.write_text(yaml.safe_dump(settings | {"sweep": {"ppo": of_ppo | {"arms": [BASELINE]}}}))
    hypotheses.published._read_one.cache_clear()
    assert judged(tmp_path, MATCHED).why.startswith("not complete: seed 1 (no baseline, pref_beta=0.15)")


def test_a_study_without_a_sweep_says_what_is_not_there(tmp_path):
    planted(tmp_path, [0.0] * 6, stage="ppo", metric="true_reward")
    assert judged(tmp_path, MATCHED).why == (f"both has no true_reward over kl_rao_blackwell of {DISCO}, baseline")


# --- the file


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"direction": "lesser"}, "hypotheses: R1: direction: 'lesser': input should be 'less', 'greater'"),
        ({"stage": "kto"}, "hypotheses: R1: stage: 'kto'"),
        ({"metrik": "nll"}, "hypotheses: R1: unknown key 'metrik'; did you mean 'metric'?"),
        ({"metric": None}, "hypotheses: R1: say either metric, or matched with value and over"),
        ({"matched": {"value": "a", "over": "b"}}, "hypotheses: R1: say either metric, or matched"),
        ({"margin": 0.1}, "hypotheses: R1: a margin belongs to direction: equivalent"),
        ({"direction": "equivalent"}, "hypotheses: R1: a margin belongs to direction: equivalent"),
        ({"direction": "equivalent", "margin": -1}, "hypotheses: R1: margin: -1"),
        ({"contrast": PAIR[:1]}, "hypotheses: R1: contrast: "),
        ({"contrast": [PAIR[0], PAIR[0]]}, "hypotheses: R1: contrast: the weights should add up to 0"),
        ({"contrast": [PAIR[0], PAIR[0] | {"weight": -1}]}, "R1: contrast: the same run stands there twice"),
        (
            {"contrast": [PAIR[0] | {"metric": "excess_kl"}, PAIR[0] | {"weight": -1}]},  # the hypothesis's own
            "R1: contrast: the same run stands there twice",
        ),
        ({"contrast": [PAIR[0], {"weight": -1, "arm": "base"}]}, "contrast[2]: arm: no arm is called 'base'"),
        ({"contrast": [PAIR[0], {"weight": -1, "arm": LEDPO}]}, f"rm trains no {LEDPO}: it is baseline there"),
        ({"study": "../secret"}, "hypotheses: R1: study should be the name of a folder"),
        ({"id": "R 1"}, "hypotheses: R 1: id: 'R 1'"),
        (MATCHED | {"matched": {"value": "a", "over": "b", "vary": "pref_bet"}}, "vary: 'pref_bet' is no key of a run"),
        (MATCHED | {"contrast": [PAIR[0] | {"metric": "x"}, PAIR[1]]}, "metric may not stand here"),
    ],
)  # fmt: skip
def test_a_hypothesis_that_says_nothing_testable_is_refused(change, says, tmp_path):
    with pytest.raises(UserError) as error:
        registered(tmp_path, change)
    assert says in str(error.value) and str(error.value).startswith(str(tmp_path))
    assert len(str(error.value).splitlines()) == 1


def test_a_file_of_hypotheses_is_refused_as_a_whole_where_it_is_none(tmp_path):
    for text, says in (
        ("hypotheses: []", "hypotheses: []"),
        ("alpha: 0.7\nhypotheses: [1]", "alpha: 0.7"),
        ("alpha: 0.05", "hypotheses is missing"),
        ("hypotheses: 3", "hypotheses: 3"),
    ):
        (tmp_path / "h.yaml").write_text(text)
        with pytest.raises(UserError, match="h.yaml") as error:
            hypotheses.read(tmp_path / "h.yaml")
        assert says in str(error.value)
    with pytest.raises(UserError, match="R1 stands there twice"):
        registered(tmp_path, {}, {})


def test_the_shipped_hypotheses_are_those_of_the_study():
    from pathlib import Path

    shipped = hypotheses.read(Path(__file__).parent.parent / "config" / "hypotheses.yaml")
    ids = [hypothesis.id for hypothesis in shipped.hypotheses]
    assert ids == ["R1", "R2", "R3", "R4", "D1", "D2a", "D2b", "D3a", "D3b", "D4", "P1", "P2", "P3"]
    margins = {hypothesis.id: hypothesis.margin for hypothesis in shipped.hypotheses if hypothesis.margin}
    assert margins == {"R3": 0.003, "D4": 0.05}


# --- the command


def test_the_command_prints_a_table_or_json_and_writes_files(tmp_path, capsys):
    planted(tmp_path, [-0.01, -0.02, -0.03, -0.01, -0.02, -0.03])
    registered(tmp_path, {}, {"id": "R2", "study": "absent", "text": "a | b"})
    words = ["verdicts", "--hypotheses", str(tmp_path / "hypotheses.yaml"), "--results", str(tmp_path / "world")]
    assert cli.main([*words, "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith(("| R1", "| R2"))]
    verdict, _, numbers = ([entry.strip() for entry in row.strip("|").split("|")] for row in rows)
    assert verdict == ["R1", "rm", "Disco predicts better", "&lt; 0", "supported"]
    assert numbers[:4] == ["R1", "KL(truth ‖ model)", "6", "−0.0200 ± 0.0094"]
    assert numbers[5:] == ["0.016", "0.031", "1.000"]
    frame = pd.read_csv(tmp_path / "out" / "verdicts.csv").set_index("id")
    assert frame.loc["R1", ["seed-1", "seed-6"]].tolist() == pytest.approx([-0.01, -0.03])
    assert frame.loc["R2"].filter(like="seed-").isna().all()
    assert "R2: undecidable: absent is not there." in text
    assert {path.name for path in (tmp_path / "out").iterdir()} > {"verdicts.csv", "verdicts.md", "verdicts.tex"}
    assert cli.main([*words, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["verdict"], first["p"], second["p"], second["why"]) == (
        "supported",
        1 / 64,
        None,
        "absent is not there",
    )
    assert first["differences"]["3"] == pytest.approx(-0.03)
    assert cli.main([*words[:3], "--results", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err


# --- error rates


def test_the_pipeline_errs_as_often_as_it_says(tmp_path):
    """Families of three with nothing to find, among them an equivalence at its margin and one at matched KL."""
    changes = [
        {"stage": "dpo", "id": "D1"},
        MATCHED | {"stage": "dpo", "id": "D2"},
        {"stage": "dpo", "id": "D3", "direction": "equivalent", "margin": 0.01},
    ]
    times = 300
    frame = error_rates.simulate(registered(tmp_path, *changes), times, 8, error_rates.NOISES["normal"])
    frame = frame.set_index("id")
    error = 3 * math.sqrt(0.05 * 0.95 / times)
    for name in ("D1", "D2", "D3"):
        assert abs(frame.below_alpha[name] / times - 12 / 256) < error  # 12 of 256 choices of signs are below .05
    assert 0 < frame.supported["any"] / times < 0.05 + error
    assert 0 < frame.contradicted["any"] / times < 0.05 + error


def test_studies_of_which_nothing_is_judged_have_no_error_rates(tmp_path):
    """A row of zeros would read as a pipeline that never errs."""
    with pytest.raises(UserError, match="--simulate: nothing is judged of 8 seeds: 8 seeds can be compared, fewer th"):
        error_rates.simulate(registered(tmp_path, least_seeds=9), 3, 8, error_rates.NOISES["normal"])


def test_a_planted_null_is_none_where_it_should_not_be(tmp_path):
    """The equivalence's numbers lie at the margin, those of the others at zero: means over 4,000 seeds."""
    import numpy as np

    made = registered(tmp_path, {}, {"id": "R2", "direction": "equivalent", "margin": 0.5})
    for hypothesis, mean in zip(made.hypotheses, (0, 0.5), strict=True):
        rng = np.random.default_rng(0)
        study = error_rates.planted([hypothesis], list(range(4000)), rng, error_rates.NOISES["normal"])
        values = [study.values("rm", Source(arm), "excess_kl") for arm in (DISCO, BASELINE)]
        found = np.mean([values[0][seed] - values[1][seed] for seed in range(4000)])
        assert found == pytest.approx(mean, abs=4 * error_rates.SPREAD * math.sqrt(2 / 4000))
