"""Runs that travel: moved, copied, read from another directory, measured on other rows, asked and scored."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import reseal, write_rows
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

import discobeta
from discobeta import identity, record
from discobeta.cli import main
from discobeta.errors import UserError
from discobeta.run.evaluate import evaluate

DISCO = {"add_disco_head": True, "disco_pref": True}
PROMPT, RESPONSE = "user red assistant", "one ."


@pytest.fixture(scope="module")
def study(base, pairs, tmp_path_factory) -> Path:
    """A clone with results/s/{shared,runs} as a study has them, all named relative to it: rm, dpo and ppo, measured."""
    from discobeta.design.config import RunConfig
    from discobeta.run.train import train

    root = tmp_path_factory.mktemp("clone")
    before = Path.cwd()
    os.chdir(root)
    try:
        shared = "results/s/shared"
        shutil.copytree(base, f"{shared}/base")
        Path(shared, "data").mkdir()
        for name, path in pairs.items():
            shutil.copy(path, f"{shared}/data/{name}.jsonl")
        common = {"model_name_or_path": f"{shared}/base", "dataset": f"{shared}/data/train.jsonl", "cutoff_len": 32}
        common |= {"eval_dataset": f"{shared}/data/eval.jsonl", "max_steps": 2, "lora_rank": 2, "learning_rate": 0.01}
        common |= {"per_device_train_batch_size": 8, "logging_steps": 1, "seed": 3, "max_new_tokens": 4}
        common["tokenized_path"] = f"{shared}/data/tokens"
        sampled = {"num_eval_generations": 3, "generations_per_prompt": 1}
        runs = {
            "rm": DISCO,
            "dpo": {"pref_beta": 0.5, "reference_path": f"{shared}/data/reference", **sampled},
            "ppo": DISCO | sampled | {"reward_model": "results/s/runs/rm/a/seed-3", "ppo_epochs": 1},
        }
        runs["ppo"]["tokenized_path"] = f"{shared}/data/prompts"
        for stage, own in runs.items():
            settings = {"stage": stage, "output_dir": f"results/s/runs/{stage}/a/seed-3"} | common | own
            train(RunConfig.from_mapping(settings)[0])
            evaluate(settings["output_dir"])
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def moved(study, tmp_path, monkeypatch) -> Path:
    """The study's folder somewhere else, under another name, and nothing left where it was; cwd is a third place."""
    new = shutil.copytree(study / "results" / "s", tmp_path / "new" / "renamed")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return new


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- where the base is


def test_a_run_of_a_moved_study_loads_and_says_what_it_said(study, moved, monkeypatch):
    here = discobeta.load_reward_model(moved / "runs/rm/a/seed-3").score(PROMPT, RESPONSE)
    policy = discobeta.load_policy(moved / "runs/dpo/a/seed-3")
    ids = torch.tensor([[1, 4, 6, 5]])
    logits = policy.model(ids).logits
    assert policy.config.model_name_or_path == str(moved / "shared/base")
    monkeypatch.chdir(study)
    there = discobeta.load_reward_model("results/s/runs/rm/a/seed-3").score(PROMPT, RESPONSE)
    assert here == there and here[1] is not None
    assert torch.equal(logits, discobeta.load_policy("results/s/runs/dpo/a/seed-3").model(ids).logits)


@pytest.mark.parametrize("stage", ["rm", "dpo", "ppo"])
def test_a_run_of_a_moved_study_is_measured_as_before(moved, stage):
    """Byte for byte: base, rows, reference pass, answers and reward model are found beside it, and settings are
    recorded as the study calls them."""
    directory = moved / "runs" / stage / "a/seed-3"
    before = contents(directory)
    evaluate(directory)
    after = contents(directory)
    names = ["metrics.json", "examples.parquet", *(["generations.jsonl"] if stage != "rm" else [])]
    assert {name: before[name] for name in names} == {name: after[name] for name in names}
    records = [json.loads(side["evaluation.json"]) for side in (before, after)]
    assert records[0]["settings"] == records[1]["settings"] and records[0]["run"] == records[1]["run"]
    assert record.measurement_fault(directory) is None


