"""Nothing that does not carry our mark is ever removed, and never what a run reads; kills leave nothing behind."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from discobeta import files, lock, record
from discobeta.cli import main
from discobeta.errors import UserError
from discobeta.run.evaluate import evaluate


def contents(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def somebodys(base, tmp_path):
    """A folder with the names of a run's parts in it, and nothing of ours."""
    folder = tmp_path / "run"
    shutil.copytree(base, folder / "model")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-100.pt").write_text("a week of a GPU")
    (folder / "config.yaml").write_text("mine: true\n")
    return folder


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kept", ["config.yaml", "model", "checkpoints"])
def test_a_folder_is_not_ours_by_its_names(run, somebodys, kept, overwrite):
    for name in {"config.yaml", "model", "checkpoints"} - {kept}:
        files.remove(somebodys / name)
    before = contents(somebodys)
    with pytest.raises(UserError, match=f"output_dir: .*run/{kept} is there, and no run"):
        run("dpo", overwrite_output_dir=overwrite)
    assert contents(somebodys) == before


def test_a_config_that_was_copied_from_a_run_makes_no_folder_ours(run, somebodys):
    other = run("dpo", name="other")
    shutil.copy(other / "config.yaml", somebodys)
    before = contents(somebodys)
    with pytest.raises(UserError, match="no run of this version"):
        run("dpo", overwrite_output_dir=True)
    assert contents(somebodys) == before


@pytest.mark.parametrize("place", ["model/weights.bin", "adapter/notes.txt", "checkpoints/best.pt"])
def test_what_somebody_has_put_into_a_run_stays(run, place):
    path = run("dpo")
    (path / place).parent.mkdir(exist_ok=True)
    (path / place).write_text("mine")
    (path / "notes.txt").write_text("mine too")
    before = contents(path)
    with pytest.raises(UserError, match="was not written by a run|no run of this version"):
        run("dpo", learning_rate=2e-3, overwrite_output_dir=True)
    assert contents(path) == before
    (path / place).unlink()
    run("dpo", learning_rate=2e-3, overwrite_output_dir=True)
    assert (path / "notes.txt").read_text() == "mine too"


def test_a_run_does_not_remove_what_it_reads(run, pairs, base):
    path, rm = run("dpo"), run("rm", name="rm")
    evaluate(path)
    before = contents(path, rm)
    cases = [
        ("dpo", {"adapter_name_or_path": str(path / "adapter")}, "adapter_name_or_path"),
        ("dpo", {"dataset": f"{pairs['train']},{path / 'examples.parquet'}"}, "dataset"),
        ("dpo", {"eval_dataset": str(path / "examples.parquet")}, "eval_dataset"),
        ("dpo", {"tokenized_path": str(path / "adapter")}, "tokenized_path"),
        ("ppo", {"reward_model": str(rm), "name": "rm"}, "reward_model"),
        ("ppo", {"reward_model": str(rm / "." / "adapter"), "name": "rm"}, "reward_model"),
        ("ppo", {"reward_model": str(rm), "beta_head": str(path)}, "beta_head"),
    ]
    (path.parent / "link").symlink_to(path / "adapter")
    cases.append(("dpo", {"adapter_name_or_path": str(path.parent / "link")}, "adapter_name_or_path"))
    for stage, changes, key in cases:
        says = f"would be replaced, and this run reads {key}|is {key}, which this run reads|no dpo run|not a dpo run"
        with pytest.raises(UserError, match=says):
            run(stage, learning_rate=2e-3, overwrite_output_dir=True, **changes)
        assert contents(path, rm) == before, key


@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_no_run_is_written_into_its_own_base(run, base, tmp_path, finetuning):
    """Else the base is no longer what was read, and refused from then on."""
    own = shutil.copytree(base, tmp_path / "own")
    (tmp_path / "link").symlink_to(own)
    before = contents(own)
    for name in (own, tmp_path / "link"):
        with pytest.raises(UserError, match=f"output_dir: {own} is model_name_or_path, which this run reads"):
            run("dpo", name="own", model_name_or_path=str(name), finetuning_type=finetuning)
        assert contents(own) == before


