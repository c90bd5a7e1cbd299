"""What a paper prints, from numbers that are written by hand."""

import math
import os
import re
import subprocess
import sys

import pytest
import yaml
from published_study import BASELINE, BOTH, DISCO, LEDPO, cell, sweep, write_study

from discobeta import cli
from discobeta.errors import UserError
from discobeta.report import across, hypotheses, paper, paper_figures, published, reward_kl

HYPOTHESES = {
    "hypotheses": [
        {
            "id": name, "stage": "rm", "study": study, "text": "Disco predicts better", "metric": "excess_kl",
            "direction": "less", "contrast": [{"weight": 1, "arm": DISCO}, {"weight": -1, "arm": BASELINE}],
        }
        for name, study in (("R1", "both"), ("R2", "homoscedastic"))
    ]
}  # fmt: skip
SEEDS = range(1, 7)


def write_world(folder):
    """rm: .05 and .03, an idle arm, a control, a post-hoc fit; dpo: sweeps of four arms with a regret."""
    rows = cell("rm", "disco-idle_beta-absent", "excess_kl", [0.05] * 6)
    rows += cell("rm", BASELINE, "excess_kl", [0.05] * 6) + cell("rm", DISCO, "excess_kl", [0.03] * 6)
    rows += cell("rm", BASELINE, "excess_kl", [0.04, 0.06] * 3, variant="learned-scale")
    rows += cell("rm", BASELINE, "posthoc/topic_scale/excess_kl", [0.02] * 6)
    for arm, more in ((BASELINE, 0.0), (DISCO, 0.1), (LEDPO, 0.0), (BOTH, 0.3)):
        for seed in SEEDS:
            points = {"": (1.0, 1.0 + more + seed / 100), "pref_beta=0.35": (2.0, 2.0 + more + seed / 100)}
            rows += sweep("dpo", arm, points, seed)
            rows += [("dpo", arm, variant, seed, "regret", 0.25) for variant in points]
            rows += [("dpo", arm, "", seed, "nll", 0.5 - more)]
    controls = {"learned-scale": {"stages": ["rm"], "label": "one learned s"}}
    write_study(folder, "both", rows, SEEDS, dpo={"pref_beta": 0.5}, controls=controls)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The paper, and the folder that it stands in."""
    folder = tmp_path_factory.mktemp("published")
    write_world(folder / "world")
    (folder / "hypotheses.yaml").write_text(yaml.safe_dump(HYPOTHESES))
    registered = hypotheses.read(folder / "hypotheses.yaml")
    return paper.write(folder / "world", registered, "0123456789ab", folder / "world" / "paper"), folder


def lines(path):
    """The cells of a Markdown table's rows."""
    rows = [line for line in path.read_text().splitlines() if line.startswith("|")][2:]
    return [[entry.strip() for entry in line.strip("|").split("|")] for line in rows]


