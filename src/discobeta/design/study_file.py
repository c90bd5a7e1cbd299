"""What a study config may say: every key once, with its type, its default, its bounds and its meaning.

`read` makes a `StudyFile` of the settings, or a `UserError` of what is wrong with them. Of the same models
`design/keys.py` makes the schema that editors read and docs/reference/study.md. A run never imports this module: it
would pay for pydantic.
"""

from __future__ import annotations

import math
import re
from functools import cache, reduce
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from discobeta.design import config, variants
from discobeta.design.arms import ARMS, Arm
from discobeta.design.stages import BASE_STAGE, STAGES
from discobeta.design.study_sections import DATA_KEYS, MODEL_KEYS, goes_to, path_fault, place_of
from discobeta.design.values import LARGEST, in_words
from discobeta.errors import UserError, did_you_mean, shown

LONGEST_NAME = 100
"""Characters of a study's name, which becomes a folder, and of a key."""

SNAKEMAKE = ("configfile", "configfiles", "profile", "cores", "jobs")
"""Options that are taken for keys, as in `--config configfile=x.yaml`."""

MOST_SEEDS = 1000

MOST_POINTS = 1000
"""Of the sweep of a stage."""


def _texts(settings: Any) -> list[str]:
    """The keys of a mapping, which must be texts; of anything else, none."""
    keys = list(settings) if isinstance(settings, dict) else []
    for key in keys:
        if not isinstance(key, str):
            raise ValueError(f"the key {shown(key)} should be text (write it in quotes)")
    return keys


# --- run keys in a study


def _run_keys(settings: Any, info: ValidationInfo) -> Any:
    """The keys of a section, each at its place; what stands under them is checked with the runs."""
    section = info.field_name
    if section == BASE_STAGE and not settings and settings is not None:
        raise ValueError("say what is trained (model_type, or model_name_or_path)")
    for key in _texts(settings):
        if len(key) > LONGEST_NAME:
            raise ValueError(f"unknown key {shown(key)}")
        if place := place_of(key, section):
            raise ValueError(f"{key} may not stand here: {place}")
        if fault := path_fault(key, settings[key]):
            raise ValueError(f"{key}: {fault}")
    return {} if settings is None else settings


RunKeys = Annotated[dict[str, Any], BeforeValidator(_run_keys)]


DATASETS = ("dataset", "eval_dataset", "calibration_dataset")


def _as_in_a_run(name: str) -> tuple[Any, Any]:
    """The field for a run key, which is read as in a run; null is as if it were not there."""

    def read(value: Any) -> Any:
        is_list = isinstance(value, list) and all(isinstance(word, str) for word in value)
        if name in DATASETS and not (is_list or isinstance(value, str | None)):
            raise ValueError(f"{shown(value)} should be a name, or a list of names")
        value = None if value is None else config.value_of(name, value)
        if fault := path_fault(name, value):
            raise ValueError(fault)
        return value

    entry, schema = config.FIELDS[name], config.schema_of(name)
    schema["type"] = list(dict.fromkeys([*schema["type"], "null"]))
    field = Field(entry.default, description=entry.metadata["help"])
    return Annotated[Any, BeforeValidator(read), WithJsonSchema(schema)], field


# --- the sections


