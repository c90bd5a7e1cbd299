"""The page of a study without a browser: its numbers and sentences by hand, whose text is text, what is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from page_study import BASELINE, BOTH, DISCO, LEDPO, MISCHIEF, fill, numbers, page_of, wide
from report_study import reseal, results, rewrite, study

from discobeta.cli import main
from discobeta.design.yaml_text import write_yaml
from discobeta.errors import UserError
from discobeta.report import effects, outputs, page, tables
from discobeta.report.answer import Finding, cost_ratios, findings, headline
from discobeta.report.html import cell_of, grid, paragraphs, plain, tag
from discobeta.report.measures import METRICS
from discobeta.report.outputs import Row

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Parsed(HTMLParser):
    """A page as its elements: (name, attributes, text within), in order; every tag must be closed by its like."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes), []))
        if name not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, name):
        assert self.elements[self.open[-1]][0] == name
        self.open.pop()

    def handle_data(self, data):
        for place in self.open:
            self.elements[place][2].append(data)

    def texts(self, name: str, **attributes: str) -> list[str]:
        return [
            " ".join((" " if name == "tr" else "").join(text).split())
            for found, having, text in self.elements
            if found == name and attributes.items() <= having.items()
        ]

    def all(self, name: str) -> list[dict]:
        return [having for found, having, _ in self.elements if found == name]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def undrawn(monkeypatch):
    """No figures: to draw them takes longer than all else."""
    monkeypatch.setattr(outputs, "FIGURES", ())


def parsed(of) -> Parsed:
    return Parsed(page.page(results(of)))


# --- the answer in numbers


def test_the_four_arms_stand_with_their_seeds_and_their_differences_to_the_baseline():
    made = wide(stages=["rm", "dpo"])
    fill(made)
    answer = headline(results(made))
    assert [(stage, metric.name) for stage, metric in answer.columns] == [
        ("rm", "nll"), ("rm", "accuracy"),
        ("dpo", "nll"), ("dpo", "accuracy"), ("dpo", "true_reward"), ("dpo", "kl_per_sequence"),
    ]  # fmt: skip
    rows = dict(answer.rows)
    assert list(rows) == [BASELINE, LEDPO, DISCO, BOTH]
    assert [cell.instead for cell in rows[LEDPO]] == ["same run as baseline"] * 2 + [""] * 4
    assert [cell.instead for cell in rows[BOTH]][:2] == ["same run as Disco"] * 2
    # 0.6 + 0.01 * 3.5, less 0.1 with Disco; with LeDPO three seeds 0.05 down and three 0.03 up
    assert [rows[arm][2].mean for arm in rows] == pytest.approx([0.635, 0.625, 0.535, 0.525])
    assert rows[DISCO][2].differences == pytest.approx([-0.1] * 6)
    assert rows[LEDPO][2].differences == pytest.approx([-0.05, 0.03] * 3)
    assert rows[BASELINE][2].differences == []
    assert rows[DISCO][5].values == dict.fromkeys(made.seeds, 2.5)


def test_the_truth_stands_for_what_is_a_stand_in_for_it():
    made = wide(stages=["rm"])
    fill(made, lambda run: numbers(run) | {"excess_kl": 0.1})
    assert [metric.name for _, metric in headline(results(made)).columns] == ["excess_kl", "accuracy"]


def test_an_arm_that_no_stage_has_is_no_row_and_a_stage_without_numbers_no_column(undrawn):
    made = study(arms=["baseline", "disco-used_beta-absent"], seeds=[1])
    fill(made, skip=lambda run: run.stage == "ppo")
    answer = headline(results(made))
    assert [arm for arm, _ in answer.rows] == [BASELINE, DISCO]
    assert {stage for stage, _ in answer.columns} == {"rm", "dpo"}
    assert "Not measured yet: ppo." in parsed(made).texts("li")


def test_the_table_of_the_page_says_what_the_headline_says(undrawn):
    made = wide(stages=["rm", "dpo"])
    fill(made)
    found = parsed(made)
    assert found.texts("span", class_="mean") == []  # the name in HTML is class
    means = [text for text in found.texts("span", **{"class": "mean"})]
    disco = ["0.5350", "0.700", "0.5350", "0.700", "1.350", "2.500"]
    assert means == [
        *("0.6350", "0.700", "0.6350", "0.700", "1.350", "2.000"), *("0.6250", "0.700", "1.350", "2.000"),
        *disco, "0.5250", *disco[3:],
    ]  # fmt: skip
    differences = found.texts("span", **{"class": "difference"})
    assert differences[:4] == ["−0.0100, 3 of 6", "0.000", "0.000", "0.000"]
    assert differences[4] == "−0.1000, 6 of 6" and differences[-1] == "+0.500, 6 of 6"
    assert found.all("circle")[:6] and len(found.all("circle")) == 6 * (6 + 4 + 6 + 4)
    assert "seed 1: 0.6100; seed 2: 0.6200; seed 3: 0.6300" in found.texts("title")[1]


