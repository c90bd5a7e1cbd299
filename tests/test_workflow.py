"""The workflow as Snakemake sees it: job counts of every shipped config, refusals, what reruns what.

The counts are derived by hand. Per seed, 3 reward models and 9 policies of dpo and of ppo; with `idle_arms: prove`
2 + 4 + 4 in full and 2 + 8 + 8 proofs (tests/test_study.py says which). Every full run is evaluated.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from discobeta.design.config import RunConfig
from discobeta.design.study import Study
from discobeta.report import outputs
from discobeta.report.states import jobs_of

pytest.importorskip("snakemake")

ROOT = Path(__file__).parent.parent
ALWAYS = {"tables": 1, "figures": 1, "page": 1, "all": 1}
WHOLE = ALWAYS | {
    "world_corpus": 1,
    "sft": 1,
    "world_pairs": 2,
    "prepare": 2,
    "prepare_prompts": 2,
    "reference": 2,
    "answers": 4,  # of dpo and ppo, each for two seeds
    "train_rm": 6,
    "train_dpo": 18,
    "train_ppo": 18,
    "evaluate": 42,
}
EMBEDDED = WHOLE | {
    "world_pairs": 6,
    "prepare": 6,
    "prepare_prompts": 6,
    "reference": 6,
    "answers": 12,
    "train_rm": 24,
    "train_dpo": 72,
    "train_ppo": 72,
    "evaluate": 60,
}
TOKENS = {"prepare": 1, "prepare_prompts": 1, "reference": 1, "answers": 4}
PROVED = ALWAYS | TOKENS | {"train_rm": 8, "train_dpo": 24, "train_ppo": 24, "evaluate": 20}
OWN = ("world_corpus", "sft", "world_pairs", "prepare", "reference")
SHIPPED = {
    "config": EMBEDDED,
    "config neutrality": WHOLE,
    # β x learning rate, 3 x 3 without the grid's own, of 4 arms and 2 seeds: 64 beside the 8 of the grid
    "config quick-exp": {name: EMBEDDED[name] for name in (*ALWAYS, "world_corpus", "sft")}
    | dict.fromkeys(("world_pairs", "prepare", "reference", "answers"), 2)
    | {"train_dpo": 72, "evaluate": 72},
    # 12 seeds, each a world of its own; 2 arms of rm and 4 of dpo, and probit in both
    "world": ALWAYS | {name: 12 for name in OWN} | {"answers": 24, "train_rm": 36, "train_dpo": 60, "evaluate": 96},
    # and cDPO and rDPO
    "world worlds/flips": ALWAYS
    | {name: 12 for name in OWN}
    | {"answers": 24, "train_rm": 36, "train_dpo": 84, "evaluate": 120},
    # rm: 2 arms, probit, 2 replicates; dpo: 4 arms and probit at 4 β, 6 controls; ppo: 4 arms and µ - σ at 4 β, 1 more
    "world worlds/both": ALWAYS
    | {name: 16 for name in (*OWN, "prepare_prompts")}
    | {"answers": 48, "train_rm": 80, "train_dpo": 416, "train_ppo": 336, "evaluate": 832},
    "smoke": WHOLE,
    "hh-rlhf": PROVED,
    "qwen3-0.6b": PROVED,
    "hh-rlhf hh-rlhf-tiny": ALWAYS
    | TOKENS
    | {"sft": 1, "train_rm": 6, "train_dpo": 18, "train_ppo": 18, "evaluate": 42},
    # 2 seeds, whose held-out rows differ; 2 arms of rm and 4 of dpo
    "own": ALWAYS
    | dict.fromkeys(("prepare", "reference", "answers"), 2)
    | {"train_rm": 4, "train_dpo": 8, "evaluate": 12},
}


def dry_run(folder: Path, configs: list[Path], *words: str) -> subprocess.CompletedProcess:
    """`snakemake --dry-run` with `folder`, which holds the shipped configs and no results, as its working directory."""
    (folder / "config").symlink_to(ROOT / "config")
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile"]
    command += ["--dry-run", "--directory", folder, "--configfile", *configs, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def job_counts(output: str) -> dict[str, int]:
    """The table that follows `Job stats:`, without its total."""
    table = output.split("Job stats:")[1].split("\n\n")[0]
    counts = {name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)$", table, re.MULTILINE)}
    assert counts.pop("total") == sum(counts.values())
    return counts


def test_every_shipped_config_is_counted_here():
    names = {path.stem for path in (ROOT / "config").glob("*.yaml")} - {"datasets", "hypotheses"}
    assert names == {name for configs in SHIPPED for name in configs.split() if "/" not in name}
    assert {name for configs in SHIPPED for name in configs.split()} - names <= {
        f"worlds/{path.stem}" for path in (ROOT / "config" / "worlds").glob("*.yaml")
    }  # which differ in the noise of their labels or the number of pairs, but for both.yaml


@pytest.mark.parametrize("configs, expected", SHIPPED.items(), ids=SHIPPED.keys())
def test_job_counts(configs: str, expected: dict[str, int], tmp_path: Path):
    done = dry_run(tmp_path, [ROOT / "config" / f"{name}.yaml" for name in configs.split()], "--quiet", "rules")
    assert done.returncode == 0, done.stdout + done.stderr
    assert job_counts(done.stdout) == expected


def test_the_command_line_changes_a_study(tmp_path: Path):
    """Snakemake hands over nested values as texts; a seed must still be a number and a size too."""
    words = ["--config", "seeds=[7]", "arms=[baseline, disco-used_beta-used]", "data={world: {train: 64}}"]
    done = dry_run(tmp_path, [ROOT / "config" / "smoke.yaml"], *words)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = job_counts(done.stdout)
    trained = {f"train_{stage}": counts[f"train_{stage}"] for stage in ("rm", "dpo", "ppo")}
    assert trained == {"train_rm": 2, "train_dpo": 2, "train_ppo": 2}
    assert (counts["world_pairs"], counts["evaluate"]) == (1, 6)
    assert "results/smoke/runs/ppo/disco-used_beta-used/seed-7/metrics.json" in done.stdout


def inputs_of(output: str, path: str) -> set[str]:
    """The files of results/ that the job reads whose first output is `path`."""
    (files,) = re.findall(rf"^rule \w+:\n    input: (.*)\n    output: {path}(?:,|$)", output, re.MULTILINE)
    return {name for name in files.split(", ") if name.startswith("results/")}


def test_where_every_seed_is_a_world_each_job_reads_its_own(tmp_path: Path):
    more = {"data": {"world": {"own": True, "calibration": 64, "qualities": "topic", "every_prompt": True}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(more))
    done = dry_run(tmp_path, [ROOT / "config" / "smoke.yaml", tmp_path / "own.yaml"], "--printshellcmds")
    assert done.returncode == 0, done.stdout + done.stderr
    assert job_counts(done.stdout) == WHOLE | {"world_corpus": 2, "sft": 2}
    shared, runs = "results/smoke/shared", "results/smoke/runs"
    world, base = f"{shared}/world/seed-2", f"{shared}/base/seed-2/provenance.json"
    pairs = [f"{shared}/data/seed-2/pairs/{name}.jsonl" for name in ("train", "eval", "calibration")]
    tokens = [f"{shared}/data/seed-2/tokens/{name}" for name in ("tokens.json", "train.parquet", "eval.parquet")]
    read = {
        base: {f"{world}/sft.jsonl", f"{world}/tokenizer/tokenizer.json"},
        pairs[0]: {f"{world}/world.json", base},
        tokens[0]: {*pairs, base},
        f"{shared}/data/seed-2/prompts/tokens.json": {*pairs[:2], base},
        f"{shared}/data/seed-2/reference/reference.json": {
            base, *tokens, f"{shared}/data/seed-2/tokens/calibration.parquet",
        },
        f"{shared}/answers/ppo/seed-2/answers.json": {base, f"{shared}/data/seed-2/prompts/tokens.json"},
        f"{runs}/rm/baseline/seed-2/provenance.json": {base, tokens[0]},
        f"{runs}/dpo/baseline/seed-2/metrics.json": {
            f"{world}/world.json", f"{shared}/answers/dpo/seed-2/answers.json",
            f"{runs}/dpo/baseline/seed-2/provenance.json",
        },
        f"{runs}/rm/baseline/seed-2/metrics.json": {f"{runs}/rm/baseline/seed-2/provenance.json"},
    }  # fmt: skip
    assert {path: inputs_of(done.stdout, path) for path in read} == read
    asked = [json.loads(words[2]) for words in commands(done.stdout, "train")]
    assert {settings["output_dir"]: settings["seed"] for settings in asked if settings["stage"] == "sft"} == {
        f"{shared}/base/seed-{seed}": seed for seed in (1, 2)
    }
    assert {settings["model_name_or_path"] for settings in asked if settings["seed"] == 2} == {
        None, f"{shared}/base/seed-2",
    }  # fmt: skip
    made = list(map(shlex.split, re.findall("-m discobeta world (.*) &>", done.stdout)))
    corpora = {words[words.index("--seed") + 1]: words for words in made if words[0] == "corpus"}
    assert corpora.keys() == {"1", "2"} and all("--own" in words for words in corpora.values())
    assert corpora["2"][1:3] == ["--output", world]
    sampled = next(words for words in made if words[:3] == ["pairs", "--world", world])
    assert sampled[3:5] == ["--base", f"{shared}/base/seed-2"]
    assert sampled[-3:] == ["--calibration", "64", "--every-prompt"]
    measured = re.findall(r"-m discobeta evaluate \S+/(seed-\d) .*ground_truth=\S*/(seed-\d)/world\.json", done.stdout)
    assert len(measured) == 36 and all(run == world for run, world in measured)  # 9 arms of dpo and of ppo, 2 seeds


def test_ppo_waits_for_its_reward_model_and_its_beta_head(tmp_path: Path):
    done = dry_run(tmp_path, [ROOT / "config" / "smoke.yaml"])
    base, prompts = "results/smoke/shared/base/provenance.json", "results/smoke/shared/data/seed-2/prompts/tokens.json"
    runs = "results/smoke/runs"
    assert inputs_of(done.stdout, f"{runs}/ppo/baseline/seed-2/provenance.json") == {
        base, prompts, f"{runs}/rm/baseline/seed-2/provenance.json",
    }  # fmt: skip
    assert inputs_of(done.stdout, f"{runs}/ppo/disco-used_beta-used/seed-2/provenance.json") == {
        base, prompts,
        f"{runs}/rm/disco-used_beta-absent/seed-2/provenance.json",
        f"{runs}/dpo/disco-used_beta-used/seed-2/provenance.json",
    }  # fmt: skip


def test_an_evaluation_waits_for_the_references_answers_and_they_for_their_prompts(tmp_path: Path):
    done = dry_run(tmp_path, [ROOT / "config" / "smoke.yaml"])
    run, shared = "results/smoke/runs/{}/baseline/seed-2", "results/smoke/shared"
    for stage, rows in (("dpo", "tokens"), ("ppo", "prompts")):
        answers = f"{shared}/answers/{stage}/seed-2/answers.json"
        directory = run.format(stage)
        assert inputs_of(done.stdout, f"{directory}/metrics.json") == {f"{directory}/provenance.json", answers}
        assert inputs_of(done.stdout, answers) == {
            f"{shared}/base/provenance.json", f"{shared}/data/seed-2/{rows}/tokens.json",
        }  # fmt: skip
    directory = run.format("rm")
    assert inputs_of(done.stdout, f"{directory}/metrics.json") == {f"{directory}/provenance.json"}


BESIDE = """
arms: [baseline]
seeds: [2]
controls:
  slow: {stages: [rm, dpo], settings: {learning_rate: 1.0e-6}, swept: true}
  member: {stages: [rm], replicate: 1}
  mean: {stages: [ppo], reward_models: [baseline, member]}
