"""What one run is, or would be: its arm, its settings, what they make, where it stands, its results, what it reads, and
the commands that take it on.

Nothing is written, trained or downloaded here, and no weight is loaded: of a run directory the files are read that say
what it is, of a YAML what would become of it.
"""

from __future__ import annotations

import math
import os
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from discobeta import files, identity, record
from discobeta.closure import code_hash
from discobeta.data import counts
from discobeta.data.sources import named, resolve
from discobeta.design.arms import IDEAS, cell
from discobeta.design.config import (
    FIELDS,
    TOKENS_PER_PASS,
    TOKENS_PER_PASS_BF16,
    RunConfig,
    default_of,
    read_by,
)
from discobeta.design.schedule import schedule_of, total_steps
from discobeta.design.stages import BASE_STAGE, STAGES
from discobeta.design.yaml_text import as_yaml, read_yaml
from discobeta.errors import UserError
from discobeta.report import states
from discobeta.report.states import State

FIRST = (
    "accuracy", "bayes_accuracy", "nll", "oracle_nll", "excess_kl", "ece", "true_reward", "reward_gain",
    "kl_per_sequence", "win_rate", "mean_length", "loss", "perplexity",
)  # fmt: skip
"""Metrics of metrics.json that are shown before any other; what arms are compared by comes first in any case."""


@dataclass(frozen=True)
class Input:
    """Something that a run reads, and whether it is there."""

    key: str
    name: str
    there: bool
    detail: str


@dataclass
class Sheet:
    """What is to be said of one run; `text` says it to people, `vars` to programs."""

    where: str
    directory: str
    stage: str
    title: str
    arm: str
    ideas: dict[str, str]
    seed: int
    state: State
    changed: dict[str, dict[str, Any]]  # key -> value and default
    defaults: dict[str, Any]
    notes: list[str]
    plan: dict[str, str]
    inputs: list[Input]
    results: dict[str, float] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)  # what for -> the command

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        return "\n\n".join(_parts(self))


def of_config(config: RunConfig, notes: list[str], where: str, words: list[str]) -> Sheet:
    """Of a YAML. words: the command's own words behind `train`, from which the config was read."""
    directory = Path(config.output_dir) if config.output_dir else None
    state = state_of(directory, config) if directory else State("waiting", detail="output_dir is not said")
    sheet = _sheet(config, notes, where, state)
    command = shlex.join(["discobeta", "train", *words])
    if not directory:
        sheet.commands["train"] = f"{command} --set output_dir=runs/NAME"
    elif state.kind != "done":
        sheet.commands["resume" if state.kind == "interrupted" else "train"] = command
    sheet.commands |= _commands(directory, config, state, command)
    return sheet


def of_directory(directory: Path) -> Sheet:
    """Of a run directory, finished or not. Raises UserError where there is none."""
    if not (directory / "config.yaml").is_file():
        more = ""
        if (directory / "runs").is_dir():
            some = sorted(path.parent for path in (directory / "runs").rglob("config.yaml"))
            more = f"; it is a study's folder, and {some[0]} is a run of it" if some else "; it is a study's folder"
        raise UserError(f"{directory} is no run directory: it has no config.yaml{more}")
    settings = read_yaml(directory / "config.yaml")
    config, notes = RunConfig.from_mapping(settings, str(directory / "config.yaml"))
    written, config = config.output_dir, config.replace(output_dir=str(directory))
    state = state_of(directory, config)
    sheet = _sheet(config, notes, str(directory), state)
    if written and Path(written).absolute() != directory.absolute():
        sheet.notes.append(f"its config.yaml says output_dir: {written}; it is read here")
    study = next((part.parent for part in directory.parents if part.name == "runs"), None)
    if study and (study / "shared").is_dir():
        made = f"snakemake {shlex.quote(str(directory / 'provenance.json'))} --cores all --configfile …"
        sheet.notes.append(f"a run of the study in {study}, whose workflow makes it with all that it needs: {made}")
    words = ["discobeta", "train", str(directory / "config.yaml")]
    words += ["--set", f"output_dir={directory}"] if written != str(directory) else []
    if state.kind not in ("done", "running"):
        sheet.commands["resume" if state.kind == "interrupted" else "train"] = shlex.join(words)
    sheet.commands |= _commands(directory, config, state, shlex.join(words))
    return sheet


