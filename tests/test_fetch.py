"""What cannot be fetched is one line that names the key, whatever the hub's client raises."""

from __future__ import annotations

import pytest

from discobeta.errors import UserError
from discobeta.fetch import fetch
from discobeta.study import Study


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