sweep:
  dpo: {pref_beta: [0.35, 0.5]}
"""


def test_runs_beside_the_grid_are_jobs_like_any_other(tmp_path: Path):
    (tmp_path / "beside.yaml").write_text(BESIDE)
    configs = [ROOT / "config" / "smoke.yaml", tmp_path / "beside.yaml"]
    done = dry_run(tmp_path, configs, "--printshellcmds")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = job_counts(done.stdout)
    # rm: the grid's, slow, member; dpo: the grid's, slow, pref_beta=0.35 of both; ppo: the grid's, mean
    assert [counts[f"train_{stage}"] for stage in ("rm", "dpo", "ppo")] == [3, 4, 2]
    assert (counts["evaluate"], counts["reference"], counts["answers"]) == (9, 1, 2)
    runs, base = "results/smoke/runs", "results/smoke/shared/base/provenance.json"
    rows = "results/smoke/shared/data/seed-2"
    assert inputs_of(done.stdout, f"{runs}/ppo/baseline/mean/seed-2/provenance.json") == {
        base, f"{rows}/prompts/tokens.json",
        f"{runs}/rm/baseline/seed-2/provenance.json",
        f"{runs}/rm/baseline/member/seed-2/provenance.json",
    }  # fmt: skip
    place = f"{runs}/dpo/baseline/slow,pref_beta=0.35/seed-2"
    assert inputs_of(done.stdout, f"{place}/provenance.json") == {
        base, f"{rows}/tokens/tokens.json", f"{rows}/reference/reference.json",
    }  # fmt: skip
    assert inputs_of(done.stdout, f"{place}/metrics.json") == {
        f"{place}/provenance.json", "results/smoke/shared/answers/dpo/seed-2/answers.json",
    }  # fmt: skip
    asked = {
        settings["output_dir"]: settings
        for words in commands(done.stdout, "train")
        for settings in [json.loads(words[2])]
    }
    assert (asked[place]["pref_beta"], asked[place]["learning_rate"], asked[place]["seed"]) == (0.35, 1e-6, 2)
    study = Study.read(configs)
    assert {run: asked[str(run.directory)] for run in study.runs()} == {
        run: study.config(run).resolved() for run in study.runs()
    }
    assert place in {words[4] for words in commands(done.stdout, "evaluate")}
    assert "results/smoke/tables/controls-dpo.csv" in done.stdout


def test_prompts_of_their_own_are_watched_and_a_proof_waits_for_what_it_reads(tmp_path: Path):
    (tmp_path / "prompts.json").write_text("[]")
    study = yaml.safe_load((ROOT / "config" / "qwen3-0.6b.yaml").read_text())
    study |= {"study": "own", "prompts": {"dataset": "prompts.json", "val_size": 9}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    done = dry_run(tmp_path, [tmp_path / "study.yaml"])
    assert done.returncode == 0, done.stdout + done.stderr
    counts = job_counts(done.stdout)
    assert (counts["prepare"], counts["prepare_prompts"]) == (1, 2)  # hub data for all; prompts split by the seed
    (files,) = re.findall(r"^rule prepare_prompts:\n    input: (.*)\n    output: .*/seed-1/prompts/", done.stdout, re.M)
    assert "prompts.json" in files.split(", ")
    proof = "results/own/runs/ppo/disco-absent_beta-idle/seed-1/proof/provenance.json"
    assert inputs_of(done.stdout, proof) == {
        "results/own/shared/data/seed-1/prompts/tokens.json",
        "results/own/runs/rm/baseline/seed-1/provenance.json",
        "results/own/runs/dpo/disco-absent_beta-idle/seed-1/proof/provenance.json",
    }


def test_the_figures_that_are_expected_are_those_that_are_drawn(tmp_path: Path):
    done = dry_run(tmp_path, [ROOT / "config" / "smoke.yaml"])
    (files,) = re.findall(r"^(?:local)?rule figures:\n    input: .*\n    output: (.*)$", done.stdout, re.MULTILINE)
    names = {f"{name}-{stage}" for stage in ("rm", "dpo") for name in ("learning-curves", "reliability")}
    names |= {"learning-curves-ppo", "reward-by-noise-ppo", "interaction-dpo", "interaction-ppo"}
    names |= {"effects", "reward-kl-dpo", "reward-kl-ppo", "sigma-rm", "sigma-dpo", "scale-dpo", "scale-ppo"}
    expected = {f"results/smoke/figures/{name}.{ending}" for name in names for ending in ("svg", "pdf", "png")}
    assert set(files.split(", ")) == expected


def test_the_tables_that_are_expected_are_those_that_are_written(tmp_path: Path):
    done = dry_run(tmp_path, [ROOT / "config" / "smoke.yaml"])
    (files,) = re.findall(r"^(?:local)?rule tables:\n    input: .*\n    output: (.*)$", done.stdout, re.MULTILINE)
    names = ("rm", "dpo", "ppo", "effects", "comparisons", "neutrality", "cost", "rm-grid", "dpo-grid", "ppo-grid")
    expected = {f"results/smoke/tables/{name}.{ending}" for name in names for ending in ("csv", "md", "tex")}
    assert set(files.split(", ")) == expected | {
        f"results/smoke/tables/{name}" for name in ("metrics.csv", "config.yaml")
    }


@pytest.mark.parametrize("configs", ["smoke", "world worlds/both"])
def test_status_knows_every_job_by_its_output_and_its_log(configs: str, tmp_path: Path):
    """`discobeta status` reads states off these files; what it does not know, it could not count."""
    files = [ROOT / "config" / f"{name}.yaml" for name in configs.split()]
    done = dry_run(tmp_path, files, "--config", "seeds=[21, 22]")
    planned = {}
    for rule, outputs_of, log in re.findall(
        r"^(?:local)?rule (\w+):\n(?:    input: .*\n)?    output: (.*)\n    log: (.*)$", done.stdout, re.M
    ):
        if rule not in ALWAYS:
            planned[log] = set(outputs_of.split(", "))
    found = {str(job.log): str(job.target) for job in jobs_of(Study.read(files, ["seeds=[21, 22]"]))}
    assert found.keys() == planned.keys() and len(planned) > 20
    assert not {log: target for log, target in found.items() if target not in planned[log]}


def test_every_table_and_figure_has_a_text_in_the_report_and_no_text_is_left_over():
    texts = {path.stem for path in (ROOT / "workflow" / "report").glob("*.rst")}
    assert texts == {"workflow"} | {row.caption for row in (*outputs.TABLES, *outputs.FIGURES)}


@pytest.mark.parametrize("profile", ["slurm/config.yaml", "workflow/profiles/gpu/config.yaml"])
def test_profiles_give_every_stage_what_dpo_gets(profile: str):
    resources = yaml.safe_load((ROOT / profile).read_text())["set-resources"]
    assert resources["train_ppo"] == resources["train_rm"] == resources["train_dpo"]


COUNTED = """
import inspect, sys
asked, signature = [], inspect.signature
inspect.signature = lambda *words, **more: asked.append(words) or signature(*words, **more)
from snakemake.cli import main
try:
    main()
