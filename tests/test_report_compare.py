"""Two run directories, byte for byte, and side by side; two studies, cell by cell and seed by seed."""

import json
from pathlib import Path

import pandas as pd
import pytest
from published_study import BASELINE, DISCO, LEDPO, cell, write_study
from report_study import write_run

from discobeta.cli import main as discobeta
from discobeta.design.config import RunConfig
from discobeta.report.compare import compare, first_difference

FILES = ["adapter/adapter_model.safetensors", "log.jsonl", "metrics.json", "examples.parquet"]


def main(*directories) -> int:
    return discobeta(["compare", *map(str, directories)])


@pytest.fixture
def two_runs(tmp_path):
    return [write_run(tmp_path / name, {"accuracy": 0.7}, weights=bytes(3000)) for name in "ab"]


def test_equal_runs_are_equal_in_every_file(two_runs, capsys):
    assert compare(*two_runs) == dict.fromkeys(FILES, "equal")
    assert main(*two_runs) == 0
    text = capsys.readouterr().out
    assert text.startswith("".join(f"{name}: equal\n" for name in FILES))
    assert "settings that differ: no differences" in text and "made from: no differences" in text


def test_what_names_the_arm_or_the_hour_is_not_compared(two_runs):
    for number, run in enumerate(two_runs):
        for name in ("config.yaml", "heads.safetensors", "heads.json", "cost.json", "provenance.json"):
            (run / name).write_text(f'{{"number": {number}}}')
    assert main(*two_runs) == 0


@pytest.mark.parametrize("offset", [0, 1023, 1024, 1025, 2999])
def test_the_first_differing_byte_is_found_on_both_sides_of_a_chunk(two_runs, offset):
    a, b = (run / FILES[0] for run in two_runs)
    changed = bytearray(3000)
    changed[offset] = 1
    changed[2999] = 1
    b.write_bytes(changed)
    assert first_difference(a, b, chunk=1024) == offset


def test_a_differing_file_is_named_with_byte_and_sizes(two_runs, capsys):
    (two_runs[1] / FILES[0]).write_bytes(bytes(1234) + b"x" + bytes(1765))
    assert compare(*two_runs)[FILES[0]] == "differs at byte 1234 (of 3,000, of 3,000 bytes)"
    assert main(*two_runs) == 1
    assert "log.jsonl: equal" in capsys.readouterr().out


def test_a_shorter_file_differs_where_it_ends(two_runs):
    (two_runs[1] / FILES[0]).write_bytes(bytes(2048))
    assert compare(*two_runs)[FILES[0]] == "differs at byte 2048 (of 3,000, of 2,048 bytes)"


@pytest.mark.parametrize("side", [0, 1])
def test_a_file_that_only_one_run_has_is_missing_in_the_other(two_runs, side):
    (two_runs[side] / "metrics.json").unlink()
    assert compare(*two_runs)["metrics.json"] == f"missing in {two_runs[side]}"
    assert main(*two_runs) == 1


def test_all_weights_of_a_full_model_are_compared(two_runs):
    for number, run in enumerate(two_runs):
        (run / "model").mkdir()
        (run / "model" / "model-00001-of-00002.safetensors").write_bytes(b"same")
        (run / "model" / "model-00002-of-00002.safetensors").write_bytes(b"part%d" % number)
    verdicts = compare(*two_runs)
    assert verdicts["model/model-00001-of-00002.safetensors"] == "equal"
    assert verdicts["model/model-00002-of-00002.safetensors"] == "differs at byte 4 (of 5, of 5 bytes)"


def test_a_folder_without_a_run_is_refused(two_runs, tmp_path, capsys):
    assert main(two_runs[0], tmp_path / "nowhere") == 2
    assert "nowhere holds no run" in capsys.readouterr().err


# --- side by side


def dpo_run(path, metrics, **settings):
    """A run with these settings on top of the defaults of dpo; facts: what it was made from."""
    facts = {key: settings.pop(key) for key in ("held_out", "base") if key in settings}
    config, _ = RunConfig.from_mapping(
        {"stage": "dpo", "model_name_or_path": "a/model", "output_dir": str(path)} | settings
    )
    return write_run(config, metrics, **facts)


def shown(text: str) -> dict[str, list[str]]:
    """First word of a line -> the others."""
    return {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}


