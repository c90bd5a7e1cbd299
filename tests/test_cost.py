"""The estimate of a study, against sums worked out by hand; what can be fetched ahead."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from discobeta import cli
from discobeta.data import counts
from discobeta.design import cost
from discobeta.design.config import RunConfig
from discobeta.design.cost import estimate, find, length, report
from discobeta.design.schedule import schedule_of
from discobeta.design.study import Study
from discobeta.errors import UserError
from discobeta.inputs.fetch import fetch
from discobeta.run.flops import SHAPES, UNGATED, Arithmetic, shape_of

ROOT = Path(__file__).parents[1]

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
    with pytest.raises(
        UserError, match="give --rows train=N eval=M, run `discobeta fetch` or `snakemake … --until prepare` first"
    ):
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
        assert rm == ["rm", "1", "100", minutes, "4.00", "2.0", "4.00–4.00", "measured,", "1", "runs"]


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


# --- rows that are not tokenised, and rates that nobody has measured


def counted(**settings) -> tuple | None:
    config, _ = RunConfig.from_mapping({"stage": "rm", "model_name_or_path": "m"} | settings)
    found = counts.rows_of(config)
    return found and (found.train, found.held_out, found.why)


def test_rows_of_files_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    lines = "".join(f"{json.dumps(row)}\n\n" for _ in range(9))
    Path("a.jsonl").write_text(lines)
    Path("b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Path("c.json").write_text(json.dumps([row] * 7, indent=1))
    pd.DataFrame([row] * 5).to_parquet("d.parquet")
    assert counted(dataset="a.jsonl", eval_dataset="c.json") == (9, 7, "rows of a.jsonl; held out: rows of c.json")
    assert counted(dataset="b.jsonl.gz,d.parquet")[:2] == (14, 0)
    assert counted(dataset="a.jsonl,d.parquet", max_samples=6, eval_dataset="c.json")[:2] == (11, 6)
    assert counted(dataset="a.jsonl", val_size=2)[:2] == (7, 2)
    assert counted(dataset="a.jsonl", val_size=0.5)[:2] == (5, 4)  # 4.5, rounded to even as Python does
    with pytest.raises(UserError, match="no such file"):
        counted(dataset="nowhere.jsonl")


def test_rows_of_the_hub_are_those_of_its_cache_or_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    assert counted(dataset="Some/MyData", eval_dataset="Some/MyData") is None
    assert counted(dataset="Anthropic/hh-rlhf", eval_dataset="Anthropic/hh-rlhf")[:2] == (160_800, 8_552)
    folder = tmp_path / "datasets" / "Some___my_data" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(
        '{"splits": {"train": {"num_examples": 50}, "test": {"num_examples": 6}}}'
    )
    assert counted(dataset="Some/MyData", eval_dataset="Some/MyData") == (
        50,
        6,
        "rows of Some/MyData in the hub's cache",
    )
    (folder / "dataset_info.json").write_text("[")
    assert counted(dataset="Some/MyData", eval_dataset="Some/MyData") is None


@pytest.mark.parametrize("name", ["qwen3-0.6b", "hh-rlhf"])
def test_a_shipped_study_for_gpus_is_answered_without_a_network(name, tmp_path, monkeypatch, capsys):
    """160,800 pairs in steps of 16 x 4 are 2,512.5. Here as if no GPU had ever been measured."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cost, "PUBLISHED", tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cli.main(["cost", "--configfile", f"config/{name}.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = {line[:12].strip(): line.split() for line in lines}
    assert said["rm"][1:3] == ["4", "2,513"] and said["ppo"][-5:-4] != ["?"] and "GPU-hours" in lines[0]
    kinds = ["reference", "answers", "rm", "rm, proof", "dpo", "dpo, proof", "ppo", "ppo, proof", "evaluate"]
    assert all(said[kind][-1] == "estimate" for kind in kinds)
    low, high = (float(hours) for hours in said["total"][-1].split("–"))
    assert 0 < low < float(said["total"][2]) < high
    text = "\n".join(lines)
    assert "160,800 rows to train on, 8,552 held out: rows of Anthropic/hh-rlhf as published" in text
    assert "not measured" in text and "15% to 45%" in text and "upper bound" in text