# --- where it stands


def state_of(directory: Path, config: RunConfig) -> State:
    """`states.state_of`, and what takes a reading of all of the run: is it undamaged, and what would be trained now?"""
    state, steps = states.state_of(directory), _steps_of(directory, config)
    if state.kind == "running":
        return replace(state, steps=steps)
    if (directory / "provenance.json").exists():
        fault = record.fault(directory, config, weights=True) or _outdated(directory, config)
        step = states.last_step(directory) or steps
        return State("failed" if fault else "done", step, steps, detail=fault or "sealed, and as it was written")
    if state.kind == "interrupted" and (different := record.difference_in(directory, config)):
        return State("waiting", None, steps, detail=f"{directory} holds another run, interrupted ({different})")
    if state.kind == "interrupted":
        return replace(state, steps=steps, detail=state.detail or "no checkpoint yet: it begins anew")
    return State("waiting", None, steps, detail="not begun")


def _outdated(directory: Path, config: RunConfig) -> str | None:
    """Why a whole run is not what would be trained today, though its settings are."""
    try:
        facts = record.read_facts(directory, weights=False)
        record.Record(directory, config, facts).check_base()
    except UserError as error:
        return str(error) if "was trained with another" in str(error) else None
    return None


def _steps_of(directory: Path, config: RunConfig) -> int | None:
    """How many steps the run has: by its settings and rows, or where these are unknown by its log's epochs."""
    if config.max_steps <= 0 and (rows := _rows(config)) is not None:
        steps = total_steps(config, schedule_of(config, rows[0], 1))
        return min(steps, config.stop_after_steps or steps)
    return states.steps_of(directory, config)


def _rows(config: RunConfig) -> tuple[int, str] | None:
    """(training rows, how that is known)."""
    tokens = Path(config.tokenized_path, "tokens.json") if config.tokenized_path else None
    if tokens and tokens.is_file():
        try:
            number = files.read_json(tokens)["counts"]["train"]
            return (number, f"tokenised in {config.tokenized_path}") if number > 0 else None
        except (UserError, KeyError, TypeError):
            return None
    try:
        counted = counts.rows_of(config)
    except UserError:
        return None
    return counted and (counted.train, f"{counted.why}, of which unusable ones are left out")


# --- what it is


def _sheet(config: RunConfig, notes: list[str], where: str, state: State) -> Sheet:
    stage, arm = config.stage, config.arm
    readable = [name for name in FIELDS if stage in read_by(name) and name not in _ELSEWHERE]
    values = {name: (getattr(config, name), _default(name, config)) for name in readable}
    ideas = {}
    for idea in IDEAS if stage != BASE_STAGE else ():
        does = {"absent": "absent", "idle": "idle: the head is there, and nothing reads it", "used": "used"}
        ideas[idea.label] = does[arm.state(idea.key).value]
        if arm.state(idea.key).value == "used":
            ideas[idea.label] += f": {idea.effect if idea.acts_in(stage) else 'but not in this stage'}"
    notes = list(notes)
    if stage != BASE_STAGE and (trained := arm.trained_as(stage)) != arm:
        notes.append(f"{cell(stage, arm.flags).reason}: it is the run of {trained.name}")
    elif arm.is_idle:
        notes.append(f"an idle head changes nothing: every file equals that of {arm.twin.name}")
    sheet = Sheet(
        where=where,
        directory=config.output_dir,
        stage=stage,
        title="The base" if stage == BASE_STAGE else STAGES[stage].title,
        arm="" if stage == BASE_STAGE else arm.name,
        ideas=ideas,
        seed=config.seed,
        state=state,
        changed={name: {"value": ours, "default": usual} for name, (ours, usual) in values.items() if ours != usual},
        defaults={name: ours for name, (ours, usual) in values.items() if ours == usual},
        notes=notes,
        plan=_plan(config, state),
        inputs=list(_inputs(config)),
    )
    directory = Path(config.output_dir) if config.output_dir else None
    if directory and state.kind == "done":
        sheet.results, sheet.cost = _results(directory, config), _cost(directory)
        if fault := record.measurement_fault(directory, config):
            sheet.notes.append(f"measurements: {fault}")
        try:
            if record.read_facts(directory, weights=False).get("code") != code_hash(stage):
                sheet.notes.append("made by other code of this stage than is here now")
        except UserError:
            pass
    return sheet


