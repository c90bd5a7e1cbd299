"""What the figures draw, read back from their axes."""

import numpy as np
import pytest
from report_study import finish, results, study, write_run

from discobeta.report import curves, figures

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
        finish(made, run, None, log=log_of(run.seed, worse=-0.02 * run.seed if run.arm.name != "baseline" else 0))
    figure = curves.loss_curves(results(made), "dpo")
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
            finish(made, run, None, log=log_of(run.seed))
    figure = curves.loss_curves(results(made), "dpo")
    assert "Baseline (1 of 2 seeds)" in labels(figure)
    (difference,) = lines(figure.axes[1])
    assert difference.get_ydata() == pytest.approx([0, 0])  # seed 1 only; over both it would be 0.05
    assert "baseline: seed 2 (not trained)" in figure.texts[-1].get_text().replace("\n", " ")


def test_idle_arms_are_thin_dashes_on_their_twins():
    made = study(arms=["baseline", "disco-idle_beta-absent"], **FAST)
    for run in made.runs():
        finish(made, run, None, log=log_of(run.seed))
    figure = curves.loss_curves(results(made), "dpo")
    (dashes,) = [line for line in lines(figure.axes[0]) if line.get_color() == "black"]
    assert dashes.get_linewidth() < 1
    assert dashes.get_ydata() == pytest.approx([0.65, 0.45])
    assert "with an idle head" in labels(figure)


@pytest.mark.parametrize(("stage", "draw"), [("dpo", curves.loss_curves), ("ppo", curves.rollout_curves)])
def test_proved_idle_arms_have_no_curve_and_no_entry_in_the_legend(stage, draw):
    made = study(arms=["baseline", "disco-idle_beta-absent"], stages=["rm", "dpo", "ppo"], idle_arms="prove")
    for run in made.runs():
        finish(made, run, None, log=log_of(run.seed))
    assert labels(draw(results(made), stage))[0] == "Baseline"
    assert "with an idle head" not in labels(draw(results(made), stage))


def test_runs_without_held_out_rows_in_their_log_show_training():
    made = study(arms=["baseline"], **FAST)
    for run in made.runs():
        finish(
            made, run, None, log=({"step": 1, "loss": 0.7, "accuracy": 0.5}, {"step": 2, "loss": 0.5, "accuracy": 0.7})
        )
    figure = curves.loss_curves(results(made), "dpo")
    assert figure.axes[0].get_ylabel().startswith("Training loss")
    assert lines(figure.axes[0])[0].get_ydata() == pytest.approx([0.7, 0.5])


def test_reliability_pools_seeds_and_folds_probabilities_onto_the_predicted_winner():
    made = study(arms=["baseline"], **FAST)
    # confidences .925 (right), .925 (wrong) | .925 (right), .525 (right): bins of .05 from .5
    for run, probability in zip(made.runs(), [(0.925, 0.075), (0.925, 0.525)], strict=True):
        margin = [1 if p > 0.5 else -1 for p in probability]
        finish(made, run, {"ece": 0.1 * run.seed}, examples={"probability": probability, "mean_margin": margin})
    figure = figures.reliability_diagram(results(made), "dpo")
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
            finish(made, run, {"ece": 0.1})
    figure = figures.reliability_diagram(results(made), "dpo")
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "missing" in texts
    assert any("1 of 2 seeds" in text for text in texts)


# --- ppo

PPO = ["rm", "dpo", "ppo"]
WORLD = {"data": {"world": {}}, "base": {"sft": {"model_type": "qwen3"}}}


def rollouts_of(seed: int, better: float = 0.0):
    """Two updates; the reward of seed 2 is 0.2 above that of seed 1. There is a loss too, which says little."""
    reward = 0.2 * (seed - 1) + better
    return (
        {"step": 1, "reward": 0.5 + reward, "kl_per_sequence": 0.0, "response_length": 9.0, "loss": 3.0},
        {"step": 2, "reward": 0.7 + reward, "kl_per_sequence": 1.5, "response_length": 8.0, "loss": 2.0},
    )


def test_learning_curves_of_ppo_are_reward_kl_and_length_over_updates():
    made = study(arms=["baseline", "disco-idle_beta-absent", "disco-used_beta-absent"], stages=PPO)
    for run in made.runs():
        finish(made, run, None, log=rollouts_of(run.seed, better=1 if run.arm.name == "disco-used_beta-absent" else 0))
    figure = curves.rollout_curves(results(made), "ppo")
    reward, disco_reward, kl, length = figure.axes  # the two reward models score in different units
    assert [line.get_color() for line in lines(reward)] == ["#4d4d4d", "black"]
    assert [line.get_color() for line in lines(kl)] == ["#4d4d4d", "#0072B2", "black"]
    (baseline, idle), (disco,) = lines(reward), lines(disco_reward)
    assert reward.get_ylabel() == "Score by reward\nmodel, baseline"
    assert disco_reward.get_ylabel() == "Score by reward\nmodel, Disco"
    assert baseline.get_ydata() == pytest.approx([0.6, 0.8])
    assert disco.get_ydata() == pytest.approx([1.6, 1.8])
    assert idle.get_ydata() == pytest.approx([0.6, 0.8])
    assert idle.get_linewidth() < 1
    assert lines(kl)[0].get_ydata() == pytest.approx([0, 1.5])
    assert lines(length)[0].get_ydata() == pytest.approx([9, 8])
    assert length.get_xlabel() == "Update"
    assert labels(figure) == ["Baseline", "Disco", "with an idle head"]
    (band,) = reward.collections  # from the least to the greatest seed, of the arm that is drawn in colour
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.5, 0.9))