finally:
    print(f"signatures: {len(asked)}")
"""


def test_a_plan_does_not_ask_each_job_anew_what_its_functions_take(tmp_path: Path):
    """Snakemake by itself asks for 22 signatures a job here, which was a tenth of a plan of thousands."""
    (tmp_path / "config").symlink_to(ROOT / "config")
    command = [
        sys.executable,
        "-c",
        COUNTED,
        "--snakefile",
        ROOT / "workflow" / "Snakefile",
        "--dry-run",
        "--quiet",
        "rules",
    ]
    command += ["--profile", ROOT / "slurm", "--directory", tmp_path, "--configfile", ROOT / "config" / "smoke.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = sum(job_counts(done.stdout + done.stderr).values())
    assert int(re.search(r"signatures: (\d+)", done.stdout)[1]) < 5 * jobs


LOOKS = """
from snakemake.cli import main
from snakemake.scheduling.job_scheduler import JobScheduler
looks, select = [], JobScheduler.job_selector
JobScheduler.job_selector = lambda self, jobs: looks.append(len(jobs)) or select(self, jobs)
try:
    main()
finally:
    print(f"looks: {len(looks)}")
"""

MANY_JOBS = """
include: {pace!r}
rule all:
    input: expand("quick-{{n}}", n=range(16)), expand("slow-{{n}}", n=range(2))
