"""The estimate of a study, against sums worked out by hand; what can be fetched ahead."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from discobeta import cli
from discobeta.design.cost import estimate, find, length, report
from discobeta.design.schedule import schedule_of
from discobeta.design.study import Study
from discobeta.errors import UserError
from discobeta.inputs.fetch import fetch

SETTINGS = {
    "study": "s", "seeds": [1, 2], "arms": ["baseline", "disco-used_beta-absent"], "idle_arms": "run",
    "data": {"dataset": "a.jsonl", "eval_dataset": "b.jsonl"}, "base": {"model_name_or_path": "m"},
    "common": {"per_device_train_batch_size": 4, "max_steps": 100},
    "ppo": {"max_steps": 10, "ppo_buffer_size": 3, "gradient_accumulation_steps": 2},
}  # fmt: skip


def tables(folder: Path, runs: list[tuple], shared: float = 50.0, config: dict | None = None) -> Path:
    """metrics.csv of runs (stage, arm, seconds, rows, gpu seconds, GiB, evaluation seconds), cost.csv, config.yaml."""
    folder.mkdir(parents=True)
    names = ["cost/seconds", "cost/rows", "cost/gpu_seconds", "cost/peak_memory_bytes", "evaluation_cost/seconds"]
    rows = []
    for stage, arm, seconds, count, gpu, gib, evaluation in runs:
        values = (seconds, count, gpu, gib * 2**30, evaluation)
        rows += [(stage, arm, 1, name, value) for name, value in zip(names, values, strict=True)]
        rows.append((stage, arm, 1, "cost/processes", gpu / seconds or 1))
        rows.append((stage, arm, 1, "accuracy", 0.5))
    pd.DataFrame(rows, columns=["stage", "arm", "seed", "metric", "value"]).to_csv(folder / "metrics.csv", index=False)
    works = [{"stage": "shared", "work": work, "seconds": shared} for work in ("reference", "answers")]
    pd.DataFrame(works).to_csv(folder / "cost.csv", index=False)
    (folder / "config.yaml").write_text(json.dumps(config or SETTINGS))
    return folder


RUNS = [
    ("rm", "baseline", 10.0, 40, 10.0, 2.0, 5.0),
    ("rm", "disco-used_beta-absent", 20.0, 40, 20.0, 3.0, 5.0),
    ("dpo", "baseline", 40.0, 80, 40.0, 4.0, 7.0),
    ("ppo", "baseline", 24.0, 48, 24.0, 8.0, 9.0),
]


def test_steps_and_rows_of_a_run():
    study = Study(SETTINGS)
    assert length(study, study.run("rm", "baseline", 1)) == (100, 400)
    assert length(study, study.run("ppo", "baseline", 1)) == (10, 10 * 4 * 2 * 3)
    shared = Study(SETTINGS | {"gpus_per_run": 2})
    assert length(shared, shared.run("rm", "baseline", 1)) == (100, 400)  # the same, on two devices


def test_epochs_need_the_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = Study(SETTINGS | {"common": {"per_device_train_batch_size": 4, "num_train_epochs": 2}})
    run = study.run("rm", "baseline", 1)
    with pytest.raises(UserError, match="run `snakemake … --until prepare` first"):
        length(study, run)
    folder = study.tokens("all")
    folder.mkdir(parents=True)
    (folder / "tokens.json").write_text(json.dumps({"counts": {"train": 41}}))
    assert length(study, run) == (22, 82)  # twice 10 steps of 4 rows and one of a single row
    capped = Study(SETTINGS | {"common": {"per_device_train_batch_size": 4, "max_steps": 13}})
    assert length(capped, run) == (13, 41 + 2 * 4)


@pytest.mark.parametrize(
    ("stage", "changes", "devices", "expected"),
    [
        ("rm", {"num_train_epochs": 1.5}, 1, (17, 41 + 6 * 4)),  # 1.5 * 11 steps an epoch = 16.5
        ("dpo", {"num_train_epochs": 2}, 2, (20, 80)),  # the 41st row of an epoch has no partner on the other device
        ("dpo", {"num_train_epochs": 2, "gradient_accumulation_steps": 5}, 1, (6, 82)),  # 20, 20 and 1, twice
        ("ppo", {"num_train_epochs": 2}, 1, (7, 84)),  # 82 rows in buffers of 12, all of them full: 6.8
    ],
)
def test_the_steps_are_those_of_the_loop(stage, changes, devices, expected, tmp_path, monkeypatch):
    """Counted by hand, and by going through the loop's own schedule row by row."""
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS | {"common": {"per_device_train_batch_size": 4} | changes, "gpus_per_run": devices}
    study = Study(settings | {"ppo": {"ppo_buffer_size": 3}})
    run = study.run(stage, "baseline", 1)
    folder = study.prompts("all") if stage == "ppo" else study.tokens("all")
    folder.mkdir(parents=True)
    (folder / "tokens.json").write_text(json.dumps({"counts": {"train": 41}}))
    assert length(study, run) == expected
    schedule = schedule_of(study.config(run), 41, devices)
    assert sum(len(schedule.step_rows(step)) for step in range(expected[0])) == expected[1]
    assert len(schedule.step_rows(expected[0] - 1)) > 0


