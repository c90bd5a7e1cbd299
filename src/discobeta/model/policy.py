"""The language model of a run: loading, LoRA, and what it says of a response."""

from __future__ import annotations

import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Set
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from discobeta.data.batches import Batch, pack
from discobeta.design.config import RunConfig
from discobeta.errors import UserError, shown, telling
from discobeta.files import read_json, read_mapping, replacing, write_json
from discobeta.identity import check_local, folder_of
from discobeta.seeds import generator, global_stream

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}

LOGIT_CHUNK = 2048
"""Response tokens whose logits exist at the same time: at a vocabulary of 151,936, 1.2 GB in float32."""


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _loading(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, **_hub(config))
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {config.model_name_or_path} has no end-of-sequence token")
    return tokenizer


def load_causal_lm(config: RunConfig) -> PreTrainedModel:
    """The base as a language model, on the CPU, in the dtype that the run asks for."""
    from transformers import AutoModelForCausalLM

    with _loading(config, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path, ignore_mismatched_sizes=True, output_loading_info=True,
            **_hub(config), **_weights(config),
        )  # fmt: skip
    _check_weights(model, config, info)
    if config.flash_attn != "fa2":  # which has no CPU kernels
        _check_head(model, config.model_name_or_path)
        _check_padding(model, config.model_name_or_path)
    return model


def load_scorer(
    config: RunConfig, *, must_have_score: bool = False, key_mapping: dict[str, str] | None = None
) -> PreTrainedModel:
    """The base's trunk with a scalar score, r = w . h (Linear, mostly without bias), read where `scored_at` says.

    A fresh w is normal with standard deviation 1 / sqrt(hidden_size + 1), from a stream of its own
    (Stiennon et al. 2020; Huang et al. 2024, arXiv:2403.17031); one that comes with the model stays.
    key_mapping: pattern -> replacement in the names of the weights in the files.
    """
    from transformers import AutoModelForSequenceClassification

    with _loading(config, "model"), global_stream(config.seed, "unused"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            config.model_name_or_path, num_labels=1, ignore_mismatched_sizes=True, output_loading_info=True,
            key_mapping=key_mapping, **_hub(config), **_weights(config),
        )  # fmt: skip
    name = config.model_name_or_path
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{name}: {type(model).__name__} has no linear `score`")
    if any(key.startswith("score") for key, *_ in info["mismatched_keys"]):
        raise UserError(f"{name} has a `score` of another size than a reward model's, which has one output")
    _check_weights(model, config, info, fresh="score.")
    if config.flash_attn != "fa2":  # which has no CPU kernels
        _check_padding(model, name)
        _check_score(model, name)
    model.score.float()
    if any(key.startswith("score.") for key in info["missing_keys"]):
        if must_have_score:
            raise UserError(f"{name} is no reward model: it has no trained `score`")
        deviation = 1 / math.sqrt(model.score.in_features + 1)
        model.score.weight.data.normal_(0, deviation, generator=generator(config.seed, "score"))
    return model


