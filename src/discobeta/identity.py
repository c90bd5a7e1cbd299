"""What a name stands for, and what is in it: folders of models and adapters, and hashes of their files.

Imports neither torch nor transformers, so that tables can ask whether a base is still the one that runs were
trained on.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from discobeta import files
from discobeta.errors import UserError, first_line

if TYPE_CHECKING:
    from discobeta.design.config import RunConfig

WEIGHTS = (".safetensors", ".bin")
CONFIGS = ("config.json", "adapter_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "generation_config.json",
)
"""What decides token ids, and where a response ends."""


def folder_of(name: str, member: str, config: RunConfig, key: str) -> Path:
    """The folder of the model or adapter that run key `key` names: a local one, or its snapshot in the hub's cache.

    member: a file that it must have. Raises UserError, with the key, where there is none.
    """
    if os.path.isdir(name):
        return Path(name)
    check_local(name, key)
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, member, cache_dir=config.cache_dir, revision=config.model_revision)
    except Exception as error:  # the hub's client has dozens of classes
        raise UserError(f"{key}: there is no directory {name}, and the hub says: {first_line(error)}") from None
    return Path(path).parent


def check_local(name: str, key: str) -> None:
    """Refuse a name that means a local folder which is not there: somebody else's model may have it on the hub."""
    if os.path.isdir(name):
        return
    if os.path.exists(name):
        raise UserError(f"{key}: {name} is a file, not a directory")
    first, *rest = name.split("/")
    if instead := _in_its_place(Path(name), key):
        raise UserError(f"{key}: there is no directory {name}; there is {instead}")
    if name.startswith((".", "/", "~")) or len(rest) != bool(rest) or not all([first, *rest]):
        raise UserError(f"{key}: there is no directory {name}")
    if rest and os.path.isdir(first):
        raise UserError(f"{key}: there is no directory {name} (and as {first}/ is here, none is looked for on the hub)")


PLACES = {
    "reward_model": ("config.yaml", "adapter_config.json", "config.json"),
    "adapter_name_or_path": ("adapter/adapter_config.json", "adapter_config.json"),
    "model_name_or_path": ("model/config.json", "config.json"),
}
"""Run key -> what says that a directory holds, itself or in a part of it, what the key names."""


def _in_its_place(path: Path, key: str) -> Path | None:
    """The run whose checkpoint `path` would be, or, if that holds nothing itself, its last checkpoint that is there."""
    numbered = sorted(path.parent.glob("checkpoint-*"), key=lambda other: (len(other.name), other.name), reverse=True)
    for folder in (path.parent, *numbered) if path.parent != Path() else ():
        for place in PLACES.get(key, ()):
            if (folder / place).is_file():
                return (folder / place).parent
    return None


def weights_hash(config: RunConfig) -> str:
    """sha256 over the base's weight files and config.json, and the adapter's if it starts from one."""
    folders = [folder_of(config.model_name_or_path, "config.json", config, "model_name_or_path")]
    if config.adapter_name_or_path:
        folders.append(folder_of(config.adapter_name_or_path, "adapter_config.json", config, "adapter_name_or_path"))
    return folders_hash(*folders)


def tokenizer_hash(config: RunConfig) -> str:
    """sha256 over the files of the base that make its tokenizer."""
    folder = folder_of(config.model_name_or_path, "config.json", config, "model_name_or_path")
    return digest_of((name, file_hash(folder / name)) for name in TOKENIZER if (folder / name).is_file())


def folders_hash(*folders: Path) -> str:
    """sha256 over the weight files of models and adapters, and the configs that say how to read them.

    Raises UserError if one of them is not what a run of ours has written there.
    """
    hashes = []
    for folder in folders:
        written = _manifest(folder)
        for path in sorted(folder.iterdir()):
            if path.suffix in WEIGHTS or path.name in CONFIGS:
                hashes.append((path.name, file_hash(path)))
                if written and written.get(path.name) != hashes[-1][1]:
                    raise UserError(f"{path} is not what was written there when its run finished")
    return digest_of(hashes)


def one_of(hashes: list[str]) -> str:
    """A hash that stands for several, in their order; of one it is itself."""
    return hashes[0] if len(hashes) == 1 else digest_of((str(place), value) for place, value in enumerate(hashes))


def digest_of(hashes) -> str:
    """sha256 over (name, sha256) pairs."""
    digest = hashlib.sha256()
    for name, value in hashes:
        digest.update(f"{name} {value}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file. One of the hub's cache is a link to a blob named by its own sha256, which is not read."""
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == 64 and set(blob) <= set("0123456789abcdef"):
        return blob
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return _hash_of_state(path, state.st_ino, state.st_size, state.st_mtime_ns)


@cache
def _hash_of_state(path: Path, *state: int) -> str:
    """`files.sha256`, once for a file that nobody has written meanwhile."""
    return files.sha256(path)


def _manifest(folder: Path) -> dict[str, str]:
    """File -> sha256 of a base that stage sft has made, or of the adapter/ or model/ of a run; empty for any other."""
    for directory, prefix in ((folder, ""), (folder.absolute().parent, f"{folder.absolute().name}/")):
        record = directory / "provenance.json"
        if record.is_file() and "seal" in files.read_mapping(record):
            written = files.read_sealed(record).get("files") or {}
            inside = {name.removeprefix(prefix): digest for name, digest in written.items() if name.startswith(prefix)}
            if inside:
                return inside
    return {}
