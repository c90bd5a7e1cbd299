"""The benchmarks run, on small shapes and for a few steps, and their gate closes when it should."""

import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import discobeta
from discobeta import cli
from discobeta.design.cost import estimate, read
from discobeta.design.study import Study

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_check")


def test_the_gpu_check_runs_on_a_small_shape_and_says_what_was_measured(gpu_check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "train", lambda path: cli.main(["train", str(path), "--no-evaluate"]))
    assert gpu_check.main(["--small", "--steps", "6", "--no-trl", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert set(found["idle against absent"].values()) == {"equal"}
    lines = (tmp_path / "gpu-check.md").read_text().splitlines()
    assert set(found["cost"]) == set(gpu_check.RUNS) and not found["trl"]
    for label, cost in found["cost"].items():
        counted = cost["seconds_of_steps"] if label.startswith("ppo") else cost["seconds_of_steps"][4:]
        rows = 8  # pairs of a step, and 2 x 4 responses of an update
        assert cost["rows"] == rows * len(cost["seconds_of_steps"])
        (line,) = [line for line in lines if line.startswith(f"| {label} |")]
        assert float(re.split(r" *\| *", line)[3]) == pytest.approx(rows / statistics.median(counted), abs=0.051)
        assert cost["estimated_peak_bytes"] > 2 * 2048 * 128  # at least the embedding in bf16
    assert capsys.readouterr().out.count("gpu_check.py") == 1
    changed = "common={per_device_train_batch_size: 16, gradient_accumulation_steps: 4, max_steps: 10}"
    study = Study.read([SCRIPT.parent.parent / "config" / "qwen3-0.6b.yaml"], ["stages=[rm,dpo]", changed])
    steps = {step.name: step for step in estimate(study, read(study, tmp_path))}
    a_pair = statistics.median(found["cost"]["rm baseline"]["seconds_of_steps"][4:]) / 8
    assert steps["rm"].seconds == pytest.approx(steps["rm"].jobs * 10 * 64 * a_pair)
    assert steps["evaluate"].seconds is None  # which is not measured there


def test_what_trl_is_asked_for_is_what_it_does(gpu_check, base, pairs, tmp_path):
    wanted = {
        "stage": "dpo", "base": str(base), "dataset": str(pairs["train"]), "output_dir": str(tmp_path), "steps": 3,
        "pairs_per_step": 4, "batch": 1, "cutoff_len": 64, "bf16": False, "checkpointing": False, "times": 2,
    }  # fmt: skip
    found = gpu_check.run_trl(wanted)
    assert found["microbatch"] == 2 and len(found["seconds_of_steps"]) == 3
    assert found["rows_per_second"] == pytest.approx(4 / found["seconds_of_steps"][-1])
    assert "absent" in gpu_check.run_trl(wanted | {"base": str(tmp_path / "absent")})["error"]


def test_utilisation_is_worked_out_by_hand(gpu_check):
    # 28 blocks of 2 x 1024 x 2048 + 2 x 1024 x 1024 + 3 x 1024 x 3072 = 15,728,640 weights on 113 + 39 + 49 tokens,
    # 1024 x 151,936 = 155,582,464 on 39 + 49, 4 operations each: 409 G a pair
    shape = gpu_check.SHAPES["qwen3-0.6b"]
    share = gpu_check.utilisation("dpo", 100, [113, 39, 49], shape, "NVIDIA H100 80GB HBM3")
    assert share == pytest.approx(0.04134, abs=1e-5)
    share = gpu_check.utilisation("rm", 100, [113, 39, 49], shape, "NVIDIA H200")
    assert share == pytest.approx(0.03580, abs=1e-5)  # no output layer
    assert gpu_check.utilisation("ppo", 100, [113, 39, 49], shape, "NVIDIA H200") is None
    assert gpu_check.utilisation("dpo", 100, [113, 39, 49], gpu_check.SHAPES["small"], "cpu") is None
    names = ("NVIDIA L40S", "NVIDIA L40", "NVIDIA GeForce RTX 4090", "NVIDIA A10G")  # 362, 181, 165, not known
    shares = [gpu_check.utilisation("dpo", 362, [113, 39, 49], shape, name) for name in names]
    assert shares[:3] == pytest.approx([0.4089, 0.8177, 0.8970], abs=1e-3) and shares[3] is None


def bench(code: str, *words: str) -> subprocess.CompletedProcess:
    """`bench.py WORDS` in a process of its own, after `code`: it forks, and sets the environment."""
    source = Path(discobeta.__file__).parents[1]
    program = f"import sys; sys.path[:0] = [{str(BENCHMARKS)!r}]; import bench, peers\n{code}\nsys.exit(bench.main())"
    return subprocess.run(
        [sys.executable, "-c", program, "--quick", "--rounds", "1", *words],
        env=os.environ | {"PYTHONPATH": str(source)}, capture_output=True, text=True,
    )  # fmt: skip


def test_steps_and_whole_processes_are_compared_with_trl_and_do_the_same_work(tmp_path):
    done = bench("", "--only", "steps", "whole", "--cases", "dpo-embedded", "rm-long", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    dpo, rm = found["steps"]["dpo, embedded"], found["steps"]["rm, long"]
    assert set(dpo["gate"]) == {"A0", "A1", "A2", "heads idle"} and set(rm["gate"]) == {"R0", "R1", "heads idle"}
    assert dpo["gate"]["heads idle"] == {"loss": 0, "adapter": 0}
    assert all(0 < rm["gate"][side]["loss"] < 1e-4 and 0 < rm["gate"][side]["adapter"] < 1e-3 for side in ("R0", "R1"))
    assert set(dpo["ratio to ours"]) == {"A0", "A1", "A2", "heads used", "heads idle"}
    for row, side in ((dpo, "A2"), (rm, "R1"), (found["whole"], "A1")):
        (theirs,), (mine,) = row["values"][side], row["values"]["ours"]
        assert row["ratio to ours"][side]["median"] == pytest.approx(theirs / mine)
        assert f"{theirs / mine:.2f} (" in (tmp_path / "bench.md").read_text()


def test_another_learning_rate_on_one_side_fails_the_benchmark(tmp_path):
    faster = """
train = peers.train
peers.train = lambda settings, *more: train(settings | {"learning_rate": 2 * settings["learning_rate"]}, *more)
"""
    done = bench(faster, "--only", "steps", "--cases", "rm-embedded", "--output", str(tmp_path))
    assert done.returncode == 1
    for side in ("R0", "R1"):
        for what in ("loss", "adapter"):
            assert re.search(rf"^bench: rm, embedded: {side}: {what} at \S+ from ours", done.stderr, re.MULTILINE)
    assert (tmp_path / "bench.md").read_text().count("**Failed**") == 4


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("A1", {}, None),
        ("A1", {"losses": [0.7, 0.60009]}, None),
        ("A1", {"losses": [0.7, 0.60011]}, "loss at 0.00011 from ours (at most 0.0001)"),
        ("A1", {"losses": [0.7, math.nan]}, "loss at nan"),
        ("A1", {"losses": [math.nan, 0.6]}, "loss at nan"),
        ("A1", {"adapter": [math.nan, 4.0]}, "adapter at nan"),
        ("A1", {"losses": [0.7]}, "1 steps, ours 2"),
        ("A1", {"tokens": "other"}, "other tokens than ours, or in another order"),
        ("A1", {"adapter": [3.0, 4.0049]}, None),
        ("A1", {"adapter": [3.0, 4.0051]}, "adapter at 0.001 from ours (at most 0.001)"),
        ("heads idle", {"adapter": [3.0, 4.0000005]}, "not the adapter and losses of the arm without heads"),
        ("heads idle", {"losses": [0.7, 0.6000001]}, "not the adapter and losses of the arm without heads"),
    ],
)
def test_the_gate_says_who_is_too_far_from_ours(tmp_path, monkeypatch, name, change, said):
    monkeypatch.syspath_prepend(BENCHMARKS)
    of = importlib.import_module("bench").Bench(tmp_path, SimpleNamespace(quick=True))
    mine = {"losses": [0.7, 0.6], "tokens": "same"}
    for side, weights in (("ours", [3.0, 4.0]), (name, change.get("adapter", [3.0, 4.0]))):
        folder = tmp_path / f"long/dpo/{side}-0/adapter"
        folder.mkdir(parents=True)
        save_file({"weight": torch.tensor(weights)}, folder / "adapter_model.safetensors")
    of.gate("dpo", "long", name, {"ours": [mine], name: [mine | change]})
    assert len(of.failures) == (said is not None)
    for failure in of.failures:
        assert failure.startswith(f"dpo, long: {name}: ") and said in failure


def test_floors_are_those_of_the_weights_that_multiply_a_token(monkeypatch):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    monkeypatch.syspath_prepend(BENCHMARKS)
    floors = importlib.import_module("floors")
    with torch.device("meta"):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=151_936,
                hidden_size=1024,
                num_hidden_layers=28,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=128,
                intermediate_size=3072,
            )  # fmt: skip
        )
    linear = [layer.weight.numel() for layer in model.model.modules() if isinstance(layer, torch.nn.Linear)]
    assert floors.QWEN3_0_6B.body == sum(linear) and floors.QWEN3_0_6B.head == model.lm_head.weight.numel()
    # 2 x 113 + 39 + 49 = 314 tokens of 440.4 M weights, and 88 predicted ones of 155.6 M
    in_billions = [floors.flops_per_pair(floors.QWEN3_0_6B, **way) / 1e9 for way in floors.WAYS.values()]
    assert in_billions == pytest.approx([1216, 939, 635, 608, 409, 436], abs=0.6)
