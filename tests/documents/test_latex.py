"""Every LaTeX table compiles in a plain article with booktabs and nothing else, and fits its page and its text width.

Article's 345 points are the narrowest text of any class that papers use. What is compiled: a study with every metric
and five seeds (the widest cells), one with six seeds (intervals), the paper of a study that is written by hand, and the
paper of the committed numbers.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from published_study import BASELINE, DISCO, cell, sweep, write_study
from report_study import finish, results, study

from discobeta.report import hypotheses, outputs, paper
from discobeta.report.measures import LANDMARKS, METRICS

ROOT = Path(__file__).parents[2]
CORNERS = ["baseline", "disco-used_beta-absent", "disco-absent_beta-used", "disco-used_beta-used"]

pytestmark = pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")


def faults(folder: Path, texts: dict[str, str]) -> list[str]:
    """What LaTeX says of a document of these tables, name -> text: errors, and all that would not be printed well."""
    inputs = []
    for name, text in texts.items():
        assert text.isascii() and "\\toprule" in text and "?" not in text, name
        (folder / f"{name}.tex").write_text(text)
        inputs.append(rf"\message{{TABLE {name}}}\input{{{name}}}\clearpage")
    preamble = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n"
    (folder / "article.tex").write_text(preamble + "\n".join(inputs) + "\n\\end{document}\n")
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "article.tex"]
    for _ in range(2):  # the second knows the references
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        if "booktabs.sty' not found" in done.stdout:
            pytest.skip("LaTeX has no booktabs: texlive-latex-recommended is not installed")
    log = (folder / "article.log").read_text(errors="replace")
    found = [f"status {done.returncode}"] * bool(done.returncode)
    pattern = r"^(?:! .*|Overfull \\hbox.*|Missing character.*|.*Float too large.*|.*multiply.*|.*undefined.*)$"
    return found + re.findall(pattern, log, flags=re.MULTILINE)


def measured(run) -> dict:
    """Every metric, with signs and sizes that take room, and what is fitted to the baseline."""
    metrics: dict = {}
    for place, name in enumerate((*METRICS, *LANDMARKS)):
        inside, *names = reversed(name.split("/"))
        where = metrics
        for part in reversed(names):
            where = where.setdefault(part, {})
        where[inside] = -0.8 + 0.0113 * place + 0.00711 * run.seed
    if run.arm.name == "baseline" and not run.variant:
        fits = ("temperature", "topic_scale", "sigma")
        metrics["posthoc"] = {name: {"nll": 0.5, "sigma_spearman": 0.4} for name in fits}
    return metrics


def of_study(**settings) -> dict[str, str]:
    made = study(study="under_score", **settings)
    for run in made.runs():
        if (run.arm.name, run.seed) != ("disco-used_beta-absent", 2):
            finish(made, run, None if run.proof else measured(run))
    found = results(made)
    tables = [output for output in outputs.tables(made) if "tex" in output.row.endings]
    return {output.name: output.make(found).text("tex", output.name) for output in tables}


def test_tables_of_a_study_with_every_metric_and_five_seeds_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"dataset": "rows.jsonl", "eval_dataset": "held-out.jsonl", "calibration_dataset": "calibration.jsonl"}
    label = "a control with a label that is longer than any column, σ = σ₀, β ≥ ½ µ"
    control = {"stages": ["rm", "dpo"], "label": label, "settings": {"learning_rate": 1e-6}}
    arms = [*CORNERS, "disco-idle_beta-idle"]
    texts = of_study(seeds=[1, 2, 3, 4, 5], arms=arms, data=data, controls={"slow": control}, idle_arms="prove")
    assert {"rm", "dpo", "ppo", "controls-dpo", "dpo-grid", "effects", "comparisons", "cost"} <= set(texts)
    assert faults(tmp_path, texts) == []


def test_tables_of_a_study_with_intervals_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = of_study(seeds=list(range(1, 7)), arms=CORNERS, stages=["dpo"])
    assert r"{\tiny\,$\pm$" in texts["dpo"]
    assert faults(tmp_path, texts) == []


def test_the_tables_of_a_paper_fit(tmp_path):
    rows = cell("rm", BASELINE, "excess_kl", [0.05] * 6) + cell("rm", DISCO, "excess_kl", [0.03] * 6)
    for arm, more in ((BASELINE, 0.0), (DISCO, 0.1)):
        for seed in range(1, 7):
            points = {"": (1.0, 1.0 + more), "pref_beta=0.35": (2.0, 2.0 + more), "pref_beta=0.8": (3.0, 2.5 + more)}
            rows += sweep("dpo", arm, points, seed)
    write_study(tmp_path / "world", "both", rows, range(1, 7), dpo={"pref_beta": 0.5})
    registered = {
        "id": "R1", "stage": "rm", "study": "both", "text": "µ − kσ predicts better by ≥ ½ than " + "anything " * 20,
        "metric": "excess_kl", "direction": "less",
        "contrast": [{"weight": 1, "arm": DISCO}, {"weight": -1, "arm": BASELINE}],
    }  # fmt: skip
    (tmp_path / "h.yaml").write_text(yaml.safe_dump({"hypotheses": [registered]}, allow_unicode=True))
    made = paper.make(tmp_path / "world", hypotheses.read(tmp_path / "h.yaml"), "0123456789ab")
    assert {"both-dpo-sweep", "both-dpo-matched", "hypotheses"} <= set(made.tables)
    assert faults(tmp_path, {name: table.text("tex", name) for name, table in made.tables.items()}) == []


def test_the_tables_of_the_committed_numbers_fit(tmp_path):
    registered = hypotheses.read(ROOT / "config" / "hypotheses.yaml")
    made = paper.make(ROOT / "results" / "published" / "world", registered, "0123456789ab")
    assert faults(tmp_path, {name: table.text("tex", name) for name, table in made.tables.items()}) == []


def test_what_overruns_is_found(tmp_path):
    wide = r"\begin{tabular}{l}\toprule " + "x" * 90 + r" \\\end{tabular}"
    assert any("Overfull" in fault for fault in faults(tmp_path, {"wide": wide}))
    assert faults(tmp_path, {"wide": r"\toprule \undefinedcommand"})[0] == "status 1"
