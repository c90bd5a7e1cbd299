"""Matched KL against integrals that are worked out by hand."""

import numpy as np
import pytest
import yaml
from published_study import BASELINE, DISCO, sweep, write_study

from discobeta.errors import UserError
from discobeta.report import frontier, hypotheses, published
from discobeta.report.frontier import Point
from discobeta.report.published import Source

A, B = Source(DISCO), Source(BASELINE)
DIFFERENCE = {A: 1.0, B: -1.0}

RISING = [(0.0, 0.0), (2.0, 2.0), (4.0, 3.0)]
STRAIGHT = [(1.0, 0.0), (3.0, 1.0)]
"""In common they have KL 1 to 3. There RISING is 1, 2 (at 2), 2.5, with the integral 1.5 + 2.25; STRAIGHT's is 1:
the mean difference is 2.75 / 2."""


def line(points, well_formed=1.0):
    """The larger the KL the smaller the coefficient, as it should be."""
    return [Point(kl, value, f"b={-kl}", -kl, well_formed) for kl, value in points]


def of_one_seed(a, b):
    return frontier.matched(DIFFERENCE, {A: {1: a}, B: {1: b}})


def test_the_difference_is_the_mean_over_the_common_range_of_kl():
    result = of_one_seed(line(RISING), line(STRAIGHT))
    assert result.differences == {1: pytest.approx(1.375, abs=1e-12)}
    assert result.ranges == {1: (1.0, 3.0)}
    assert not result.undecidable


def test_equal_lines_that_are_measured_at_other_places_do_not_differ():
    """Both are 2·KL + 1; unequal rewards at the points, because the KL is unequal."""
    a, b = ([(kl, 2 * kl + 1) for kl in kls] for kls in ([0.3, 1.1, 2.9], [0.1, 0.9, 2.2, 3.4]))
    assert of_one_seed(line(a), line(b)).differences[1] == pytest.approx(0, abs=1e-12)


def test_what_rounding_leaves_of_equal_lines_is_no_difference():
    """The line through 0.1 and 1.3 meets the points between its ends but for their last bits."""
    ends, more = [(0.0, 0.1), (3.0, 1.3)], [(0.0, 0.1), (0.7, 0.1 + 0.7 * 0.4), (1.9, 0.1 + 1.9 * 0.4), (3.0, 1.3)]
    assert of_one_seed(line(ends), line(more)).differences == {1: 0.0}


@pytest.mark.parametrize("far", [100.0, -100.0])
def test_nothing_beyond_the_common_range_is_used(far):
    """Points that are next to no part of the range may be anything."""
    a = line([(-5.0, far), *RISING, (6.0, far)])
    b = line([*STRAIGHT, (3.0 + 1e-12, 1.0)])
    assert of_one_seed(a, b).differences[1] == pytest.approx(1.375, abs=1e-9)


def test_no_seed_is_decided_without_a_common_range():
    low, high = line([(0.0, 1.0), (1.0, 2.0)]), line([(1.0, 5.0), (2.0, 6.0)])
    result = of_one_seed(low, high)
    assert not result.differences and not result.ranges
    assert result.undecidable == {1: "no common range of KL (one begins at 1, another ends at 1)"}
    single = of_one_seed(line(RISING), line(STRAIGHT[:1]))
    assert single.undecidable == {1: "baseline has 1 of 1 points left"}
    absent = frontier.matched(DIFFERENCE, {A: {1: line(RISING)}, B: {2: line(STRAIGHT)}})
    assert absent.undecidable == {
        1: "baseline has 0 of 0 points left",
        2: f"{DISCO} has 0 of 0 points left",
    }


def test_collapsed_points_are_dropped_and_named():
    """Without the drop the point at 3.5 would be in the range, which ends at 4 then; .9 itself is kept."""
    collapsed = [*line(STRAIGHT, 0.9), Point(3.5, 9.0, "b=-3.5", -3.5, 0.8999)]
    found = {A: {1: line(RISING)}, B: {1: collapsed}}
    result = frontier.matched(DIFFERENCE, found)
    assert result.differences == {1: pytest.approx(1.375, abs=1e-12)}
    assert frontier.remarks(found) == ("baseline, b=-3.5: seed 1 (0.900)", "")


