"""benchmarks/gpu_check.py runs: on the small shape, for two steps, in this process."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from discobeta import cli
from discobeta.design.cost import estimate, read
from discobeta.design.study import Study

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"


def test_the_gpu_check_runs_on_a_small_shape_and_says_what_was_measured(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    gpu_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_check)
    monkeypatch.setattr(gpu_check, "train", lambda path: cli.main(["train", str(path), "--no-evaluate"]))
    assert gpu_check.main(["--small", "--steps", "2", "--no-trl", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert set(found["idle against absent"].values()) == {"equal"}
    lines = (tmp_path / "gpu-check.md").read_text().splitlines()
    rows = dict.fromkeys(("rm baseline", *(f"dpo {arm}" for arm in gpu_check.ARMS)), 2 * 8) | {"ppo baseline": 2 * 4}
    for label, count in rows.items():
        cost = found["cost"][label]
        assert cost["rows"] == count  # two steps of 8 pairs; one update of 2 x 4 responses
        (line,) = [line for line in lines if line.startswith(f"| {label} |")]
        assert float(re.split(r" *\| *", line)[3]) == pytest.approx(cost["rows"] / cost["seconds"], abs=0.051)
        assert found["estimated_peak_bytes"][label] > 2 * 2048 * 128  # at least the embedding in bf16
    assert capsys.readouterr().out.count("gpu_check.py") == 1
    changed = "common={per_device_train_batch_size: 16, gradient_accumulation_steps: 4, max_steps: 10}"
    study = Study.read([SCRIPT.parent.parent / "config" / "qwen3-0.6b.yaml"], ["stages=[rm,dpo]", changed])
    steps = {step.name: step for step in estimate(study, read(study, tmp_path))}
    paid = found["cost"]["rm baseline"]
    assert steps["rm"].seconds == pytest.approx(steps["rm"].jobs * 10 * 64 * paid["seconds"] / paid["rows"])
    assert steps["evaluate"].seconds is None  # which is not measured there


def test_utilisation_is_worked_out_by_hand(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    gpu_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_check)
    # 28 blocks of 2 x 1024 x 2048 + 2 x 1024 x 1024 + 3 x 1024 x 3072 = 15,728,640 weights; x 4 x 1e5 / 989e12
    share = gpu_check.utilisation({"tokens_per_second": 1e5}, gpu_check.SHAPES["qwen3-0.6b"], "NVIDIA H100 80GB HBM3")
    assert share == pytest.approx(0.17812, abs=1e-4)
    assert gpu_check.utilisation({"tokens_per_second": 1e5}, gpu_check.SHAPES["small"], "cpu") is None