def add_adapter(model: PreTrainedModel, config: RunConfig, task: str) -> nn.Module:
    """The model with LoRA on its trunk, or as it is for finetuning_type: full.

    task: CAUSAL_LM, or SEQ_CLS, in which case PEFT keeps the score's weights beside the adapter's.
    """
    switch_off_dropout(model)  # the base's; the run's own is lora_dropout
    if config.gradient_checkpointing:
        with telling(f"gradient_checkpointing: {model.config.name_or_path}"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    if config.finetuning_type == "full":
        return model
    if config.adapter_name_or_path:
        return continue_adapter(model, config, task)
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    from discobeta.model.preflight import ALL_LINEAR, experts, linear_layers, lora_layers, words

    layers = linear_layers(model)
    wanted = lora_layers(layers, config.lora_target, model)
    if config.lora_target in ALL_LINEAR:
        targets = {name.rpartition(".")[2] for name in wanted}
        if stacked := experts(model):
            say(
                f"lora_target: {config.lora_target} leaves {', '.join(sorted(stacked))} of "
                f"{model.config.name_or_path} as they are: LoRA is for linear layers, and experts are stacked"
            )
    else:
        targets = words(config.lora_target)
    lora = LoraConfig(
        task_type=task,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=sorted(targets),
        fan_in_fan_out=any(isinstance(layers[name], Conv1D) for name in wanted),
    )
    named = f"lora_target: {', '.join(sorted(targets))}"
    with telling(named), global_stream(config.seed, "adapter"):
        peft_model = adapted(model, lora)
        if lora.target_parameters:  # of some families PEFT takes a name for that of the experts, whatever it names
            raise UserError(
                f"PEFT puts LoRA on the stacked experts ({', '.join(sorted(lora.target_parameters))}) where asked "
                "for these names, and such an adapter is not supported: name other layers, e.g. those of attention"
            )
        return peft_model


def adapted(model: PreTrainedModel, settings: PeftConfig) -> PeftModel:
    """The model with a fresh adapter."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # PEFT finds out by itself which layers keep their weights transposed; says so
        warnings.filterwarnings(
            "ignore", message="fan_in_fan_out is set to|The PEFT config's `base_model_name_or_path`"
        )
        return get_peft_model(model, settings)


def continue_adapter(model: PreTrainedModel, config: RunConfig, task: str) -> nn.Module:
    """The model with the adapter that the run starts from, to be trained on.

    The adapter may come from another kind of run: a reward model usually starts from that of an SFT
    run, whose trunk it shares and whose task it does not.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    from discobeta.model.preflight import check_settings, linear_layers, lora_layers

    folder = start_adapter(config)
    found = adapter_weights(folder)
    layers = linear_layers(model)
    with telling(f"cannot load adapter {folder}"):
        settings = PeftConfig.from_pretrained(str(folder))
        settings.task_type, settings.inference_mode = task, False
        trained_on = settings.base_model_name_or_path
        with global_stream(config.seed, "adapter"):
            peft_model = adapted(model, settings)
        fresh = get_peft_model_state_dict(peft_model)
    may_be_fresh = {name for name in fresh if name.endswith(".score.weight")}
    _check_adapter(folder, found, fresh, may_be_fresh)
    reached = set(peft_model.base_model.targeted_module_names)
    check_settings(config, folder, settings, reached, lora_layers(layers, config.lora_target or "all", model))
    if trained_on and Path(trained_on).name != Path(config.model_name_or_path).name:
        say(
            f"adapter {folder} was trained on {trained_on}, by its own word, and goes on on {config.model_name_or_path}"
        )
    with telling(f"cannot load adapter {folder}"):
        set_peft_model_state_dict(peft_model, fresh | found)
    return peft_model


def load_adapter(model: PreTrainedModel, folder: Path, *, trunk_only: bool = False) -> nn.Module:
    """The model with a finished adapter, frozen.

    trunk_only: it is that of a language model, and this is a scorer, whose trunk is the same.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    found = adapter_weights(folder)
    with telling(f"cannot load adapter {folder}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they are about is checked here
        settings = PeftConfig.from_pretrained(str(folder))
        if trunk_only:
            settings.task_type = None
        peft_model = PeftModel.from_pretrained(model, str(folder), config=settings, ignore_mismatched_sizes=True)
        places = get_peft_model_state_dict(peft_model)
    _check_adapter(folder, found, places)
    return peft_model


def start_adapter(config: RunConfig) -> Path:
    """The folder of the adapter that the run starts from."""
    folder = folder_of(config.adapter_name_or_path, "adapter_config.json", config, "adapter_name_or_path")
    if not (folder / "adapter_config.json").exists():
        inner = folder / "adapter"
        hint = f"; {inner} is one" if (inner / "adapter_config.json").is_file() else ""
        raise UserError(f"adapter_name_or_path: {folder} is no PEFT adapter (it has no adapter_config.json){hint}")
    return folder


PLAIN_LORA = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "eva_config",
        "runtime_config",
    ]
)
"""What an adapter's config may say as it likes: the rest must be PEFT's default, or W + (alpha / r) B A is not what
it computes."""

LORA_VALUES = {
    "r": (lambda r: type(r) is int and r > 0, "a whole number above 0"),
    "lora_alpha": (lambda alpha: type(alpha) in (int, float) and 0 < alpha < math.inf, "a number above 0"),
    "lora_dropout": (lambda rate: type(rate) in (int, float) and 0 <= rate < 1, "a number from 0, below 1"),
    "target_modules": (lambda names: isinstance(names, str | list | set | None), "names of layers, or a pattern"),
    "rank_pattern": (lambda ranks: isinstance(ranks, dict | None), "a mapping"),
    "alpha_pattern": (lambda alphas: isinstance(alphas, dict | None), "a mapping"),
    "base_model_name_or_path": (lambda name: isinstance(name, str | None), "text"),
}
"""What an adapter's config may hold: PEFT asks for some of it only when it computes."""

KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Of init_lora_weights: others (PiSSA, OLoRA, LoftQ, CorDA) change the base's own weights too."""


ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a .safetensors file, or of a .bin file, of which nothing but tensors is read."""
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        with telling(f"cannot read {path}"):
            return load_file(path)
    try:
        found = torch.load(path, "cpu", weights_only=True)
    except Exception:  # torch's message advises to let it run what stands in the file
        found = None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{path} is damaged, or holds more than a model's weights by name")
    return found


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of a plain LoRA adapter. Raises UserError for any other, and for one that is not whole."""
    from peft import LoraConfig

    settings, default = read_mapping(folder / "adapter_config.json"), LoraConfig().to_dict()
    if settings.get("peft_type") != "LORA":
        raise UserError(f"adapter {folder}: peft_type: {shown(settings.get('peft_type'))}: only LORA is supported")
    for name, (is_right, should) in LORA_VALUES.items():
        if not is_right(settings.get(name, default[name])):
            raise UserError(f"adapter {folder}: {name}: {shown(settings[name])} should be {should}")
    for name, value in settings.items():
        if name == "init_lora_weights" and value not in KEEPS_BASE:
            raise UserError(f"adapter {folder} ({name}: {shown(value)}) belongs to a base with other weights")
        if name not in (*PLAIN_LORA, "init_lora_weights") and value and value != default.get(name):
            raise UserError(f"adapter {folder} is no plain LoRA ({name}: {shown(value)}), and no other is supported")
    path = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        others = [other.name for other in sorted(folder.glob("adapter_model*")) if other.is_file()]
        others = f", only {', '.join(others)}" if others else ""
        raise UserError(f"adapter {folder} has no {' and no '.join(ADAPTER_WEIGHTS)}{others}")
    found = read_tensors(path)
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise UserError(f"adapter {folder}: {name} holds integers: quantised adapters are not supported")
        if not tensor.isfinite().all():
            raise UserError(f"adapter {folder}: {name} holds numbers that are not finite (NaN or infinity)")
    return found


def _check_adapter(
    folder: Path, found: dict[str, Tensor], places: dict[str, Tensor], may_be_fresh: Set[str] = frozenset()
) -> None:
    """Refuse an adapter that does not fill its places in the model, one for one."""
    if missing := sorted(places.keys() - found.keys() - may_be_fresh):
        raise UserError(f"adapter {folder} lacks {missing[0]}{and_more(missing)}: its weights are not whole")
    if unknown := sorted(found.keys() - places.keys()):
        raise UserError(f"adapter {folder} does not fit this model, which has no {unknown[0]}{and_more(unknown)}")
    for name, tensor in sorted(found.items()):
        if tensor.shape != places[name].shape:
            raise UserError(
                f"adapter {folder}: {name} is {tuple(tensor.shape)} in its files, and {tuple(places[name].shape)} by "
                "its adapter_config.json in this model"
            )


def use_deterministic_kernels(config: RunConfig) -> None:
    """For `deterministic: true`: kernels that repeat bit for bit on a GPU. To be called before the first one."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def save_model(model: nn.Module, directory: Path) -> None:
    """adapter/ in PEFT's format, or model/ in transformers', with equal bytes for equal weights."""
    folder = directory / ("adapter" if hasattr(model, "peft_config") else "model")
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        description = temporary / "adapter_config.json"
        if description.exists():  # PEFT keeps module names in sets, whose order changes between processes
            settings = read_json(description)
            write_json(description, {k: sorted(v) if isinstance(v, list) else v for k, v in settings.items()})


def load_reference(config: RunConfig) -> nn.Module:
    """What the policy starts from, frozen: the base, with `adapter_name_or_path` if there is one."""
    model = load_causal_lm(config)
    if config.adapter_name_or_path:
        model = load_adapter(model, start_adapter(config))
    return model.eval().requires_grad_(False)


def plain(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model (with the adapter in it), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk(model: nn.Module) -> nn.Module:
    """The model without its output layer: tokens -> last hidden state."""
    inner = plain(model)
    for name in (inner.base_model_prefix, "model"):  # Llama4ForCausalLM names a prefix that it does not have
        if isinstance(body := getattr(inner, name, None), nn.Module):
            return body
    raise UserError(f"{inner.config.name_or_path}: {type(inner).__name__} has no part without its output layer")


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """(N, T, width), the trunk's last hidden state (after its final norm)."""
    body = trunk(model)
    inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids, "use_cache": False}
    taken = inputs.keys() & signature(type(body).forward).parameters.keys()  # no positions for ALiBi, for recurrence
    return body(input_ids=batch.input_ids, **{name: inputs[name] for name in inputs if name in taken}).last_hidden_state


