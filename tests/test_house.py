"""The proof that a third idea and a fourth stage have a place: both are added to a copy of the package as CONTRIBUTING
says, and run through plan, proofs and tables. What is added stands here, and nowhere in the product.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import discobeta

PACKAGE = Path(discobeta.__file__).parent

IDEA = {
    "design/arms.py": (
        ")  # fmt: skip\n\nFLAGS",
        """    Idea(
        "length", "add_length_head", "use_length_scale", "Length",
        head="a Length Head exists",
        effect="the margin is scaled by the difference in length",
        stages=("dpo",),
        elsewhere="a length scales margins of dpo alone",
    ),
)  # fmt: skip\n\nFLAGS""",
    ),
    "method/heads.py": (
        'HEADS = {"disco": DiscoHead, "beta": BetaHead}',
        '''class LengthHead(nn.Module):
    """w * tanh(d / 8) of a pair whose responses differ by d tokens in length; w starts at 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    @classmethod
    def fresh(cls, hidden_size: int, **_) -> Self:
        return cls()

    @classmethod
    def described(cls, description: dict) -> Self:
        return cls()

    def description(self) -> dict:
        return {}

    def forward(self, difference: Tensor) -> Tensor:
        return self.weight * torch.tanh(difference / 8)


HEADS = {"disco": DiscoHead, "beta": BetaHead, "length": LengthHead}''',
    ),
    "method/signals.py": (
        'SIGNALS: dict[str, type[Signal]] = {"disco": GaussianReward, "beta": PromptScale}',
        '''class LengthScale(Signal):
    """The margin times exp(w * tanh(d / 8)), d tokens by which the chosen response is longer."""

    def group(self) -> Group:
        return head_group(self.head.parameters(), 3 * self.config.learning_rate, self.config)

    def opinion(self, evidence: Evidence) -> Opinion:
        lengths = evidence.batch.response_lengths.view(2, -1)
        log_scale = self.head(lengths[0] - lengths[1])
        said = {"log_length_scale": log_scale}
        return Opinion(log_scale=log_scale, logged=said, measured=said)


SIGNALS: dict[str, type[Signal]] = {"disco": GaussianReward, "beta": PromptScale, "length": LengthScale}''',
    ),
}
"""File of the package -> what stands there, and what stands in its place with a third idea: a row, a head, a signal."""

STAGE = {
    "design/stages.py": (
        ")\n\nSTAGES = ",
        """    StageRow(
        "kto",
        "Kahneman-Tversky optimisation",
        "discobeta.method.kto:KahnemanTversky",
        rows="pairs",
        trains="policy",
        compared=("accuracy",),
        defaults={"num_eval_generations": 0},
        reference_pass=True,
    ),
)\n\nSTAGES = """,
    ),
    "method/kto.py": (
        "",
        '''"""The loss of KTO (Ethayarajh et al. 2024, arXiv:2402.01306, equation 7), on the two responses of a pair."""

from dataclasses import replace

import torch

from discobeta.method.dpo import DirectPreference


class KahnemanTversky(DirectPreference):
    """(1 - sigmoid(r_w - z)) + (1 - sigmoid(z - r_l)), r = beta * (log pi - log ref), z = max(0, mean r)."""

    def compare(self, batch):
        evidence = self.evidence(batch)
        chosen, rejected = self.config.pref_beta * evidence.rewards
        z = evidence.rewards.detach().mean().clamp_min(0) * self.config.pref_beta
        loss = 2 - torch.sigmoid(chosen - z) - torch.sigmoid(z - rejected)
        return replace(self.signals.compare(evidence), loss=loss, nll=None)
''',
    ),
}
"""File of the package -> likewise, with a fourth stage: a row and a file."""

RUN_ALL = """
from discobeta.run.evaluate import evaluate
from discobeta.design.study import Study
from discobeta.run.train import train

study = Study.read("study.yaml")
for run in study.runs():
    train(study.config(run))
    if not run.proof:
        evaluate(run.directory)
"""


