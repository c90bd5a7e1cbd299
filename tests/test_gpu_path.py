"""The GPU path where there is no GPU: training steps of every stage on a `cuda` that is pretended (`fake_cuda.py`).

Found are tensors of two devices in one operation, and every place at which the host waits for the device. A GPU that
is waited for idles; a step should queue its kernels and ask for nothing until a line of the log is due.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
from gpu_steps import CASES, planted_faults

FAULTS = [name for name in planted_faults() if name != "none"]
MASKING = "find_packed_sequence_indices"
"""transformers asks whether positions begin anew, once a forward pass, where it is given positions and no mask."""


@pytest.fixture(scope="session")
def found(base, pairs, tmp_path_factory):
    """Case -> what was found of it, in one process for all: see `gpu_steps.main`."""
    folder = tmp_path_factory.mktemp("gpu-path")
    library = fake_cuda.build(folder)
    if library is None:
        pytest.skip("no C++ compiler for the device guard")
    words = [sys.executable, Path(__file__).with_name("gpu_steps.py"), library, base, pairs["train"], folder]
    run = subprocess.run(
        list(map(str, words)), env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout[run.stdout.rindex("\n{\n") :])


def waits(part: list[str]) -> list[str]:
    return [wait for wait in part if MASKING not in wait]


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_training_stays_on_the_device_and_waits_for_nothing(case, found):
    """The second step of three, in the run's own loop, from the batch to the optimiser."""
    assert "error" not in found[case], found[case]["error"]
    assert waits(found[case]["update"]) == []
    if CASES[case]["stage"] != "ppo":
        assert found[case]["collect"] == []


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case]["stage"] == "ppo"])
def test_what_ppo_collects_comes_to_the_host_once_a_batch(case, found):
    """Tokens are needed on the host, and so is what is judged of them, when a batch is done; sampling itself asks after
    every token whether all responses have ended."""
    collected = waits(found[case]["collect"])
    sampling = [wait for wait in collected if " generate: " in wait or "generate:" in wait or "generation.py" in wait]
    judging = [wait for wait in collected if wait.startswith("aten._to_copy.default at inference.py:")]
    assert len(sampling) + len(judging) == len(collected), set(collected) - set(sampling) - set(judging)
    assert sampling and judging
    assert not [wait for wait in sampling if "__call__: u = " in wait]  # a draw's numbers are all there from the start


@pytest.mark.parametrize("case", CASES)
def test_masks_are_made_without_a_question(case, found):
    assert not [wait for wait in found[case]["update"] if MASKING in wait]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, found):
    assert found["planted: none"] == []
    (first, *_) = found[f"planted: {fault}"]
    if fault == "a tensor that stayed on the CPU":
        assert "cuda:0 and cpu" in first
    else:
        assert "gpu_steps.py" in first and fault in first  # the line on which it is planted


def test_a_fault_planted_in_a_stage_is_found(found):
    (wait,) = waits(found["asks_for_the_loss"]["update"])
    assert "comparison.loss.sum().item()" in wait
    assert "cuda:0 and cpu" in found["adds_a_tensor_of_the_cpu"]["error"]
