"""The reference pass: what the frozen reference says of every pair, computed once for all arms.

log ref(y|x) of both responses and the hidden state at the end of the prompt depend on the base, the
tokenised rows, the dtype and the attention implementation, and on nothing that an arm, a seed, an
adapter or a loss changes. So one pass serves every dpo run on the same data.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from discobeta.data.rows import Rows
from discobeta.design.config import RunConfig
from discobeta.errors import UserError, telling
from discobeta.files import read_sealed, replacing, sha256, sweep, write_json, write_sealed
from discobeta.folders import check_replaceable, write_mark
from discobeta.identity import weights_hash
from discobeta.model.forward import hidden_states, per_sequence, response_logps, state_at, token_logps, unwrapped
from discobeta.model.inference import in_batches
from discobeta.model.layout import pairs_for
from discobeta.model.preflight import check_rows
from discobeta.model.pretrained import load_reference

Columns = dict[str, Tensor]


def load_or_compute(config: RunConfig, parts: dict[str, Rows], *, write: bool = True) -> dict[str, Columns]:
    """Columns `reference_logps` (rows, 2) [chosen, rejected] and `prompt_features` (rows, hidden_size) of each part.

    float32, for the rows of `parts` (train, eval), from the folder `reference_path` (or `output_dir/reference`), where
    they are computed first if there is none. A folder that was given and is of something else is refused; one of the
    run's own is only a cache, and made anew. write: False leaves no folder behind.
    """
    folder = Path(config.reference_path or Path(config.output_dir) / "reference")
    key = cache_key(config, parts)
    if write:
        sweep(folder)
    if (folder / "reference.json").exists():
        made_from = _record(folder)
        if config.reference_path or all(made_from["key"].get(item) == value for item, value in key.items()):
            _check(folder, made_from, key, parts)
            return {name: _read(folder, name, rows) for name, rows in parts.items()}
    if not write:
        model, device = _reference(config, parts)
        return {name: compute(model, rows, config, device, name) for name, rows in parts.items()}
    compute_folder(config, parts, key, folder)
    return {name: _read(folder, name, rows) for name, rows in parts.items()}


def cache_key(config: RunConfig, parts: dict[str, Rows]) -> dict[str, str]:
    """Everything that the numbers depend on."""
    return {
        "base": weights_hash(config),
        "cutoff_len": str(config.cutoff_len),
        "dtype": "bfloat16" if config.bf16 else "float32",
        "frozen_dtype": config.finetuning_type if config.bf16 else "float32",
        "attention": config.flash_attn,
        **{f"{name} rows": rows.key() for name, rows in parts.items()},
    }


def compute_folder(config: RunConfig, parts: dict[str, Rows], key: dict[str, str], folder: Path) -> None:
    """Compute the pass and leave it as one folder, whole or not at all."""
    from safetensors.torch import save_file

    started = time.monotonic()
    named_by = "reference_path" if config.reference_path else "output_dir"
    check_replaceable(folder, named_by)
    model, device = _reference(config, parts)
    with replacing(folder, lambda: check_replaceable(folder, named_by)) as temporary:
        temporary.mkdir()
        digests = {}
        for name, rows in parts.items():
            columns = compute(model, rows, config, device, name)
            columns["fingerprints"] = torch.from_numpy(rows.fingerprints())
            save_file(columns, temporary / f"{name}.safetensors")
            digests[name] = sha256(temporary / f"{name}.safetensors")
        write_sealed(temporary / "reference.json", {"key": key, "sha256": digests})
        seconds = time.monotonic() - started
        cost = {"seconds": seconds, "device": device.type, "pairs": sum(map(len, parts.values()))}
        write_json(temporary / "cost.json", cost | {"gpu_seconds": seconds if device.type == "cuda" else 0.0})
        write_mark(temporary, "discobeta reference", os.listdir(temporary))


def _reference(config: RunConfig, parts: dict[str, Rows]) -> tuple[torch.nn.Module, torch.device]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_reference(config)
    check_rows(model, parts, config)
    return model.to(device), device


def compute(model: torch.nn.Module, rows: Rows, config: RunConfig, device: torch.device, name: str = "") -> Columns:
    """The live reference's columns, in the order of the rows."""
    pairs = pairs_for(model, config, rows)

    def of_batch(indices: np.ndarray) -> Columns:
        batch = pairs.batch(indices).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            hidden = hidden_states(model, batch)
            logps = response_logps(model, hidden, batch)
        features = state_at(hidden, batch.prompt_end)[: batch.pairs]
        return {"reference_logps": logps.view(2, -1).T, "prompt_features": features}

    columns = in_batches(
        pairs.places, config.per_device_eval_batch_size, of_batch,
        step="the reference pass", tokens_per_pass=config.tokens_per_pass, progress_bar=f"reference pass {name}",
    )  # fmt: skip
    if not all(values.isfinite().all() for values in columns.values()):
        raise UserError(f"the reference {config.model_name_or_path} says of some rows what is no finite number")
    return columns


