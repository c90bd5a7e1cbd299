"""The reference's answers: what the frozen reference samples in response to a study's prompts, once for all arms.

They depend on the base, the prompts, the seed and how is sampled, and on nothing that an arm changes. `discobeta
answers` leaves them in the folder `reference_answers_path`, and every evaluation that would sample the same reads them
there. An evaluation with other settings samples its own.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from discobeta.data.rows import Ragged, Rows, TokenisedData
from discobeta.design.config import RunConfig
from discobeta.errors import UserError, say, telling
from discobeta.files import read_sealed, replacing, sha256, sweep, write_json, write_sealed
from discobeta.folders import check_replaceable, write_mark
from discobeta.identity import tokenizer_hash, weights_hash
from discobeta.model.generation import generate
from discobeta.model.preflight import check_rows
from discobeta.model.pretrained import load_reference
from discobeta.seeds import uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESPONSES = "responses.safetensors"


def prompts_of(config: RunConfig, data: TokenisedData) -> list[np.ndarray]:
    """The N prompts, as token ids, that are answered in the evaluation of a run."""
    rows, asked = data.to_answer(config.num_eval_generations)
    return [rows.prompt_ids[i] for i in asked]


def sample(
    config: RunConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[np.ndarray], name: str
) -> list[np.ndarray]:
    """y ~ model(.|x) for N prompts, as token ids, from the random stream (seed, "sampling", name)."""
    numbers = uniforms(config.seed, "sampling", name, shape=(len(prompts), config.max_new_tokens))
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        return generate(
            model, tokenizer, prompts, numbers,
            temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
            batch_size=8 * config.per_device_eval_batch_size, description=f"{name} samples",
        )  # fmt: skip


def hash_of(responses: Sequence[np.ndarray]) -> str:
    """sha256 over the token ids of all responses in order."""
    digest = hashlib.sha256()
    Ragged.of(responses).update(digest)
    return digest.hexdigest()


def sample_key(config: RunConfig, prompts: Sequence[np.ndarray]) -> dict[str, str]:
    """Everything that the reference's answers depend on.

    With the size of the batch, in which a probability may round otherwise: what is read is what would be sampled.
    """
    return {
        "base": weights_hash(config),
        "tokenizer": tokenizer_hash(config),
        "dtype": "bfloat16" if config.bf16 else "float32",
        "frozen_dtype": config.finetuning_type if config.bf16 else "float32",
        "attention": config.flash_attn,
        "prompts": Rows(prompts).key(),
        **{name: str(getattr(config, name)) for name in SAMPLED_WITH},
    }


SAMPLED_WITH = ("seed", "max_new_tokens", "temperature", "top_p", "top_k", "per_device_eval_batch_size")
"""Run keys on which a response depends, given model and prompt."""


def read(config: RunConfig, prompts: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """The reference's answers from `reference_answers_path`; None where it is not given, or holds others.

    Raises UserError for a folder that is not what was written there.
    """
    folder = Path(config.reference_answers_path or "")
    if not config.reference_answers_path or not (folder / "answers.json").exists():
        return None
    record = _record(folder)
    if different := _difference(record, sample_key(config, prompts)):
        say(f"reference_answers_path: {folder} is of another {different}: the reference answers anew")
        return None
    return _read(folder, record, len(prompts))


def sample_folder(config: RunConfig, data: TokenisedData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the reference answer, and leave its answers as the folder `reference_answers_path`, whole or not at all.

    One that holds them is left as it is. One that holds others, or is somebody else's, is refused.
    """
    from safetensors.torch import save_file

    started, folder, prompts = time.monotonic(), Path(config.reference_answers_path), prompts_of(config, data)
    key = sample_key(config, prompts)
    sweep(folder)
    if (folder / "answers.json").exists():
        record = _record(folder)
        if different := _difference(record, key):
            raise UserError(
                f"{folder} holds the reference's answers of another {different}; give another "
                "reference_answers_path, or remove that folder"
            )
        _read(folder, record, len(prompts))
        return
    check_replaceable(folder, "reference_answers_path")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_reference(config)
    check_rows(model, data.parts(), config)
    responses = Ragged.of(sample(config, model.to(device), tokenizer, prompts, "reference"))
    with replacing(folder, lambda: check_replaceable(folder, "reference_answers_path")) as temporary:
        temporary.mkdir()
        columns = {"values": responses.values, "offsets": responses.offsets}
        save_file({name: torch.from_numpy(column) for name, column in columns.items()}, temporary / RESPONSES)
        write_sealed(temporary / "answers.json", {"key": key, "sha256": sha256(temporary / RESPONSES)})
        seconds = time.monotonic() - started
        cost = {"seconds": seconds, "device": device.type, "responses": len(responses)}
        write_json(temporary / "cost.json", cost | {"gpu_seconds": seconds if device.type == "cuda" else 0.0})
        write_mark(temporary, "discobeta answers", os.listdir(temporary))


def _record(folder: Path) -> dict:
    """answers.json: what the answers were made from, and the sha256 of their file."""
    record = read_sealed(folder / "answers.json")
    if not isinstance(record.get("key"), dict) or "sha256" not in record:
        raise UserError(f"{folder}/answers.json is not that of a reference's answers")
    return record


def _difference(record: dict, key: dict[str, str]) -> str:
    """E.g. `top_k (0 there, 5 here)`, the first in which a record is of something else; "" if it is not."""
    for name, value in key.items():
        if (was := str(record["key"].get(name, "nothing"))) != value:
            return (
                f"{name.replace('_', ' ') if name not in SAMPLED_WITH else name} ({was[:12]} there, {value[:12]} here)"
            )
    return ""


def _read(folder: Path, record: dict, count: int) -> list[np.ndarray]:
    """`count` responses, after checking that the file is the one that was written."""
    from safetensors.torch import load_file

    if sha256(folder / RESPONSES) != record["sha256"]:
        raise UserError(f"{folder}/{RESPONSES} was changed after it was written; remove {folder}")
    with telling(f"cannot read {folder}/{RESPONSES}"):
        columns = load_file(folder / RESPONSES)
        responses = Ragged(columns["values"].numpy(), columns["offsets"].numpy())
        if len(responses) != count:
            raise ValueError(f"{len(responses)} responses to {count} prompts")
    return list(responses)
