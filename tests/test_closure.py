"""Which files a step is made of, against what an edit of each must rerun; and which settings a step reads."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from discobeta import closure
from discobeta.design import config
from discobeta.design.config import RunConfig
from discobeta.report import outputs

PREFERENCES = ("rm", "dpo", "ppo")
TRAINING = {f"train {stage}" for stage in PREFERENCES}
EVALUATION = {f"evaluate {stage}" for stage in PREFERENCES}
SHARED = {"sft", "prepare", "reference", "world_pairs", "answers"}
STEPS = [("train", stage) for stage in PREFERENCES] + [("evaluate", stage) for stage in PREFERENCES]
STEPS += [(step, None) for step in closure.ENTRIES if step not in ("train", "evaluate")]
MAKERS = {"tables": outputs.TABLES, "figures": outputs.FIGURES}

MADE_OF = {
    "losses": TRAINING | EVALUATION,
    "method/signals": TRAINING | EVALUATION,
    "method/heads": TRAINING | EVALUATION,
    "run/loop": TRAINING,
    "run/train": TRAINING,
    "design/schedule": TRAINING | EVALUATION,  # of the stage, which says how it goes through its rows
    "method/stage": TRAINING | EVALUATION,
    "inputs/base": {"sft"},
    "method/rm": {"train rm", "evaluate rm", "train ppo", "evaluate ppo"},
    "method/dpo": {"train dpo", "evaluate dpo"},
    "method/ppo": {"train ppo", "evaluate ppo"},
    "inputs/reference": {"reference", "answers", "train dpo"} | EVALUATION,
    "inputs/answers": {"answers"} | EVALUATION,
    **dict.fromkeys(["method/reward", "method/translation"], {"train ppo", "evaluate ppo"}),
    "method/judges": {f"{step} {stage}" for step in ("train", "evaluate") for stage in ("rm", "ppo")},
    "model/generation": {"world_pairs", "answers", "train ppo"} | EVALUATION,
    "model/pretrained": SHARED | TRAINING | EVALUATION,
    **dict.fromkeys(["model/forward", "model/adapters"], SHARED - {"prepare"} | TRAINING | EVALUATION),
    **dict.fromkeys(["data/tokens", "data/encode", "data/templates", "data/rows"], SHARED | TRAINING | EVALUATION),
    **dict.fromkeys(  # is the data still what it was?
        [f"data/{name}" for name in ("examples", "formats", "layouts", "row_report", "local_files", "sources")],
        SHARED | TRAINING | EVALUATION | {"tables", "figures", "page"},
    ),
    "inputs/world": {"world_corpus", "world_pairs"} | EVALUATION,
    **dict.fromkeys(["run/evaluate", "run/responses", "run/truth"], EVALUATION),
    "metrics": EVALUATION | {"figures"},
    # by tables and figures the page is made anew too, whose rule reads what their rules have made
    **dict.fromkeys([f"report/{name}" for name in ("tables", "cells", "costs")], {"tables"}),
    **dict.fromkeys(["report/neutrality", "report/compare"], {"tables", "page"}),
    **dict.fromkeys([f"report/{name}" for name in ("curves", "forest", "head_figures", "reward_kl")], {"figures"}),
    **dict.fromkeys(["report/figures", "report/style", "report/marks"], {"figures", "page"}),
    **dict.fromkeys(["report/page", "report/answer", "report/html"], {"page"}),
    **dict.fromkeys(["report/results", "report/collect", "report/effects"], {"tables", "figures", "page"}),
    "record": {"tables", "figures", "page"},
    "design/study": {"tables", "figures", "page"},
    **dict.fromkeys(
        [
            "cli/__init__",
            "cli/lookup",
            "cli/words",
            "data/counts",
            "design/config_names",
            "report/show",
            "run/flops",
            "cli/results",
            "cli/run",
            "cli/study",
            "closure",
            "design/config",
            "design/cost",
            "design/keys",
            "design/study_file",
            "design/study_sections",
            "design/values",
            "design/yaml_text",
            "errors",
            "inputs/fetch",
            "inputs/ready",
            "files",
            "folders",
            "launch",
            "lock",
            "devices",
            "processes",
            "progress",
            "report/states",
            "report/status",
            "report/retrained",
            "report/side_by_side",
            "report/studies",
            "report/outputs",  # what it names is given to the rules
        ],
        set(),
    ),
}
"""Module -> every step whose outcome may be another one when it is edited."""


@pytest.mark.parametrize("module, expected", MADE_OF.items(), ids=MADE_OF.keys())
def test_an_edited_module_changes_the_steps_that_are_made_of_it(module: str, expected: set[str]):
    assert (closure.ROOT / f"{module}.py").is_file()
    makers = {step: tuple(row.maker for row in rows) for step, rows in MAKERS.items()}
    found = {
        " ".join(filter(None, (step, stage)))
        for step, stage in STEPS
        if module in closure.files_of(step, stage, makers.get(step, ()))
    }
    assert found == expected


def test_a_step_is_known_by_what_is_in_its_files(tmp_path, monkeypatch):
    """An import within a function counts, one for a type checker does not, and bookkeeping is not followed."""
    texts = {
        "run/train": "from discobeta import lock\nfrom discobeta.method.stage import stage_class\n",
        "lock": "import discobeta.hidden\n",
        "hidden": "",
        "typed": "",
        "inner": "",
        "method/stage": "",
        "method/rm": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from discobeta import typed\nelse:\n    import discobeta.inner\n"
        "def f():\n    try:\n        pass\n    except ValueError:\n        from discobeta.deep.er import thing\n",
        "method/dpo": "",
        "deep/__init__": "",
        "deep/er": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(closure, "ROOT", tmp_path)
    closure.imports_of.cache_clear()
    try:
        before = closure.files_of("train", "rm")
        assert list(before) == ["deep/er", "inner", "method/rm", "method/stage", "run/train"]
        (tmp_path / "deep" / "er.py").write_text("x = 1\n")
        (tmp_path / "lock.py").write_text("x = 1\n")
        after = closure.files_of("train", "rm")
        assert {name for name in before if before[name] != after[name]} == {"deep/er"}
    finally:
        closure.imports_of.cache_clear()


def test_of_a_function_only_what_it_reaches_counts(tmp_path, monkeypatch):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "world.py").write_text(
        "from discobeta.top import used\nfrom discobeta.other import unused\n"
        "def write_corpus():\n    helper()\n"
        "def helper():\n    from discobeta import lazy\n    used()\n"
        "def write_pairs():\n    from discobeta import late\n    unused()\n"
    )
    for name in ("top", "other", "lazy", "late"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.setattr(closure, "ROOT", tmp_path)
    closure.imports_of.cache_clear()
    try:
        assert set(closure.files_of("world_corpus")) == {"inputs/world", "top", "lazy"}
        assert set(closure.files_of("world_pairs")) == {"inputs/world", "other", "late"}
    finally:
        closure.imports_of.cache_clear()


COMMANDS = {
    "run.prepare": "prepare", "run.reference": "reference", "run.answers": "answers", "run._train": "train sft",
    "run._measure": "evaluate", "study.tables": "tables", "study.figures": "figures", "study._results": "tables",
    "world.corpus": "world_corpus", "world.pairs": "world_pairs",
}  # fmt: skip
"""Function of the command line -> the step or steps that it does."""


@pytest.mark.parametrize("function, step", COMMANDS.items(), ids=COMMANDS.keys())
def test_a_step_begins_where_its_command_does(function: str, step: str):
    module, _, name = function.partition(".")
    tree = ast.parse((closure.ROOT / "cli" / f"{module}.py").read_text())
    (part,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    begins = {module for node in ast.walk(part) for _, module in closure.bound_by(node)}
    files = {name for one in step.split() for name in closure.files_of(one)}
    assert begins and begins - closure.BOOKKEEPING.keys() <= files


def test_bookkeeping_is_there_and_says_why():
    for name, why in closure.BOOKKEEPING.items():
        assert (closure.ROOT / f"{name}.py").is_file() and why


def test_the_closure_needs_no_torch():
    code = "import sys; from discobeta import closure; closure.code('evaluate', 'ppo'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --- which settings a step reads


@pytest.fixture
def reads(monkeypatch) -> dict[tuple[str, str], set[str]]:
    """(stage, key) -> the functions that read it of a RunConfig from now on, apart from those of bookkeeping."""
    names = {entry.name for entry in dataclasses.fields(RunConfig)}
    found = defaultdict(set)
    not_read = {dataclasses.__file__, *(str(closure.ROOT / f"{name}.py") for name in closure.BOOKKEEPING)}

    def get(self, name):
        if name in names:
            frame = sys._getframe(1)
            while frame.f_code.co_name.startswith("<"):  # a comprehension
                frame = frame.f_back
            if frame.f_code.co_filename not in not_read:
                found[object.__getattribute__(self, "stage"), name].add(
                    f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
                )
        return object.__getattribute__(self, name)

    monkeypatch.setattr(RunConfig, "__getattribute__", get, raising=False)
    return found


HARMLESS = {
    # to refuse at once what could not be measured afterwards
    "num_eval_generations": {"preflight.check_answers"},
    "max_new_tokens": {"preflight.check_answers"},
    # of rm: in what passes the held-out loss of the log is computed
    "per_device_eval_batch_size": {"loop.held_out_means"},
    # of sft, whose config has none of them: it names the arm in its record
    **dict.fromkeys(["add_disco_head", "disco_pref", "add_beta_head", "use_dynamic_beta"], {"arms.of"}),
}
HEADS = dict.fromkeys(["add_disco_head", "disco_pref", "add_beta_head", "use_dynamic_beta"], True)


def test_no_step_reads_a_key_that_is_not_said_to_be_its_own(run, reads, tmp_path):
    """Else a changed value of it would leave what is stale. Found by watching tiny runs with all heads."""
    from discobeta.run.evaluate import evaluate

    foreign = []

    def check(step: str, stage: str) -> None:
        for (of, name), readers in reads.items():  # ppo reads the config of its reward model too
            if not any(name in config.keys_of(part, of) for part in ("training", step, "bookkeeping")):
                foreign.extend((step, of, name, reader) for reader in readers - HARMLESS.get(name, set()))
        assert {(stage, name) for name in ("seed", "model_name_or_path", "cutoff_len")} <= reads.keys()
        reads.clear()

    changes = {"eval_strategy": "steps", "gradient_accumulation_steps": 2, "num_eval_generations": 4, "best_of": 3}
    scratch = {"model_type": "qwen3", "config_overrides": "hidden_size=32,num_hidden_layers=1", "vocab_size": 300}
    run("sft", name="base", **scratch, model_name_or_path=None, finetuning_type="full", eval_strategy="steps")
    check("log", "sft")
    for stage in ("rm", "dpo"):
        run(stage, name=stage, **changes, **HEADS, max_new_tokens=4)
        check("log", stage)
        evaluate(tmp_path / stage)
        check("evaluation", stage)
    found = {"reward_model": str(tmp_path / "rm"), "beta_head": str(tmp_path / "dpo")}
    changes = {"num_eval_generations": 4, "max_new_tokens": 4, "max_steps": 2, "ppo_score_norm": True}
    run("ppo", name="ppo", **HEADS, **found, **changes)
    check("log", "ppo")
    evaluate(tmp_path / "ppo")
    check("evaluation", "ppo")
    assert not foreign, "\n".join(map(str, foreign))


def test_a_step_with_the_reference_reads_no_key_that_a_study_does_not_tell_it(settings, reads, tmp_path):
    """Else it would compute with the key's default, whatever the study says."""
    from discobeta.data.tokens import load_or_tokenise
    from discobeta.design import study
    from discobeta.inputs import answers, reference
    from discobeta.model.pretrained import load_tokenizer

    sampling = {"num_eval_generations": 4, "max_new_tokens": 4, "reference_answers_path": str(tmp_path / "answers")}
    several = {"best_of": 3, "generations_per_prompt": 2}
    paths = {"reference_path": str(tmp_path / "reference")}
    config, _ = RunConfig.from_mapping(settings("dpo", **paths, **sampling, **several))
    tokenizer = load_tokenizer(config)
    data, told = load_or_tokenise(config, tokenizer), {"reference_path", "reference_answers_path"}
    reads.clear()
    reference.load_or_compute(config, data.parts())
    found = {name for _, name in reads}
    assert {"tokens_per_pass", "share_prompt"} <= found <= told | {*study.TOKENS_DEPEND_ON, *study.REFERENCE_KEYS}
    reads.clear()
    answers.sample_folder(config, data, tokenizer)
    found = {name for _, name in reads}
    assert {"temperature", "best_of", "tokens_per_pass"} <= found
    assert found <= told | {"seed", *study.TOKENS_DEPEND_ON, *study.answers_keys(config)}


def test_every_key_belongs_to_a_step():
    for entry in dataclasses.fields(RunConfig):
        if entry.name != "stage":
            assert entry.metadata["of"] in ("data", "model", "training", "evaluation", "log", "bookkeeping"), entry.name
            assert set(entry.metadata["stages"]) | set(entry.metadata["trains"]) <= {"sft", *PREFERENCES}
    assert "lam" not in config.keys_of("training", "rm") and "lam" in config.keys_of("training", "ppo")
    assert json.dumps(RunConfig.from_mapping({"stage": "rm", "model_name_or_path": "m"})[0].settings_of("training"))