def test_a_base_in_the_folder_of_its_run_is_kept(settings, run, base, tmp_path):
    own = shutil.copytree(base, tmp_path / "run" / "model")
    before = contents(own)
    for changes in ({}, {"finetuning_type": "full"}, {"overwrite_output_dir": True}):
        with pytest.raises(UserError, match="run/model"):
            run("dpo", model_name_or_path=str(own), **changes)
    assert contents(own) == before


@pytest.mark.parametrize("place", [".", "..", "data", "data/link", "file.txt"])
def test_a_reference_path_that_is_somebodys_folder_stays(run, pairs, tmp_path, monkeypatch, place):
    data = tmp_path / "data"
    data.mkdir()
    for name, path in pairs.items():
        shutil.copy(path, data / f"{name}.jsonl")
    (tmp_path / "file.txt").write_text("mine")
    (data / "link").symlink_to(data)
    monkeypatch.chdir(data)
    before = contents(tmp_path)
    path = place if place.startswith(".") else str(tmp_path / place)
    with pytest.raises(UserError, match="reference_path"):
        run("dpo", name="out", dataset="train.jsonl", eval_dataset="eval.jsonl", reference_path=path)
    assert contents(tmp_path) == before


def test_the_cache_of_a_run_is_replaced_and_what_is_beside_it_is_not(run):
    path = run("dpo")
    (path / "reference" / "notes.txt").write_text("mine")
    changes = {"cutoff_len": 16, "max_unusable_rows": 1.0, "overwrite_output_dir": True}
    with pytest.raises(UserError, match=r"reference would be replaced, and notes.txt in it was not written"):
        run("dpo", **changes)
    assert (path / "reference" / "notes.txt").read_text() == "mine"
    (path / "reference" / "notes.txt").unlink()
    run("dpo", **changes)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "scratch")
    with files.replacing(tmp_path / "here") as folder:
        folder.mkdir()
        (folder / "new").touch()
    assert (tmp_path / "here").is_symlink() and [path.name for path in (tmp_path / "scratch").iterdir()] == ["new"]


# --- before a lock and after it


