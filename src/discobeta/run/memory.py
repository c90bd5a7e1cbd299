"""The peak of a GPU's memory that a run will need, from shapes alone: its own code on tensors without values.

Weights, their gradients, the optimiser's states and one forward and backward pass go by on torch's fake tensors, and
the bytes of the storages that are alive are added up, each rounded up to 512 as CUDA's allocator does. What is not in
it: the CUDA context, cuBLAS's workspaces, fragmentation; see `RESERVED`. No GPU and no compiler is needed, no weight
is read, and a model of .6 billion parameters takes some ten seconds.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from discobeta.data.batches import Pairs, PerToken
from discobeta.data.rows import Rows
from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.errors import UserError, telling
from discobeta.method.optim import optimizer_of
from discobeta.method.stage import Stage, stage_class
from discobeta.model import kernels
from discobeta.model.attention import OBEYS
from discobeta.model.forward import logits_of, trunk, unwrapped, width
from discobeta.model.layout import pairs_for
from discobeta.run.flops import SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from discobeta.design.study import Study

RESERVED = 0.1, 1e9
"""Share of the peak and bytes that are kept free beside it: fragmentation, context, workspaces. A judgement."""


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most that there have been. A number that the host asks
    of a tensor without values is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def attention_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's scaled_dot_product_attention by the kernels of a GPU: flash attention, or with a mask, and in float32,
    the memory-efficient one. Both keep one number a row for the backward pass, and no (T, T) weights."""
    aten = torch.ops.aten
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    keeps = torch.is_grad_enabled() and query.requires_grad
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
    )[0]


class NormOnGPU(torch.autograd.Function):
    """torch's rms_norm by the one kernel of a GPU, which keeps its input and one number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def norm_on_gpu(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return NormOnGPU.apply(input, weight)


@contextmanager
def counting() -> Iterator[Peak]:
    """In it, what is made has no values, and its bytes are counted, as those of a GPU's kernels."""
    import transformers.utils.import_utils as of_transformers

    replaced = [
        (nn.functional, "scaled_dot_product_attention", attention_on_gpu),
        (nn.functional, "rms_norm", norm_on_gpu),
        (kernels, "on_gpu", lambda tensor: True),
        (of_transformers, "is_fake_tensor", lambda tensor: False),  # or its masks are others than those of a run
    ]
    of_torch = logging.getLogger("torch._subclasses.fake_tensor")  # which prints the trace of what it then raises
    with ExitStack() as stack:
        stack.callback(of_torch.setLevel, of_torch.level)
        of_torch.setLevel(logging.CRITICAL)
        for owner, name, other in replaced:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, other)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Peak())


def architecture_of(study: Study) -> PreTrainedConfig:
    """The config.json of the study's base, of which nothing else is read, or what is known of it (`SHAPES`), or what it
    will be where it is yet to be trained (with as many words as `vocab_size` of `base: sft:` says)."""
    from transformers import AutoConfig

    from discobeta.inputs.base import FROM_TOKENIZER, build_architecture

    base = study.base_config() if study.sft else None
    if base and base.model_type and not (study.base_of(study.draws()[0]) / "config.json").exists():

        class Words(SimpleNamespace):
            def __len__(self) -> int:
                return base.vocab_size

        return build_architecture(base.model_type, base.config_overrides, Words(**dict.fromkeys(FROM_TOKENIZER[1:], 0)))
    config = study.config(study.largest_runs()[0])
    name = config.model_name_or_path
    try:
        with telling(f"--memory: cannot read the config of {name}"):
            return AutoConfig.from_pretrained(
                name, revision=config.model_revision, cache_dir=config.cache_dir,
                trust_remote_code=config.trust_remote_code,
            )  # fmt: skip
    except UserError:
        if name not in SHAPES:
            raise
        return AutoConfig.for_model(**SHAPES[name])


