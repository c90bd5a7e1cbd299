"""The reference's answers: sampled once for all arms, and only ever those that the evaluation would sample itself."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import write_rows
from safetensors.torch import load_file, save_file

from discobeta import cli, files
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.inputs import answers
from discobeta.model.pretrained import load_causal_lm, load_tokenizer
from discobeta.run.evaluate import evaluate
from discobeta.run.load import load_policy

pytestmark = pytest.mark.numeric

SAMPLING = {"num_eval_generations": 6, "max_new_tokens": 5}
MEASURED = ("metrics.json", "examples.parquet", "generations.jsonl")


@pytest.fixture
def sampled(monkeypatch) -> list[str]:
    """What `generate` is asked for from now on, by the label of its progress bar."""
    calls, generate = [], answers.generate

    def counted(*arguments, description, **options):
        calls.append(description)
        return generate(*arguments, description=description, **options)

    monkeypatch.setattr(answers, "generate", counted)
    return calls


@pytest.fixture
def let_answer(settings, tmp_path):
    """let_answer(stage, **changes): `discobeta answers` with the config of a run; its exit status."""

    def make(stage: str, **changes) -> int:
        file = tmp_path / "answers.yaml"
        file.write_text(json.dumps(settings(stage, **SAMPLING | changes)))
        return cli.main(["answers", str(file)])

    return make


def measured(directory) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in MEASURED}


def hash_in(directory) -> str:
    return files.read_sealed(directory / "evaluation.json")["reference_answers"]


def test_what_is_shared_is_what_each_would_sample_and_is_sampled_once(run, let_answer, sampled, tmp_path):
    """Of two arms of dpo and of a ppo run: the same bytes with and without the folder."""
    used = {"add_beta_head": True, "use_dynamic_beta": True}
    reward_model = str(run("rm", name="rm"))
    ppo = {"reward_model": reward_model, "max_steps": 1, "logging_steps": 1}
    folders = {stage: tmp_path / f"{stage}-answers" for stage in ("dpo", "ppo")}
    runs = {
        (name, folder is not None): run(
            stage, name=f"{name}-{folder is not None}", **SAMPLING, **changes,
            **({"reference_answers_path": str(folder)} if folder else {}),
        )
        for name, stage, changes in (("one", "dpo", {}), ("other", "dpo", used), ("ppo", "ppo", ppo))
        for folder in (None, folders[stage])
    }  # fmt: skip
    sampled.clear()
    for stage, folder in folders.items():
        changes = {"reward_model": reward_model} if stage == "ppo" else {}
        assert let_answer(stage, reference_answers_path=str(folder), **changes) == 0
    assert sampled == ["reference samples"] * 2
    for name in ("one", "other", "ppo"):
        sampled.clear()
        evaluate(runs[name, False])
        assert sampled == ["policy samples", "reference samples"]
        sampled.clear()
        evaluate(runs[name, True])
        assert sampled == ["policy samples"]
        assert measured(runs[name, True]) == measured(runs[name, False])
        assert hash_in(runs[name, True]) == hash_in(runs[name, False])
    assert len({hash_in(runs[name, True]) for name in ("one", "other")}) == 1


def test_a_second_command_finds_them_there(let_answer, sampled, tmp_path):
    folder = tmp_path / "answers"
    assert let_answer("dpo", reference_answers_path=str(folder)) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert let_answer("dpo", reference_answers_path=str(folder)) == 0
    assert sampled == ["reference samples"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_evaluation_writes_no_folder_and_without_one_samples_itself(run, sampled, tmp_path):
    directory = run("dpo", **SAMPLING, reference_answers_path=str(tmp_path / "nowhere"))
    before = set(tmp_path.iterdir())
    evaluate(directory)
    assert sampled == ["policy samples", "reference samples"]
    assert set(tmp_path.iterdir()) == before


OTHER = {
    "num_eval_generations": (3, "prompts"),
    "max_new_tokens": (4, "max_new_tokens (5 there, 4 here)"),
    "temperature": (0.5, "temperature (1.0 there, 0.5 here)"),
    "top_p": (0.9, "top_p (1.0 there, 0.9 here)"),
    "top_k": (2, "top_k (0 there, 2 here)"),
    "per_device_eval_batch_size": (1, "per_device_eval_batch_size (8 there, 1 here)"),
}
"""Setting of an evaluation -> another value, and what of the folder is another one then."""


def test_an_evaluation_with_other_settings_samples_its_own(run, let_answer, sampled, tmp_path, capsys):
    shared, alone = tmp_path / "answers", run("dpo", name="alone", **SAMPLING)
    directory = run("dpo", **SAMPLING, reference_answers_path=str(shared))
    assert let_answer("dpo", reference_answers_path=str(shared)) == 0
    for key, (value, said) in OTHER.items():
        evaluate(alone, {key: value})
        sampled.clear()
        capsys.readouterr()
        evaluate(directory, {key: value})
        assert sampled == ["policy samples", "reference samples"]
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "reference_answers_path" in line]
        assert line.startswith(f"discobeta: reference_answers_path: {shared} is of another {said}")
        assert measured(directory) == measured(alone)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({key: value}, said) for key, (value, said) in OTHER.items()]
    + [({"seed": 8}, "seed (7 there, 8 here)"), ({"flash_attn": "disabled"}, "attention"), ({"bf16": True}, "dtype")],
)
def test_a_folder_of_something_else_is_refused(let_answer, sampled, tmp_path, capsys, changes, named):
    folder = tmp_path / "answers"
    assert let_answer("dpo", reference_answers_path=str(folder)) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert let_answer("dpo", reference_answers_path=str(folder), **changes) == 2
    assert f"{folder} holds the reference's answers of another {named}" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sampled == ["reference samples"]


@pytest.fixture
def prepared(settings, tmp_path):
    """prepared(**changes): the config of a dpo run, its prompts and tokenizer."""

    def make(**changes):
        config, _ = RunConfig.from_mapping(settings("dpo", **SAMPLING | changes))
        tokenizer = load_tokenizer(config)
        data = load_or_tokenise(config, tokenizer)
        return config, answers.prompts_of(config, data)

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {"pref_beta": 0.9},
        {"lora_rank": 2},
        {"learning_rate": 1.0},
        {"max_steps": 9},
        {"add_disco_head": True, "disco_pref": True},
    ],
)
def test_what_an_arm_or_a_loss_changes_is_not_in_their_key(prepared, changes):
    assert answers.sample_key(*prepared()) == answers.sample_key(*prepared(**changes))


def test_another_base_or_tokenizer_is_another_key(prepared, base, tmp_path):
    config, prompts = prepared()
    other = shutil.copytree(base, tmp_path / "other")
    key = answers.sample_key(config, prompts)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "."}))  # another end of a response
    changed = answers.sample_key(config.replace(model_name_or_path=str(other)), prompts)
    assert {name for name in key if key[name] != changed[name]} == {"tokenizer"}
    model = load_causal_lm(config)
    model.get_input_embeddings().weight.data[3, 3] += 1e-6
    model.save_pretrained(other)
    changed = answers.sample_key(config.replace(model_name_or_path=str(other)), prompts)
    assert changed["base"] != key["base"]


def test_a_file_that_was_changed_is_refused(run, let_answer, tmp_path, capsys):
    folder = tmp_path / "answers"
    directory = run("dpo", **SAMPLING, reference_answers_path=str(folder))
    assert let_answer("dpo", reference_answers_path=str(folder)) == 0
    columns = load_file(folder / "responses.safetensors")
    save_file({**columns, "values": columns["values"].flip(0)}, folder / "responses.safetensors")
    with pytest.raises(UserError, match="responses.safetensors was changed after it was written; remove"):
        evaluate(directory)
    assert let_answer("dpo", reference_answers_path=str(folder)) == 2
    # even if its checksum were mended: too few responses
    save_file({**columns, "offsets": columns["offsets"][:-1]}, folder / "responses.safetensors")
    mended = files.read_sealed(folder / "answers.json") | {"sha256": files.sha256(folder / "responses.safetensors")}
    files.write_sealed(folder / "answers.json", mended)
    with pytest.raises(UserError, match="5 responses to 6 prompts"):
        evaluate(directory)
    assert not (directory / "metrics.json").exists()


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"key": {}}'])
def test_a_record_that_is_none_is_refused(run, let_answer, tmp_path, record):
    folder = tmp_path / "answers"
    directory = run("dpo", **SAMPLING, reference_answers_path=str(folder))
    folder.mkdir()
    (folder / "answers.json").write_text(record)
    with pytest.raises(UserError, match="answers.json"):
        evaluate(directory)
    assert let_answer("dpo", reference_answers_path=str(folder)) == 2
    assert (folder / "answers.json").read_text() == record


def test_somebodys_folder_stays(let_answer, tmp_path, capsys):
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    assert let_answer("dpo", reference_answers_path=str(folder)) == 2
    assert "reference_answers_path: " in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_nothing_is_left_of_answers_that_failed(let_answer, tmp_path, monkeypatch):
    def fail(*arguments):
        raise UserError("no more")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    assert let_answer("dpo", reference_answers_path=str(tmp_path / "answers")) == 2
    assert not (tmp_path / "answers").exists() and not list(tmp_path.glob(".answers*"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "answers needs reference_answers_path"),
        ({"reference_answers_path": "a", "num_eval_generations": 0}, "answers needs num_eval_generations"),
    ],
)
def test_what_the_command_lacks_is_said(let_answer, capsys, changes, said):
    assert let_answer("dpo", **changes) == 2
    assert said in capsys.readouterr().err


def test_the_log_ratio_is_that_of_the_policys_own_response(run, settings):
    """Against transformers' own forward pass, one sequence at a time and unpadded."""
    directory = run("dpo", **SAMPLING, learning_rate=0.05)
    evaluate(directory)
    rows = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    config, _ = RunConfig.from_mapping(settings("dpo", **SAMPLING))
    policy, reference, tokenizer = load_policy(directory).model, load_causal_lm(config), load_tokenizer(config)
    for row in rows:
        prompt, response = tokenizer.encode(row["prompt"]), tokenizer.encode(row["response"])
        response += [tokenizer.eos_token_id] * row["ended"]
        assert len(response) == row["length"]
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            of_policy, of_reference = (
                model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()
                for model in (policy, reference)
            )
        assert row["log_ratio"] == pytest.approx((of_policy - of_reference).item(), abs=1e-4)
    assert np.ptp([row["log_ratio"] for row in rows]) > 0.01  # so that a mixed-up row would be seen


def test_prompts_without_an_answer_in_common_are_refused_as_rows_are(let_answer, tmp_path, pairs):
    rows = [json.loads(line) for line in pairs["eval"].read_text().splitlines()]
    other = write_rows(tmp_path / "held-out.jsonl", rows[::-1])
    folder = tmp_path / "answers"
    assert let_answer("dpo", reference_answers_path=str(folder)) == 0
    assert let_answer("dpo", reference_answers_path=str(folder), eval_dataset=str(other)) == 2