# --- the answer in words

NLL, REWARD, KL = METRICS["nll"], METRICS["true_reward"], METRICS["kl_per_sequence"]
NAN = float("nan")


@pytest.mark.parametrize(
    "finding, verdict, words",
    [
        (
            Finding("rm", "Disco", NLL, [-0.02] * 6, 6, 1 / 32, 1 / 32, 1),
            "better", "NLL lower by 0.0200, in 6 of 6 seeds (p = 0.031)",
        ),
        (
            Finding("dpo", "Disco", REWARD, [-0.1] * 8, 8, 1 / 128, 6 / 128, 6),
            "worse",
            "true reward lower by 0.100, in 8 of 8 seeds (p = 0.0078; 0.047 corrected for the 6 tests of the stage)",
        ),
        (
            Finding("dpo", "Disco", NLL, [-0.02] * 6, 6, 1 / 32, 6 / 32, 6),
            "undecided",
            "NLL undecided: lower by 0.0200, in 6 of 6 seeds (p = 0.031; 0.188 corrected for the 6 tests of the stage)",
        ),
        (
            Finding("rm", "Disco", NLL, [-0.04, 0.01, 0.01, 0.01, 0.0, 0.0], 6, 0.5, 0.5, 1),
            "undecided", "NLL undecided: lower by 0.0017, in 1 of 6 seeds (p = 0.500)",
        ),
        (
            Finding("rm", "Disco", NLL, [0.1, 0.1, 0.1], 4, 0.25, 0.25, 1),
            "undecided",
            "NLL undecided: higher by 0.1000, in 3 of 3 seeds, one seed missing "
            "(p = 0.250; of 3 seeds it cannot be below 0.250)",
        ),
        (Finding("rm", "Disco", NLL, [0.1], 1, 1.0, 1.0, 1), "", "NLL higher by 0.1000 in the one seed that is there"),
        (Finding("rm", "Disco", NLL, [], 3), "", "NLL not known yet: no seed has all of its runs"),
        (Finding("rm", "Disco", NLL, [0.0, 0.0], 2, 1.0, 1.0, 1), "", "NLL the same in all 2 seeds"),
        (
            Finding("ppo", "LeDPO", KL, [-0.5, -0.5], 4),
            "", "KL to reference lower by 0.500, in 2 of 2 seeds, 2 seeds missing",
        ),
        (
            Finding("dpo", "Disco × LeDPO", NLL, [0.01] * 5 + [-0.005], 6, 0.0625, 0.375, 6),
            "undecided",
            "NLL undecided: higher than what the two do alone adds up to, by 0.0075, in 5 of 6 seeds "
            "(p = 0.062; 0.375 corrected for the 6 tests of the stage)",
        ),
    ],
)  # fmt: skip
def test_words_say_what_the_seeds_and_the_test_say_and_no_more(finding, verdict, words):
    assert (finding.verdict, finding.words) == (verdict, words)


def test_a_reward_that_rises_is_better_and_an_nll_that_rises_is_worse():
    up = [0.1] * 6
    assert Finding("dpo", "Disco", REWARD, up, 6, 1 / 32, 1 / 32, 1).verdict == "better"
    assert Finding("dpo", "Disco", NLL, up, 6, 1 / 32, 1 / 32, 1).verdict == "worse"
    assert Finding("dpo", "Disco", KL, up, 6).verdict == ""


def test_effects_in_words_have_the_p_of_the_table_of_effects():
    made = wide(stages=["rm", "dpo"])
    fill(made)
    frame = effects.effects_table(results(made)).frame.set_index(["stage", "contrast", "metric"])
    found = findings(results(made))
    tested = [finding for finding in found if finding.is_tested]
    assert {(one.stage, one.effect, one.metric.name) for one in tested} == set(frame.index[frame.p.notna()])
    for one in tested:
        row = frame.loc[(one.stage, one.effect, one.metric.name)]
        assert (one.p, one.p_holm, one.mean) == pytest.approx((row.p, row.p_holm, row.difference))
    assert [one.tests for one in tested if one.stage == "dpo"] == [6] * 6
    # of six equal differences 2 of 64 choices of signs reach the sum; of three times -.05 and three times .03, with
    # the sum .06, those where a (.05 a) and b (.03 b) of -3, -1, 1, 3 have |.05 a + .03 b| >= .06: 2 (8 + 3 (1 + 3))
    by_hand = {(one.stage, one.effect): one.p for one in tested if one.metric is NLL}
    assert by_hand[("rm", "Disco")] == by_hand[("dpo", "Disco")] == 2 / 64
    assert by_hand[("dpo", "LeDPO")] == 40 / 64


