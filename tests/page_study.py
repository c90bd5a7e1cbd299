"""Studies on paper for the tests of the page: numbers that a reader can add up, and responses that mean mischief."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from report_study import evaluate, finish, study

from discobeta.design.arms import CORNERS
from discobeta.design.study import Run, Study

MISCHIEF = '<script>document.title = "taken"</script><img src=x onerror="alert(1)"> & \x1b[31m "quoted" $x$'
"""What a response may hold: it is text on the page, whatever it looks like."""

BASELINE, LEDPO, DISCO, BOTH = CORNERS


def wide(**settings) -> Study:
    """Six seeds, the four arms without idle heads and one with, all stages."""
    arms = [arm.name for arm in (BASELINE, LEDPO, DISCO, BOTH)] + ["disco-idle_beta-absent"]
    return study(**{"seeds": [1, 2, 3, 4, 5, 6], "arms": arms} | settings)


def numbers(run: Run) -> dict[str, float]:
    """NLL: Disco takes .1 away, LeDPO takes .05 away in odd seeds and adds .03 in even ones; a seed adds .01 of it."""
    nll = 0.6 + 0.01 * run.seed - 0.1 * ("disco" in run.arm.used)
    if run.stage == "dpo":
        nll += (-0.05 if run.seed % 2 else 0.03) * ("beta" in run.arm.used)
    reward = 1 + 0.1 * run.seed
    kl = 2 + 0.5 * ("disco" in run.arm.used)
    policy = {"kl_per_sequence": kl, "true_reward": reward, "reward_gain": reward, "response_length": 8.0}
    pairs = {"nll": nll, "accuracy": 0.7, "brier": 0.2, "ece": 0.03}
    return (pairs if run.stage != "ppo" else {}) | (policy if run.stage != "rm" else {})


def answers(run: Run, count: int = 12) -> list[dict]:
    return [
        {
            "prompt": f"question {number}",
            "response": MISCHIEF if number == 0 else f"{run.arm.label} answers {number}",
            "reference_response": f"reference answers {number}",
            "length": 10 + number,
            "reward": 0.25 * number,
            "reference_reward": -0.5,
        }
        for number in range(count)
    ]


def fill(
    of: Study, metrics: Callable[[Run], dict] = numbers, skip: Callable[[Run], bool] = lambda run: False, **facts
) -> None:
    """Every run of the study as training and evaluation leave it, but those that are skipped."""
    for run in of.runs():
        if skip(run):
            continue
        seconds = {"seconds": 10.0 + 5.0 * ("disco" in run.arm.used), "device": "cpu"}
        directory = finish(of, run, None, cost=seconds, **facts)
        if run.proof:
            continue
        if run.stage != "rm":
            lines = (json.dumps(row) for row in answers(run))
            (directory / "generations.jsonl").write_text("\n".join(lines) + "\n")
        evaluate(directory, metrics(run))


def page_of(of: Study) -> Path:
    return of.directory / "report.html"
