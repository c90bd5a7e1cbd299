"""What the figures draw, read back from their axes."""

import hashlib
import math

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from report_study import finish, results, study, write_run

from discobeta.report import curves, figures, loss_curve, outputs
from discobeta.report.style import INK, LOOKS

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


GREY, ORANGE, BLUE = (look.colour for look in LOOKS[:3])  # baseline, LeDPO, Disco


def means(axes) -> dict[str, list[float]]:
    """Colour -> heights of the thick line of an arm."""
    thick = [line for line in axes.lines if line.get_linewidth() > 1 and len(line.get_xdata()) > 1]
    return {line.get_color(): list(line.get_ydata()) for line in thick}


def names(axes) -> list[str]:
    """Beside the ends of lines, from below."""
    texts = sorted((text for text in axes.texts if text.arrow_patch), key=lambda text: text.get_position()[1])
    return [text.get_text() for text in texts]


def below(figure) -> str:
    return " ".join(text.get_text() for text in figure.texts).replace("-\n", "-").replace("\n", " ")


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_learning_curves_are_means_over_seeds_and_paired_differences_to_the_baseline():
    made = study(arms=["baseline", "disco-used_beta-absent"], **FAST)
    for run in made.runs():
        worse = -0.02 * run.seed if run.arm.name != "baseline" else 0
        known = {"oracle_nll": 0.3, "bayes_accuracy": 0.875}
        finish(made, run, known, log=log_of(run.seed, worse))
    figure = curves.loss_curves(results(made), "dpo")
    loss, difference, training, accuracy = figure.axes
    assert loss.get_ylabel().startswith("Held-out loss") and training.get_ylabel().startswith("Training loss")
    assert means(loss)[GREY] == pytest.approx([math.log(2), 0.65, 0.45])  # a policy begins as its reference
    assert means(difference) == {BLUE: pytest.approx([0, -0.03, -0.03])}  # mean of -0.02 and -0.04
    assert means(training)[GREY] == pytest.approx([0.75, 0.55])
    assert means(accuracy)[GREY] == pytest.approx([0.5, 0.6, 0.8])
    assert names(loss) == ["oracle", "Disco", "Baseline"]
    assert names(accuracy)[-1] == "Bayes limit"
    flat = [[line.get_ydata()[0] for line in axes.lines if line.get_color() == INK] for axes in (loss, accuracy)]
    assert flat == [[0.3], [0.875]]
    marked = next(line for line in loss.lines if line.get_color() == GREY and line.get_linewidth() > 1)
    assert (marked.get_marker(), marked.get_markevery()) == ("o", 1)  # every point is a measurement


def test_two_seeds_are_lines_and_six_have_the_band_that_the_figure_names():
    for seeds in ([1, 2], [1, 2, 3, 4, 5, 6]):
        made = study(study=f"of-{len(seeds)}", arms=["baseline"], stages=["dpo"], seeds=seeds)
        for run in made.runs():
            finish(made, run, None, log=log_of(run.seed))
        figure = curves.loss_curves(results(made), "dpo")
        loss = figure.axes[0]
        thin = [line for line in loss.lines if line.get_linewidth() < 1 and line.get_color() == GREY]
        assert len(thin) == (2 if len(seeds) == 2 else 0)
        assert len(loss.collections) == (0 if len(seeds) == 2 else 1)
    # at step 2: .4 to .9, of mean .65 and standard deviation .18708; t(.975, 5) = 2.570582
    heights = loss.collections[0].get_paths()[0].vertices
    assert heights[heights[:, 0] == 2][:, 1].max() == pytest.approx(0.65 + 2.570582 * 0.1870829 / math.sqrt(6))
    assert "Band: 95 % Student interval of the mean over 6 seeds." in below(figure)


def test_a_missing_seed_is_marked_and_not_compared_with_another_seed():
    made = study(arms=["baseline", "disco-used_beta-absent"], **FAST)
    for run in made.runs():
        if (run.arm.name, run.seed) != ("baseline", 2):
            finish(made, run, None, log=log_of(run.seed))
    figure = curves.loss_curves(results(made), "dpo")
    assert "Baseline (1/2)" in names(figure.axes[0])
    assert means(figure.axes[1]) == {BLUE: pytest.approx([0, 0, 0])}  # seed 1 only; over both it would be 0.05
    assert "baseline: seed 2 (not trained)" in below(figure) and "(n/N): n of N seeds" in below(figure)


