"""What cannot be fetched is one line that names the key, whatever the hub's client raises."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest

from discobeta.design.study import Study
from discobeta.errors import UserError
from discobeta.inputs.fetch import fetch


def study(pairs, model):
    data = {"dataset": str(pairs["train"]), "eval_dataset": str(pairs["eval"])}
    return Study(
        {"study": "s", "seeds": [1], "arms": ["baseline"], "data": data, "base": {"model_name_or_path": model}}
    )


@pytest.mark.parametrize(
    "error",
    [KeyError("refs"), TypeError("no"), RuntimeError("first\nsecond"), ConnectionError(), OSError(28, "No space left")],
)
def test_an_error_of_the_hub_is_one_line(pairs, monkeypatch, error):
    def snapshot_download(*words, **more):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"^model_name_or_path: cannot fetch nobody/nothing: [^\n]+$"):
        fetch(study(pairs, "nobody/nothing"))


@pytest.mark.parametrize("name", ["./no/model", "/no/model", "~/model", "a/b/c", "models/", "../x"])
def test_a_folder_that_is_not_there_is_not_looked_up_on_the_hub(pairs, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *words, **more: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"^model_name_or_path: there is no directory [^\n]*$"):
        fetch(study(pairs, name))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(*files): what nobody/model holds on the hub; gives the names that have been downloaded."""
    here = tmp_path / "snapshot"
    here.mkdir()
    there = []

    def snapshot_download(name, *, revision, cache_dir, allow_patterns):
        assert name == "nobody/model"
        for file in there:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (here / file).touch()
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)

    def put(*files):
        there[:] = files
        return lambda: sorted(path.name for path in here.iterdir())

    return put


BIN = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]


def test_weights_are_taken_in_one_format(pairs, hub, capsys):
    fetched = hub("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.model", "tf_model.h5")
    fetch(study(pairs, "nobody/model"))
    assert fetched() == ["config.json", "model.safetensors", "tokenizer.model"]
    assert "nobody/model: " in capsys.readouterr().out


@pytest.mark.parametrize("weights", [["pytorch_model.bin"], BIN, ["adapter_model.bin", "value_head.bin"]])
def test_bin_is_taken_where_there_are_no_safetensors(pairs, hub, weights):
    fetched = hub("config.json", *weights, "training_args.bin", "optimizer.bin", "model.gguf")
    fetch(study(pairs, "nobody/model"))
    assert fetched() == sorted(["config.json", *weights])


def test_a_value_head_of_the_other_format_comes_along(pairs, hub):
    fetched = hub("model.safetensors", "pytorch_model.bin", "value_head.bin")
    fetch(study(pairs, "nobody/model"))
    assert fetched() == ["model.safetensors", "value_head.bin"]


def test_a_model_without_weights_is_missed_here_and_not_on_a_node(pairs, hub):
    hub("config.json", "model.gguf")
    with pytest.raises(UserError, match=r"^model_name_or_path: nobody/model has no weights that transformers loads "):
        fetch(study(pairs, "nobody/model"))
