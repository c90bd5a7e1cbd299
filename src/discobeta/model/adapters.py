"""LoRA: which layers it is put on, how an adapter is made, continued, read and checked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from discobeta.design.config import RunConfig
from discobeta.errors import UserError, and_more, say, shown, telling
from discobeta.files import read_mapping
from discobeta.identity import folder_of
from discobeta.model.forward import switch_off_dropout, trunk
from discobeta.seeds import global_stream

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


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
        targets = layer_names(config.lora_target)
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
        peft_model = with_fresh_adapter(model, lora, fused=config.fused_lora)
        if lora.target_parameters:  # of some families PEFT takes a name for that of the experts, whatever it names
            raise UserError(
                f"PEFT puts LoRA on the stacked experts ({', '.join(sorted(lora.target_parameters))}) where asked "
                "for these names, and such an adapter is not supported: name other layers, e.g. those of attention"
            )
        return peft_model


def with_fresh_adapter(model: PreTrainedModel, settings: PeftConfig, *, fused: bool) -> PeftModel:
    """The model with a fresh adapter. fused: whether its layers are those of `model.lora`."""
    from peft import get_peft_model

    from discobeta.model.lora import fuse

    if fused:
        fuse(settings)
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

    folder = start_adapter(config)
    weights = adapter_weights(folder)
    layers = linear_layers(model)
    with telling(f"cannot load adapter {folder}"):
        settings = PeftConfig.from_pretrained(str(folder))
        settings.task_type, settings.inference_mode = task, False
        trained_on = settings.base_model_name_or_path
        with global_stream(config.seed, "adapter"):
            peft_model = with_fresh_adapter(model, settings, fused=config.fused_lora)
        fresh = get_peft_model_state_dict(peft_model)
    may_be_fresh = {name for name in fresh if name.endswith(".score.weight")}
    _check_adapter(folder, weights, fresh, may_be_fresh)
    reached = set(peft_model.base_model.targeted_module_names)
    check_settings(config, folder, settings, reached, lora_layers(layers, config.lora_target or "all", model))
    if trained_on and Path(trained_on).name != Path(config.model_name_or_path).name:
        say(
            f"adapter {folder} was trained on {trained_on}, by its own word, and goes on on {config.model_name_or_path}"
        )
    with telling(f"cannot load adapter {folder}"):
        set_peft_model_state_dict(peft_model, fresh | weights)
    return peft_model


def load_adapter(model: PreTrainedModel, folder: Path, *, fused: bool = True, trunk_only: bool = False) -> nn.Module:
    """The model with a finished adapter, frozen.

    fused: as for `with_fresh_adapter`; it then says to the last bit what it said when it was trained.
    trunk_only: it is that of a language model, and this is a scorer, whose trunk is the same.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    from discobeta.model.lora import fuse

    weights = adapter_weights(folder)
    with telling(f"cannot load adapter {folder}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they are about is checked here
        settings = PeftConfig.from_pretrained(str(folder))
        if trunk_only:
            settings.task_type = None
        if fused:
            fuse(settings)
        peft_model = PeftModel.from_pretrained(model, str(folder), config=settings, ignore_mismatched_sizes=True)
        places = get_peft_model_state_dict(peft_model)
    _check_adapter(folder, weights, places)
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
"""Values of init_lora_weights that do: others (PiSSA, OLoRA, LoftQ, CorDA) change the base's own weights too."""

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a .safetensors file, or of a .bin file, of which nothing but tensors is read."""
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        with telling(f"cannot read {path}"):
            return load_file(path)
    try:
        tensors = torch.load(path, "cpu", weights_only=True)
    except Exception:  # torch's message advises to let it run what stands in the file
        tensors = None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} is damaged, or holds more than a model's weights by name")
    return tensors


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
    weights = read_tensors(path)
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise UserError(f"adapter {folder}: {name} holds integers: quantised adapters are not supported")
        if not tensor.isfinite().all():
            raise UserError(f"adapter {folder}: {name} holds numbers that are not finite (NaN or infinity)")
    return weights


def _check_adapter(
    folder: Path, weights: dict[str, Tensor], places: dict[str, Tensor], may_be_fresh: Set[str] = frozenset()
) -> None:
    """Refuse an adapter that does not fill its places in the model, one for one."""
    if missing := sorted(places.keys() - weights.keys() - may_be_fresh):
        raise UserError(f"adapter {folder} lacks {missing[0]}{and_more(missing)}: its weights are not whole")
    if unknown := sorted(weights.keys() - places.keys()):
        raise UserError(f"adapter {folder} does not fit this model, which has no {unknown[0]}{and_more(unknown)}")
    for name, tensor in sorted(weights.items()):
        if tensor.shape != places[name].shape:
            raise UserError(
                f"adapter {folder}: {name} is {tuple(tensor.shape)} in its files, and {tuple(places[name].shape)} by "
                "its adapter_config.json in this model"
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
    if not layer_names(lora_target):
        raise UserError("lora_target names no layer: write `all`, or names with commas between them")
    meant = set()
    for word in sorted(layer_names(lora_target)):
        named = {name for name in layers if f".{name}".endswith(f".{word}")}
        if not named:
            last_names = sorted({name.rpartition(".")[2] for name in layers})
            what = " (it has experts of that name, stacked)" if word in experts(model) else ""
            raise UserError(
                f"lora_target: the model has no linear layer called {word}{what}; it has {', '.join(last_names)}"
            )
        meant |= named
    return meant


def layer_names(lora_target: str) -> set[str]:
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
