"""Which token sees which: the mask of a batch, and which models can be given one."""

from __future__ import annotations

import re
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from discobeta.data.batches import Batch
from discobeta.model import kernels

TAKES_A_MASK = ("sdpa", "eager")
"""Attention implementations that take any mask. Flash attention takes none."""

OBEYS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Model -> whether a mask of ours decides what its tokens see, as far as that was tried (`layout.obeys_masks`)."""


def mask_of(model: nn.Module, batch: Batch) -> Tensor | None:
    """What to give a transformers model as attention_mask, so that a response sees its prompt and itself, no more.

    That of the batch where causality, which is the model's own, does the rest; else (R, 1, T, T). On a GPU a causal
    mask is given too, to models that obey it and see all that is before a token: without one, transformers waits for
    the device in every forward pass, to learn whether positions start anew within a row.
    """
    spares_a_wait = kernels.on_gpu(batch.input_ids) and OBEYS.get(model, False) and window_of(model.config) is None
    if batch.segment_ids is None and not spares_a_wait:
        return batch.attention_mask
    place = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    sees = (place[None, :] <= place[:, None])[None]
    if batch.segment_ids is not None:
        of, by = batch.segment_ids[:, None, :], batch.segment_ids[:, :, None]
        sees = sees & ((of == 0) | (of == by))
    if batch.attention_mask is not None:
        itself = place[None, :] == place[:, None]  # a softmax over nothing is no number
        sees = sees & batch.attention_mask[:, None, :].bool() | itself
    sees = sees[:, None]
    if model.config._attn_implementation == "sdpa":
        return sees
    return torch.zeros_like(sees, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)


def window_of(config: PreTrainedConfig) -> int | None:
    """How many tokens back the model's attention reaches, where a layer has such a limit."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds and all(kind == "full_attention" for kind in kinds):
        return None
    sizes = [
        value
        for name, value in vars(config).items()
        if re.search("window|chunk", name) and not name.endswith("layers") and type(value) is int and value > 0
    ]
    return min(sizes, default=None)
