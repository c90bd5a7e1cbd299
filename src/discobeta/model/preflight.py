"""What a model, its rows and its LoRA must agree on, asked before anything expensive: ids, lengths, layers, one pass.

Called with the model on the CPU, before the reference pass, before a checkpoint is looked at and before the run's
directory is written. What follows computes for hours on rows, and a model that has no place for one of them says so
as an index that is out of range, on a GPU after everything else has stopped too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from discobeta.data.batches import Pairs, pack
from discobeta.data.rows import Rows, TokenisedData
from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.errors import UserError, telling
from discobeta.model.forward import check_context, context_of, hidden_states, name_of, unwrapped, vocabulary_size
from discobeta.model.generation import stop_ids
from discobeta.model.layout import evaluating, obeys_masks
from discobeta.model.pretrained import load_tokenizer

TRIED = 8
"""Tokens of the pass that is tried, the last ones of the longest row at their own positions: a position table that no
config names is missed there, and a large model still answers on the CPU within a moment."""


def check(model: nn.Module, data: TokenisedData, config: RunConfig, tokenizer: Any) -> None:
    """Refuse a model that cannot read all rows of the run, or cannot answer the prompts that it is to answer.

    Of answers to train on the latter is asked when there is a reward model too (`check_answers`).
    """
    check_rows(model, data.parts(), config, tokenizer=tokenizer)
    row = STAGES.get(config.stage)  # of the base there is none
    if row and row.is_policy and row.has_pairs:
        check_answers(model, data, config, tokenizer)


def check_answers(model: nn.Module, data: TokenisedData, config: RunConfig, tokenizer: Any) -> None:
    """Refuse prompts that leave no room for a response, and a model that has no token to end one with."""
    answered = [] if STAGES[config.stage].has_pairs else [data.train.prompt_ids]
    if config.num_eval_generations:  # what cannot be measured is not trained
        rows, asked = data.to_answer(config.num_eval_generations)
        answered.append(rows.prompt_ids.select(asked))
    if answered:
        check_context(model, max(int(ids.lengths.max()) for ids in answered), config.max_new_tokens)
        stops, size = stop_ids(model, tokenizer), vocabulary_size(model)
        if stops[0] >= size:
            raise UserError(
                f"no response could end: it does with {_unknown(stops[0], size, name_of(model), tokenizer)}"
            )


def check_rows(
    model: nn.Module, parts: dict[str, Rows], config: RunConfig, *, name: str | None = None, tokenizer: Any = None
) -> None:
    """Refuse rows with a token that the model does not know, or longer than its context; and a model that fails.

    name: what the model is called. tokenizer: that of the rows, if it is at hand.
    """
    size, context, name = vocabulary_size(model), context_of(unwrapped(model).config), name or name_of(model)
    longest: tuple[int, Rows, int] | None = None
    for rows in parts.values():
        for ids in rows.parts().values():
            if (place := _first_unknown(ids.values, size)) is not None:
                row = int(np.searchsorted(ids.offsets, place, side="right")) - 1
                unknown = _unknown(int(ids.values[place]), size, name, tokenizer or load_tokenizer(config))
                raise UserError(f"{_source(rows, row)} holds {unknown}")
        lengths = Pairs(rows).lengths
        row = int(lengths.argmax())
        if longest is None or lengths[row] > longest[0]:
            longest = int(lengths[row]), rows, row
    length, rows, row = longest
    if context and length > context:
        raise UserError(
            f"{_source(rows, row)} has {length} tokens (prompt + response), and the context of {name} is {context}: "
            f"lower cutoff_len to {context} or less"
        )
    attention = getattr(unwrapped(model).config, "_attn_implementation", None) or ""
    if "flash" not in attention:  # of which there are no CPU kernels
        _try_a_pass(model, rows, row, config, name)
        obeys_masks(model)  # tried on the CPU, and remembered for passes on a GPU


def check_ids(model: nn.Module, sequences: Sequence[np.ndarray], what: str) -> None:
    """Refuse token ids that the model does not know; `what` it is that reads them ("reward_model: X")."""
    size = vocabulary_size(model)
    if (largest := max((int(np.max(ids, initial=0)) for ids in sequences), default=0)) >= size:
        raise UserError(f"{what} knows {size} tokens (ids 0 to {size - 1}), and was given the token id {largest}")


def check_lengths(model: nn.Module, lengths: np.ndarray, what: str) -> None:
    """Refuse sequences longer than the model's context."""
    context = context_of(unwrapped(model).config)
    if context and (longest := int(lengths.max(initial=0))) > context:
        raise UserError(f"{what} has a context of {context} tokens, and a prompt with its response has {longest}")


def _first_unknown(ids: np.ndarray, size: int) -> int | None:
    """The place of the largest id, if it is beyond the embedding; a tokenizer's ids are never negative."""
    place = int(ids.argmax()) if len(ids) else 0
    return place if len(ids) and ids[place] >= size else None


def _unknown(token: int, size: int, name: str, tokenizer: Any) -> str:
    return (
        f"the token {tokenizer.convert_ids_to_tokens(token)!r} (id {token}), and {name} has an embedding for {size} "
        f"tokens (ids 0 to {size - 1}): the tokenizer is larger than the model; use the model's own, or give the "
        "model more embeddings and train them"
    )


def _source(rows: Rows, row: int) -> str:
    return rows.source[row] or f"row {row + 1}"


@torch.no_grad()
def _try_a_pass(model: nn.Module, rows: Rows, row: int, config: RunConfig, name: str) -> None:
    """Read the end of a row, where it stands: what a model cannot do shows here."""
    columns = list(rows.parts().values())
    prompt, response = columns[0][row], max((ids[row] for ids in columns[1:]), key=len, default=columns[0][row][:0])
    ids = np.concatenate([prompt, response])
    batch = pack([ids[-TRIED:-1]], [ids[-1:]])
    batch.position_ids += max(0, len(ids) - TRIED)
    with (
        evaluating(model),
        telling(f"{name}: {type(unwrapped(model)).__name__} fails on {_source(rows, row)}"),
        torch.autocast("cpu", torch.bfloat16, enabled=config.bf16),
    ):
        hidden_states(model, batch)