def test_sentences_of_the_page(undrawn):
    made = wide(stages=["rm", "dpo"])
    fill(made)
    found = parsed(made)
    assert found.texts("span", **{"class": "verdict better"}) == ["NLL lower by 0.1000, in 6 of 6 seeds (p = 0.031)"]
    assert not found.texts("span", **{"class": "verdict worse"})
    said = " ".join(found.texts("ul", **{"class": "findings"}))
    assert "true reward the same in all 6 seeds; KL to reference higher by 0.500, in 6 of 6 seeds." in said
    assert (
        "Cost, seconds of training over the baseline's: rm: Disco 1.50; dpo: LeDPO 1.00, Disco 1.50, both 1.50." in said
    )
    assert "Neutrality: 12 of 12 runs with an idle head equal their twin byte for byte." in said


def test_costs_are_of_the_seeds_that_both_have():
    made = wide(stages=["rm"], seeds=[1, 2])
    fill(made, skip=lambda run: run.seed == 2 and run.arm == DISCO)
    assert cost_ratios(results(made)) == {"rm": [(DISCO, 1.5, 1)]}


# --- tables


def test_tables_have_the_cells_of_the_markdown_and_links_to_their_files(undrawn):
    made = wide(stages=["rm", "dpo"])
    fill(made)
    tables.write(results(made))
    text = page.page(results(made))
    found, read = Parsed(text), results(made)
    links = {having["href"] for having in found.all("a")}
    for output in outputs.tables(made):
        assert {f"tables/{name}" for name in output.files} <= links | {"tables/metrics.csv"}
        table = output.make(read)
        shown = [" ".join(cell.split()) for cell in found.texts("td") + found.texts("th")]
        for panel in table.panels:
            assert panel.caption in found.texts("caption")
            for row in panel.rows:
                assert {" ".join(column.text(row).split()) for column in panel.columns} <= set(shown)
        for note in table.notes:
            assert any(note in " ".join(item.split()) for item in found.texts("li"))
    frame = pd.read_csv(made.tables_directory / "effects.csv")
    nll = frame[(frame.stage == "dpo") & (frame.metric == "nll") & (frame.contrast == "Disco")].iloc[0]
    assert f"{nll.difference:.4f}".replace("-", "−") == "−0.1000"
    assert [cell for cell in found.texts("td") if cell.startswith("−0.1000")]


def test_a_table_of_one_stage_stands_with_it_and_the_whole_grid_is_folded(undrawn, monkeypatch):
    rows = (
        Row("{stage}", "discobeta.report.cells:stage_table", "stage", "{stage}", outputs.TABLE),
        Row("{stage}-grid", "discobeta.report.cells:stage_table", "stage", "all cells of {stage}", outputs.TABLE),
    )
    monkeypatch.setattr(outputs, "TABLES", rows)
    made = study(arms=["baseline"], stages=["rm"], seeds=[1])
    fill(made)
    found = parsed(made)
    assert found.texts("summary").count("All cells of rm") == 1
    assert "Reward models" in found.texts("h2")


def test_cells_and_texts_become_elements():
    assert cell_of("0.1 ± 0.02 (1 of 2)")[0] == "0.1" and cell_of("0.1 ± 0.02")[1].text == "\u00a0± 0.02"
    assert cell_of("–").get("class") == "nothing" and cell_of("plain") == "plain"
    made = grid(["KL, Rao-\nBlackwell", "log σ\nof it"], [["1", "2"]], [True, False])
    assert [head.text for head in made.iter("th")][:2] == ["KL, Rao-Blackwell", "log σ of it"]
    assert [cell.get("class") for cell in made.iter("td")] == [None]
    (first, second) = paragraphs("A *word* and ``code``,\n**strong**.\n\nAnother 2 * 3 * 4.")
    assert [part.tag for part in first] == ["em", "code", "strong"] and first[1].tail == ", "
    assert len(second) == 0 and second.text == "Another 2 * 3 * 4."
    assert plain("One ``x`` *y*. Two.") == "One x y."
    assert tag("p", "a", None, ["b", tag("i", "c"), "d"], class_="k", hidden=False).get("hidden") is None