_ELSEWHERE = {"stage", "seed", "output_dir", *(flag for idea in IDEAS for flag in (idea.add, idea.use))}
"""Keys that are shown in a place of their own."""


def _default(name: str, config: RunConfig) -> Any:
    """What the key would be if it were not said."""
    if name == "tokens_per_pass" and config.stage != BASE_STAGE:
        return TOKENS_PER_PASS_BF16 if config.bf16 else TOKENS_PER_PASS
    if name == "lora_alpha" and config.lora_alpha == 2 * (config.lora_rank or 0):
        return config.lora_alpha
    if name in ("lora_rank", "lora_dropout", "lora_target") and config.adapter_name_or_path:
        return None
    return default_of(name, config.stage)


def _plan(config: RunConfig, state: State) -> dict[str, str]:
    """What the settings make, in words."""
    if config.stage == BASE_STAGE:
        what = config.model_type or config.model_name_or_path
        return {"model": f"{what}, all weights, by transformers' Trainer"}
    row, found = STAGES[config.stage], {}
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    noun = "responses" if not row.has_pairs else "pairs"
    rows, steps = _rows(config), state.steps
    found["rows"] = f"{rows[0]:,} ({rows[1]})" if rows else "not known before they are read"
    whole = steps
    if config.stop_after_steps and (config.max_steps > 0 or rows):
        whole = config.max_steps if config.max_steps > 0 else total_steps(config, schedule_of(config, rows[0], 1))
    length = f"{config.max_steps}" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"
    found[f"{row.step}s"] = (f"{steps:,}" if steps else length) + (
        f" of a schedule of {whole:,} (stop_after_steps)" if whole and steps and whole != steps else ""
    )
    batch = f"{size:,} {noun} on one device"
    if row.step_factors:
        optimiser = math.prod(getattr(config, key) for key in row.step_factors)
        batch = f"{size * config.ppo_buffer_size:,} {noun}, then {optimiser} optimiser steps of {size:,}"
    found[f"a {row.step}"] = batch
    found["passes"] = f"of at most {config.tokens_per_pass:,} tokens, padding included; a row has up to " + (
        f"twice {config.cutoff_len:,}" if row.has_pairs else f"{config.cutoff_len:,} + {config.max_new_tokens:,}"
    )
    found["learning rate"] = f"{config.learning_rate:g}, {config.lr_scheduler_type}"
    if whole:
        warmup = config.warmup_steps or math.ceil(whole * config.warmup_ratio)
        found["learning rate"] += f" after {warmup:,} {row.step}s of warm-up" if warmup else ", no warm-up"
    if config.finetuning_type == "lora" and config.lora_rank:
        alpha = config.lora_alpha or 2 * config.lora_rank
        found["trained"] = f"LoRA of rank {config.lora_rank} on {config.lora_target}, alpha {alpha}"
    else:
        found["trained"] = "all weights" if config.finetuning_type == "full" else "the adapter that it starts from"
    found["trained"] += f", {'bf16' if config.bf16 else 'float32'}"
    if row.has_pairs:
        found["loss"] = config.pref_loss + (f", beta {config.pref_beta:g}" if row.is_policy else "")
        used = config.arm.trained_as(config.stage).used
        found["loss"] += "".join(f"; {idea.effect}" for idea in IDEAS if idea.key in used)
    if row.is_policy and config.num_eval_generations:
        found["evaluation"] = (
            f"{config.num_eval_generations:,} prompts, {config.generations_per_prompt} "
            f"response{'s' * (config.generations_per_prompt > 1)} each of up to {config.max_new_tokens:,} tokens"
        )
    return found


