"""A study = one grid of runs: stages x arms x seeds on the same base and the same data.

Everything that turns a study config into run configs happens here, so that the workflow, the
tables and the tests agree on it. The workflow only calls this module; it works without Snakemake.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discobeta.design.arms import ARMS, CORNERS, FLAGS, Arm, State
from discobeta.design.config import RunConfig, parse_overrides, read_yaml
from discobeta.design.stages import BASE_STAGE, READ_KEYS, STAGES
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
LARGEST = 2**63 - 1
"""Of whole numbers: what a column of a table holds."""

LONGEST_NAME = 100
"""Characters of a study's name, which becomes a folder, and of a key."""

WORLD_DEFAULTS = {"sft_examples": 6000, "train": 9600, "evaluation": 1600, "noise": "heteroscedastic", "seed": 1}
WORLD_STEPS = {"corpus": ("seed", "sft_examples", "noise"), "pairs": ("train", "evaluation")}
"""Which of them each step of the world reads; what pairs read of the corpus, they read from its record."""

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
CORPUS_KEYS = ["dataset", "dataset_dir", "split", "cutoff_len", "max_samples", "max_unusable_rows"]
"""What the base is trained on unless `base: sft:` says otherwise: the study's own training data."""

TOKENS_DEPEND_ON = ["stage", "tokenizer_name", *MODEL_KEYS, *DATA_KEYS, "tokenized_path", "output_dir"]
"""What `discobeta prepare` reads; the seed too, where it decides which rows are held out."""

REFERENCE_KEYS = ["finetuning_type", "bf16", "flash_attn", "deterministic", "per_device_eval_batch_size"]
"""What the reference pass depends on besides model and data: not seed, adapter, beta or loss."""

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


@dataclass(frozen=True)
class Run:
    """One trained run of a study."""

    stage: str
    arm: Arm
    seed: int
    directory: Path
    proof: bool = False  # only the first prove_steps steps, to compare an idle arm with its twin


