"""A study's expansion into runs, and what a study config may not say. Counts are derived by hand from the 3x3 table."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from discobeta import cli
from discobeta.design import study as study_module
from discobeta.design import study_sections
from discobeta.design.arms import FLAGS
from discobeta.design.config import RunConfig
from discobeta.design.study import Study, plan
from discobeta.errors import UserError


def settings(**changes: Any) -> dict[str, Any]:
    world = {"study": "s", "seeds": [3, 4], "data": {"world": {}}, "base": {"sft": {"model_type": "qwen3"}}}
    return world | changes


def fixed(**changes: Any) -> dict[str, Any]:
    data = {"dataset": "a.jsonl", "eval_dataset": "b.jsonl"}
    return {"study": "s", "seeds": [3, 4], "data": data, "base": {"model_name_or_path": "m"}} | changes


def counts(study: Study) -> Counter:
    return Counter((run.stage, "proof" if run.proof else "run") for run in study.runs() if run.seed == 3)


def names(study: Study, stage: str, proof: bool) -> list[str]:
    return [run.arm.name for run in study.runs() if (run.stage, run.proof, run.seed) == (stage, proof, 3)]


# --- expansion


def test_all_arms_are_three_reward_models_and_nine_policies_of_each_kind_per_seed():
    study = Study(settings())
    assert counts(study) == {("rm", "run"): 3, ("dpo", "run"): 9, ("ppo", "run"): 9}
    assert len(study.runs()) == 42
    assert names(study, "rm", False) == ["baseline", "disco-idle_beta-absent", "disco-used_beta-absent"]


def test_proving_idle_arms_trains_only_the_others_in_full():
    # full: the arms without idle heads (2 rm, 4 dpo, 4 ppo). Proofs: 1 idle rm arm + its twin; of dpo and of ppo
    # 5 idle arms + 3 twins (baseline; Disco, of used/idle; LeDPO, of idle/used). Disco + LeDPO is nobody's twin.
    study = Study(settings(idle_arms="prove"))
    policies = {(stage, kind): number for stage in ("dpo", "ppo") for kind, number in (("run", 4), ("proof", 8))}
    assert counts(study) == {("rm", "run"): 2, ("rm", "proof"): 2} | policies
    assert names(study, "ppo", True) == names(study, "dpo", True)
    assert names(study, "dpo", True) == [
        "baseline",
        "disco-absent_beta-idle",
        "disco-absent_beta-used",
        "disco-idle_beta-absent",
        "disco-idle_beta-idle",
        "disco-idle_beta-used",
        "disco-used_beta-absent",
        "disco-used_beta-idle",
    ]


def test_a_proof_is_the_run_cut_short():
    study = Study(settings(idle_arms="prove", prove_steps=7))
    whole, proof = study.run("dpo", "baseline", 3), study.run("dpo", "baseline", 3, proof=True)
    assert proof.directory == Path("results/s/runs/dpo/baseline/seed-3/proof")
    difference = {
        key: value for key, value in study.run_settings(proof).items() if study.run_settings(whole).get(key) != value
    }
    assert difference == {"output_dir": "results/s/runs/dpo/baseline/seed-3/proof", "stop_after_steps": 7}


def test_chosen_arms_that_differ_only_in_beta_are_one_reward_model():
    study = Study(settings(arms=["baseline", "disco-absent_beta-used"]))
    assert names(study, "rm", False) == ["baseline"]
    assert names(study, "dpo", False) == ["baseline", "disco-absent_beta-used"]


def test_run_settings_of_the_world():
    study = Study(settings(common={"lora_rank": 4, "learning_rate": 1.0}, dpo={"learning_rate": 2.0}))
    assert study.run_settings(study.run("dpo", "disco-used_beta-idle", 4)) == {
        "stage": "dpo",
        "output_dir": "results/s/runs/dpo/disco-used_beta-idle/seed-4",
        "seed": 4,
        "add_disco_head": True,
        "disco_pref": True,
        "add_beta_head": True,
        "use_dynamic_beta": False,
        "model_name_or_path": "results/s/shared/base",
        "dataset": "results/s/shared/data/seed-4/pairs/train.jsonl",
        "eval_dataset": "results/s/shared/data/seed-4/pairs/eval.jsonl",
        "tokenized_path": "results/s/shared/data/seed-4/tokens",
        "reference_path": "results/s/shared/data/seed-4/reference",
        "reference_answers_path": "results/s/shared/answers/dpo/seed-4",
        "ground_truth": "world",
        "lora_rank": 4,
        "learning_rate": 2.0,
        "overwrite_output_dir": True,
    }


def test_where_every_seed_is_a_world_its_runs_read_its_own_world_base_and_pairs():
    study = Study(settings(data={"world": {"own": True}}, base={"sft": {"model_type": "qwen3", "seed": 9}}))
    run = study.run_settings(study.run("dpo", "baseline", 4))
    shared = "results/s/shared"
    assert run["model_name_or_path"] == f"{shared}/base/seed-4"
    assert run["ground_truth"] == f"{shared}/world/seed-4/world.json"
    assert run["dataset"] == f"{shared}/data/seed-4/pairs/train.jsonl"
    rm = study.run_settings(study.run("rm", "baseline", 4))
    assert rm["model_name_or_path"] == f"{shared}/base/seed-4" and "ground_truth" not in rm
    for made in (
        study.prepare_settings("seed-4"),
        study.prompt_settings("seed-4"),
        study.reference_settings("seed-4"),
        study.answers_settings("dpo", 4),
        study.answers_settings("ppo", 4),
    ):
        assert made["model_name_or_path"] == f"{shared}/base/seed-4"
    bases = [study.base_config(f"seed-{seed}") for seed in (3, 4)]
    assert [base.seed for base in bases] == [3, 4]  # not the one of base: sft:
    assert [base.output_dir for base in bases] == [f"{shared}/base/seed-3", f"{shared}/base/seed-4"]
    assert [base.dataset for base in bases] == [f"{shared}/world/seed-3/sft.jsonl", f"{shared}/world/seed-4/sft.jsonl"]
    assert bases[1].tokenizer_name == f"{shared}/world/seed-4/tokenizer"
    assert [study.decides_world("corpus", f"seed-{seed}")["seed"] for seed in (3, 4)] == [3, 4]
    assert [label for label, _ in study.shared()][:2] == ["base, seed-3", "base, seed-4"]
    for seed in (3, 4):  # the config of a run is that of its own settings
        policy = study.run("ppo", "disco-used_beta-used", seed)
        asked, _ = RunConfig.from_mapping(study.run_settings(policy))
        assert study.config(policy) == asked


def test_the_truth_is_the_embedded_worlds_unless_the_world_has_another():
    def truth(**world):
        made = Study(settings(data={"world": world}))
        return [made.run_settings(made.run("ppo", "baseline", seed))["ground_truth"] for seed in (3, 4)]

    assert truth(noise="response", labels="logistic", flips=0.2) == ["world", "world"]  # labels are no rewards
    assert truth(qualities="topic") == ["results/s/shared/world/world.json"] * 2


def test_calibration_rows_are_those_of_pairs_and_no_others():
    study = Study(settings(data={"world": {"calibration": 64}}))
    pairs = "results/s/shared/data/seed-3/pairs/calibration.jsonl"
    for stage, expected in (("rm", pairs), ("dpo", pairs), ("ppo", None)):
        assert study.run_settings(study.run(stage, "baseline", 3)).get("calibration_dataset") == expected
    assert study.prepare_settings("seed-3")["calibration_dataset"] == pairs
    assert study.reference_settings("seed-3")["calibration_dataset"] == pairs
    assert "calibration_dataset" not in study.prompt_settings("seed-3")
    assert study.has_calibration() and not Study(settings()).has_calibration()
    real = Study(fixed(data={"dataset": "a.jsonl", "eval_dataset": "b.jsonl", "calibration_dataset": ["c", "d"]}))
    assert real.run_settings(real.run("dpo", "baseline", 3))["calibration_dataset"] == "c,d"
    assert "calibration_dataset" not in real.run_settings(real.run("ppo", "baseline", 3))


def test_reward_models_and_ppo_do_not_read_the_reference():
    study = Study(settings())
    for stage in ("rm", "ppo"):
        assert "reference_path" not in study.run_settings(study.run(stage, "baseline", 3))


# --- ppo: which runs it reads, which prompts, how long its proofs are


def upstream(study: Study, arm: str, proof: bool = False) -> tuple[str, str | None]:
    """Reward model and Beta Head of the ppo run of seed 3, as in its YAML."""
    run = study.run_settings(study.run("ppo", arm, 3, proof=proof))
    return run["reward_model"], run.get("beta_head")


def test_run_settings_of_ppo():
    study = Study(settings(common={"learning_rate": 1.0}, ppo={"learning_rate": 2.0}))
    run = study.run_settings(study.run("ppo", "disco-used_beta-idle", 4))
    assert run == {
        "stage": "ppo",
        "output_dir": "results/s/runs/ppo/disco-used_beta-idle/seed-4",
        "seed": 4,
        "add_disco_head": True,
        "disco_pref": True,
        "add_beta_head": True,
        "use_dynamic_beta": False,
        "model_name_or_path": "results/s/shared/base",
        "dataset": "results/s/shared/data/seed-4/pairs/train.jsonl",
        "eval_dataset": "results/s/shared/data/seed-4/pairs/eval.jsonl",
        "tokenized_path": "results/s/shared/data/seed-4/prompts",
        "reward_model": "results/s/runs/rm/disco-used_beta-absent/seed-4",
        "beta_head": "results/s/runs/dpo/disco-used_beta-idle/seed-4",
        "reference_answers_path": "results/s/shared/answers/ppo/seed-4",
        "ground_truth": "world",
        "learning_rate": 2.0,
        "overwrite_output_dir": True,
    }


def test_every_ppo_arm_reads_the_runs_of_its_own_states():
    study = Study(settings())
    for disco in ("absent", "idle", "used"):
        reward_model = f"results/s/runs/rm/{'baseline' if disco == 'absent' else f'disco-{disco}_beta-absent'}/seed-3"
        for beta in ("absent", "idle", "used"):
            arm = "baseline" if disco == beta == "absent" else f"disco-{disco}_beta-{beta}"
            beta_head = None if beta == "absent" else f"results/s/runs/dpo/{arm}/seed-3"
            assert upstream(study, arm) == (reward_model, beta_head)


BASELINE_RM, DISCO_RM = (f"results/s/runs/rm/{arm}/seed-3" for arm in ("baseline", "disco-used_beta-absent"))
LEDPO = "results/s/runs/dpo/disco-absent_beta-used/seed-3"


@pytest.mark.parametrize(
    "arm, proof, reward_model, beta_head",
    [
        ("baseline", False, BASELINE_RM, None),
        ("baseline", True, BASELINE_RM, None),
        ("disco-idle_beta-absent", True, BASELINE_RM, None),
        ("disco-absent_beta-idle", True, BASELINE_RM, "results/s/runs/dpo/disco-absent_beta-idle/seed-3/proof"),
        ("disco-idle_beta-idle", True, BASELINE_RM, "results/s/runs/dpo/disco-idle_beta-idle/seed-3/proof"),
        ("disco-used_beta-idle", True, DISCO_RM, "results/s/runs/dpo/disco-used_beta-idle/seed-3/proof"),
        # a Beta Head that is used must be one that has learned: the twin's
        ("disco-idle_beta-used", True, BASELINE_RM, LEDPO),
        ("disco-absent_beta-used", True, BASELINE_RM, LEDPO),
        ("disco-absent_beta-used", False, BASELINE_RM, LEDPO),
        ("disco-used_beta-absent", True, DISCO_RM, None),
        ("disco-used_beta-used", False, DISCO_RM, "results/s/runs/dpo/disco-used_beta-used/seed-3"),
    ],
)
def test_a_proof_reads_whole_runs_where_they_are_used(arm: str, proof: bool, reward_model: str, beta_head: str | None):
    assert upstream(Study(settings(idle_arms="prove")), arm, proof) == (reward_model, beta_head)


@pytest.mark.parametrize("arm", ["disco-idle_beta-used", "disco-used_beta-idle", "disco-idle_beta-idle"])
@pytest.mark.parametrize("idle_arms", ["run", "prove"])
def test_runs_that_ppo_reads_are_trained_whatever_arms_are_chosen(arm: str, idle_arms: str):
    twin = {"disco-idle_beta-used": "disco-absent_beta-used", "disco-used_beta-idle": "disco-used_beta-absent"}
    study = Study(settings(arms=[arm, twin.get(arm, "baseline")], idle_arms=idle_arms))
    trained = {str(run.directory) for run in study.runs() if run.stage != "ppo"}
    read = [upstream(study, run.arm.name, run.proof) for run in study.runs() if (run.stage, run.seed) == ("ppo", 3)]
    assert {path for paths in read for path in paths} - {None} <= trained


@pytest.mark.parametrize(
    "sections, updates, text",
    [
        ({}, 2, "first 2 updates"),  # 7 optimiser steps, 4 epochs x 1 batch each by default
        ({"ppo": {"ppo_epochs": 2, "ppo_buffer_size": 3}}, 2, "first 2 updates"),  # 6 steps an update
        ({"common": {"ppo_buffer_size": "3"}, "ppo": {"ppo_epochs": 1}}, 3, "first 3 updates"),
        ({"ppo": {"ppo_epochs": 7}}, 1, "first update"),
    ],
)
def test_a_proof_of_ppo_is_counted_in_updates(sections: dict[str, Any], updates: int, text: str):
    study = Study(settings(idle_arms="prove", prove_steps=7, **sections))
    assert study.run_settings(study.run("ppo", "baseline", 3, proof=True))["stop_after_steps"] == updates
    assert study.run_settings(study.run("dpo", "baseline", 3, proof=True))["stop_after_steps"] == 7
    assert f" {text} " in plan(study)
    assert " first 7 steps " in plan(study)


def test_without_beta_heads_ppo_needs_no_dpo():
    study = Study(settings(stages=["rm", "ppo"], arms=["baseline", "disco-used_beta-absent"]))
    assert counts(study) == {("rm", "run"): 2, ("ppo", "run"): 2}
    assert "reference" not in {label.partition(",")[0] for label, _ in study.shared()}


ALPACA = {"dataset": "alpaca.json", "val_size": 100}


def test_prompts_of_their_own():
    data = {"dataset": "a.jsonl", "eval_dataset": "b.jsonl", "cutoff_len": 64, "max_samples": 9}
    study = Study(fixed(data=data, prompts=ALPACA))
    run = study.run_settings(study.run("ppo", "baseline", 4))
    rows = {key: run.get(key) for key in study_sections.DATA_KEYS if key in run}
    # how rows are read is that of the pairs; which rows is not
    assert rows == {"dataset": "alpaca.json", "val_size": 100, "cutoff_len": 64}
    assert run["tokenized_path"] == "results/s/shared/data/seed-4/prompts"  # the seed picks what is held out
    assert study.prompt_settings("seed-4") == rows | {
        "stage": "ppo",
        "seed": 4,
        "model_name_or_path": "m",
        "tokenized_path": "results/s/shared/data/seed-4/prompts",
        "output_dir": "results/s/shared/data/seed-4/prompts",
    }
    assert study.run_settings(study.run("dpo", "baseline", 4))["tokenized_path"] == "results/s/shared/data/all/tokens"
    assert study.draws() == ["all"]


def test_prompts_are_those_of_the_data_unless_given():
    study = Study(fixed())
    run = study.run_settings(study.run("ppo", "baseline", 4))
    assert (run["dataset"], run["eval_dataset"]) == ("a.jsonl", "b.jsonl")
    assert run["tokenized_path"] == "results/s/shared/data/all/prompts"
    assert study.prompt_draw(4) == "all"
    fixed_prompts = Study(
        fixed(data={"dataset": "a", "val_size": 0.1}, prompts={"dataset": ["p", "r"], "eval_dataset": "q"})
    )
    assert (fixed_prompts.draw(4), fixed_prompts.prompt_draw(4)) == ("seed-4", "all")
    assert fixed_prompts.prompt_settings("all")["dataset"] == "p,r"


def test_pairs_are_tokenised_as_pairs_in_whatever_order_the_stages_stand():
    study = Study(settings(stages=["ppo", "dpo", "rm"]))
    assert (study.prepare_settings("seed-3")["stage"], study.prompt_settings("seed-3")["stage"]) == ("dpo", "ppo")


@pytest.mark.parametrize(
    "config, draws",
    [
        (settings(), ["seed-3", "seed-4"]),  # fresh pairs per seed
        (fixed(), ["all"]),
        (fixed(data={"dataset": "a.jsonl", "val_size": 0.1}), ["seed-3", "seed-4"]),  # the seed picks what is held out
    ],
)
def test_draws(config: dict[str, Any], draws: list[str]):
    assert Study(config).draws() == draws


def test_held_out_rows_that_the_seed_picks_are_prepared_with_it():
    study = Study(fixed(data={"dataset": "a.jsonl", "val_size": 0.1}))
    assert study.prepare_settings("seed-4")["seed"] == study.run_settings(study.run("rm", "baseline", 4))["seed"] == 4


def test_shared_steps_depend_on_nothing_that_arms_or_losses_change():
    config = settings(common={"bf16": True}, dpo={"pref_beta": 0.5})
    changed = settings(common={"bf16": True, "lora_rank": 2, "max_steps": 9}, rm={"learning_rate": 1.0}, seeds=[3])
    for make in (
        Study.base_settings,
        lambda study: study.prepare_settings("seed-3"),
        lambda study: study.prompt_settings("seed-3"),
        lambda study: study.reference_settings("seed-3"),
        lambda study: study.answers_settings("dpo", 3),
        lambda study: study.answers_settings("ppo", 3),
    ):
        assert make(Study(config)) == make(Study(changed))
    assert Study(config).reference_settings("seed-3")["bf16"] is True
    assert "bf16" not in Study(config).prepare_settings("seed-3")


def test_a_base_of_ones_own_learns_from_the_studys_data():
    base = Study(fixed(base={"sft": {"model_type": "qwen3", "learning_rate": 1.0}})).base_settings()
    assert (base["stage"], base["finetuning_type"], base["dataset"]) == ("sft", "full", "a.jsonl")
    assert (base["output_dir"], base["learning_rate"]) == ("results/s/shared/base", 1.0)
    assert "eval_dataset" not in base


def test_the_references_answers_are_asked_for_as_every_arm_samples_them():
    """In each stage by its own settings, to the prompts of its own draw; and only where there are any to give."""
    sampling = {"num_eval_generations": 5, "temperature": 0.5}
    study = Study(settings(common={"top_k": 3}, dpo=sampling))
    for stage, kind in (("dpo", "tokens"), ("ppo", "prompts")):
        for run in study.runs():
            if (run.stage, run.seed) == (stage, 4):
                asked = study.resolved(study.answers_settings(stage, 4))
                for key in set(asked) - {"output_dir"}:
                    assert asked[key] == study.config(run).resolved()[key], key
        assert asked["reference_answers_path"] == asked["output_dir"] == f"results/s/shared/answers/{stage}/seed-4"
        assert asked["tokenized_path"] == f"results/s/shared/data/seed-4/{kind}"
        assert asked["num_eval_generations"] == {"dpo": 5, "ppo": 64}[stage]  # ppo's default
    assert {run.stage for run in study.runs() if study.is_answered(run)} == {"dpo", "ppo"}
    assert {run.stage for run in Study(settings()).runs() if Study(settings()).is_answered(run)} == {"ppo"}
    proving = Study(settings(idle_arms="prove", dpo=sampling))
    assert not any(proving.is_answered(run) for run in proving.runs() if run.proof)


def test_a_reward_model_that_ranks_reads_answers_of_its_own_stage_and_one_that_does_not_reads_none():
    ranking = {"best_of": 8, "num_eval_generations": 5, "tokens_per_pass": 64}
    study = Study(settings(stages=["rm"], rm=ranking, idle_arms="prove"))
    run = study.run("rm", "baseline", 4)
    read = study.run_settings(run)
    assert read["reference_answers_path"] == "results/s/shared/answers/rm/seed-4" and read["ground_truth"] == "world"
    asked = study.resolved(study.answers_settings("rm", 4))
    assert (asked["best_of"], asked["num_eval_generations"], asked["stage"]) == (8, 5, "rm")
    assert asked["tokenized_path"] == read["tokenized_path"]
    assert [run.proof for run in study.runs() if study.is_answered(run)] == [False] * 4  # two arms, two seeds
    without = Study(settings(stages=["rm"], common={"num_eval_generations": 5}))
    assert (
        not {"reference_answers_path", "ground_truth"} & without.run_settings(without.run("rm", "baseline", 4)).keys()
    )
    assert not any(without.is_answered(run) for run in without.runs())


def test_only_what_rates_the_answers_decides_how_they_are_rated():
    """Else a changed tokens_per_pass would have them sampled again."""
    rated = {"best_of": 4, "num_eval_generations": 5, "tokens_per_pass": 64, "share_prompt": False}
    plain = {"num_eval_generations": 5, "tokens_per_pass": 64}
    asked = {
        name: study.decides_shared(study.answers_settings(stage, 4))
        for name, stage, study in (
            ("rated", "dpo", Study(settings(dpo=rated))),
            ("ranked", "rm", Study(settings(rm=rated))),
            ("plain", "dpo", Study(settings(dpo=plain))),
        )
    }
    assert {"tokens_per_pass": 64, "share_prompt": False, "best_of": 4}.items() <= asked["rated"].items()
    for name in ("ranked", "plain"):
        assert not {"tokens_per_pass", "share_prompt"} & asked[name].keys()


def test_the_reference_pass_is_computed_as_the_study_says():
    computed = {"tokens_per_pass": 64, "share_prompt": False, "fused_lora": False, "per_device_eval_batch_size": 3}
    study = Study(settings(dpo=computed))
    assert computed.items() <= study.resolved(study.reference_settings("seed-4")).items()
    default = Study(settings())
    assert default.resolved(default.reference_settings("seed-4"))["tokens_per_pass"] == 1024


def test_prompts_of_their_own_are_answered_by_the_seed_of_the_run():
    study = Study(fixed(prompts={"dataset": "p.jsonl", "val_size": 5}))
    asked = study.answers_settings("ppo", 4)
    assert (asked["dataset"], asked["seed"], asked["val_size"]) == ("p.jsonl", 4, 5)
    assert asked["tokenized_path"] == "results/s/shared/data/seed-4/prompts"


def test_shared_work():
    reference, answers = ["reference, seed-3", "reference, seed-4"], ["answers, ppo, seed 3", "answers, ppo, seed 4"]
    assert [label for label, _ in Study(settings()).shared()] == ["base", *reference, *answers]
    study = Study(settings(dpo={"num_eval_generations": 5}, stages=["rm", "dpo"]))
    assert study.shared()[-1] == ("answers, dpo, seed 4", study.shared_directory / "answers" / "dpo" / "seed-4")
    assert [label for label, _ in Study(fixed(stages=["rm"])).shared()] == []


def test_plan_names_every_run():
    lines = plan(Study(settings(seeds=[3]))).splitlines()
    assert lines[0] == "s: 21 runs in results/s"
    assert len(lines) == 1 + 21 + 1
    assert lines[1].endswith(" results/s/runs/rm/baseline/seed-3")


# --- reading


def test_later_files_and_overrides_win_key_by_key(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(fixed(common={"lora_rank": 4, "learning_rate": 1.0})))
    (tmp_path / "b.yaml").write_text(
        "common: {learning_rate: 2.0}\nbase: {model_name_or_path: null, sft: {model_type: q}}"
    )
    study = Study.read([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["seeds=[5]", "data={dataset: c.jsonl}"])
    assert study.seeds == [5]
    run = study.run_settings(study.runs()[0])
    assert (run["lora_rank"], run["learning_rate"]) == (4, 2.0)
    assert (run["dataset"], run["eval_dataset"]) == ("c.jsonl", "b.jsonl")
    assert run["model_name_or_path"] == "results/s/shared/base"


def test_a_missing_config_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="cannot read .*nowhere.yaml: No such file"):
        Study.read(tmp_path / "nowhere.yaml")


# --- refusals: what is wrong, where, and what would be right


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("section", ["common", "rm", "dpo", "ppo"])
def test_flags_come_from_the_grid(flag: str, section: str):
    with pytest.raises(UserError, match=rf"^x\.yaml: {section}: {flag} may not stand here: it comes from the grid"):
        Study(settings(**{section: {flag: True}}), "x.yaml")


REFUSALS = {
    "misspelt top key": (settings(seedz=[1]), "x.yaml: unknown key 'seedz'; did you mean 'seeds'?"),
    "misspelt world key": (
        settings(data={"world": {"trian": 5}}),
        "x.yaml: data: world: unknown key 'trian'; did you mean 'train'?",
    ),
    "misspelt data key": (
        fixed(data={"dataset": "a", "eval_datasets": "b"}),
        "x.yaml: data: unknown key 'eval_datasets'; did you mean 'eval_dataset'?",
    ),
    "misspelt run key": (
        settings(dpo={"pref_bta": 0.1}),
        "x.yaml: dpo, arm baseline, seed 3: unknown key 'pref_bta'; did you mean 'pref_beta'?",
    ),
    "run key of no meaning": (
        settings(common={"ddp_timeout": 5}),
        "x.yaml: rm, arm baseline, seed 3: ddp_timeout is ignored: processes are started by `discobeta train RUN.yaml "
        "--processes N`: leave it out of a study",
    ),
    "wrong value in a run": (
        settings(rm={"lora_rank": "many"}),
        "x.yaml: rm, arm baseline, seed 3: lora_rank: 'many' should be a whole number",
    ),
    "contradiction in a run": (
        settings(common={"max_steps": 0}),
        "x.yaml: rm, arm baseline, seed 3: max_steps and num_train_epochs leave nothing to train",
    ),
    "wrong base": (
        settings(base={"sft": {"model_type": "qwen3", "finetuning_type": "lora"}}),
        "x.yaml: base: sft: stage sft trains all weights of the base: set finetuning_type: full",
    ),
    "data in a stage": (
        settings(dpo={"cutoff_len": 9}),
        "x.yaml: dpo: cutoff_len may not stand here: it belongs in `data:` (all runs see the same rows)",
    ),
    "model in a stage": (
        settings(common={"model_name_or_path": "m"}),
        "x.yaml: common: model_name_or_path may not stand here: it belongs in `base:` (all runs start from the same "
        "model)",
    ),
    "path in a stage": (
        settings(rm={"output_dir": "o"}),
        "x.yaml: rm: output_dir may not stand here: the study sets it",
    ),
    "reward model in a stage": (
        settings(ppo={"reward_model": "r"}),
        "x.yaml: ppo: reward_model may not stand here: the study sets it",
    ),
    "Beta Head in a stage": (
        settings(common={"beta_head": "r"}),
        "x.yaml: common: beta_head may not stand here: the study sets it",
    ),
    "prompts in a stage": (
        settings(ppo={"dataset": "a"}),
        "x.yaml: ppo: dataset may not stand here: it belongs in `prompts:`",
    ),
    "wrong value in a run of ppo": (
        settings(ppo={"ppo_epochs": "many"}, idle_arms="prove", arms=["disco-idle_beta-absent", "baseline"]),
        "x.yaml: ppo: ppo_epochs: 'many' should be a whole number",
    ),
    "held-out loss of ppo": (
        settings(common={"eval_strategy": "steps"}),
        "x.yaml: ppo, arm baseline, seed 3: stage ppo is measured after training: set eval_strategy: no",
    ),
    "nothing to measure ppo by": (
        settings(ppo={"num_eval_generations": 0}),
        "x.yaml: ppo, arm baseline, seed 3: num_eval_generations: 0: nothing else of a ppo run can be measured",
    ),
    "ppo without reward models": (
        settings(stages=["dpo", "ppo"]),
        "x.yaml: stages: ppo reads the runs of rm (reward_model of baseline): add rm",
    ),
    "ppo without Beta Heads": (
        settings(stages=["rm", "ppo"]),
        "x.yaml: stages: ppo reads the runs of dpo (beta_head of disco-absent_beta-idle): add dpo",
    ),
    "prompts next to the world": (
        settings(prompts=ALPACA),
        "x.yaml: prompts: a base of the world knows the world's prompts only: leave it out",
    ),
    "misspelt prompts key": (
        fixed(prompts={"dataset": "a", "valsize": 1}),
        "x.yaml: prompts: unknown key 'valsize'; did you mean 'val_size'?",
    ),
    "prompts without rows": (
        fixed(prompts={"val_size": 1}),
        "x.yaml: prompts: give dataset, or leave prompts out to use those of data",
    ),
    "prompts without held-out ones": (
        fixed(prompts={"dataset": "a"}),
        "x.yaml: prompts: give eval_dataset or val_size (prompts to measure policies on)",
    ),
    "prompts held out twice": (
        fixed(prompts={"dataset": "a", "eval_dataset": "b", "val_size": 1}),
        "x.yaml: ppo, arm baseline, seed 3: val_size and eval_dataset contradict each other: give one of them",
    ),
    "prompts of another type": (fixed(prompts=["a"]), "x.yaml: prompts should hold `key: value` lines, not ['a']"),
    "path in the base": (
        settings(base={"sft": {"model_type": "qwen3", "output_dir": "o"}}),
        "x.yaml: base: sft: output_dir may not stand here: the study sets it",
    ),
    "world of another type": (
        settings(data={"world": 5}),
        "x.yaml: data: world should hold `key: value` lines, not 5",
    ),
    "two bases": (
        settings(base={"sft": {"model_type": "qwen3"}, "model_name_or_path": "m"}),
        "x.yaml: base: give either model_name_or_path or sft (a base trained here)",
    ),
    "no base": ({"study": "s", "data": {"world": {}}}, "x.yaml: base is missing"),
    "no held-out rows": (
        fixed(data={"dataset": "a"}),
        "x.yaml: data: give eval_dataset or val_size (rows to compare runs on)",
    ),
    "no such arm": (settings(arms=["disco"]), "x.yaml: arms: no arm is called 'disco'"),
    "proof without twin": (
        settings(arms=["baseline", "disco-used_beta-idle"], idle_arms="prove"),
        "x.yaml: arms: disco-used_beta-idle is proved against disco-used_beta-absent: list that too",
    ),
    "seed twice": (settings(seeds=[1, 1]), "x.yaml: seeds: [1, 1] should be a list of different whole numbers"),
    "seed of another type": (
        settings(seeds=[True]),
        "x.yaml: seeds: [True] should be a list of different whole numbers",
    ),
    "no such stage": (settings(stages=["rm", "sft"]), "x.yaml: stages: 'sft' should be rm or dpo or ppo"),
    "idle arms": (settings(idle_arms="proof"), "x.yaml: idle_arms: 'proof' should be run or prove"),
    "prove steps": (settings(prove_steps=0), "x.yaml: prove_steps: 0 should be a whole number, at least 1"),
    "world size": (
        settings(data={"world": {"train": "9"}}),
        "x.yaml: data: world: train: '9' should be a whole number, at least 1",
    ),
    "section of another type": (settings(dpo=[1]), "x.yaml: dpo should hold `key: value` lines, not [1]"),
    "name with a path": (settings(study="../s"), "x.yaml: study: '../s' should be a plain folder name"),
    "name of 300 letters": (settings(study="s" * 300), f"x.yaml: study: '{'s' * 78}… should be a plain folder name"),
    "name that is a number": (settings(study=5), "x.yaml: study: 5 should be a plain folder name"),
    "name that is a list": (settings(study=["s"]), "x.yaml: study: ['s'] should be a plain folder name"),
    "study of another type": (["study"], "x.yaml should hold `key: value` lines, not ['study']"),
    "key that is no text": (settings() | {5: 1}, "x.yaml: the key 5 should be text (write it in quotes)"),
    "key of a section that is no text": (settings(dpo={None: 1}), "x.yaml: dpo: the key None should be text"),
    "key of a megabyte": (settings() | {"k" * 2**20: 1}, f"x.yaml: unknown key '{'k' * 78}…"),
    "key of a section of a megabyte": (settings(rm={"k" * 2**20: 1}), f"x.yaml: rm: unknown key '{'k' * 78}…"),
    "empty list for a section": (settings(dpo=[]), "x.yaml: dpo should hold `key: value` lines, not []"),
    "no for a section": (settings(dpo=False), "x.yaml: dpo should hold `key: value` lines, not False"),
    "list for the world": (
        settings(data={"world": [1]}),
        "x.yaml: data: world should hold `key: value` lines, not [1]",
    ),
    "environment with a path": (
        settings(environment="../../x"),
        "x.yaml: environment: '../../x' should be cpu or cuda",
    ),
    "environment of another type": (
        settings(environment=["cpu"]),
        "x.yaml: environment: ['cpu'] should be cpu or cuda",
    ),
    "seed that is a list": (settings(seeds=[[1]]), "x.yaml: seeds: [[1]] should be a list of different whole numbers"),
    "seeds that are a mapping": (settings(seeds={1: 2}), "x.yaml: seeds: {1: 2} should be a list of different whole"),
    "seed below zero": (settings(seeds=[-1]), "x.yaml: seeds: -1 should be a whole number, at least 0"),
    "seed beyond 63 bits": (
        settings(seeds=[2**63]),
        "x.yaml: seeds: 9223372036854775808 should be at most 9223372036854775",
    ),
    "seed of 5,000 digits": (
        settings(seeds=[10**5000]),
        "x.yaml: seeds: a very large int should be at most 92233720368547",
    ),
    "a hundred thousand seeds": (
        settings(seeds=list(range(100_000))),
        "x.yaml: seeds: 100,000 of them; a study has at most 1,000",
    ),
    "arm that is a mapping": (settings(arms=[{}]), "x.yaml: arms: [{}] should be a list of different names"),
    "arm of a megabyte": (settings(arms=["a" * 2**20]), f"x.yaml: arms: no arm is called '{'a' * 78}…; the arms are"),
    "stage that is a mapping": (settings(stages=[{}]), "x.yaml: stages: [{}] should be a list of different names"),
    "idle arms of another type": (settings(idle_arms=["run"]), "x.yaml: idle_arms: ['run'] should be run or prove"),
    "prove steps that are true": (settings(prove_steps=True), "x.yaml: prove_steps: True should be a whole number"),
    "GPUs beyond counting": (settings(gpus_per_run=1e300), "x.yaml: gpus_per_run: 1e+300 should be a whole number"),
    "GPUs of 5,000 digits": (
        settings(gpus_per_run=10**5000),
        "x.yaml: gpus_per_run: a very large int should be at most",
    ),
    "truth of another world": (
        settings(data={"world": {"own": True}}, base={"sft": {"model_type": "qwen3"}}, dpo={"ground_truth": "world"}),
        "x.yaml: dpo: ground_truth: 'world' is another world than the study's, which says it itself: leave it out",
    ),
    "truth of some world": (
        settings(data={"world": {}}, common={"ground_truth": "other/world.json"}),
        "x.yaml: rm: ground_truth: 'other/world.json' is another world than the study's, which says it itself",
    ),
    "dataset that is a number": (
        fixed(data={"dataset": 5, "eval_dataset": "b"}),
        "x.yaml: data: dataset: 5 should be a name, or a list of names",
    ),
    "dataset that is a list of numbers": (
        fixed(data={"dataset": [1], "eval_dataset": "b"}),
        "x.yaml: data: dataset: [1] should be a name, or a list of names",
    ),
    "prompts that nobody reads": (
        fixed(stages=["rm"], prompts={"dataset": "p", "val_size": "many"}),
        "x.yaml: prompts: val_size: 'many' should be a number",
    ),
    "empty base": (settings(base={"sft": []}), "x.yaml: base: sft: say what is trained (model_type, or model_name"),
    "model key next to sft": (
        settings(base={"sft": {"model_type": "qwen3"}, "cache_dir": "c"}),
        "x.yaml: base: cache_dir may not stand next to sft: it belongs in it",
    ),
    "braces in a path": (
        fixed(data={"dataset": "a{x}", "eval_dataset": "b"}),
        "x.yaml: data: dataset: 'a{x}': Snakemake takes braces for wildcards: rename it",
    ),
    "name of what is kept": (settings(study="published"), "x.yaml: study: 'published' should be a plain folder name"),
}


@pytest.mark.parametrize("config, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(config: dict[str, Any], message: str):
    with pytest.raises(UserError) as refusal:
        Study(config, "x.yaml")
    assert str(refusal.value).startswith(message)
    assert len(str(refusal.value)) < 500
    assert len(str(refusal.value).splitlines()) == 1


def test_an_arm_that_a_setting_breaks_is_named(monkeypatch: pytest.MonkeyPatch):
    """Every arm's merged config is checked, not only the baseline's."""
    check = RunConfig.check

    def refuse_ledpo(config: RunConfig) -> None:
        check(config)
        if config.use_dynamic_beta and not config.add_disco_head:
            raise UserError("broken")

    monkeypatch.setattr(RunConfig, "check", refuse_ledpo)
    with pytest.raises(UserError, match="^x.yaml: dpo, arm disco-absent_beta-used, seed 3: broken$"):
        Study(settings(), "x.yaml")


def test_the_keys_that_a_study_sets_or_moves_are_run_keys():
    known = {field.name for field in dataclasses.fields(RunConfig)}
    assert set(study_sections.BELONGS) | set(study_module.REFERENCE_KEYS) <= known


HOSTILE = [
    None, True, 0, -1, 2**53 + 1, 2**63, 10**5000, 1e300, math.nan, math.inf, "", "x", "../x", "{x}", "$\n;'\"",
    "a" * 300, [], [[1]], [{}], [None], {}, {"a": 1}, {1: 2}, {None: 1}, datetime.date(2020, 1, 1), b"x", set(), ("a",),
    "\ud800", list(range(100_000)), {"a" * 2**20: 1}, range(3),
]  # fmt: skip


def places(config: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The way to every value of nested mappings."""
    here = [(*above, key) for key in config]
    return here + [
        way for key, value in config.items() if isinstance(value, dict) for way in places(value, (*above, key))
    ]


