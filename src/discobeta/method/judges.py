"""Reward models that others have trained, loaded so that they score as where they come from.

- A model for sequence classification, or a PEFT adapter with a `score`: read where transformers' class reads it.
- A language model with a value head, whole or as an adapter, as LLaMA-Factory (and TRL before 1.0) trains it:
  r = w . h + b, h the trunk's last hidden state at the last token, whatever token that is.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from discobeta import identity
from discobeta.design.config import RunConfig
from discobeta.design.stages import REWARD_STAGE
from discobeta.errors import UserError, telling
from discobeta.files import read_mapping
from discobeta.model.adapters import ADAPTER_WEIGHTS, adapter_weights, load_adapter, read_tensors
from discobeta.model.pretrained import load_scorer

CONFIGS = ("adapter_config.json", "config.json")
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
VALUE_HEAD = ("v_head.summary.weight", "v_head.summary.bias")


def load(source: str, settings: dict) -> tuple[RunConfig, nn.Module, list[Path]]:
    """The config that it is loaded with, a model with a trained `score`, and the folders of its weights.

    source: a folder or a hub id; settings: run keys. Raises UserError for anything that brings no score along: a
    fresh one would be noise.
    """
    folder, is_adapter = _folder(source, settings.get("cache_dir"))
    base = source
    if is_adapter:
        base = read_mapping(folder / "adapter_config.json").get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            raise UserError(f"reward_model: {source}/adapter_config.json names no base model")
    config, _ = RunConfig.from_mapping({"stage": REWARD_STAGE, **settings, "model_name_or_path": base}, "reward_model")
    if has_value_head(folder):
        scorer = load_scorer(config, key_mapping={r"^pretrained_model\.": ""})
        scorer.score = value_head(folder, scorer.score.in_features)
        scorer.config.get_text_config().pad_token_id = None  # the last token counts, also where it is a <pad>
        model = load_adapter(scorer, folder, trunk_only=True) if is_adapter else scorer
    elif is_adapter:
        model = _adapter_with_score(config, folder)
    else:
        model = load_scorer(config, must_have_score=True)
    bases = [identity.folder_of(base, "config.json", config, "reward_model")] if is_adapter else []
    return config, model, [folder, *bases]


def _adapter_with_score(config: RunConfig, folder: Path) -> nn.Module:
    if not any(name.endswith("score.weight") for name in adapter_weights(folder)):
        raise UserError(
            f"reward_model: the adapter {folder} has no `score` and no value head (a reward model's last layer)"
        )
    scorer = load_scorer(config)
    text_config = scorer.config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = _own_padding(folder)
    return load_adapter(scorer, folder)


def _folder(source: str, cache_dir: str | None) -> tuple[Path, bool]:
    """Where the model or the adapter lies, and whether it is an adapter; of the hub's it is downloaded."""
    from transformers.utils import cached_file

    identity.check_local(source, "reward_model")
    for name in CONFIGS:
        with telling(f"reward_model: cannot load {source}"):
            path = cached_file(source, name, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            break
    else:
        raise UserError(
            f"reward_model: {source} is no run of stage rm, no PEFT adapter and no transformers model "
            "(it has no config.yaml, no adapter_config.json and no config.json)"
        )
    is_adapter = name == "adapter_config.json"
    for name in (*VALUE_HEADS, *(ADAPTER_WEIGHTS if is_adapter else ()), "tokenizer_config.json", "tokenizer.json"):
        cached_file(
            source, name, cache_dir=cache_dir,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    return Path(path).parent, is_adapter


def has_value_head(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VALUE_HEADS) or bool(_head_tensors(folder))


def _head_tensors(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of the value head that lies beside the weights, or, as TRL saves it, among them."""
    from safetensors import safe_open

    head: dict[str, Tensor] = {}
    paths = [*sorted(folder.glob("pytorch_model*.bin")), *sorted(folder.glob("model*.safetensors"))]
    for path in (*paths, *(folder / name for name in reversed(VALUE_HEADS) if (folder / name).is_file())):
        if path.suffix == ".bin":
            tensors = read_tensors(path)
        else:
            with telling(f"cannot read {path}"), safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith("v_head.")]  # noqa: SIM118
                tensors = {name: file.get_tensor(name) for name in names}
        head |= {name: tensor for name, tensor in tensors.items() if name.startswith("v_head.")}
    return head


def value_head(folder: Path, size: int) -> nn.Linear:
    """w . h + b of `size` inputs. Raises UserError for a head of another form."""
    head = _head_tensors(folder)
    if head.keys() != {*VALUE_HEAD}:
        names = ", ".join(sorted(head)) or "no weight of one"
        raise UserError(f"reward_model: the value head in {folder} holds {names} instead of {' and '.join(VALUE_HEAD)}")
    weight, bias = (head[name] for name in VALUE_HEAD)
    if weight.shape != (1, size) or bias.shape != (1,):
        raise UserError(
            f"reward_model: the value head in {folder} is {tuple(weight.shape)} + {tuple(bias.shape)}, and this model "
            f"needs (1, {size}) + (1,)"
        )
    for name, tensor in head.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"reward_model: {name} in {folder} holds numbers that are not finite, or are integers")
    linear = nn.Linear(size, 1)
    linear.weight.data.copy_(weight)
    linear.bias.data.copy_(bias)
    return linear


def _own_padding(folder: Path) -> int | None:
    """The <pad> of the tokenizer that was saved with an adapter, which its training (TRL's) took for the model's."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    with telling(f"reward_model: cannot load the tokenizer {folder}"):
        return AutoTokenizer.from_pretrained(folder).pad_token_id
