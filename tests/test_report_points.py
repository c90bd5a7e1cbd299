"""Figures of points: effects, reward against KL, what heads say beside the truth; and what all figures share."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from report_study import finish, results, study

from discobeta.design.arms import CORNERS, Arm
from discobeta.report import forest, head_figures, marks, outputs, reward_kl, style
from discobeta.report.published import Published, Source

WORLD = {"data": {"world": {}}, "base": {"sft": {"model_type": "qwen3"}}}
CORNER_NAMES = ["baseline", "disco-absent_beta-used", "disco-used_beta-absent", "disco-used_beta-used"]
GENERATE = {"num_eval_generations": 8}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def below(figure) -> str:
    return " ".join(text.get_text() for text in figure.texts).replace("-\n", "-").replace("\n", " ")


# --- looks


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, between 0 (black) and 1 (white): what is left of a colour in grey (sRGB)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return math.fsum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_arms_are_told_apart_without_colour():
    looks = [style.look_of(arm) for arm in CORNERS]
    assert len({look.marker for look in style.LOOKS}) == len(style.LOOKS)
    assert len({str(look.line) for look in looks}) == len(looks)


def test_colours_of_the_arms_are_greys_that_differ():
    """CIE L* of the relative luminance (sRGB): of neighbours at least 12 apart, on white of a contrast above 2."""
    values = sorted(luminance(style.look_of(arm).colour) for arm in CORNERS)
    lightness = [116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y for y in values]
    assert min(np.diff(lightness)) >= 12
    assert 1.05 / (values[-1] + 0.05) > 2


@pytest.mark.parametrize(
    ("colour", "value"), [("#000000", 0), ("#ffffff", 1), ("#ff0000", 0.2126), ("#808080", 0.215861)]
)
def test_luminance_of_colours_by_hand(colour, value):
    """(128/255 + .055)/1.055 to the 2.4 is .215861."""
    assert luminance(colour) == pytest.approx(value, abs=1e-6)


def test_an_idle_arm_looks_like_the_arm_that_it_equals():
    assert style.look_of(Arm.from_name("disco-idle_beta-used")) == style.look_of(CORNERS[1])


def test_spans_of_seeds():
    assert style.spans_of([9, 1, 2, 3, 5, 6]) == "1-3, 5-6, 9"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nll", "NLL (nats per pair)\n↓ better"),
        ("true_reward", "True reward (r*)\n↑ better"),
        ("kl_rao_blackwell", "KL, Rao-Blackwell (nats per response)"),
    ],
)
def test_axes_say_unit_and_direction(name, words):
    assert style.axis_words(name) == words


# --- names at the ends of lines


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5], [0.4, 0.6]),  # both give way alike
        ([0.0, 0.0], [0.0, 0.2]),
        ([1.0, 1.0], [0.8, 1.0]),
    ],
)
def test_names_are_moved_apart_by_as_little_as_is_needed(wanted, places):
    assert marks.apart(wanted, 0.2) == pytest.approx(places)


def test_of_three_names_that_overlap_the_middle_one_stays():
    """Wanted less their gaps: .48, .3, .12, of mean .3."""
    assert marks.apart([0.48, 0.5, 0.52], 0.2) == pytest.approx([0.3, 0.5, 0.7])


def test_names_do_not_overlap_in_the_picture():
    figure = Figure(figsize=(3, 2), layout="constrained")
    axes = figure.subplots()
    ends = [(1.0, 0.5 + i / 1000, f"arm {i}", "#000000") for i in range(5)]
    axes.plot([0, 1], [0, 1])
    marks.name_ends(figure, {axes: ends})
    figure.draw_without_rendering()
    heights = sorted(text.get_position()[1] for text in axes.texts)
    points = axes.get_window_extent().height * 72 / figure.dpi
    assert min(np.diff(heights)) * points > 6.5  # the size of the letters
    assert max(heights) - min(heights) < 5 * 1.3 * 6.5 / points  # and no further than is needed


# --- seeds


@pytest.mark.parametrize(
    ("seeds", "lines", "words"),
    [
        ([1], True, "one seed"),
        ([2], False, "large: mean of 2 seeds; small dots: single seeds"),
        ([5, 4], True, "thick line: mean of 4 to 5 seeds; thin lines: single seeds"),
        ([6], True, "band: 95 % Student interval of the mean over 6 seeds"),
        ([12, 11], False, "bar: 95 % Student interval of the mean over 11 to 12 seeds; small dots: single seeds"),
        ([0], True, ""),
    ],
)
def test_what_is_drawn_of_seeds_is_said(seeds, lines, words):
    assert marks.interval_words(seeds, lines=lines) == words


def test_six_seeds_have_a_bar_and_five_have_none():
    """1 to 6: mean 3.5, sd 1.870829, t(.975, 5) = 2.570582, so 3.5 ± 1.963314."""
    axes = Figure().subplots()
    marks.seed_points(axes, 0, [1, 2, 3, 4, 5, 6], style.LOOKS[0])
    dots, bar, mean = axes.lines
    assert list(dots.get_ydata()) == [1, 2, 3, 4, 5, 6] and list(mean.get_ydata()) == [3.5]
    assert bar.get_ydata() == pytest.approx([3.5 - 1.963314, 3.5 + 1.963314])
    axes = Figure().subplots()
    marks.seed_points(axes, 0, [1, 2, 3, 4, 5], style.LOOKS[0])
    assert [len(line.get_ydata()) for line in axes.lines] == [5, 1]


# --- effects


def test_the_forest_has_a_dot_for_each_seed_and_the_mean():
    made = study(arms=CORNER_NAMES, stages=["rm", "dpo"])
    nll = dict(zip(CORNER_NAMES, (0.6, 0.58, 0.5, 0.52), strict=True))  # baseline, LeDPO, Disco, both
    for run in made.runs():
        scale = run.seed if run.arm.name != "baseline" else 1  # seed 2 doubles what differs from .6
        finish(made, run, {"nll": 0.6 + scale * (nll[run.arm.name] - 0.6)})
    figure = forest.effects_forest(results(made))
    (axes,) = figure.axes
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["rm: Disco", "dpo: Disco", "dpo: LeDPO", "dpo: Disco × LeDPO"]
    dots = [list(line.get_xdata()) for line in axes.lines if line.get_markersize() < 3]
    # of seed 1: -.1 | (-.1 - .06)/2 | (-.02 + .02)/2 | -.06 + .1
    assert dots == [pytest.approx([value, 2 * value], abs=1e-12) for value in (-0.1, -0.08, 0.0, 0.04)]
    large = [line.get_xdata()[0] for line in axes.lines if 4 < line.get_markersize() < 5]
    assert large == pytest.approx([-0.15, -0.12, 0, 0.06], abs=1e-12)
    assert axes.get_xlabel() == "← better" and axes.get_title("left") == "NLL (nats per pair)"
    assert 0 in [line.get_xdata()[0] for line in axes.lines if list(line.get_ydata()) == [0, 1]]  # the zero line
    assert axes.get_xlim()[0] < 0 < axes.get_xlim()[1]
    assert figure.get_figwidth() == style.COLUMN


def test_of_two_arms_the_forest_has_their_difference():
    made = study(arms=["baseline", "disco-used_beta-absent"], stages=["dpo"])
    for run in made.runs():
        finish(made, run, {"accuracy": 0.7 + 0.1 * run.seed * (run.arm.name != "baseline")})
    (axes,) = forest.effects_forest(results(made)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dpo: Disco − baseline"]
    assert list(axes.lines[1].get_xdata()) == pytest.approx([0.1, 0.2])
    assert axes.get_xlabel() == "better →"


def test_a_study_of_which_nothing_is_there_has_an_empty_forest():
    (axes,) = forest.effects_forest(results(study(arms=CORNER_NAMES, stages=["dpo"]))).axes
    assert [text.get_text() for text in axes.texts] == ["missing"]


# --- reward against KL


def points_of(axes, colour, size):
    return {
        (float(x), float(y))
        for line in axes.lines
        if line.get_color() == colour and line.get_markersize() == size and line.get_marker() not in ("None", "x")
        for x, y in zip(*line.get_data(), strict=True)
    }


def test_reward_against_kl_has_runs_means_joined_points_and_the_oracle():
    made = study(arms=CORNER_NAMES[:1], stages=["dpo"], dpo=GENERATE, sweep={"dpo": {"pref_beta": [0.1, 0.3]}}, **WORLD)
    for run in made.runs():
        kl = {"": 1.0, "pref_beta=0.3": 0.5}[run.variant]
        collapsed = (run.variant, run.seed) == ("", 2)
        found = {"kl_per_sequence": kl + 0.1 * run.seed, "true_reward": kl + run.seed, "regret": 0.25}
        finish(made, run, found | {"well_formed": 0.5 if collapsed else 1.0})
    figure = reward_kl.reward_kl(results(made), "dpo")
    axes, regret = figure.axes
    large = sorted(points_of(regret, style.look_of(Arm()).colour, 5))
    assert np.ravel(large) == pytest.approx([0.65, 0.25, 1.1, 0.25])
    assert regret.get_ylabel() == "Regret (r*)\n↓ better"
    black = style.look_of(Arm()).colour
    assert points_of(axes, black, 2.6) == {(1.1, 2.0), (0.6, 1.5), (0.7, 2.5)}
    large = sorted(points_of(axes, black, 5))
    assert large == [pytest.approx((0.65, 2.0)), pytest.approx((1.1, 2.0))]  # without the run that has collapsed
    (cross,) = [line for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (1.2, 3.0)
    joined = [line for line in axes.lines if line.get_marker() == "None" and line.get_color() == black]
    assert np.ravel(joined[0].get_data()) == pytest.approx([0.65, 1.1, 2.0, 2.0])
    (oracle,) = [line for line in axes.lines if line.get_color() == style.INK]
    assert np.ravel(oracle.get_data()) == pytest.approx([0.6, 0.7, 1.1, 1.2, 1.75, 2.75, 2.25, 3.25])
    assert {text.get_text() for text in axes.texts} == {"Baseline", "oracle"}
    assert "1 run with less than 90% well-formed" in below(figure)
    hollow = [
        line.get_markerfacecolor() for line in axes.lines if line.get_markersize() == 5 and line.get_marker() != "x"
    ]
    assert sorted(hollow) == sorted([black, "white"])  # one seed of two is left at the study's own beta


def test_without_the_world_the_score_of_each_kind_of_reward_model_has_a_panel():
    made = study(arms=[CORNER_NAMES[0], CORNER_NAMES[2]])
    for run in made.runs():
        gain = {"reward_gain": 1.5 if run.arm == Arm() else 2.5, "kl_per_sequence": 0.5}
        finish(made, run, gain if run.stage == "ppo" else {"nll": 0.5})
    figure = reward_kl.reward_kl(results(made), "ppo")
    plain, disco = figure.axes
    assert points_of(plain, style.look_of(Arm()).colour, 5) == {(0.5, 1.5)}
    assert points_of(disco, style.look_of(CORNERS[2]).colour, 5) == {(0.5, 2.5)}
    assert disco.get_ylabel() == "Reward gain (sd)\nby reward model, Disco\n↑ better"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Baseline", "Disco"]
    assert "oracle" not in below(figure)


def test_controls_look_like_no_arm_and_like_no_other_control():
    sources = [Source(name) for name in CORNER_NAMES] + [Source("baseline", f"control-{i}") for i in range(7)]
    looks = reward_kl.looks_of(sources)
    assert len({look.marker for look in looks.values()}) == len(sources)


def test_the_oracle_is_drawn_of_the_runs_that_know_it():
    import pandas as pd

    rows = [("dpo", "baseline", "", 1, name, value) for name, value in
            (("kl_per_sequence", 1.0), ("true_reward", 1.2), ("regret", 0.1))]  # fmt: skip
    rows += [("dpo", "baseline", "", 2, "kl_per_sequence", 2.0)]
    frame = pd.DataFrame(rows, columns=["stage", "arm", "variant", "seed", "metric", "value"])
    found = Published("s", frame, {}, {})
    assert reward_kl.oracle_points(found, "dpo", [Source("baseline")]) == [pytest.approx((1.0, 1.3))]


# --- heads


def test_sigma_is_a_geometric_mean_by_level_beside_a_line_of_slope_one():
    made = study(arms=[CORNER_NAMES[0], CORNER_NAMES[2]], stages=["rm"], **WORLD)
    s0 = 2 / math.sqrt(math.pi)
    for run in made.runs():
        said = np.array([1.0, 4.0, 4.0, 4.0]) * s0 * run.seed  # of true σ .5, .5, 2, 2: means 2 and 4
        sides = {"sigma_chosen": said[:2], "sigma_rejected": said[2:], "chosen_sigma": [0.5, 0.5],
                 "rejected_sigma": [2.0, 2.0], "probability": [0.6, 0.6], "mean_margin": [1.0, 1.0]}  # fmt: skip
        finish(made, run, {"sigma_spearman": 0.5 + 0.1 * run.seed}, examples=sides)
    figure = head_figures.sigma_figure(results(made), "rm")
    (axes,) = figure.axes
    assert axes.get_title() == "Disco" and axes.get_xscale() == axes.get_yscale() == "log"
    seeds = [list(line.get_ydata()) for line in axes.lines if line.get_markersize() == 1.8]
    assert seeds == [pytest.approx([2, 4]), pytest.approx([4, 8])]
    (large,) = [line for line in axes.lines if line.get_markersize() == 5]
    assert np.ravel(large.get_data()) == pytest.approx([0.5, 2, 2 * math.sqrt(2), 4 * math.sqrt(2)])
    (slope,) = [line for line in axes.lines if line.get_color() == style.INK]
    assert np.ravel(slope.get_data()) == pytest.approx([0.5, 2, 2, 8])  # through the geometric means, 1 and 4
    texts = [text.get_text() for text in axes.texts]
    assert {"slope 1", "σ₀", "rank correlation 0.65"} == set(texts)


def test_of_many_levels_of_sigma_there_are_tenths():
    truth = np.exp(np.linspace(0, 1, 200))
    found = head_figures.geometric_means(truth, 3 * truth)
    assert len(found) == 10
    assert found.to_numpy() == pytest.approx(3 * found.index.to_numpy(), rel=1e-6)


def test_what_nobody_knows_of_a_response_is_left_out():
    found = head_figures.geometric_means(np.array([1.0, np.nan, 2.0, 0.0]), np.array([3.0, 3.0, np.nan, 3.0]))
    assert found.to_dict() == {1.0: pytest.approx(3.0)}


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_s_stands_by_noise_and_familiarity_with_a_dot_for_each_seed(stage):
    made = study(arms=CORNER_NAMES[:2], **WORLD)
    for run in made.runs():
        log_s = np.array([0.2, 0.4, -0.1, -0.5]) + run.seed  # noise .2: .3 and (level 3) -.1; noise 1.6: -.5
        rows = {"log_s": log_s, "noise": [0.2, 0.2, 0.2, 1.6], "familiarity": [0, 0, 3, 3], "probability": [0.6] * 4,
                "mean_margin": [1.0] * 4, "true_reward": [1.0] * 4, "reference_true_reward": [0.0] * 4}  # fmt: skip
        finish(made, run, {"mean_log_s": 0.1}, examples=rows)
    figure = head_figures.scale_figure(results(made), stage)
    (axes,) = figure.axes
    dots = [tuple(line.get_ydata()) for line in axes.lines if line.get_markersize() < 3]
    wanted = [(0.3, "seed 1"), (-0.1, ""), (-0.5, "")]
    assert dots == [pytest.approx((math.exp(1 + v), math.exp(2 + v))) for v, _ in wanted]
    large = [line.get_ydata()[0] for line in axes.lines if 4 < line.get_markersize() < 5]
    assert large == pytest.approx([math.exp(1.5 + v) for v, _ in wanted])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.2", "1.6"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "3"]
    low, high = axes.get_ylim()
    assert 0.5 < low < 1 and high < 30  # around what is drawn


def test_an_arm_whose_head_nothing_was_measured_of_is_missing():
    made = study(arms=CORNER_NAMES, stages=["dpo"], **WORLD)
    for draw in (head_figures.sigma_figure, head_figures.scale_figure):
        figure = draw(results(made), "dpo")
        assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["missing"]] * 2


# --- which studies have them


def names(made) -> set[str]:
    return {output.name for output in outputs.figures(made)}


def test_what_is_not_known_has_no_figure():
    plain = names(study(dpo=GENERATE))
    assert not {name for name in plain if name.startswith(("sigma", "scale", "reward-by-noise"))}
    assert "reward-kl-ppo" in plain and "reward-kl-dpo" not in plain  # nobody judges what a dpo policy samples
    world = names(study(dpo=GENERATE, **WORLD))
    assert {"effects", "sigma-rm", "sigma-dpo", "scale-dpo", "scale-ppo", "reward-kl-dpo", "reward-kl-ppo"} <= world
    assert not {"sigma-ppo", "scale-rm", "reward-kl-rm"} & world


def test_equal_noise_everywhere_has_no_order_of_sigma():
    made = study(data={"world": {"noise": "homoscedastic"}}, base=WORLD["base"])
    assert not {"sigma-rm", "sigma-dpo"} & names(made)


def test_one_arm_has_no_effects():
    assert "effects" not in names(study(arms=["baseline"]))


@pytest.mark.parametrize(("low", "high"), [(0.83, 1.13), (0.97, 1.02), (0.4, 2.4), (0.02, 40)])
def test_a_logarithmic_axis_has_numbers_however_narrow_it_is(low, high):
    axes = Figure().subplots()
    axes.set_ylim(low, high)
    head_figures._logarithmic(axes, "y")
    there = [tick for tick in axes.yaxis.get_major_locator()() if low <= tick <= high]
    assert 3 <= len(there) <= 21
    texts = [axes.yaxis.get_major_formatter()(tick, None) for tick in there]
    assert [float(text) for text in texts] == pytest.approx(there)  # none is rounded to another number