rule quick:
    output: "quick-{{n}}"
    priority: 1
    shell: "touch {{output}}"
rule slow:
    output: "slow-{{n}}"
    shell: "sleep 3; touch {{output}}"
"""


def test_jobs_that_have_ended_do_not_make_the_scheduler_look_more_often(tmp_path: Path):
    """One look for each end of 19 jobs, and one a second: 6. By itself Snakemake looks 16 times a second at the end."""
    pace = ROOT / "workflow" / "rules" / "pace.smk"
    (tmp_path / "Snakefile").write_text(MANY_JOBS.format(pace=str(pace)))
    command = [sys.executable, "-c", LOOKS, "--cores", "1", "--directory", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("quick-*"))) == 16
    assert int(re.search(r"looks: (\d+)", done.stdout)[1]) < 40  # a look may take two ends, and a busy machine longer


def test_with_the_slurm_profile_every_job_asks_for_its_memory_and_time(tmp_path: Path):
    done = dry_run(tmp_path, [ROOT / "config" / "smoke.yaml"], "--profile", str(ROOT / "slurm"))
    assert done.returncode == 0, done.stdout + done.stderr
    asked = set()
    for rule, resources in re.findall(r"^rule (\w+):\n(?:    .*\n)*?    resources: (.*)$", done.stdout, re.MULTILINE):
        found = dict(re.findall(r"(\w+)=([^,]+)", resources))
        asked.add((rule, found["mem_mb"], found["runtime"], found.get("gpu")))
    scoring, training = ("32000", "240", "1"), ("32000", "720", "1")
    assert asked == {
        *(
            (rule, "8000", "30", None)
            for rule in ("world_corpus", "world_pairs", "prepare", "prepare_prompts", *ALWAYS)
        ),
        *((rule, *scoring) for rule in ("sft", "reference", "answers", "evaluate")),
        *((f"train_{stage}", *training) for stage in ("rm", "dpo", "ppo")),
    }


def refusal(tmp_path: Path, study: dict) -> str:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    done = dry_run(tmp_path, [path])
    output = done.stdout + done.stderr
    assert done.returncode == 1
    assert "Traceback" not in output
    assert "Job stats" not in output
    return output


def test_a_flag_in_a_study_is_refused_before_anything_runs(tmp_path: Path):
    study = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    study["dpo"]["disco_pref"] = True
    message = refusal(tmp_path, study)
    assert f"{tmp_path}/study.yaml: dpo: disco_pref may not stand here: it comes from the grid" in message


def test_a_run_that_would_be_refused_stops_the_study(tmp_path: Path):
    study = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    study["dpo"]["pref_bta"] = study["dpo"].pop("pref_beta")
    message = refusal(tmp_path, study)
    assert "study.yaml: dpo, arm baseline, seed 1: unknown key 'pref_bta'; did you mean 'pref_beta'?" in message


def test_an_unknown_key_of_a_study_is_refused(tmp_path: Path):
    study = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text()) | {"seedz": [1]}
    assert "unknown key 'seedz'; did you mean 'seeds'?" in refusal(tmp_path, study)


def test_a_key_that_stands_twice_is_refused_as_by_every_other_command(tmp_path: Path):
    """Snakemake's own reading would keep the last of them in silence."""
    study = yaml.safe_dump(yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text()))
    (tmp_path / "twice.yaml").write_text(study + "seeds: [2]\n")
    done = dry_run(tmp_path, [tmp_path / "twice.yaml"])
    message = done.stdout + done.stderr
    assert done.returncode == 1 and "key 'seeds' stands twice" in message and "Traceback" not in message