def test_many_missing_runs_are_counted_and_not_listed():
    made = study(stages=["dpo"], seeds=list(range(10, 40)))
    figure = curves.loss_curves(results(made), "dpo")
    assert "Missing: 270 of 270 runs (270 not trained)" in below(figure)
    assert len(below(figure)) < 400


def test_idle_arms_are_thin_dashes_on_their_twins():
    made = study(arms=["baseline", "disco-idle_beta-absent"], **FAST)
    for run in made.runs():
        finish(made, run, None, log=log_of(run.seed))
    figure = curves.loss_curves(results(made), "dpo")
    (dashes,) = [line for line in figure.axes[0].lines if line.get_color() == curves.IDLE["color"]]
    assert dashes.get_linewidth() < 1
    assert dashes.get_ydata() == pytest.approx([math.log(2), 0.65, 0.45])
    assert "with an idle head" in below(figure)


@pytest.mark.parametrize(("stage", "draw"), [("dpo", curves.loss_curves), ("ppo", curves.rollout_curves)])
def test_proved_idle_arms_have_no_curve_and_no_word(stage, draw):
    made = study(arms=["baseline", "disco-idle_beta-absent"], stages=["rm", "dpo", "ppo"], idle_arms="prove")
    for run in made.runs():
        finish(made, run, None, log=log_of(run.seed) if stage == "dpo" else rollouts_of(run.seed))
    figure = draw(results(made), stage)
    assert "Baseline" in names(figure.axes[0])
    assert "idle" not in below(figure)


def test_runs_without_held_out_rows_in_their_log_show_training_and_its_difference():
    made = study(arms=["baseline", "disco-used_beta-absent"], **FAST)
    for run in made.runs():
        drop = 0.1 if run.arm.name != "baseline" else 0
        rows = ({"step": 1, "loss": 0.7 - drop, "accuracy": 0.5}, {"step": 2, "loss": 0.5, "accuracy": 0.7})
        finish(made, run, {"oracle_nll": 0.25}, log=rows)
    loss, difference = curves.loss_curves(results(made), "dpo").axes
    assert loss.get_ylabel().startswith("Training loss")
    assert means(loss)[GREY] == pytest.approx([0.7, 0.5])
    assert means(difference) == {BLUE: pytest.approx([-0.1, 0])}
    assert names(loss)[0] == "oracle,\nheld-out"


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
        {"step": 2, "reward": 0.7 + reward, "kl_per_sequence": 1.5, "response_length": 9.1, "loss": 2.0},
    )


def test_learning_curves_of_ppo_are_score_and_kl_over_updates_and_their_differences():
    made = study(arms=["baseline", "disco-absent_beta-used", "disco-used_beta-absent"], stages=PPO)
    for run in made.runs():
        better = {"disco-used_beta-absent": 1, "disco-absent_beta-used": -0.1 * run.seed}.get(run.arm.name, 0)
        rows = rollouts_of(run.seed)
        rows[1]["reward"] += better
        rows[1]["kl_per_sequence"] += better
        finish(made, run, None, log=rows)
    figure = curves.rollout_curves(results(made), "ppo")
    score, less, of_disco, kl, kl_less = figure.axes  # the two reward models score in different units
    assert means(score) == {GREY: pytest.approx([0, 0.2]), ORANGE: pytest.approx([0, 0.05])}  # since update 1
    assert means(less) == {ORANGE: pytest.approx([0, -0.15])}  # mean of -.1 and -.2
    assert means(of_disco) == {BLUE: pytest.approx([0, 1.2])}
    assert of_disco.get_ylabel() == "Score by the reward\nmodel of Disco\n(since update 1) ↑"
    assert means(kl)[GREY] == pytest.approx([0, 1.5])
    assert means(kl_less) == {ORANGE: pytest.approx([0, -0.15]), BLUE: pytest.approx([0, 1])}
    thin = [line.get_ydata()[-1] for line in less.lines if line.get_color() == ORANGE and line.get_linewidth() < 1]
    assert thin == pytest.approx([-0.1, -0.2])  # a line for each seed
    assert [axes.get_xticks()[0] for axes in figure.axes] == [1] * len(figure.axes)  # there is no update 0


