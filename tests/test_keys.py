"""Every key is said once, in the source; pages, schemas and the command follow. A key that nobody reads is named."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import test_layout
import yaml

from discobeta import cli, record
from discobeta.design import keys, study_file, study_sections
from discobeta.design.config import FIELDS, RunConfig
from discobeta.design.study import Study
from discobeta.errors import UserError

ROOT = Path(__file__).parent.parent
STUDY_SCHEMA, RUN_SCHEMA = (ROOT / "workflow" / "schemas" / f"{name}.schema.json" for name in ("study", "run"))
NO_STUDIES = ("datasets", "hypotheses")
STUDIES = sorted(path for path in (ROOT / "config").rglob("*.yaml") if path.stem not in NO_STUDIES)
SMOKE = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())


def validator(schema: Path):
    jsonschema = pytest.importorskip("jsonschema")  # which Snakemake brings
    from referencing import Registry, Resource

    found = json.loads(schema.read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    beside = Registry(retrieve=lambda name: Resource.from_contents(json.loads((schema.parent / name).read_text())))
    return jsonschema.Draft202012Validator(found, registry=beside)


def run(**settings: Any) -> tuple[RunConfig, list[str]]:
    return RunConfig.from_mapping({"stage": "rm", "model_name_or_path": "m"} | settings, "x.yaml")


def study(**changes: Any) -> Study:
    data = {"dataset": "a.jsonl", "eval_dataset": "b.jsonl"}
    return Study({"study": "s", "data": data, "base": {"model_name_or_path": "m"}} | changes, "x.yaml")


def refusal(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        study(**changes)
    return str(caught.value)


# --- what is made of the keys


@pytest.mark.parametrize("name, text", keys.pages().items(), ids=keys.pages().keys())
def test_pages_and_schemas_say_what_the_keys_are(name: str, text: str):
    assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name} is stale: make keys"


def test_the_pages_hold_every_key():
    page = (ROOT / "docs" / "reference" / "run.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == set(FIELDS)
    assert (
        "| `lam` | a number between 0 and 1 | 0.95 | ppo | training | lambda of the generalised advantages | `lambda` "
        "`gae_lambda` `lambd` |" in page
    )
    assert "| 0 (rm), 0 (dpo), 64 (ppo) | rm dpo ppo | measuring | prompts answered in evaluation (" in page
    assert "| `top_k` | a whole number, at least 0 | 0 | rm dpo ppo | measuring, training of ppo |" in page
    assert "| LoRA rank; null: that of adapter_name_or_path | `lora_r` `r` `rank` `lora_dim` |" in page
    assert "`max_length` `max_completion_length` `response_length`" in page
    names = (ROOT / "docs" / "reference" / "names.md").read_text()
    assert "| pref_loss | `loss_type` `dpo_loss` |" in names and "| finetuning_type: lora or full | `use_peft`" in names
    page = (ROOT / "docs" / "reference" / "study.md").read_text()
    assert '| `idle_arms` | run or prove | "run" |' in page and "| `study` | text | required |" in page
    assert '| `noise` | heteroscedastic or homoscedastic or topic or response | "heteroscedastic" |' in page
    assert "| `cutoff_len` | a whole number, at least 2, or null | 2048 |" in page


def test_the_schema_says_what_a_key_of_a_study_may_be():
    schema = json.loads(STUDY_SCHEMA.read_text())
    top, world = schema["properties"], schema["$defs"]["World"]["properties"]
    assert top["environment"]["enum"] == ["cpu", "cuda"]
    assert (top["seeds"]["maxItems"], top["seeds"]["items"]["maximum"], top["study"]["maxLength"]) == (
        1000, 2**63 - 1, 100,
    )  # fmt: skip
    assert {name: said["default"] for name, said in world.items()} == {
        "sft_examples": 6000, "train": 9600, "evaluation": 1600, "calibration": 0, "every_prompt": False,
        "noise": "heteroscedastic", "labels": "probit", "flips": 0.0, "qualities": "shared", "own": False, "seed": 1,
    }  # fmt: skip
    rm, ppo, common, sft = (
        top["rm"], top["ppo"], top["common"], schema["$defs"]["Base"]["properties"]["sft"]
    )  # fmt: skip
    assert ppo["properties"]["num_eval_generations"]["default"] == 64
    assert "lam" in ppo["properties"] and "lam" in common["properties"] and "lam" not in rm["properties"]
    assert "head_pooling" in rm["properties"] and "head_pooling" not in ppo["properties"]
    assert "vocab_size" in sft["properties"] and "vocab_size" not in common["properties"]
    for held in (rm, ppo, common):
        assert not {"add_disco_head", "cutoff_len", "model_name_or_path", "seed", "reward_model"} & set(
            held["properties"]
        )
        assert held["additionalProperties"] is False


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_names_its_schema_and_keeps_to_it(path: Path):
    first = path.read_text().splitlines()[0]
    named = re.fullmatch(r"# yaml-language-server: \$schema=(.*)", first)
    assert named and (path.parent / named[1]).resolve() == STUDY_SCHEMA
    assert [error.message for error in validator(STUDY_SCHEMA).iter_errors(yaml.safe_load(path.read_text()))] == []


def test_the_schema_is_one_that_snakemake_takes(monkeypatch: pytest.MonkeyPatch):
    validate = pytest.importorskip("snakemake.utils").validate
    validate(dict(SMOKE), str(STUDY_SCHEMA), set_default=False)
    with pytest.raises(Exception, match="lam"):
        validate(SMOKE | {"rm": {"lam": 1}}, str(STUDY_SCHEMA), set_default=False)


BAD_STUDIES = {
    "a misspelt key": {"seedz": [1]},
    "a truth for a seed": {"seeds": [True]},
    "a text for a whole number": {"prove_steps": "2"},
    "a seed twice": {"seeds": [1, 1]},
    "no such arm": {"arms": ["disco"]},
    "no such stage": {"stages": ["rm", "sft"]},
    "a name with a path": {"study": "../s"},
    "a misspelt key of the world": {"data": {"world": {"trian": 5}}},
    "rows beside the world": {"data": {"world": {}, "dataset": "a"}},
    "no rows of the world": {"data": {"world": {"train": 0}}},
    "a key that rm does not read": {"rm": {"lam": 0.9}},
    "a key of the grid": {"common": {"disco_pref": True}},
    "a word for a number": {"dpo": {"pref_beta": "much"}},
    "a rank of nothing": {"common": {"lora_rank": 0}},
    "a key that the study sets": {"base": {"sft": {"model_type": "qwen3", "output_dir": "o"}}},
    "a list for a section": {"dpo": [1]},
    "a key of others that asks for nothing": {"common": {"packing": False}},
    "a control of the base": {"controls": {"x": {"stages": ["sft"], "replicate": 1}}},
    "a control that sets a flag": {"controls": {"x": {"stages": ["rm"], "settings": {"disco_pref": True}}}},
    "a control that is called like a point": {"controls": {"lora_rank=2": {"stages": ["rm"], "replicate": 1}}},
    "a value that is no list of them": {"sweep": {"dpo": {"pref_beta": 0.3}}},
    "a sweep of what rm does not read": {"sweep": {"rm": {"pref_beta": [0.3]}}},
}


@pytest.mark.parametrize("changes", BAD_STUDIES.values(), ids=BAD_STUDIES.keys())
def test_what_a_study_may_not_say_keeps_to_no_schema_either(changes: dict):
    assert list(validator(STUDY_SCHEMA).iter_errors(SMOKE | changes))
    with pytest.raises(UserError):
        Study(SMOKE | changes)


def test_the_schema_of_a_section_holds_what_a_study_takes_there():
    """Of every run key and section, asked of a study; values are the defaults."""
    schema = json.loads(STUDY_SCHEMA.read_text())
    for section in ("common", "rm", "dpo", "ppo"):
        held = schema["properties"][section]["properties"]
        for name, entry in FIELDS.items():
            value = entry.default if isinstance(entry.default, bool | int | float | str) else None
            try:
                study(**{section: {name: value}})
                refused = False
            except UserError as error:
                refused = f"x.yaml: {section}: {name} may not stand here: " in str(error)
            assert refused == (name not in held), (section, name)


LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
dataset: dpo_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/dpo
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: [wandb]
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_steps: 0.1
optim: adamw_torch_fused
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
packing: false
eval_strategy: no
"""


