"""Tables from run directories written by hand; expected text in tests/golden, checked by hand.

The golden study has two seeds, so s / sqrt(2) is half the difference of its two values and the
half-width is 12.706 (t of one degree of freedom) times that: values 0.02 apart give 0.127.
"""

import csv
import io
import math
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from report_study import evaluate, finish, reseal, results, study

from discobeta import report
from discobeta.design.arms import FLAGS
from discobeta.files import write_sealed
from discobeta.report import neutrality, tables
from discobeta.report.collect import collect, provenance
from discobeta.report.measures import METRICS
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


@pytest.mark.parametrize("ending", ["md", "tex"])
def test_golden_stage_table(ending):
    made = golden_study()
    tables.write(results(made))
    assert (made.directory / "tables" / f"rm.{ending}").read_text() == (GOLDEN / f"rm.{ending}").read_text()


def golden_ppo_study():
    """PPO in a study that proves: whole runs of the arms without idle heads, one proof missing, one that differs.

    The two values of a metric are 0.02 apart in seeds 1 and 2, so half-widths are 0.127; gains are
    0.5 and 0.9 (mean 0.7, half-width 12.706 * 0.4 / 2 = 2.541) by one reward model, 40 and 44 by the other.
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


@pytest.mark.parametrize("ending", ["md", "tex"])
def test_golden_table_of_ppo(ending):
    made = golden_ppo_study()
    tables.write(results(made))
    assert (made.directory / "tables" / f"ppo.{ending}").read_text() == (GOLDEN / f"ppo.{ending}").read_text()


def test_golden_stage_table_as_csv_with_all_digits():
    made = golden_study()
    tables.write(results(made))
    actual = pd.read_csv(made.directory / "tables" / "rm.csv")
    pd.testing.assert_frame_equal(actual, pd.read_csv(GOLDEN / "rm.csv"), rtol=1e-12)
    assert actual.accuracy_ci95[0] == pytest.approx(0.1270620473617, abs=1e-12)


def rows_of(made, stage="dpo"):
    """Markdown rows of the first panel of a stage table, as lists of cells, by their four flags."""
    tables.write(results(made))
    text = (made.directory / "tables" / f"{stage}.md").read_text()
    lines = text.split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    header = cells[0]
    return {tuple(row[:4]): dict(zip(header, row, strict=True)) for row in cells[2:]}


NO, YES = "no", "yes"
BASELINE = (NO, NO, NO, NO)
DISCO_IDLE = (YES, NO, NO, NO)
BETA_IDLE = (NO, NO, YES, NO)
DISCO = (YES, YES, NO, NO)


def test_every_stage_table_shows_all_16_cells_with_their_status():
    made = study()
    finish_all(made)
    for stage, trained, same, refused in (("rm", 3, 6, 7), ("dpo", 9, 0, 7), ("ppo", 9, 0, 7)):
        rows = rows_of(made, stage)
        status = [row["Status"] for row in rows.values()]
        assert len(rows) == 16
        assert [status.count(word) for word in ("run", "same as", "refused")] == [trained, same, refused]
        assert list(next(iter(rows.values())))[:4] == list(FLAGS)
    assert rows_of(made, "rm")[BETA_IDLE]["Arm"] == "baseline"
    assert rows_of(made, "rm")[(NO, YES, NO, NO)]["Accuracy ↑"] == "–"


def test_csv_has_true_and_false_and_its_provenance_in_columns():
    made = study()
    finish_all(made)
    tables.write(results(made))
    rows = list(csv.DictReader((made.directory / "tables" / "dpo.csv").open()))
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
    assert rows[DISCO]["Accuracy ↑"] == "0.700 ± 0.000 (2 of 3)"
    assert rows[BASELINE]["Status"] == "missing"
    assert rows[BASELINE]["Seeds"] == "0 of 3"
    assert rows[BASELINE]["Accuracy ↑"] == "–"
    text = (made.directory / "tables" / "dpo.md").read_text()
    assert "baseline: seeds 1, 2, 3 (not trained)" in text
    assert "disco-used_beta-absent: seed 2 (not trained)" in text
    frame = pd.read_csv(made.directory / "tables" / "dpo.csv").set_index(list(FLAGS))
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
    row = rows_of(made)[BASELINE]
    assert (row["Seeds"], row["Accuracy ↑"], row["ECE ↓"]) == ("2", "0.700 ± 0.000", "0.010 (1 of 2)")


def test_one_seed_shows_no_interval_and_says_so():
    made = study(seeds=[7])
    finish_all(made)
    assert rows_of(made)[BASELINE]["Accuracy ↑"] == "0.700"
    assert "No cell has more than one seed: there is no interval" in (made.directory / "tables" / "dpo.md").read_text()


def test_metrics_that_no_run_has_are_left_out():
    made = study()
    finish_all(made, {"accuracy": 0.7, "kl_per_sequence": 1.5})
    row = rows_of(made)[BASELINE]
    assert "Accuracy ↑" in row
    assert "NLL ↓" not in row
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


def proving_study(**settings):
    return study(stages=["dpo"], idle_arms="prove", prove_steps=5, **settings)


def test_a_proved_arm_shows_its_twins_numbers():
    made = proving_study()
    finish_all(made)
    row = rows_of(made)[DISCO_IDLE]
    assert row["Status"] == "proved = baseline (first 5 steps)"
    assert row["Accuracy ↑"] == "0.700 ± 0.000"
    assert rows_of(made)[DISCO]["Status"] == "run"


def test_a_proof_of_some_seeds_says_of_how_many():
    made = proving_study()
    finish_all(made, but={("disco-idle_beta-absent", 2)})
    assert rows_of(made)[DISCO_IDLE]["Status"] == "proved = baseline (first 5 steps; 1 of 2 seeds)"


def test_a_missing_proof_shows_no_numbers():
    made = proving_study()
    finish_all(made, but={("disco-idle_beta-absent", 1), ("disco-idle_beta-absent", 2)})
    row = rows_of(made)[DISCO_IDLE]
    assert (row["Status"], row["Accuracy ↑"]) == ("proof missing", "–")


def test_a_failed_proof_shows_no_numbers_and_the_byte():
    made = proving_study()
    finish_all(made, but={("disco-idle_beta-absent", 2)})
    finish(made, made.run("dpo", "disco-idle_beta-absent", 2, proof=True), None, weights=b"weighty")
    row = rows_of(made)[DISCO_IDLE]
    assert (row["Status"], row["Accuracy ↑"]) == ("DIFFERS from baseline", "–")
    neutrality = pd.read_csv(made.directory / "tables" / "neutrality.csv")
    bad = neutrality[(neutrality.arm == "disco-idle_beta-absent") & (neutrality.seed == 2)].iloc[0]
    assert bad.weights == "differs at byte 6 (of 7, of 7 bytes)"  # "weights" and "weighty"
    assert bad.result == "differs"


def test_a_proof_is_in_no_mean_and_in_the_cost():
    made = proving_study(seeds=[1])
    for run in made.runs():
        finish(made, run, {"accuracy": 0.1 if run.proof else 0.7}, cost={"seconds": 2.0 if run.proof else 10.0})
    assert rows_of(made)[BASELINE]["Accuracy ↑"] == "0.700"
    assert len(collect(results(made))) == 4 * 3  # four whole runs: accuracy and two costs each
    cost = pd.read_csv(made.directory / "tables" / "cost.csv").set_index("work")
    assert cost.seconds["baseline, first 5 steps"] == 2
    # 4 whole runs of 10 s, evaluated for 1 s each; 5 idle proofs of 2 s and those of 3 twins, which nobody measures
    assert cost.total_seconds["all of it"] == 4 * 11 + 8 * 2


def test_a_proof_of_ppo_is_counted_in_updates():
    """9 optimiser steps are 3 updates of 4 each (the default: 4 epochs over a buffer of one batch)."""
    made = study(idle_arms="prove", prove_steps=9)
    finish_all(made)
    assert rows_of(made, "ppo")[DISCO_IDLE]["Status"] == "proved = baseline (first 3 updates)"
    assert rows_of(made, "dpo")[DISCO_IDLE]["Status"] == "proved = baseline (first 9 steps)"
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
    assert "| disco-idle_beta-absent | baseline               | 1, 2, 3 |" in text


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
    assert "| disco-idle_beta-absent | baseline               | 1, 2  |" in text


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


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
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
    header, row = (line for line in (directory / "rm.md").read_text().splitlines()[2:5:2])
    assert header.split("|")[-2].strip() == "KL(truth ‖ model) ↓"
    assert row.split("|")[-2].strip() == "0.0716 ± 0.0191"  # 12.706 * .003 / 2
    assert r"\shortstack{KL(truth $\|$\\model)~$\downarrow$} \\" in (directory / "rm.tex").read_text()


def test_post_hoc_fits_stand_in_the_row_of_the_run_that_they_were_made_of():
    made = study(stages=["rm"])
    for run in made.runs():
        fits = {"posthoc": {"sigma": {"excess_kl": 0.0412}}} if run.arm.name == "baseline" else {}
        finish(made, run, {"nll": 0.5, "calibration": {"nll": 0.4975}} | fits)
    tables.write(results(made))
    panel = (made.directory / "tables" / "rm.md").read_text().split("**")[4]
    header, _, *rows = (line.split("|") for line in panel.strip().splitlines() if line.startswith("|"))
    assert [title.strip() for title in header[-3:-1]] == ["NLL ↓", "KL, post-hoc σ ↓"]
    of_arm = {row[6].strip(): [cell.strip() for cell in row[-3:-1]] for row in rows if row[5].strip() == "run"}
    assert of_arm["baseline"] == ["0.4975 ± 0.0000", "0.0412 ± 0.0000"]
    assert of_arm["disco-used_beta-absent"] == ["0.4975 ± 0.0000", "–"]


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
    assert header[-3:-1] == ["KL(votes ‖ model) ↓", "ρ(σ, disagreement) ↑"] and row[-3:-1] == ["0.3000 ± 0.6353", "–"]
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
    assert [path.stem for path in paths] == ["comparisons", "cost", "dpo", "effects", "neutrality", "ppo", "rm"]
    for path in paths:
        text = path.read_text()
        assert text.isascii()
        for block in text.split(r"\begin{tabular}{")[1:]:
            columns = block.index("}")
            body = block.split(r"\midrule")[1].split(r"\bottomrule")[0]
            rows = [line for line in body.splitlines() if line.endswith(r"\\")]
            assert rows
            assert {line.replace(r"\&", "").count("&") for line in rows} == {columns - 1}


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
def test_latex_compiles():
    inputs = "".join(rf"\input{{{path}}}" for path in all_tables())
    document = rf"\documentclass{{article}}\usepackage{{booktabs,graphicx}}\begin{{document}}{inputs}\end{{document}}"
    Path("paper.tex").write_text(document)
    done = subprocess.run(["pdflatex", "-halt-on-error", "paper.tex"], capture_output=True, text=True)
    if "booktabs.sty' not found" in done.stdout:
        pytest.skip("no booktabs here")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull \\hbox" not in done.stdout


def test_tables_do_not_change_when_they_are_written_again():
    made = golden_study()
    tables.write(results(made))
    first = {path.name: path.read_bytes() for path in (made.directory / "tables").iterdir()}
    tables.write(results(made))
    assert first == {path.name: path.read_bytes() for path in (made.directory / "tables").iterdir()}
    assert io.BytesIO(first["metrics.csv"]).readline() == b"stage,arm,variant,seed,metric,value\n"
