"""Runs beside the grid: which there are, what they are told, and that none is ever taken for the grid's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_study import finish, results, rewrite

from discobeta import report
from discobeta.design import study as study_module
from discobeta.design.cost import estimate, read
from discobeta.design.study import Run, Study
from discobeta.errors import UserError
from discobeta.report import cells, controls, curves, effects, figures, neutrality, outputs, published
from discobeta.report.collect import collect

ARMS = ["baseline", "disco-used_beta-absent"]
DISCO = ARMS[1]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def settings(**changes: Any) -> dict[str, Any]:
    """Two arms in three stages on fixed rows: of each seed 2 runs of rm, 2 of dpo and 2 of ppo."""
    return {
        "study": "s",
        "seeds": [3, 4],
        "arms": ARMS,
        "data": {"dataset": "rows.jsonl", "eval_dataset": "held-out.jsonl"},
        "base": {"model_name_or_path": "a/model"},
        "dpo": {"pref_beta": 0.5},
        **changes,
    }


def beside(study: Study, stage: str) -> list[tuple[str, str]]:
    return [(arm.name, name) for arm, name in study.variants_of(stage)]


# --- which there are


def test_a_control_is_trained_of_its_arm_in_its_stages_for_every_seed():
    study = Study(settings(controls={"slow": {"stages": ["rm", "dpo"], "settings": {"learning_rate": 1e-6}}}))
    assert (beside(study, "rm"), beside(study, "dpo"), beside(study, "ppo")) == (
        [("baseline", "slow")], [("baseline", "slow")], [],
    )  # fmt: skip
    found = [(run.stage, run.arm.name, run.seed, str(run.directory)) for run in study.runs() if run.variant]
    assert found == [
        ("rm", "baseline", 3, "results/s/runs/rm/baseline/slow/seed-3"),
        ("rm", "baseline", 4, "results/s/runs/rm/baseline/slow/seed-4"),
        ("dpo", "baseline", 3, "results/s/runs/dpo/baseline/slow/seed-3"),
        ("dpo", "baseline", 4, "results/s/runs/dpo/baseline/slow/seed-4"),
    ]
    assert len(study.grid_runs()) == 2 * (2 + 2 + 2)


def test_a_sweep_is_of_every_arm_and_of_the_controls_that_are_swept():
    study = Study(
        settings(
            controls={
                "slow": {"stages": ["rm", "dpo"], "settings": {"learning_rate": 1e-6}, "swept": True},
                "big": {"stages": ["dpo"], "arm": DISCO, "settings": {"lora_rank": 64}},
            },
            sweep={"dpo": {"pref_beta": [0.35, 0.5, "1e-1"]}},  # 0.5 is the grid's own
        )
    )
    assert beside(study, "dpo") == [
        ("baseline", "slow"),
        ("baseline", "slow,pref_beta=0.35"),
        ("baseline", "slow,pref_beta=0.1"),
        ("baseline", "pref_beta=0.35"),
        ("baseline", "pref_beta=0.1"),
        (DISCO, "big"),
        (DISCO, "pref_beta=0.35"),
        (DISCO, "pref_beta=0.1"),
    ]
    assert beside(study, "rm") == [("baseline", "slow")]
    both = study.config(study.run("dpo", "baseline", 3, variant="slow,pref_beta=0.35"))
    assert (both.learning_rate, both.pref_beta) == (1e-6, 0.35)


def test_several_keys_are_swept_in_all_combinations_but_the_grids_own():
    study = Study(settings(sweep={"dpo": {"learning_rate": [1e-5, 5e-5], "pref_beta": [0.5, 1.0], "arms": [DISCO]}}))
    # learning_rate is 5e-5 by default; in the order of the keys of a run pref_beta stands first
    assert beside(study, "dpo") == [
        (DISCO, "pref_beta=0.5,learning_rate=1e-05"),
        (DISCO, "pref_beta=1,learning_rate=1e-05"),
        (DISCO, "pref_beta=1,learning_rate=5e-05"),
    ]


def test_a_sweep_of_all_arms_is_of_none_with_an_idle_head():
    study = Study(settings(arms="all", idle_arms="prove", stages=["dpo"], sweep={"dpo": {"pref_beta": [0.2]}}))
    corners = ["baseline", "disco-absent_beta-used", "disco-used_beta-absent", "disco-used_beta-used"]
    assert sorted(beside(study, "dpo")) == [(arm, "pref_beta=0.2") for arm in corners]
    assert not any(run.proof for run in study.runs() if run.variant)


def test_in_rm_a_control_of_an_arm_is_of_the_arm_that_stands_for_it():
    arms = ["baseline", "disco-absent_beta-used"]
    slow = {"stages": ["rm", "dpo"], "arm": arms[1], "settings": {"learning_rate": 1e-6}}
    study = Study(settings(arms=arms, controls={"slow": slow}))
    assert (beside(study, "rm"), beside(study, "dpo")) == ([("baseline", "slow")], [(arms[1], "slow")])


def test_null_takes_away_what_an_earlier_file_says():
    slow = {"slow": {"stages": ["rm"], "settings": {"learning_rate": 1e-6}}}
    sweep = {"dpo": {"pref_beta": [0.2]}}
    for changes in (
        {"controls": slow | {"slow": None}, "sweep": {"dpo": None}},
        {"controls": None, "sweep": None},
        {"controls": {}, "sweep": {"dpo": {"pref_beta": None, "learning_rate": [1e-3]}}, "stages": ["rm"]},
    ):
        assert not any(run.variant for run in Study(settings(**changes)).runs())
    assert len([run for run in Study(settings(controls=slow, sweep=sweep)).runs() if run.variant]) == 2 * (1 + 2)


def test_the_plan_lists_them():
    text = study_module.plan(Study(settings(sweep={"dpo": {"pref_beta": [0.2], "arms": ["baseline"]}})))
    assert text.startswith("s: 14 runs in results/s\n")
    assert "dpo  baseline, pref_beta=0.2       seed 3    whole run" in text


# --- what they are told


def difference(study: Study, run: Run) -> dict[str, Any]:
    own = study.run_settings(study.run(run.stage, run.arm, run.seed))
    theirs = study.run_settings(run)
    return {key: theirs.get(key) for key in own | theirs if own.get(key) != theirs.get(key)}


def test_a_variant_differs_from_its_arm_by_its_settings_and_its_folder():
    study = Study(settings(sweep={"dpo": {"pref_beta": [0.2]}}))
    assert difference(study, study.run("dpo", DISCO, 4, variant="pref_beta=0.2")) == {
        "pref_beta": 0.2,
        "output_dir": f"results/s/runs/dpo/{DISCO}/pref_beta=0.2/seed-4",
    }


def test_a_variant_of_ppo_reads_what_the_grids_run_of_its_arm_and_seed_reads():
    arms = ["baseline", "disco-absent_beta-used"]
    fast = {"fast": {"stages": ["rm", "dpo"], "settings": {"learning_rate": 1e-3}}}
    study = Study(settings(arms=arms, controls=fast, sweep={"ppo": {"pref_beta": [0.2]}}))
    told = study.run_settings(study.run("ppo", arms[1], 4, variant="pref_beta=0.2"))
    assert told["reward_model"] == "results/s/runs/rm/baseline/seed-4"
    assert told["beta_head"] == "results/s/runs/dpo/disco-absent_beta-used/seed-4"
    assert told["reference_answers_path"] == "results/s/shared/answers/ppo/seed-4"


def test_a_replicate_differs_by_its_random_streams_alone():
    members = {name: {"stages": ["rm", "dpo"], "replicate": n} for name, n in (("second", 1), ("third", 2))}
    study = Study(settings(controls=members, arms=["baseline"]))
    seeds = set()
    for seed in (3, 4):
        for name in members:
            run = study.run("rm", "baseline", seed, variant=name)
            found = difference(study, run)
            seeds.add(found.pop("seed"))
            assert found == {"output_dir": f"results/s/runs/rm/baseline/{name}/seed-{seed}"}
    assert len(seeds) == 4 and not seeds & {3, 4}
    policy = study.run("dpo", "baseline", 3, variant="second")
    assert "reference_answers_path" not in study.run_settings(policy)  # those are drawn from the seed's streams
    assert not study.is_answered(policy)


def test_the_seed_of_a_replicate_is_no_other_on_another_day():
    # the first 8 bytes of sha256("3/replicate/1"), halved
    study = Study(settings(controls={"second": {"stages": ["rm"], "replicate": 1}}))
    assert study.config(study.run("rm", "baseline", 3, variant="second")).seed == 0x4B94585E7D78254B >> 1


def test_a_policy_may_be_given_several_reward_models():
    study = Study(settings(controls=ENSEMBLE, ppo={"ppo_score_norm": True}))
    run = study.run("ppo", "baseline", 4, variant="mean")
    places = [f"results/s/runs/rm/baseline/{name}seed-4" for name in ("", "member-2/", "member-3/")]
    assert study.config(run).reward_model == ",".join(places)
    assert [str(other.directory) for other in study.upstream(run)["reward_model"]] == places
    own = study.run("ppo", "baseline", 4)
    assert [str(other.directory) for other in study.upstream(own)["reward_model"]] == places[:1]


ENSEMBLE = {
    "member-2": {"stages": ["rm"], "replicate": 1},
    "member-3": {"stages": ["rm"], "replicate": 2},
    "mean": {"stages": ["ppo"], "reward_models": ["baseline", "member-2", "member-3"]},
}


def test_devices_share_the_batch_of_the_variant():
    big = {"big": {"stages": ["rm"], "settings": {"per_device_train_batch_size": 32}}}
    study = Study(settings(gpus_per_run=4, common={"per_device_train_batch_size": 8}, controls=big))
    assert study.config(study.run("rm", "baseline", 3)).per_device_train_batch_size == 2
    assert study.config(study.run("rm", "baseline", 3, variant="big")).per_device_train_batch_size == 8


def test_a_batch_that_is_written_as_text_is_shared_too():
    """What a study takes for 8 without devices, it takes for 8 with them."""
    for size in ("8", 8.0):
        study = Study(settings(gpus_per_run=4, common={"per_device_train_batch_size": size}))
        assert study.config(study.run("rm", "baseline", 3)).per_device_train_batch_size == 2


def test_controls_of_different_stages_may_have_one_label():
    both = {
        f"slow-{stage}": {"stages": [stage], "label": "slow", "settings": {"learning_rate": 1e-6}}
        for stage in ("rm", "dpo")
    }
    study = Study(settings(controls=both))
    assert (beside(study, "rm"), beside(study, "dpo")) == ([("baseline", "slow-rm")], [("baseline", "slow-dpo")])


def test_what_trains_another_run_is_no_twin():
    """Each of these keys is read where it stands."""
    read = {
        "rate": {"stages": ["dpo"], "arm": DISCO, "settings": {"disco_learning_rate": 1.0}},
        "clip": {"stages": ["dpo"], "arm": DISCO, "settings": {"head_max_grad_norm": 0.5}},
        "scale": {"stages": ["dpo"], "settings": {"beta_rule": "learned", "beta_learning_rate": 1.0}},
        "learned": {"stages": ["dpo"], "settings": {"beta_rule": "learned"}},
        "alpha": {"stages": ["rm"], "settings": {"lora_alpha": 8}},
        "value": {"stages": ["ppo"], "settings": {"value_learning_rate": 1.0, "head_max_grad_norm": 0.5}},
        "long": {"stages": ["rm"], "settings": {"num_train_epochs": 7}},
    }
    study = Study(settings(controls=read))
    assert {name for stage in ("rm", "dpo", "ppo") for _, name in beside(study, stage)} == set(read)


# --- what may not be said


def control(**changes: Any) -> dict[str, Any]:
    return {"controls": {"x": {"stages": ["dpo"], **changes}}}


SAID = {
    "a flag": (
        control(settings={"disco_pref": True}),
        "controls: x: settings: disco_pref may not stand here: it comes from the grid (choose arms with `arms:`)",
    ),
    "rows": (
        control(settings={"dataset": "other.jsonl"}),
        "controls: x: settings: dataset may not stand here: it belongs in `data:` (all runs see the same rows)",
    ),
    "a model": (
        control(settings={"model_name_or_path": "m"}),
        "controls: x: settings: model_name_or_path may not stand here: it belongs in `base:` (all runs start from the "
        "same model)",
    ),
    "a path": (
        control(settings={"output_dir": "o"}),
        "controls: x: settings: output_dir may not stand here: the study",
    ),
    "a key of another stage": (
        control(settings={"lam": 0.9}),
        "controls: x: settings: lam may not stand here: dpo does not read it (ppo does)",
    ),
    "a key that one of its stages does not read": (
        control(stages=["dpo", "rm"], settings={"pref_beta": 0.9}),
        "controls: x: settings: pref_beta may not stand here: rm does not read it (dpo and ppo do)",
    ),
    "a misspelt key of a run": (
        control(settings={"pref_bta": 0.9}),
        "controls: x: settings: unknown key 'pref_bta'; did you mean 'pref_beta'?",
    ),
    "a misspelt key": (control(setings={}), "controls: x: unknown key 'setings'; did you mean 'settings'?"),
    "a value that is none": (
        control(settings={"pref_beta": "much"}),
        "controls: x: settings: pref_beta: 'much' should be a number",
    ),
    "how is measured": (
        control(settings={"temperature": 0.7}),
        "controls: x: settings: temperature may not stand here: all runs of a stage are measured alike (say it in "
        "`dpo:`)",
    ),
    "what changes nothing": (
        control(settings={"logging_steps": 7}),
        "controls: x: settings: logging_steps may not stand here: it changes nothing that is trained",
    ),
    "what the reference was read with": (
        control(settings={"bf16": True}),
        "controls: x: bf16: what all runs of dpo share of the reference depends on it",
    ),
    "an unknown arm": (control(arm="disco", settings={"lora_rank": 2}), "controls: x: arm: no arm is called 'disco'"),
    "an idle arm": (
        control(arm="disco-used_beta-idle", settings={"lora_rank": 2}),
        "controls: x: arm: disco-used_beta-idle has an idle head, which changes nothing: name disco-used_beta-absent",
    ),
    "an arm that is not trained": (
        control(arm="disco-absent_beta-used", settings={"lora_rank": 2}),
        "controls: x: arm: disco-absent_beta-used is no arm of this study: add it to `arms:`",
    ),
    "a stage that there is not": (control(stages=["sft"]), "controls: x: stages: 'sft' should be rm or dpo or ppo"),
    "no stage": ({"controls": {"x": {"settings": {"lora_rank": 2}}}}, "controls: x: stages is missing"),
    "nothing": (control(), "controls: x: say how it differs from its arm (settings, replicate or reward_models)"),
    "its arm": (
        control(settings={"pref_beta": 0.5}),  # as in `dpo:`
        "controls: x: x would be trained just as dpo of baseline: leave it out",
    ),
    "its arm, by a default": (
        control(settings={"lora_rank": 8}),
        "controls: x: x would be trained just as dpo of baseline: leave it out",
    ),
    "its arm, by what another key decides": (
        control(settings={"num_train_epochs": 7}) | {"dpo": {"max_steps": 3}},
        "controls: x: x would be trained just as dpo of baseline: leave it out",
    ),
    "its arm, by a default that follows another key": (
        control(settings={"lora_alpha": 16}),
        "controls: x: x would be trained just as dpo of baseline: leave it out",
    ),
    "its arm, by the rate of a head that it has not": (
        control(stages=["rm"], settings={"disco_learning_rate": 1.0}),
        "controls: x: x would be trained just as rm of baseline: leave it out",
    ),
    "its arm, by the rate that a head has by default": (
        control(arm=DISCO, settings={"disco_learning_rate": 3e-3}) | {"dpo": {"learning_rate": 1e-3}},
        f"controls: x: x would be trained just as dpo of {DISCO}: leave it out",
    ),
    "a sweep that some of its arms do not read": (
        {"sweep": {"dpo": {"disco_learning_rate": [0.1, 0.2]}}},
        "sweep: dpo: disco_learning_rate=0.1 would be trained just as dpo of baseline: leave it out, or sweep other "
        "arms (`arms: [...]` beside it)",
    ),
    "a point of the sweep": (
        control(settings={"pref_beta": 0.2}) | {"sweep": {"dpo": {"pref_beta": [0.2]}}},
        "sweep: dpo: pref_beta=0.2 would be trained just as dpo of baseline, x: leave it out",
    ),
    "a name of several folders": ({"controls": {"a/b": {}}}, "controls: 'a/b' should be a plain folder name"),
    "a name like a point's": (
        {"controls": {"pref_beta=0.2": {}}},
        "controls: 'pref_beta=0.2' should be a plain folder",
    ),
    "a name with a comma": ({"controls": {"a,b": {}}}, "controls: 'a,b' should be a plain folder name"),
    "a name like a seed's": ({"controls": {"seed-3": {}}}, "controls: seed-3 is the folder of the arm's own run"),
    "a name of an arm": ({"controls": {DISCO: {}}}, f"controls: {DISCO} is an arm: give it another name"),
    "the name of a tuned beta": (
        {"controls": {"tuned-beta": {}}},
        "controls: tuned-beta is what tables call a tuned β: give it another name",
    ),
    "the label of another control": (
        {
            "controls": {
                "x": {"stages": ["rm", "dpo"], "replicate": 1},
                "y": {"stages": ["dpo", "ppo"], "label": "x", "replicate": 1},
            }
        },
        "controls: y: label: 'x' is what another row of the tables is called",
    ),
    "the label of the grid's own run": (
        control(label="as in the grid", replicate=1),
        "controls: x: label: 'as in the grid' is what another row of the tables is called",
    ),
    "a folder's name beyond what file systems take": (
        {
            "controls": {"x" * 100: {"stages": ["rm"], "replicate": 1, "swept": True}},
            "sweep": {
                "rm": {
                    "gradient_accumulation_steps": [2],
                    "per_device_train_batch_size": [16],
                    "head_max_grad_norm": [0.5],
                    "num_train_epochs": [2],
                }
            },
        },
        f"{'x' * 40}… would be the name of a folder of 203 characters, of at most 200: sweep",
    ),
    "a checkpoint of one run": (
        {"dpo": {"resume_from_checkpoint": "runs/a/checkpoint-3"}},
        "dpo: resume_from_checkpoint may not stand here: the study sets it",
    ),
    "a label over two lines": (control(label="a\nb", replicate=1), "controls: x: label: 'a\\nb' should be a line of"),
    "no control": ({"controls": {"x": 3}}, "controls: x should hold `key: value` lines, not 3"),
    "a list of controls": ({"controls": ["x"]}, "controls should hold `key: value` lines, not ['x']"),
    "a negative replicate": (control(replicate=-1), "controls: x: replicate: -1 should be a whole number, at least 0"),
    "a replicate of rows that the seed draws": (
        control(replicate=1) | {"data": {"dataset": "rows.jsonl", "val_size": 10}},
        "controls: x: replicate: with val_size the seed also draws the rows: give eval_dataset",
    ),
    "reward models of dpo": (control(reward_models=["baseline"]), "controls: x: reward_models: dpo is given none"),
    "a reward model that there is not": (
        control(stages=["ppo"], reward_models=["baseline", "y"]),
        "controls: x: reward_models: no arm and no control of rm is called 'y'",
    ),
    "a reward model of another arm": (
        control(stages=["ppo"], reward_models=[DISCO]),
        f"controls: x: reward_models: {DISCO} is of arm {DISCO}, and a policy of arm baseline is given reward models "
        "of arm baseline",
    ),
    "swept by nothing": (
        control(settings={"lora_rank": 2}, swept=True),
        "controls: x: swept: true, and there is no sweep of dpo",
    ),
    "swept over what it sets": (
        control(settings={"pref_beta": 0.3}, swept=True) | {"sweep": {"dpo": {"pref_beta": [0.2]}}},
        "controls: x: settings: pref_beta is swept: leave one of them out",
    ),
    "a sweep of what is so already": (
        {"sweep": {"dpo": {"pref_beta": [0.5], "learning_rate": [1e-5, 1e-4]}}},
        "sweep: dpo: pref_beta: 0.5 is what every run of dpo has already",
    ),
    "a value twice": (
        {"sweep": {"dpo": {"pref_beta": [0.2, "0.20"]}}},
        "sweep: dpo: pref_beta: [0.2, '0.20'] should be a list of different values",
    ),
    "no values": ({"sweep": {"dpo": {"pref_beta": []}}}, "sweep: dpo: pref_beta: [] should be a list of values"),
    "one value": ({"sweep": {"dpo": {"pref_beta": 0.2}}}, "sweep: dpo: pref_beta: 0.2 should be a list of values"),
    "a swept value that is none": (
        {"sweep": {"dpo": {"pref_beta": [0.2, -1]}}},
        "sweep: dpo: pref_beta: -1.0 should be at least 1e-06",
    ),
    "a swept value that is no folder": (
        {"sweep": {"rm": {"lora_target": ["all", "q_proj,v_proj"]}}},
        "sweep: rm: lora_target: 'q_proj,v_proj': a value that is swept names a folder: letters, digits, _ . + - only",
    ),
    "no key": ({"sweep": {"dpo": {"arms": ["baseline"]}}}, "sweep: dpo: say which keys are swept"),
    "a swept flag": (
        {"sweep": {"dpo": {"add_beta_head": [True]}}},
        "sweep: dpo: add_beta_head may not stand here: it comes from the grid",
    ),
    "a swept seed": ({"sweep": {"dpo": {"seed": [7]}}}, "sweep: dpo: seed may not stand here: the study sets it"),
    "a sweep of a stage that there is not": (
        {"sweep": {"sft": {"learning_rate": [1.0]}}},
        "sweep: unknown key 'sft'; the keys are rm, dpo, ppo",
    ),
    "a swept arm that is not trained": (
        {"sweep": {"dpo": {"pref_beta": [0.2], "arms": ["disco-absent_beta-used"]}}},
        "sweep: dpo: arms: disco-absent_beta-used is no arm of this study: add it to `arms:`",
    ),
    "too many points": (
        {"sweep": {"dpo": {"pref_beta": [1 + n for n in range(101)], "lora_rank": [1 + n for n in range(10)]}}},
        "sweep: dpo: 1,010 points; a stage is swept over at most 1,000",
    ),
    "a slip where it is not trained": (
        control(settings={"pref_beta": -1.0}) | {"stages": ["rm"]},
        "controls: x: settings: pref_beta: -1.0 should be at least 1e-06",
    ),
}


@pytest.mark.parametrize("changes, message", SAID.values(), ids=SAID)
def test_what_a_study_may_not_say_is_said_in_a_line(changes: dict, message: str):
    with pytest.raises(UserError) as refused:
        Study(settings(**changes), "x.yaml")
    assert str(refused.value).startswith(f"x.yaml: {message}") and "\n" not in str(refused.value)


def test_every_config_of_a_variant_is_checked_as_a_run_is():
    with pytest.raises(
        UserError,
        match="x.yaml: ppo, arm baseline, x, seed 3: stage ppo is measured after training: set eval_strategy: no",
    ):
        Study(settings(controls={"x": {"stages": ["ppo"], "settings": {"eval_strategy": "steps"}}}), "x.yaml")


def test_a_part_of_the_stages_may_be_trained_first():
    """What stands beside the grid of a stage that comes later is checked, and may read what earlier stages train."""
    arms = [*ARMS, "disco-absent_beta-used"]
    pessimist = {"stages": ["ppo"], "arm": DISCO, "settings": {"uncertainty_penalty": 1.0}}
    controls = ENSEMBLE | {"pessimist": pessimist}
    controls["mean"] = controls["mean"] | {"settings": {"uncertainty_penalty": 0.5}}
    whole = settings(arms=arms, controls=controls, sweep={"ppo": {"pref_beta": [0.2]}}, ppo={"ppo_score_norm": True})
    whole |= {"common": {"num_eval_generations": 8}, "dpo": {"best_of": 4}}  # which needs the key of `common`
    names = {run.name for run in Study(whole | {"stages": ["rm"]}).runs()}
    assert names == {"baseline", DISCO, "baseline, member-2", "baseline, member-3"}
    controls["pessimist"] = pessimist | {"arm": "baseline"}
    with pytest.raises(UserError, match="ppo, pessimist: uncertainty_penalty needs a reward model with a variance"):
        Study(whole | {"stages": ["rm"]})


# --- what is counted

STRANGE = {
    "slow": {"stages": ["rm", "dpo", "ppo"], "settings": {"learning_rate": 1e-6}},
    "null": {"stages": ["rm", "dpo", "ppo"], "settings": {"learning_rate": 1e-7}},
}
SWEEP = {"dpo": {"pref_beta": [0.25, 1.0]}, "ppo": {"pref_beta": [0.2]}}
GRID = {"baseline": {"nll": 0.6, "accuracy": 0.7}, DISCO: {"nll": 0.5, "accuracy": 0.75}}


def finished(of: Study) -> Study:
    """Every run of the grid with the numbers of its arm; every variant with others, and another log."""
    for run in of.runs():
        own = {name: value + 0.01 * run.seed for name, value in GRID[run.arm.name].items()}
        strange = {"nll": 9.0, "accuracy": 0.01, "excess_kl": 9.0, "true_reward": 99.0}
        log = (
            {"step": 1, "loss": 50.0 if run.variant else 0.7},
            {"step": 2, "eval_loss": 50.0 if run.variant else 0.5},
        )
        finish(of, run, strange if run.variant else own, log=log)
    return of


def test_no_variant_is_counted_as_the_grids_run():
    """What is made of the grid is the same, number by number and pixel by pixel, with and without runs beside it."""
    Path("with").mkdir(), Path("without").mkdir()
    made = []
    for folder, changes in (("without", {}), ("with", {"controls": STRANGE, "sweep": SWEEP})):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr("discobeta.report.style.provenance", lambda results: {})  # it has the config's digest
            of = results(finished(Study(settings(**changes))))
            frames = [cells.stage_table(of, stage).frame for stage in of.study.stages]
            frames += [made(of).frame for made in (effects.effects_table, effects.comparisons_table)]
            frames.append(neutrality.neutrality_table(of).frame)
            drawn = [
                made(of, stage)
                for made, stage in (
                    (curves.loss_curves, "dpo"), (curves.rollout_curves, "ppo"), (figures.reliability_diagram, "dpo"),
                )
            ]  # fmt: skip
            for number, figure in enumerate(drawn):
                figures.save(figure, [Path(f"{number}.png")])
            made.append((frames, [Path(f"{number}.png").read_bytes() for number in range(len(drawn))]))
    (frames, drawn), (frames_beside, drawn_beside) = made
    for frame, other in zip(frames, frames_beside, strict=True):
        pd.testing.assert_frame_equal(frame, other)
    assert drawn == drawn_beside
    assert frames[1].nll.dropna().tolist()[0] == pytest.approx(0.6 + 0.035)  # seeds 3 and 4: 0.63 and 0.64


def test_what_is_missing_of_the_grid_is_missing_whatever_stands_beside_it():
    study = Study(settings(stages=["dpo"], sweep={"dpo": {"pref_beta": [0.2]}}))
    for run in study.runs():
        if run.variant or run.seed == 3:
            finish(study, run, {"nll": 0.5})
    table = cells.stage_table(results(study), "dpo")
    assert table.frame.set_index("arm").n_seeds["baseline"] == 1
    assert any(
        "Missing: baseline: seed 4 (not trained); disco-used_beta-absent: seed 4 (not trained)." in note
        for note in table.notes
    )


def test_a_run_that_does_not_count_is_named_with_its_variant():
    study = Study(settings(stages=["dpo"], sweep={"dpo": {"pref_beta": [0.2], "arms": ["baseline"]}}))
    for run in study.grid_runs():
        finish(study, run, {"nll": 0.5})
    found = results(study)
    assert found.describe_missing(study.runs()) == "baseline, pref_beta=0.2: seeds 3, 4 (not trained)"
    assert not any("Missing" in note for note in cells.stage_table(found, "dpo").notes)
    with pytest.raises(UserError, match=r"2 of 6 runs of s do not count: dpo, baseline, pref_beta=0.2: seeds 3, 4"):
        found.require_all()


def test_an_idle_arm_is_compared_with_the_grids_run_of_its_twin():
    arms = ["baseline", "disco-absent_beta-idle"]
    study = Study(settings(stages=["dpo"], arms=arms, sweep={"dpo": {"pref_beta": [0.25]}}))
    for run in study.runs():
        finish(study, run, {"nll": 0.5}, weights=b"others!" if run.variant else b"weights")
    frame = neutrality.neutrality_frame(results(study))
    assert frame[["arm", "seed", "result"]].to_numpy().tolist() == [[arms[1], 3, "equal"], [arms[1], 4, "equal"]]


@pytest.mark.parametrize("other", ["", "pref_beta=1"])
def test_a_folder_with_the_run_of_another_variant_is_stale(other: str):
    study = finished(Study(settings(stages=["dpo"], sweep={"dpo": {"pref_beta": [0.25, 1.0]}})))
    run, alien = (study.run("dpo", "baseline", 3, variant=name) for name in ("pref_beta=0.25", other))
    shutil.rmtree(run.directory)
    shutil.copytree(alien.directory, run.directory)
    beta = {"": 0.5, "pref_beta=1": 1.0}[other]
    found = results(study)
    assert found.absence(run) == f"stale (pref_beta: {beta} there, 0.25 here)"
    assert found.absence(alien) is None


def test_the_grids_run_is_stale_where_a_variants_stands():
    study = finished(Study(settings(stages=["dpo"], sweep={"dpo": {"pref_beta": [0.25]}})))
    own, alien = (study.run("dpo", "baseline", 3, variant=name) for name in ("", "pref_beta=0.25"))
    for name in [path.name for path in own.directory.iterdir()]:
        path = own.directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(alien.directory, own.directory, dirs_exist_ok=True)
    assert results(study).absence(own) == "stale (pref_beta: 0.25 there, 0.5 here)"


@pytest.mark.parametrize("member", ["", "member-2", "member-3"])
def test_a_policy_is_stale_when_one_of_its_reward_models_has_changed(member: str):
    study = Study(settings(stages=["rm", "ppo"], controls=ENSEMBLE, ppo={"ppo_score_norm": True}))
    for run in study.runs():
        name = f"{run.arm.name} {run.variant} {run.seed}"
        finish(study, run, {"true_reward": 1.0}, weights=name.encode())
    assert {found.absence for found in results(study).found.values()} == {None}
    rewrite(study.run("rm", "baseline", 3, variant=member).directory, "adapter/adapter_model.safetensors", b"others")
    found = results(study)
    assert found.absence(study.run("ppo", "baseline", 3, variant="mean")) == "stale (reward_model has changed)"
    assert found.absence(study.run("ppo", "baseline", 4, variant="mean")) is None
    assert (found.absence(study.run("ppo", "baseline", 3)) is None) == (member != "")
    shutil.rmtree(study.run("rm", "baseline", 4, variant="member-3").directory)
    assert results(study).absence(study.run("ppo", "baseline", 4, variant="mean")) == (
        "stale (its reward_model is not trained)"
    )


def test_every_number_says_its_variant():
    study = finished(Study(settings(stages=["dpo"], sweep={"dpo": {"pref_beta": [0.25]}})))
    report.write(results(study))
    frame = pd.read_csv(study.tables_directory / "metrics.csv", keep_default_na=False)
    assert list(frame.columns[:6]) == ["stage", "arm", "variant", "seed", "metric", "value"]
    assert set(zip(frame.arm, frame.variant, strict=True)) == {
        (arm, variant) for arm in ARMS for variant in ("", "pref_beta=0.25")
    }
    pd.testing.assert_frame_equal(
        effects.effects_frame(study, collect(results(study)), effects.comparisons()),
        effects.effects_frame(study, frame[frame.variant == ""].drop(columns="variant"), effects.comparisons()),
    )


# --- the table beside the grid


def test_only_a_stage_with_something_beside_its_grid_has_the_table():
    study = Study(settings(sweep={"dpo": {"pref_beta": [0.25]}}))
    assert [table.name for table in outputs.tables(study) if table.name.startswith("controls")] == ["controls-dpo"]
    assert [table.name for table in outputs.tables(Study(settings())) if table.name.startswith("controls")] == []


def controlled() -> Study:
    """dpo: of the baseline a control and three β, of which seed 3 is best calibrated at 1 and seed 4 at the grid's."""
    slow = {"slow": {"stages": ["dpo"], "label": "slow, σ = σ₀", "settings": {"learning_rate": 1e-6}}}
    sweep = {"dpo": {"pref_beta": [0.25, 1.0], "arms": ["baseline"]}}
    study = Study(settings(stages=["dpo"], controls=slow, sweep=sweep))
    nll = {"": 0.5, "slow": 0.1, "pref_beta=0.25": 0.6, "pref_beta=1": 0.7}
    best = {("pref_beta=1", 3), ("", 4)}
    fitted = {"temperature": {"nll": 0.4, "ece": 0.02}, "sigma": {"nll": 0.3}, "new": {"nll": 0.2, "unheard": 1.0}}
    for run in study.runs():
        if run.arm.name == "baseline":
            calibration = {"nll": 0.3 if (run.variant, run.seed) in best else 0.4, "accuracy": 0.7}
            if run.variant == "slow":
                calibration["nll"] = 0.01  # a control is no β
            metrics = {"nll": nll[run.variant] + run.seed / 100, "calibration": calibration}
            finish(study, run, metrics | ({} if run.variant else {"posthoc": fitted}))
    return study


