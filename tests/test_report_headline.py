"""The means at the end of a study, in a terminal."""

import pandas as pd
import pytest
from published_study import BASELINE, DISCO, cell
from report_study import study

from discobeta.report.headline import headline


@pytest.fixture
def of_three(tmp_path, monkeypatch):
    """Seeds 1, 2 and 3 of rm: the baseline whole, Disco without seed 3, and a control that is none of the grid's."""
    monkeypatch.chdir(tmp_path)
    rows = cell("rm", BASELINE, "nll", [0.1, 0.2, 0.6]) + cell("rm", BASELINE, "accuracy", [0.5, 0.6, 0.7])
    rows += cell("rm", DISCO, "nll", [0.1, 0.3]) + cell("rm", BASELINE, "nll", [9.0] * 3, variant="probit")
    made = study(seeds=[1, 2, 3], stages=["rm"])
    made.tables_directory.mkdir(parents=True)
    columns = ["stage", "arm", "variant", "seed", "metric", "value"]
    pd.DataFrame(rows, columns=columns).to_csv(made.tables_directory / "metrics.csv", index=False)
    return made


def test_every_arm_has_its_mean_and_says_of_how_many_seeds(of_three):
    lines = headline(of_three).splitlines()
    assert lines[0].split() == ["Reward", "models", "NLL", "(nats)", "↓", "Accuracy", "↑"]
    assert lines[1].split() == ["baseline", "0.3000", "0.600"]
    assert lines[2].split() == ["Disco", "(2", "of", "3", "seeds)", "0.2000", "–"]
    assert "Means over 3 seeds;" in lines[4]


def test_seeds_that_the_study_does_not_name_do_not_count(of_three):
    lines = headline(study(seeds=[1], stages=["rm"])).splitlines()
    assert [lines[1].split(), lines[2].split()] == [["baseline", "0.1000", "0.500"], ["Disco", "0.1000", "–"]]
    assert "Means over 1 seed;" in lines[4]
