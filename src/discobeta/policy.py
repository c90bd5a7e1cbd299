"""The language model of a run: loading, LoRA, and what it says of a response."""

from __future__ import annotations

import hashlib
import math
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from discobeta.config import RunConfig
from discobeta.data.batches import Batch
from discobeta.errors import UserError
from discobeta.files import read_json, replacing, sha256, write_json
from discobeta.seeds import generator, global_stream

if TYPE_CHECKING:
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
        model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, **_hub(config), **_weights(config))
    _check_head(model, config.model_name_or_path)
    return model


def load_scorer(config: RunConfig, *, must_have_score: bool = False) -> PreTrainedModel:
    """The base's trunk with a scalar score, r = w . h (Linear, no bias).

    A fresh w is normal with standard deviation 1 / sqrt(hidden_size + 1), from a stream of its own
    (Stiennon et al. 2020; Huang et al. 2024, arXiv:2403.17031); one that comes with the model stays.
    """
    from transformers import AutoModelForSequenceClassification

    with _loading(config, "model"), global_stream(config.seed, "unused"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            config.model_name_or_path, num_labels=1, ignore_mismatched_sizes=True, output_loading_info=True,
            **_hub(config), **_weights(config),
        )  # fmt: skip
    for name, *shapes in info["mismatched_keys"]:
        found, wanted = (tuple(shape) for shape in shapes)
        raise UserError(f"{config.model_name_or_path}: {name} is {found}; of a reward model it is {wanted}: one output")
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{config.model_name_or_path}: {type(model).__name__} has no linear `score`")
    model.score.float()
    if any(name.startswith("score") for name in info["missing_keys"]):
        if must_have_score:
            raise UserError(f"{config.model_name_or_path} is no reward model: it has no trained `score`")
        deviation = 1 / math.sqrt(model.config.hidden_size + 1)
        model.score.weight.data.normal_(0, deviation, generator=generator(config.seed, "score"))
    return model


def add_adapter(model: PreTrainedModel, config: RunConfig, task: str) -> nn.Module:
    """The model with LoRA on its trunk, or as it is for finetuning_type: full.

    task: CAUSAL_LM, or SEQ_CLS, in which case PEFT keeps the score's weights beside the adapter's.
    """
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    if config.finetuning_type == "full":
        return model
    if config.adapter_name_or_path:
        return continue_adapter(model, config, task)
    from peft import LoraConfig, get_peft_model

    linear = {name.rpartition(".")[2] for name, part in trunk(model).named_modules() if isinstance(part, nn.Linear)}
    targets = linear if config.lora_target == "all" else {name.strip() for name in config.lora_target.split(",")}
    if unknown := sorted(targets - linear):
        raise UserError(
            f"lora_target: the model has no linear layer called {unknown[0]}; it has {', '.join(sorted(linear))}"
        )
    lora = LoraConfig(
        task_type=task,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=sorted(targets),
    )
    with global_stream(config.seed, "adapter"):
        return get_peft_model(model, lora)


def continue_adapter(model: PreTrainedModel, config: RunConfig, task: str) -> nn.Module:
    """The model with the adapter that the run starts from, to be trained on.

    The adapter may come from another kind of run: a reward model usually starts from that of an SFT
    run, whose trunk it shares and whose task it does not.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    path = config.adapter_name_or_path
    try:
        settings = PeftConfig.from_pretrained(path)
        settings.task_type, settings.inference_mode = task, False
        with global_stream(config.seed, "adapter"):
            peft_model = get_peft_model(model, settings)
        fresh, found = get_peft_model_state_dict(peft_model), load_peft_weights(path, device="cpu")
        unknown = sorted(set(found) - set(fresh))
        set_peft_model_state_dict(peft_model, fresh | found)  # a score that it does not have stays fresh
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load adapter {path}: {_first_line(error)}") from None
    if unknown:
        raise UserError(f"adapter {path} does not fit this model, which has no {unknown[0]}")
    return peft_model


def load_adapter(model: PreTrainedModel, path: str | Path) -> nn.Module:
    """The model with a finished adapter, frozen."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load adapter {path}: {_first_line(error)}") from None


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
        model = load_adapter(model, config.adapter_name_or_path)
    return model.eval().requires_grad_(False)


