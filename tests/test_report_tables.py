"""Tables from run directories written by hand; expected text in tests/golden, checked by hand.

The golden study has two seeds, so its tables show both values beside their mean. In the CSV s / sqrt(2) is half the
difference of the two and the half-width is 12.706 (t of one degree of freedom) times that: 0.127 of values 0.02 apart.
"""

import csv
import io
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from report_study import evaluate, finish, reseal, results, study

from discobeta import report
from discobeta.design.arms import FLAGS
from discobeta.files import write_sealed
from discobeta.report import neutrality, tables
from discobeta.report.collect import collect, provenance
from discobeta.report.estimates import estimate
from discobeta.report.measures import MEASURES
from discobeta.report.render import Column, Panel, Table, escape, number

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finish_all(of, metrics=None, *, but=(), **options):
    """Finish every run of a study; `but` names (arm, seed) that are left out."""
    for run in of.runs():
        if (run.arm.name, run.seed) not in but:
            finish(of, run, None if run.proof else metrics or {"accuracy": 0.7}, **options)


def golden_study():
    """Reward models: all seeds of the baseline and of Disco, one of two seeds of the idle arm."""
    made = study(stages=["rm"])
    values = {
        ("baseline", 1): {"accuracy": 0.70, "nll": 0.60},
        ("baseline", 2): {"accuracy": 0.72, "nll": 0.58},
        ("disco-idle_beta-absent", 1): {"accuracy": 0.70, "nll": 0.60},
        ("disco-used_beta-absent", 1): {"accuracy": 0.75, "nll": 0.50, "mean_log_sigma": -0.03},
        ("disco-used_beta-absent", 2): {"accuracy": 0.75, "nll": 0.54, "mean_log_sigma": -0.01},
    }
    for run in made.runs():
        if metrics := values.get((run.arm.name, run.seed)):
            shared = {"bayes_accuracy": 0.74 + 0.02 * run.seed}  # 0.76 and 0.78: 0.770
            finish(made, run, metrics | shared | {"examples": 100, "by_topic": {"a": {"nll": 0.5}}})
    return made


@pytest.mark.parametrize("name", ["rm.md", "rm.tex", "rm-grid.md"])
def test_golden_stage_table(name):
    made = golden_study()
    tables.write(results(made))
    assert (made.directory / "tables" / name).read_text() == (GOLDEN / name).read_text()


def golden_ppo_study():
    """PPO in a study that proves: whole runs of the arms without idle heads, one proof missing, one that differs.

    The two values of a metric are 0.02 apart in seeds 1 and 2; gains are 0.5 and 0.9 (mean 0.7) by one reward model,
    40 and 44 by the other.
    """
    made = study(stages=["rm", "dpo", "ppo"], idle_arms="prove", prove_steps=9, ppo={"ppo_epochs": 2})
    for run in made.runs():
        if run.stage != "ppo":
            finish(made, run, None)
            continue
        if (run.arm.name, run.seed) == ("disco-idle_beta-absent", 2):
            continue
        if run.proof:
            finish(made, run, None, weights=b"weighty" if run.arm.name == "disco-used_beta-idle" else b"weights")
            continue
        later, by_another_judge = run.seed - 1, "disco" in run.arm.used
        metrics = {
            "generations": 800,
            "kl_per_sequence": 1.00 + 0.02 * later,
            "reward_gain": 40 + 4 * later if by_another_judge else 0.5 + 0.4 * later,
            "reward": -1.5,
            "reference_reward": -2.0,
            "true_reward": 1.70 + 0.02 * later,
            "reference_true_reward": 1.10 + 0.20 * later,
            "win_rate": 0.75,
            "well_formed": 0.95,
            "response_length": 8.3,
            "eos_rate": 1.0,
            "true_reward_by_topic": {"wine": 1.5},
        }
        if "beta" in run.arm.used:
            metrics |= {"mean_log_s": -0.01, "sd_log_s": 0.20, "log_s_noise": -0.50, "log_s_familiarity": 0.10}
        finish(made, run, metrics)
    return made


@pytest.mark.parametrize("name", ["ppo.md", "ppo.tex", "ppo-grid.md"])
def test_golden_table_of_ppo(name):
    made = golden_ppo_study()
    tables.write(results(made))
    assert (made.directory / "tables" / name).read_text() == (GOLDEN / name).read_text()


