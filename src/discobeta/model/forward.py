"""What a language model says of a response: states, log-probabilities, and where they are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from discobeta.data.batches import Batch
from discobeta.errors import UserError
from discobeta.model.attention import mask_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LOGITS_AT_ONCE = 2**26
"""Logits that exist at the same time: 256 MB in float32, or 441 response tokens at a vocabulary of 151,936. What is
computed from them takes two more of this size for a moment, and half of one before they are float32."""


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model (with the adapter in it), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk(model: nn.Module) -> nn.Module:
    """The model without its output layer: tokens -> last hidden state."""
    inner = unwrapped(model)
    for name in (inner.base_model_prefix, "model"):  # Llama4ForCausalLM names a prefix that it does not have
        if isinstance(body := getattr(inner, name, None), nn.Module):
            return body
    raise UserError(f"{inner.config.name_or_path}: {type(inner).__name__} has no part without its output layer")


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """(R, T, width), the trunk's last hidden state (after its final norm)."""
    body = trunk(model)
    inputs = {
        "attention_mask": mask_of(unwrapped(model), batch),
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    taken = _arguments_of(type(body))  # no positions for ALiBi, for recurrence
    return body(input_ids=batch.input_ids, **{name: inputs[name] for name in inputs if name in taken}).last_hidden_state


@cache
def _arguments_of(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(signature(kind.forward).parameters)


def width(model: nn.Module) -> int:
    """The size of a state of `hidden_states`: mostly the config's hidden_size, but not where a trunk ends in a
    projection (OPT-350m) or a config is one of several models (text and images)."""
    inner = unwrapped(model)
    return (inner.score if hasattr(inner, "score") else inner.get_output_embeddings()).weight.shape[1]


AFTER_OUTPUT_LAYER: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "lm_head_multiplier": lambda logits, scale: logits * scale,  # Falcon-H1
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
    "final_logit_softcapping": lambda logits, cap: cap * torch.tanh(logits / cap),  # Gemma 2
    "logits_soft_cap": lambda logits, cap: cap * torch.tanh(logits / cap),  # RecurrentGemma
}
"""What a model does to its logits by its config. That this is all it does is what `check_output_layer` checks."""


def logits_of(model: nn.Module, states: Tensor) -> Tensor:
    """(..., vocabulary) float32 logits of (..., width) states."""
    inner = unwrapped(model)
    logits, config = inner.get_output_embeddings()(states).float(), inner.config.get_text_config()
    for name, change in AFTER_OUTPUT_LAYER.items():
        if isinstance(value := getattr(config, name, None), int | float) and value != 1:
            logits = change(logits, value)
    return logits


class _Selected(torch.autograd.Function):
    """(M,) log softmax(logits)[target] of (M, V) float32 logits, and on demand (M,) the entropy of softmax(logits),
    without gradient: log sum(w) - sum(w d) / sum(w) with d = logits - max, w = exp(d).

    One exponential for all of it. Whoever made the logits has no more use for them: they become w, or w d, and
    without entropy there is no second tensor of this size. d/d logits = one_hot(target) - softmax(logits).
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        largest = logits.amax(-1, keepdim=True)
        chosen = logits.gather(-1, targets[:, None]) - largest
        below = logits.sub_(largest)
        weights = below.exp() if with_entropy else below.exp_()
        total = weights.sum(-1, keepdim=True)
        entropy = None
        if with_entropy:
            entropy = (total.log() - below.mul_(weights).sum(-1, keepdim=True) / total).squeeze(-1)
            ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(weights, targets, total)
        return (chosen - total.log()).squeeze(-1), entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
        weights, targets, total = ctx.saved_tensors
        grad = grad[:, None]
        return weights.mul_(-grad / total).scatter_add_(-1, targets[:, None], grad), None, None


def token_logps(
    model: nn.Module, hidden: Tensor, batch: Batch, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(M,) float32 log pi(y_t | x, y_<t) of each response token; on demand the entropy there, without gradient.

    Both in nats, of softmax(logits / temperature). The output layer is applied only where a response
    token is predicted, LOGITS_AT_ONCE at a time; if these are not all, the backward pass computes
    them again instead of keeping them.
    """
    states = hidden.flatten(0, 1).index_select(0, batch.predictor_index)
    size = max(1, LOGITS_AT_ONCE // unwrapped(model).get_output_embeddings().weight.shape[0])

    def of_chunk(part: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = logits_of(model, part)
        return _Selected.apply(logits if temperature == 1 else logits / temperature, targets, with_entropy)

    parts = list(zip(states.split(size), batch.target_ids.split(size), strict=True))
    if len(parts) == 1 or not torch.is_grad_enabled():
        values = [of_chunk(*part) for part in parts]
    else:
        values = [checkpoint(of_chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    logps, entropies = zip(*values, strict=True)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def response_logps(model: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
    """(N,) float32, log pi(y|x): log-probabilities summed over the response tokens, in nats."""
    return per_sequence(token_logps(model, hidden, batch)[0], batch)


def per_sequence(values: Tensor, batch: Batch) -> Tensor:
    """(N, ...) float32 sums of (M, ...) values over the tokens of each response."""
    sums = torch.zeros(batch.responses, *values.shape[1:], dtype=torch.float32, device=values.device)
    return sums.index_add(0, batch.sequence_index, values)


def state_at(hidden: Tensor, places: Tensor) -> Tensor:
    """(N, hidden_size) float32, the states at N places of a batch."""
    return hidden.flatten(0, 1).index_select(0, places).float()


def score_place(model: nn.Module, batch: Batch) -> Tensor:
    """(N,) where a score is read: at the last token that is not the pad_token_id of the model's config.

    It is where transformers' classifiers read it, so the same weights give the same score there. That is the last
    response token, unless this is the pad: where <pad> is <eos>, it is the token before.
    """
    pad = unwrapped(model).config.get_text_config().pad_token_id
    if pad is None:
        return batch.response_end
    width = batch.input_ids.shape[1]
    row, end, prompt_end = batch.response_end // width, batch.response_end % width, batch.prompt_end % width
    place = torch.arange(width, device=row.device)
    begin = end + 1 - batch.response_lengths
    is_own = (place <= prompt_end[:, None]) | ((place >= begin[:, None]) & (place <= end[:, None]))
    return row * width + (place * (is_own & (batch.input_ids[row] != pad))).argmax(1)


def pooled(hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
    """(N, hidden_size) float32: the state at the last response token, or the mean over the response."""
    if pooling == "last":
        return state_at(hidden, batch.response_end)
    return per_sequence(state_at(hidden, batch.target_index), batch) / batch.response_lengths[:, None]


def switch_off_dropout(model: nn.Module) -> None:
    """Make training mode compute what evaluation mode does: in modules of dropout, and where a model calls the
    function with a rate of its own (OPT's `self.dropout` and `layerdrop`, the `attention_dropout` of many, a router's
    `jitter_noise`)."""
    for module in model.modules():
        rates = (
            {"p"}
            if isinstance(module, nn.Dropout)
            else {name for name in vars(module) if "drop" in name or "jitter" in name}
        )
        for name in rates:
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)


def share_frozen_weights(*models: nn.Module, device: torch.device | None = None) -> None:
    """Keep one copy of every frozen weight that several models hold: policy, critic, reward model and
    reference mostly stand on the same base, and only adapters tell them apart.

    Weights that are trained, or that differ in one bit, stay apart. device: where frozen weights are brought, one after
    the other, so that there is never a second copy of a model; by default they stay where they are.
    """
    kept: dict[tuple, list[Tensor]] = {}
    for model in models:
        for module in model.modules():
            for name, own in module.named_parameters(recurse=False):
                if own.requires_grad:
                    continue
                weight = own if device is None else own.to(device)
                start = tuple(weight.detach().flatten()[:8].tolist())
                alike = kept.setdefault((weight.shape, weight.dtype, weight.device, start), [])
                same = next((other for other in alike if other is weight or torch.equal(other, weight)), None)
                if same is None:
                    same = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
                    alike.append(same)
                if same is not own:
                    setattr(module, name, same)


CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "max_seq_length")
"""What configs call the number of positions. BLOOM's `seq_length` is none: it says how long training's texts were."""


def vocabulary_size(model: nn.Module) -> int:
    """How many token ids the model has an embedding for."""
    return unwrapped(model).get_input_embeddings().weight.shape[0]


def name_of(model: nn.Module) -> str:
    return unwrapped(model).config.name_or_path or type(unwrapped(model)).__name__


BY_THE_PASS = {"dynamic", "longrope"}
"""Kinds of rotary scaling whose angles transformers chooses for all rows of a pass, by the largest position in it."""


def context_of(config: PreTrainedConfig) -> int | None:
    """Positions that the model has, or was trained on, prompt and response together; None where nothing says so.

    Beyond it a learned table ends in an error; rotary positions compute on, with angles that no training has seen,
    and are refused all the same: the log-probabilities would be of no use. What a rotary scaling adds (YaRN, linear)
    counts, unless the longest sequence of a pass decides its angles (`BY_THE_PASS`): what such a model says of a text
    beyond its original context, or beside one, depends on how rows are cut into passes. ALiBi has no limit.
    """
    config = config.get_text_config()
    if getattr(config, "alibi", False):
        return None
    sizes = (getattr(config, name, None) for name in CONTEXTS)
    context = next((value for value in sizes if isinstance(value, int) and value > 0), None)
    if context is None:
        return None
    scalings = [getattr(config, name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    scalings += [part for scaling in scalings for part in scaling.values() if isinstance(part, dict)]  # per layer type
    by_the_pass = [scaling for scaling in scalings if {scaling.get("rope_type"), scaling.get("type")} & BY_THE_PASS]
    if by_the_pass:
        named = [scaling.get("original_max_position_embeddings") for scaling in (*by_the_pass, vars(config))]
        return min([context, *filter(None, named)])
    scaled = [
        int(scaling["factor"] * (scaling.get("original_max_position_embeddings") or context))
        for scaling in scalings
        if isinstance(scaling.get("factor"), int | float)
    ]
    return max([context, *scaled])


def check_context(model: nn.Module, longest_prompt: int, max_new_tokens: int) -> None:
    """Refuse prompts that do not leave the model room for a response."""
    context = context_of(unwrapped(model).config)
    if context and longest_prompt + max_new_tokens > context:
        raise UserError(
            f"a prompt of {longest_prompt} tokens and max_new_tokens: {max_new_tokens} do not fit into the context of "
            f"{context} tokens of {unwrapped(model).config.name_or_path}: lower cutoff_len or max_new_tokens"
        )