def test_every_table_and_figure_is_there_and_named_on_the_first_page(made):
    printed, folder = made
    out = folder / "world" / "paper"
    assert list(printed.tables) == [
        "hypotheses", "both-rm", "both-dpo", "both-dpo-sweep", "both-dpo-matched", "both-effects",
    ]  # fmt: skip
    assert list(printed.figures) == ["hypotheses", "both-dpo-frontier"]
    page = (out / "README.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (out / link).stat().st_size > 0
    for name in (*printed.tables, *printed.figures):
        assert f"({name}." in page
    assert "**Not there**, though hypotheses ask for it: homoscedastic (R2)." in page
    assert "\\toprule" in (out / "both-rm.tex").read_text()


def test_controls_and_fits_stand_under_their_arm(made):
    """t(.975, 5) = 2.5706, and .04 and .06 three times each have an sd of .010954."""
    _, folder = made
    rows = lines(folder / "world" / "paper" / "both-rm.md")
    assert [row[:2] for row in rows] == [
        ["baseline", "as in the grid"],
        ["baseline", "post-hoc scale per topic"],
        ["baseline", "one learned s"],
        ["Disco", "as in the grid"],
    ]
    assert [row[2] for row in rows] == ["0.0500 ± 0.0000", "0.0200 ± 0.0000", "0.0500 ± 0.0115", "0.0300 ± 0.0000"]
    assert pytest.approx(0.0115, abs=5e-5) == 2.5706 * 0.010954 / 6**0.5


def test_policies_are_compared_at_matched_kl(made):
    _, folder = made
    rows = lines(folder / "world" / "paper" / "both-dpo-matched.md")
    assert [(row[0], row[3], row[4]) for row in rows] == [
        ("Disco − Baseline", "0.100 ± 0.000", "0.031"),
        ("LeDPO − Baseline", "0.000 ± 0.000", "1.000"),
        ("Disco + LeDPO − Baseline", "0.300 ± 0.000", "0.031"),
        ("Disco × LeDPO", "0.200 ± 0.000", "0.031"),  # .3 - .1 - 0
    ]
    assert {row[2] for row in rows} == {"1.00 to 2.00"}


def test_effects_are_of_the_grids_own_runs(made):
    """nll is .5, .4, .5 and .2: Disco (-.1 - .3) / 2, LeDPO (0 - .2) / 2, interaction -.3 + .1."""
    printed, _ = made
    frame = printed.tables["both-effects"].frame.set_index(["metric", "contrast"]).difference
    assert frame["nll"].to_dict() == pytest.approx({"Disco": -0.2, "LeDPO": -0.1, "Disco × LeDPO": -0.2})


def test_macros_have_names_of_letters_and_the_printed_values(made):
    printed, folder = made
    text = (folder / "world" / "paper" / "numbers.tex").read_text()
    found = dict(re.findall(r"^\\newcommand\{\\([A-Za-z]+)\}\{(.*)\}$", text, flags=re.MULTILINE))
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    assert len(found) == len(lines) == len(printed.macros)  # none of another form, none twice
    expected = {
        "valBothSeeds": "6",
        "valBothRmBaselineExcessKl": "0.0500",
        "valBothRmDiscoExcessKl": "0.0300",
        "valBothRmBaselineLearnedScaleExcessKl": "0.0500",
        "valBothRmBaselineLearnedScaleExcessKlCi": "0.0115",
        "valBothRmBaselinePosthocTopicScaleExcessKl": "0.0200",
        "valBothDpoDiscoTrueReward": "1.135",  # 1.1 and the mean of .01 to .06
        "valBothDpoDiscoBetaIsZeroPointThreeFiveTrueReward": "2.135",
        "valBothDpoMatchedDiscoMinusBaseline": "0.100",
        "valBothDpoMatchedDiscoTimesLeDPO": "0.200",
        "valBothDpoEffectDiscoTimesLeDPONll": "$-$0.2000",
        "valROneVerdict": "supported",
        "valROneDifference": "$-$0.0200",
        "valROneP": "0.016",
        "valROnePHolm": "0.031",
        "valRTwoVerdict": "undecidable",
        "valSupported": "1",
        "valUndecidable": "1",
    }
    assert {name: found.get(name) for name in expected} == expected
    assert "valRTwoDifference" not in found


@pytest.fixture
def three(tmp_path):
    """Studies a and b, of six and of two seeds, and c, which does not know the truth."""
    topic, label = "posthoc/topic_scale/excess_kl", {"stages": ["rm"], "label": "ε = .1"}
    rows = cell("rm", BASELINE, "excess_kl", [0.04, 0.06] * 3) + cell("rm", DISCO, "excess_kl", [0.03] * 6)
    rows += cell("rm", BASELINE, topic, [0.02] * 6) + cell("rm", BASELINE, "excess_kl", [0.07] * 6, variant="probit")
    rows += cell("rm", BASELINE, "excess_kl", [0.08] * 6, variant="smoothed")
    rows += cell("rm", BASELINE, topic, [0.01] * 6, variant="probit")
    rows += cell("dpo", BASELINE, "excess_kl", [0.09] * 6)
    write_study(tmp_path, "a", rows, SEEDS, controls={"smoothed": label})
    rows = cell("rm", BASELINE, "excess_kl", {7: 0.01, 8: 0.03}) + cell("rm", DISCO, "excess_kl", {7: 0.02, 8: 0.05})
    rows += cell("rm", BASELINE, topic, {7: 0.0, 8: 0.01})
    rows += cell("rm", BASELINE, "excess_kl", {8: 0.02}, variant="probit")
    rows += cell("rm", BASELINE, topic, {7: 0.01, 8: 0.01}, variant="probit")
    rows += cell("rm", BASELINE, "excess_kl", {7: 0.5, 8: 0.5}, variant="smoothed")
    write_study(tmp_path, "b", rows, (7, 8), controls={"smoothed": label | {"label": "ε = .2"}})
    write_study(tmp_path, "c", cell("rm", BASELINE, "nll", [0.6, 0.7]), (1, 2))
    return [published.read(tmp_path, name) for name in "abc"]


def test_studies_are_set_beside_one_another(three):
    """What both have, under one name and label. .05 ± .0115 as above; minus .03: the same sd."""
    found = across.shared(three, "rm")
    names = ["Baseline", "Baseline, post-hoc scale per topic", "Baseline, probit", "Disco"]
    assert list(found) == names and across.shared(three, "dpo") == {}
    table = across.table(found, "rm")
    means, differences = (panel.cells() for panel in table.panels)
    assert means == (
        ["Study", *names],
        [
            ["a", "0.0500 ± 0.0115", "0.0200 ± 0.0000", "0.0700 ± 0.0000", "0.0300 ± 0.0000"],
            ["b", "0.0200 (0.0100, 0.0300)", "0.0050 (0.0000, 0.0100)", "0.0200 (–, 0.0200)",
             "0.0350 (0.0200, 0.0500)"],
        ],
    )  # fmt: skip
    assert differences == (
        ["Study", *names[1:]],
        [
            ["a", "−0.0300 ± 0.0115", "0.0200 ± 0.0115", "−0.0200 ± 0.0115"],
            ["b", "−0.0150 (−0.0100, −0.0200)", "−0.0100 (–, −0.0100)", "0.0150 (0.0100, 0.0200)"],
        ],
    )
    rows = table.frame.set_index(["study", "label"])
    assert rows.loc[("a", "Disco"), "p"] == 2 / 2**6  # six differences of one sign
    assert rows.loc[("b", "Disco"), ["seed-7", "seed-8", "n_seeds"]].tolist() == pytest.approx([0.01, 0.02, 2])
    assert math.isnan(rows.loc[("a", "Baseline"), "difference"])


def test_the_figure_of_all_studies_shows_every_mean_and_its_interval(three):
    (axes,) = paper_figures.across_figure({"rm": across.shared(three, "rm")}).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]
    means = [(round(float(x), 6), round(float(y))) for bars in axes.containers for x, y in [*bars[0].get_xydata()]]
    a, b = [0.05, 0.02, 0.07, 0.03], [0.02, 0.005, 0.02, 0.035]
    assert sorted(means) == sorted([(x, 0) for x in a] + [(x, 1) for x in b])
    baseline = axes.containers[0][2][0].get_segments()[0][:, 0]
    assert baseline.tolist() == pytest.approx([0.05 - 0.0115, 0.05 + 0.0115], abs=1e-4)
    marks = {(bars[0].get_marker(), bars[0].get_markerfacecolor() == "white") for bars in axes.containers}
    assert len(marks) == 4 and sum(hollow for _, hollow in marks) == 2  # they differ in grey too