def test_a_run_of_other_settings_waits_and_is_then_refused(settings, tmp_path, run):
    """It used to remove the finished run that it had waited for."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings("dpo", max_steps=400)))
    command = [sys.executable, "-m", "discobeta", "train", str(path), "--no-evaluate"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / lock.NAME).exists():
        assert first.poll() is None
        time.sleep(0.02)
    with pytest.raises(UserError, match=r"holds another run \(seed: 7 there, 8 here\)"):
        run("dpo", max_steps=400, seed=8)
    assert first.wait() == 0
    assert record.read(tmp_path / "run").config.seed == 7


def test_an_evaluation_waits_for_whoever_writes_the_run(run, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.2)
    path = run("dpo")
    waiting = threading.Thread(target=evaluate, args=(path,))
    with lock.holding(path):
        waiting.start()
        time.sleep(2)
        assert not (path / "metrics.json").exists()
    waiting.join()
    assert record.measurement_fault(path) is None and not (path / lock.NAME).exists()


@pytest.mark.parametrize("content", ["null", "5", "", "[]", '"x"', '{"id": 5}', '{"pid": "x"}', "[" * 9999, '{"id": "'])
def test_a_holder_that_cannot_be_read_holds_nothing_up(tmp_path, monkeypatch, content, capsys):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    (tmp_path / lock.NAME).write_text(content)
    with lock.holding(tmp_path) as hold:
        hold.confirm()
        (tmp_path / lock.NAME).write_text(content)  # and if it happens to the one who holds it
        time.sleep(0.5)
        hold.confirm()
        assert lock.read_holder(tmp_path / lock.NAME) == hold.me
    assert "names no process" in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("holder", [{"pid": "x"}, {"pid": -1}, {"pid": 10**30}, {"pid": None}, {"host": ["a"]}])
def test_a_holder_with_odd_fields_is_waited_for_and_not_more(tmp_path, monkeypatch, holder):
    import json

    monkeypatch.setattr(lock, "BEAT", 0.05)
    from discobeta.processes import namespace

    (tmp_path / lock.NAME).write_text(json.dumps({"id": "x", "namespace": namespace(), "pid": 1, **holder}))
    with lock.holding(tmp_path):
        pass


# --- what kills leave behind


def test_the_next_start_sweeps_what_a_killed_process_was_writing(tmp_path):
    program = (
        "import os, sys, signal\nfrom pathlib import Path\nfrom discobeta import files\n"
        "with files.replacing(Path(sys.argv[1])) as path:\n    path.mkdir()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "tokens.d"
    done = subprocess.run([sys.executable, "-c", program, str(target)])
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    foreign = tmp_path / ".tokens.partial-mine.d"
    foreign.touch()
    living = files.beside(target, "partial")
    living.touch()
    files.write_text(target, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([foreign, living, target])


def test_a_directory_that_was_moved_aside_comes_back(tmp_path):
    """Killed between the two renamings of `replacing`."""
    program = (
        "import os, sys, signal\nfrom pathlib import Path\nfrom discobeta import files\n"
        "rename, count = os.rename, iter('ab')\n"
        "def dying(*paths):\n    next(count) == 'b' and os.kill(os.getpid(), signal.SIGKILL)\n    rename(*paths)\n"
        "os.rename = dying\n"
        "with files.replacing(Path(sys.argv[1])) as path:\n    path.mkdir()\n"
    )
    target = tmp_path / "base"
    target.mkdir()
    (target / "weights").write_text("a day")
    assert subprocess.run([sys.executable, "-c", program, str(target)]).returncode == -signal.SIGKILL
    assert not target.exists()
    files.sweep(target)
    assert (target / "weights").read_text() == "a day" and list(tmp_path.iterdir()) == [target]


def test_a_finished_run_is_cleared_of_what_a_kill_left(run):
    path = run("dpo", save_steps=2)
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "step-2.pt").touch()
    run("dpo", save_steps=2)
    assert not (path / "checkpoints").exists()
    dead = subprocess.run(
        [sys.executable, "-c", "from discobeta import lock; import json; print(json.dumps(lock.this_holder()))"],
        capture_output=True,
        text=True,
    )
    (path / lock.NAME).write_text(dead.stdout)
    run("dpo", save_steps=2)
    assert not (path / lock.NAME).exists()


def test_a_damaged_checkpoint_is_set_aside(run, capsys, monkeypatch):
    import torch

    class Killed(BaseException):
        pass

    whole, step, count = run("dpo", name="whole", save_steps=2), torch.optim.AdamW.step, iter(range(9))

    def dying(self, *arguments, **options):
        if next(count) == 3:
            raise Killed
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", dying)
    with pytest.raises(Killed):
        run("dpo", save_steps=2)
    monkeypatch.undo()
    path = whole.with_name("run") / "checkpoints" / "step-2.pt"
    weights = torch.load(path, weights_only=True)["weights"]
    largest = max(weights.values(), key=torch.Tensor.numel).numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(largest) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="resume_from_checkpoint: .*step-2.pt is no checkpoint, or is damaged"):
        run("dpo", save_steps=2, resume_from_checkpoint=str(path))
    again = run("dpo", save_steps=2)
    assert "step-2.pt is damaged: set aside" in capsys.readouterr().out
    for name in ("adapter/adapter_model.safetensors", "log.jsonl"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    assert not (again / "checkpoints").exists()


def test_whichever_bit_changes_a_checkpoint_is_refused_or_reads_as_it_was(tmp_path):
    """torch.load itself reads on: at c33fbca a flipped bit was a changed weight."""
    import torch

    from discobeta.run.loop import read_whole

    path, random = tmp_path / "step-1.pt", np.random.default_rng(0)
    state = {"weights": {"a": torch.arange(300.0), "b": torch.ones(3, 5)}, "step": 1, "identity": "x" * 64}
    torch.save(state, path)
    content, refused, read = path.read_bytes(), 0, 0
    for place in random.choice(len(content), 400, replace=False):
        changed = bytearray(content)
        changed[place] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        if (found := read_whole(path)) is None:
            refused += 1
            continue
        assert found["step"] == 1 and found["identity"] == state["identity"], place
        assert all(found["weights"][name].equal(weight) for name, weight in state["weights"].items()), place
        read += 1
    assert refused > 100 and read > 20  # the rest is padding


def test_files_are_for_those_whom_the_umask_lets_read(run, pairs, tmp_path):
    before = os.umask(0o022)
    try:
        path = run("dpo", tokenized_path=str(tmp_path / "tokens"))
        evaluate(path)
    finally:
        os.umask(before)
    found = [file for folder in (path, tmp_path / "tokens") for file in folder.rglob("*") if file.is_file()]
    assert len(found) > 15
    assert {oct(file.stat().st_mode & 0o777) for file in found} == {"0o644"}


def test_a_read_only_file_system_is_named(tmp_path, monkeypatch):
    """As root writes where it may not, the system's refusal is made here."""
    import errno

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/a.json: Read-only file system"):
        files.write_text(tmp_path / "a.json", "text")
    with pytest.raises(UserError, match="Read-only file system"), lock.holding(tmp_path / "run"):
        pass