def shell(config: RunConfig, architecture: PreTrainedConfig) -> Stage:
    """The run's stage on torch's `meta` device, its adapter fresh."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from discobeta.method.ppo import ValueHead
    from discobeta.model.adapters import add_adapter
    from discobeta.model.pretrained import weight_arguments

    kind, is_scorer = stage_class(config.stage), stage_class(config.stage).task == "SEQ_CLS"
    adapter = {
        "adapter_name_or_path": None,
        "lora_rank": config.lora_rank or 8,
        "lora_target": config.lora_target or "all",
    }
    fresh = config.replace(**adapter, lora_dropout=config.lora_dropout or 0.0)
    architecture = deepcopy(architecture)
    if is_scorer:
        architecture.num_labels = 1
    maker = AutoModelForSequenceClassification if is_scorer else AutoModelForCausalLM
    with torch.device("meta"), telling(f"--memory: {config.model_name_or_path}"):
        model = kernels.fuse_norms(maker.from_config(architecture, **weight_arguments(config)))
        if is_scorer:
            model.score.float()
        model = add_adapter(model, fresh, kind.task)
        columns = {"prompt_features": torch.zeros(2, width(model))}
        stage = kind(config, model, kind.fresh_heads(config, model, columns, {}))
        if not STAGES[config.stage].has_pairs:
            stage.value_head = ValueHead(width(model), None)
            stage.freeze_unused()
    return stage.train()


def materialise(module: nn.Module) -> None:
    """Every tensor of the module in memory that is counted; what is one tensor in it stays one."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module.modules():
        for place in (part._parameters, part._buffers, vars(part)):
            for name, tensor in [(name, value) for name, value in place.items() if isinstance(value, Tensor)]:
                if id(tensor) not in moved:
                    there = torch.empty_like(tensor, device="cpu", requires_grad=False)
                    is_weight = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = tensor, nn.Parameter(there, tensor.requires_grad) if is_weight else there
                place[name] = moved[id(tensor)][1]