@pytest.mark.parametrize(("last", "there"), [(9.4, False), (8.0, True)])
def test_the_length_of_responses_has_a_panel_only_where_it_moves(last, there):
    made = study(arms=["baseline"], stages=PPO)
    for run in made.runs():
        rows = rollouts_of(run.seed)
        rows[1]["response_length"] = last  # of 9.0
        finish(made, run, None, log=rows)
    figure = curves.rollout_curves(results(made), "ppo")
    assert ["Tokens" in axes.get_ylabel() for axes in figure.axes] == [False, False, True][: 2 + there]


@pytest.mark.parametrize(
    "arms", [["baseline", "disco-idle_beta-absent", "disco-absent_beta-used"], ["disco-used_beta-absent"]]
)
def test_arms_of_one_kind_of_reward_model_share_one_panel(arms):
    made = study(arms=arms, stages=PPO)
    figure = curves.rollout_curves(results(made), "ppo")
    words = [axes.get_ylabel().split()[:2] for axes in figure.axes]
    assert [first for first, second in words if second != "minus"] == ["Score", "KL"]
    assert {axes.texts[0].get_text() for axes in figure.axes} == {"missing"}


def gains(seed: int, better: float = 0.0) -> dict:
    """Six prompts of three noise levels; gains 1 and 3 | 0 and 1 | -1 and -1, and seed 2 gains 0.5 more."""
    gained = np.array([1, 3, 0, 1, -1, -1]) + 0.5 * (seed - 1) + better
    return {"noise": [0.3, 0.3, 0.9, 0.9, 2.0, 2.0], "reference_true_reward": [1.0] * 6, "true_reward": 1 + gained}


def test_reward_by_noise_is_paired_with_the_reference_and_with_the_baseline():
    made = study(arms=["baseline", "disco-idle_beta-absent", "disco-used_beta-absent"], stages=PPO, **WORLD)
    for run in made.runs():
        if run.stage != "ppo":
            finish(made, run, None)  # what a ppo run has read
        else:
            better = 0.4 * run.seed if run.arm.name == "disco-used_beta-absent" else 0
            finish(made, run, {"reward": 1}, examples=gains(run.seed, better))
    figure = figures.reward_by_noise(results(made), "ppo")
    gained, difference = figure.axes
    baseline, disco = (line for line in gained.lines if len(line.get_ydata()) == 3)  # an idle arm is its twin
    assert baseline.get_ydata() == pytest.approx([2.25, 0.75, -0.75])  # 2, 0.5, -1 and half of 0.5
    assert disco.get_ydata() == pytest.approx([2.85, 1.35, -0.15])
    dots = [line for line in difference.lines if line.get_color() == BLUE and line.get_markersize() < 3]
    assert np.ravel([line.get_ydata() for line in dots]) == pytest.approx([0.4, 0.8] * 3)  # seed 1 and 2, each level
    large = [line for line in difference.lines if line.get_color() == BLUE and line.get_markersize() > 3]
    assert np.ravel([line.get_xydata() for line in large]) == pytest.approx([0, 0.6, 1, 0.6, 2, 0.6])
    assert [label.get_text() for label in difference.get_xticklabels()] == ["0.3", "0.9", "2"]
    assert labels(figure) == ["Baseline", "Disco"]
    assert "single seeds" in below(figure)


def test_a_missing_seed_is_in_no_difference_of_the_reward_by_noise():
    made = study(arms=["baseline", "disco-used_beta-absent"], stages=PPO, **WORLD)
    for run in made.runs():
        if run.stage != "ppo":
            finish(made, run, None)
        elif (run.arm.name, run.seed) != ("baseline", 2):
            finish(made, run, {"reward": 1}, examples=gains(run.seed))
    figure = figures.reward_by_noise(results(made), "ppo")
    heights = {float(y) for line in figure.axes[1].lines if line.get_color() == BLUE for y in line.get_ydata()}
    assert heights == {0.0}
    assert labels(figure) == ["Baseline (1 of 2 seeds)", "Disco"]
    assert "baseline: seed 2 (not trained)" in below(figure)