def test_settings_and_metrics_of_runs_stand_side_by_side(tmp_path, capsys):
    one = dpo_run(tmp_path / "one", {"nll": 0.5, "accuracy": 0.75}, tokenized_path="here", seed=1)
    two = dpo_run(tmp_path / "two", {"nll": 0.25, "by_topic": {"tea": {"nll": 1.0}}}, pref_beta=0.3, seed=1)
    assert main(one, two) == 1
    rows = shown(capsys.readouterr().out)
    assert rows["pref_beta"] == ["0.1", "0.3"]
    assert not {"seed", "output_dir", "tokenized_path", "learning_rate"} & rows.keys()
    assert rows["nll"] == ["↓", "0.5000", "0.2500", "−0.2500"] and rows["accuracy"] == ["↑", "0.750", "–", "–"]
    three = dpo_run(tmp_path / "three", None, held_out="f" * 64, add_disco_head=True)
    assert main(one, two, three) == 0  # bytes are compared of two
    text = capsys.readouterr().out
    rows = shown(text)
    assert rows["add_disco_head"] == ["false", "false", "true"] and rows["seed"] == ["1", "1", "42"]
    assert rows["held_out"] == ["e" * 8, "e" * 8, "f" * 8] and "The held-out rows are not the same" in text
    assert rows["nll"] == ["↓", "0.5000", "0.2500", "–"] and "metrics.json" in text and "differs at" not in text


