"""From tokenised rows to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from discobeta.data.rows import Rows


@dataclass
class Batch:
    """N sequences, prompt + response, padded to T. Of B pairs N = 2B, the B chosen ones first.

    Positions come from the lengths of prompt and response, never from a pad id: a pad id may also
    be an ordinary token, or the end of a response. The flat indices are made here, on the host,
    because finding them on the device would wait for it.
    """

    input_ids: Tensor  # (N, T)
    attention_mask: Tensor | None  # (N, T); None if padding is on the right, where causality hides it
    position_ids: Tensor  # (N, T) from 0 at the first real token
    response_mask: Tensor  # (N, T) float32, 1 at response tokens
    response_end: Tensor  # (N,) index of the last response token
    prompt_end: Tensor  # (N,) index of the last prompt token
    predictor_index: Tensor  # (M,) into the flattened (N * T): the position before each response token
    target_ids: Tensor  # (M,) the response tokens
    sequence_index: Tensor  # (M,) whose response each token belongs to
    columns: dict[str, Tensor]  # what the stage asked for beside the tokens: (B, ...) per pair, or (M,) per target

    @property
    def pairs(self) -> int:
        return len(self.input_ids) // 2

    def to(self, device: torch.device) -> Batch:
        moved = {
            entry.name: value.to(device, non_blocking=True)
            for entry in fields(self)
            if isinstance(value := getattr(self, entry.name), Tensor)
        }
        columns = {name: value.to(device, non_blocking=True) for name, value in self.columns.items()}
        return replace(self, **moved, columns=columns)


def pack(
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    columns: dict[str, Tensor] | None = None,
    *,
    pad_to: int = 0,
    side: str = "right",
) -> Batch:
    """N prompts and their responses as one batch, with `columns` beside them.

    pad_to: least width T; side: where the padding goes. Neither changes what a model says.
    """
    prompt_lengths = np.array([len(ids) for ids in prompts])
    response_lengths = np.array([len(ids) for ids in responses])
    lengths = prompt_lengths + response_lengths
    width = max(int(lengths.max()), pad_to)
    starts = width - lengths if side == "left" else np.zeros_like(lengths)

    input_ids = np.zeros((len(prompts), width), dtype=np.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        input_ids[row, starts[row] : starts[row] + lengths[row]] = np.concatenate([prompt, response])
    place = np.arange(width)[None, :] - starts[:, None]  # 0 at the first real token
    real = (place >= 0) & (place < lengths[:, None])
    is_response = (place >= prompt_lengths[:, None]) & real
    sequence, position = np.nonzero(is_response)

    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(real.astype(np.int64)) if side == "left" else None,
        position_ids=torch.from_numpy(place.clip(0)),
        response_mask=torch.from_numpy(is_response.astype(np.float32)),
        response_end=torch.from_numpy(starts + lengths - 1),
        prompt_end=torch.from_numpy(starts + prompt_lengths - 1),
        predictor_index=torch.from_numpy(sequence * width + position - 1),
        target_ids=torch.from_numpy(input_ids[is_response]),
        sequence_index=torch.from_numpy(sequence),
        columns=columns or {},
    )


def collate(rows: Rows, indices: np.ndarray, columns: dict[str, Tensor] | None = None, **padding) -> Batch:
    """The pairs at `indices` as one batch; `columns` are (rows, ...) tensors to take along. padding: as for `pack`."""
    prompts = [rows.prompt_ids[i] for i in indices] * 2
    responses = [rows.chosen_ids[i] for i in indices] + [rows.rejected_ids[i] for i in indices]
    taken = {name: value[torch.from_numpy(indices)] for name, value in (columns or {}).items()}
    return pack(prompts, responses, taken, **padding)


class Pairs:
    """Rows with the per-row tensors that a stage takes along, made into batches on demand.

    Rows of prompts alone have lengths too; their responses are yet to be given.
    """

    def __init__(self, rows: Rows, columns: dict[str, Tensor] | None = None):
        self.rows = rows
        self.columns = columns or {}
        prompts, *responses = (column.lengths for column in rows.parts().values())
        self.lengths = prompts + (np.max(responses, axis=0) if responses else 0)  # of a pair's longer sequence
        self.sizes = len(responses) * prompts + sum(responses)  # real tokens of a pair

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray) -> Batch:
        return collate(self.rows, indices, self.columns)

    def tokens(self, indices: np.ndarray) -> int:
        return int(self.sizes[indices].sum())


@dataclass
class Responses:
    """N prompts, each with one response, as token ids, made into batches on demand."""

    prompts: Sequence[np.ndarray]
    responses: Sequence[np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(a) + len(b) for a, b in zip(self.prompts, self.responses, strict=True)])

    def batch(self, indices: np.ndarray, columns: dict[str, Tensor] | None = None) -> Batch:
        return pack([self.prompts[i] for i in indices], [self.responses[i] for i in indices], columns)


def longest_first(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """All rows once, longest first (so that running out of memory shows at once), `size` at a time."""
    order = np.argsort(-lengths, kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]