def test_a_study_that_was_moved_is_still_what_was_written(study, moved, monkeypatch):
    """Its runs are finished where it is now, by the relative names that its config has: nothing trains again."""
    root = moved.parent.parent / "other-clone"
    (root / "results").mkdir(parents=True)
    shutil.copytree(moved, root / "results" / "s")
    monkeypatch.chdir(root)
    settings = yaml.safe_load(Path("results/s/runs/dpo/a/seed-3/config.yaml").read_text())
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    before = contents(root / "results/s/runs/dpo/a/seed-3/adapter")
    log = (root / "results/s/runs/dpo/a/seed-3/speed.jsonl").stat().st_mtime_ns
    assert main(["train", "run.yaml"]) == 0
    assert contents(root / "results/s/runs/dpo/a/seed-3/adapter") == before
    assert (root / "results/s/runs/dpo/a/seed-3/speed.jsonl").stat().st_mtime_ns == log


def test_of_two_studies_with_the_same_names_a_run_takes_its_own(moved, tmp_path, monkeypatch, base):
    """The working directory holds other things under the names that its config says."""
    other = tmp_path / "cwd" / "results/s"
    shutil.copytree(moved, other)
    weights = other / "shared/base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x3f")
    assert identity.file_hash(weights) != identity.file_hash(moved / "shared/base/model.safetensors")
    shutil.rmtree(other / "shared/data")
    found = discobeta.load_policy(moved / "runs/dpo/a/seed-3")
    assert found.config.model_name_or_path == str(moved / "shared/base")
    assert found.config.dataset == str(moved / "shared/data/train.jsonl")


def test_a_base_is_found_by_its_hash(moved, tmp_path):
    """A run that was copied alone, with its base somewhere above it under the base's name, or beside other bases."""
    alone = shutil.copytree(moved / "runs/dpo/a/seed-3", tmp_path / "sent/inbox/run")
    with pytest.raises(UserError):
        discobeta.load_policy(alone)
    shutil.copytree(moved / "shared/base", tmp_path / "sent/base")
    assert discobeta.load_policy(alone).config.model_name_or_path == str(tmp_path / "sent/base")
    shutil.move(tmp_path / "sent/base", tmp_path / "sent/shared/base/seed-9")
    assert discobeta.load_policy(alone).config.model_name_or_path == str(tmp_path / "sent/shared/base/seed-9")


def test_where_a_base_is_not_found_it_is_said_what_was_looked_for_and_what_to_pass(moved, tmp_path, capsys):
    elsewhere = shutil.move(moved / "shared/base", tmp_path / "elsewhere")
    directory = moved / "runs/dpo/a/seed-3"
    digest = json.loads((directory / "provenance.json").read_text())["base"]
    with pytest.raises(UserError) as refused:
        discobeta.load_policy(directory)
    said = str(refused.value)
    for part in ("results/s/shared/base", str(moved / "shared/base"), digest[:12], "--base DIR", "base=DIR"):
        assert part in said
    assert len(said.splitlines()) == 1
    assert main(["evaluate", str(directory)]) == 2 and "--base DIR" in capsys.readouterr().err
    assert discobeta.load_policy(directory, base=elsewhere).config.model_name_or_path == str(elsewhere)
    assert main(["evaluate", str(directory), "--base", str(elsewhere)]) == 0
    ppo = moved / "runs/ppo/a/seed-3"  # whose reward model stands on the same base
    assert main(["evaluate", str(ppo), "--base", str(elsewhere)]) == 0