class Study:
    """A checked study. Construction validates the merged config of every run that it holds."""

    def __init__(self, settings: dict[str, Any], where: str = "study config"):
        self._where = where
        settings = _mapping(settings, where)
        _known(settings, KEYS, where)
        for key in ("study", "data", "base"):
            if not settings.get(key):
                raise UserError(f"{where}: {key} is missing")
        self.settings = settings
        self.name: str = settings["study"]
        is_plain = isinstance(self.name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name)
        if not is_plain or self.name == "published" or len(self.name) > LONGEST_NAME:
            raise UserError(
                f"{where}: study: {shown(self.name)} should be a plain folder name of at most {LONGEST_NAME} "
                "characters, and not 'published'"
            )
        self.directory = Path("results") / self.name
        self.seeds: list[int] = self._listed("seeds", [1, 2], int)
        self.stages: list[str] = self._listed("stages", list(STAGES), str)
        for stage in self.stages:
            if stage not in STAGES:
                raise UserError(f"{where}: stages: {shown(stage)} should be one of {', '.join(STAGES)}")
        self.idle_arms: str = settings.get("idle_arms", "run")
        if self.idle_arms not in ("run", "prove"):
            raise UserError(f"{where}: idle_arms: {shown(self.idle_arms)} should be run or prove")
        if (environment := settings.get("environment", "cpu")) not in ENVIRONMENTS:
            raise UserError(f"{where}: environment: {shown(environment)} should be {' or '.join(ENVIRONMENTS)}")
        self.prove_steps: int = settings.get("prove_steps", 20)
        self.gpus_per_run: int = settings.get("gpus_per_run", 1)
        self.arms: list[Arm] = self._arms()
        self.world: dict[str, Any] | None = None
        self._read_data()
        self._read_prompts()
        self._read_base()
        self._first_configs: dict[tuple[str, Arm, bool], tuple[dict[str, Any], RunConfig]] = {}
        self._configs: dict[Run, RunConfig] = {}
        self._proof_lengths: dict[str, int] = {}
        self._check_numbers()
        self._sections = {name: self._section(name) for name in ("common", *STAGES)}
        self._check_stages()
        self._runs = [run for stage in self.stages for arm in self.arms_of(stage) for run in self._runs_of(stage, arm)]
        self._by_place = {(run.stage, run.arm, run.seed, run.proof): run for run in self._runs}
        self._check()

    @classmethod
    def read(cls, configfiles: str | Path | Iterable[str | Path], overrides: Iterable[str] = ()) -> Study:
        """From one YAML file or several, later ones on top key by key; `-` is standard input.

        overrides: `key=value` words on top of the files, e.g. `seeds=[1]` or `data={dataset: x.jsonl}`.
        """
        if isinstance(configfiles, str | Path):
            configfiles = [configfiles]
        settings: dict[str, Any] = {}
        for layer in (*map(read_yaml, configfiles), parse_overrides(list(overrides))):
            settings = _merged(settings, layer)
        return cls(settings, ", ".join(map(str, configfiles)))

    # --- what is trained

    def arms_of(self, stage: str) -> list[Arm]:
        """The arms that the study trains in `stage`; in rm, arms that differ only in beta are one."""
        return list(dict.fromkeys(arm.trained_as(stage) for arm in self.arms))

    def runs(self) -> list[Run]:
        """Every run of the study, proofs included, by stage, arm and seed."""
        return self._runs

    def run(self, stage: str, arm: Arm | str, seed: int, proof: bool = False) -> Run:
        """The run with these coordinates, which the study must hold."""
        arm = Arm.from_name(arm) if isinstance(arm, str) else arm
        if (found := self._by_place.get((stage, arm, seed, proof))) is not None:
            return found
        raise UserError(f"{self._where}: no {'proof' if proof else 'run'} of {stage}, {arm.name}, seed {seed}")

    def run_settings(self, run: Run) -> dict[str, Any]:
        """The flat run YAML of `run`: flags from the grid, the rest merged from the study's sections."""
        return {
            "stage": run.stage,
            "output_dir": str(run.directory),
            "seed": run.seed,
            **run.arm.flags,
            **self.model,
            **self._reads(run),
            **({"ground_truth": "world"} if self.world else {}),
            **self._sections["common"],
            **self._sections[run.stage],
            **self._shared_out(run.stage),
            "overwrite_output_dir": True,  # Snakemake has decided that what is there is out of date
            **({"stop_after_steps": self.proof_length(run.stage)} if run.proof else {}),
        }

    def config(self, run: Run) -> RunConfig:
        """The checked config of `run`, with today's defaults.

        Seeds differ in the seed and in paths alone, so one config per arm is made from its settings.
        """
        if run in self._configs:
            return self._configs[run]
        kind = run.stage, run.arm, run.proof
        if kind not in self._first_configs:
            first = self.run(run.stage, run.arm, self.seeds[0], run.proof)
            settings, proof = self.run_settings(first), ", proof" if run.proof else ""
            label = f"{run.stage}, arm {run.arm.name}, seed {first.seed}{proof}"
            self._first_configs[kind] = settings, self._checked(settings, label)
        known, config = self._first_configs[kind]
        settings = self.run_settings(run)
        changes = {key: value for key, value in settings.items() if value != known[key]}
        self._configs[run] = config.replace(**changes)
        return self._configs[run]

    def _shared_out(self, stage: str) -> dict[str, int]:
        """The batch of one device, if several share what the study says of one: the run computes the same.

        A forward pass over all devices keeps its rows; only where they cannot be shared, a step's passes are.
        """
        if self.gpus_per_run == 1:
            return {}
        settings = self._sections["common"] | self._sections[stage]
        for key, default in (("per_device_train_batch_size", 8), ("gradient_accumulation_steps", 1)):
            size = settings.get(key, default)
            if isinstance(size, int) and size % self.gpus_per_run == 0:
                return {key: size // self.gpus_per_run}
        raise UserError(
            f"{self._where}: gpus_per_run: {self.gpus_per_run} divides neither per_device_train_batch_size nor "
            f"gradient_accumulation_steps of {stage}, so the GPUs cannot share its batch"
        )

    def _reads(self, run: Run) -> dict[str, Any]:
        """Run keys of the rows that `run` sees and of what other steps have made for it."""
        row, draw = STAGES[run.stage], self.draw(run.seed)
        upstream = {key: str(other.directory) for key, other in self.upstream(run).items()}
        if row.rows == "prompts":
            draw = self.prompt_draw(run.seed)
            return {**self.prompt_data(draw), "tokenized_path": str(self.prompts(draw)), **upstream}
        reference = {"reference_path": str(self.reference(draw))} if row.reference_pass else {}
        return {**self.data(draw), "tokenized_path": str(self.tokens(draw)), **reference, **upstream}

    def upstream(self, run: Run) -> dict[str, Run]:
        """Run key -> the run that `run` reads: in ppo its reward model and, if its arm has one, its Beta Head.

        They have the arm's states and seed. Where idle arms are only proved, the twin's whole run
        stands for the one that an idle arm does not have: it would be equal. So a proof reads what
        the twin's proof reads. Only an idle head comes from a proof: that it is there, and
        changes nothing, is the point.
        """
        found = {}
        for reading in STAGES[run.stage].reads:
            arm, proves = run.arm.trained_as(reading.stage), self.idle_arms == "prove"
            if reading.idea and proves and run.arm.state(reading.idea) is State.IDLE:
                found[reading.key] = self.run(reading.stage, arm, run.seed, proof=True)
            elif not reading.idea or run.arm.has(reading.idea):
                found[reading.key] = self.run(reading.stage, arm.twin if proves else arm, run.seed)
        return found

    def proof_length(self, stage: str) -> int:
        """After how many steps of `stage` a proof stops: prove_steps optimiser steps, rounded up.

        In ppo a step is an update, which is ppo_epochs * ppo_buffer_size optimiser steps.
        """
        if not STAGES[stage].step_factors:
            return self.prove_steps
        if stage not in self._proof_lengths:
            settings = {"stage": stage, "model_name_or_path": "-", **self._sections["common"], **self._sections[stage]}
            config, _ = RunConfig.from_mapping(settings, f"{self._where}: {stage}")
            steps = math.prod(getattr(config, key) for key in STAGES[stage].step_factors)
            self._proof_lengths[stage] = -(-self.prove_steps // steps)
        return self._proof_lengths[stage]

    def proof_text(self, stage: str) -> str:
        """E.g. `first 20 steps`, or `first 3 updates` in ppo."""
        length, noun = self.proof_length(stage), STAGES[stage].step
        return f"first {length} {noun}s" if length > 1 else f"first {noun}"

    def figures_of(self, stage: str) -> list[str]:
        """The figures that the report makes of a stage, without the `-<stage>` that their files end in."""
        names, has_pairs = ["learning-curves"], STAGES[stage].has_pairs
        if has_pairs:
            names.append("reliability")
        elif self.world:
            names.append("reward-by-noise")
        if set(CORNERS) <= set(self.arms_of(stage)) and (has_pairs or self.world):
            names.append("interaction")
        return names

    # --- what the runs share

    @property
    def model(self) -> dict[str, Any]:
        """Run keys of the model that reference and policy start from."""
        return {"model_name_or_path": str(self.base_directory)} if self.sft else self._model

    @property
    def shared_directory(self) -> Path:
        return self.directory / "shared"

    @property
    def world_directory(self) -> Path:
        return self.shared_directory / "world"

    @property
    def base_directory(self) -> Path:
        return self.shared_directory / "base"

    def draw(self, seed: int) -> str:
        """Which data the runs of `seed` see: their own if the seed decides (fresh pairs, val_size), else the same."""
        return f"seed-{seed}" if self.world or self._data.get("val_size") else "all"

    def draws(self) -> list[str]:
        return list(dict.fromkeys(map(self.draw, self.seeds)))

    def prompt_draw(self, seed: int) -> str:
        """Which prompts the ppo run of `seed` sees, likewise."""
        if not self._prompts:
            return self.draw(seed)
        return f"seed-{seed}" if self._prompts.get("val_size") else "all"

    def pairs(self, draw: str) -> Path:
        return self.shared_directory / "data" / draw / "pairs"

    def tokens(self, draw: str) -> Path:
        return self.shared_directory / "data" / draw / "tokens"

    def prompts(self, draw: str) -> Path:
        return self.shared_directory / "data" / draw / "prompts"

    def reference(self, draw: str) -> Path:
        return self.shared_directory / "data" / draw / "reference"

    @property
    def reference_stage(self) -> str | None:
        """The stage whose settings the reference pass has."""
        return next((stage for stage in self.stages if STAGES[stage].reference_pass), None)

    def rows_of(self, run: Run) -> Path:
        """The folder of the tokenised rows that `run` sees."""
        has_pairs = STAGES[run.stage].has_pairs
        return self.tokens(self.draw(run.seed)) if has_pairs else self.prompts(self.prompt_draw(run.seed))

    def data(self, draw: str) -> dict[str, Any]:
        """Run keys of the preference data of one draw."""
        if not self.world:
            return self._data
        pairs = self.pairs(draw)
        return {"dataset": str(pairs / "train.jsonl"), "eval_dataset": str(pairs / "eval.jsonl")}

    def prompt_data(self, draw: str) -> dict[str, Any]:
        """Run keys of the prompts of one draw: those of the preference data unless the study has a section of them."""
        return self._prompts or self.data(draw)

    def shared(self) -> list[tuple[str, Path]]:
        """What is computed once for many runs, as (label, folder with a cost.json)."""
        folders = [("base", self.base_directory)] if self.sft else []
        if self.reference_stage:
            folders += [(f"reference, {draw}", self.reference(draw)) for draw in self.draws()]
        return folders

    def base_settings(self) -> dict[str, Any]:
        """The run YAML of stage sft: the base, trained on the world's corpus or on the study's own data."""
        if self.world:
            corpus = {
                "dataset": str(self.world_directory / "sft.jsonl"),
                "tokenizer_name": str(self.world_directory / "tokenizer"),
            }
        else:
            corpus = {key: self._data[key] for key in CORPUS_KEYS if key in self._data}
        ours = {"stage": BASE_STAGE, "output_dir": str(self.base_directory), "finetuning_type": "full"}
        return ours | corpus | self.sft | {"overwrite_output_dir": True}

    def base_config(self) -> RunConfig:
        """The checked config of the base that the study trains."""
        return self._checked(self.base_settings(), "base: sft")

    def prepare_settings(self, draw: str) -> dict[str, Any]:
        """The run YAML of `discobeta prepare`: only what the tokens depend on, so that nothing else remakes them."""
        stage = next(stage for stage in self.stages if STAGES[stage].has_pairs)
        return self._tokenise(stage, draw, self.data(draw), self.tokens(draw))

    def prompt_settings(self, draw: str) -> dict[str, Any]:
        """The run YAML of `discobeta prepare` for the prompts of ppo."""
        stage = next(name for name, row in STAGES.items() if not row.has_pairs)
        return self._tokenise(stage, draw, self.prompt_data(draw), self.prompts(draw))

    def _tokenise(self, stage: str, draw: str, data: dict[str, Any], directory: Path) -> dict[str, Any]:
        return {
            "stage": stage,
            **({} if draw == "all" else {"seed": int(draw.removeprefix("seed-"))}),
            **self.model,
            **data,
            "tokenized_path": str(directory),
            "output_dir": str(directory),
        }

    def reference_settings(self, draw: str) -> dict[str, Any]:
        """The run YAML of `discobeta reference`: only what the reference's numbers depend on."""
        stage = self.reference_stage
        sections = self._sections["common"] | self._sections[stage]
        return self.prepare_settings(draw) | {
            "stage": stage,
            "output_dir": str(self.reference(draw)),
            "reference_path": str(self.reference(draw)),
            **{key: sections[key] for key in REFERENCE_KEYS if key in sections},
        }

    def resolved(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings of `prepare` or `reference`, with today's defaults of all keys that they read."""
        config, _ = RunConfig.from_mapping(settings, self._where)
        names = [*TOKENS_DEPEND_ON, *(REFERENCE_KEYS if "reference_path" in settings else ())]
        known = config.resolved()
        return settings | {name: known[name] for name in names}

    def decides_shared(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Those of `resolved` on which the outcome of `prepare` or `reference` depends: no stage, and not the cache."""
        return {key: value for key, value in self.resolved(settings).items() if key not in ("stage", "cache_dir")}

    def decides_world(self, step: str) -> dict[str, Any]:
        """What the world's corpus, or its pairs, depend on."""
        return {key: self.world[key] for key in WORLD_STEPS[step]} if self.world else {}

    # --- reading and checking

    def _listed(self, key: str, default: list, kind: type) -> list:
        values = self.settings.get(key, default)
        right = isinstance(values, list) and all(type(value) is kind for value in values)  # True is no seed
        if not right or not values or len(set(values)) < len(values):
            noun = "whole numbers" if kind is int else "names"
            raise UserError(f"{self._where}: {key}: {shown(values)} should be a list of different {noun}")
        if len(values) > MOST_SEEDS:
            raise UserError(f"{self._where}: {key}: {len(values):,} of them; a study has at most {MOST_SEEDS:,}")
        return values

    def _arms(self) -> list[Arm]:
        if self.settings.get("arms", "all") == "all":
            return list(ARMS)
        names = {arm.name: arm for arm in ARMS}
        listed = self._listed("arms", [], str)
        for name in listed:
            if name not in names:
                raise UserError(f"{self._where}: arms: no arm is called {shown(name)}; the arms are {', '.join(names)}")
        arms = [names[name] for name in listed]
        for arm in arms:
            if self.idle_arms == "prove" and arm.twin not in arms:
                raise UserError(f"{self._where}: arms: {arm.name} is proved against {arm.twin.name}: list that too")
        return arms

    def _runs_of(self, stage: str, arm: Arm) -> list[Run]:
        def run(seed: int, proof: bool) -> Run:
            directory = self.directory / "runs" / stage / arm.name / f"seed-{seed}"
            return Run(stage, arm, seed, directory / "proof" if proof else directory, proof)

        if self.idle_arms == "run":
            kinds = [False]
        elif arm.is_idle:
            kinds = [True]
        else:
            is_twin = any(other.is_idle and other.twin == arm for other in self.arms_of(stage))
            kinds = [False, True] if is_twin else [False]
        return [run(seed, proof) for proof in kinds for seed in self.seeds]

    def _read_data(self) -> None:
        data = self._mapping("data")
        if "world" in data:
            _known(data, ["world"], f"{self._where}: data: world makes its own rows, so next to it")
            world = _mapping(data["world"], f"{self._where}: data: world")
            _known(world, WORLD_DEFAULTS, f"{self._where}: data: world")
            self.world = WORLD_DEFAULTS | world
            if self.world["noise"] not in ("heteroscedastic", "homoscedastic"):
                raise UserError(f"{self._where}: data: world: noise should be heteroscedastic or homoscedastic")
            for key in ("sft_examples", "train", "evaluation", "seed"):
                _check_whole(self.world[key], 0 if key == "seed" else 1, f"{self._where}: data: world: {key}")
        else:
            _known(data, DATA_KEYS, f"{self._where}: data")
            if not data.get("dataset"):
                raise UserError(f"{self._where}: data: give dataset (a file, a hub id or a name) or world")
            if not data.get("eval_dataset") and not data.get("val_size"):
                raise UserError(f"{self._where}: data: give eval_dataset or val_size (rows to compare runs on)")
        self._data = _names_joined(data, f"{self._where}: data")

    def _read_prompts(self) -> None:
        prompts = self._mapping("prompts")
        self._prompts: dict[str, Any] = {}
        if not prompts:
            return
        if self.world:
            raise UserError(f"{self._where}: prompts: a base of the world knows the world's prompts only: leave it out")
        _known(prompts, DATA_KEYS, f"{self._where}: prompts")
        if not prompts.get("dataset"):
            raise UserError(f"{self._where}: prompts: give dataset, or leave prompts out to use those of data")
        if not prompts.get("eval_dataset") and not prompts.get("val_size"):
            raise UserError(f"{self._where}: prompts: give eval_dataset or val_size (prompts to measure policies on)")
        inherited = {key: self._data[key] for key in HOW_ROWS_ARE_READ if key in self._data}
        self._prompts = inherited | _names_joined(prompts, f"{self._where}: prompts")

    def _read_base(self) -> None:
        base = {key: value for key, value in self._mapping("base").items() if value is not None}
        _known(base, ["sft", *MODEL_KEYS], f"{self._where}: base")
        if ("sft" in base) == ("model_name_or_path" in base):
            raise UserError(f"{self._where}: base: give either model_name_or_path or sft (a base trained here)")
        if "sft" in base and not base["sft"]:
            raise UserError(f"{self._where}: base: sft: say what is trained (model_type, or model_name_or_path)")
        self.sft = _mapping(base.pop("sft", None), f"{self._where}: base: sft")
        if self.sft and base:
            raise UserError(f"{self._where}: base: {next(iter(base))} may not stand next to sft: it belongs in it")
        _check_paths(base, f"{self._where}: base")
        _check_paths(self.sft, f"{self._where}: base: sft")
        for key in ("stage", "output_dir", "overwrite_output_dir"):
            if key in self.sft:
                raise UserError(f"{self._where}: base: sft: {key} may not stand here: {BELONGS[key]}")
        self._model = base

    def _section(self, name: str) -> dict[str, Any]:
        section = self._mapping(name)
        for key in section:
            if key in BELONGS:
                reads_prompts = name in STAGES and not STAGES[name].has_pairs
                place = "it belongs in `prompts:`" if reads_prompts and key in DATA_KEYS else BELONGS[key]
                raise UserError(f"{self._where}: {name}: {key} may not stand here: {place}")
        return section

    def _mapping(self, key: str) -> dict[str, Any]:
        return _mapping(self.settings.get(key), f"{self._where}: {key}")

    def _check_stages(self) -> None:
        """What a stage reads must be trained too."""
        for stage in self.stages:
            for reading in STAGES[stage].reads:
                needing = [arm.name for arm in self.arms if not reading.idea or arm.has(reading.idea)]
                if needing and reading.stage not in self.stages:
                    raise UserError(
                        f"{self._where}: stages: {stage} reads the runs of {reading.stage} ({reading.key} of "
                        f"{needing[0]}): add {reading.stage}"
                    )

    def _check_numbers(self) -> None:
        _check_whole(self.prove_steps, 1, f"{self._where}: prove_steps")
        _check_whole(self.gpus_per_run, 1, f"{self._where}: gpus_per_run")
        for seed in self.seeds:
            _check_whole(seed, 0, f"{self._where}: seeds")

    def _check(self) -> None:
        """Every run config of the study, through the same checks as `discobeta train`."""
        if self.sft:
            self.base_config()
        for run in self._runs:
            if run.seed == self.seeds[0]:
                self.config(run)
        if self._prompts and all(STAGES[stage].has_pairs for stage in self.stages):
            self._checked(self.prompt_settings(self.prompt_draw(self.seeds[0])), "prompts")

    def _checked(self, settings: dict[str, Any], label: str) -> RunConfig:
        where = f"{self._where}: {label}"
        config, notes = RunConfig.from_mapping(settings, where)
        if notes:
            raise UserError(f"{where}: {notes[0]}: leave it out of a study")
        in_grid = config.stage in STAGES
        if in_grid and not STAGES[config.stage].has_pairs and not config.num_eval_generations:
            raise UserError(f"{where}: num_eval_generations: 0: nothing else of a {config.stage} run can be measured")
        return config


def plan(study: Study) -> str:
    """What the study trains, one line per run with its folder, and where the tables will be."""
    lines = [f"{study.name}: {len(study.runs())} runs in {study.directory}"]
    for run in study.runs():
        steps = study.proof_text(run.stage) if run.proof else "whole run"
        lines.append(f"{run.stage:4} {run.arm.name:29} seed {run.seed:<4} {steps:16} {run.directory}")
    lines.append(f"tables: {study.directory / 'tables'}   figures: {study.directory / 'figures'}")
    return "\n".join(lines)


def as_text(settings: dict[str, Any]) -> str:
    """A run config on one line: JSON, which is YAML too and, once per job of a study, twenty times as fast to write."""
    return json.dumps(settings, ensure_ascii=False)


def _mapping(value: Any, where: str) -> dict[str, Any]:
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


def _check_whole(value: Any, least: int, where: str) -> None:
    if type(value) is not int or value < least:
        raise UserError(f"{where}: {shown(value)} should be a whole number, at least {least}")
    if value > LARGEST:
        raise UserError(f"{where}: {shown(value)} should be at most {LARGEST}")


def _known(settings: dict[str, Any], names: Iterable[str], where: str) -> None:
    names = list(names)
    for key in settings:
        if key not in names:
            hint = did_you_mean(key, names) or f"; the keys are {', '.join(names)}"
            raise UserError(f"{where}: unknown key {shown(key)}{hint}")


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key, anything else is replaced: what Snakemake does with its config files."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