def replaced(config: dict[str, Any], way: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = way
    return config | {first: replaced(config[first], tuple(rest), value) if rest else value}


WHOLE = {
    "stages": ["rm", "dpo", "ppo"],
    "idle_arms": "prove",
    "prove_steps": 3,
    "gpus_per_run": 1,
    "environment": "cpu",
}
WHOLE |= {"arms": ["baseline", "disco-idle_beta-absent"], "common": {"learning_rate": 1.0}, "ppo": {"ppo_epochs": 2}}


@pytest.mark.parametrize("make", [settings, fixed])
def test_any_value_anywhere_is_a_study_or_is_refused_in_a_line(make):
    config = make(**WHOLE, dpo={"pref_beta": 0.1})
    refused = taken = 0
    for way in places(config):
        for value in HOSTILE:
            try:
                plan(Study(replaced(config, way, value), "x.yaml"))
                taken += 1
            except UserError as error:
                refused += 1
                assert str(error).startswith("x.yaml") and len(str(error)) < 600 and "\n" not in str(error)
    assert refused > 10 * taken > 0


@pytest.mark.parametrize(
    "text",
    [
        "study: s\nseeds: 2020-01-01",
        "- study",
        "study: [",
        "5",
        "study: s\ndata: &a {x: *a}",
        "? [1]\n: 2",
        "\0",
        "study: s: t",
    ],
)
def test_a_config_that_is_none_ends_the_command_in_a_line(text, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(text)
    assert cli.main(["plan", "--configfile", str(tmp_path / "x.yaml")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("discobeta: ") and len(message.splitlines()) <= 2


def test_large_seeds_stay_what_they_are():
    study = Study(settings(seeds=[2**53 + 1, 2**63 - 1], idle_arms="prove"))
    for run in study.runs():
        assert study.run_settings(run)["seed"] == study.config(run).seed == run.seed
        assert f"/seed-{run.seed}" in str(run.directory)
    assert study.draws() == ["seed-9007199254740993", "seed-9223372036854775807"]
    assert study.prepare_settings("seed-9007199254740993")["seed"] == 2**53 + 1
    assert '"seed": 9007199254740993' in study_module.as_text(study.config(study.runs()[0]).resolved())


@pytest.mark.parametrize("make", [settings, fixed])
def test_configs_of_later_seeds_are_what_checking_their_settings_gives(make):
    data = {"dataset": ["a", "b"], "val_size": 0.1}
    study = Study(make(**WHOLE | ({"data": data} if make is fixed else {})))
    for run in study.runs():
        config, _ = RunConfig.from_mapping(study.run_settings(run))
        assert study.config(run) == config