def test_an_sft_base_is_replaced_only_if_all_of_it_is_ours(settings, tmp_path, pairs):
    path = tmp_path / "run.yaml"
    wanted = settings("sft", finetuning_type="full", max_steps=2, overwrite_output_dir=True)
    wanted = {name: value for name, value in wanted.items() if not name.startswith(("lora", "pref"))}
    path.write_text(yaml.safe_dump(wanted))
    assert main(["train", str(path)]) == 0
    assert main(["train", str(path)]) == 0
    notes = tmp_path / "run" / "notes.txt"
    notes.write_text("mine")
    before = contents(tmp_path / "run")
    assert main(["train", str(path)]) == 2
    assert contents(tmp_path / "run") == before
    notes.unlink()
    inside = {"dataset": str(shutil.copy(pairs["train"], tmp_path / "run" / "config.json.jsonl"))}
    path.write_text(yaml.safe_dump(wanted | inside))
    assert main(["train", str(path)]) == 2 and Path(inside["dataset"]).exists()


def test_an_sft_base_does_not_keep_its_tokens_in_the_folder_that_it_replaces(settings, tmp_path, capsys):
    """Said before anything is tokenised or trained."""
    path = tmp_path / "run.yaml"
    wanted = settings("sft", finetuning_type="full", max_steps=2, tokenized_path=str(tmp_path / "run" / "tokens"))
    path.write_text(yaml.safe_dump({name: value for name, value in wanted.items() if not name.startswith("lora")}))
    assert main(["train", str(path)]) == 2 and not (tmp_path / "run").exists()
    assert "run would be replaced, and this run reads tokenized_path" in capsys.readouterr().err


def test_an_sft_base_on_another_start_is_refused(settings, base, tmp_path, capsys):
    own, path = shutil.copytree(base, tmp_path / "start"), tmp_path / "run.yaml"
    wanted = settings("sft", finetuning_type="full", max_steps=2, model_name_or_path=str(own))
    path.write_text(yaml.safe_dump({name: value for name, value in wanted.items() if not name.startswith("lora")}))
    assert main(["train", str(path)]) == 0 and main(["train", str(path)]) == 0
    description = (own / "config.json").read_text()
    (own / "config.json").write_text(description.replace('"initializer_range": 0.02', '"initializer_range": 0.03'))
    assert main(["train", str(path)]) == 2 and "another base than" in capsys.readouterr().err


def test_a_tracker_that_is_dropped_on_the_way_stays_ours(run):
    """report_to is no part of what a run is: the same run goes on without it, and is later replaced as a whole."""
    path = run("dpo", report_to="tensorboard")
    for name in ("provenance.json", ".finished.json"):
        (path / name).unlink()
    run("dpo")
    run("dpo", learning_rate=2e-3, overwrite_output_dir=True)
    assert not (path / "tracker").exists()
