"""Rows through a model without gradients: a batch at a time, and back in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from discobeta import progress
from discobeta.data.batches import PerToken, cut, joined
from discobeta.errors import enough_memory


@torch.no_grad()
def in_batches(
    places: np.ndarray,
    batch_size: int,
    of_batch: Callable[[np.ndarray], dict[str, Tensor | PerToken]],
    *,
    step: str,
    tokens_per_pass: int | None = None,
    lower: str = "per_device_eval_batch_size, tokens_per_pass or cutoff_len",
    progress_bar: str | None = None,
) -> dict[str, Tensor | PerToken]:
    """What `of_batch` says of N rows, on the CPU, in their order. Names that it never gives are not there.

    places:       (N,) places that each row takes in a batch; the longest come first (`cut`).
    batch_size, tokens_per_pass: rows of a batch, and its places, padding included, at most.
    of_batch:     indices of B rows -> name -> (B, ...), which becomes (N, ...), or what it says of each of their
                  tokens, which becomes what it says of the tokens of all rows.
    step, lower:  what is being done, and the settings to lower where memory does not suffice for it (`enough_memory`).
    progress_bar: its label; None for no bar.
    """
    columns: dict[str, Tensor] = {}
    parts: dict[str, list[PerToken]] = {}
    batches = cut(np.arange(len(places)), places, tokens_per_pass, batch_size)
    bar = progress.bar(len(batches), progress_bar or "", "batch", shown=progress_bar is not None)
    with enough_memory(step, lower), bar:
        for indices in batches:
            for name, values in of_batch(indices).items():
                if isinstance(values, PerToken):
                    parts.setdefault(name, []).append(PerToken(values.values.cpu(), values.sizes))
                    continue
                if name not in columns:
                    columns[name] = torch.empty(len(places), *values.shape[1:], dtype=values.dtype)
                columns[name][indices] = values.cpu()
            bar.update()
    if not parts:
        return columns
    order = np.argsort(np.concatenate(batches))  # of the rows among those of all batches
    return columns | {name: joined(of_batches).taken(order) for name, of_batches in parts.items()}