def test_another_base_is_never_taken(moved, tmp_path):
    other = shutil.copytree(moved / "shared/base", tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x3f")
    with pytest.raises(UserError, match=f"was trained with another base than {other} is now"):
        discobeta.load_policy(moved / "runs/dpo/a/seed-3", base=other)
    with pytest.raises(UserError, match="was trained with another base"):
        discobeta.load_reward_model(moved / "runs/rm/a/seed-3", base=other)
    shutil.rmtree(moved / "shared/base")
    shutil.move(other, moved / "shared/base")
    with pytest.raises(UserError, match="was trained with another base than .*renamed/shared/base is now"):
        discobeta.load_policy(moved / "runs/dpo/a/seed-3")


def test_a_base_of_the_hub_is_downloaded_before_it_is_compared(moved, tmp_path, monkeypatch):
    """On a new machine: its hash is one of weight files, and looking a name up brings its config.json alone."""
    hub, directory = tmp_path / "hub", moved / "runs/dpo/a/seed-3"
    shutil.move(moved / "shared/base", hub)
    settings = yaml.safe_load((directory / "config.yaml").read_text()) | {"model_name_or_path": "somebody/model"}
    facts = {name: json.loads((directory / "provenance.json").read_text())[name] for name in ("base", "tokenizer")}
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copy(hub / "config.json", cache)

    def download(name, *arguments):
        assert name == "somebody/model"
        shutil.copytree(hub, cache, dirs_exist_ok=True)

    monkeypatch.setattr(identity, "folder_of", lambda name, *rest: cache if name == "somebody/model" else Path(name))
    monkeypatch.setattr("discobeta.inputs.fetch.download", download)
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    reseal(directory, **facts)
    from discobeta.run.load import read_run

    assert read_run(directory, "dpo").config.model_name_or_path == "somebody/model"
    assert (cache / "model.safetensors").is_file()


def test_rows_that_are_not_here_are_read_as_tokens(moved):
    for path in (moved / "shared/data").glob("*.jsonl"):
        path.unlink()
    before = contents(moved / "runs/dpo/a/seed-3")["metrics.json"]
    evaluate(moved / "runs/dpo/a/seed-3")
    assert contents(moved / "runs/dpo/a/seed-3")["metrics.json"] == before
    tokens = moved / "shared/data/tokens"
    with pytest.raises(UserError):  # they are compared all the same
        record_of = json.loads((tokens / "tokens.json").read_text())
        (tokens / "tokens.json").write_text(json.dumps(record_of | {"counts": {}}))
        evaluate(moved / "runs/dpo/a/seed-3")


# --- plain PEFT


def test_plain_peft_finds_the_base_from_any_working_directory(study, tmp_path, monkeypatch):
    """The score is the mean of our reward model, read as PEFT and transformers alone read it."""
    monkeypatch.chdir(tmp_path)
    rm, dpo = (study / "results/s/runs" / stage / "a/seed-3" for stage in ("rm", "dpo"))
    model = AutoPeftModelForSequenceClassification.from_pretrained(rm / "adapter", num_labels=1)
    ids = torch.tensor([[4, 6, 5, 9, 17, 2]])  # user red assistant one . <eos>
    mean, _ = discobeta.load_reward_model(rm).score(PROMPT, RESPONSE)
    torch.testing.assert_close(model(ids).logits[0, 0], mean, rtol=1e-5, atol=1e-6)  # PEFT sums in another order
    AutoPeftModelForCausalLM.from_pretrained(dpo / "adapter")
    named = json.loads((dpo / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(study / "results/s/shared/base")


def test_a_hubs_base_is_named_by_its_id_and_revision(tmp_path):
    from discobeta.design.config import RunConfig

    (tmp_path / "adapter").mkdir()
    description = tmp_path / "adapter/adapter_config.json"
    description.write_text('{"base_model_name_or_path": "x", "revision": null, "r": 2}')
    config, _ = RunConfig.from_mapping(
        {"stage": "dpo", "model_name_or_path": "somebody/model", "model_revision": "v2", "dataset": "x"}
    )
    record.write_provenance(tmp_path, config, {})
    assert json.loads(description.read_text()) == {
        "base_model_name_or_path": "somebody/model", "revision": "v2", "r": 2,
    }  # fmt: skip
    written = json.loads((tmp_path / "provenance.json").read_text())["files"]
    assert written["adapter/adapter_config.json"] == identity.file_hash(description)  # sealed as it stands


# --- score


@pytest.fixture(scope="module")
def judge(study):
    return discobeta.load_reward_model(study / "results/s/runs/rm/a/seed-3")


def test_two_texts_are_one_score_and_lists_are_many(judge):
    mean, variance = judge.score(PROMPT, RESPONSE)
    means, variances = judge.score([PROMPT, PROMPT], [RESPONSE, "two ?"])
    assert mean.shape == variance.shape == () and means.shape == variances.shape == (2,)
    # within a batch a sum may be in another order
    torch.testing.assert_close(torch.stack([mean, variance]), torch.stack([means[0], variances[0]]))
    assert means[0] != means[1]
    one, _ = judge.score([PROMPT], [RESPONSE])
    assert one.shape == (1,) and one[0] == mean


def test_a_conversation_is_scored_as_the_chat_template_says_it(judge):
    """The template writes `user X assistant`, which is this world's text; the ids are those of the text."""
    tokenizer = judge.tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'user ' if m['role'] == 'user' else ' assistant ' }}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %} <eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} assistant {% endif %}"
    )
    try:
        turns = [{"role": "user", "content": "red"}]
        as_turns, _ = judge.score(turns, RESPONSE)
        of_two, _ = judge.score([turns, turns], [RESPONSE, {"role": "assistant", "content": RESPONSE}])
    finally:
        tokenizer.chat_template = before
    as_text, _ = judge.score(PROMPT, RESPONSE)
    assert as_turns == as_text
    torch.testing.assert_close(of_two, torch.stack([as_text, as_text]))