def entropies(config: RunConfig, parts: dict[str, Rows]) -> dict[str, Columns]:
    """Column `entropy` (rows,) of each part: how unsure the reference is of what it says there, in [0, 1].

    (H(y_w) + H(y_l)) / 2, H(y) the mean over response tokens of the entropy of ref(. | x, y_<t), in units of log V of
    a vocabulary of V. float32. In no folder: one run in many reads it, and a pass over the rows gives it.
    """
    model, device = _reference(config, parts)
    log_size = math.log(unwrapped(model).get_output_embeddings().weight.shape[0])

    def of_part(name: str, rows: Rows) -> Columns:
        pairs = pairs_for(model, config, rows)

        def of_batch(indices: np.ndarray) -> Columns:
            batch = pairs.batch(indices).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                _, entropy = token_logps(model, hidden_states(model, batch), batch, with_entropy=True)
            means = per_sequence(entropy, batch) / batch.response_lengths
            return {"entropy": means.view(2, -1).mean(0) / log_size}

        return in_batches(
            pairs.places, config.per_device_eval_batch_size, of_batch,
            step="the reference's entropies", tokens_per_pass=config.tokens_per_pass, progress_bar=f"entropies {name}",
        )  # fmt: skip

    return {name: of_part(name, rows) for name, rows in parts.items()}


def _record(folder: Path) -> dict[str, dict[str, str]]:
    """reference.json: what the pass was made from, and the sha256 of its files."""
    record = read_sealed(folder / "reference.json")
    if not all(isinstance(record.get(name), dict) for name in ("key", "sha256")):
        raise UserError(f"{folder}/reference.json is not that of a reference pass")
    return record


def _check(folder: Path, made_from: dict[str, dict[str, str]], key: dict[str, str], parts: Iterable[str]) -> None:
    """Refuse a folder that was made from something else, or changed since."""
    for item, value in key.items():
        was = made_from["key"].get(item, "nothing")
        if was != value:
            raise UserError(
                f"{folder} is the reference pass of another {item} ({was[:12]}, this run has {value[:12]}); "
                "give another reference_path, or remove that folder"
            )
    for name in parts:
        if sha256(folder / f"{name}.safetensors") != made_from["sha256"][name]:
            raise UserError(f"{folder}/{name}.safetensors was changed after it was written; remove {folder}")


def _read(folder: Path, name: str, rows: Rows) -> Columns:
    from safetensors.torch import load_file

    with telling(f"cannot read {folder}/{name}.safetensors"):
        columns = load_file(folder / f"{name}.safetensors")
    if not torch.equal(columns.pop("fingerprints"), torch.from_numpy(rows.fingerprints())):
        raise UserError(f"{folder}/{name}.safetensors holds its rows in another order; remove {folder}")
    return columns