@pytest.mark.parametrize(
    "arms", [["baseline", "disco-idle_beta-absent", "disco-absent_beta-used"], ["disco-used_beta-absent"]]
)
def test_arms_of_one_kind_of_reward_model_share_one_panel(arms):
    made = study(arms=arms, stages=PPO)
    figure = curves.rollout_curves(results(made), "ppo")
    assert [axes.get_ylabel().split()[0] for axes in figure.axes] == ["Score", "KL", "Tokens"]
    assert figure.axes[0].texts[0].get_text() == "missing"


def gains(seed: int, better: float = 0.0) -> dict:
    """Six prompts of three noise levels; gains 1 and 3 | 0 and 1 | -1 and -1, and seed 2 gains 0.5 more."""
    gained = np.array([1, 3, 0, 1, -1, -1]) + 0.5 * (seed - 1) + better
    return {"noise": [0.3, 0.3, 0.9, 0.9, 2.0, 2.0], "reference_true_reward": [1.0] * 6, "true_reward": 1 + gained}


def test_reward_by_noise_is_paired_with_the_reference_and_spans_the_seeds():
    made = study(arms=["baseline", "disco-idle_beta-absent", "disco-used_beta-absent"], stages=PPO, **WORLD)
    for run in made.runs():
        if run.stage != "ppo":
            finish(made, run, None)  # what a ppo run has read
        elif (run.arm.name, run.seed) != ("disco-used_beta-absent", 2):
            finish(made, run, {"reward": 1}, examples=gains(run.seed, better=1 if run.arm.name != "baseline" else 0))
    figure = figures.reward_by_noise(results(made), "ppo")
    (axes,) = figure.axes
    baseline, disco = axes.containers  # the idle arm computes what its twin does
    assert baseline.lines[0].get_ydata() == pytest.approx([2.25, 0.75, -0.75])  # 2, 0.5, -1 and half of 0.5
    spans = [segment[:, 1].tolist() for segment in baseline.lines[2][0].get_segments()]
    assert np.ravel(spans) == pytest.approx([2, 2.5, 0.5, 1, -1, -0.5])
    assert disco.lines[0].get_ydata() == pytest.approx([3, 1.5, 0])  # seed 1 only
    assert baseline.lines[0].get_xdata() == pytest.approx([-0.07, 0.93, 1.93])
    assert disco.lines[0].get_xdata() == pytest.approx([0.07, 1.07, 2.07])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.3", "0.9", "2"]
    assert labels(figure) == ["Baseline", "Disco (1 of 2 seeds)"]
    footer = figure.texts[-1].get_text().replace("-\n", "-").replace("\n", " ")
    assert "disco-used_beta-absent: seed 2 (not trained)" in footer


def test_reward_by_noise_without_sampled_responses_says_missing():
    made = study(arms=["baseline"], stages=PPO, **WORLD)
    for run in made.runs():
        finish(made, run, {"reward": 1})
    (axes,) = figures.reward_by_noise(results(made), "ppo").axes
    assert "missing" in [text.get_text() for text in axes.texts]


def test_figures_of_a_study_with_ppo():
    made = study(arms=["baseline"], **WORLD)
    figures.write(results(made))
    names = {path.stem for path in (made.directory / "figures").glob("[!.]*")}
    assert names == {f"{name}-{stage}" for stage in ("rm", "dpo") for name in ("learning-curves", "reliability")} | {
        "learning-curves-ppo",
        "reward-by-noise-ppo",
    }


# --- files


def test_figures_are_files_that_do_not_change_when_they_are_drawn_again():
    made = study(arms=["baseline"], **FAST)
    for run in made.runs():
        finish(made, run, {"ece": 0.1}, log=log_of(run.seed))
    folder = made.directory / "figures"
    figures.write(results(made))
    first = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    assert sorted(first) == sorted(
        f"{name}-dpo.{ending}" for name in ("learning-curves", "reliability") for ending in ("pdf", "svg", "png")
    )
    figures.write(results(made))
    assert first == {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def test_loss_curve_of_one_run(tmp_path):
    run = write_run(tmp_path / "run", log=log_of(1))
    with (run / "log.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')  # killed while writing
    curves.loss_curve(run / "log.jsonl", run / "loss.png")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    (run / "log.jsonl").write_text("")
    curves.loss_curve(run / "log.jsonl", run / "loss.png")


@pytest.mark.parametrize(
    ("log", "panels"),
    [
        (log_of(1), {"Loss (nats)": [[0.7, 0.5], [0.6, 0.4]]}),
        (
            rollouts_of(1),
            {"Score by the\nreward model": [[0.5, 0.7]], "KL to reference\n(nats per response)": [[0, 1.5]]},
        ),
    ],
    ids=["dpo", "ppo"],
)
def test_loss_curve_of_ppo_is_reward_and_kl(tmp_path, monkeypatch, log, panels):
    drawn = []
    save = curves.Figure.savefig
    monkeypatch.setattr(
        curves.Figure, "savefig", lambda *words, **options: drawn.append(words[0]) or save(*words, **options)
    )
    run = write_run(tmp_path / "run", log=log)
    curves.loss_curve(run / "log.jsonl", run / "loss.png")
    (figure,) = drawn
    assert {axes.get_ylabel(): [line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes} == panels
