"""benchmarks/gpu_check.py runs: on the small shape, for two steps, in this process."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from discobeta import cli

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"


def test_the_gpu_check_runs_on_a_small_shape_and_says_what_was_measured(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    gpu_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_check)
    monkeypatch.setattr(gpu_check, "train", lambda path: cli.main(["train", str(path), "--no-evaluate"]))
    assert gpu_check.main(["--small", "--steps", "2", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert set(found["idle against absent"].values()) == {"equal"}
    lines = (tmp_path / "gpu-check.md").read_text().splitlines()
    for arm in ("baseline", "disco-used_beta-used", "disco-idle_beta-idle"):
        cost = found["cost"][arm]
        assert cost["rows"] == 2 * 4 * 2  # two steps of two passes of 4 pairs
        (line,) = [line for line in lines if line.startswith(f"| {arm} |")]
        assert float(re.split(r" *\| *", line)[3]) == pytest.approx(cost["rows"] / cost["seconds"], abs=0.051)
    assert capsys.readouterr().out.count("gpu_check.py") == 1
