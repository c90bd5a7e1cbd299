"""Sampling of responses: the one place that calls `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import groupby
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from discobeta import progress
from discobeta.data.templates import closing_id
from discobeta.errors import UserError, enough_memory
from discobeta.model.forward import check_context, unwrapped

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@enough_memory(
    "sampling", "per_device_eval_batch_size (8 times as many responses are sampled at once) or max_new_tokens"
)
@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[np.ndarray | list[int]],
    uniforms: np.ndarray,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 64,
    description: str | None = None,
) -> list[np.ndarray]:
    """y ~ pi(.|x), one response per prompt: int32 ids that end with the first <eos>, if it came.

    model:       a causal LM or a PEFT model; its active adapter is used, its mode is restored.
    prompt_ids:  N prompts as token ids, without padding.
    uniforms:    (N, max_new_tokens) numbers in [0, 1): token t of response i is F^-1(uniforms[i, t]),
                 F being the distribution function of the next token.
    description: label of a progress bar; None for no bar.

    A response is a function of the model, its prompt and its row of `uniforms`, whatever else is in
    the batch, in whatever order, on however many processes. Equal rows are common random numbers:
    models that say nearly the same then answer nearly the same. Only the arguments shape the
    distribution: a hub model's own generation_config (top_p, repetition_penalty, ...) is set aside,
    because KL(policy || reference) is about pi itself.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    language_model = unwrapped(model)
    check_context(model, max(map(len, prompt_ids), default=0), uniforms.shape[1])
    stops = stop_ids(language_model, tokenizer)
    pad = _padding_id(language_model, tokenizer, stops)
    settings = GenerationConfig(
        do_sample=False,  # the draw is made by InverseCDF, which leaves one token to choose
        max_new_tokens=uniforms.shape[1],
        pad_token_id=pad,
        eos_token_id=stops,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )
    order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
    responses: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompt_ids)
    bar = progress.bar(len(order), description or "", "response", shown=description is not None)
    with bar, _set_for_sampling(language_model):
        for indices in _batches(order, prompt_ids, batch_size, _reads_left_padded(language_model, settings)):
            ids, mask = _left_padded([prompt_ids[index] for index in indices], pad)
            sampler = InverseCDF(uniforms[indices], ids.shape[1], temperature, top_p, top_k)
            output = language_model.generate(
                input_ids=ids.to(language_model.device),
                attention_mask=mask.to(language_model.device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([sampler]),
            )
            new_ids = output[:, ids.shape[1] :].cpu().numpy()
            for index, response, size in zip(indices, new_ids, _sizes(new_ids, stops), strict=True):
                responses[index] = response[:size].astype(np.int32)
            bar.update(len(indices))
    return responses


class InverseCDF:
    """Logits -> logits that leave one token: F^-1(u), the first token with F(token) > u.

    Probabilities are counted in units of 2^-40, so that their sums are exact and the draw repeats
    bit for bit on a GPU too, where a cumulative sum of floats does not.
    """

    UNIT = 2.0**40

    def __init__(self, uniforms: np.ndarray, prompt_width: int, temperature: float, top_p: float, top_k: int):
        self.uniforms = torch.from_numpy(uniforms)
        self.prompt_width = prompt_width
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.uniforms = self.uniforms.to(logits.device)  # once: a copy for every token would wait for the device
        u = self.uniforms[:, input_ids.shape[1] - self.prompt_width]
        weights = logits.double().div_(self.temperature).softmax(-1).mul_(self.UNIT).long()
        if self.top_k or self.top_p < 1:
            weights, tokens = weights.sort(dim=-1, descending=True, stable=True)
            before = weights.cumsum(-1) - weights
            weights = weights.where(before < self.top_p * self.UNIT, 0)
            if self.top_k:
                weights[:, self.top_k :] = 0
        ends = weights.cumsum(-1)
        target = (u * ends[:, -1]).long()[:, None]
        chosen = torch.searchsorted(ends, target, right=True)
        chosen.clamp_(max=logits.shape[-1] - 1)  # where logits are no numbers: training then says that it diverged
        if self.top_k or self.top_p < 1:
            chosen = tokens.gather(-1, chosen)
        return torch.full_like(logits, -torch.inf).scatter(-1, chosen, 0.0)


def response_text(tokenizer: PreTrainedTokenizerBase, response_ids: np.ndarray) -> str:
    """The text of a response without its final <eos>, or the token that closes a turn of its chat template.

    Other special tokens stay visible: a response that holds them is not the text without them.
    """
    ids = [int(token) for token in response_ids]
    if ids and ids[-1] in (tokenizer.eos_token_id, closing_id(tokenizer)):
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _left_padded(sequences: list[np.ndarray | list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, T) ids and attention mask, padded on the left so that every prompt ends where its response begins."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.as_tensor(np.asarray(sequence, dtype=np.int64))
        mask[row, width - len(sequence) :] = 1
    return ids, mask


def _batches(
    order: list[int], prompt_ids: Sequence[np.ndarray | list[int]], batch_size: int, may_pad: bool
) -> Iterator[list[int]]:
    """`order`, batch_size at a time; unless prompts may be padded, those of one length."""
    groups = [order] if may_pad else [list(group) for _, group in groupby(order, lambda i: len(prompt_ids[i]))]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


_LEFT_PADDED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _reads_left_padded(model: PreTrainedModel, settings: GenerationConfig) -> bool:
    """Whether padding in front of a prompt leaves the next token's logits as they are. Not so where a recurrent state
    has run over the padding (RWKV), or positions are counted from it (BART's decoder). Asked once of every model."""
    if model not in _LEFT_PADDED:
        ids, mask = _left_padded([[1, 2, 3], [1, 2, 3, 4, 1]], settings.pad_token_id)
        one = copy(settings)
        one.update(max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        with torch.autocast(model.device.type, enabled=False):  # whose rounding may be coarser than the weights' own
            padded, alone = (
                model.generate(
                    input_ids=ids[:1, start:].to(model.device),
                    attention_mask=mask[:1, start:].to(model.device),
                    generation_config=one,
                ).logits[0].float()
                for start in (0, 2)
            )  # fmt: skip
        _LEFT_PADDED[model] = bool((padded - alone).norm() < torch.finfo(model.dtype).eps ** 0.5 * alone.norm())
    return _LEFT_PADDED[model]


def _sizes(ids: np.ndarray, stops: list[int]) -> np.ndarray:
    """(N,) tokens of each of (N, T) up to and with the first stop; what follows is padding (and pad may be <eos>)."""
    is_stop = np.isin(ids, stops)
    return np.where(is_stop.any(1), is_stop.argmax(1) + 1, ids.shape[1])


def _padding_id(model: nn.Module, tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> int:
    """Some token of the model, and of no matter which: nothing attends to padding, and a response is cut before it."""
    size = model.get_input_embeddings().num_embeddings  # some tokenizers have a <pad> that their model lacks
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in (*ids, *stops) if token is not None and token < size), 0)


def has_ended(response_ids: np.ndarray, stops: list[int]) -> bool:
    """Whether a response was ended by the model and not by its length."""
    return len(response_ids) > 0 and int(response_ids[-1]) in stops


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's <eos>, what closes a turn of its chat template (the end of a response that was trained on), and
    those that the model itself stops at (chat models have several)."""
    own = unwrapped(model).generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, closing_id(tokenizer), *(own if isinstance(own, list) else [own])} - {None}
    if not ids:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token (eos_token)")
    return sorted(ids)


@contextmanager
def _set_for_sampling(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, and no sampling option that the model brings along; both restored afterwards."""
    from transformers import GenerationConfig

    training, own_settings = model.training, model.generation_config
    if training:  # else no walk through all modules
        model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own_settings
        if training:
            model.train()
