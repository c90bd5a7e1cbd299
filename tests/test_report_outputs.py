"""The rows of tables and figures: what a study has of them, by hand; and that a row and a function are all it takes."""

import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pandas as pd
import pytest
from report_study import finish, results, study

from discobeta import closure
from discobeta.design.stages import STAGES
from discobeta.report import figures, outputs, tables
from discobeta.report.outputs import Row
from discobeta.report.render import Column, Panel, Table

CORNERS = ["baseline", "disco-used_beta-absent", "disco-absent_beta-used", "disco-used_beta-used"]
WORLD = {"data": {"world": {}}, "base": {"sft": {"model_type": "qwen3"}}}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def names(of) -> list[str]:
    return sorted(output.name for output in of)


def test_figures_of_a_study_of_the_world():
    assert names(outputs.figures(study(**WORLD))) == [
        "effects", "interaction-dpo", "interaction-ppo", "learning-curves-dpo", "learning-curves-ppo",
        "learning-curves-rm", "reliability-dpo", "reliability-rm", "reward-by-noise-ppo", "reward-kl-ppo",
        "scale-dpo", "scale-ppo", "sigma-dpo", "sigma-rm",
    ]  # fmt: skip


def test_without_the_world_nobody_knows_noise_and_true_reward():
    assert names(outputs.figures(study())) == [
        "effects", "interaction-dpo", "learning-curves-dpo", "learning-curves-ppo", "learning-curves-rm",
        "reliability-dpo", "reliability-rm", "reward-kl-ppo",
    ]  # fmt: skip


def test_an_interaction_needs_all_four_arms_and_a_metric_of_the_hypotheses(monkeypatch):
    assert "interaction-dpo" in names(outputs.figures(study(arms=CORNERS)))
    assert "interaction-dpo" not in names(outputs.figures(study(arms=CORNERS[:3])))
    monkeypatch.setitem(STAGES, "dpo", replace(STAGES["dpo"], compared=("accuracy",)))
    assert "interaction-dpo" not in names(outputs.figures(study(arms=CORNERS)))


def test_tables_are_of_the_stages_that_the_study_has():
    general = ["comparisons", "cost", "effects", "metrics", "neutrality"]
    assert names(outputs.tables(study(stages=["dpo"]))) == sorted([*general, "dpo", "dpo-grid"])
    stages = ["dpo", "dpo-grid", "ppo", "ppo-grid", "rm", "rm-grid"]
    assert names(outputs.tables(study())) == sorted([*general, *stages])


@pytest.mark.parametrize("of", [outputs.tables, outputs.figures])
def test_no_two_outputs_have_the_same_files(of):
    files = [name for output in of(study(**WORLD)) for name in output.files]
    assert len(files) == len(set(files)) > 0


@pytest.mark.parametrize("row", [*outputs.TABLES, *outputs.FIGURES], ids=lambda row: row.maker)
def test_a_row_names_a_maker_and_a_caption_that_are_there(row: Row):
    assert (closure.ROOT.parents[1] / "workflow" / "report" / f"{row.caption}.rst").is_file()
    assert (closure.ROOT.parent / (row.maker.partition(":")[0].replace(".", "/") + ".py")).is_file()


def test_rows_are_read_without_what_computes_and_draws():
    code = (
        "import sys; from discobeta.report import outputs; from discobeta.design.study import Study\n"
        "study = Study({'study': 's', 'data': {'world': {}}, 'base': {'sft': {'model_type': 'qwen3'}}})\n"
        "assert len(outputs.tables(study)) == 11 and len(outputs.figures(study)) == 14\n"
        "print(sorted({'matplotlib', 'numpy', 'pandas', 'scipy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- one more is a row and a function


@pytest.fixture
def toy(monkeypatch) -> ModuleType:
    """A module that can be imported, to put makers in."""
    module = ModuleType("toy_report")
    monkeypatch.setitem(sys.modules, "toy_report", module)
    return module


def test_a_table_more_is_a_row_and_a_function(monkeypatch, toy):
    def longest(results, stage):
        steps = max(found.log.step.max() for run, found in results.found.items() if run.stage == stage)
        columns = [Column("Steps", lambda row: str(row["steps"]))]
        return Table(
            pd.DataFrame({"steps": [steps]}), [Panel(f"Length of {stage}", columns)], ["A toy."], {"by": "hand"}
        )

    toy.longest = longest
    row = Row("longest-{stage}", "toy_report:longest", "longest", "longest", outputs.TABLE, outputs.predicts)
    made = study(arms=["baseline"], stages=["rm", "dpo"])
    for run in made.runs():
        finish(made, run, {"accuracy": 0.7})
    tables.write(results(made))
    folder = made.directory / "tables"
    before = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    monkeypatch.setattr(outputs, "TABLES", (*outputs.TABLES, row))
    tables.write(results(made))
    after = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    new = {f"longest-{stage}.{ending}" for stage in ("rm", "dpo") for ending in ("csv", "md", "tex")}
    assert after.keys() - before.keys() == new and before.items() <= after.items()
    assert new <= {name for output in outputs.tables(made) for name in output.files}  # from which the rules take theirs
    assert after["longest-rm.csv"] == b"steps,by\n2,hand\n"
    assert b"**Length of dpo**" in after["longest-dpo.md"]
    assert rb"\label{tab:longest-dpo}" in after["longest-dpo.tex"]


def test_a_figure_more_is_a_row_and_a_function(monkeypatch, toy):
    from matplotlib.figure import Figure

    def dot(results):
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([0], [len(results.found)], marker="o")
        return figure

    toy.dot = dot
    monkeypatch.setattr(outputs, "FIGURES", (Row("dot", "toy_report:dot", "dot", "a dot", outputs.FIGURE),))
    made = study(arms=["baseline"], stages=["dpo"])
    figures.write(results(made))
    folder = made.directory / "figures"
    assert {path.name for path in folder.glob("[!.]*")} == {"dot.svg", "dot.pdf", "dot.png"}
    assert (folder / "dot.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "dot.pdf").read_bytes().startswith(b"%PDF")