def test_an_estimate_needs_no_torch():
    code = "import sys, discobeta.design.cost; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_estimate_is_runs_times_measured_rates(tmp_path):
    study = Study(SETTINGS)
    steps = {step.name: step for step in estimate(study, find(study, tables(tmp_path / "t", RUNS)))}
    # rm: 2 seeds of 400 rows at .25 and .5 s a row; dpo: 4 runs at .5, one arm's rate standing for the other's;
    # ppo: 4 runs of 240 rows at .5
    assert steps["rm"].jobs == 4 and steps["rm"].seconds == pytest.approx(2 * 400 * 0.25 + 2 * 400 * 0.5)
    assert steps["dpo"].jobs == 4 and steps["dpo"].seconds == pytest.approx(4 * 400 * 0.5)
    assert steps["ppo"].jobs == 4 and steps["ppo"].seconds == pytest.approx(4 * 240 * 0.5)
    assert steps["reference"].jobs == 1 and steps["reference"].seconds == 50
    assert steps["answers"].jobs == 2 and steps["answers"].seconds == 2 * 50  # of ppo, for each seed
    assert steps["evaluate"].jobs == 12 and steps["evaluate"].seconds == pytest.approx(4 * 5 + 4 * 7 + 4 * 9)
    assert steps["rm"].memory == 3 * 2**30
    text = report(study, tmp_path / "t")
    total = (600 + 800 + 480 + 50 + 100 + 84) / 3600
    assert "GPU-hours" in text.splitlines()[0] and f"{total:.2f}" in next(
        line for line in text.splitlines() if line.startswith("total")
    )
    assert "8.0" in text and "Rates measured in" in text
    assert "That study has another" not in text and "Not measured" not in text


def test_what_was_not_measured_is_in_no_sum(tmp_path):
    study = Study(SETTINGS)
    text = report(study, tables(tmp_path / "t", RUNS[:3]))
    assert "Not measured, and in no sum: ppo, evaluate." in text
    total = next(line for line in text.splitlines() if line.startswith("total"))
    assert f"{(600 + 800 + 50 + 100) / 3600:.2f}" in total
    assert "CPU-hours" in report(
        Study(SETTINGS | {"study": "other"}), tables(tmp_path / "c", [("rm", "baseline", 1, 1, 0, 1, 1)])
    )


def test_hours_are_of_devices_and_minutes_of_jobs(tmp_path):
    """An hour of a run on four GPUs, measured on four: the same run on two takes two hours, and the same GPU-hours."""
    settings = SETTINGS | {"seeds": [1], "arms": ["baseline"], "stages": ["rm"]}
    folder = tables(tmp_path / "t", [("rm", "baseline", 3600.0, 400, 4 * 3600.0, 2.0, 0.0)])
    for devices, minutes in ((4, "60.0"), (2, "120.0")):
        text = report(Study(settings | {"gpus_per_run": devices}), folder)
        rm = next(line.split() for line in text.splitlines() if line.startswith("rm "))
        assert rm == ["rm", "1", "100", minutes, "4.00", "2.0"]