@pytest.mark.parametrize(
    ("prompts", "responses", "says"),
    [
        (PROMPT, [RESPONSE, RESPONSE], "one prompt and 2 responses"),
        ([PROMPT], [RESPONSE, RESPONSE], "1 prompts and 2 responses"),
        ([PROMPT, PROMPT], RESPONSE, "prompt 0 should be a text, or a conversation"),
        ([{"role": "user"}], RESPONSE, "prompt 0 should be a text, or a conversation"),
        (5, RESPONSE, "prompt 0 should be a text, or a conversation"),
        ([{"role": "assistant", "content": "a"}], RESPONSE, "ends with the assistant's turn"),
        ([PROMPT], [7], "response 0 should be a text or a message"),
        (PROMPT, "", "empty response"),
        (" \n", RESPONSE, "prompt 0 is empty"),
        ([{"role": "system", "content": "a"}], RESPONSE, "prompt 0 is empty"),
        (
            [{"role": "human", "content": "a"}],
            RESPONSE,
            r"or a conversation: .*\(roles: assistant, system, tool, user\)",
        ),
        ("half \ud83d", RESPONSE, "prompt 0 holds characters that no text has"),
        (PROMPT, "half \ud83d", "response 0 holds characters that no text has"),
        (PROMPT, None, "responses should be a text, a message or a list of such, not None"),
    ],
)
def test_what_cannot_be_scored_is_one_line(judge, prompts, responses, says):
    with pytest.raises(UserError, match=says):
        judge.score(prompts, responses)


# --- other rows


def test_a_run_is_measured_on_other_rows_in_a_folder_of_their_own(moved, tmp_path, capsys):
    """The numbers are those of the rows: of the run's own held-out rows, named as if they were others, its own."""
    directory, rows = moved / "runs/dpo/a/seed-3", moved / "shared/data/eval.jsonl"
    before = contents(directory)
    shutil.copy(rows, tmp_path / "other.jsonl")
    assert main(["evaluate", str(directory), "--set", f"eval_dataset={tmp_path}/other.jsonl"]) == 0
    written = directory / "evaluations/other"
    assert f"written to {written}; no table reads it" in capsys.readouterr().out
    after = contents(directory)
    assert {name: content for name, content in after.items() if not name.startswith("evaluations/")} == before
    assert after["evaluations/other/metrics.json"] == before["metrics.json"]
    assert json.loads(after["evaluations/other/evaluation.json"])["rows"] == {"eval_dataset": f"{tmp_path}/other.jsonl"}
    # and of the first four rows alone: the mean of their losses
    assert main(["evaluate", str(directory), "--output", str(tmp_path / "four"), "--set", "max_samples=4"]
                + [f"eval_dataset={tmp_path}/other.jsonl", "num_eval_generations=0"]) == 0  # fmt: skip
    import pandas as pd

    expected = pd.read_parquet(directory / "examples.parquet")["nll"][:4].mean()
    measured = json.loads((tmp_path / "four/metrics.json").read_text())
    assert measured["examples"] == 4 and measured["nll"] == pytest.approx(expected, rel=1e-5)


def test_several_other_rows_are_named_as_in_a_config(moved, tmp_path):
    for name in ("one", "two"):
        shutil.copy(moved / "shared/data/eval.jsonl", tmp_path / f"{name}.jsonl")
    directory = moved / "runs/dpo/a/seed-3"
    evaluate(directory, {"eval_dataset": [f"{tmp_path}/one.jsonl", f"{tmp_path}/two.jsonl"]})
    assert json.loads((directory / "evaluations/one-two/metrics.json").read_text())["examples"] == 2 * 12