def test_a_shipped_study_for_gpus_has_the_rates_of_the_gpu_that_was_measured(monkeypatch, capsys):
    """In the published check 64 pairs of rm take a step of .573 s: 160,832 pairs .4 hours, and so many runs."""
    monkeypatch.chdir(ROOT)
    words = ["--rows", "train=160800", "eval=8552", "tokens=314"]
    assert cli.main(["cost", "--configfile", "config/qwen3-0.6b.yaml", *words]) == 0
    out = capsys.readouterr().out
    said = {line[:12].strip(): line.split() for line in out.splitlines()}
    assert said["rm"][-3:] == ["measured,", "1", "runs"] and said["dpo"][-3:] == ["measured,", "3", "runs"]
    assert float(said["rm"][4]) == pytest.approx(4 * 2513 * 0.5735 / 3600, abs=0.01)
    assert "Rates measured in results/published/gpu-check (5 runs on NVIDIA H200)." in out


def test_what_is_estimated_for_that_gpu_brackets_what_was_measured(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    study, rows = Study.read(["config/qwen3-0.6b.yaml"], []), counts.Count(160_800, 8_552, "as --rows says", tokens=314)
    paid = {step.name: step for step in estimate(study, find(study, None), rows)}
    for step in estimate(study, None, rows, Arithmetic(study, "H200", rows)):
        if step.name in ("rm", "dpo", "ppo"):
            assert step.low < paid[step.name].seconds < step.high, step.name


GATED = ["qwen3", "llama", "gemma2", "mistral", "olmo2", "granite", "cohere", "phi3", "smollm3", "stablelm", "glm4"]


@pytest.mark.parametrize("kind", [*GATED, *sorted(UNGATED)])
def test_operations_of_a_pass_are_those_that_torch_counts(kind, tmp_path):
    """torch counts all of the (T, T) attention, of which a causal one needs half."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 19, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind not in ("biogpt", "gpt_neox", "persimmon"):  # which have as many heads of keys and values
        sizes["num_key_value_heads"] = 2
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = AutoConfig.for_model(kind, **sizes, **special, intermediate_size=64, head_dim=8)
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    shape = shape_of(json.loads((tmp_path / "config.json").read_text()))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(3, 16, dtype=torch.long))
    causal = shape.forward(3 * 16, 16, with_logits=3 * 16)
    rotations = counter.get_total_flops() - causal - 2 * 3 * 16 * 16 * shape.attention
    assert 0 <= rotations < 0.01 * causal


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_are_not_taken_for_layers_that_all_tokens_pass(kind, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="expert"):
        shape_of(json.loads((tmp_path / "config.json").read_text()))


def test_what_was_measured_is_said_of_a_base_whose_work_cannot_be_worked_out(tmp_path, monkeypatch, capsys):
    """GPT-2's config has other names of its sizes; where a card is asked for, that is the answer."""
    from transformers import GPT2Config

    monkeypatch.chdir(tmp_path)
    GPT2Config(n_layer=2, n_embd=32, n_head=2).save_pretrained(tmp_path / "gpt2")
    study = SETTINGS | {"environment": "cuda", "stages": ["rm"], "base": {"model_name_or_path": "gpt2"}}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    words = ["cost", "--configfile", "study.yaml", "--rows", "train=100"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "Not measured, and in no sum: rm" in said and "No estimate of what was not measured: config.json of" in said
    assert "GPU-hours" in said and "CPU-hours" not in said
    assert cli.main([*words, "--card", "A100"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_shape_of_qwen3_is_that_of_its_card():
    """0.44 billion weights without embeddings; 0.6 with the one matrix that is embedding and head."""
    shape = shape_of(SHAPES["Qwen/Qwen3-0.6B"])
    assert round(shape.body / 1e9, 2) == 0.44 and round((shape.body + shape.head) / 1e9, 1) == 0.6


def on_a_gpu(**changes) -> Study:
    common = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "bf16": True, "cutoff_len": 100}
    cutoff = {"cutoff_len": common.pop("cutoff_len")}
    settings = SETTINGS | {"environment": "cuda", "common": common, "base": {"model_name_or_path": "Qwen/Qwen3-0.6B"}}
    return Study(settings | {"data": SETTINGS["data"] | cutoff, "stages": ["rm"]} | changes)


def test_the_estimate_is_operations_over_a_share_of_the_peak(monkeypatch):
    """rm: 4 runs of 2 x 1000 pairs, each 150 tokens; with LoRA forward and backward cost the same."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = counts.Count(1000, 50, "as --rows says", tokens=150)
    study = on_a_gpu()
    steps = {step.name: step for step in estimate(study, None, rows, Arithmetic(study, "A100", rows))}
    body, attention = 440_401_920, 28 * 16 * 128
    one = 2 * 150 * body + 2 * 150 * 100 * attention
    assert steps["rm"].length == "500"
    assert steps["rm"].low == pytest.approx(4 * 2000 * 2 * one / (312e12 * 0.45))
    # 500 steps of a pass each, whose backward has the launches of two: more than 2000 x 150 tokens of 8192 a pass
    assert steps["rm"].high == pytest.approx(4 * 500 * 3 * 28 * 3.3e-3)
    assert steps["evaluate"].high == pytest.approx(4 * 50 * one / (312e12 * 0.15))  # the launches of one pass take less
    full = on_a_gpu(rm={"finetuning_type": "full", "gradient_checkpointing": True})
    more = {step.name: step for step in estimate(full, None, rows, Arithmetic(full, "A100", rows))}
    assert more["rm"].low == pytest.approx(2 * steps["rm"].low)  # 1 + 2 + 1 passes instead of 1 + 1
    plain = on_a_gpu(rm={"bf16": False})
    unknown = {step.name: step for step in estimate(plain, None, rows, Arithmetic(plain, "A100", rows))}
    assert unknown["rm"].seconds is None and unknown["rm"].rate == "not known"


def test_bounds_are_the_fastest_and_the_slowest_run_that_was_measured(tmp_path):
    runs = [("rm", "baseline", 10.0, 40, 0.0, 2.0, 5.0)]
    folder = tables(tmp_path / "t", runs)
    slow = pd.read_csv(folder / "metrics.csv").assign(seed=2)
    slow.loc[slow.metric == "cost/seconds", "value"] = 30.0
    pd.concat([pd.read_csv(folder / "metrics.csv"), slow]).to_csv(folder / "metrics.csv", index=False)
    study = Study(SETTINGS | {"arms": ["baseline"], "stages": ["rm"], "seeds": [1]})
    step = next(step for step in estimate(study, find(study, folder)) if step.name == "rm")
    assert (step.low, step.seconds, step.high) == pytest.approx((400 * 0.25, 400 * 0.5, 400 * 0.75))
    assert step.rate == "measured, 2 runs"


@pytest.mark.parametrize("words", [["train=x"], ["eval=5"], ["trian=5"], ["train=0"], ["train=5", "tokens=0"], ["5"]])
def test_rows_that_say_nothing_are_refused(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(["cost", "--configfile", "config/qwen3-0.6b.yaml", "--rows", *words]) == 2
    assert capsys.readouterr().err.startswith("discobeta: --rows: ")


def test_rows_that_cannot_be_counted_are_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    words = ["cost", "--configfile", "config/hh-rlhf.yaml", "--set", "data={dataset: no/such, eval_dataset: no/such}"]
    assert cli.main(words) == 2
    assert "give --rows train=N eval=M" in capsys.readouterr().err
    assert cli.main([*words, "--rows", "train=640", "eval=10", "prompts=8"]) == 0
    said = {line[:12].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert said["rm"][2] == "10"  # of 64