def test_another_studys_rates_are_called_that(tmp_path):
    folder = tables(
        tmp_path / "t", RUNS, config=SETTINGS | {"common": {"max_steps": 5}, "base": {"model_name_or_path": "n"}}
    )
    assert "That study has another base, common: the rates may not carry over." in report(Study(SETTINGS), folder)
    with pytest.raises(UserError, match=r"has no metrics\.csv"):
        report(Study(SETTINGS), tmp_path)


HEADER = "stage,arm,seed,metric,value\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", ""),
        ("metrics.csv", "\x00\xff"),
        ("metrics.csv", "a,b\n1,2\n"),
        ("metrics.csv", HEADER + "rm,baseline,1,cost/seconds,many\n"),
        ("metrics.csv", HEADER + "rm,baseline\n1,2,3,4,5,6,7\n"),
        ("metrics.csv", HEADER + "rm,baseline,1,cost/rows,-5\nrm,baseline,1,cost/seconds,5\n"),
        ("metrics.csv", HEADER + "rm,baseline,1,cost/rows,0\nrm,baseline,1,cost/seconds,5\n"),
        ("metrics.csv", HEADER + "rm,baseline,1,cost/rows,5\nrm,baseline,1,cost/seconds,inf\n"),
        ("cost.csv", "a\n1\n"),
        ("cost.csv", "stage,work,seconds\nshared,base,long\n"),
        ("config.yaml", "[1]"),
        ("config.yaml", "{"),
    ],
)
@pytest.mark.parametrize("published", [False, True])
def test_tables_that_are_none_are_refused_in_a_line(name, content, published, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tables(Path("results/published/x" if published else "t"), RUNS)
    (folder / name).write_bytes(content.encode("latin-1"))
    Path("study.yaml").write_text(json.dumps(SETTINGS))
    words = [] if published else ["--measured", str(folder)]
    assert cli.main(["cost", "--configfile", "study.yaml", *words]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert str(folder) in message


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"counts": 5}', '{"counts": {"train": "41"}}', '{"counts": {}}', '{"counts": {"train": 0}}']
)
def test_tokens_that_do_not_say_how_many_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = Study(SETTINGS | {"common": {"num_train_epochs": 2}})
    study.tokens("all").mkdir(parents=True)
    (study.tokens("all") / "tokens.json").write_text(content)
    with pytest.raises(UserError, match=r"tokens\.json"):
        length(study, study.run("rm", "baseline", 1))


def test_proofs_are_their_steps_only(tmp_path):
    settings = SETTINGS | {
        "idle_arms": "prove", "prove_steps": 12, "arms": ["baseline", "disco-idle_beta-absent"], "stages": ["rm"],
    }  # fmt: skip
    study = Study(settings)
    steps = {step.name: step for step in estimate(study, find(study, tables(tmp_path / "t", RUNS)))}
    assert steps["rm"].jobs == 2 and steps["rm, proof"].jobs == 4 and steps["rm, proof"].length == "12"
    assert steps["evaluate"].jobs == 2
    assert steps["rm, proof"].seconds == pytest.approx(4 * 48 * 0.25)  # the idle arm at its twin's rate


def test_fetch_names_what_is_there_and_what_is_not(base, pairs, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = SETTINGS | {
        "data": {"dataset": str(pairs["train"]), "eval_dataset": str(pairs["eval"])},
        "base": {"model_name_or_path": str(base)},
    }  # fmt: skip
    fetch(Study(settings))
    out = capsys.readouterr().out
    assert (
        f"{base}: a local folder" in out and f"{pairs['train']}: 40 rows" in out and f"{pairs['eval']}: 12 rows" in out
    )
    with pytest.raises(UserError, match="cannot fetch nobody/no-such-model"):
        fetch(Study(settings | {"base": {"model_name_or_path": "nobody/no-such-model"}}))
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        fetch(Study(settings | {"data": {"dataset": "nowhere.jsonl", "eval_dataset": str(pairs["eval"])}}))