def test_no_run_is_measured_on_what_it_was_trained_on(moved, tmp_path):
    """Under its name, as a copy, and, where the rows are no longer here, by their tokens."""
    directory, trained_on = moved / "runs/dpo/a/seed-3", moved / "shared/data/train.jsonl"
    shutil.copy(trained_on, tmp_path / "copy.jsonl")
    shutil.copy(moved / "shared/data/eval.jsonl", tmp_path / "other.jsonl")
    before = contents(moved)
    for rows in (trained_on, tmp_path / "copy.jsonl"):
        with pytest.raises(UserError, match=f"--set eval_dataset={rows}: the run was trained on these rows"):
            evaluate(directory, {"eval_dataset": str(rows)})
    fitted = {"eval_dataset": f"{tmp_path}/other.jsonl", "calibration_dataset": f"{tmp_path}/copy.jsonl"}
    with pytest.raises(UserError, match="--set calibration_dataset=.*/copy.jsonl: the run was trained on these rows"):
        evaluate(directory, fitted)
    assert contents(moved) == before
    trained_on.unlink()
    for settings in ({"eval_dataset": f"{tmp_path}/copy.jsonl"}, fitted):
        with pytest.raises(UserError, match="/copy.jsonl: the run was trained on these rows"):
            evaluate(directory, settings)
    assert not (directory / "evaluations").exists()


def test_rows_of_one_name_do_not_overwrite_one_another(moved, tmp_path):
    directory, rows = moved / "runs/dpo/a/seed-3", (moved / "shared/data/eval.jsonl").read_text().splitlines()
    (tmp_path / "sub").mkdir()
    (tmp_path / "other.jsonl").write_text("\n".join(rows))
    (tmp_path / "sub/other.jsonl").write_text("\n".join(rows[:4]))
    evaluate(directory, {"eval_dataset": f"{tmp_path}/other.jsonl"})
    before = contents(directory)
    with pytest.raises(
        UserError, match=r"evaluations/other holds what was measured of other rows \(eval_dataset=.*--outp"
    ):
        evaluate(directory, {"eval_dataset": f"{tmp_path}/sub/other.jsonl"})
    with pytest.raises(UserError, match="holds what was measured of other rows"):
        evaluate(directory, {"eval_dataset": f"{tmp_path}/other.jsonl", "max_samples": 4})
    assert contents(directory) == before
    evaluate(directory, {"eval_dataset": f"{tmp_path}/other.jsonl", "temperature": 0.5})  # of the same rows, again
    assert contents(directory / "evaluations/other")["metrics.json"] != before["evaluations/other/metrics.json"]


def test_an_evaluation_with_an_output_leaves_the_runs_own(moved, tmp_path):
    directory = moved / "runs/dpo/a/seed-3"
    before = contents(directory)
    evaluate(directory, {"num_eval_generations": 2}, output=tmp_path / "out")
    assert contents(directory) == before
    assert json.loads((tmp_path / "out/metrics.json").read_text())["generations"] == 2


@pytest.mark.parametrize("place", ["run", "other run", "foreign", "file", "answers"])
def test_what_is_measured_elsewhere_overwrites_nothing(moved, tmp_path, place):
    output = tmp_path / "out"
    if place in ("run", "other run"):
        output = moved / "runs" / ("dpo" if place == "run" else "rm") / "a/seed-3"
    elif place == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "metrics.json").write_text("mine")
        if place == "answers":
            from discobeta.folders import write_mark

            write_mark(output, "discobeta answers", ["metrics.json"])
    before = contents(tmp_path)
    rows = {"eval_dataset": str(moved / "shared/data/eval.jsonl")}
    with pytest.raises(UserError, match="--output"):
        evaluate(moved / "runs/dpo/a/seed-3", rows, output=output)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"eval_split": "test"}, "of which rows.*eval_dataset=NAME"),
        ({"eval_datasets": "x"}, "did you mean 'eval_dataset'"),
        ({"learning_rate": 1}, "no setting of an evaluation"),
        ({"eval_dataset": "nowhere.jsonl"}, "no such file: nowhere.jsonl"),
    ],
)
def test_a_wrong_setting_leaves_nothing(moved, setting, says):
    before = contents(moved)
    with pytest.raises(UserError, match=says):
        evaluate(moved / "runs/dpo/a/seed-3", setting)
    assert contents(moved) == before and not (moved / "runs/dpo/a/seed-3/evaluations").exists()


# --- samples


