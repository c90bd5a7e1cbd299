"""Two run directories, byte for byte."""

import pytest
from report_study import write_run

from discobeta.errors import UserError
from discobeta.report.compare import compare, first_difference, main

FILES = ["adapter/adapter_model.safetensors", "log.jsonl", "metrics.json", "examples.parquet"]


@pytest.fixture
def two_runs(tmp_path):
    return [write_run(tmp_path / name, {"accuracy": 0.7}, weights=bytes(3000)) for name in "ab"]


def test_equal_runs_are_equal_in_every_file(two_runs, capsys):
    assert compare(*two_runs) == dict.fromkeys(FILES, "equal")
    assert main(*two_runs) == 0
    assert capsys.readouterr().out == "".join(f"{name}: equal\n" for name in FILES)


def test_what_names_the_arm_or_the_hour_is_not_compared(two_runs):
    for number, run in enumerate(two_runs):
        for name in ("config.yaml", "heads.safetensors", "heads.json", "cost.json", "provenance.json"):
            (run / name).write_text(f"{number}")
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


def test_a_folder_without_a_run_is_refused(two_runs, tmp_path):
    with pytest.raises(UserError, match="nowhere holds no run"):
        main(two_runs[0], tmp_path / "nowhere")