def test_a_yaml_of_llama_factory_keeps_to_the_schema_of_a_run():
    settings = yaml.safe_load(LLAMA_FACTORY)
    RunConfig.from_mapping(settings)
    assert list(validator(RUN_SCHEMA).iter_errors(settings)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"pref_btea": 1}, {"packing": True}, {"lora_rank": 0}, {"bf16": "yes"}, {"beta": 0.1}, {"stage": "dop"},
        {"seed": 1.5},
    ],
)  # fmt: skip
def test_what_a_run_may_not_say_keeps_to_no_schema_either(changes: dict):
    settings = yaml.safe_load(LLAMA_FACTORY) | changes
    assert list(validator(RUN_SCHEMA).iter_errors(settings))
    with pytest.raises(UserError):
        RunConfig.from_mapping(settings)


VALUES = [
    None, True, False, 0, 1, -1, 2, 3.0, 0.5, 1.5, 1e9, -0.1, "1", "1e-4", ".5", "2.0", "x", "no", "", "sigmoid",
    "world", ["a", "b"], [1], [], {}, {"a": 1}, ["wandb"],
]  # fmt: skip


def test_the_schema_takes_of_every_key_what_a_run_takes():
    """And no other value, but for numbers that stand there as texts, whose bounds it does not know."""
    schema, wrong = validator(RUN_SCHEMA), []
    for name in FIELDS:
        for value in VALUES:
            settings = {"stage": "dpo", "model_name_or_path": "m"} | {name: value}
            try:
                RunConfig.from_mapping(settings, "x")
                taken = True
            except UserError as error:
                taken = not re.match(f"x: {name}: .* should be ", str(error))
            allowed = not list(schema.iter_errors(settings))
            if taken != allowed and not (allowed and isinstance(value, str)):
                wrong.append((name, value, taken))
    assert not wrong


