"""The reference's answers: what the frozen reference samples in response to a study's prompts, once for all arms.

They depend on the base, the prompts, the seed and how is sampled, and on nothing that an arm changes. `discobeta
answers` leaves them in the folder `reference_answers_path`, and every evaluation that would sample the same reads them
there. An evaluation with other settings samples its own. A prompt has as many as the policy's own answers are compared
with (`generations_per_prompt`), or as a run ranks (`best_of`); of the latter stands there too what the reference says
of them, for runs whose reward is a log-ratio.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from discobeta.data.rows import Ragged, Rows, TokenisedData
from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.errors import UserError, say, telling
from discobeta.files import read_sealed, replacing, sha256, sweep, write_json, write_sealed
from discobeta.folders import check_replaceable, write_mark
from discobeta.identity import tokenizer_hash, weights_hash
from discobeta.inputs import reference as reference_pass
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


@dataclass
class Answers:
    """The reference's answers to N prompts, m each."""

    responses: list[np.ndarray]  # (N * m) token ids, those to one prompt side by side
    columns: reference_pass.Columns = field(
        default_factory=dict
    )  # of the pairs of `candidates`; prompt_features (N, …)

    def first(self, count: int, each: int) -> list[np.ndarray]:
        """(count * each) responses, the first `each` to every one of `count` prompts."""
        samples = len(self.responses) // count
        return [self.responses[i * samples + j] for i in range(count) for j in range(each)]


def sample(
    config: RunConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    name: str,
    each: int = 1,
) -> list[np.ndarray]:
    """y ~ model(.|x), `each` for every one of N prompts, as token ids: (N * each), those to one prompt side by side.

    The first of every prompt come from the random stream (seed, "sampling", name), the j-th from one of their own,
    (…, j - 1): so they are the same, bit for bit, however many there are.
    """
    device, shape = next(model.parameters()).device, (len(prompts), config.max_new_tokens)
    rounds = []
    for j in range(each):
        nth, label = ([j], f" {j + 1} of {each}") if each > 1 else ([], "")
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            responses = generate(
                model, tokenizer, prompts, uniforms(config.seed, "sampling", name, *nth[:j], shape=shape),
                temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
                batch_size=8 * config.per_device_eval_batch_size, description=f"{name} samples{label}",
            )  # fmt: skip
        rounds.append(responses)
    return [response for answers in zip(*rounds, strict=True) for response in answers]


def candidates(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], each: int) -> Rows:
    """The `each` responses to every prompt as pairs, side by side, so that whatever compares pairs rates them.

    With h = ceil(each / 2), pair j of a prompt has its responses j and each - h + j; `of_candidates` undoes it.
    """
    half = (each + 1) // 2
    places = [i * each + j for i in range(len(prompts)) for j in range(half)]
    return Rows(
        [prompt for prompt in prompts for _ in range(half)],
        [responses[place] for place in places],
        [responses[place + each - half] for place in places],
    )


def of_candidates(values: np.ndarray, each: int) -> np.ndarray:
    """(N, each) values of the responses, from the (pairs, 2) values of `candidates`."""
    first, second = values.reshape(-1, (each + 1) // 2, 2).transpose(2, 0, 1)
    return np.concatenate([first, second[:, each % 2 :]], axis=1)


def answer(
    config: RunConfig, reference: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[np.ndarray]
) -> Answers:
    """Let the reference answer N prompts, and say of its answers what a run needs that ranks them."""
    answers = Answers(sample(config, reference, tokenizer, prompts, "reference", config.reference_samples))
    if _rates(config):
        pairs = candidates(prompts, answers.first(len(prompts), config.best_of), config.best_of)
        device = next(reference.parameters()).device
        answers.columns = reference_pass.compute(reference, pairs, config, device, "of its answers")
        answers.columns["prompt_features"] = answers.columns["prompt_features"][:: len(pairs) // len(prompts)].clone()
    return answers


def _rates(config: RunConfig) -> bool:
    """Whether the run's scores of candidates are made of the reference's log-probabilities."""
    return STAGES[config.stage].reference_pass and bool(config.best_of)


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
        **({"generations_per_prompt": str(config.generations_per_prompt)} if config.generations_per_prompt > 1 else {}),
        **({"best_of": str(config.best_of)} if config.best_of else {}),
        **({name: str(getattr(config, name)) for name in RATED_WITH} if _rates(config) else {}),
    }


SAMPLED_WITH = ("seed", "max_new_tokens", "temperature", "top_p", "top_k", "per_device_eval_batch_size")
"""Run keys on which a response depends, given model and prompt."""

RATED_WITH = ("tokens_per_pass", "share_prompt")
"""And those on which, with them, the last bits of a response's log-probability depend."""

KEYS = {*SAMPLED_WITH, *RATED_WITH, "generations_per_prompt", "best_of"}


def read(config: RunConfig, prompts: Sequence[np.ndarray]) -> Answers | None:
    """The reference's answers from `reference_answers_path`; None where it is not given, or holds others.

    A folder may hold more of them than are asked for. Raises UserError for a folder that is not what was written there.
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
    answers = answer(config, model.to(device), tokenizer, prompts)
    responses = Ragged.of(answers.responses)
    with replacing(folder, lambda: check_replaceable(folder, "reference_answers_path")) as temporary:
        temporary.mkdir()
        ids = {"values": torch.from_numpy(responses.values), "offsets": torch.from_numpy(responses.offsets)}
        save_file(ids | answers.columns, temporary / RESPONSES)
        each = {"each": config.reference_samples} if config.reference_samples > 1 else {}
        write_sealed(temporary / "answers.json", {"key": key, "sha256": sha256(temporary / RESPONSES), **each})
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
            return f"{name.replace('_', ' ') if name not in KEYS else name} ({was[:12]} there, {value[:12]} here)"
    return ""


def _read(folder: Path, record: dict, count: int) -> Answers:
    """The answers to `count` prompts, after checking that the file is the one that was written."""
    from safetensors.torch import load_file

    if sha256(folder / RESPONSES) != record["sha256"]:
        raise UserError(f"{folder}/{RESPONSES} was changed after it was written; remove {folder}")
    with telling(f"cannot read {folder}/{RESPONSES}"):
        columns = load_file(folder / RESPONSES)
        responses, each = Ragged(columns.pop("values").numpy(), columns.pop("offsets").numpy()), record.get("each", 1)
        if len(responses) != count * each:
            raise ValueError(f"{len(responses)} responses to {count} prompts{f', {each} each' if each > 1 else ''}")
    return Answers(list(responses), columns)