class Section(BaseModel):
    """Some keys of a study. Types are those of the YAML: `true` is no number, and "2" is no whole one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, settings: Any) -> Any:
        names = _texts(settings)
        if "study" in cls.model_fields and "stage" in names and "study" not in names:
            raise ValueError("this is a run (it has `stage:`) and no study: `discobeta train` and `show` take it")
        for key in names:
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {shown(key)}{cls._instead_of(key, settings[key])}")
        return settings

    @classmethod
    def _instead_of(cls, key: str, value: Any) -> str:
        """What is right in place of an unknown key."""
        if len(key) > LONGEST_NAME:
            return ""
        if near := did_you_mean(key, cls.model_fields):
            return near
        if key in SNAKEMAKE:
            return f": it is an option of snakemake, and no key: --{key}"
        if place := goes_to(key, value if len(shown(value)) < LONGEST_NAME else "…"):
            return f": {place}"
        return f"; the keys are {', '.join(cls.model_fields)}"

    def given(self) -> dict[str, Any]:
        """The run keys that are there, and not null."""
        return self.model_dump(exclude_unset=True, exclude_none=True, exclude={"world", "sft"})


Whole = Annotated[int, Field(ge=1, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]


class World(Section):
    """The embedded world, whose truth is known; fresh pairs for every seed."""

    sft_examples: Whole = Field(6000, description="texts that the base learns from")
    train: Whole = Field(9600, description="pairs per seed")
    evaluation: Whole = Field(1600, description="held-out pairs per seed")
    calibration: Count = Field(
        0, description="pairs per seed that nothing is trained or measured on, for what is fitted after training"
    )
    every_prompt: bool = Field(
        False, description="held-out pairs go through all 922 held-out prompts in random order, again and again"
    )
    noise: Literal["heteroscedastic", "homoscedastic", "topic", "response"] = Field(
        "heteroscedastic",
        description="of the labels: by topic and response, by one of the two, or (the control) equal everywhere",
    )
    labels: Literal["probit", "logistic"] = Field(
        "probit", description="how a label's probability follows from the rewards' difference over its noise"
    )
    flips: Annotated[float, Field(ge=0, le=0.49)] = Field(
        0.0, description="share of the labels that are turned round after they are drawn"
    )
    qualities: Literal["shared", "topic"] = Field(
        "shared", description="of the words: the same in all topics, or in each topic another permutation"
    )
    own: bool = Field(
        False,
        description="every seed of the study is a world of its own: its own corpus and base, and its own permutation "
        "of the topics over noise and familiarity; the seed here and in `base: sft:` then counts for nothing",
    )
    seed: Seed = Field(1, description="of the corpus and of what the topics are")


Rows = create_model("Rows", __base__=Section, **{name: _as_in_a_run(name) for name in DATA_KEYS})


class Data(Rows):
    """Either the embedded world or a preference data set, whose rows are the same for every seed."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"world": {"type": "object"}}, "required": ["world"]},
            "then": {"properties": dict.fromkeys(DATA_KEYS, {"type": "null"})},
        }
    )

    world: World | None = Field(None, description="makes its own rows ({}: by default); next to it stands nothing else")

    @model_validator(mode="after")
    def _rows_to_compare_runs_on(self) -> Self:
        if self.world:
            if beside := next(iter(self.given()), None):
                raise ValueError(f"world makes its own rows: leave {beside} out")
        elif not self.dataset:
            raise ValueError("give dataset (a file, a hub id or a name) or world")
        elif not self.eval_dataset and not self.val_size:
            raise ValueError("give eval_dataset or val_size (rows to compare runs on)")
        return self


class Prompts(Rows):
    """Other prompts for ppo than those of `data`; only next to a preference data set."""

    @model_validator(mode="after")
    def _prompts_to_measure_on(self) -> Self:
        given = self.given()
        if given and not self.dataset:
            raise ValueError("give dataset, or leave prompts out to use those of data")
        if given and not self.eval_dataset and not self.val_size:
            raise ValueError("give eval_dataset or val_size (prompts to measure policies on)")
        return self


Model = create_model("Model", __base__=Section, **{name: _as_in_a_run(name) for name in MODEL_KEYS})


class Base(Model):
    """What policy and reference start from: a model that is there, or one that stage sft trains first."""

    sft: RunKeys = Field({}, description="the run that trains it")

    @model_validator(mode="after")
    def _either_model_or_sft(self) -> Self:
        if bool(self.sft) == (self.model_name_or_path is not None):
            raise ValueError("give either model_name_or_path or sft (a base trained here)")
        if self.sft and (beside := next(iter(self.given()), None)):
            raise ValueError(f"{beside} may not stand next to sft: it belongs in it")
        return self


# --- names


PLAIN_NAME = "^[A-Za-z0-9][A-Za-z0-9_.-]*$"