def test_as_json_nothing_is_left_out_or_rounded(tmp_path, capsys):
    one = dpo_run(tmp_path / "one", {"nll": 0.123456789})
    two = dpo_run(tmp_path / "two", {"nll": 0.25, "by_topic": {"tea": {"nll": 1.0}}}, pref_beta=0.3)
    assert discobeta(["compare", str(one), str(two), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == [str(one), str(two)] and found["settings"] == {"pref_beta": [0.1, 0.3]}
    assert found["metrics"] == {"nll": [0.123456789, 0.25], "by_topic/tea/nll": [None, 1.0]}
    assert found["files"]["log.jsonl"] == "equal" and found["files"]["metrics.json"].startswith("differs at byte")


@pytest.mark.parametrize(
    "words, said",
    [
        (["{a}"], "compare needs two run directories or more"),
        (["{a}", "--studies", "{a}", "{b}"], "not both"),
        (["{a}", "{b}", "--output", "out"], "--output are for two studies"),
        (["--studies", "{a}", "{b}"], "has no metrics.csv, nor has its tables/"),
    ],
)
def test_words_that_do_not_go_together_are_refused(two_runs, capsys, words, said):
    a, b = two_runs
    assert discobeta(["compare", *(word.format(a=a, b=b) for word in words)]) == 2
    text = capsys.readouterr().err
    assert said in text and len(text.splitlines()) == 1


# --- two studies


@pytest.fixture
def two_studies(tmp_path):
    """NLL of B less that of A: of the baseline 0.25, 0.5, 0.75, 1 (mean 0.625), of Disco 1 and −1."""
    rows = cell("dpo", BASELINE, "nll", [1.0, 2.0, 3.0, 4.0]) + cell("dpo", DISCO, "nll", {1: 1.0, 3: 1.0})
    rows += cell("dpo", BASELINE, "accuracy", [0.5, 0.5, 0.5, 0.5]) + cell("dpo", BASELINE, "oracle_nll", [0.5] * 4)
    rows += cell("dpo", LEDPO, "nll", [1.0]) + cell("rm", BASELINE, "nll", [1.0, 2.0])
    settings = {"dpo": {"learning_rate": 0.001, "pref_beta": 0.1}, "common": {"bf16": False}}
    a = write_study(tmp_path, "a", rows, [1, 2, 3, 4], **settings)
    rows = cell("dpo", BASELINE, "nll", {1: 1.25, 2: 2.5, 3: 3.75, 4: 5.0, 5: 9.0})
    rows += cell("dpo", DISCO, "nll", {1: 2.0, 3: 0.0}) + cell("dpo", BASELINE, "nll", [7.0], "probit")
    rows += cell("dpo", BASELINE, "accuracy", [0.75, 0.5, 0.5, 0.5]) + cell("dpo", BASELINE, "oracle_nll", [0.5] * 4)
    settings = {"dpo": {"learning_rate": 0.002, "pref_beta": 0.1}, "controls": {"probit": {"stages": ["dpo"]}}}
    b = write_study(tmp_path / "results" / "b", "tables", rows, [1, 2, 3, 4, 5], **settings)
    return a, b.parent  # one as it is published, one as the workflow leaves it


def test_equal_cells_and_seeds_of_two_studies_are_paired(two_studies, capsys, tmp_path):
    assert discobeta(["compare", "--studies", *map(str, two_studies), "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out.replace("\u00a0", " ")
    rows = [[word.strip() for word in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| dpo")]
    # of four differences of one sign 2 of the 16 ways to choose signs are as far from zero; of 1 and -1 all are
    four = ("0.2500", "0.5000", "0.7500", "1.0000")
    assert rows == [
        ["dpo", "Baseline", "NLL (nats) ↓", "4", "2.5000", "3.1250", f"0.6250 ({', '.join(four)})", "0.125", "0.250"],
        ["dpo", "Baseline", "Accuracy ↑", "4", "0.500", "0.562", "0.062 (0.250, 0.000, 0.000, 0.000)", "–", "–"],
        ["dpo", "Disco", "NLL (nats) ↓", "2", "1.0000", "1.0000", "0.0000 (1.0000, −1.0000)", "1.000", "1.000"],
    ]  # fmt: skip
    for said in (
        "Not paired: only A has rm.",
        "Not paired: in dpo only A has disco-absent_beta-used.",
        "Not paired: in dpo only B has baseline, probit.",
        "Not paired: in dpo only B has seed 5 of baseline.",
        "dpo: learning_rate (0.001 \\| 0.002)",
        "controls (– \\|",
        "common (",
    ):
        assert said in text, said
    assert "pref_beta" not in text and "same held-out rows" not in text
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"studies.csv", "studies.md", "studies.tex"}
    frame = pd.read_csv(tmp_path / "out" / "studies.csv")
    assert frame.differences[0] == "0.25 0.5 0.75 1.0" and frame.seeds[2] == "1 3" and frame.p_holm[0] == 0.25
    assert set(frame.study_a) == {"a"} and set(frame.study_b) == {"tables"}  # as their configs say


def test_of_other_held_out_rows_the_table_says_so(two_studies, capsys):
    a, b = two_studies
    path = b / "tables" / "metrics.csv"
    frame = pd.read_csv(path, keep_default_na=False)
    frame.loc[(frame.metric == "oracle_nll") & (frame.seed == 3), "value"] = 0.25
    frame.to_csv(path, index=False)
    assert discobeta(["compare", "--studies", str(a), str(b)]) == 0
    assert (
        "not the same held-out rows, truth or reference in both: NLL of the oracle differs" in capsys.readouterr().out
    )


def test_named_metrics_are_all_tested_and_corrected_for_together(two_studies, capsys):
    command = ["compare", "--studies", *map(str, two_studies), "--json", "--metrics"]
    assert discobeta([*command, "nll", "accuracy"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    # accuracy: of one difference that is not zero, every choice of signs is as far from it
    assert [(row["metric"], row["p"], row["p_holm"]) for row in rows] == [
        ("nll", 0.125, 0.375), ("accuracy", 1.0, 1.0), ("nll", 1.0, 1.0),
    ]  # fmt: skip
    assert discobeta([*command, "regret"]) == 2 and "neither study has measured it" in capsys.readouterr().err


def test_from_six_seeds_the_interval_stands_in_place_of_the_seeds(tmp_path, capsys):
    """Differences 1 … 6: mean 3.5, s = sqrt(3.5), t(5) = 2.5706, so 2.5706 · sqrt(3.5 / 6) = 1.9633."""
    a = write_study(tmp_path, "a", cell("rm", BASELINE, "nll", [0.0] * 6), range(1, 7))
    b = write_study(tmp_path, "b", cell("rm", BASELINE, "nll", range(1, 7)), range(1, 7))
    assert discobeta(["compare", "--studies", str(a), str(b)]) == 0
    assert "| 3.5000 ± 1.9633 | 0.031 | 0.031" in capsys.readouterr().out


def test_studies_with_nothing_in_common_are_refused(tmp_path, capsys):
    a = write_study(tmp_path, "a", cell("rm", BASELINE, "nll", [1.0]), [1])
    b = write_study(tmp_path, "b", cell("rm", BASELINE, "nll", {2: 1.0}), [2])
    assert discobeta(["compare", "--studies", str(a), str(b)]) == 2
    text = capsys.readouterr().err
    assert "in common: a holds rm (1 cells), seed 1; b holds rm (1 cells), seed 2" in text


def test_published_numbers_without_a_config_are_paired_all_the_same(two_studies, capsys):
    a, b = two_studies
    (a / "config.yaml").unlink()
    assert discobeta(["compare", "--studies", str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "A has no config.yaml, so settings are not compared" in text and "Settings that differ" not in text


def test_the_published_studies_are_read(capsys):
    folder = Path(__file__).parent.parent / "results" / "published"
    assert discobeta(["compare", "--studies", str(folder / "embedded"), str(folder / "hh-rlhf-tiny"), "--json"]) == 0
    assert {row["stage"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"rm", "dpo", "ppo"}
