"""How pairs lie in a batch: each response behind a prompt of its own, or both behind one, for models that can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from discobeta.data.batches import Batch, Pairs, pack
from discobeta.data.rows import Rows
from discobeta.design.config import RunConfig
from discobeta.model.attention import OBEYS, TAKES_A_MASK, window_of
from discobeta.model.forward import context_of, hidden_states, unwrapped, vocabulary_size


def pairs_for(model: nn.Module, config: RunConfig, rows: Rows, columns: dict[str, Tensor] | None = None) -> Pairs:
    """The rows as batches for `model`: with the prompt once where the config allows it and it computes the same."""
    pairs = Pairs(rows, columns)
    has_both = rows.chosen_ids is not None and rows.rejected_ids is not None
    if has_both and config.share_prompt and why_apart(model, int(pairs.lengths.max())) is None:
        pairs = Pairs(rows, columns, shared=True)
    return pairs


def why_apart(model: nn.Module, longest: int) -> str | None:
    """Why two responses cannot stand behind one prompt; None where they can. longest: tokens of a row by itself."""
    inner = unwrapped(model)
    window = window_of(inner.config)
    if inner.config._attn_implementation not in TAKES_A_MASK:
        return f"{inner.config._attn_implementation} takes no mask"
    if window is not None and window < longest:  # in a longer row it would end elsewhere
        return f"its attention reaches {window} tokens back, and rows have up to {longest}"
    if not obeys_masks(model):
        return "it computes other states for a response behind another one, whatever mask it is given"
    return None


def obeys_masks(model: nn.Module) -> bool:
    """Whether a response has the same states behind another response, hidden from it, as right behind its prompt.

    Not so where the distance of tokens is counted in the row (ALiBi), where a state runs over all tokens (recurrence,
    convolution), or where a model makes a mask of its own. The two pass if || h_shared - h || < sqrt(eps) || h ||,
    eps being the distance of two numbers near 1 in the model's dtype. Tried once with every model.
    """
    inner = unwrapped(model)
    if inner not in OBEYS:
        OBEYS[inner] = inner.config._attn_implementation in TAKES_A_MASK and _states_are_equal(model)
    return OBEYS[inner]


@torch.no_grad()
def _states_are_equal(model: nn.Module) -> bool:
    between = max(1, min(40, (context_of(unwrapped(model).config) or 64) - 8))
    ids = np.arange(1, 10 + between) % vocabulary_size(model)
    prompt, first, second = [ids[:5]], [ids[9:]], [ids[5:9]]

    def of_second(batch: Batch) -> Tensor:
        batch = batch.to(next(model.parameters()).device)
        states = hidden_states(model, batch).flatten(0, 1)[batch.target_index]
        return states[batch.sequence_index == batch.responses - 1].float()

    with evaluating(model):
        try:
            shared, alone = of_second(pack(prompt, first, second)), of_second(pack(prompt, second))
        except Exception:  # a model that has no use for such a mask says so in many ways
            return False
    return bool((shared - alone).norm() < torch.finfo(unwrapped(model).dtype).eps ** 0.5 * alone.norm())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, without which no random stream moves on; every module's mode is restored."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
