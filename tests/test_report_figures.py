"""What the figures draw, read back from their axes."""

import numpy as np
import pytest
from report_study import finish, study

from discobeta.report import figures

FAST = {"stages": ["dpo"], "seeds": [1, 2]}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def log_of(seed: int, worse: float = 0.0):
    """Two held-out measurements; those of seed 2 are 0.1 above those of seed 1."""
    shift = 0.1 * (seed - 1) + worse
    return (
        {"step": 1, "loss": 0.7 + shift, "accuracy": 0.5},
        {"step": 1, "eval_loss": 0.6 + shift, "eval_accuracy": 0.6},
        {"step": 2, "loss": 0.5 + shift, "accuracy": 0.8},
        {"step": 2, "eval_loss": 0.4 + shift, "eval_accuracy": 0.8},
    )


def lines(axes):
    """Lines with points, by colour and width."""
    return [line for line in axes.lines if len(line.get_xdata()) == 2 and list(line.get_xdata()) == [1, 2]]


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_learning_curves_are_means_over_seeds_and_paired_differences_to_the_baseline():
    made = study(arms=["baseline", "disco-used_beta-absent"], **FAST)
    for run in made.runs():
        finish(run, None, log=log_of(run.seed, worse=-0.02 * run.seed if run.arm.name != "baseline" else 0))
    figure = figures.learning_curves(made, "dpo")
    top, middle, bottom = figure.axes
    baseline = next(line for line in lines(top) if line.get_color() == "#4d4d4d" and line.get_linewidth() > 1)
    assert baseline.get_ydata() == pytest.approx([0.65, 0.45])
    (difference,) = lines(middle)
    assert difference.get_color() == "#0072B2"
    assert difference.get_ydata() == pytest.approx([-0.03, -0.03])  # mean of -0.02 and -0.04
    assert lines(bottom)[0].get_ydata() == pytest.approx([0.6, 0.8])
    assert labels(figure) == ["Baseline", "Disco", "training loss"]


def test_a_missing_seed_is_marked_and_not_compared_with_another_seed():
    made = study(arms=["baseline", "disco-used_beta-absent"], **FAST)
    for run in made.runs():
        if (run.arm.name, run.seed) != ("baseline", 2):
            finish(run, None, log=log_of(run.seed))
    figure = figures.learning_curves(made, "dpo")
    assert "Baseline (1 of 2 seeds)" in labels(figure)
    (difference,) = lines(figure.axes[1])
    assert difference.get_ydata() == pytest.approx([0, 0])  # seed 1 only; over both it would be 0.05
    assert "baseline: seed 2 (not trained)" in figure.texts[-1].get_text().replace("\n", " ")


def test_idle_arms_are_thin_dashes_on_their_twins():
    made = study(arms=["baseline", "disco-idle_beta-absent"], **FAST)
    for run in made.runs():
        finish(run, None, log=log_of(run.seed))
    figure = figures.learning_curves(made, "dpo")
    (dashes,) = [line for line in lines(figure.axes[0]) if line.get_color() == "black"]
    assert dashes.get_linewidth() < 1
    assert dashes.get_ydata() == pytest.approx([0.65, 0.45])
    assert "with an idle head" in labels(figure)


def test_runs_without_held_out_rows_in_their_log_show_training():
    made = study(arms=["baseline"], **FAST)
    for run in made.runs():
        finish(run, None, log=({"step": 1, "loss": 0.7, "accuracy": 0.5}, {"step": 2, "loss": 0.5, "accuracy": 0.7}))
    figure = figures.learning_curves(made, "dpo")
    assert figure.axes[0].get_ylabel().startswith("Training loss")
    assert lines(figure.axes[0])[0].get_ydata() == pytest.approx([0.7, 0.5])


def test_reliability_pools_seeds_and_folds_probabilities_onto_the_predicted_winner():
    made = study(arms=["baseline"], **FAST)
    # confidences .925 (right), .925 (wrong) | .925 (right), .525 (right): bins of .05 from .5
    for run, probability in zip(made.runs(), [(0.925, 0.075), (0.925, 0.525)], strict=True):
        finish(run, {"ece": 0.1 * run.seed}, probability=probability)
    figure = figures.reliability_diagram(made, "dpo")
    upper, lower = figure.axes
    curve = upper.containers[0].lines[0]
    assert curve.get_xdata() == pytest.approx([0.525, 0.925])
    assert curve.get_ydata() == pytest.approx([1, 2 / 3])
    bars = [(bar.get_x(), bar.get_height()) for bar in lower.patches]
    assert np.ravel(bars) == pytest.approx([0.5, 0.25, 0.9, 0.75])
    assert upper.texts[0].get_text() == "ECE 0.150\n4 pairs"


def test_an_arm_without_predictions_is_shown_as_missing():
    made = study(arms=["baseline", "disco-used_beta-absent"], **FAST)
    for run in made.runs():
        if run.arm.name == "baseline" and run.seed == 1:
            finish(run, {"ece": 0.1})
    figure = figures.reliability_diagram(made, "dpo")
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "missing" in texts
    assert any("1 of 2 seeds" in text for text in texts)


def test_figures_are_files_that_do_not_change_when_they_are_drawn_again():
    made = study(arms=["baseline"], **FAST)
    for run in made.runs():
        finish(run, {"ece": 0.1}, log=log_of(run.seed))
    folder = made.directory / "figures"
    figures.write(made)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == sorted(
        f"{name}-dpo.{ending}" for name in ("learning-curves", "reliability") for ending in ("pdf", "svg", "png")
    )
    figures.write(made)
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_loss_curve_of_one_run(tmp_path):
    run = finish(tmp_path / "run", None, log=log_of(1))
    with (run / "log.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')  # killed while writing
    figures.loss_curve(run / "log.jsonl", run / "loss.png")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    (run / "log.jsonl").write_text("")
    figures.loss_curve(run / "log.jsonl", run / "loss.png")
