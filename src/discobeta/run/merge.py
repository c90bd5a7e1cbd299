"""A run as a plain model: W + s B A in the place of W, read by transformers alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from discobeta import files, folders, identity, record
from discobeta.design.config import RunConfig
from discobeta.design.described import arm_in_words
from discobeta.design.stages import STAGES
from discobeta.errors import UserError, say, telling
from discobeta.files import read_mapping, read_sealed, replacing, sha256, write_sealed
from discobeta.run import card
from discobeta.run import load as runs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MADE_BY = "discobeta merge"
RECORD = "merge.json"
"""Of which run it is, and the sha256 of every file."""
DTYPES = ("float32", "bfloat16", "float16")
HEADS = ("heads.safetensors", "heads.json")


def merge(
    directory: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
) -> bool:
    """Write the model of the run in `directory` as a plain one into the folder `output`, whole or not at all.

    A policy becomes a causal language model, a reward model a sequence classifier with one label, whose logit is r or
    mu; heads lie beside it as the run has them. Tokenizer and generation config are the base's. The sum W + s B A is
    made in float32 and rounded once, to `dtype`: by default that of the base's files. Returns False where `output`
    holds that very model already. Raises UserError for a folder that holds anything else, which is left as it is.
    """
    directory, output = Path(directory), Path(output)
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    reader = {"base": base, "trust_remote_code": trust_remote_code, "cache_dir": cache_dir}
    run = runs.read_run(directory, *STAGES, **reader)
    dtype = dtype or dtype_of_base(run.config)
    made_from = {"run": sha256(directory / "provenance.json"), "dtype": dtype}
    files.sweep(output)
    if _holds(output, made_from):
        return False
    _check_free(output, made_from)
    model, tokenizer = plain_model(run, getattr(torch, dtype))
    with replacing(output, lambda: _check_free(output, made_from)) as temporary:
        temporary.mkdir()
        with telling(f"cannot save the merged model of {directory}"):
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        if read_mapping(directory / "heads.json"):
            for name in HEADS:
                (temporary / name).write_bytes((directory / name).read_bytes())
        (temporary / folders.CARD).write_text(_card(directory, dtype), encoding="utf-8")
        written = {
            path.relative_to(temporary).as_posix(): sha256(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        write_sealed(temporary / RECORD, {"made_from": made_from, "files": written})
        folders.write_mark(temporary, MADE_BY, os.listdir(temporary))
    return True


def plain_model(run: record.Record, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """The run's model without PEFT and in `dtype`, and the tokenizer."""
    from discobeta.model.pretrained import load_tokenizer

    # W as it was in training, and PEFT's own layers, which know how to merge
    config = run.config.replace(fused_lora=False, flash_attn="auto")
    model = runs.load_stage(replace(run, config=config)).model.float()
    if config.finetuning_type == "lora":
        with telling(f"cannot merge the adapter of {run.directory}"):
            model = model.merge_and_unload(safe_merge=True)
    model = model.to(dtype)
    own = read_mapping(_base_folder(config) / "config.json")
    for name in ("output_hidden_states", "output_attentions"):  # which loading has set aside
        if name in own:
            setattr(model.config, name, own[name])
    return model, load_tokenizer(config)


def _base_folder(config: RunConfig) -> Path:
    return identity.folder_of(config.model_name_or_path, "config.json", config, "model_name_or_path")


def dtype_of_base(config: RunConfig) -> str:
    """In what the base's weights are stored, by its config.json; float32 where that says nothing."""
    own = read_mapping(_base_folder(config) / "config.json")
    texts = own.get("text_config") if isinstance(own.get("text_config"), dict) else {}
    found = next((part[key] for part in (own, texts) for key in ("dtype", "torch_dtype") if part.get(key)), "float32")
    return found if found in DTYPES else "float32"


def _holds(output: Path, made_from: dict[str, str]) -> bool:
    """Whether the folder is the merged model of this very run, whole; said where it is a damaged one of ours."""
    if not (output / RECORD).is_file():
        return False
    try:
        found = read_sealed(output / RECORD)
        whole = all(sha256(output / name) == digest for name, digest in found["files"].items())
    except (UserError, KeyError, AttributeError):
        return False
    if found.get("made_from") == made_from and not whole:
        say(f"{output} is damaged, and is made again")
    return found.get("made_from") == made_from and whole


def _check_free(output: Path, made_from: dict[str, str]) -> None:
    """Refuse a folder that holds more than a merged model of the same run that is not whole."""
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; name a folder that is not there yet")
    mark = folders.mark_of(output)
    if mark is None or mark["made_by"] != MADE_BY:
        raise UserError(f"{output} is there, and no merged model of discobeta; name a folder that is not there yet")
    ours = {folders.MARK, *mark["parts"]}
    if other := sorted(name for name in os.listdir(output) if name not in ours):
        raise UserError(f"{output} would be replaced, and {other[0]} in it was not written by discobeta; move it away")
    try:
        there = read_sealed(output / RECORD).get("made_from")
    except UserError:
        return  # damaged
    if there != made_from:
        raise UserError(
            f"{output} holds another merged model ({_words(there)}); name another folder, or remove that one"
        )


def _words(made_from: Any) -> str:
    found = made_from if isinstance(made_from, dict) else {}
    return f"of the run whose provenance.json has sha256 {str(found.get('run'))[:12]}, in {found.get('dtype')}"


def _card(directory: Path, dtype: str) -> str:
    """README.md of the merged model."""
    run = record.read(directory, weights=False)  # which calls its base as it was called when it was trained
    row = STAGES[run.config.stage]
    auto = "AutoModelForCausalLM" if row.is_policy else "AutoModelForSequenceClassification"
    found = {name: value for name, value in card.header(run).items() if not name.startswith("base_model_")}
    found["library_name"] = "transformers"
    found["tags"] = [tag for tag in found["tags"] if tag != "lora"] + ["merged"]
    weights = "its LoRA merged" if run.config.finetuning_type == "lora" else "all weights"
    notes = [] if row.is_policy else [card.score_in_words(run)]
    if (run.directory / "heads.json").is_file() and read_mapping(run.directory / "heads.json"):
        notes.append("`heads.safetensors` and `heads.json` are the run's heads; transformers does not read them.")
    return (
        "\n\n".join(
            [
                f"---\n{card.as_yaml(found)}---",
                f"# {row.title}: {run.config.arm.label}, seed {run.config.seed}, merged",
                f"{card.what_it_is(run, weights)} Here its weights are those of a plain model, made by `{MADE_BY}` in "
                f"float32 and stored in {dtype}.",
                "## Arm\n\n" + arm_in_words(run.config.arm, run.config.stage),
                f'```python\nfrom transformers import {auto}, AutoTokenizer\n\nmodel = {auto}.from_pretrained("OUT")\n'
                'tokenizer = AutoTokenizer.from_pretrained("OUT")\n```',
                *notes,
                "## Limits\n\n" + card.LIMITS,
                "## How to cite it\n\n" + card.citation(run.facts),
            ]
        )
        + "\n"
    )
