"""What a study config may say: its keys, and the checks on what stands under each.

Each `read_…` takes the settings of the whole study and returns what one key of them says, checked.
where: the file, which every error begins with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from discobeta.design.arms import ARMS, FLAGS, Arm
from discobeta.design.stages import READ_KEYS, STAGES
from discobeta.design.values import LARGEST
from discobeta.errors import UserError, did_you_mean, shown

KEYS = [
    "study",
    "environment",
    "seeds",
    "stages",
    "idle_arms",
    "prove_steps",
    "gpus_per_run",
    "arms",
    "data",
    "prompts",
    "base",
    "common",
    *STAGES,
]
ENVIRONMENTS = ("cpu", "cuda")
"""envs/<name>.yaml, for `snakemake --sdm conda`."""

MOST_SEEDS = 1000

LONGEST_NAME = 100
"""Characters of a study's name, which becomes a folder, and of a key."""

WORLD_DEFAULTS = {"sft_examples": 6000, "train": 9600, "evaluation": 1600, "noise": "heteroscedastic", "seed": 1}

DATA_KEYS = [
    "dataset",
    "eval_dataset",
    "dataset_dir",
    "split",
    "eval_split",
    "cutoff_len",
    "max_samples",
    "val_size",
    "max_unusable_rows",
]
HOW_ROWS_ARE_READ = ["dataset_dir", "cutoff_len", "max_unusable_rows"]
"""Of DATA_KEYS, those that say nothing about which rows: `prompts:` has them from `data:` unless it has its own."""

MODEL_KEYS = ["model_name_or_path", "model_revision", "adapter_name_or_path", "trust_remote_code", "cache_dir"]

PATH_KEYS = [
    "stage",
    "seed",
    "output_dir",
    "tokenized_path",
    "reference_path",
    "overwrite_output_dir",
    "stop_after_steps",
    *READ_KEYS,
]
BELONGS = (
    dict.fromkeys(FLAGS, "it comes from the grid (choose arms with `arms:`)")
    | dict.fromkeys(DATA_KEYS, "it belongs in `data:` (all runs see the same rows)")
    | dict.fromkeys(MODEL_KEYS, "it belongs in `base:` (all runs start from the same model)")
    | dict.fromkeys(PATH_KEYS, "the study sets it")
)
"""Run keys that `common:` and the stages' sections may not hold, and where they belong."""


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key, anything else is replaced: what Snakemake does with its config files."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_name(settings: dict[str, Any], where: str) -> str:
    name = settings["study"]
    is_plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name)
    if not is_plain or name == "published" or len(name) > LONGEST_NAME:
        raise UserError(
            f"{where}: study: {shown(name)} should be a plain folder name of at most {LONGEST_NAME} "
            "characters, and not 'published'"
        )
    return name


def read_choice(settings: dict[str, Any], key: str, choices: tuple[str, ...], where: str) -> str:
    """One of `choices`, of which the first is the default."""
    if (choice := settings.get(key, choices[0])) not in choices:
        raise UserError(f"{where}: {key}: {shown(choice)} should be {' or '.join(choices)}")
    return choice


def read_list(settings: dict[str, Any], key: str, default: list, kind: type, where: str) -> list:
    values = settings.get(key, default)
    right = isinstance(values, list) and all(type(value) is kind for value in values)  # True is no seed
    if not right or not values or len(set(values)) < len(values):
        noun = "whole numbers" if kind is int else "names"
        raise UserError(f"{where}: {key}: {shown(values)} should be a list of different {noun}")
    if len(values) > MOST_SEEDS:
        raise UserError(f"{where}: {key}: {len(values):,} of them; a study has at most {MOST_SEEDS:,}")
    return values


def read_stages(settings: dict[str, Any], where: str) -> list[str]:
    stages = read_list(settings, "stages", list(STAGES), str, where)
    for stage in stages:
        if stage not in STAGES:
            raise UserError(f"{where}: stages: {shown(stage)} should be one of {', '.join(STAGES)}")
    return stages


def read_arms(settings: dict[str, Any], idle_arms: str, where: str) -> list[Arm]:
    if settings.get("arms", "all") == "all":
        return list(ARMS)
    names = {arm.name: arm for arm in ARMS}
    chosen = read_list(settings, "arms", [], str, where)
    for name in chosen:
        if name not in names:
            raise UserError(f"{where}: arms: no arm is called {shown(name)}; the arms are {', '.join(names)}")
    arms = [names[name] for name in chosen]
    for arm in arms:
        if idle_arms == "prove" and arm.twin not in arms:
            raise UserError(f"{where}: arms: {arm.name} is proved against {arm.twin.name}: list that too")
    return arms


def check_stages(stages: list[str], arms: list[Arm], where: str) -> None:
    """What a stage reads must be trained too."""
    for stage in stages:
        for reading in STAGES[stage].reads:
            needing = [arm.name for arm in arms if not reading.idea or arm.has(reading.idea)]
            if needing and reading.stage not in stages:
                raise UserError(
                    f"{where}: stages: {stage} reads the runs of {reading.stage} ({reading.key} of "
                    f"{needing[0]}): add {reading.stage}"
                )