def _plain_name(name: Any) -> Any:
    is_plain = isinstance(name, str) and re.fullmatch(PLAIN_NAME, name)
    if not is_plain or name == "published" or len(name) > LONGEST_NAME:
        raise ValueError(
            f"{shown(name)} should be a plain folder name of at most {LONGEST_NAME} characters, and not 'published'"
        )
    return name


def _different(values: list) -> list:
    if len(set(values)) < len(values):
        raise PydanticCustomError("not_different", "said twice")
    return values


DIFFERENT = FailFast(), AfterValidator(_different), Field(min_length=1, json_schema_extra={"uniqueItems": True})
"""What makes of a list one of different values."""


def an_arm(name: str) -> str:
    if name not in ARM_NAMES:
        raise ValueError(f"no arm is called {shown(name)}; the arms are {', '.join(ARM_NAMES)}")
    return name


def _an_arm_without_idle_heads(name: str) -> str:
    if Arm.from_name(an_arm(name)).is_idle:
        raise ValueError(f"{name} has an idle head, which changes nothing: name {Arm.from_name(name).twin.name}")
    return name


ARM_NAMES = [arm.name for arm in ARMS]
ARMS_SCHEMA = {"type": "array", "items": {"type": "string", "enum": ARM_NAMES}, "minItems": 1, "uniqueItems": True}


# --- beside the grid


class Control(Section):
    """Runs beside the grid: an arm, in some stages, that differs from the grid's by settings and by no flag."""

    stages: Annotated[list[Literal[tuple(STAGES)]], *DIFFERENT] = Field(description="the stages that train it")
    arm: Annotated[str, AfterValidator(_an_arm_without_idle_heads)] = Field(
        "baseline", description="the arm that it is a variant of"
    )
    label: str = Field("", description="what the tables call it; by default its name")
    settings: Annotated[dict[str, Any], BeforeValidator(lambda settings: {} if settings is None else settings)] = Field(
        {}, description="keys of a run, on top of those of the stage's section"
    )
    swept: bool = Field(False, description="whether the points of the stage's sweep are trained of it too")
    replicate: Seed = Field(
        0, description="n: as the arm on the same rows, with the n-th other random streams of the seed; 0: with its own"
    )
    reward_models: Annotated[list[str], *DIFFERENT[:2]] = Field(
        [], description="arms or controls of the stage of reward models, of which its policies are given all"
    )

    @model_validator(mode="after")
    def _differs_by_settings(self) -> Self:
        if not (self.settings or self.replicate or self.reward_models):
            raise ValueError("say how it differs from its arm (settings, replicate or reward_models)")
        if len(self.label) > LONGEST_NAME or not self.label.isprintable():
            raise ValueError(f"label: {shown(self.label)} should be a line of at most {LONGEST_NAME} characters")
        for stage in self.stages:
            for key in _texts(self.settings):
                if fault := variants.fault_of(key, stage):
                    raise ValueError(f"settings: {fault}")
            if self.reward_models and STAGES[stage].judge is None:
                raise ValueError(f"reward_models: {stage} is given none")
        return self


def _controls(settings: Any) -> Any:
    """Those that are there, each under a name of its own; null takes one away that an earlier file has."""
    for name in _texts(settings):
        if not re.fullmatch(PLAIN_NAME, name) or len(name) > LONGEST_NAME:
            raise ValueError(
                f"{shown(name)} should be a plain folder name of at most {LONGEST_NAME} characters (no = and no comma, "
                "which stand in the names of a sweep's points)"
            )
        if re.fullmatch(r"seed-\d+", name, re.IGNORECASE):
            raise ValueError(f"{name} is the folder of the arm's own run: give it another name")
        if name in (*ARM_NAMES, variants.TUNED):
            what = "what tables call a tuned β" if name == variants.TUNED else "an arm"
            raise ValueError(f"{name} is {what}: give it another name")
    if settings is None:
        return {}
    return {name: one for name, one in settings.items() if one is not None} if isinstance(settings, dict) else settings