def test_points_are_joined_in_the_order_of_their_kl_and_that_is_said():
    """The coefficients of the two outer points are turned round."""
    turned = [Point(0.0, 0.0, "b=1", 1.0), Point(2.0, 2.0, "b=3", 3.0), Point(4.0, 3.0, "b=0.1", 0.1)]
    found = {A: {1: turned, 2: line(RISING)}, B: {1: line(STRAIGHT), 2: line(STRAIGHT)}}
    assert frontier.matched(DIFFERENCE, found).differences[1] == pytest.approx(1.375, abs=1e-12)
    assert frontier.remarks(found) == ("", f"{DISCO}: seed 1")


def test_points_of_equal_kl_count_as_their_mean():
    twice = [(0.0, 0.0), (2.0, 1.0), (2.0, 3.0), (4.0, 3.0)]
    assert of_one_seed(line(twice), line(STRAIGHT)).differences[1] == pytest.approx(1.375, abs=1e-12)


def test_any_weights_are_averaged_over_what_all_arms_have():
    """f = KL, 2·KL and 5 over 1 to 2: f1 + f2 - 2·f3 has the mean 1.5 + 3 - 10."""
    c = Source(BASELINE, "probit")
    found = {
        A: {1: line([(0.0, 0.0), (2.0, 2.0)])},
        B: {1: line([(1.0, 2.0), (3.0, 6.0)])},
        c: {1: line([(0.5, 5.0), (9.0, 5.0)])},
    }
    result = frontier.matched({A: 1.0, B: 1.0, c: -2.0}, found)
    assert result.differences[1] == pytest.approx(-5.5) and result.ranges[1] == (1.0, 2.0)


def test_the_integral_is_that_of_small_steps():
    """Midpoint rule on 200,000 steps, interpolated with a formula of our own here."""
    rng = np.random.default_rng(3)

    def at(x, points):
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            inside = (x >= x0) & (x <= x1)
            yield inside, y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    for _ in range(5):
        a, b = (sorted(zip(rng.uniform(0, 3, 5), rng.normal(size=5), strict=True)) for _ in range(2))
        low, high = max(a[0][0], b[0][0]), min(a[-1][0], b[-1][0])
        middle = low + (np.arange(200_000) + 0.5) * (high - low) / 200_000
        of_a, of_b = (np.select(*zip(*at(middle, points), strict=True)) for points in (a, b))
        result = of_one_seed(line(a), line(b))
        assert result.differences[1] == pytest.approx((of_a - of_b).mean(), abs=1e-6)


# --- from committed numbers


def test_points_are_the_grids_own_run_and_its_sweep(tmp_path):
    rows = sweep("dpo", BASELINE, {"": (1.0, 0.5), "pref_beta=0.35": (2.0, 0.8), "learning_rate=0.1": (9.0, 9.0)})
    rows += sweep("dpo", BASELINE, {"": (1.5, 0.6), "pref_beta=0.35": (2.5, 0.9, 0.5)}, control="probit")
    controls = {"probit": {"stages": ["dpo"], "settings": {"pref_loss": "probit"}}}
    write_study(tmp_path, "both", rows, [1], dpo={"pref_beta": 0.5}, controls=controls)
    study = published.read(tmp_path, "both")
    asked = {"value": "true_reward", "kl": "kl_rao_blackwell"}
    assert list(published.swept(study, "dpo")) == [Source(BASELINE), Source(BASELINE, "probit")]
    (own, other) = frontier.points(study, "dpo", Source(BASELINE), **asked)[1]
    assert (own.kl, own.value, own.setting, own.label) == (1.0, 0.5, 0.5, "pref_beta=0.5")
    assert (other.kl, other.value, other.setting, other.label) == (2.0, 0.8, 0.35, "pref_beta=0.35")
    (own, other) = frontier.points(study, "dpo", Source(BASELINE, "probit"), **asked)[1]
    assert (own.kl, own.has_collapsed, other.kl, other.has_collapsed) == (1.5, False, 2.5, True)