def read_data(settings: dict[str, Any], where: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What `data:` says: of a world, with its defaults, if it is one; and of rows."""
    world, data = None, read_mapping(settings, "data", where)
    if "world" in data:
        check_known(data, ["world"], f"{where}: data: world makes its own rows, so next to it")
        world = mapping(data["world"], f"{where}: data: world")
        check_known(world, WORLD_DEFAULTS, f"{where}: data: world")
        world = WORLD_DEFAULTS | world
        if world["noise"] not in ("heteroscedastic", "homoscedastic"):
            raise UserError(f"{where}: data: world: noise should be heteroscedastic or homoscedastic")
        for key in ("sft_examples", "train", "evaluation", "seed"):
            check_whole(world[key], 0 if key == "seed" else 1, f"{where}: data: world: {key}")
    else:
        check_known(data, DATA_KEYS, f"{where}: data")
        if not data.get("dataset"):
            raise UserError(f"{where}: data: give dataset (a file, a hub id or a name) or world")
        if not data.get("eval_dataset") and not data.get("val_size"):
            raise UserError(f"{where}: data: give eval_dataset or val_size (rows to compare runs on)")
    return world, _names_joined(data, f"{where}: data")


def read_prompts(
    settings: dict[str, Any], world: dict[str, Any] | None, data: dict[str, Any], where: str
) -> dict[str, Any]:
    """What `prompts:` says, and `data:` where that is how rows are read; nothing if the study has no such section."""
    prompts = read_mapping(settings, "prompts", where)
    if not prompts:
        return {}
    if world:
        raise UserError(f"{where}: prompts: a base of the world knows the world's prompts only: leave it out")
    check_known(prompts, DATA_KEYS, f"{where}: prompts")
    if not prompts.get("dataset"):
        raise UserError(f"{where}: prompts: give dataset, or leave prompts out to use those of data")
    if not prompts.get("eval_dataset") and not prompts.get("val_size"):
        raise UserError(f"{where}: prompts: give eval_dataset or val_size (prompts to measure policies on)")
    inherited = {key: data[key] for key in HOW_ROWS_ARE_READ if key in data}
    return inherited | _names_joined(prompts, f"{where}: prompts")


def read_base(settings: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `base:` says: of a base that is trained here, or of the model that is there; the other is empty."""
    base = {key: value for key, value in read_mapping(settings, "base", where).items() if value is not None}
    check_known(base, ["sft", *MODEL_KEYS], f"{where}: base")
    if ("sft" in base) == ("model_name_or_path" in base):
        raise UserError(f"{where}: base: give either model_name_or_path or sft (a base trained here)")
    if "sft" in base and not base["sft"]:
        raise UserError(f"{where}: base: sft: say what is trained (model_type, or model_name_or_path)")
    sft = mapping(base.pop("sft", None), f"{where}: base: sft")
    if sft and base:
        raise UserError(f"{where}: base: {next(iter(base))} may not stand next to sft: it belongs in it")
    _check_paths(base, f"{where}: base")
    _check_paths(sft, f"{where}: base: sft")
    for key in ("stage", "output_dir", "overwrite_output_dir"):
        if key in sft:
            raise UserError(f"{where}: base: sft: {key} may not stand here: {BELONGS[key]}")
    return sft, base


def read_section(settings: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """What `common:` or the section of a stage says."""
    section = read_mapping(settings, name, where)
    for key in section:
        if key in BELONGS:
            reads_prompts = name in STAGES and not STAGES[name].has_pairs
            place = "it belongs in `prompts:`" if reads_prompts and key in DATA_KEYS else BELONGS[key]
            raise UserError(f"{where}: {name}: {key} may not stand here: {place}")
    return section


def read_mapping(settings: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    return mapping(settings.get(key), f"{where}: {key}")


def mapping(value: Any, where: str) -> dict[str, Any]:
    """The value, with an empty mapping for none."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where} should hold `key: value` lines, not {shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{where}: the key {shown(key)} should be text (write it in quotes)")
        if len(key) > LONGEST_NAME:
            raise UserError(f"{where}: unknown key {shown(key)}")
    return value


def check_known(settings: dict[str, Any], names: Iterable[str], where: str) -> None:
    names = list(names)
    for key in settings:
        if key not in names:
            hint = did_you_mean(key, names) or f"; the keys are {', '.join(names)}"
            raise UserError(f"{where}: unknown key {shown(key)}{hint}")


def check_whole(value: Any, least: int, where: str) -> None:
    if type(value) is not int or value < least:
        raise UserError(f"{where}: {shown(value)} should be a whole number, at least {least}")
    if value > LARGEST:
        raise UserError(f"{where}: {shown(value)} should be at most {LARGEST}")


def _names_joined(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """`dataset: [a, b]` is `dataset: a,b`."""
    joined = dict(settings)
    for key in ("dataset", "eval_dataset"):
        names = joined.get(key)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            joined[key] = names = ",".join(names)
        if names is not None and not isinstance(names, str):
            raise UserError(f"{where}: {key}: {shown(names)} should be a name, or a list of names")
    _check_paths(joined, where)
    return joined


def _check_paths(settings: dict[str, Any], where: str) -> None:
    """Refuse what a rule of the workflow could not have as its input."""
    for key in ("dataset", "eval_dataset", "model_name_or_path", "adapter_name_or_path"):
        name = settings.get(key)
        if isinstance(name, str) and (set("{}") & set(name) or not name.isprintable()):
            raise UserError(f"{where}: {key}: {shown(name)}: Snakemake takes braces for wildcards: rename it")