def test_golden_stage_table_as_csv_with_all_digits():
    made = golden_study()
    tables.write(results(made))
    actual = pd.read_csv(made.directory / "tables" / "rm.csv")
    pd.testing.assert_frame_equal(actual, pd.read_csv(GOLDEN / "rm.csv"), rtol=1e-12)
    assert actual.accuracy_ci95[0] == pytest.approx(0.1270620473617, abs=1e-12)


def panels(text):
    """Of the Markdown of a table, each panel's rows: header -> cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def written(made, name):
    tables.write(results(made))
    return panels((made.directory / "tables" / f"{name}.md").read_text())


def arms_of(made, stage="dpo"):
    """Rows of the first panel of the stage's table, by the arm's label."""
    return {row["Arm"]: row for row in written(made, stage)[0]}


def rows_of(made, stage="dpo"):
    """Rows of the table of the whole grid by their four flags: what became of each, and the numbers of its arm."""
    cells, *numbers = written(made, f"{stage}-grid")
    by_arm = {row["Arm"]: row for row in (numbers[0] if numbers else [])}
    return {
        tuple(row[flag] for flag in FLAGS): {"Accuracy\u00a0↑": "–"} | by_arm.get(row["Arm"], {}) | row for row in cells
    }


NO, YES = "no", "yes"
BASELINE = (NO, NO, NO, NO)
DISCO_IDLE = (YES, NO, NO, NO)
BETA_IDLE = (NO, NO, YES, NO)
DISCO = (YES, YES, NO, NO)


def test_the_table_of_the_grid_shows_all_16_cells_with_their_status():
    made = study()
    finish_all(made)
    for stage, trained, same, refused in (("rm", 3, 6, 7), ("dpo", 9, 0, 7), ("ppo", 9, 0, 7)):
        rows = rows_of(made, stage)
        status = [row["Status"] for row in rows.values()]
        assert len(rows) == 16
        assert [status.count(word) for word in ("run", "same as", "refused")] == [trained, same, refused]
    assert rows_of(made, "rm")[BETA_IDLE]["Arm"] == "baseline"
    assert rows_of(made, "rm")[(NO, YES, NO, NO)]["Accuracy\u00a0↑"] == "–"


def test_csv_has_true_and_false_and_its_provenance_in_columns():
    made = study()
    finish_all(made)
    tables.write(results(made))
    rows = list(csv.DictReader((made.directory / "tables" / "dpo-grid.csv").open()))
    assert len(rows) == 16
    assert [rows[0][flag] for flag in FLAGS] == ["False"] * 4
    assert [rows[15][flag] for flag in FLAGS] == ["True"] * 4
    made_by = {"study": "fixture", "seeds": "1 2", "commit": "0123456789ab", "version": "9.8.7"}
    assert made_by.items() <= rows[0].items()
    config = (made.directory / "tables" / "config.yaml").read_bytes()
    import hashlib

    assert rows[0]["config"] == hashlib.sha256(config).hexdigest()[:12]


def test_a_missing_run_is_named_and_its_cell_says_how_many_seeds_it_has():
    made = study(seeds=[1, 2, 3])
    finish_all(made, but={("disco-used_beta-absent", 2), ("baseline", 1), ("baseline", 2), ("baseline", 3)})
    rows = rows_of(made)
    assert rows[DISCO]["Seeds"] == "2 of 3"
    assert rows[DISCO]["Accuracy\u00a0↑"] == "0.700 (0.700, –, 0.700)"
    assert rows[BASELINE]["Status"] == "missing"
    assert rows[BASELINE]["Seeds"] == "0 of 3"
    assert rows[BASELINE]["Accuracy\u00a0↑"] == "–"
    text = (made.directory / "tables" / "dpo.md").read_text()
    assert "baseline: seeds 1–3 (not trained)" in text
    assert "disco-used_beta-absent: seed 2 (not trained)" in text
    frame = pd.read_csv(made.directory / "tables" / "dpo-grid.csv").set_index(list(FLAGS))
    assert str(frame.missing_seeds[(True, True, False, False)]).rstrip(".0") == "2"


def test_a_run_that_is_trained_and_not_evaluated_says_so():
    made = study()
    finish_all(made, but={("baseline", 2)})
    finish(made, made.run("dpo", "baseline", 2), None)
    rows_of(made)
    assert "baseline: seed 2 (not evaluated)" in (made.directory / "tables" / "dpo.md").read_text()


def test_a_metric_that_one_seed_lacks_is_marked_in_its_cell_only():
    made = study(stages=["dpo"])
    for run in made.runs():
        finish(made, run, {"accuracy": 0.7} | ({"ece": 0.01} if run.seed == 1 else {}))
    row = arms_of(made)["baseline"]
    assert (row["Accuracy\u00a0↑"], row["ECE\u00a0↓"]) == ("0.700 (0.700, 0.700)", "0.010 (0.010, –)")
    assert "Seeds" not in row  # every arm has all of them


def test_one_seed_shows_no_interval_and_says_so():
    made = study(seeds=[7])
    finish_all(made)
    assert rows_of(made)[BASELINE]["Accuracy\u00a0↑"] == "0.700"
    assert "One seed: there is no interval" in (made.directory / "tables" / "dpo.md").read_text()


def test_from_six_seeds_on_there_is_an_interval_and_below_there_are_the_seeds():
    """.1 and .3, three times each: mean .2, sd .1 * sqrt(6/5), t of five degrees 2.5706: half-width .115."""
    for seeds, text in ((6, "0.200 ± 0.115"), (5, "0.180 (0.100, 0.300, 0.100, 0.300, 0.100)")):
        made = study(study=f"of-{seeds}", stages=["rm"], arms=["baseline"], seeds=list(range(seeds)))
        for run in made.runs():
            finish(made, run, {"accuracy": 0.3 if run.seed % 2 else 0.1})
        assert arms_of(made, "rm")["baseline"]["Accuracy\u00a0↑"] == text
    caption = (made.directory / "tables" / "rm.md").read_text().splitlines()[0]
    assert "the value of each (seeds 0, 1, 2, 3, 4)" in caption and "±" not in caption


@pytest.mark.parametrize(
    ("values", "seeds", "said", "text"),
    [
        ({}, [1, 2], None, "–"),
        ({7: 0.5}, [7], None, "0.500"),
        ({2: 0.5}, [1, 2], None, "0.500 (–, 0.500)"),
        ({3: 0.5}, list(range(8)), None, "0.500 (1 of 8)"),
        ({3: 0.5, 5: 0.25}, list(range(8)), None, "0.375 (0.500, 0.250; 2 of 8)"),
        ({3: 0.5, 5: 0.25}, list(range(8)), 2, "0.375 (0.500, 0.250)"),
        (dict.fromkeys(range(7), 0.5), list(range(8)), None, "0.500 ± 0.000 (7 of 8)"),
        (dict.fromkeys(range(7), 0.5), list(range(8)), 7, "0.500 ± 0.000"),
    ],
)
def test_an_estimate_says_which_seeds_it_has(values, seeds, said, text):
    assert estimate(values, seeds, 3, said) == text


def test_no_column_and_no_row_of_a_later_panel_is_all_dashes():
    rows = [{"of": "a", "x": "1", "y": "–", "z": "–"}, {"of": "b", "x": "–", "y": "–", "z": "2"}]
    of, x, y, z = (Column(name, lambda row, name=name: row[name]) for name in ("of", "x", "y", "z"))
    made = Table(pd.DataFrame(rows), [Panel("1", [of, x, y]), Panel("2", [of, y, z]), Panel("3", [of, y])], [], {})
    assert [(panel.caption, panel.cells()) for panel in made.panels] == [
        ("1", (["of", "x"], [["a", "1"], ["b", "–"]])),
        ("2", (["of", "z"], [["b", "2"]])),
    ]


def test_the_table_of_a_stage_has_the_arms_that_are_used_by_name_and_says_which_are_one_run():
    made = study(idle_arms="prove")
    finish_all(made)
    assert list(arms_of(made)) == ["baseline", "LeDPO", "Disco", "Disco + LeDPO"]
    assert list(arms_of(made, "rm")) == ["baseline", "Disco"]
    assert (
        "Arms with LeDPO are the runs of those without it: a reward model has no reference"
        in (made.directory / "tables" / "rm.md").read_text()
    )
    assert pd.read_csv(made.directory / "tables" / "dpo.csv").arm.tolist() == [
        "baseline", "disco-absent_beta-used", "disco-used_beta-absent", "disco-used_beta-used",
    ]  # fmt: skip


def test_a_study_of_idle_arms_alone_has_an_empty_table_that_says_where_they_are():
    made = study(stages=["dpo"], arms=["disco-idle_beta-absent"])
    finish_all(made)
    assert written(made, "dpo") == [[]]
    assert "see the table dpo-grid" in (made.directory / "tables" / "dpo.md").read_text()
    assert rows_of(made)[DISCO_IDLE]["Accuracy\u00a0↑"] == "0.700 (0.700, 0.700)"


def test_metrics_that_no_run_has_are_left_out():
    made = study()
    finish_all(made, {"accuracy": 0.7, "kl_per_sequence": 1.5})
    assert list(arms_of(made)["baseline"]) == ["Arm", "Accuracy\u00a0↑"]
    text = (made.directory / "tables" / "dpo.md").read_text()
    assert "KL to reference" in text
    assert "what the heads" not in text


def test_arms_that_the_study_leaves_out_are_not_called_missing():
    made = study(arms=["baseline", "disco-used_beta-absent"])
    finish_all(made)
    rows = rows_of(made)
    assert rows[BETA_IDLE]["Status"] == "not in this study"
    assert rows[DISCO]["Status"] == "run"
    assert "Missing" not in (made.directory / "tables" / "dpo.md").read_text()
    assert "no arm with an idle head" in (made.directory / "tables" / "neutrality.md").read_text()


def test_a_study_of_which_nothing_is_there_has_all_its_outputs():
    made = study()
    report.write(results(made))
    assert rows_of(made)[BASELINE]["Status"] == "missing"
    # per seed 1 idle arm of rm and 5 of dpo and ppo each
    assert "0 of 22 idle runs" in (made.directory / "tables" / "neutrality.md").read_text()
    assert "commit unknown" in (made.directory / "tables" / "cost.md").read_text()
    assert "KL to" not in (made.directory / "tables" / "ppo.md").read_text()
    for figure in ("reliability-rm", "reliability-dpo", "learning-curves-ppo"):
        assert (made.directory / "figures" / f"{figure}.pdf").stat().st_size > 1000


# --- proved arms


def status(made, stage, flags):
    """What the CSV of the grid, as it was written, says of a cell."""
    frame = pd.read_csv(made.directory / "tables" / f"{stage}-grid.csv").set_index(list(FLAGS))
    return frame.status[tuple(flag == YES for flag in flags)]


def proving_study(**settings):
    return study(stages=["dpo"], idle_arms="prove", prove_steps=5, **settings)


def test_a_proved_arm_shows_its_twins_numbers():
    made = proving_study()
    finish_all(made)
    row = rows_of(made)[DISCO_IDLE]
    assert (row["Status"], row["Arm"]) == ("proved", "baseline, idle Disco Head")
    assert row["Accuracy\u00a0↑"] == "0.700 (0.700, 0.700)"
    assert rows_of(made)[DISCO]["Status"] == "run"
    assert status(made, "dpo", DISCO_IDLE) == "proved = baseline (first 5 steps)"
    assert "first 5 steps only and equalled" in (made.directory / "tables" / "dpo-grid.md").read_text()


def test_a_proof_of_some_seeds_says_of_how_many():
    made = proving_study()
    finish_all(made, but={("disco-idle_beta-absent", 2)})
    assert rows_of(made)[DISCO_IDLE]["Status"] == "proved, 1 of 2 seeds"
    assert status(made, "dpo", DISCO_IDLE) == "proved = baseline (first 5 steps; 1 of 2 seeds)"


def test_a_missing_proof_shows_no_numbers():
    made = proving_study()
    finish_all(made, but={("disco-idle_beta-absent", 1), ("disco-idle_beta-absent", 2)})
    row = rows_of(made)[DISCO_IDLE]
    assert (row["Status"], row["Accuracy\u00a0↑"]) == ("proof missing", "–")


def test_a_failed_proof_shows_no_numbers_and_the_byte():
    made = proving_study()
    finish_all(made, but={("disco-idle_beta-absent", 2)})
    finish(made, made.run("dpo", "disco-idle_beta-absent", 2, proof=True), None, weights=b"weighty")
    row = rows_of(made)[DISCO_IDLE]
    assert (row["Status"], row["Accuracy\u00a0↑"]) == ("DIFFERS", "–")
    assert status(made, "dpo", DISCO_IDLE) == "DIFFERS from baseline"
    neutrality = pd.read_csv(made.directory / "tables" / "neutrality.csv")
    bad = neutrality[(neutrality.arm == "disco-idle_beta-absent") & (neutrality.seed == 2)].iloc[0]
    assert bad.weights == "differs at byte 6 (of 7, of 7 bytes)"  # "weights" and "weighty"
    assert bad.result == "differs"


def test_a_proof_is_in_no_mean_and_in_the_cost():
    made = proving_study(seeds=[1])
    for run in made.runs():
        finish(made, run, {"accuracy": 0.1 if run.proof else 0.7}, cost={"seconds": 2.0 if run.proof else 10.0})
    assert rows_of(made)[BASELINE]["Accuracy\u00a0↑"] == "0.700"
    assert len(collect(results(made))) == 4 * 3  # four whole runs: accuracy and two costs each
    cost = pd.read_csv(made.directory / "tables" / "cost.csv").set_index("work")
    assert cost.seconds["baseline, first 5 steps"] == 2
    # 4 whole runs of 10 s, evaluated for 1 s each; 5 idle proofs of 2 s and those of 3 twins, which nobody measures
    assert cost.total_seconds["all of it"] == 4 * 11 + 8 * 2


def test_a_proof_of_ppo_is_counted_in_updates():
    """9 optimiser steps are 3 updates of 4 each (the default: 4 epochs over a buffer of one batch)."""
    made = study(idle_arms="prove", prove_steps=9)
    finish_all(made)
    tables.write(results(made))
    assert status(made, "ppo", DISCO_IDLE) == "proved = baseline (first 3 updates)"
    assert status(made, "dpo", DISCO_IDLE) == "proved = baseline (first 9 steps)"
    for table in ("neutrality", "cost"):
        text = (made.directory / "tables" / f"{table}.md").read_text()
        assert ("first 3 updates" in text, "first 9 steps" in text) == (True, True)
        assert [line for line in text.splitlines() if line.startswith("| ppo") and "steps" in line] == []


def test_neutrality_counts_proofs_as_proofs():
    made = study(idle_arms="prove", seeds=[1, 2, 3])
    finish_all(made)
    tables.write(results(made))
    text = (made.directory / "tables" / "neutrality.md").read_text()
    assert (
        "33 of 33 proofs of an idle head equal their twin's byte for byte. A proof is trained" in text
    )  # 1 + 5 + 5 arms
    rows = [(row["Idle arm"], row["Twin"], row["Seeds"]) for row in panels(text)[0]]
    assert ("baseline, idle Disco Head", "baseline", "1–3") in rows
    assert {"Metrics", "Examples"} & set(panels(text)[0][0]) == set()  # of which proofs have none


# --- ppo


def test_rewards_of_two_reward_models_are_not_compared_without_a_word():
    made = study(stages=["rm", "dpo", "ppo"])
    for run in made.runs():
        finish(made, run, {"reward_gain": 0.5} if run.stage == "ppo" else {"accuracy": 0.7})
    tables.write(results(made))
    said = {
        stage: "two different ones" in (made.directory / "tables" / f"{stage}.md").read_text() for stage in made.stages
    }
    assert said == {"rm": False, "dpo": False, "ppo": True}
    assert "predicted" not in (made.directory / "tables" / "ppo.md").read_text()  # no pairs, no panel of predictions


# --- neutrality


def test_neutrality_counts_equal_different_and_missing_runs():
    made = study(stages=["dpo"])
    finish_all(made, but={("disco-idle_beta-idle", 2), ("disco-used_beta-absent", 1)})
    evaluate(made.run("dpo", "disco-idle_beta-used", 1).directory, {"accuracy": 0.8})
    tables.write(results(made))
    frame = pd.read_csv(made.directory / "tables" / "neutrality.csv").set_index(["arm", "seed"])
    assert len(frame) == 5 * 2
    assert frame.result.value_counts().to_dict() == {"equal": 7, "missing": 2, "differs": 1}
    # `{⏎ "accuracy": 0.7⏎}⏎` and the same with 0.8 differ in the digit behind 17 characters
    assert frame.metrics["disco-idle_beta-used", 1] == "differs at byte 17 (of 21, of 21 bytes)"
    assert frame.weights["disco-idle_beta-idle", 2] == "missing"
    assert frame.weights["disco-used_beta-idle", 1] == "twin missing"
    text = (made.directory / "tables" / "neutrality.md").read_text()
    assert "7 of 10 idle runs equal their twin byte for byte; different: 1; not comparable" in text
    rows = [(row["Idle arm"], row["Twin"], row["Seeds"]) for row in panels(text)[0]]
    assert ("baseline, idle Disco Head", "baseline", "1, 2") in rows


@pytest.mark.parametrize(
    ("unfinished", "verdict"), [("disco-idle_beta-absent", "missing"), ("baseline", "twin missing")]
)
def test_unfinished_runs_are_missing_and_neither_equal_nor_different(unfinished, verdict):
    made = study(stages=["dpo"], seeds=[1], arms=["baseline", "disco-idle_beta-absent"])
    finish_all(made)
    (made.run("dpo", unfinished, 1).directory / "provenance.json").unlink()
    row = neutrality.neutrality_frame(results(made)).iloc[0]
    assert (row.weights, row.log, row.result) == (verdict, verdict, "missing")


def test_proofs_are_compared_with_proofs_and_not_with_whole_runs():
    made = proving_study()
    for run in made.runs():
        finish(made, run, None if run.proof else {"accuracy": 0.7}, weights=b"proof" if run.proof else b"whole")
    assert set(neutrality.neutrality_frame(results(made)).weights) == {"equal"}


def test_runs_that_are_not_evaluated_do_not_count_as_equal():
    made = study(stages=["dpo"], seeds=[1], arms=["baseline", "disco-idle_beta-absent"])
    for run in made.runs():
        finish(made, run, None)
    row = neutrality.neutrality_frame(results(made)).iloc[0]
    assert (row.weights, row.metrics, row.result) == ("equal", "missing", "missing")


def test_an_idle_arm_whose_twin_is_not_trained_cannot_be_compared():
    made = study(stages=["dpo"], seeds=[1], arms=["disco-idle_beta-absent"])
    finish_all(made)
    row = neutrality.neutrality_frame(results(made)).iloc[0]
    assert (row.weights, row.result) == ("twin not in this study", "missing")


# --- cost


def test_cost_sums_what_is_there_and_lists_shared_work_once():
    made = study(stages=["dpo"], arms=["baseline", "disco-used_beta-absent"], dpo={"num_eval_generations": 9})
    for run in made.runs():
        seconds = {"baseline": 100.0, "disco-used_beta-absent": 150.0}[run.arm.name]
        cost = {"seconds": seconds, "gpu_seconds": seconds, "tokens_per_second": 500, "peak_memory_bytes": 2**31}
        if (run.arm.name, run.seed) != ("disco-used_beta-absent", 2):
            finish(made, run, {"accuracy": 0.7}, cost=cost, evaluation_seconds=20)
    reference = made.reference("all")
    reference.mkdir(parents=True)
    (reference / "cost.json").write_text('{"seconds": 30.0, "gpu_seconds": 1800.0}')
    write_sealed(reference / "reference.json", {"key": {"base": "b" * 64}, "sha256": {}})
    for (_, folder), made_from in zip(made.shared()[1:], ({"key": {"base": "b" * 64}}, {}), strict=True):
        folder.mkdir(parents=True)
        (folder / "cost.json").write_text('{"seconds": 7.0, "gpu_seconds": 0.0}')
        write_sealed(folder / "answers.json", made_from)  # the second is no record
    tables.write(results(made))
    frame = pd.read_csv(made.directory / "tables" / "cost.csv").set_index(["stage", "work"])
    assert frame.seconds["dpo", "baseline"] == 100
    assert frame.times_baseline["dpo", "disco-used_beta-absent"] == 1.5  # seed 1 against seed 1
    assert frame.evaluation_seconds["dpo", "baseline"] == 20
    assert frame.total_seconds["dpo", "baseline"] == 2 * (100 + 20)
    assert frame.gpu_hours["dpo", "baseline"] == pytest.approx(2 * 100 / 3600)
    assert frame.gpu_hours["dpo", "disco-used_beta-absent"] == pytest.approx(150 / 3600)
    assert frame.gpu_hours["shared", "reference"] == 0.5
    assert frame.total_seconds["total", "all of it"] == 2 * 120 + 170 + 30 + 7
    assert (frame.jobs["shared", "answers"], frame.jobs_expected["shared", "answers"]) == (1, 2)
    text = (made.directory / "tables" / "cost.md").read_text()
    assert "dpo, disco-used_beta-absent (seed 2)" in text
    assert "2.00" in text  # GiB


# --- collect


def test_collect_is_long_and_takes_numbers_only():
    made = study(stages=["rm"], seeds=[4], arms=["baseline"])
    metrics = {"accuracy": 0.7, "sigma_spearman": None, "fine": True, "by_topic": {"wine": {"nll": 0.5}}}
    finish(made, made.runs()[0], metrics, cost={"seconds": 3, "device": "cpu"}, evaluation_seconds=2)
    frame = collect(results(made))
    assert list(frame.columns) == ["stage", "arm", "variant", "seed", "metric", "value"]
    assert dict(zip(frame.metric, frame.value, strict=True)) == {
        "accuracy": 0.7, "by_topic/wine/nll": 0.5, "cost/seconds": 3, "evaluation_cost/seconds": 2,
    }  # fmt: skip
    assert set(zip(frame.stage, frame.arm, frame.seed, strict=True)) == {("rm", "baseline", 4)}


def test_provenance_names_every_commit_that_made_a_run():
    made = study(stages=["rm"])
    finish_all(made)
    first = made.runs()[0].directory
    other = {"versions": {"discobeta": "1.0"}, "machine": {"kernels": "AVX512"}}
    reseal(first, commit="fedcba9876543210", dirty=True, **other)
    made_by = provenance(results(made))
    assert made_by["commit"] == "0123456789ab, fedcba987654 (dirty)"
    assert made_by["version"] == "1.0, 9.8.7"
    assert made_by["kernels"] == "AVX2, AVX512"
    reseal(first, commit=None, dirty=None)
    assert provenance(results(made))["commit"] == "0123456789ab, unknown"


# --- printing


def test_numbers_have_a_true_minus_no_negative_zero_and_nothing_where_there_is_nothing():
    assert [number(x, 2) for x in (-0.5, -0.001, 1234.5, math.nan)] == ["−0.50", "0.00", "1,234.50", "–"]


def test_latex_escapes():
    assert escape("a_b & 5 % {x} #1 $") == r"a\_b \& 5 \% \{x\} \#1 \$"
    assert escape("\\ ~ ^") == r"\textbackslash{} \textasciitilde{} \textasciicircum{}"
    assert escape("−0.1 ± 0.2 ↑") == r"$-$0.1 $\pm$ 0.2 $\uparrow$"
    assert escape("p ‖ q") == r"p $\|$ q"


@pytest.mark.parametrize("metric", MEASURES.values(), ids=lambda metric: metric.name)
def test_every_title_of_a_metric_has_a_spelling_in_latex(metric):
    assert "?" not in escape(metric.header.replace("\n", " "))


def test_the_divergence_from_the_truth_is_a_column_of_all_three_files():
    made = study(stages=["rm"])
    for run in made.runs():
        finish(made, run, {"nll": 0.5, "excess_kl": 0.0731 if run.seed == 1 else 0.0701})
    tables.write(results(made))
    directory = made.directory / "tables"
    frame = pd.read_csv(directory / "rm.csv")
    assert frame.excess_kl[0] == pytest.approx(0.0716)
    row = panels((directory / "rm.md").read_text())[0][0]
    assert row["KL(truth ‖ model) (nats)\u00a0↓"] == "0.0716 (0.0731, 0.0701)"
    assert frame.excess_kl_ci95[0] == pytest.approx(12.7062 * 0.003 / 2, rel=1e-4)
    assert r"\shortstack{KL(truth $\|$\\model)\\(nats)~$\downarrow$} \\" in (directory / "rm.tex").read_text()


def test_what_is_undefined_in_a_seed_says_of_how_many_its_cell_is():
    """Post-hoc σ that is constant in seed 3 ranks nothing there: .5 of seeds 1, 2, 4, 5, 6 and .8 of seed 7."""
    data = {"dataset": "rows.jsonl", "eval_dataset": "held-out.jsonl", "calibration_dataset": "calibration.jsonl"}
    made = study(stages=["rm"], seeds=list(range(1, 8)), arms=["baseline"], data=data)
    for run in made.runs():
        fitted = {"nll": 0.4, "sigma_spearman": None if run.seed == 3 else 0.8 if run.seed == 7 else 0.5}
        finish(made, run, {"nll": 0.5, "accuracy": 0.7, "calibration": {"nll": 0.45}, "posthoc": {"sigma": fitted}})
    predictions, heads, calibration = written(made, "controls-rm")
    assert [row["Variant"] for row in predictions] == ["as in the grid", "post-hoc σ"]
    assert [row["NLL (nats)\u00a0↓"] for row in predictions] == ["0.5000 ± 0.0000", "0.4000 ± 0.0000"]
    assert [row["Accuracy\u00a0↑"] for row in predictions] == ["0.700 ± 0.000", "–"]
    # sd of five .5 and one .8 is .3 / sqrt(6), t of five degrees 2.5706: .55 ± 2.5706 * .3 / 6
    assert [list(row.values()) for row in heads] == [["baseline", "post-hoc σ", "0.550 ± 0.129 (6 of 7)"]]
    assert [row["Variant"] for row in calibration] == ["as in the grid"]
    assert (
        "(n of N): what is measured is undefined in the other seeds"
        in (made.directory / "tables" / "controls-rm.md").read_text()
    )


def test_what_votes_say_is_a_panel_of_its_own_and_a_note():
    made = study(stages=["rm"])
    for run in made.runs():
        votes = {"kl": 0.25 if run.seed == 1 else 0.35, "entropy": 0.4, "unanimous": 0.625, "pairs": 8}
        finish(made, run, {"nll": 0.5, "votes": votes | ({"sigma_spearman": 0.5} if run.arm.used else {})})
    tables.write(results(made))
    directory = made.directory / "tables"
    frame = pd.read_csv(directory / "rm.csv")
    assert frame["votes/kl"][0] == pytest.approx(0.3)
    text = (directory / "rm.md").read_text()
    panel = text[text.index("how the run agrees with several people who judged the same held-out pairs") :].splitlines()
    header, row = ([cell.strip() for cell in panel[number].split("|")] for number in (2, 4))
    assert header[-3:-1] == ["KL(votes ‖ model) (nats)\u00a0↓", "ρ(σ, disagreement)\u00a0↑"]
    assert row[-3:-1] == ["0.3000 (0.2500, 0.3500)", "–"]
    assert "mean entropy of the votes on a pair 0.400, share of the pairs with several votes that are unanimous" in text
    assert "votes/pairs" in set(pd.read_csv(directory / "metrics.csv").metric)


def test_one_frame_gives_three_formats():
    frame = pd.DataFrame({"arm": ["a_b"], "x": [0.123456], "g": [1]})
    columns = [
        Column("Arm", lambda row: row["arm"], is_number=False),
        Column("Of\n100 %", lambda row: number(row["x"], 2)),
    ]
    table = Table(frame, [Panel("A & B", columns)], ["Note_1"], {"study": "s"})
    assert table.csv() == "arm,x,g,study\na_b,0.123456,1,s\n"
    assert table.markdown() == ("**A & B**\n\n| Arm | Of 100 % |\n| --- | -------: |\n| a_b | 0.12     |\n\n- Note_1\n")
    latex = table.latex("t")
    assert r"\caption{A \& B}" in latex
    assert r"Arm & \shortstack{Of\\100 \%} \\" in latex
    assert "a\\_b & 0.12 \\\\" in latex
    assert r"Note\_1" in latex


def all_tables():
    made = study(study="under_score")
    finish_all(made, {"accuracy": 0.7, "mean_log_s": -0.01, "true_reward": 1.4}, but={("baseline", 2)})
    tables.write(results(made))
    return sorted((made.directory / "tables").glob("*.tex"))


def test_latex_rows_have_as_many_cells_as_their_header():
    paths = all_tables()
    assert sorted(path.stem for path in paths) == [
        "comparisons", "cost", "dpo", "dpo-grid", "effects", "neutrality", "ppo", "ppo-grid", "rm", "rm-grid",
    ]  # fmt: skip
    for path in paths:
        text = path.read_text()
        assert text.isascii()
        for block in text.split(r"\begin{tabular}{")[1:]:
            columns = block.index("}")
            body = block.split(r"\midrule")[1].split(r"\bottomrule")[0]
            rows = [line for line in body.splitlines() if line.endswith(r"\\")]
            assert rows
            assert {line.replace(r"\&", "").count("&") for line in rows} == {columns - 1}


def test_tables_do_not_change_when_they_are_written_again():
    made = golden_study()
    tables.write(results(made))
    first = {path.name: path.read_bytes() for path in (made.directory / "tables").iterdir()}
    tables.write(results(made))
    assert first == {path.name: path.read_bytes() for path in (made.directory / "tables").iterdir()}
    assert io.BytesIO(first["metrics.csv"]).readline() == b"stage,arm,variant,seed,metric,value\n"