def plain(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model (with the adapter in it), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk(model: nn.Module) -> nn.Module:
    """The model without its output layer: tokens -> last hidden state."""
    inner = plain(model)
    return getattr(inner, inner.base_model_prefix)


def check_context(model: nn.Module, longest_prompt: int, max_new_tokens: int) -> None:
    """Refuse prompts that do not leave the model room for a response."""
    context = getattr(plain(model).config, "max_position_embeddings", None)
    if context and longest_prompt + max_new_tokens > context:
        raise UserError(
            f"a prompt of {longest_prompt} tokens and max_new_tokens: {max_new_tokens} do not fit into the context of "
            f"{context} tokens of {plain(model).config.name_or_path}: lower cutoff_len or max_new_tokens"
        )


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """(N, T, hidden_size), the trunk's last hidden state (after its final norm)."""
    return trunk(model)(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state


def token_logps(
    model: nn.Module, hidden: Tensor, batch: Batch, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(M,) float32 log pi(y_t | x, y_<t) of each response token; on demand the entropy there, without gradient.

    Both in nats, of softmax(logits / temperature). The output layer is applied only where a response
    token is predicted, a chunk at a time; the backward pass computes a chunk's logits again instead
    of keeping them.
    """
    output_layer = plain(model).get_output_embeddings()
    states = hidden.flatten(0, 1)[batch.predictor_index]

    def of_chunk(part: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = output_layer(part).float()
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


def pooled(hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
    """(N, hidden_size) float32: the state at the last response token, or the mean over the response."""
    if pooling == "last":
        return at(hidden, batch.response_end)
    weights = batch.response_mask / batch.response_mask.sum(1, keepdim=True)
    return torch.einsum("nt,nth->nh", weights, hidden.float())


def switch_off_dropout(model: nn.Module) -> None:
    """Make training mode compute what evaluation mode does: in modules of dropout, and where a model calls the
    function with a rate of its own (OPT's `self.dropout`, the `attention_dropout` of many)."""
    for module in model.modules():
        rates = {"p"} if isinstance(module, nn.Dropout) else {name for name in vars(module) if "drop" in name}
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


def weights_hash(config: RunConfig) -> str:
    """sha256 over the base's weight files and config.json, and the adapter's if it starts from one.

    A file of the hub's cache is a link to a blob named by its own sha256, which is then not read.
    """
    folders = [_folder(config.model_name_or_path, "config.json", config)]
    if config.adapter_name_or_path:
        folders.append(_folder(config.adapter_name_or_path, "adapter_config.json", config))
    return folders_hash(*folders)


def folders_hash(*folders: Path) -> str:
    """sha256 over the weight files of models and adapters, and the configs that say how to read them."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".safetensors", ".bin") or path.name in ("config.json", "adapter_config.json"):
                digest.update(f"{path.name} {_file_hash(path)}\n".encode())
    return digest.hexdigest()


def _folder(name: str, member: str, config: RunConfig) -> Path:
    """The folder of a model or adapter: a local one, or its snapshot in the hub's cache."""
    from transformers.utils import cached_file

    try:
        found = cached_file(name, member, cache_dir=config.cache_dir, revision=config.model_revision)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name}: {_first_line(error)}") from None
    return Path(found).parent


def _file_hash(path: Path) -> str:
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == 64 and set(blob) <= set("0123456789abcdef"):
        return blob
    return sha256(path)


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
    name = config.model_name_or_path
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise UserError(f"model_name_or_path: there is no directory {name}")
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a fresh score is announced as a missing weight
    logging.disable_progress_bar()  # of reading weights, which would stand between ours
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"cannot load the {what} {name}: {_first_line(error)}") from None
    except Exception as error:  # safetensors and tokenizers raise bare Exception subclasses of their own
        if type(error).__name__ in ("SafetensorError", "Exception"):
            raise UserError(f"cannot load the {what} {name}: {_first_line(error)}") from None
        raise
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@torch.no_grad()
def _check_head(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits are not output_layer(trunk(x)), e.g. one that caps or scales them."""
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    actual = model.get_output_embeddings()(trunk(model)(ids).last_hidden_state)
    if not torch.allclose(expected.float(), actual.float(), rtol=1e-3, atol=1e-3):
        raise UserError(f"{name}: {type(model).__name__} changes its logits after the output layer; not supported")
