"""Models and tokenizers from their files, and back into files: loading, and what is compared when it is done."""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from discobeta.data.batches import pack
from discobeta.design.config import RunConfig
from discobeta.errors import UserError, and_more, telling
from discobeta.files import read_json, replacing, write_json
from discobeta.identity import check_local, folder_of
from discobeta.model.adapters import load_adapter, read_tensors, start_adapter
from discobeta.model.forward import hidden_states, logits_of, switch_off_dropout, trunk
from discobeta.model.kernels import fuse_norms
from discobeta.seeds import generator, global_stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _loading(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, **_hub_arguments(config))
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {config.model_name_or_path} has no end-of-sequence token")
    return tokenizer


def load_causal_lm(config: RunConfig) -> PreTrainedModel:
    """The base as a language model, on the CPU, in the dtype that the run asks for."""
    from transformers import AutoModelForCausalLM

    with _loading(config, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path, ignore_mismatched_sizes=True, output_loading_info=True,
            **_hub_arguments(config), **weight_arguments(config),
        )  # fmt: skip
    _check_weights(model, config, info)
    if config.flash_attn != "fa2":  # which has no CPU kernels
        check_output_layer(model, config.model_name_or_path)
        check_padding(model, config.model_name_or_path)
    return fuse_norms(model)


def load_scorer(
    config: RunConfig, *, must_have_score: bool = False, key_mapping: dict[str, str] | None = None
) -> PreTrainedModel:
    """The base's trunk with a scalar score, r = w . h (Linear, mostly without bias), read where `score_place` says.

    A fresh w is normal with standard deviation 1 / sqrt(hidden_size + 1), from a stream of its own
    (Stiennon et al. 2020; Huang et al. 2024, arXiv:2403.17031); one that comes with the model stays.
    key_mapping: pattern -> replacement in the names of the weights in the files.
    """
    from transformers import AutoModelForSequenceClassification

    with _loading(config, "model"), global_stream(config.seed, "unused"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            config.model_name_or_path, num_labels=1, ignore_mismatched_sizes=True, output_loading_info=True,
            key_mapping=key_mapping, **_hub_arguments(config), **weight_arguments(config),
        )  # fmt: skip
    name = config.model_name_or_path
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{name}: {type(model).__name__} has no linear `score`")
    if any(key.startswith("score") for key, *_ in info["mismatched_keys"]):
        raise UserError(f"{name} has a `score` of another size than a reward model's, which has one output")
    _check_weights(model, config, info, fresh="score.")
    if config.flash_attn != "fa2":  # which has no CPU kernels
        check_padding(model, name)
        _check_score(model, name)
    model.score.float()
    if any(key.startswith("score.") for key in info["missing_keys"]):
        if must_have_score:
            raise UserError(f"{name} is no reward model: it has no trained `score`")
        deviation = 1 / math.sqrt(model.score.in_features + 1)
        model.score.weight.data.normal_(0, deviation, generator=generator(config.seed, "score"))
    return fuse_norms(model)


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
        model = load_adapter(model, start_adapter(config), fused=config.fused_lora)
    return model.eval().requires_grad_(False)


def _hub_arguments(config: RunConfig) -> dict:
    return {
        "cache_dir": config.cache_dir,
        "revision": config.model_revision,
        "trust_remote_code": config.trust_remote_code,
    }


def weight_arguments(config: RunConfig) -> dict:
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
        shape, wanted = (tuple(shape) for shape in shapes)
        raise UserError(f"{name}: the weight {key} is {shape} in its files, and {wanted} by its config.json")
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
def check_output_layer(model: PreTrainedModel, name: str) -> None:
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
def check_padding(model: PreTrainedModel, name: str) -> None:
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
    """Refuse a classifier whose logits are not score(trunk(x)) at the token that `score_place` says."""
    pad = model.config.get_text_config().pad_token_id
    last = 3 if pad is None or not 0 <= pad < model.get_input_embeddings().num_embeddings else pad
    with telling(f"{name}: {type(model).__name__} cannot be used as a reward model here"):
        for ids in (torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, last]])):
            place = max((i for i in range(3) if ids[0, i] != pad), default=0)
            expected = model(ids).logits
            actual = model.score(trunk(model)(ids).last_hidden_state)[:, place]
            if not torch.allclose(expected.float(), actual.float(), rtol=1e-3, atol=1e-3):
                raise UserError(f"{name}: {type(model).__name__} does not score the last token's state; not supported")