def _swept(settings: Any, info: ValidationInfo) -> Any:
    """Run key -> different values of it, typed, of the sweep of one stage; under `arms` the arms that are swept."""
    if not isinstance(settings, dict):
        return {} if settings is None else settings
    found = {}
    for key in _texts(settings):
        values = settings[key]
        if values is None:
            continue
        if fault := None if key == "arms" else variants.fault_of(key, info.field_name):
            raise ValueError(fault)
        if not isinstance(values, list) or not values:
            raise ValueError(f"{key}: {shown(values)} should be a list of values")
        try:
            if key == "arms":
                found[key] = [_an_arm_without_idle_heads(name) for name in values]
            else:
                found[key] = [config.value_of(key, value) for value in values]
                for value in found[key]:
                    variants.text_of(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if len(set(found[key])) < len(values):
            raise ValueError(f"{key}: {shown(values)} should be a list of different values")
    if settings and not set(found) - {"arms"}:
        raise ValueError("say which keys are swept, e.g. pref_beta: [0.1, 0.2]")
    if (points := math.prod(len(values) for key, values in found.items() if key != "arms")) > MOST_POINTS:
        raise ValueError(f"{points:,} points; a stage is swept over at most {MOST_POINTS:,}")
    return found


Sweep = create_model(
    "Sweep",
    __base__=Section,
    **{
        name: (
            Annotated[dict[str, Any], BeforeValidator(_swept)],
            Field({}, description=f"key of a run of {name} -> the values that it has beside the grid's"),
        )
        for name in STAGES
    },
)


# --- the study


class StudyKeys(Section):
    """One grid of runs: stages x arms x seeds on the same base and the same data."""

    study: Annotated[str, BeforeValidator(_plain_name)] = Field(
        description="name of the study; it writes to results/<study>",
        json_schema_extra={"pattern": PLAIN_NAME, "maxLength": LONGEST_NAME},
    )
    environment: Literal["cpu", "cuda"] = Field(
        "cpu", description="the conda environment of the jobs, with `snakemake --sdm conda`: envs/<environment>.yaml"
    )
    seeds: Annotated[list[Seed], *DIFFERENT] = Field(
        [1, 2],
        description="one run per arm and seed; arms share a seed's data, initial weights and data order",
        max_length=MOST_SEEDS,
    )
    stages: Annotated[list[Literal[tuple(STAGES)]], *DIFFERENT] = Field(list(STAGES), description="what is trained")
    idle_arms: Literal["run", "prove"] = Field(
        "run",
        description="run: train an arm with an idle head like any other; prove: train it and its twin for prove_steps "
        "optimiser steps only, compare them byte for byte, and report the arm as its twin",
    )
    prove_steps: Whole = Field(20, description="length of a proof, in optimiser steps")
    gpus_per_run: Whole = Field(
        1,
        description="devices that share one training run, its batch divided among them; a cluster's profile must ask "
        "for as many (`gpu:`)",
    )
    arms: Annotated[
        list[Annotated[str, AfterValidator(an_arm)]],
        *DIFFERENT,
        BeforeValidator(lambda arms: ARM_NAMES if arms == "all" else arms),
        WithJsonSchema({"anyOf": [ARMS_SCHEMA, {"const": "all"}]}),
    ] = Field("all", description="the arms that are trained, by name", validate_default=True)
    data: Data = Field(description="the rows that are trained and measured on")
    prompts: Prompts | None = Field(
        None, description="the prompts of ppo, if they are not those of `data`; only next to a preference data set"
    )
    base: Base = Field(description="what policy and reference start from")
    common: RunKeys = Field({}, description="keys of a run for all stages that read them")
    controls: Annotated[dict[str, Control], BeforeValidator(_controls)] = Field(
        {}, description="runs beside the grid, by name: an arm that differs by settings and by no flag"
    )
    sweep: Annotated[Sweep, BeforeValidator(lambda sweep: {} if sweep is None else sweep)] = Field(
        Sweep(),
        description="runs beside the grid, by stage: the product of the values of some keys, of every arm without idle "
        "heads (or those of `arms`) and of every control that is `swept`",
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_missing(cls, settings: Any) -> Any:
        """What is empty is as if it were not there."""
        required = [name for name, field in cls.model_fields.items() if field.is_required()]
        if not isinstance(settings, dict):
            return settings
        return {key: value for key, value in settings.items() if key not in required or value}

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        arms = [Arm.from_name(name) for name in self.arms]
        for arm in arms:
            if self.idle_arms == "prove" and arm.twin not in arms:
                raise ValueError(f"arms: {arm.name} is proved against {arm.twin.name}: list that too")
        for stage in self.stages:  # what a stage reads must be trained too
            for reading in STAGES[stage].reads:
                needing = [arm.name for arm in arms if not reading.idea or arm.has(reading.idea)]
                if needing and reading.stage not in self.stages:
                    raise ValueError(
                        f"stages: {stage} reads the runs of {reading.stage} ({reading.key} of {needing[0]}): add "
                        f"{reading.stage}"
                    )
        if self.data.world and self.data.world.own and not self.base.sft:
            raise ValueError("data: world: own: true needs base: sft (every world trains a base of its own)")
        rows: set[tuple[str, str]] = {(stage, variants.AS_IN_THE_GRID) for stage in STAGES}
        for name, control in self.controls.items():
            own = {(stage, control.label or name) for stage in control.stages}
            if own & rows:
                label = control.label or name
                raise ValueError(f"controls: {name}: label: {shown(label)} is what another row of the tables is called")
            rows |= own
        if self.prompts and self.prompts.given() and self.data.world:
            raise ValueError("prompts: a base of the world knows the world's prompts only: leave it out")
        for key in self.common:
            if key in config.FIELDS and not set(self.stages) & set(config.read_by(key)):
                raise ValueError(
                    f"common: {key} may not stand here: no stage of this study reads it ({config.who_reads(key)})"
                )
        return self


_OF_STAGES = {
    name: (RunKeys, Field({}, description=f"keys of a run of {name}, on top of those of `common`")) for name in STAGES
}
StudyFile = create_model("StudyFile", __base__=StudyKeys, __doc__=StudyKeys.__doc__, **_OF_STAGES)
"""Every key of a study; the sections of the stages are named by their table."""


def read(settings: Any, where: str) -> StudyFile:
    """The study that the settings say.

    where: the file, which every error begins with. Raises UserError.
    """
    try:
        return StudyFile.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{where}{_first_fault(error, settings)}") from None


def _first_fault(error: ValidationError, settings: Any) -> str:
    """What is wrong, where, and what would be right, after the name of the file."""
    fault = error.errors(include_url=False)[0]
    where, value, kind = fault["loc"], fault["input"], fault["type"]
    is_item = bool(where) and isinstance(where[-1], int)
    if is_item and not (kind in ITEM_FAULTS and isinstance(value, int | str)):
        where, kind = where[:-1], "list_type"
        value = reduce(lambda section, key: section[key], where, settings)  # so all of the list is shown
    place = "".join(f": {part}" for part in where if not isinstance(part, int))
    if kind == "missing":
        return f"{place} is missing"
    if kind in ("model_type", "dict_type"):
        return f"{place} should hold `key: value` lines, not {shown(value)}"
    if kind == "value_error":
        return f"{place}: {fault['ctx']['error']}"
    if kind == "too_long":
        return f"{place}: {len(value):,} of them; a study has at most {MOST_SEEDS:,}"
    if kind == "less_than_equal" and fault["ctx"]["le"] == LARGEST:
        return f"{place}: {shown(value)} should be at most {LARGEST}"
    return f"{place}: {shown(value)} should be {in_words(_schema_at(where))}"


ITEM_FAULTS = ("literal_error", "greater_than_equal", "less_than_equal", "value_error")


json_schema = cache(StudyFile.model_json_schema)


def _schema_at(place: tuple[str | int, ...]) -> dict[str, Any]:
    """What the JSON schema says of a key, or of an item of its list."""
    schema = whole = json_schema()
    for part in place:
        inside = schema.get("properties", {}) if isinstance(part, str) else {part: schema.get("items")}
        schema = inside.get(part) or schema["additionalProperties"]
        for option in schema.get("anyOf", [schema]):
            if "$ref" in option:
                schema = whole["$defs"][option["$ref"].rpartition("/")[2]]
    return schema