@pytest.mark.parametrize("of", ["", "run", "rm", "ppo", "study"])
def test_the_command_explains_keys(of: str, capsys: pytest.CaptureFixture):
    assert cli.main(["keys", *filter(None, [of])]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [re.split("  +", line)[0] for line in lines]
    assert ("lam" in names) == (of in ("", "run", "ppo"))
    assert ("data: world: noise" in names) == (of in ("", "study"))
    assert cli.main(["keys", *filter(None, [of]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == len(lines)
    assert all(key["meaning"] and key["type"] and "default" in key and "stages" in key for key in found)


def test_one_command_lists_every_key_of_runs_and_studies(capsys: pytest.CaptureFixture):
    """Those of a study counted from its models: sections, what stands in them, and the world's and the base's."""
    assert cli.main(["keys", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {key["name"] for key in found if key["stages"]} == set(FIELDS)
    of_study = {(key["group"], key["name"]) for key in found if not key["stages"]}
    parts = {
        "": study_file.StudyFile, "data": study_file.Data, "data: world": study_file.World, "base": study_file.Base,
        "prompts": study_file.Prompts, "controls: <name>": study_file.Control, "sweep": study_file.Sweep,
    }  # fmt: skip
    assert of_study == {(place, name) for place, model in parts.items() for name in model.model_fields}


def found(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert cli.main(["keys", *words]) == 0
    return capsys.readouterr().out


def test_one_key_is_found_by_its_name_its_meaning_or_its_name_elsewhere(capsys: pytest.CaptureFixture):
    first, *lines = found(capsys, "pref_beta").splitlines()
    assert first == "pref_beta (run): beta: weight of the prior against the feedback"
    said = {line[:13].strip(): line[13:].strip() for line in lines[: lines.index("")]}
    assert said["default"] == "0.1" and said["stages"] == "dpo ppo" and "kl_coef" in said["elsewhere"].split()
    assert said["in a study"] == "`dpo:`, `ppo:`, `common:`"
    assert found(capsys, "beta").startswith("beta (of another program): called pref_beta here\n\npref_beta (run): ")
    both = found(capsys, "max_length")
    assert "\ncutoff_len (run): " in both and "\nmax_new_tokens (run): " in both
    assert found(capsys, "KL", "steer").startswith("ppo_target (run): KL per sequence to steer the coefficient to\n")
    assert found(capsys, "data: world: noise").startswith("data: world: noise (study): of the labels")
    assert found(capsys, "template") == (
        "template (of another program): ignored: the tokenizer's own chat template is used, and without one the form "
        "'\\n\\nHuman: … \\n\\nAssistant:'\n"
    )
    assert found(capsys, "dpo_ftx") == (
        "dpo_ftx (of another program): not supported: an extra SFT loss would change what the study compares\n"
    )
    assert 'truncation_mode (of another program): not supported unless null or "keep_start": ' in found(
        capsys, "truncation_mode"
    )


def test_what_is_found_is_of_the_stage_that_was_asked_for(capsys: pytest.CaptureFixture):
    assert cli.main(["keys", "rm", "ppo_epochs"]) == 2
    assert capsys.readouterr().err == "discobeta: rm does not read ppo_epochs (ppo does)\n"
    assert cli.main(["keys", "rm", "frobnicate"]) == 2
    assert capsys.readouterr().err == (
        "discobeta: no key of rm has 'frobnicate' in its name or meaning; `discobeta keys` lists all, of runs and "
        "studies\n"
    )
    assert cli.main(["keys", "temprature"]) == 2
    assert "; did you mean 'temperature'?" in capsys.readouterr().err
    assert json.loads(found(capsys, "ppo", "cliprange", "--json"))[0]["in_study"] == ["ppo", "common"]


def test_the_command_needs_neither_torch_nor_pydantic():
    code = "import sys; from discobeta import cli; cli.main(['keys', 'rm'])\n"
    code += "assert not {'torch', 'pydantic'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_run_imports_the_models_of_a_study():
    """pydantic takes a tenth of a second, which a run would pay for nothing."""
    imports, seen = test_layout.imports(), set()
    waiting = [
        "run/train",
        "run/evaluate",
        "inputs/base",
        "inputs/reference",
        "inputs/answers",
        "data/tokens",
        "record",
    ]
    while waiting:
        seen.add(name := waiting.pop())
        waiting += imports[name] - seen
    assert "design/config" in seen and not {"design/study_file", "design/keys"} & seen
    sources = {name: (test_layout.PACKAGE / f"{name}.py").read_text() for name in imports}
    importers = [name for name, text in sources.items() if re.search("(import|from) pydantic", text)]
    assert set(importers) == {"design/study_file", "report/hypotheses"} and "report/hypotheses" not in seen


# --- a key that the stage does not read


@pytest.mark.parametrize(
    "settings, note",
    [
        ({"stage": "rm", "lam": 0.5}, "lam is unused: rm does not read it (ppo does)"),
        ({"stage": "dpo", "cliprange": 0.1}, "cliprange is unused: dpo does not read it (ppo does)"),
        ({"stage": "ppo", "head_pooling": "mean"}, "head_pooling is unused: ppo does not read it (rm and dpo do)"),
        ({"stage": "rm", "pref_beta": "0.7"}, "pref_beta is unused: rm does not read it (dpo and ppo do)"),
        ({"stage": "dpo", "reward_model": "r"}, "reward_model is unused: dpo does not read it (ppo does)"),
        (
            {"stage": "ppo", "disco_learning_rate": 0.1},
            "disco_learning_rate is unused: ppo does not read it (rm and dpo do)",
        ),
        (
            {"stage": "sft", "finetuning_type": "full", "lora_rank": 4},
            "lora_rank is unused: sft does not read it (rm, dpo and ppo do)",
        ),
    ],
)  # fmt: skip
def test_a_key_that_the_stage_does_not_read_is_named_once_and_kept_at_its_default(settings: dict, note: str):
    name = note.split()[0]
    config, notes = run(**settings)
    assert notes == [note]
    plain, _ = run(**{key: value for key, value in settings.items() if key != name})
    assert config == plain
    assert run(**config.resolved()) == (config, [])  # a resolved config says nothing again


def test_a_default_that_is_written_out_is_no_news():
    written = {"lam": 0.95, "cliprange": "0.2", "num_eval_generations": 0, "max_new_tokens": 64, "beta_head": None}
    assert run(**written) == run()
    for stage in ("rm", "dpo", "ppo"):
        config, _ = run(stage=stage)
        assert run(**config.resolved()) == (config, [])


def test_a_wrong_value_is_one_also_where_nobody_reads_it():
    with pytest.raises(UserError, match="^x.yaml: lam: 2.0 should be between 0 and 1$"):
        run(lam=2)


def test_what_is_not_read_is_in_no_identity():
    facts = {"data": "d", "base": "b"}
    for stage, differ in (("rm", False), ("dpo", False), ("ppo", True)):
        one = run(stage=stage)[0]
        for other in (run(stage=stage, lam=0.5)[0], one.replace(lam=0.5)):
            assert (record.identity_of(one, facts) != record.identity_of(other, facts)) == differ
            assert (record.settings_hash(one) != record.settings_hash(other)) == differ


def test_the_command_says_which_key_is_unused(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "run.yaml"
    path.write_text("stage: rm\nmodel_name_or_path: ./nowhere\noutput_dir: run\ndataset: d\nlam: 0.5\ngamma: 1.0\n")
    assert cli.main(["train", str(path)]) == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "discobeta: lam is unused: rm does not read it (ppo does)"
    assert not any("gamma" in line for line in rest)


# --- in a study


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rm": {"lam": 0.5}}, "x.yaml: rm: lam may not stand here: rm does not read it (ppo does)"),
        ({"rm": {"lam": 0.95}}, "x.yaml: rm: lam may not stand here: rm does not read it (ppo does)"),
        (
            {"ppo": {"head_pooling": "mean"}},
            "x.yaml: ppo: head_pooling may not stand here: ppo does not read it (rm and dpo do)",
        ),
        (
            {"common": {"vocab_size": 999}},
            "x.yaml: common: vocab_size may not stand here: no stage of this study reads it (sft does)",
        ),
        (
            {"common": {"lam": 0.5}, "stages": ["rm", "dpo"]},
            "x.yaml: common: lam may not stand here: no stage of this study reads it (ppo does)",
        ),
        (
            {"base": {"sft": {"model_type": "qwen3", "lora_rank": 4}}},
            "x.yaml: base: sft: lora_rank may not stand here: sft does not read it (rm, dpo and ppo do)",
        ),
        (
            {"stages": ["rm"], "ppo": {"ppo_epoch": 4}},
            "x.yaml: ppo: unknown key 'ppo_epoch'; did you mean 'ppo_epochs'?",
        ),
        ({"stages": ["rm"], "dpo": {"pref_beta": "much"}}, "x.yaml: dpo: pref_beta: 'much' should be a number"),
        ({"data": {"world": {}, "split": "a"}}, "x.yaml: data: world makes its own rows: leave split out"),
        (
            {"data": {"world": {"noise": "loud"}}},
            "x.yaml: data: world: noise: 'loud' should be heteroscedastic or homoscedastic or topic or response",
        ),
        (
            {"data": {"world": {"flips": 0.5}}},
            "x.yaml: data: world: flips: 0.5 should be a number between 0 and 0.49",
        ),
        (
            {"data": {"world": {"own": True}}},
            "x.yaml: data: world: own: true needs base: sft (every world trains a base of its own)",
        ),
        (
            {"data": {"dataset": "a", "val_size": 9, "cutoff_len": "long"}},
            "x.yaml: data: cutoff_len: 'long' should be a whole number",
        ),
        (
            {"base": {"model_name_or_path": "m", "trust_remote_code": "yes"}},
            "x.yaml: base: trust_remote_code: 'yes' should be true or false",
        ),
        ({"common": {"packing": False}}, "x.yaml: common: packing may not stand here: pairs are not packed"),
        ({"base": {"model_nam": "m"}}, "x.yaml: base: unknown key 'model_nam'; the keys are model_name_or_path, "),
        ({"prove_steps": math.nan}, "x.yaml: prove_steps: nan should be a whole number, at least 1"),
        ({"seeds": []}, "x.yaml: seeds: [] should be a list of different whole numbers"),
        ({"seeds": None}, "x.yaml: seeds: None should be a list of different whole numbers"),
        ({"stages": ["rm", "rm"]}, "x.yaml: stages: ['rm', 'rm'] should be a list of different names: rm, dpo, ppo"),
        ({"arms": "baseline"}, "x.yaml: arms: 'baseline' should be a list of different names: baseline, "),
    ],
)  # fmt: skip
def test_a_study_is_told_what_is_wrong_and_where(changes: dict, message: str):
    said = refusal(**changes)
    assert said.startswith(message)
    assert "\n" not in said and "pydantic" not in said and len(said) < 500


def test_what_is_common_is_given_to_the_stages_that_read_it():
    made = study(common={"lam": 0.5, "head_pooling": "mean", "pref_beta": 0.7, "lora_rank": 4})
    given = {stage: made.run_settings(made.run(stage, "baseline", 1)) for stage in ("rm", "dpo", "ppo")}
    names = {"lam", "head_pooling", "pref_beta", "lora_rank"}
    assert {stage: names & settings.keys() for stage, settings in given.items()} == {
        "rm": {"head_pooling", "lora_rank"},
        "dpo": {"head_pooling", "pref_beta", "lora_rank"},
        "ppo": {"lam", "pref_beta", "lora_rank"},
    }
    assert made.config(made.run("ppo", "baseline", 1)).head_pooling == "last"  # as if nobody had said it


def test_the_keys_of_data_are_the_run_keys_that_say_which_rows():
    assert study_sections.DATA_KEYS == (
        "dataset", "eval_dataset", "calibration_dataset", "dataset_dir", "split", "eval_split", "cutoff_len",
        "max_samples", "val_size", "max_unusable_rows",
    )  # fmt: skip


def test_a_world_has_its_defaults_and_what_is_said_of_it():
    made = study(data={"world": {"train": 64}}, base={"sft": {"model_type": "qwen3"}})
    assert made.world == {
        "sft_examples": 6000, "train": 64, "evaluation": 1600, "calibration": 0, "every_prompt": False,
        "noise": "heteroscedastic", "labels": "probit", "flips": 0.0, "qualities": "shared", "own": False, "seed": 1,
    }  # fmt: skip
    assert study(data={"world": {}}, base={"sft": {"model_type": "qwen3"}}).world["train"] == 9600


ROWS = {"dataset": "a", "eval_dataset": "b"}


@pytest.mark.parametrize(
    "data, has_world",
    [
        ({"world": None} | ROWS, False),
        ({"world": {}} | dict.fromkeys(ROWS), True),
        ({"world": {"seed": 2}} | dict.fromkeys(study_sections.DATA_KEYS), True),
    ],
)
def test_a_null_takes_away_what_a_layer_below_says(data: dict, has_world: bool):
    made = study(data=data, base={"sft": {"model_type": "qwen3"}})
    assert bool(made.world) == has_world
    given = made.data("all").get("dataset")
    assert given == ("results/s/shared/data/all/pairs/train.jsonl" if has_world else "a")
    assert list(validator(STUDY_SCHEMA).iter_errors({"data": data})) == []


def test_a_world_that_is_null_is_none():
    assert refusal(data={"world": None}) == "x.yaml: data: give dataset (a file, a hub id or a name) or world"


def test_the_world_of_the_command_line_is_that_of_a_study(monkeypatch: pytest.MonkeyPatch):
    from discobeta.inputs import world

    made = []
    monkeypatch.setattr(world, "write_corpus", lambda output, **settings: made.append(settings))
    monkeypatch.setattr(world, "write_pairs", lambda folder, base, output, **settings: made.append(settings))
    assert cli.main(["world", "corpus", "--output", "w", "--sft-examples", "9"]) == 0
    assert cli.main(["world", "pairs", "--world", "w", "--base", "b", "--output", "p", "--eval", "8"]) == 0
    labels = {"noise": "heteroscedastic", "labels": "probit", "flips": 0.0}
    assert made == [
        {"seed": 1, "sft_examples": 9, **labels, "qualities": "shared", "own": False},
        {"seed": 1, "train": 9600, "evaluation": 8, "calibration": 0, "every_prompt": False},
    ]
    words = "--noise topic --labels logistic --flips 0.2 --qualities topic --own"
    assert cli.main(["world", "corpus", "--output", "w", *words.split()]) == 0
    more = ["--calibration", "7", "--every-prompt"]
    assert cli.main(["world", "pairs", "--world", "w", "--base", "b", "--output", "p", *more]) == 0
    labels = {"noise": "topic", "labels": "logistic", "flips": 0.2}
    assert made[2:] == [
        {"seed": 1, "sft_examples": 6000, **labels, "qualities": "topic", "own": True},
        {"seed": 1, "train": 9600, "evaluation": 1600, "calibration": 7, "every_prompt": True},
    ]


def test_a_study_and_the_world_know_the_same_words():
    from discobeta.inputs import world

    said = study_file.World.model_fields
    for name, words in (("noise", world.Noise), ("labels", world.Labels), ("qualities", world.Qualities)):
        assert get_args(said[name].annotation) == get_args(words)