def test_a_missing_config_file_is_named(tmp_path: Path):
    done = dry_run(tmp_path, [tmp_path / "nowhere.yaml"])
    assert done.returncode != 0
    assert "nowhere.yaml" in done.stdout + done.stderr


# --- what jobs are asked for


def commands(output: str, program: str) -> list[list[str]]:
    """The shell lines of a dry run with --printshellcmds that pipe into `discobeta PROGRAM`, as words."""
    lines = [line for line in output.splitlines() if f"-m discobeta {program} " in line]
    return [shlex.split(line.removeprefix("Shell command: ")) for line in lines]


def test_jobs_are_asked_for_resolved_settings(tmp_path: Path):
    """A default that changes reruns what it changes: Snakemake compares the text of params, and `discobeta tables`
    the run's settings with what the study says now, so the two must say the same."""
    said = ["seeds=[2, 5]", "common={run_name: 'a #b'}"]
    done = dry_run(tmp_path, [ROOT / "config" / "smoke.yaml"], "--printshellcmds", "--config", *said)
    study = Study.read(ROOT / "config" / "smoke.yaml", said)
    asked = [json.loads(words[2]) for words in commands(done.stdout, "train")]
    assert {settings["run_name"] for settings in asked if settings["stage"] != "sft"} == {"a #b"}
    by_folder = {settings["output_dir"]: settings for settings in asked}
    assert len(asked) == 1 + len(study.runs())
    for run in study.runs():
        config, _ = RunConfig.from_mapping(study.run_settings(run))
        assert by_folder[str(run.directory)] == config.resolved()
    base, _ = RunConfig.from_mapping(study.base_settings())
    assert by_folder["results/smoke/shared/base"] == base.resolved()