def test_the_table_has_the_arm_its_controls_its_points_what_was_fitted_and_the_tuned_beta():
    study = controlled()
    table = controls.controls_table(results(study), "dpo")
    rows = table.frame.set_index("label")
    assert list(zip(table.frame.arm, table.frame.variant, strict=True)) == [
        ("baseline", ""), ("baseline", "slow"), ("baseline", "pref_beta=0.25"), ("baseline", "pref_beta=1"),
        ("baseline", "posthoc/temperature"), ("baseline", "posthoc/sigma"), ("baseline", "posthoc/new"),
        ("baseline", "tuned-beta"),
    ]  # fmt: skip
    assert list(rows.index) == [
        "as in the grid", "slow, σ = σ₀", "pref_beta = 0.25", "pref_beta = 1",
        "post-hoc temperature", "post-hoc σ", "new", "tuned β",
    ]  # fmt: skip
    assert rows.nll.tolist() == pytest.approx([0.535, 0.135, 0.635, 0.735, 0.4, 0.3, 0.2, (0.73 + 0.54) / 2])
    assert rows.nll_ci95["as in the grid"] == pytest.approx(12.706 * 0.005, rel=1e-4)
    assert rows.ece["post-hoc temperature"] == 0.02 and rows.ece_n["post-hoc σ"] == 0
    assert (rows.n_seeds == 2).all() and (rows.n_expected == 2).all()
    text = table.markdown()
    assert (
        "Tuned β of baseline: of each seed the run with the least NLL on its calibration pairs, of β 0.25, 0.5, 1"
        in text
    )
    assert "chosen: 0.5 (seed 4), 1 (seed 3)." in text
    assert "Settings: slow, σ = σ₀: learning_rate = 1e-06." in text
    assert "Missing" not in text  # Disco has nothing beside its grid, so that it is missing is said elsewhere
    assert "slow, $\\sigma$ = $\\sigma$$_0$" in table.latex("controls-dpo")