def test_a_point_with_the_settings_own_value_of_another_swept_key_is_on_the_arms_line(tmp_path):
    """As config/quick-exp.yaml has it: the grid's own run is the point of both own values."""
    points = {"": (1.0, 0.5), "learning_rate=0.1": (1.1, 0.6)}
    points |= {f"pref_beta=0.3,learning_rate={rate}": (2.0, 0.7 + rate) for rate in (0.001, 0.1)}
    points |= {f"pref_beta=0.3,lora_alpha={alpha}": (3.0, 0.9) for alpha in ("null", 8)}
    write_study(tmp_path, "s", sweep("dpo", BASELINE, points), [1], dpo={"pref_beta": 0.5, "learning_rate": 1e-3})
    study = published.read(tmp_path, "s")
    asked = {"value": "true_reward", "kl": "kl_rao_blackwell"}
    of = {source.variant: frontier.points(study, "dpo", source, **asked)[1] for source in published.along(study, "dpo")}
    assert {name: [(point.kl, point.setting) for point in points] for name, points in of.items()} == {
        "": [(1.0, 0.5), (2.0, 0.3), (3.0, 0.3)],
        "learning_rate=0.1": [(1.1, 0.5), (2.0, 0.3)],
        "lora_alpha=8": [(3.0, 0.3)],
    }
    assert list(published.swept(study, "dpo")) == [Source(BASELINE), Source(BASELINE, "learning_rate=0.1")]


def test_a_sweep_over_what_is_no_number_is_named(tmp_path):
    write_study(tmp_path, "s", sweep("dpo", BASELINE, {"": (1.0, 0.5), "pref_beta=abc": (2.0, 0.7)}), [1])
    with pytest.raises(UserError, match="^s: dpo, baseline, pref_beta=abc: a sweep over pref_beta should be over numb"):
        published.read(tmp_path, "s")


def test_the_tuned_coefficient_is_chosen_on_calibration_pairs_alone(tmp_path):
    """Seed 1: calibration chooses 0.35, held-out pairs would choose 0.5. Seed 2 lacks a point of the sweep."""
    numbers = {
        1: {"": (0.50, 0.05), "pref_beta=0.35": (0.40, 0.07), "pref_beta=0.8": (0.45, 0.06)},
        2: {"": (0.50, 0.05), "pref_beta=0.35": (0.60, 0.07)},
        3: {"": (0.50, 0.051), "pref_beta=0.35": (0.60, 0.07), "pref_beta=0.8": (0.70, 0.01)},
    }
    rows = [
        ("dpo", BASELINE, variant, seed, metric, value)
        for seed, points in numbers.items()
        for variant, pair in points.items()
        for metric, value in zip(("calibration/nll", "excess_kl"), pair, strict=True)
    ]
    write_study(tmp_path, "both", rows, [1, 2, 3], common={"pref_beta": 0.5})
    study = published.read(tmp_path, "both")
    tuned = Source(BASELINE, "tuned-beta")
    assert study.values("dpo", tuned, "excess_kl") == {1: 0.07, 3: 0.051}
    assert study.values("dpo", tuned, "tuned/pref_beta") == {1: 0.35, 3: 0.5}


# --- the files


def test_numbers_from_before_there_were_variants_are_the_grids(tmp_path):
    place = write_study(tmp_path, "old", [("rm", BASELINE, "", 1, "nll", 0.5)], [1])
    (place / "metrics.csv").write_text(f"stage,arm,seed,metric,value\nrm,{BASELINE},1,nll,0.5\n")
    assert published.read(tmp_path, "old").values("rm", Source(BASELINE), "nll") == {1: 0.5}