def test_shared_steps_are_asked_for_with_the_defaults_that_they_depend_on_and_no_others(tmp_path: Path):
    done = dry_run(tmp_path, [ROOT / "config" / "hh-rlhf.yaml"], "--printshellcmds")
    for program in ("prepare", "reference", "answers"):
        asked = [json.loads(words[2]) for words in commands(done.stdout, program)]
        for settings in asked:
            assert {"cutoff_len", "split", "max_unusable_rows", "max_samples", "model_revision"} <= set(settings)
            assert not {"learning_rate", "pref_beta", "lora_rank", "ppo_epochs", "save_steps"} & set(settings)
            assert ("per_device_eval_batch_size" in settings) == (program != "prepare")
            assert ("temperature" in settings) == (program == "answers")
            RunConfig.from_mapping(settings)


def test_tables_and_figures_are_made_of_runs_that_count_only(tmp_path: Path):
    done = dry_run(tmp_path, [ROOT / "config" / "smoke.yaml"], "--printshellcmds")
    for words in ("tables --strict", "figures --strict", "page --strict --drawn"):
        assert f"| python -m discobeta {words} --configfile - &> " in done.stdout


@pytest.mark.parametrize("trust", [True, False])
def test_code_that_comes_with_a_base_is_run_in_evaluations_if_the_study_says_so(trust: bool, tmp_path: Path):
    study = FIXED | {"base": {"model_name_or_path": "a/model", "trust_remote_code": trust}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    done = dry_run(tmp_path, [tmp_path / "study.yaml"], "--printshellcmds")
    lines = commands(done.stdout, "evaluate")
    assert len(lines) == 2
    assert all(("--trust-remote-code" in words) == trust for words in lines)


def test_an_evaluation_is_there_with_its_record(tmp_path: Path):
    done = dry_run(tmp_path, [ROOT / "config" / "smoke.yaml"])
    (files,) = re.findall(r"^rule evaluate:\n    input: .*\n    output: (.*/rm/baseline/seed-1/.*)$", done.stdout, re.M)
    assert {Path(name).name for name in files.split(", ")} == {
        "metrics.json", "examples.parquet", "evaluation.json", "evaluation_cost.json",
    }  # fmt: skip


# --- paths that the shell or Snakemake could misread

FIXED = {
    "study": "odd",
    "seeds": [1],
    "stages": ["rm"],
    "arms": ["baseline", "disco-used_beta-absent"],
    "data": {"dataset": "rows.jsonl", "eval_dataset": "held-out.jsonl"},
    "base": {"model_name_or_path": "a/model"},
}
ODD = "a b'c\"d$HOME;e&f`g`#h"


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"data": {"dataset": "a{x}.jsonl", "eval_dataset": "b.jsonl"}}, "data: dataset: 'a{x}.jsonl'"),
        ({"data": {"dataset": ["a", "b"], "eval_dataset": "{"}}, "data: eval_dataset: '{'"),
        ({"base": {"model_name_or_path": "./{base}"}}, "base: model_name_or_path: './{base}'"),
        ({"base": {"model_name_or_path": "m", "adapter_name_or_path": "}"}}, "base: adapter_name_or_path: '}'"),
        ({"base": {"sft": {"model_type": "qwen3", "dataset": "{x}"}}}, "base: sft: dataset: '{x}'"),
        ({"prompts": {"dataset": "{x}", "val_size": 1}}, "prompts: dataset: '{x}'"),
    ],
)
def test_braces_in_what_rules_read_are_refused(changes: dict, key: str, tmp_path: Path):
    assert f"study.yaml: {key}: Snakemake takes braces for wildcards" in refusal(tmp_path, FIXED | changes)