def test_reward_by_noise_without_sampled_responses_says_missing():
    made = study(arms=["baseline"], stages=PPO, **WORLD)
    for run in made.runs():
        finish(made, run, {"reward": 1})
    above, differences = figures.reward_by_noise(results(made), "ppo").axes
    assert all("missing" in [text.get_text() for text in axes.texts] for axes in (above, differences))


def test_figures_of_a_study_with_ppo():
    made = study(arms=["baseline"], **WORLD)
    names = {output.name for output in outputs.figures(made)}
    assert names == {f"{name}-{stage}" for stage in ("rm", "dpo") for name in ("learning-curves", "reliability")} | {
        "learning-curves-ppo",
        "reward-by-noise-ppo",
        "reward-kl-ppo",
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


def texts_of(png: bytes) -> dict[str, str]:
    """The tEXt and iTXt chunks of a PNG file: each is length, kind, keyword, NUL, text and checksum."""
    found, place = {}, 8
    while place < len(png):
        length, kind = int.from_bytes(png[place : place + 4], "big"), png[place + 4 : place + 8]
        if kind in (b"tEXt", b"iTXt"):
            keyword, _, text = png[place + 8 : place + 8 + length].partition(b"\0")
            found[keyword.decode()] = text.rpartition(b"\0")[2].decode("utf-8" if kind == b"iTXt" else "latin-1")
        place += 12 + length
    return found


def test_files_say_what_made_them():
    made = study(arms=["baseline"], **FAST)
    for run in made.runs():
        finish(made, run, {"ece": 0.1}, log=log_of(run.seed))
    figures.write(results(made))
    folder = made.directory / "figures"
    digest = hashlib.sha256((yaml.safe_dump(made.settings, sort_keys=True, allow_unicode=True)).encode()).hexdigest()
    said = texts_of((folder / "learning-curves-dpo.png").read_bytes())
    facts = {"study": "fixture", "seeds": "1 2", "commit": "0123456789ab", "config": digest[:12], "version": "9.8.7"}
    assert facts.items() <= said.items() and said["Title"] == "learning-curves-dpo"
    line = f"fixture · seeds 1-2 · config {digest[:12]} · commit 0123456789ab"
    svg = (folder / "learning-curves-dpo.svg").read_text()
    assert line in svg and f"config={digest[:12]}" in svg
    pdf = (folder / "learning-curves-dpo.pdf").read_bytes()
    assert b"/Title (learning-curves-dpo)" in pdf and b"seeds=1 2" in pdf
    assert b"CreationDate" not in pdf and "dc:date" not in svg
    assert below(curves.loss_curves(results(made), "dpo")).endswith(line)


def test_loss_curve_of_one_run(tmp_path):
    run = write_run(tmp_path / "run", log=log_of(1))
    with (run / "log.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')  # killed while writing
    loss_curve.loss_curve(run / "log.jsonl", run / "loss.png")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    (run / "log.jsonl").write_text("")
    loss_curve.loss_curve(run / "log.jsonl", run / "loss.png")


@pytest.mark.parametrize(
    ("log", "panels"),
    [
        (log_of(1), {"Loss (nats) ↓": [[0.7, 0.5], [0.6, 0.4]]}),
        (
            rollouts_of(1),
            {"Score by the\nreward model ↑": [[0.5, 0.7]], "KL to reference\n(nats per response)": [[0, 1.5]]},
        ),
    ],
    ids=["dpo", "ppo"],
)
def test_loss_curve_of_ppo_is_reward_and_kl(tmp_path, monkeypatch, log, panels):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *words, **options: drawn.append(words[0]) or save(*words, **options))
    run = write_run(tmp_path / "run", log=log)
    loss_curve.loss_curve(run / "log.jsonl", run / "loss.png")
    (figure,) = drawn
    assert {axes.get_ylabel(): [line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes} == panels
