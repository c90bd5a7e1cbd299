"""Whatever stands in a config, a data file or a model: status 0 or 2, a few lines, nothing of anybody's changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import COMMON, RUNS, STUDY
from harness import run, snapshot
from hostile import (
    ODD_JSON,
    ROWS,
    TENSORS,
    bytes_of,
    damage_json,
    damage_tensors,
    damages,
    judge,
    places,
    rows_of,
    values,
    write_parquet,
    write_rows,
    yaml_with,
)  # fmt: skip
from hypothesis import strategies as st

from discobeta.design.config import RunConfig
from discobeta.design.config_names import IGNORED, REFUSED
from discobeta.design.study_file import StudyFile

RUN_KEYS = [
    *(entry.name for entry in dataclasses.fields(RunConfig)),
    *sorted(IGNORED)[:5],
    *REFUSED,
    "",
    "x" * 300,
    "learning",
]
LONG = {
    "max_steps",
    "num_train_epochs",
    "gradient_accumulation_steps",
    "ppo_buffer_size",
    "ppo_epochs",
    "max_new_tokens",
}
"""Keys with which a run of a year can be asked for, which is no fault."""
FOLDERS = {"output_dir", "tokenized_path", "reference_path", "reference_answers_path"}
"""Tried in test_damage.py."""
LIMIT = 60.0


class Place:
    """A folder with a base, data and configs of its own, the same before every command."""

    def __init__(self, template: Path, folder: Path):
        self.template, self.folder = template, folder
        shutil.copytree(template, folder)
        self.clean = snapshot(folder, times=True)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def judged(self, *words: str, writes: tuple[str, ...] = ()) -> tuple[int, list[tuple[str, str]]]:
        """Exit status of the command, and what is wrong."""
        before = snapshot(self.folder, times=True)
        outcome = run(list(words), self.folder, limit=LIMIT)
        found = judge(outcome, self.folder, before, writes)
        if snapshot(self.folder, times=True) != self.clean:
            shutil.rmtree(self.folder)
            shutil.copytree(self.template, self.folder)
        return outcome.status, found


@pytest.fixture
def place(inputs, tmp_path) -> Place:
    return Place(inputs, tmp_path / "place")


def lines_of(settings: dict) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in settings.items()}


def text_of(lines: dict[str, str]) -> str:
    return "".join(f"{name}: {value}\n" for name, value in lines.items())


@pytest.mark.parametrize("part", range(4))
def test_run_configs(place, fuzz, part):
    """Three hostile settings at once, in a file that may be damaged too."""
    settings = lines_of(COMMON | {"stage": "dpo", "output_dir": "runs/new", "max_steps": 1})

    def attempt(content: bytes):
        (place / "hostile.yaml").write_bytes(content)
        return place.judged("prepare", "hostile.yaml")[1]

    fuzz(200, yaml_with(settings, [key for key in RUN_KEYS if key not in LONG]), attempt)


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_one_hostile_setting_of_a_run_that_is_trained(place, fuzz, stage):
    keys = [entry.name for entry in dataclasses.fields(RunConfig) if entry.name not in LONG | FOLDERS]
    settings = {**RUNS[stage], "max_steps": 1, "num_eval_generations": 0, "output_dir": "runs/new"}

    def attempt(case: tuple[str, str]):
        text = text_of(lines_of(settings) | {case[0]: case[1]})
        (place / "hostile.yaml").write_text(text, errors="replace")
        return place.judged("train", "hostile.yaml")[1]

    fuzz(120, st.tuples(st.sampled_from(keys), values), attempt)


def test_words_of_set(place, fuzz):
    words = st.builds(
        lambda key, sign, value: f"{key}{sign}{value}".replace("\0", "")[:10_000],
        st.sampled_from([key for key in RUN_KEYS if key not in LONG]) | st.text(max_size=5),
        st.sampled_from(["=", "=", "=", "", "==", ": "]),
        values,
    )

    def attempt(case: list[str]):
        case = [word for word in case if word and not word.startswith("-")]
        return place.judged("prepare", "dpo.yaml", "--set", "output_dir=runs/new", *case)[1]

    fuzz(150, st.lists(words, min_size=1, max_size=3), attempt)


@pytest.mark.parametrize("command", ["plan", "cost", "tables"])
def test_studies(place, fuzz, command):
    lines, keys = lines_of(STUDY), sorted({*StudyFile.model_fields, *RUN_KEYS[:5], "", "studies"})
    inner = [*STUDY["data"], *STUDY["common"], "world", "seed", "prompts", "sft", "rm"]
    nested = st.tuples(st.sampled_from(keys), st.sampled_from(inner), values).flatmap(
        lambda case: bytes_of(text_of(lines | {case[0]: f"{{{case[1]}: {case[2]}}}"}))
    )

    def attempt(content: bytes):
        (place / "hostile.yaml").write_bytes(content)
        return place.judged(command, "--configfile", "hostile.yaml", writes=("results/tiny/tables",))[1]

    fuzz(150, yaml_with(lines, keys) | nested, attempt)


# --- data


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".parquet"])
def test_rows(place, fuzz, form, suffix):
    """Half of the files are damaged as bytes, too; some runs are trained and measured on what is left."""
    name = f"hostile{suffix}"
    described = form in ("alpaca", "sharegpt")
    info = {"hostile": {"file_name": name, "ranking": True, "formatting": form if described else "alpaca"}}
    settings = COMMON | {"max_steps": 1, "output_dir": "runs/new", "dataset_dir": "data", "tokenized_path": "tokens"}
    settings |= {"dataset": "hostile" if described else f"data/{name}", "eval_dataset": None}
    stages = st.sampled_from(["dpo", "dpo", "ppo", "sft", "rm"])

    def attempt(case):
        rows, damage, stage, strict = case
        (write_parquet if suffix == ".parquet" else write_rows)(place / "data" / name, rows)
        if damage and damage.kind not in ("delete", "directory", "dangling"):
            damage.do(place / "data" / name)
        (place / "data" / "dataset_info.json").write_text(json.dumps(info))
        more = {"stage": stage, "max_unusable_rows": 0.05 if strict else 1.0}
        more |= {"eval_dataset": settings["dataset"]} if stage == "rm" else {}
        (place / "hostile.yaml").write_text(yaml.safe_dump(settings | more))
        return place.judged("train" if stage == "rm" else "prepare", "hostile.yaml")[1]

    fuzz(40, st.tuples(rows_of(form), st.none() | damages, stages, st.booleans()), attempt)


INFO = {
    "file_name": "train.jsonl", "ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen"},
    "formatting": "alpaca",
    "tags": None, "hf_hub_url": None, "subset": None, "split": None, "folder": None, "num_samples": None, "x": None,
}  # fmt: skip
ODD_INFO = [None, 5, [], {}, "x", "../..", "/", {"prompt": 5}, {"prompt": "nope"}, True, "sharegpt", "a" * 300, "\0"]


def test_dataset_info(place, fuzz):
    settings = COMMON | {"stage": "dpo", "dataset": "hostile", "dataset_dir": "data", "output_dir": "runs/new"}
    changes = st.dictionaries(st.sampled_from(list(INFO)), st.sampled_from(ODD_INFO), min_size=1, max_size=3)

    def attempt(case):
        whole = {"file_name": "train.jsonl", "ranking": True}
        described = case if isinstance(case, bytes) else json.dumps({"hostile": whole | case}).encode()
        (place / "data" / "dataset_info.json").write_bytes(described)
        (place / "hostile.yaml").write_text(yaml.safe_dump(settings))
        return place.judged("prepare", "hostile.yaml", "--set", "tokenized_path=tokens")[1]

    fuzz(100, changes | st.sampled_from(ODD_JSON), attempt)


# --- models

TEMPLATES = [
    "{{ raise_exception('no') }}", "", "{{ 1/0 }}", "{{ 'a' * 10**9 }}", "{{ messages[9].content }}", "{% if %}",
    "{{ 5 }}",
    "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}", "{{ messages | length }}",
    "{{ ''.__class__ }}", "{{ messages | tojson }}", "{% include 'x' %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ loop }}{% endfor %}",
]  # fmt: skip
BASE_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
CONFIG = {
    "hidden_size": [33, 0, -1, 10**9, "x", None], "num_hidden_layers": [3, 1, 0, 10**9, 2.5], "dtype": ["float16",
    "x", 5],
    "vocab_size": [18, 0, 10**9, None], "model_type": ["bert", "qwen2", "", None, 5], "rope_parameters": [None, {},
    5],
    "architectures": [["BertModel"], [], None, "x"], "tie_word_embeddings": [False, None], "layer_types": [["x"], []],
    "auto_map": [{"AutoModelForCausalLM": "x.Y"}, 5], "head_dim": [7, 0], "num_key_value_heads": [3, 0],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {}],
    "max_position_embeddings": [1, 0],
    "eos_token_id": [None, 99, "x", [2, 3]],
}  # fmt: skip
model_damage = st.one_of(
    st.tuples(st.just("bytes"), st.sampled_from(BASE_FILES), damages),
    st.tuples(st.just("tensors"), st.sampled_from(TENSORS), places),
    st.tuples(st.just("template"), st.just(""), st.sampled_from(TEMPLATES)),
    st.sampled_from([(key, value) for key, odd in CONFIG.items() for value in odd]).map(lambda pair: ("config", *pair)),
    st.tuples(st.just("config"), st.sampled_from(list(CONFIG)), st.sampled_from([None, 5, [], {}, "x", 10**30, -1])),
)


def hurt_model(base: Path, case: tuple) -> bool:
    """Whether it changed anything."""
    kind, name, how = case
    if kind == "bytes":
        return (base / name).is_file() and how.do(base / name)
    if kind == "tensors":
        damage_tensors(base / "model.safetensors", name, how)
    elif kind == "template":
        (base / "chat_template.jinja").write_text(how)
    else:
        damage_json(base / "config.json", lambda content: content.update({name: how}))
    return True


CHAT = [
    {name: [{"role": "user", "content": "red"}, {"role": "assistant", "content": text}] for name, text in pair.items()}
    for pair in [{"chosen": "one .", "rejected": "two ?"}] * 8
]


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_bases(place, fuzz, stage, part):
    settings = COMMON | {"stage": stage, "max_steps": 1, "output_dir": "runs/new"}
    settings |= {"finetuning_type": "full"} if stage == "sft" else {}

    def attempt(case):
        if not hurt_model(place / "base", case):
            return []
        write_rows(place / "data" / "chat.jsonl", CHAT)
        more = {"dataset": "data/chat.jsonl", "eval_dataset": None} if case[0] == "template" else {}
        (place / "hostile.yaml").write_text(yaml.safe_dump(settings | more))
        status, found = place.judged("train", "hostile.yaml")
        if status == 0 and case[0] == "tensors" and case[1] not in ("extra", "doubles"):
            found.append(("silently wrong", f"trained on a base with a tensor {case[1]}"))
        return found

    fuzz(70, model_damage, attempt)