def asked(capsys, *words: str):
    assert main(["samples", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_stored_responses_are_shown_first(moved, capsys):
    directory = moved / "runs/ppo/a/seed-3"
    shutil.rmtree(moved / "shared")  # nothing is loaded for them
    told = asked(capsys, str(directory), "--count", "2", "--json")
    lines = (directory / "generations.jsonl").read_text().splitlines()
    assert told["rows"] == [json.loads(line) for line in lines[:2]] and "generations.jsonl" in told["from"]


def test_sampled_responses_are_those_of_the_evaluation_and_scored_alike(moved, capsys):
    """The same prompts, seed and settings: the evaluation's responses; the scores are the reward model's."""
    directory = moved / "runs/ppo/a/seed-3"
    stored = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    told = asked(capsys, str(directory), "--count", "3", "--json", "--set", "temperature=1.0")
    for key in ("prompt", "response", "reference_response"):
        assert [row[key] for row in told["rows"]] == [row[key] for row in stored]
    for key in ("reward", "reference_reward"):
        assert [row[key] for row in told["rows"]] == pytest.approx([row[key] for row in stored], rel=1e-5)


def test_prompts_are_answered_and_judged_by_whom_one_names(moved, capsys, tmp_path):
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "user blue assistant"}])
    judge = moved / "runs/rm/a/seed-3"
    words = [str(moved / "runs/dpo/a/seed-3"), "--prompt", PROMPT, "--file", str(path), "--reward-model", str(judge)]
    told = asked(capsys, *words, "--set", "temperature=0.5", "--json")
    assert [row["prompt"] for row in told["rows"]] == ["user red assistant", "user blue assistant"]
    model = discobeta.load_reward_model(judge)
    for row in told["rows"]:
        text = row["response"].removesuffix(" <eos>")
        if text and row["length"] < 4:  # a response that ends, as `score` has it
            mean, _ = model.score(row["prompt"], text)
            assert row["reward"] == pytest.approx(float(mean), rel=1e-4, abs=1e-5)
        assert {"reward", "reference_reward", "reference_response"} <= row.keys()


def test_true_rewards_stand_beside_responses_in_the_world(moved, capsys):
    words = ["--prompt", "hi advise me with pie at camp", "--set", "ground_truth=world", "--json"]
    (row,) = asked(capsys, str(moved / "runs/dpo/a/seed-3"), *words)["rows"]
    assert row["true_reward"] == row["reference_true_reward"] == -4  # three words missing, and malformed


def test_a_reward_model_scores_what_it_is_given(moved, capsys, tmp_path):
    directory = moved / "runs/rm/a/seed-3"
    model = discobeta.load_reward_model(directory)
    told = asked(capsys, str(directory), "--prompt", PROMPT, "--response", RESPONSE, "two ?", "--json")["rows"]
    means, variances = model.score([PROMPT] * 2, [RESPONSE, "two ?"])
    assert [row["mean"] for row in told] == means.tolist()
    assert [row["sigma"] ** 2 for row in told] == pytest.approx(variances.tolist())
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": PROMPT, "chosen": RESPONSE, "rejected": "two ?"}])
    of_pairs = asked(capsys, str(directory), "--file", str(path), "--json")["rows"]
    assert of_pairs == [row | {"side": side} for row, side in zip(told, ("chosen", "rejected"), strict=True)]
    held_out = asked(capsys, str(directory), "--count", "1", "--json")["rows"]
    assert [row["side"] for row in held_out] == ["chosen", "rejected"]
    first = json.loads((moved / "shared/data/eval.jsonl").read_text().splitlines()[0])
    assert held_out[0]["prompt"] == first["prompt"] and held_out[0]["response"] == f"{first['chosen']} <eos>"
    mean, _ = model.score(first["prompt"], first["chosen"])
    assert held_out[0]["mean"] == pytest.approx(float(mean), rel=1e-5)