def test_a_seed_whose_sweep_is_not_whole_has_no_tuned_beta():
    study = controlled()
    (study.run("dpo", "baseline", 3, variant="pref_beta=0.25").directory / "metrics.json").unlink()
    table = controls.controls_table(results(study), "dpo")
    rows = table.frame.set_index("variant")
    assert (rows.nll["tuned-beta"], rows.n_seeds["tuned-beta"]) == (pytest.approx(0.54), 1)
    assert rows.missing_seeds["tuned-beta"] == rows.missing_seeds["pref_beta=0.25"] == "3"
    assert "Missing: baseline, pref\\_beta=0.25: seed 3 (not evaluated)" in table.markdown() or (
        "Missing: baseline, pref_beta=0.25: seed 3 (not evaluated)" in table.markdown()
    )


def test_a_beta_is_tuned_with_nothing_else_changed():
    sweep = {"dpo": {"pref_beta": [0.5, 1.0], "learning_rate": [5e-5, 1e-3]}}
    high = {"high": {"stages": ["dpo"], "settings": {"pref_beta": 2.0}}}  # named, and so no value to choose from
    study = Study(settings(stages=["dpo"], sweep=sweep, controls=high))
    # the grid's learning rate is 5e-5: of the three points one differs in β alone
    numbers = published.Published("s", pd.DataFrame(columns=[*published.COORDINATES, "value"]), study.settings, {})
    runs = [published.Source("baseline", name) for name in ("", *(name for _, name in study.variants_of("dpo")))]
    found = published.swept(numbers, "dpo", dict.fromkeys(runs))
    betas = {source.variant: {run.variant: beta for run, beta in points.items()} for source, points in found.items()}
    assert betas == {
        "": {"": 0.5, "pref_beta=1,learning_rate=5e-05": 1.0},
        "learning_rate=0.001": {"pref_beta=0.5,learning_rate=0.001": 0.5, "pref_beta=1,learning_rate=0.001": 1.0},
    }