# --- whose text is text


def test_a_response_is_text_whatever_it_holds(undrawn):
    made = wide(stages=["rm", "dpo"], seeds=[1])
    fill(made)
    text = page.page(results(made))
    found = Parsed(text)
    assert len(found.all("script")) == 1 and len(found.all("img")) == 0
    assert "<img src=x" not in text and "\x1b" not in text
    shown = MISCHIEF.replace("\x1b", "\ufffd")
    assert [cell for cell in found.texts("td") if cell == shown] == [shown] * 4


def test_names_and_refusals_are_text_too(undrawn):
    made = study(arms=["baseline"], stages=["rm"], seeds=[1], data={"dataset": "<b>&rows", "eval_dataset": "<i>"})
    fill(made, commit="<u>no commit</u>")
    found = parsed(made)
    assert not {"b", "i", "u"} & {name for name, _, _ in found.elements}
    assert "<b>&rows" in found.texts("dd")


def test_only_the_script_and_the_style_of_the_page_may_run_and_nothing_is_fetched(undrawn):
    made = wide(stages=["rm", "dpo"], seeds=[1])
    fill(made)
    text = page.page(results(made))
    found = Parsed(text)
    (policy,) = [having["content"] for having in found.all("meta") if "http-equiv" in having]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for name in ("style", "script"):
        (content,) = re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    addresses = [having.get(key) for key in ("href", "src") for _, having, _ in found.elements if key in having]
    assert addresses and all(re.match(r"#[\w-]+$|(tables|figures)/[\w.-]+$|data:image/", one) for one in addresses)
    places = {having["id"] for _, having, _ in found.elements if "id" in having}
    assert {one.removeprefix("#") for one in addresses if one.startswith("#")} <= places
    assert not [having for _, having, _ in found.elements if any(key == "style" or key[:2] == "on" for key in having)]


# --- responses


def test_prompts_stand_evenly_apart_and_beside_the_reference(undrawn):
    made = wide(stages=["rm", "dpo"], seeds=[1, 2])
    fill(made, skip=lambda run: run.seed == 1 and run.arm == BOTH)
    found = parsed(made)
    assert "Direct preference optimisation, seed 2" in found.texts("h3")  # which has all arms
    assert found.texts("p", **{"class": "prompt"}) == [f"question {number}" for number in (0, 3, 6, 9)]
    rows = found.texts("tr")
    assert "Reference reference answers 3 −0.50 –" in rows
    assert "Disco + LeDPO Disco + LeDPO answers 9 2.25 19" in rows