def test_parts_of_a_study_are_put_together_unless_they_hold_the_same_run(tmp_path):
    for name, seeds in (("a", [1, 2]), ("b", [3]), ("c", [2])):
        write_study(tmp_path, name, [("rm", BASELINE, "", seed, "nll", seed / 10) for seed in seeds], seeds)
    study = published.read(tmp_path, ["a", "b"])
    assert study.values("rm", Source(BASELINE), "nll") == {1: 0.1, 2: 0.2, 3: 0.3} and study.seeds == [1, 2, 3]
    with pytest.raises(UserError, match=f"a and c both hold rm, {BASELINE}, 2, nll"):
        published.read(tmp_path, ["a", "c"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seeds": 3}, "seeds: 3 should be a list"),
        ({"seeds": []}, r"seeds: \[\] should be a list"),
        ({"seeds": [1, 2, 1]}, r"seeds: \[1, 2, 1\] names a seed twice"),
        ({"seeds": [2, 3]}, r"metrics.csv holds seed 1, which .*config.yaml does not name"),
        ({"dpo": [1]}, "dpo should hold `key: value`"),
        ({"controls": {"probit": 3}}, "controls: probit should hold `key: value` lines, not 3"),
        ({"controls": {"x": {"settings": [1]}}}, r"controls: x: settings should hold `key: value` lines, not \[1\]"),
        ({"controls": {"x": {"label": 5}}}, "controls: x: label: 5 should be text"),
        ({"sweep": {"dpo": 3}}, "sweep: dpo should hold `key: value` lines, not 3"),
        ({"sweep": {"dpo": {"pref_beta": 0.1}}}, "sweep: dpo: pref_beta: 0.1 should be a list of values"),
    ],
)
def test_a_config_of_another_form_is_refused_in_a_line(settings, says, tmp_path):
    place = write_study(tmp_path, "x", [("rm", BASELINE, "", 1, "nll", 0.5)], [1])
    (place / "config.yaml").write_text(yaml.safe_dump({"study": "x", "seeds": [1], **settings}))
    with pytest.raises(UserError, match=says):
        published.read(tmp_path, "x")


def test_a_config_that_names_no_seeds_has_those_of_a_study_that_names_none(tmp_path):
    """1 and 2, and not those that have come so far: then any study would be complete."""
    place = write_study(tmp_path, "x", [("rm", BASELINE, "", 2, "nll", 0.5)], [1])
    (place / "config.yaml").write_text("study: x\n")
    assert published.read(tmp_path, "x").seeds == [1, 2]


def test_a_study_is_no_folder_of_studies(tmp_path):
    place = write_study(tmp_path, "x", [("rm", BASELINE, "", 1, "nll", 0.5)], [1])
    for read in (published.studies, hypotheses.from_folder):
        with pytest.raises(UserError, match=f"{place} is a study itself: name the folder above it, {tmp_path}$"):
            read(place)
    assert published.studies(tmp_path) == ["x"]


HEADER = "stage,arm,variant,seed,metric,value\n"


def test_a_file_of_nothing_yet_is_a_study_without_numbers(tmp_path):
    """Of a study of which no run counts, `discobeta tables` writes the header."""
    place = write_study(tmp_path, "x", [], [1])
    (place / "metrics.csv").write_text(HEADER)
    study = published.read(tmp_path, "x")
    assert study.stages == [] and study.frame.value.dtype == float


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stage,arm,variant,seed,value\n", "has no column 'metric'"),
        (HEADER + "rm,baseline,,1,nll,0.5\nrm,baseline,,1,ece,much\n", "line 3: value: 'much' should be a finite num"),
        (HEADER + "rm,baseline,,1,nll,inf\n", "line 2: value: inf should be a finite number"),
        (HEADER + "rm,baseline,,1,nll,1e400\n", "line 2: value: inf should be a finite number"),
        (HEADER + "rm,baseline,,1,nll,nan\n", "line 2: value: .nan. should be a finite number"),
        (HEADER + "rm,baseline,,1,nll,0.5\nrm,baseline,,1,ec", "metrics.csv ends within a line: it is not whole"),
        (HEADER + "kto,baseline,,1,nll,1\n", "line 2: no stage is called 'kto'"),
        (HEADER + "rm,Disco,,1,nll,1\n", "line 2: no arm is called 'Disco'"),
        ("stage,arm,variant,seed,metric,value\nrm,baseline,,x,nll,1\n", "cannot read"),
        ("stage,arm,variant,seed,metric,value\n" + "rm,baseline,,1,nll,1\n" * 2, "holds a number twice"),
        ("", "cannot read"),
    ],
)
def test_numbers_that_cannot_be_read_are_refused_in_a_line(text, says, tmp_path):
    place = write_study(tmp_path, "x", [], [1])
    (place / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        published.read(tmp_path, "x")
    assert len(str(error.value).splitlines()) == 1
