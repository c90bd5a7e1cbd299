"""What a model, its rows and its LoRA must agree on, asked before anything expensive: ids, lengths, layers, one pass.

Called with the model on the CPU, before the reference pass, before a checkpoint is looked at and before the run's
directory is written. What follows computes for hours on rows, and a model that has no place for one of them says so
as an index that is out of range, on a GPU after everything else has stopped too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from discobeta.data.batches import Pairs, pack
from discobeta.data.tokens import Rows, TokenisedData
from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.errors import UserError, telling
from discobeta.model.generation import stop_ids
from discobeta.model.policy import and_more, hidden_states, load_tokenizer, plain, say, trunk

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedModel

CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "max_seq_length")
"""What configs call the number of positions. BLOOM's `seq_length` is none: it says how long training's texts were."""

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
        stops, size = stop_ids(model, tokenizer), vocabulary(model)
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
    size, context, name = vocabulary(model), context_of(plain(model).config), name or name_of(model)
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
    if "flash" not in (
        getattr(plain(model).config, "_attn_implementation", None) or ""
    ):  # of which there are no CPU kernels
        _try(model, rows, row, config, name)


def check_ids(model: nn.Module, sequences: Sequence[np.ndarray], what: str) -> None:
    """Refuse token ids that the model does not know; `what` it is that reads them ("reward_model: X")."""
    size = vocabulary(model)
    if (largest := max((int(np.max(ids, initial=0)) for ids in sequences), default=0)) >= size:
        raise UserError(f"{what} knows {size} tokens (ids 0 to {size - 1}), and was given the token id {largest}")


def check_lengths(model: nn.Module, lengths: np.ndarray, what: str) -> None:
    """Refuse sequences longer than the model's context."""
    context = context_of(plain(model).config)
    if context and (longest := int(lengths.max(initial=0))) > context:
        raise UserError(f"{what} has a context of {context} tokens, and a prompt with its response has {longest}")


def check_context(model: nn.Module, longest_prompt: int, max_new_tokens: int) -> None:
    """Refuse prompts that do not leave the model room for a response."""
    context = context_of(plain(model).config)
    if context and longest_prompt + max_new_tokens > context:
        raise UserError(
            f"a prompt of {longest_prompt} tokens and max_new_tokens: {max_new_tokens} do not fit into the context of "
            f"{context} tokens of {plain(model).config.name_or_path}: lower cutoff_len or max_new_tokens"
        )


ALL_LINEAR = ("all", "all-linear")
"""LLaMA-Factory's word, and PEFT's."""


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> layer of the trunk that is a linear map: nn.Linear, or GPT-2's Conv1D. The output layer is none, and no
    layer that gives back more than the map does (Llama 4's router), on which LoRA cannot be.
    """
    from transformers.pytorch_utils import Conv1D

    def is_map(part: nn.Module) -> bool:
        if type(part).forward in (nn.Linear.forward, Conv1D.forward):
            return True
        return isinstance(part, nn.Linear) and isinstance(
            part(part.weight.new_zeros(1, part.in_features)), torch.Tensor
        )

    body = set(trunk(model).modules())
    return {name: part for name, part in model.named_modules() if part in body and is_map(part)}


def lora_layers(layers: dict[str, nn.Module], lora_target: str, model: PreTrainedModel) -> set[str]:
    """The names of those layers that lora_target means: all, or those whose name ends in one of its words, as in PEFT.

    Raises UserError for a word that means none.
    """
    if lora_target in ALL_LINEAR:
        return set(layers)
    if not words(lora_target):
        raise UserError("lora_target names no layer: write `all`, or names with commas between them")
    found = set()
    for word in sorted(words(lora_target)):
        named = {name for name in layers if f".{name}".endswith(f".{word}")}
        if not named:
            last_names = sorted({name.rpartition(".")[2] for name in layers})
            what = " (it has experts of that name, stacked)" if word in experts(model) else ""
            raise UserError(
                f"lora_target: the model has no linear layer called {word}{what}; it has {', '.join(last_names)}"
            )
        found |= named
    return found


def words(lora_target: str) -> set[str]:
    return {word for name in lora_target.split(",") if (word := name.strip())}


def experts(model: PreTrainedModel) -> set[str]:
    """Last names of weights that hold one matrix per expert: no linear layers, and LoRA does not reach them."""
    return {
        name.rpartition(".")[2]
        for name, weight in trunk(model).named_parameters()
        if weight.ndim == 3 and "expert" in name
    }


def check_settings(config: RunConfig, folder: Path, settings: PeftConfig, reached: set[str], wanted: set[str]) -> None:
    """Refuse a run that asks for another LoRA than the adapter is that it goes on from; say what was not asked for.

    reached: the layers that the adapter is for; wanted: those that lora_target means.
    """
    own = {"lora_rank": settings.r, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    for key, value in own.items():
        if (asked := getattr(config, key)) not in (None, value):
            raise UserError(f"{key}: {asked}, and the adapter {folder} has {value}: write {value}, or leave {key} out")
    if config.lora_target is not None and (differing := sorted(reached ^ wanted)):
        has = "has a" if differing[0] in reached else "has no"
        raise UserError(
            f"lora_target: {config.lora_target}, and the adapter {folder} {has} part for {differing[0]}"
            f"{and_more(differing)}: leave lora_target out"
        )
    if silent := [f"{key} {value}" for key, value in own.items() if getattr(config, key) is None]:
        say(f"adapter {folder} brings along {', '.join(silent)}")


def vocabulary(model: nn.Module) -> int:
    """How many token ids the model has an embedding for."""
    return plain(model).get_input_embeddings().weight.shape[0]


def name_of(model: nn.Module) -> str:
    return plain(model).config.name_or_path or type(plain(model)).__name__


def context_of(config: PreTrainedConfig) -> int | None:
    """Positions that the model has, or was trained on, prompt and response together; None where nothing says so.

    Beyond it a learned table ends in an error; rotary positions compute on, with angles that no training has seen,
    and are refused all the same: the log-probabilities would be of no use. What a rotary scaling adds (YaRN, linear,
    dynamic) counts; ALiBi has no limit.
    """
    config = config.get_text_config()
    if getattr(config, "alibi", False):
        return None
    said = (getattr(config, name, None) for name in CONTEXTS)
    context = next((value for value in said if isinstance(value, int) and value > 0), None)
    if context is None:
        return None
    scalings = [getattr(config, name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    scalings += [part for scaling in scalings for part in scaling.values() if isinstance(part, dict)]  # per layer type
    scaled = [
        int(scaling["factor"] * (scaling.get("original_max_position_embeddings") or context))
        for scaling in scalings
        if isinstance(scaling.get("factor"), int | float)
    ]
    return max([context, *scaled])


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
def _try(model: nn.Module, rows: Rows, row: int, config: RunConfig, name: str) -> None:
    """Read the end of a row, where it stands: what a model cannot do shows here."""
    columns = list(rows.parts().values())
    prompt, response = columns[0][row], max((ids[row] for ids in columns[1:]), key=len, default=columns[0][row][:0])
    ids = np.concatenate([prompt, response])
    batch = pack([ids[-TRIED:-1]], [ids[-1:]])
    batch.position_ids += max(0, len(ids) - TRIED)
    training = [part for part in model.modules() if part.training]
    model.eval()  # no dropout: a random stream would move on
    try:
        with (
            telling(f"{name}: {type(plain(model)).__name__} fails on {_source(rows, row)}"),
            torch.autocast("cpu", torch.bfloat16, enabled=config.bf16),
        ):
            hidden_states(model, batch)
    finally:
        for part in training:
            part.training = True