def test_without_calibration_pairs_nothing_is_tuned():
    study = finished(Study(settings(stages=["dpo"], sweep={"dpo": {"pref_beta": [0.25]}})))
    frame = controls.controls_table(results(study), "dpo").frame
    assert set(frame.variant) == {"", "pref_beta=0.25"} and len(frame) == 4


def test_a_table_of_which_nothing_is_there_names_all_that_is_missing():
    study = Study(settings(stages=["dpo"], sweep={"dpo": {"pref_beta": [0.25], "arms": ["baseline"]}}))
    table = controls.controls_table(results(study), "dpo")
    assert table.frame.n_seeds.tolist() == [0, 0]
    assert any(
        note.startswith("Missing: baseline: seeds 3, 4 (not trained); baseline, pref_beta=0.25: seeds 3, 4")
        for note in table.notes
    )


# --- cost


def test_rates_are_those_of_the_grid_whatever_stands_beside_it():
    study = Study(settings(stages=["dpo"], sweep={"dpo": {"pref_beta": [0.25]}}, common={"max_steps": 10}))
    rows = [
        ("dpo", "baseline", variant, 3, name, value)
        for variant, seconds in (("", 8.0), ("pref_beta=0.25", 800.0), ("null", 8000.0))
        for name, value in (("cost/seconds", seconds), ("cost/rows", 80.0), ("evaluation_cost/seconds", 1.0))
        + (("cost/processes", 1.0), ("cost/gpu_seconds", 0.0), ("cost/peak_memory_bytes", 1.0))
    ]
    Path("tables").mkdir()
    columns = ["stage", "arm", "variant", "seed", "metric", "value"]
    pd.DataFrame(rows, columns=columns).to_csv("tables/metrics.csv", index=False)
    steps = {step.name: step for step in estimate(study, read(study, Path("tables")))}
    # 10 steps of 8 pairs at 0.1 s each: 8 s a run; of each seed 2 runs of the grid and 2 beside it
    assert (steps["dpo"].jobs, steps["dpo"].seconds) == (4, pytest.approx(32))
    assert (steps["dpo, beside"].jobs, steps["dpo, beside"].seconds) == (4, pytest.approx(32))
    assert steps["evaluate"].jobs == 8


def test_the_cost_of_a_variant_stands_in_a_row_of_its_own():
    study = Study(settings(stages=["dpo"], arms=["baseline"], sweep={"dpo": {"pref_beta": [0.25]}}))
    for run in study.runs():
        finish(study, run, {"nll": 0.5}, cost={"seconds": 30.0 if run.variant else 10.0})
    report.write(results(study))
    frame = pd.read_csv(study.tables_directory / "cost.csv").set_index("work")
    assert (frame.seconds["baseline"], frame.times_baseline["baseline"]) == (10, 1)
    assert (frame.seconds["baseline, pref_beta=0.25"], frame.times_baseline["baseline, pref_beta=0.25"]) == (30, 3)