def _inputs(config: RunConfig) -> Iterator[Input]:
    """Base, adapter, data, reference pass, reward models and Beta Head, and whether each is there."""
    for key, member in (("model_name_or_path", "config.json"), ("adapter_name_or_path", "adapter_config.json")):
        if name := getattr(config, key):
            yield _model(key, name, member, config)
    if config.tokenized_path and Path(config.tokenized_path, "tokens.json").is_file():
        yield Input("tokenized_path", config.tokenized_path, True, "the rows, tokenised")
    for key, (names, split) in named(config).items():
        yield from _data(key, names, split, config)
    made = {"reference_path": "reference.json", "reference_answers_path": "answers.json"}
    for key, member in made.items():
        if (name := getattr(config, key)) and config.stage in read_by(key):
            there = Path(name, member).is_file()
            yield Input(key, name, there, "made already" if there else "is made by the first run that needs it")
    if config.stage in STAGES:
        for reading in STAGES[config.stage].reads:
            several = config.reward_models if reading.idea is None else [getattr(config, reading.key)]
            for name in filter(None, several):
                yield _run(reading.key, name, reading.stage, config)


def _model(key: str, name: str, member: str, config: RunConfig) -> Input:
    if os.path.isdir(name):
        there = Path(name, member).is_file()
        return Input(key, name, there, "a local folder" if there else f"a local folder without {member}")
    try:
        identity.check_local(name, key)
    except UserError as error:
        return Input(key, name, False, str(error).removeprefix(f"{key}: "))
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, member, cache_dir=config.cache_dir, revision=config.model_revision)
    there = isinstance(cached, str)
    return Input(key, name, there, "in the hub's cache" if there else "on the hub: downloaded when the run starts")


def _data(key: str, names: str, split: str, config: RunConfig) -> Iterator[Input]:
    for name in filter(None, map(str.strip, names.split(","))):
        try:
            source = resolve(name, config, split)[0]
        except UserError as error:
            yield Input(key, name, False, str(error).removeprefix("dataset: "))
            continue
        if source.path:
            yield Input(key, name, True, "a local file" if str(source.path) == name else str(source.path))
        else:
            cached = any(True for _ in counts.infos(source.hub, config.cache_dir))
            place = "in the cache" if cached else "on the hub: downloaded when it is read"
            yield Input(key, name, cached, f"{source.hub}, split {source.split}, {place}")


def _run(key: str, name: str, stage: str, config: RunConfig) -> Input:
    """A run of an earlier stage; a reward model may be of another make."""
    if not (Path(name) / "config.yaml").is_file():
        return _model(key, name, "config.json", config)
    try:
        run = record.read(name, weights=False)
    except UserError as error:
        return Input(key, name, False, str(error))
    if run.config.stage != stage:
        return Input(key, name, False, f"a run of stage {run.config.stage}, not {stage}")
    return Input(key, name, True, f"a finished {stage} run, {run.config.arm.name}, seed {run.config.seed}")


# --- what came out