def fullest(longest: int, config: RunConfig) -> tuple[int, int]:
    """Rows of the pass of an optimiser step with the most tokens that there can be, and tokens of each.

    longest: tokens that a row has at most. Somewhat shorter rows fill `tokens_per_pass`, where so many of the longest
    would leave room for a part of one; a single row may be longer than it.
    """
    of_a_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rows = min(of_a_step, -(-config.tokens_per_pass // longest))
    return rows, longest if rows == 1 else min(longest, config.tokens_per_pass // rows)


def fullest_pairs(stage: Stage, config: RunConfig, hidden_size: int) -> Pairs:
    """The pairs of one optimiser step, all as long as those of the fullest pass. Prompts are one token: the row of a
    shared prompt is the longer, the less of cutoff_len it takes from each response."""
    count = config.per_device_train_batch_size * config.gradient_accumulation_steps
    columns = {"reference_logps": torch.zeros(count, 2), "prompt_features": torch.zeros(count, hidden_size)}
    if config.beta_rule == "mallows":
        columns["entropy"] = torch.zeros(count)
    OBEYS[unwrapped(stage.model)] = True  # which a model without values cannot be asked

    def rows(tokens: int) -> Rows:
        """tokens: of each response."""
        prompts, responses = (np.ones((count, size), np.int32) for size in (1, tokens))
        return Rows(prompts, responses, responses)

    longest = pairs_for(stage.model, config, rows(config.cutoff_len - 1), columns)
    _, places = fullest(int(longest.places[0]), config)
    of_prompts = 1 if longest.shared else 2
    return Pairs(rows(max(1, (places - of_prompts) // 2)), columns, shared=longest.shared)


def fullest_responses(config: RunConfig, hidden_size: int) -> Any:
    """The responses of the fullest pass of ppo, each of max_new_tokens to a prompt of up to cutoff_len."""
    from discobeta.method.ppo import Rollouts

    count, length = fullest(config.cutoff_len + config.max_new_tokens, config)
    sizes = np.full(count, min(config.max_new_tokens, length - 1))
    prompts, responses = (np.ones((count, size), np.int64) for size in (length - sizes[0], sizes[0]))
    shapes = dict.fromkeys(("logps", "values", "returns", "advantages"), ()) | {"states": (hidden_size,)}
    columns = {name: PerToken(torch.zeros(sizes.sum(), *shape), sizes) for name, shape in shapes.items()}
    return Rollouts(prompts, responses, columns)


def first_pass(stage: Stage, config: RunConfig) -> Any:
    """The batch of the first forward pass of an optimiser step, on rows that fill it."""
    hidden_size = width(stage.model)
    if STAGES[config.stage].has_pairs:
        pairs = fullest_pairs(stage, config, hidden_size)
        alone = SimpleNamespace(process_index=0, num_processes=1, reduce=lambda values, reduction: values)
        work = stage.collect(0, pairs, stage.schedule(pairs, 1), alone)
        return work.material.batch(work.minibatches[0][0])
    OBEYS[unwrapped(stage.model)] = True
    rows = fullest_responses(config, hidden_size)
    return rows.batch(np.arange(len(rows.prompts)))


def peaks(config: RunConfig, architecture: PreTrainedConfig) -> dict[str, int]:
    """Bytes at the peak, by what is done: `training`, and where the policy is sampled from, `sampling`; and `weights`,
    what is there all the time: weights, gradients, the optimiser's states.

    ppo: with reward models on the same base, so that what is frozen is there once. A policy is sampled from beside its
    reference. Raises UserError where the model does not go through without values.
    """
    stage = shell(config, architecture)
    found = {}
    with telling("cannot be worked out"), counting() as peak:
        materialise(stage.model)
        base = peak.live
        for part in stage.children():
            if part is not stage.model:
                materialise(part)
        optimizer = optimizer_of(stage.parameter_groups(), config)
        trained = [weight for group in optimizer.param_groups for weight in group["params"]]
        beside = others_of(config, base, stage.model_parameters())
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        found["weights"] = peak.live + beside
        peak.most = peak.live
        batch = first_pass(stage, config)
        stage(batch)[0].sum().backward()
        found["training"] = peak.most + beside
        del batch
        if count := most_sampled(config):
            optimizer.zero_grad(set_to_none=True)  # as after each step of training
            if STAGES[config.stage].has_pairs:  # it is sampled from when it is finished, beside its reference
                optimizer.state.clear()
                beside = base if config.finetuning_type == "full" else 0
            found["sampling"] = sampling(stage, config, count, peak) + beside
    return found


def others_of(config: RunConfig, base: int, adapter: list[nn.Parameter]) -> int:
    """Bytes of the models that ppo holds beside its policy: with LoRA they share the base, and each reward model has an
    adapter of its own; without it reference and reward models are whole."""
    if STAGES[config.stage].has_pairs:
        return 0
    if config.finetuning_type == "full":
        return (1 + len(config.reward_models)) * base
    return len(config.reward_models) * sum(weight.numel() * weight.element_size() for weight in adapter)


def most_sampled(config: RunConfig) -> int:
    """Responses that are sampled at once, at most; 0 of a run that samples none."""
    row = STAGES[config.stage]
    if not row.is_policy:
        return 0
    at_once = [config.num_eval_generations]  # several to a prompt are sampled one after the other
    if not row.has_pairs:
        from discobeta.method.ppo import SCORED_FOR_SCALE

        of_a_minibatch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        at_once += [of_a_minibatch * config.ppo_buffer_size, SCORED_FOR_SCALE if config.ppo_score_norm else 0]
    return min(8 * config.per_device_eval_batch_size, max(at_once))


@torch.no_grad()
def sampling(stage: Stage, config: RunConfig, count: int, peak: Peak) -> int:
    """The peak while `count` responses are sampled: prompts of cutoff_len are read, then max_new_tokens drawn, one by
    one."""
    from discobeta.model.generation import InverseCDF

    prompt = config.cutoff_len
    stage.eval()
    peak.most = peak.live
    ids, body = torch.zeros(count, prompt, dtype=torch.int64), trunk(stage.model)
    draw = InverseCDF(np.zeros((count, 1)), prompt, config.temperature, config.top_p, config.top_k)
    with stage.autocast():
        read = body(input_ids=ids, use_cache=True)
        draw(ids, logits_of(stage.model, read.last_hidden_state[:, -1]))
        cache, reading = getattr(read, "past_key_values", None), peak.most
        del read
        if cache is None:  # a recurrent state, whose size does not grow
            return reading
        before = peak.live
        peak.most = peak.live
        step = body(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        draw(ids, logits_of(stage.model, step.last_hidden_state[:, -1]))
        del step
        one = peak.live - before  # of keys and values, by which a token more makes the cache larger
    return max(reading, peak.most + one * (config.max_new_tokens - 1))


def fits(peak: float, card: float) -> bool:
    share, size = RESERVED
    return peak * (1 + share) + size <= card


def report(study: Study, card: float | None) -> list[str]:
    """Lines: the peak of each run by what it does, whether it fits a card of `card` bytes, and what would."""
    configs, architecture = map(study.config, study.largest_runs()), architecture_of(study)
    lines = ["Peak of a GPU's memory, GB, from the code and the shapes (rows as long as cutoff_len allows):"]
    for config in configs:
        try:
            found = peaks(config, architecture)
        except UserError as error:  # of a kind of model that does not go through without values
            lines.append(f"  {config.stage}: {error}")
            continue
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in found.items() if name != "weights")
        line = f"  {config.stage}: {parts} (of which weights and optimiser {found['weights'] / 1e9:.1f})"
        if card is None:
            lines.append(line)
            continue
        parts = [name for name in found if not fits(found[name], card)]
        parts = ["weights"] if "weights" in parts else parts  # the rest follows
        lines.append(f"{line}: {'does not fit' if parts else 'fits'} {card / 1e9:.0f} GB")
        lines += [f"    {advice}" for name in parts for advice in advice_for(name, config, architecture, card)]
    share, size = RESERVED
    if card is not None:
        lines.append(f"  What fits leaves {share:.0%} and {size / 1e9:.0f} GB free for what is not counted.")
    return lines


def advice_for(part: str, config: RunConfig, architecture: PreTrainedConfig, card: float) -> Iterator[str]:
    if part == "weights":
        yield "even the weights do not: a smaller base, or finetuning_type: lora with bf16"
    elif part == "sampling":
        for size in smaller(config.per_device_eval_batch_size):
            need = peaks(config.replace(per_device_eval_batch_size=size), architecture)["sampling"]
            if fits(need, card):
                yield f"per_device_eval_batch_size: {size} would ({need / 1e9:.1f})"
                return
        yield "sampling does not at any batch size: lower max_new_tokens or cutoff_len"
    else:
        for changes in cures(config):
            try:
                need = peaks(config.replace(**changes), architecture)["training"]
            except UserError:  # not every model can be checkpointed
                continue
            if fits(need, card):
                named = ", ".join(f"{key}: {value}" for key, value in changes.items()).replace("True", "true")
                yield f"{named} would ({need / 1e9:.1f})"
                return
        yield "training does not in passes of one pair with gradient_checkpointing: lower cutoff_len"


def smaller(number: int) -> list[int]:
    """Half of it, half of that, down to 1."""
    halves = []
    while number > 1:
        number //= 2
        halves.append(number)
    return halves


def cures(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Changes that lower training's peak, the cheapest in time first: smaller passes, then checkpointing."""
    row = (2 if STAGES[config.stage].has_pairs else 1) * config.cutoff_len
    passes = [{"tokens_per_pass": n} for n in smaller(config.tokens_per_pass) if n >= row]
    yield from passes
    if not config.gradient_checkpointing:
        for one in ({}, *passes):
            yield {"gradient_checkpointing": True} | one