def test_so_many_prompts_are_shown_as_are_asked_for(moved, capsys, tmp_path):
    """A pair is one prompt, which a policy answers once and of which a reward model scores both responses."""
    rows = [{"prompt": f"user {word} assistant", "chosen": "one .", "rejected": "two ."} for word in ("red", "blue")]
    path = write_rows(tmp_path / "pairs.jsonl", [*rows, *rows])
    policy, judge = moved / "runs/dpo/a/seed-3", moved / "runs/rm/a/seed-3"
    told = asked(capsys, str(policy), "--file", str(path), "--count", "3", "--json")["rows"]
    assert [row["prompt"] for row in told] == ["user red assistant", "user blue assistant", "user red assistant"]
    told = asked(capsys, str(judge), "--file", str(path), "--count", "1", "--json")["rows"]
    assert [(row["response"], row["side"]) for row in told] == [("one .", "chosen"), ("two .", "rejected")]
    evaluate(policy, {"generations_per_prompt": 2})
    told = asked(capsys, str(policy), "--count", "2", "--json")["rows"]
    lines = [json.loads(line) for line in (policy / "generations.jsonl").read_text().splitlines()]
    assert len(told) == 4 and told == lines[:4] and len({row["prompt"] for row in told}) == 2


def test_a_text_file_of_prompts_may_begin_with_a_mark(moved, capsys, tmp_path):
    (tmp_path / "bom.txt").write_bytes("\ufeffuser red assistant\r\nuser blue assistant\r\n".encode())
    told = asked(capsys, str(moved / "runs/dpo/a/seed-3"), "--file", f"{tmp_path}/bom.txt", "--json")["rows"]
    assert [row["prompt"] for row in told] == ["user red assistant", "user blue assistant"]


FILES = {
    "nothing": ("", "holds no prompt"),
    "only a system": ('{"prompt": [{"role": "system", "content": "a"}]}', "prompt is empty"),
    "a role that there is not": (
        '{"prompt": [{"role": "human", "content": "a"}]}',
        "should be a text, or a conversation",
    ),
    "half a pair": ('{"prompt": "\\ud83d"}', "holds characters that no text has"),
    "a system": ('{"prompt": "a", "system": "b"}', "system is not read here: write the prompt as a conversation"),
    "tools": ('{"prompt": "a", "tools": [{"name": "f"}]}', "tools is not read here"),
    "a response": ('{"prompt": "a", "response": "b"}', "is a policy, which answers itself"),
    "a response that is none": ('{"prompt": "a", "chosen": 3, "rejected": "b"}', "its responses should be texts"),
}


@pytest.mark.parametrize(("text", "says"), FILES.values(), ids=FILES)
def test_a_file_of_prompts_that_cannot_be_asked_is_one_line(moved, tmp_path, capsys, text, says):
    (tmp_path / "rows.jsonl").write_text(text)
    assert main(["samples", str(moved / "runs/dpo/a/seed-3"), "--file", str(tmp_path / "rows.jsonl")]) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1


def test_responses_stand_side_by_side_and_stacked_where_it_is_narrow():
    from discobeta.run.samples import as_text

    row = {"prompt": "P", "response": "mine", "reference_response": "theirs", "reward": 2.0, "reference_reward": 1.0}
    told = {"run": "R", "stage": "dpo", "arm": "baseline", "from": "F", "rows": [row, row]}
    wide, narrow = as_text(told, 100).splitlines(), as_text(told, 40).splitlines()
    assert any("theirs" in line and "| mine" in line for line in wide)
    assert "   reference (reward +1.000): theirs" in narrow and "   policy (reward +2.000): mine" in narrow
    assert wide[-1] == "means of 2: reward +1.000 (reference) → +2.000 (policy)"
    assert max(map(len, wide)) <= 100


@pytest.mark.parametrize(
    ("stage", "words", "says"),
    [
        ("rm", ["--prompt", "a"], "give responses too"),
        ("rm", ["--set", "temperature=2"], "it scores, and samples nothing"),
        ("dpo", ["--set", "learning_rate=2"], "no setting of sampling"),
        ("dpo", ["--set", "temperatur=2"], "did you mean 'temperature'"),
        ("dpo", ["--count", "0"], "at least 1"),
        ("dpo", ["--prompt", "a", "b", "--response", "c", "d", "e"], "3 --response for 2 --prompt"),
        ("dpo", ["--file", "nowhere.txt"], "nowhere.txt"),
        ("dpo", ["--prompt", "a", "--response", "b"], "is a policy, which answers itself"),
        ("dpo", ["--prompt", " "], "--prompt is empty"),
        ("rm", ["--prompt", "", "--response", "b"], "--prompt is empty"),
    ],
)
def test_a_question_that_is_none_is_one_line(moved, stage, words, says, capsys):
    assert main(["samples", str(moved / "runs" / stage / "a/seed-3"), *words]) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1