def test_of_several_responses_to_a_prompt_the_first_is_shown_and_a_long_one_is_cut(tmp_path):
    rows = [{"prompt": f"p{n}", "sample": sample, "response": "x"} for n in range(2) for sample in range(3)]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(row["prompt"], row["sample"]) for row in page.read_answers(tmp_path / "g.jsonl")] == [("p0", 0), ("p1", 0)]
    start, more = page._text("y" * 2_500)
    assert (start, more.text) == ("y" * 2_000, " … 500 more characters")
    (tmp_path / "g.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"g\.jsonl"):
        page.read_answers(tmp_path / "g.jsonl")


def test_scores_of_different_reward_models_are_not_given_to_the_reference(undrawn):
    rows = {"a": {"reference_reward": 0.5}, "b": {"reference_reward": 0.7}}
    assert page._of_reference(rows, "reward") == "by arm"
    assert page._of_reference({"a": {"reference_reward": 0.5}}, "reward") == "0.50"


# --- what is missing


def test_runs_that_do_not_count_are_named_before_anything_else(undrawn):
    made = wide(stages=["rm", "dpo"], seeds=[1, 2])
    fill(made, skip=lambda run: run.arm == BOTH and run.seed == 2)
    reseal(made.run("dpo", LEDPO, 1).directory, data="f" * 64)
    rewrite(made.run("rm", DISCO, 2).directory, "log.jsonl", "{")
    text = page.page(results(made))
    (said,) = Parsed(text).texts("div", **{"class": "missing"})
    assert said.startswith("2 of 16 runs do not count")
    assert "disco-used_beta-used: seed 2 (not trained)" in said
    assert "disco-absent_beta-used: seed 1 stale (data is not the other runs')" in said
    assert text.index('class="missing"') < text.index('id="answer"')


def test_a_study_of_which_nothing_has_run_has_a_page_that_says_so(undrawn):
    made = study(stages=["rm", "dpo"])
    found = parsed(made)
    (said,) = found.texts("div", **{"class": "missing"})
    assert "rm: all of its 6 runs (not trained)" in said
    assert "Nothing has been measured yet." in found.texts("p")
    assert not found.all("circle")


@pytest.mark.parametrize(
    "settings",
    [
        {"stages": ["rm"]},
        {"stages": ["dpo"], "seeds": [1]},
        {"stages": ["rm", "ppo"], "arms": ["baseline", "disco-used_beta-absent"]},
        {
            "stages": ["rm", "dpo"],
            "seeds": list(range(1, 13)),
            "controls": {"flat": {"stages": ["dpo"], "settings": {"pref_beta": 0.7}}},
        },
        {"stages": ["rm"], "idle_arms": "prove", "prove_steps": 1, "seeds": [1]},
    ],
    ids=["rm-alone", "one-seed", "ppo", "controls", "proofs"],
)
def test_a_page_of_any_study_is_whole(undrawn, settings):
    made = study(**settings)
    fill(made)
    found = parsed(made)
    stages = {"rm": "Reward models", "dpo": "Direct preference optimisation", "ppo": "Proximal policy optimisation"}
    policies = ["Responses of reference and policies"] * any(stage != "rm" for stage in made.stages)
    assert found.texts("h2") == [
        "Question and answer", *(stages[stage] for stage in made.stages),
        "Effects", "Comparisons", "Neutrality", "Cost", *policies, "Runs", "What made it",
    ]  # fmt: skip
    assert not found.texts("div", **{"class": "missing"})
    assert ("Controls and sweeps of dpo" in found.texts("h3")) == ("controls" in settings)
    assert len(found.texts("table", **{"class": "sortable runs"})) == 1
    rows = found.texts("tr")
    for run in made.runs():
        assert len([row for row in rows if row.startswith(f"{run.stage} ") and row.endswith(f" {run.directory}")]) == 1


# --- the file


def test_equal_results_give_equal_bytes_and_figures_are_inside(monkeypatch):
    monkeypatch.setattr(outputs, "FIGURES", tuple(row for row in outputs.FIGURES if row.caption == "reliability"))
    made = study(arms=["baseline"], stages=["rm"], seeds=[1])
    fill(made)
    assert main(["report", "--configfile", config_of(made)]) == 0
    first = page_of(made).read_bytes()
    (image,) = Parsed(first.decode()).all("img")
    drawn = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,"))
    assert drawn == (made.figures_directory / "reliability-rm.svg").read_bytes()
    assert image["alt"].startswith("Reliability, rm. Held-out pairs sorted by how sure the model is")
    assert main(["page", "--configfile", config_of(made)]) == 0
    assert page_of(made).read_bytes() == first
    assert main(["figures", "--configfile", config_of(made)]) == 0
    with monkeypatch.context() as nothing_draws:
        nothing_draws.setattr(page, "save", None)
        assert main(["page", "--drawn", "--configfile", config_of(made)]) == 0
    assert page_of(made).read_bytes() == first
    monkeypatch.setattr(page, "LARGEST_SVG", 1000)
    (image,) = parsed(made).all("img")
    assert image["src"].startswith("data:image/png;base64,iVBOR")


def config_of(made) -> str:
    write_yaml(made.settings, "study.yaml")
    return "study.yaml"


def test_a_page_that_somebody_else_has_written_is_left_alone(undrawn, capsys):
    made = study(arms=["baseline"], stages=["rm"], seeds=[1])
    fill(made)
    page_of(made).write_text("mine")
    assert main(["page", "--configfile", config_of(made)]) == 2
    assert "report.html is there, and discobeta has not written it" in capsys.readouterr().err
    assert page_of(made).read_text() == "mine"


def test_a_strict_page_needs_every_run(undrawn):
    made = study(arms=["baseline"], stages=["rm"], seeds=[1, 2])
    fill(made, skip=lambda run: run.seed == 2)
    assert main(["page", "--strict", "--configfile", config_of(made)]) == 2
    assert not page_of(made).exists()


def test_a_page_of_drawn_figures_needs_them(capsys):
    made = study(arms=["baseline"], stages=["rm"], seeds=[1])
    fill(made)
    assert main(["page", "--drawn", "--configfile", config_of(made)]) == 2
    assert "is not there: `discobeta figures` draws it" in capsys.readouterr().err
    assert not page_of(made).exists()


def test_every_text_beside_a_table_or_figure_is_there():
    for row in (*outputs.TABLES, *outputs.FIGURES):
        assert (page.CAPTIONS / f"{row.caption}.rst").is_file()