def test_the_differences_of_all_studies_have_macros_and_a_page(three, tmp_path):
    (tmp_path / "hypotheses.yaml").write_text(yaml.safe_dump(HYPOTHESES))
    made = paper.write(tmp_path, hypotheses.read(tmp_path / "hypotheses.yaml"), "0123456789ab", tmp_path / "paper")
    assert made.macros["valARmDiscoMinusBaselineExcessKl"] == "−0.0200"
    assert made.macros["valARmDiscoMinusBaselineExcessKlCi"] == "0.0115"
    assert made.macros["valBRmBaselinePosthocTopicScaleMinusBaselineExcessKl"] == "−0.0150"
    page = (tmp_path / "paper" / "README.md").read_text()
    assert "[md](across-rm.md)" in page and "![across](across.png)" in page and "across-dpo" not in page


def test_two_numbers_with_one_name_are_refused(tmp_path):
    """`a-b` and `ab` differ by what a macro's name cannot hold; `aB` and `a-b` too."""
    for name in ("a-b", "aB"):
        write_study(tmp_path, name, cell("rm", BASELINE, "excess_kl", [0.05] * 6), SEEDS)
    (tmp_path / "h.yaml").write_text(yaml.safe_dump(HYPOTHESES))
    with pytest.raises(UserError, match=r"would both be \\valAB"):
        paper.make(tmp_path, hypotheses.read(tmp_path / "h.yaml"), "")


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("both", "rm", "Disco + LeDPO", "excess_kl"), "valBothRmDiscoLeDPOExcessKl"),
        (("size-2400", "best_of_16/true_reward"), "valSizeTwoFourZeroZeroBestOfOneSixTrueReward"),
        (("dpo", "beta=0.35", "ci"), "valDpoBetaIsZeroPointThreeFiveCi"),
    ],
)
def test_names_of_macros(parts, name):
    assert paper.macro_name(*parts) == name