def test_braces_elsewhere_are_text(tmp_path: Path):
    base = {"sft": {"model_type": "qwen3", "dataset_dir": "a{x}", "run_name": "{wildcards.seed} {{y}}"}}
    study = FIXED | {"base": base, "data": FIXED["data"] | {"dataset_dir": "b{x}"}, "common": {"run_name": "{x}"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    done = dry_run(tmp_path, [tmp_path / "study.yaml"], "--printshellcmds")
    assert done.returncode == 0, done.stdout + done.stderr
    asked = [json.loads(words[2]) for words in commands(done.stdout, "train")]
    assert {settings["run_name"] for settings in asked} == {"{wildcards.seed} {{y}}", "{x}"}
    assert {settings["dataset_dir"] for settings in asked} == {"a{x}", "b{x}"}


def test_a_rule_reads_what_it_is_told_to_whatever_the_paths_are_called(tmp_path: Path, base: Path, pairs: dict):
    """Model and data in a folder whose name a shell would take apart, for real."""
    folder = tmp_path / ODD
    shutil.copytree(base, folder / "base")
    for name, path in pairs.items():
        shutil.copy(path, folder / f"{name}.jsonl")
    study = FIXED | {
        "data": {"dataset": str(folder / "train.jsonl"), "eval_dataset": str(folder / "eval.jsonl"), "cutoff_len": 32},
        "base": {"model_name_or_path": str(folder / "base")},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    planned = dry_run(tmp_path, [tmp_path / "study.yaml"])
    (files,) = re.findall(r"^rule prepare:\n    input: (.*)\n    output: ", planned.stdout, re.M)
    for name in ("train.jsonl", "eval.jsonl", "base/model.safetensors", "base/config.json", "base/tokenizer.json"):
        assert f"{folder}/{name}" in files
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile", "--cores", "1"]
    command += ["--directory", tmp_path, "--configfile", tmp_path / "study.yaml", "--until", "prepare"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    tokens = json.loads((tmp_path / "results/odd/shared/data/all/tokens/tokens.json").read_text())
    assert tokens["counts"] == {"train": 40, "eval": 12}


# --- what is shown meanwhile

TOY = """
rule all:
    input: [f"results/{arm}/seed-{seed}/provenance.json" for arm in ("x", "y") for seed in (1, 2)]
rule train_rm:
    output: "results/{arm}/seed-{seed}/provenance.json"
    log: "logs/{arm}/seed-{seed}.log"
    shell:
        "( echo 9600 rows; [ {wildcards.arm}{wildcards.seed} != FAILS ] || {{ echo 'discobeta: diverged'; exit 2; }};"
        " sleep 0.4; touch {output} ) &> {log}"
"""


def quietly(folder: Path, fails: str, **options) -> list:
    (folder / "Snakefile").write_text(TOY.replace("FAILS", fails))
    return [sys.executable, "-m", "snakemake", "--cores", "2", "--keep-going", "--logger", "discobeta", "-d", folder]


def test_the_quiet_view_says_how_many_there_are_and_what_failed_and_how_to_do_it_again(tmp_path: Path):
    """Into a pipe: plain lines. Snakemake's own words are in its log, whose place is said."""
    command = [*quietly(tmp_path, "y2"), "--config", "note=a b", "-p"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    first, *lines = done.stderr.splitlines()
    assert first == "4 jobs: rm 4"
    place = lines.index("FAILED: rm y seed-2")
    assert lines[place + 1 : place + 5] == [
        "  the end of logs/y/seed-2.log:",
        "  | 9600 rows",
        "  | discobeta: diverged",
        "  again: the same command, which goes on with the rest too; it alone: "
        "snakemake results/y/seed-2/provenance.json --cores all --config 'note=a b'",
    ]
    assert re.fullmatch(r"3 of 4 jobs in \d+ s, 1 failed", lines[-1])
    (log,) = [line.partition(": ")[2] for line in lines if line.startswith("Snakemake's log: ")]
    assert Path(log).read_text().count("rule train_rm:") == 5  # four that were begun, and the one that failed
    assert len(lines) < 12 and not re.search(r"[\r\x1b]", done.stderr)


def test_the_quiet_view_is_one_line_on_a_terminal(tmp_path: Path):
    master, slave = pty.openpty()
    size = {"LINES": "30", "COLUMNS": "50"}
    process = subprocess.Popen(
        quietly(tmp_path, "none"), stdout=slave, stderr=slave, cwd=tmp_path, env=os.environ | size
    )
    os.close(slave)
    shown = b""
    with suppress(OSError):  # the other end is closed
        while part := os.read(master, 4096):
            shown += part
    assert process.wait(60) == 0
    drawn = [line for line in re.split(r"[\r\n]+", shown.decode()) if line.endswith("\x1b[K")]
    assert drawn, shown
    assert max(len(line.removesuffix("\x1b[K")) for line in drawn) < 50
    stays = re.sub(r"\r[^\r\n]*\x1b\[K", "", shown.decode()).split("\r\n")
    assert stays[0] == "4 jobs: rm 4" and re.fullmatch(r"4 of 4 jobs in \d+ s", stays[-2])
    assert len(stays) == 4 and stays[1].startswith("Snakemake's log: ")


def test_a_dry_run_is_shown_as_ever(tmp_path: Path):
    command = quietly(tmp_path, "none")
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and done.stdout.count("rule train_rm:") == 4


# --- several GPUs of one machine

TRAINING = """
import json, os, time
from pathlib import Path
def train(config):
    begun = time.monotonic()
    time.sleep(0.5)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    told = [os.environ.get("CUDA_VISIBLE_DEVICES"), begun, time.monotonic()]
    Path(config.output_dir, "told.json").write_text(json.dumps(told))
    Path(config.output_dir, "provenance.json").write_text("{}")
"""


def test_the_gpu_profile_spreads_runs_over_the_devices(tmp_path: Path):
    """Three devices that are only pretended, and a training that only says which it sees; the rest is as it is."""
    for name in ("workflow", "src", "envs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (tmp_path / "src" / "discobeta" / "run" / "train.py").write_text(TRAINING)
    tokens = tmp_path / "results/odd/shared/data/all/tokens"
    tokens.mkdir(parents=True)
    made = [tmp_path / name for name in ("rows.jsonl", "held-out.jsonl")]
    made += [tokens / name for name in ("tokens.json", "train.parquet", "eval.parquet")]
    for path in made:  # rows first, so that nothing is to be tokenised
        path.write_text("{}")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(FIXED | {"seeds": [1, 2, 3, 4]}))
    devices = [f"odd-{os.getpid()}-{number}" for number in range(4)]
    command = [sys.executable, "-m", "snakemake", "--profile", "workflow/profiles/gpu", "--configfile", "study.yaml"]
    command += ["--resources", "gpu=3", "--cores", "8", "--until", "train_rm"]
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SLURM_JOB_ID")}
    variables["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [json.loads(path.read_text()) for path in tmp_path.rglob("told.json")]
    assert len(runs) == 8
    by_device: dict[str, list] = {}
    for seen, begun, ended in runs:
        by_device.setdefault(seen, []).append((begun, ended))
    assert set(by_device) <= set(devices[:3]) and len(by_device) > 1  # as many as were asked for, of those to be seen
    for times in by_device.values():
        times.sort()
        assert all(ended <= begun for (_, ended), (begun, _) in pairwise(times))


def test_more_gpus_than_may_be_seen_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    profile = ("--profile", str(ROOT / "workflow" / "profiles" / "gpu"), "--resources", "gpu=3")
    done = dry_run(tmp_path, [ROOT / "config" / "smoke.yaml"], *profile)
    assert done.returncode == 1 and "--resources gpu=3, and 2 may be seen: 4,5" in done.stdout + done.stderr
