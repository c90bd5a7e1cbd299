"""What an evaluation says: its columns, what it leaves out and names, and what it warns of."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import preference_rows, write_rows

from discobeta import cli, record
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.metrics import EVALUATION_COLUMNS
from discobeta.model.attention import OBEYS
from discobeta.run import load
from discobeta.run.evaluate import evaluate, preference_metrics
from discobeta.run.responses import policy_metrics
from discobeta.run.samples import samples

pytestmark = pytest.mark.numeric

USED = {"add_disco_head": True, "disco_pref": True, "add_beta_head": True, "use_dynamic_beta": True}
TRUTH = {"topic", "noise", "familiarity"}  # of the rows that conftest makes


def test_all_columns_of_all_stages_are_names_that_a_truth_may_not_have(run, monkeypatch, tmp_path):
    monkeypatch.setattr("discobeta.inputs.world.World.true_reward", lambda world, prompt, response: 1.0)
    monkeypatch.setattr("discobeta.inputs.world.World.well_formed", lambda world, prompt, response: True)
    sampling = {"num_eval_generations": 3, "max_new_tokens": 4, "ground_truth": "world"}
    voted = [row | {"annotators": {"chosen": 2, "rejected": 1}} for row in preference_rows(12, 2)]
    with_votes = str(write_rows(tmp_path / "votes.jsonl", voted))
    several = {"generations_per_prompt": 2, "best_of": 4}
    directories = [
        run("rm", name="rm", eval_dataset=with_votes, **USED),
        run("dpo", name="dpo", **USED, **sampling, **several),
    ]
    chain = {"reward_model": str(directories[0]), "beta_head": str(directories[1])}
    one_update = {"max_steps": 1, "logging_steps": 1, "ppo_buffer_size": 1}
    directories.append(run("ppo", name="ppo", **USED, **sampling, **chain, **one_update))
    written = set()
    for directory in directories:
        evaluate(directory)
        written |= set(pd.read_parquet(directory / "examples.parquet"))
        if (directory / "generations.jsonl").exists():
            written |= set(json.loads((directory / "generations.jsonl").read_text().splitlines()[0]))
    assert written - TRUTH - {"probability"} == EVALUATION_COLUMNS - {"oracle_probability"}


def test_an_evaluation_with_other_settings_is_the_one_of_a_run_that_had_them(run, settings, tmp_path, capsys):
    """The run stays as it is; its evaluation says what it was made with, and counts only where that is wanted."""
    sampling = {"num_eval_generations": 3, "max_new_tokens": 4, "temperature": 0.7}
    path, had_them = run("dpo", name="run"), run("dpo", name="other", **sampling)
    evaluate(path)
    evaluate(had_them)
    trained = (path / "provenance.json").read_bytes()
    words = [f"{key}={value}" for key, value in sampling.items()]
    assert cli.main(["evaluate", str(path), "--set", *words]) == 0
    for name in ("metrics.json", "examples.parquet", "generations.jsonl"):
        assert (path / name).read_bytes() == (had_them / name).read_bytes()
    assert (path / "provenance.json").read_bytes() == trained
    as_trained, _ = RunConfig.from_mapping(settings("dpo", name="run"))
    assert record.measurement_fault(path, as_trained.replace(**sampling)) is None
    fault = "evaluated with other settings (max_new_tokens: 4 there, 64 here)"
    assert record.measurement_fault(path, as_trained) == fault
    # `train` finds the run finished, and measures it as it is now asked to
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings("dpo", name="run")))
    assert cli.main(["train", str(file)]) == 0
    assert "holds this run, finished" in capsys.readouterr().err
    assert (path / "provenance.json").read_bytes() == trained
    assert record.measurement_fault(path, as_trained) is None
    assert "generations" not in json.loads((path / "metrics.json").read_text())
    assert not (path / "generations.jsonl").exists()


@pytest.mark.parametrize(
    "stage, word, said",
    [
        ("dpo", "learning_rate=1", "--set 'learning_rate': this is no setting of an evaluation"),
        ("dpo", "temprature=1", "did you mean 'temperature'?"),
        ("dpo", "temperature=hot", "--set: temperature: 'hot' should be a number"),
        ("rm", "generations_per_prompt=2", "of a run of rm it may be per_device_eval_batch_size, max_new_tokens, temp"),
    ],
)
def test_what_is_no_setting_of_an_evaluation_is_refused(stage, word, said, run, capsys):
    path = run(stage)
    assert cli.main(["evaluate", str(path), "--set", word]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert said in message and not (path / "metrics.json").exists()


def pairs_of(**columns):
    """Four pairs of an arm that uses both heads, beside columns of a truth."""
    known = {
        "nll": [0.1, 0.2, 0.3, 0.4],
        "mean_margin": [4.0, 3.0, 2.0, 1.0],
        "variance_sum": [1.0] * 4,
        "sigma_chosen": [4.0, 3.0, 2.0, 1.0],
        "sigma_rejected": [8.0, 7.0, 6.0, 5.0],
        "log_s": [0.0, 0.3, -0.1, 0.2],
    }
    return pd.DataFrame(known | columns)


SCALE = {"noise": [1.0, 2.0, 1.0, 3.0], "familiarity": [0, 1, 1, 2]}


@pytest.mark.parametrize(
    ("columns", "missing", "said"),
    [
        ({"oracle_probability": [np.nan] * 4}, ["bayes_accuracy", "excess_kl"], "probability: 4 of 4 rows"),
        ({"oracle_probability": ["yes", "no", "", "?"]}, ["oracle_nll"], "no probability in [0, 1]"),
        ({"oracle_probability": [0.0] * 4}, ["oracle_nll"], "probability: 4 of 4 rows came out against"),
        ({"oracle_probability": [0.0, 1.0, 1.5, -0.5]}, [], "probability: 2 of 4 rows hold no probability"),
        ({"oracle_probability": [True, True, False, True]}, [], "probability: 1 of 4 rows came out against"),
        (SCALE | {"noise": [0, 0, 0, 0]}, ["log_s_noise", "log_s_familiarity"], "noise: 4 of 4 rows hold no number"),
        (SCALE | {"noise": [1.0, 0.0, np.inf, -1.0]}, ["log_s_noise"], "noise: 3 of 4 rows hold no number above 0"),
        (SCALE | {"noise": ["low", "low", "high", ""]}, ["log_s_noise"], "noise: 4 of 4 rows hold no number above 0"),
        (SCALE | {"noise": [2.0] * 4}, ["log_s_noise"], "not in metrics.json: log_s_noise"),
        ({"noise": SCALE["noise"]}, ["log_s_noise", "log_s_familiarity"], "familiarity: 4 of 4 rows hold no number"),
        (SCALE | {"familiarity": ["rare", "", "often", "?"]}, ["log_s_familiarity"], "familiarity: 4 of 4 rows"),
        ({"chosen_sigma": [1.0] * 4, "rejected_sigma": [1.0] * 4}, ["sigma_spearman"], "metrics.json: sigma_spearman"),
        ({"chosen_sigma": [np.nan] * 4, "rejected_sigma": [""] * 4}, ["sigma_spearman"], "rejected_sigma: 4 of 4"),
        ({"topic": [""] * 4}, ["by_topic"], "topic: 4 of 4 rows hold none"),
        ({"topic": [np.nan, 1.0, 1.0, 2.0]}, [], "topic: 1 of 4 rows hold none"),
    ],
)
def test_what_a_truth_leaves_undefined_is_left_out_and_said(columns, missing, said, capsys):
    found = preference_metrics(pairs_of(**columns))
    json.dumps(found, allow_nan=False)
    assert not set(missing) & set(found)
    assert {"accuracy", "nll", "mean_log_s", "sd_log_sigma"} <= set(found)
    lines = capsys.readouterr().err.splitlines()
    assert any(said in line for line in lines), lines
    assert all(line.startswith("discobeta: ") for line in lines)


def test_labels_that_could_not_come_out_so_count_in_the_divergence_and_the_line_says_what_is_without_them(capsys):
    found = preference_metrics(pairs_of(oracle_probability=[0.0] * 4))
    # the mean of -log(1 - exp(-nll)), with thirty digits and rounded
    assert found["excess_kl"] == pytest.approx(1.6299497016)
    assert found["bayes_accuracy"] == 1
    said = capsys.readouterr().err
    assert "-log is infinite; oracle_nll is without them\n" in said
    assert "not in metrics.json: oracle_nll (" in said and "excess" not in said


def test_a_truth_with_gaps_is_measured_where_it_is_known(capsys):
    examples = pairs_of(
        oracle_probability=["0.5", "?", "", "0.25"],  # partly text, so that tokenisation has made it text
        chosen_sigma=[5.0, np.nan, 7.0, 8.0],
        topic=["a", "", "b", "b"],
        noise=[1.0, 0.0, 2.0, 3.0],
        familiarity=[0.0, 1.0, 1.0, np.nan],
    )
    found = preference_metrics(examples)
    assert found["bayes_accuracy"] == pytest.approx((0.5 + 0.75) / 2)
    assert found["oracle_nll"] == pytest.approx((math.log(2) + math.log(4)) / 2)
    # q log(q/p) + (1-q) log((1-q)/(1-p)) of q = .5, -log p = .1 and of .25, .4, with thirty digits and rounded
    assert found["excess_kl"] == pytest.approx((0.5329370500 + 0.3698895541) / 2)
    assert found["sigma_spearman"] == pytest.approx(-1)  # of the chosen ones, 4, 2, 1 against 5, 7, 8
    assert {topic: part["examples"] for topic, part in found["by_topic"].items()} == {"a": 1, "b": 2}
    assert "log_s_noise" not in found  # two rows hold both: a line through two points leaves nothing
    said = capsys.readouterr().err
    for column, gaps in (("probability", 2), ("chosen_sigma", 1), ("rejected_sigma", 4), ("topic", 1), ("noise", 1)):
        assert f"truth column {column}: {gaps} of 4 rows" in said


def test_topics_that_are_numbers_keep_their_names_beside_gaps():
    assert set(preference_metrics(pairs_of(topic=[1, 2, 1, 2]))["by_topic"]) == {"1", "2"}
    assert set(preference_metrics(pairs_of(topic=[1, 2, np.nan, 2.5]))["by_topic"]) == {"1", "2", "2.5"}


def test_nothing_is_said_of_a_whole_truth(capsys):
    preference_metrics(
        pairs_of(
            **SCALE, topic=list("aabb"), oracle_probability=[0.5, 0.9, 1.0, 0.2], chosen_sigma=[1.0, 2.0, 3.0, 4.0],
            rejected_sigma=[1.0, 2.0, 3.0, 5.0],
        )
    )  # fmt: skip
    preference_metrics(pairs_of())  # no truth is no gap either
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_a_run_whose_truth_is_full_of_holes_is_measured(run, tmp_path, stage, capsys):
    truths = [
        {"probability": 0, "noise": 0, "familiarity": "often", "topic": "a", "chosen_sigma": 1.0, "seen": True},
        {"probability": 1, "noise": -1.5, "familiarity": 2, "topic": 3, "seen": "no"},
        {"probability": "likely", "noise": "much", "chosen_sigma": float("nan")},
        {"probability": 7.0, "noise": 0.0, "familiarity": False},
        {},
        None,
    ]
    rows = preference_rows(12, 2)
    for number, row in enumerate(rows):
        row["truth"] = truths[number % len(truths)]
    held_out = write_rows(tmp_path / "holes.jsonl", rows)
    found = evaluate(run(stage, eval_dataset=str(held_out), **USED))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == found
    assert found["examples"] == 12 and found["bayes_accuracy"] == 1 and found["oracle_nll"] == 0
    # in the four rows with a truth it is sure, so that the divergence is minus the log of what p gives to it
    p = pd.read_parquet(tmp_path / "run" / "examples.parquet").probability
    of_truth = [1 - p[0], p[1], 1 - p[6], p[7]]
    assert found["excess_kl"] == pytest.approx(-np.log(of_truth).mean())
    assert not {"log_s_noise", "log_s_familiarity", "sigma_spearman"} & set(found)
    assert {topic: part["examples"] for topic, part in found["by_topic"].items()} == {"3": 2, "a": 2}
    said = capsys.readouterr().err
    assert "truth column probability: 8 of 12 rows hold no probability in [0, 1]" in said
    assert "truth column probability: 2 of 12 rows came out against a probability of 0" in said
    assert stage == "rm" or "truth column noise: 12 of 12 rows hold no number above 0" in said


def test_a_run_that_gives_no_finite_numbers_is_refused(run, monkeypatch):
    from discobeta.method.signals import Signals

    directory, original = run("dpo"), Signals.compare

    def diverged(self, evidence):
        rewards = torch.cat([evidence.rewards[:, :-1], torch.full((2, 1), torch.nan)], 1)
        return original(self, dataclasses.replace(evidence, rewards=rewards))

    monkeypatch.setattr(Signals, "compare", diverged)
    with pytest.raises(UserError, match=r"2 of 12 held-out pairs have a loss or a margin that is no finite number"):
        evaluate(directory)  # 12 pairs are two batches, of which each has one such pair
    assert not (directory / "metrics.json").exists()


def test_a_mean_that_is_not_finite_is_left_out_and_said(capsys):
    answers = answers_of([0.5, 0.25], [True, False]).assign(reward=[np.inf, 1.0], reference_reward=[0.0, 2.0])
    found = policy_metrics(answers)
    json.dumps(found, allow_nan=False)
    assert "reward" not in found and found["reference_reward"] == 1 and found["generations"] == 2
    assert "not in metrics.json: reward, reward_gain (no finite number)" in capsys.readouterr().err


@pytest.mark.parametrize(("truth", "topics"), [(None, None), ({"topic": "a"}, {"a"}), ({"topic": 2}, {"2"})])
def test_answers_to_prompts_of_which_little_is_known_are_measured(run, tmp_path, truth, topics):
    rows = [row | {"truth": truth if number else None} for number, row in enumerate(preference_rows(12, 2))]
    held_out = str(write_rows(tmp_path / "bare.jsonl", rows))
    sampling = {"num_eval_generations": 12, "max_new_tokens": 4, "ground_truth": "world"}
    found = evaluate(run("dpo", eval_dataset=held_out, **sampling, **USED))
    assert -4 <= found["true_reward"] <= 3 and found["well_formed"] == 0
    assert set(found.get("true_reward_by_topic", [])) == (topics or set())
    assert "log_s_noise" not in found


def test_the_truth_is_that_of_the_named_world(run, tmp_path, monkeypatch):
    """And evaluation.json says by its sha256 which that was."""
    from discobeta import files
    from discobeta.inputs import world

    world.write_corpus(tmp_path / "world", seed=1, sft_examples=10, qualities="topic")
    own = tmp_path / "world" / "world.json"
    monkeypatch.setattr(world.World, "true_reward", lambda truth, *texts: 2.0 if truth.own_qualities else 1.0)
    directory = run("dpo", num_eval_generations=3, max_new_tokens=4)
    for name, reward, sha256 in ((str(own), 2.0, files.sha256(own)), ("world", 1.0, None)):
        assert evaluate(directory, {"ground_truth": name})["true_reward"] == reward
        assert files.read_sealed(directory / "evaluation.json").get("ground_truth") == sha256
    assert "true_reward" not in evaluate(directory, {"ground_truth": "none"})
    with pytest.raises(UserError, match="cannot read .*/gone/world.json"):
        evaluate(directory, {"ground_truth": str(tmp_path / "gone" / "world.json")})
    with pytest.raises(UserError, match="ground_truth: 'word' is neither none nor world nor a path to a world.json"):
        evaluate(directory, {"ground_truth": "word"})


def test_a_run_knows_its_calibration_rows(run, tmp_path):
    """They change nothing of what is trained and measured, and a run is not measured beside other ones than it had."""
    calibration = write_rows(tmp_path / "calibration.jsonl", preference_rows(9, 3))
    without, directory = run("dpo", name="without"), run("dpo", calibration_dataset=str(calibration))
    for name in ("adapter/adapter_model.safetensors", "log.jsonl"):
        assert (directory / name).read_bytes() == (without / name).read_bytes()
    assert evaluate(directory).items() >= evaluate(without).items()
    facts = json.loads((directory / "provenance.json").read_text())
    assert "calibration" in facts and "calibration" not in json.loads((without / "provenance.json").read_text())
    assert (directory / "reference" / "calibration.safetensors").exists()
    write_rows(calibration, preference_rows(9, 4))
    with pytest.raises(UserError, match="was trained with another calibration than"):
        evaluate(directory)


def answers_of(log_ratio, ended):
    return pd.DataFrame({"log_ratio": log_ratio, "length": [5, 3], "ended": ended})


def test_a_negative_divergence_is_warned_of(capsys):
    found = policy_metrics(answers_of([-0.5, 0.25], [True, False]))
    assert found["kl_per_sequence"] == -0.125
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "discobeta: kl_per_sequence is -0.125, and a divergence is never negative: 2 sampled responses"
    )
    policy_metrics(answers_of([0.5, 0.25], [True, False]))
    policy_metrics(answers_of([-1e-6, 0.0], [True, False]))  # a policy that is the reference, but for rounding
    assert capsys.readouterr().err == ""


def test_responses_of_which_none_ends_are_warned_of(capsys):
    assert policy_metrics(answers_of([0.5, 0.25], [False, False]))["eos_rate"] == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("discobeta: eos_rate is 0: none of 2 sampled responses ends within 5 tokens; max_new_tokens")


@pytest.mark.parametrize("reader", ["evaluate", "samples"])
def test_models_beside_a_policy_share_its_base_and_its_attention(reader, run, monkeypatch):
    """In memory is one base and what each adapter adds; and each model was asked whether it obeys masks, on which it
    hangs by which kernel of a GPU it attends."""
    reward_model = run("rm", name="rm")
    directory = run("ppo", reward_model=str(reward_model), max_new_tokens=4, num_eval_generations=4, max_steps=1)
    together, seen = load.together, []
    monkeypatch.setattr(load, "together", lambda *models: [seen.append(models), together(*models)][1])
    if reader == "evaluate":
        evaluate(directory)
    else:  # of held-out prompts, which a ppo run need not have
        samples(directory, [{"prompt": "user red blue assistant"}])
    *_, (stage, reference, judge) = seen
    models = [stage.model.get_base_model(), reference, judge.model.get_base_model()]
    of_base = {name for name, _ in reference.model.named_parameters()}
    for name in of_base:
        owner, _, leaf = name.rpartition(".")
        layers = [model.model.get_submodule(owner) for model in models]
        first, *rest = (getattr(getattr(layer, "base_layer", layer), leaf) for layer in layers)
        assert all(weight is first for weight in rest), name
    assert all(OBEYS[model] for model in models)