def test_the_frontier_figure_shows_every_point_the_oracle_and_the_difference(made):
    _, folder = made
    axes, below = paper_figures.frontier_figure(published.read(folder / "world", "both"), "dpo").axes
    drawn = {(round(x, 6), round(y, 6)) for line in axes.lines for x, y in zip(*line.get_data(), strict=True)}
    for more in (0.0, 0.1, 0.3):
        for seed in SEEDS:
            assert {(1.0, round(1 + more + seed / 100, 6)), (2.0, round(2 + more + seed / 100, 6))} <= drawn
            # the oracle at the run's KL: with the regret, which is .25
            assert {(1.0, round(1.25 + more + seed / 100, 6)), (2.0, round(2.25 + more + seed / 100, 6))} <= drawn
    names = {text.get_text() for text in axes.texts}
    assert names == {"Baseline", "Disco", "LeDPO", "Disco + LeDPO", "oracle"}
    heights = {text.get_text(): text for text in below.texts}
    assert heights.keys() == {"Disco", "LeDPO", "Disco + LeDPO"}
    flat = {round(float(y), 6) for line in below.lines for y in line.get_ydata() if len(line.get_ydata()) == 25}
    assert flat == {0.0, 0.1, 0.3}
    styles = [(line.get_marker(), line.get_linestyle()) for line in below.lines if len(line.get_ydata()) == 25]
    assert len(set(styles)) == 3  # they differ in grey too


def test_collapsed_runs_are_drawn_apart_and_in_no_mean():
    point = published_point
    by_seed = {1: [point(1.0, 1.0, 0.5), point(2.0, 9.0, 0.3, 0.2)], 2: [point(3.0, 2.0, 0.5)]}
    assert reward_kl.mean_points(by_seed) == [(2.0, 1.5, 2)]


def published_point(kl, value, setting, well_formed=1.0):
    from discobeta.report.frontier import Point

    return Point(kl, value, f"pref_beta={setting}", setting, well_formed)