def _results(directory: Path, config: RunConfig) -> dict[str, float]:
    """Its metrics, those by which arms are compared first; nested ones with a slash, without topics."""
    try:
        measured = files.read_json(directory / "metrics.json")
    except UserError:
        return {}
    flat = {
        f"{name}/{inner}" if inner else name: number
        for name, value in measured.items()
        if name != "by_topic"
        for inner, number in (value.items() if isinstance(value, dict) else [("", value)])
        if isinstance(number, int | float) and not isinstance(number, bool)
    }
    compared = STAGES[config.stage].compared if config.stage in STAGES else ()
    order = [name for name in dict.fromkeys((*compared, *FIRST)) if name in flat]
    return {name: flat[name] for name in [*order, *(name for name in flat if name not in order)]}


def _cost(directory: Path) -> dict[str, Any]:
    try:
        cost = files.read_json(directory / "cost.json")
    except UserError:
        return {}
    return {key: cost[key] for key in ("seconds", "rows", "tokens", "peak_memory_bytes", "device") if key in cost}


def _commands(directory: Path | None, config: RunConfig, state: State, train: str) -> dict[str, str]:
    """Beside the command that trains it: what else may be done with it."""
    if not directory:
        return {}
    found = {}
    if state.kind == "done" and config.stage in STAGES:
        found["evaluate"] = shlex.join(["discobeta", "evaluate", str(directory)])
    if state.kind in ("done", "failed"):
        joint = " " if "--set" in train.split() else " --set "
        found["train again"] = f"{train}{joint}overwrite_output_dir=true"
    return found


# --- as text


def _parts(sheet: Sheet) -> Iterator[str]:
    arm = f", arm {sheet.arm}" if sheet.arm else ""
    lines = [f"{sheet.where}: {sheet.title} ({sheet.stage}){arm}, seed {sheet.seed}"]
    lines += [f"  {name:14} {text}" for name, text in sheet.ideas.items()]
    state = sheet.state
    done = "" if state.step is None else f" at step {state.step:,}"
    done += f" of {state.steps:,}" if done and state.steps else ""
    words = {
        "done": "finished", "failed": "not to be used", "waiting": "not trained", "running": "running",
        "interrupted": "interrupted",
    }  # fmt: skip
    detail = state.detail if state.detail != "not begun" else ""
    lines.append(
        f"  {'state':14} {words[state.kind]}{done if state.kind != 'done' else ''}" + (f": {detail}" * bool(detail))
    )
    if sheet.directory and sheet.directory != sheet.where:
        lines.append(f"  {'directory':14} {sheet.directory}")
    yield "\n".join(lines)
    if sheet.results:
        yield _table("Results", {name: _number(value) for name, value in list(sheet.results.items())[:MOST_RESULTS]})
    if sheet.cost:
        took = {"seconds": "{:.1f}", "rows": "{:,}", "tokens": "{:,}", "peak_memory_bytes": "{:,}", "device": "{}"}
        yield _table("Cost", {name: took[name].format(value) for name, value in sheet.cost.items()})
    yield _table("What the settings make", sheet.plan)
    if sheet.inputs:
        rows = [
            (f"{one.key}: {one.name}", one.detail if one.there else f"NOT THERE: {one.detail}") for one in sheet.inputs
        ]
        rows = [(name, text.replace("NOT THERE: on the hub", "on the hub")) for name, text in rows]
        yield "\n".join(["What it reads", *(f"  {name}\n      {text}" for name, text in rows)])
    yield _table(
        "Settings that differ from their defaults",
        {name: f"{as_yaml(one['value'])} (default {as_yaml(one['default'])})" for name, one in sheet.changed.items()},
    )
    rest = ", ".join(f"{name}: {as_yaml(value)}" for name, value in sheet.defaults.items())
    yield "At their defaults\n" + textwrap.fill(
        rest, 118, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    if sheet.notes:
        yield "\n".join(["Notes", *(f"  {note}" for note in sheet.notes)])
    if sheet.commands:
        yield "\n".join(["Commands", *(f"  {what + ':':14} {command}" for what, command in sheet.commands.items())])


MOST_RESULTS = 16


def _table(title: str, rows: dict[str, str]) -> str:
    if not rows:
        return f"{title}\n  none"
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows.items())])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
