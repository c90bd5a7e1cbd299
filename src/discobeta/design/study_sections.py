"""Which keys of a run may stand where in a study: in `data:`, `prompts:`, `base:`, `common:`, a stage's own section."""

from __future__ import annotations

import json
import re
from typing import Any

from discobeta.design.arms import FLAGS
from discobeta.design.config import FIELDS, read_by, who_reads
from discobeta.design.config_names import IGNORED, REFUSED, RENAMED
from discobeta.design.stages import BASE_STAGE, READ_KEYS, STAGES
from discobeta.errors import shown

PATH_KEYS = (
    "stage",
    "seed",
    "output_dir",
    "tokenized_path",
    "reference_path",
    "reference_answers_path",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "stop_after_steps",
    *READ_KEYS,
)
DATA_KEYS = tuple(name for name, entry in FIELDS.items() if entry.metadata["of"] == "data" and name not in PATH_KEYS)
HOW_ROWS_ARE_READ = ("dataset_dir", "cutoff_len", "max_unusable_rows")
"""Those of DATA_KEYS that say nothing about which rows: `prompts:` has them from `data:` unless it has its own."""

MODEL_KEYS = ("model_name_or_path", "model_revision", "adapter_name_or_path", "trust_remote_code", "cache_dir")

BELONGS = (
    dict.fromkeys(FLAGS, "it comes from the grid (choose arms with `arms:`)")
    | dict.fromkeys(DATA_KEYS, "it belongs in `data:` (all runs see the same rows)")
    | dict.fromkeys(MODEL_KEYS, "it belongs in `base:` (all runs start from the same model)")
    | dict.fromkeys(PATH_KEYS, "the study sets it")
)
"""Run keys that `common:` and the stages' sections may not hold, and where they belong."""

SET_OF_BASE = ("stage", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")
"""Run keys that `base: sft:` may not hold: the study sets them."""


def may_stand_in(section: str) -> list[str]:
    """The run keys that `common:`, the section of a stage or `base: sft:` (of BASE_STAGE) may hold."""
    known = [name for name in FIELDS if not place_of(name, section)]
    return [name for name in known if section != "common" or set(STAGES) & set(read_by(name))]


def place_of(key: str, section: str) -> str | None:
    """Why a key may not stand in a section, or where it belongs; None where it may, or where nobody knows it."""
    if section in STAGES and not STAGES[section].has_pairs and key in DATA_KEYS:
        return "it belongs in `prompts:`"
    if key in BELONGS and (section != BASE_STAGE or key in SET_OF_BASE):
        return BELONGS[key]
    if section != "common" and key in FIELDS and section not in read_by(key):
        return f"{section} does not read it ({who_reads(key)})"
    if key in REFUSED:
        return REFUSED[key][1]
    return None


PATHS = ("dataset", "eval_dataset", "calibration_dataset", "model_name_or_path", "adapter_name_or_path")
"""Run keys that name what a rule of the workflow has as its input."""


def path_fault(key: str, value: Any) -> str | None:
    """What is wrong with it, or None."""
    if key in PATHS and isinstance(value, str) and (set("{}") & set(value) or not value.isprintable()):
        return f"{shown(value)}: Snakemake takes braces for wildcards: rename it"
    return None


def places_of(key: str) -> list[str]:
    """The sections of a study in which a key of a run may stand, the most natural one first; none for one that the
    study sets, or that its arms say."""
    if key in FLAGS or key in PATH_KEYS:
        return []
    if key in DATA_KEYS:
        return ["data", "prompts"]
    if key in MODEL_KEYS:
        return ["base"]
    readers = [stage for stage in STAGES if stage in read_by(key)]
    if not readers:
        return ["base: sft"]
    return ["common", *readers] if len(readers) == len(STAGES) else [*readers, "common"]


def goes_to(key: str, value: Any) -> str | None:
    """Where in a study a key of a run stands that was written somewhere else, e.g. `dpo: {pref_beta: 0.2}`.

    key: also with the name of a section before it (`dpo.pref_beta`), or as another program calls it. None where nobody
    knows it.
    """
    section, _, name = key.rpartition(".")
    if name in IGNORED:
        return f"nothing depends on it ({IGNORED[name]})"
    if name in REFUSED:
        return f"it is not supported: {REFUSED[name][1]}"
    name = re.match(r"\w*", RENAMED.get(name, name))[0]
    if name not in FIELDS:
        return None
    if name in FLAGS:
        return "its arm says it: `arms: [baseline, …]` (`discobeta grid`)"
    if name == "seed":
        return "it is `seeds: [1, 2]`"
    if name in PATH_KEYS:
        return "the study sets it"
    places = places_of(name)
    if section in ("common", "data", "base", "prompts", *STAGES):
        places = [section]
    first, *others = places
    text = f"{first}: {{{name}: {json.dumps(value, ensure_ascii=False)}}}"
    if first == "base: sft":
        first, text = "base", f"base: {{sft: {{{name}: {json.dumps(value, ensure_ascii=False)}}}}}"
    more = f" (or in {', '.join(f'`{place}:`' for place in others)})" if others else ""
    word = text.replace(f"{first}: ", f"{first}=", 1)
    return f"""it is `{text}`{more}; on the command line `--set '{word}'`"""