def test_a_difference_is_drawn_where_two_thirds_of_the_seeds_have_it():
    point = published_point
    arm = {1: [point(0.0, 0.0, 1), point(4.0, 4.0, 0.1)], 2: [point(1.0, 1.0, 1), point(5.0, 5.0, 0.1)]}
    base = {1: [point(0.5, 0.0, 1), point(3.5, 0.0, 0.1)], 2: [point(0.0, 0.0, 1), point(3.0, 0.0, 0.1)]}
    kls, values = paper_figures.differences(arm, base, 2)  # both have 1 to 3
    assert (kls[0], kls[-1], len(kls)) == (1.0, 3.0, 25)
    assert values == pytest.approx(kls)  # the arm's reward is its KL, the baseline's 0
    arm[3], base[3] = [point(2.0, 2.6, 1), point(3.2, 3.8, 0.1)], [point(0.0, 0.0, 1), point(4.0, 0.0, 0.1)]
    kls, values = paper_figures.differences(arm, base, 3)
    assert (kls[0], kls[-1]) == (1.0, 3.2)  # where two of three are: 1 and 2 from 1, and 3 from 2 on
    assert values[0] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(3.2 + 0.3)  # of 1 and 3, and 3 has .6 more
    assert paper_figures.differences(arm, {1: base[1]}, 3) == ([], [])


def test_a_gap_in_which_fewer_seeds_are_is_a_gap():
    point = published_point
    spans = {1: (0, 1), 2: (0, 1), 3: (2, 3), 4: (2, 3), 5: (0, 3)}  # in between there is one of the two that it takes
    arm = {seed: [point(low, 1.0, 1), point(high, 1.0, 0.1)] for seed, (low, high) in spans.items()}
    base = {seed: [point(0, 0.0, 1), point(3, 0.0, 0.1)] for seed in spans}
    kls, values = paper_figures.differences(arm, base, 3)
    assert (kls[0], kls[-1]) == (0, 3)
    assert all(math.isnan(value) == (1 < kl < 2) for kl, value in zip(kls, values, strict=True))


def test_a_study_that_is_gone_leaves_no_files_and_somebodys_files_stay(tmp_path, capsys):
    write_world(tmp_path / "world")
    write_study(tmp_path / "world", "extra", cell("rm", BASELINE, "excess_kl", [0.05] * 6), SEEDS)
    (tmp_path / "h.yaml").write_text(yaml.safe_dump(HYPOTHESES))
    out = tmp_path / "world" / "paper"
    words = [
        "paper",
        "--hypotheses",
        str(tmp_path / "h.yaml"),
        "--results",
        str(tmp_path / "world"),
        "--output",
        str(out),
    ]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "2 studies" in said and "not there: homoscedastic, asked for by R2" in said
    assert (out / "extra-rm.md").exists()
    (out / "mine.md").write_text("mine")
    (tmp_path / "world" / "extra" / "metrics.csv").unlink()
    assert cli.main(words) == 0
    assert not (out / "extra-rm.md").exists() and (out / "mine.md").read_text() == "mine"
    (out / ".discobeta.json").unlink()
    assert cli.main(words) == 2 and "discobeta has not written it" in capsys.readouterr().err


SCRIPT = """
import sys
from discobeta.cli import main
assert main(sys.argv[1:]) == 0
assert not {"torch", "transformers", "peft"} & set(sys.modules)
"""


def test_two_processes_write_the_same_bytes_without_torch(tmp_path):
    write_world(tmp_path / "world")
    (tmp_path / "h.yaml").write_text(yaml.safe_dump(HYPOTHESES))
    files = []
    for place in ("1", "2"):
        words = ["paper", "--hypotheses", "h.yaml", "--results", "world", "--output", place]
        environment = os.environ | {"PYTHONHASHSEED": place}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        files.append({path.name: path.read_bytes() for path in (tmp_path / place).iterdir()})
    assert files[0] == files[1]
    assert {name.rpartition(".")[2] for name in files[0]} == {"csv", "md", "tex", "pdf", "png", "json"}