def width(model: nn.Module) -> int:
    """The size of a state of `hidden_states`: mostly the config's hidden_size, but not where a trunk ends in a
    projection (OPT-350m) or a config is one of several models (text and images)."""
    inner = plain(model)
    return (inner.score if hasattr(inner, "score") else inner.get_output_embeddings()).weight.shape[1]


AFTER_OUTPUT_LAYER: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "lm_head_multiplier": lambda logits, scale: logits * scale,  # Falcon-H1
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
    "final_logit_softcapping": lambda logits, cap: cap * torch.tanh(logits / cap),  # Gemma 2
    "logits_soft_cap": lambda logits, cap: cap * torch.tanh(logits / cap),  # RecurrentGemma
}
"""What a model does to its logits by its config. That this is all it does is what `_check_head` checks."""


def logits_of(model: nn.Module, states: Tensor) -> Tensor:
    """(..., vocabulary) float32 logits of (..., width) states."""
    inner = plain(model)
    logits, config = inner.get_output_embeddings()(states).float(), inner.config.get_text_config()
    for name, change in AFTER_OUTPUT_LAYER.items():
        if isinstance(value := getattr(config, name, None), int | float) and value != 1:
            logits = change(logits, value)
    return logits


def token_logps(
    model: nn.Module, hidden: Tensor, batch: Batch, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(M,) float32 log pi(y_t | x, y_<t) of each response token; on demand the entropy there, without gradient.

    Both in nats, of softmax(logits / temperature). The output layer is applied only where a response
    token is predicted, a chunk at a time; the backward pass computes a chunk's logits again instead
    of keeping them.
    """
    states = hidden.flatten(0, 1)[batch.predictor_index]

    def of_chunk(part: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = logits_of(model, part)
        if temperature != 1:
            logits = logits / temperature
        log_sum, entropy = logits.logsumexp(-1), None
        if with_entropy:
            with torch.no_grad():
                entropy = log_sum - (logits.softmax(-1) * logits).sum(-1)
        return logits.gather(-1, targets[:, None]).squeeze(-1) - log_sum, entropy

    parts = list(zip(states.split(LOGIT_CHUNK), batch.target_ids.split(LOGIT_CHUNK), strict=True))
    if len(parts) == 1 or not torch.is_grad_enabled():
        values = [of_chunk(*part) for part in parts]
    else:
        values = [checkpoint(of_chunk, *part, use_reentrant=False) for part in parts]
    logps, entropies = zip(*values, strict=True)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def response_logps(model: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
    """(N,) float32, log pi(y|x): log-probabilities summed over the response tokens, in nats."""
    return per_sequence(token_logps(model, hidden, batch)[0], batch)


def per_sequence(values: Tensor, batch: Batch) -> Tensor:
    """(N,) float32 sums of (M,) values over the tokens of each response."""
    sums = torch.zeros(len(batch.input_ids), dtype=torch.float32, device=values.device)
    return sums.index_add(0, batch.sequence_index, values)


def at(hidden: Tensor, positions: Tensor) -> Tensor:
    """(N, hidden_size) float32, the state at one position of each sequence."""
    return hidden[torch.arange(len(hidden), device=hidden.device), positions].float()


def scored_at(model: nn.Module, batch: Batch) -> Tensor:
    """(N,) where a score is read: at the last token that is not the pad_token_id of the model's config.

    It is where transformers' classifiers read it, so the same weights give the same score there. That is the last
    response token, unless this is the pad: where <pad> is <eos>, it is the token before.
    """
    pad = plain(model).config.get_text_config().pad_token_id
    if pad is None:
        return batch.response_end
    place = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    counts = (place <= batch.response_end[:, None]) & (batch.input_ids != pad)
    return (place * counts).argmax(1)


def pooled(hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
    """(N, hidden_size) float32: the state at the last response token, or the mean over the response."""
    if pooling == "last":
        return at(hidden, batch.response_end)
    weights = batch.response_mask / batch.response_mask.sum(1, keepdim=True)
    return torch.einsum("nt,nth->nh", weights, hidden.float())


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


def share_frozen_weights(*models: nn.Module) -> None:
    """Keep one copy of every frozen weight that several models hold: policy, critic, reward model and
    reference mostly stand on the same base, and only adapters tell them apart.

    Weights that are trained, or that differ in one bit, stay apart.
    """
    kept: dict[tuple, list[nn.Parameter]] = {}
    for model in models:
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.requires_grad:
                    continue
                start = tuple(weight.detach().flatten()[:8].tolist())
                alike = kept.setdefault((weight.shape, weight.dtype, weight.device, start), [])
                same = next((other for other in alike if other is weight or torch.equal(other, weight)), None)
                if same is None:
                    alike.append(weight)
                else:
                    setattr(module, name, same)


def _hub(config: RunConfig) -> dict:
    return {
        "cache_dir": config.cache_dir,
        "revision": config.model_revision,
        "trust_remote_code": config.trust_remote_code,
    }


def _weights(config: RunConfig) -> dict:
    """A frozen base may be stored in bf16; weights that are trained stay float32 under autocast."""
    frozen = config.finetuning_type == "lora"
    dtype = torch.bfloat16 if config.bf16 and frozen else torch.float32
    return {"dtype": dtype, "attn_implementation": ATTENTION[config.flash_attn]}


@contextmanager
def _loading(config: RunConfig, what: str):
    """Whatever goes wrong while a model or a tokenizer is loaded is one line that names it."""
    name = config.model_name_or_path
    check_local(name, "model_name_or_path")
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would say of weights is checked here: `_check_weights`
    logging.disable_progress_bar()  # of reading weights, which would stand between ours
    try:
        with telling(f"cannot load the {what} {name}"):
            yield
    except UserError as error:
        if absent := re.search(r"(\w+)Config'> for this kind of AutoModel: AutoModel(\w+)\.", str(error.__cause__)):
            raise UserError(
                f"{name}: transformers has no {''.join(absent.groups())}, which stage {config.stage} would train"
            ) from None
        if not config.trust_remote_code and "trust_remote_code" in str(error.__cause__):
            raise UserError(
                f"{name} comes with code of its own, which runs only if you say so: trust_remote_code: true in your "
                "run config, --trust-remote-code for `discobeta evaluate`"
            ) from None
        raise
    finally:
        logging.set_verbosity(verbosity)


def _set_aside(model: PreTrainedModel) -> None:
    """What a config.json may say of a pass that asks for nothing: here a pass asks for states, and nothing else."""
    model.config.return_dict = True
    model.config.output_hidden_states = model.config.output_attentions = False


def _check_weights(model: PreTrainedModel, config: RunConfig, info: dict, *, fresh: str = "") -> None:
    """Refuse a model some of whose weights are not as in its files: absent, left over, of another size, integers, NaN.

    info: transformers' loading info. fresh: prefix of weights that may be new. What is left over counts if the trunk
    would compute with it (a layer more than config.json says); another head than the one in use does not.
    """
    name = config.model_name_or_path
    _set_aside(model)
    missing = sorted(key for key in info["missing_keys"] if not (fresh and key.startswith(fresh)))
    if missing:
        raise UserError(f"{name} lacks the weight {missing[0]}{and_more(missing)}: its files are not whole")
    for key, *shapes in sorted(info["mismatched_keys"], key=str):
        found, wanted = (tuple(shape) for shape in shapes)
        raise UserError(f"{name}: the weight {key} is {found} in its files, and {wanted} by its config.json")
    prefix, body = model.base_model_prefix, {child for child, _ in trunk(model).named_children()}
    extra = sorted(
        key for key in info["unexpected_keys"] if key.startswith(f"{prefix}.") or key.partition(".")[0] in body
    )
    if extra:
        raise UserError(f"{name} has the weight {extra[0]}{and_more(extra)}, for which its config.json has no place")
    if integer := _integer_weight(folder_of(name, "config.json", config, "model_name_or_path")):
        raise UserError(f"{name}: the weight {integer} holds integers: quantised bases are not supported")
    if bad := non_finite(model):
        raise UserError(f"{name}: the weight {bad} holds numbers that are not finite (NaN or infinity)")


def say(line: str) -> None:
    """One line to the user, of the process that speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print(f"discobeta: {line}", file=sys.stderr)


def and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _integer_weight(folder: Path) -> str | None:
    """The first weight of the folder's files that is not stored in floating point; transformers casts it in silence."""
    from safetensors import safe_open

    if not any(folder.glob("model*.safetensors")):
        for path in sorted(folder.glob("pytorch_model*.bin")):
            for name, tensor in read_tensors(path).items():
                if not tensor.is_floating_point() and name.endswith("weight"):
                    return name
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                is_floating = tensors.get_slice(name).get_dtype().removeprefix("B").startswith("F")
                if not is_floating and name.endswith("weight"):
                    return name
    return None


@torch.no_grad()
def non_finite(model: nn.Module) -> str | None:
    """The first weight that holds NaN or infinity. A sum is not finite if one of its terms is not, and is quicker."""
    for name, weight in model.named_parameters():
        if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
            return name
    return None


@torch.no_grad()
def _check_head(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits are not `logits_of` its trunk's last state."""
    ids = torch.tensor([[1, 2, 3]])
    with telling(f"{name}: {type(model).__name__} cannot be used as a language model here"):
        expected = model(ids).logits
        actual = logits_of(model, trunk(model)(ids).last_hidden_state)
    near = max(1e-3, 4 * torch.finfo(model.dtype).eps)  # what it does to them it does in its own dtype
    if not torch.allclose(expected.float(), actual, rtol=near, atol=near):
        raise UserError(
            f"{name}: {type(model).__name__} changes its last state before the output layer, or its logits after it, "
            "in a way that is not known here"
        )


@torch.no_grad()
def _check_padding(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that says something else of a text in training, or with padding behind it, than of it alone: one
    that looks ahead, counts positions in a way of its own, lets the rows of a batch compete, or draws at random.

    || h_padded - h || < sqrt(eps) || h ||, eps being the distance of two numbers near 1 in the model's dtype.
    """
    text, longer = np.array([1, 2, 3]), np.array([1, 2, 3, 4, 5, 4])
    batch = pack([text[:2], longer[:2]], [text[2:], longer[2:]])
    with telling(f"{name}: {type(model).__name__} cannot be used here"), torch.random.fork_rng(devices=[]):
        alone = trunk(model)(batch.input_ids[:1, : len(text)]).last_hidden_state.float()
        switch_off_dropout(model)
        padded = hidden_states(model.train(), batch)[:1, : len(text)].float()
        model.eval()
    if not (padded - alone).norm() < torch.finfo(model.dtype).eps ** 0.5 * alone.norm():
        raise UserError(
            f"{name}: {type(model).__name__} says something else of a text in training, or with padding behind it, "
            "than of the text alone: it looks ahead, counts positions in a way of its own, or draws at random"
        )


@torch.no_grad()
def _check_score(model: PreTrainedModel, name: str) -> None:
    """Refuse a classifier whose logits are not score(trunk(x)) at the token that `scored_at` says."""
    pad = model.config.get_text_config().pad_token_id
    last = 3 if pad is None or not 0 <= pad < model.get_input_embeddings().num_embeddings else pad
    with telling(f"{name}: {type(model).__name__} cannot be used as a reward model here"):
        for ids in (torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, last]])):
            place = max((i for i in range(3) if ids[0, i] != pad), default=0)
            expected = model(ids).logits
            actual = model.score(trunk(model)(ids).last_hidden_state)[:, place]
            if not torch.allclose(expected.float(), actual.float(), rtol=1e-3, atol=1e-3):
                raise UserError(f"{name}: {type(model).__name__} does not score the last token's state; not supported")