@pytest.fixture
def study_with(tmp_path, base, pairs):
    """study_with(changes, **settings): run a study of the changed package; returns its folder of tables and `plan`."""

    def make(changes: dict[str, tuple[str, str]], **settings) -> tuple[Path, str]:
        shutil.copytree(PACKAGE, tmp_path / "src" / "discobeta", ignore=shutil.ignore_patterns("__pycache__"))
        for name, (before, after) in changes.items():
            path = tmp_path / "src" / "discobeta" / name
            text = path.read_text() if before else ""
            assert text.count(before) == 1 or not before
            path.write_text(text.replace(before, after) if before else after)
        study = {
            "study": "toy",
            "seeds": [1],
            "idle_arms": "prove",
            "prove_steps": 1,
            "data": {"dataset": str(pairs["train"]), "eval_dataset": str(pairs["eval"]), "cutoff_len": 32},
            "base": {"model_name_or_path": str(base)},
            "common": {"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1},
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | settings))

        def python(*words: str) -> str:
            environment = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
            done = subprocess.run(
                [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        plan = python("-m", "discobeta", "plan", "--configfile", "study.yaml")
        python("-c", RUN_ALL)
        python("-m", "discobeta", "tables", "--strict", "--configfile", "study.yaml")
        return tmp_path / "results" / "toy" / "tables", plan

    return make


def test_a_third_idea_is_a_row_a_head_and_a_signal(study_with):
    """27 arms: 8 corners of whole runs, and proofs of the 19 idle arms and of their 7 twins (all used is nobody's)."""
    tables, plan = study_with(IDEA, stages=["dpo"])
    assert plan.count(" whole run ") == 8 and plan.count(" first step ") == 19 + 7
    assert "disco-idle_beta-used_length-absent" in plan
    cells = pd.read_csv(tables / "dpo-grid.csv")
    assert len(cells) == 64 and {"add_length_head", "use_length_scale"} <= set(cells)
    assert cells.status.str.startswith("refused").sum() == 64 - 27
    assert cells.status.str.startswith("proved = ").sum() == 19
    neutrality = pd.read_csv(tables / "neutrality.csv")
    assert len(neutrality) == 19 and set(neutrality.result) == {"equal"}
    effects = pd.read_csv(tables / "effects.csv")
    assert set(effects.contrast) == {
        "Disco", "LeDPO", "Length", "Disco × LeDPO", "Disco × Length", "LeDPO × Length", "Disco × LeDPO × Length",
    }  # fmt: skip
    used = tables.parents[0] / "runs" / "dpo" / "disco-absent_beta-absent_length-used" / "seed-1"
    examples = pd.read_parquet(used / "examples.parquet")
    assert examples.log_length_scale.abs().max() > 0  # it was trained, and says something of pairs
    baseline = cells[cells.shown == "baseline"].nll.iloc[0]
    assert cells[cells.arm == "disco-absent_beta-absent_length-used"].nll.iloc[0] != baseline


def test_a_fourth_stage_is_a_row_and_a_file(study_with):
    """KTO's loss is no likelihood: its runs have an accuracy, and no NLL that could stand beside dpo's."""
    tables, plan = study_with(
        STAGE, stages=["dpo", "kto"], arms=["baseline", "disco-used_beta-absent"], idle_arms="run"
    )
    assert plan.count("\ndpo ") == 2 and plan.count("\nkto ") == 1  # neither idea acts in it
    kto, dpo = (pd.read_csv(tables / f"{stage}-grid.csv") for stage in ("kto", "dpo"))
    assert len(kto) == 16 and "accuracy" in kto and "nll" not in kto and "nll" in dpo
    log = pd.read_json(tables.parents[0] / "runs" / "kto" / "baseline" / "seed-1" / "log.jsonl", lines=True)
    assert log.loss[0] == pytest.approx(1, abs=1e-6)  # 2 - 1/2 - 1/2 where policy and reference are one
    assert "Kahneman-Tversky optimisation (kto)" in (tables / "kto.md").read_text()
