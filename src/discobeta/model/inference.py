"""Rows through a model without gradients: a batch at a time, and back in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from discobeta.data.batches import cut
from discobeta.errors import enough_memory


@torch.no_grad()
def in_batches(
    places: np.ndarray,
    batch_size: int,
    of_batch: Callable[[np.ndarray], dict[str, Tensor | Sequence[Tensor]]],
    *,
    step: str,
    tokens_per_pass: int | None = None,
    lower: str = "per_device_eval_batch_size, tokens_per_pass or cutoff_len",
    progress_bar: str | None = None,
) -> dict[str, Tensor | list[Tensor]]:
    """What `of_batch` says of N rows, on the CPU, in their order. Names that it never gives are not there.

    places:       (N,) places that each row takes in a batch; the longest come first (`cut`).
    batch_size, tokens_per_pass: rows of a batch, and its places, padding included, at most.
    of_batch:     indices of B rows -> name -> (B, ...), which becomes (N, ...), or B tensors, one a row, whose sizes
                  may differ, which become a list of N.
    step, lower:  what is being done, and the settings to lower where memory does not suffice for it (`enough_memory`).
    progress_bar: its label; None for no bar.
    """
    columns: dict[str, Tensor | list[Tensor]] = {}
    batches = cut(np.arange(len(places)), places, tokens_per_pass, batch_size)
    with enough_memory(step, lower):
        for indices in tqdm(batches, desc=progress_bar, unit="batch", mininterval=1, disable=progress_bar is None):
            for name, values in of_batch(indices).items():
                if isinstance(values, Tensor):
                    if name not in columns:
                        columns[name] = torch.empty(len(places), *values.shape[1:], dtype=values.dtype)
                    columns[name][indices] = values.cpu()
                else:
                    column = columns.setdefault(name, [None] * len(places))
                    for i, value in zip(indices, values, strict=True):
                        column[i] = value.cpu().clone()  # a view would hold the whole batch, also when it is sent on
    return columns
