"""A study = one grid of runs: stages x arms x seeds on the same base and the same data.

Everything that turns a study config into run configs happens here, so that the workflow, the
tables and the tests agree on it; what a study config may say is checked in `study_file`. The
workflow only calls this module; it works without Snakemake.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discobeta.design import study_file, variants
from discobeta.design.arms import Arm, State
from discobeta.design.config import FIELDS, RunConfig, default_of, read_by, value_of
from discobeta.design.stages import BASE_STAGE, STAGES
from discobeta.design.study_file import StudyFile
from discobeta.design.study_sections import DATA_KEYS, HOW_ROWS_ARE_READ, MODEL_KEYS
from discobeta.design.variants import Variant
from discobeta.design.yaml_text import merge, parse_overrides, read_yaml
from discobeta.errors import UserError, shown

WORLD_STEPS = {
    "corpus": ("seed", "sft_examples", "noise", "labels", "flips", "qualities", "own"),
    "pairs": ("train", "evaluation", "calibration", "every_prompt"),
}
"""Keys of `data: world:` that each step reads; what the pairs read of the corpus, they read from its record."""

CORPUS_KEYS = ["dataset", "dataset_dir", "split", "cutoff_len", "max_samples", "max_unusable_rows"]
"""What the base is trained on unless `base: sft:` says otherwise: the study's own training data."""

TOKENS_DEPEND_ON = ["stage", "tokenizer_name", *MODEL_KEYS, *DATA_KEYS, "tokenized_path", "output_dir"]
"""What `discobeta prepare` reads; the seed too, where it decides which rows are held out."""

FROZEN_KEYS = ["finetuning_type", "bf16", "flash_attn", "deterministic", "fused_lora", "per_device_eval_batch_size"]
"""What any step with the reference depends on besides model and data."""

REFERENCE_KEYS = [*FROZEN_KEYS, "tokens_per_pass", "share_prompt"]
"""What the reference pass depends on: not seed, adapter, beta or loss."""

ANSWERS_KEYS = [
    *FROZEN_KEYS, "num_eval_generations", "max_new_tokens", "temperature", "top_p", "top_k", "generations_per_prompt",
    "best_of",
]  # fmt: skip
"""What the reference's answers depend on besides model, data and seed."""

RATING_KEYS = ["tokens_per_pass", "share_prompt"]
"""And what it says of those that a run ranks."""


def answers_keys(config: RunConfig) -> list[str]:
    """What of a run's config the reference's answers depend on."""
    return [*ANSWERS_KEYS, *(RATING_KEYS if config.best_of and STAGES[config.stage].reference_pass else [])]


@dataclass(frozen=True)
class Run:
    """One trained run of a study."""

    stage: str
    arm: Arm
    seed: int
    directory: Path
    proof: bool = False  # only the first prove_steps steps, to compare an idle arm with its twin
    variant: str = ""  # the grid's own run; else a control or a point of a sweep, beside the grid

    @property
    def name(self) -> str:
        """What tells it from other runs of its stage, but for the seed."""
        return ", ".join(filter(None, [self.arm.name, self.variant, "proof" * self.proof]))


class Study:
    """A checked study: which runs there are, the settings and folder of each, and what they share.

    `runs`, `config` and `upstream` say what is trained, `draw` and the folders of a draw which rows it sees, the
    `…_settings` what a step of the workflow is told, `decides_…` what makes it stale. The run config of every run is
    checked when the study is made. Raises UserError.
    """

    def __init__(self, settings: dict[str, Any], where: str = "study config"):
        self._where = where
        file = study_file.read(settings, where)
        self.settings = settings
        self.name = file.study
        self.directory = Path("results") / self.name
        self.tables_directory, self.figures_directory = self.directory / "tables", self.directory / "figures"
        self.shared_directory = self.directory / "shared"
        self.environment = file.environment
        self.seeds: list[int] = file.seeds
        self.stages: list[str] = file.stages
        self.idle_arms = file.idle_arms
        self.prove_steps = file.prove_steps
        self.gpus_per_run = file.gpus_per_run
        self.arms = [Arm.from_name(name) for name in file.arms]
        self.world = file.data.world and file.data.world.model_dump()
        self.own_worlds = bool(self.world and self.world["own"])
        self._data = file.data.given()
        self._prompts = file.prompts.given() if file.prompts else {}
        if self._prompts:
            self._prompts = {key: self._data[key] for key in HOW_ROWS_ARE_READ if key in self._data} | self._prompts
        self.sft, self._model = file.base.sft, file.base.given()
        self._sections = {name: self._section(file, name) for name in STAGES}
        self._first_configs: dict[tuple, tuple[dict[str, Any], RunConfig]] = {}
        self._configs: dict[Run, RunConfig] = {}
        self._proof_lengths: dict[str, int] = {}
        beside = variants.variants(file, self._sections, self.arms_of, self._where)
        self._variants = {(one.stage, one.arm, one.name): one for one in beside if one.stage in self.stages}
        self._runs = [run for stage in self.stages for run in self._runs_of(stage)]
        self._by_place = {(run.stage, run.arm, run.seed, run.proof, run.variant): run for run in self._runs}
        self._check(file, beside)

    @classmethod
    def read(cls, configfiles: str | Path | Iterable[str | Path], overrides: Iterable[str] = ()) -> Study:
        """From one YAML file or several, later ones on top key by key; `-` is standard input.

        overrides: `key=value` words on top of the files, e.g. `seeds=[1]` or `data={dataset: x.jsonl}`.
        """
        if isinstance(configfiles, str | Path):
            configfiles = [configfiles]
        settings: dict[str, Any] = {}
        for layer in (*map(read_yaml, configfiles), parse_overrides(list(overrides))):
            settings = merge(settings, layer)
        return cls(settings, ", ".join(map(str, configfiles)))

    @staticmethod
    def _section(file: StudyFile, stage: str) -> dict[str, Any]:
        """The run keys for one stage: those of `common` that it reads, and on top those of its own section."""
        common = {key: value for key, value in file.common.items() if key not in FIELDS or stage in read_by(key)}
        return common | getattr(file, stage)

    # --- what is trained

    def arms_of(self, stage: str) -> list[Arm]:
        """The arms that the study trains in `stage`; in rm, arms that differ only in beta are one."""
        return list(dict.fromkeys(arm.trained_as(stage) for arm in self.arms))

    def runs(self) -> list[Run]:
        """Every run of the study, by stage: the grid's, proofs included, by arm and seed, and then those beside it."""
        return self._runs

    def grid_runs(self) -> list[Run]:
        """The runs of the grid, proofs included: those that are no variant."""
        return [run for run in self._runs if not run.variant]

    def run(self, stage: str, arm: Arm | str, seed: int, proof: bool = False, variant: str = "") -> Run:
        """The run with these coordinates, which the study must hold."""
        arm = Arm.from_name(arm) if isinstance(arm, str) else arm
        if (found := self._by_place.get((stage, arm, seed, proof, variant))) is not None:
            return found
        name = f"{arm.name}, {variant}" if variant else arm.name
        raise UserError(f"{self._where}: no {'proof' if proof else 'run'} of {stage}, {name}, seed {seed}")

    def variants_of(self, stage: str) -> list[tuple[Arm, str]]:
        """(arm, variant) of what the study trains in `stage` beside the grid, by arm: controls, then points."""
        return [(arm, name) for of, arm, name in self._variants if of == stage]

    def variant(self, run: Run) -> Variant | None:
        """What the run differs by from the grid's of its arm; None of the grid's own."""
        return self._variants[run.stage, run.arm, run.variant] if run.variant else None

    def run_settings(self, run: Run) -> dict[str, Any]:
        """The flat run YAML of `run`: flags from the grid, the rest merged from the study's sections."""
        variant = self.variant(run)
        section = self._sections[run.stage] | (variant.settings if variant else {})
        return {
            "stage": run.stage,
            "output_dir": str(run.directory),
            "seed": self._random_streams(run),
            **run.arm.flags,
            **self.model_of(self.draw(run.seed)),
            **self._reads(run),
            **({"reference_answers_path": str(self.answers(run))} if self._has_answers(run) else {}),
            **(self._truth(run.seed) if self._reads_answers(run.stage) else {}),
            **section,
            **self._shared_out(run.stage, section),
            "overwrite_output_dir": True,  # Snakemake has decided that what is there is out of date
            **({"stop_after_steps": self.proof_length(run.stage)} if run.proof else {}),
        }

    def _random_streams(self, run: Run) -> int:
        """The seed that a run derives its random streams from: its own or, of a replicate, one made of it."""
        variant = self.variant(run)
        if not (variant and variant.replicate):
            return run.seed
        from discobeta.seeds import derive

        return derive(run.seed, "replicate", variant.replicate)

    def largest_runs(self) -> list[Run]:
        """Of each stage a whole run of an arm that uses the most heads: none of the grid needs more memory."""
        whole = [[run for run in self.grid_runs() if run.stage == stage and not run.proof] for stage in self.stages]
        return [max(runs, key=lambda run: len(run.arm.used)) for runs in whole if runs]

    def config(self, run: Run) -> RunConfig:
        """The checked config of `run`, with today's defaults.

        Seeds differ in the seed and in paths alone, so one config per arm and variant is made from its settings.
        """
        if run in self._configs:
            return self._configs[run]
        kind = run.stage, run.arm, run.proof, run.variant
        if kind not in self._first_configs:
            first = self.run(run.stage, run.arm, self.seeds[0], run.proof, run.variant)
            settings, proof = self.run_settings(first), ", proof" if run.proof else ""
            variant = f", {run.variant}" if run.variant else ""
            label = f"{run.stage}, arm {run.arm.name}{variant}, seed {first.seed}{proof}"
            self._first_configs[kind] = settings, self._checked(settings, label)
        known, config = self._first_configs[kind]
        settings = self.run_settings(run)
        changes = {key: value for key, value in settings.items() if value != known[key]}
        self._configs[run] = config.replace(**changes)
        return self._configs[run]

    def _shared_out(self, stage: str, section: dict[str, Any]) -> dict[str, int]:
        """The batch of one device, if several share what the study says of one: the run computes the same.

        A forward pass over all devices keeps its rows; only where they cannot be shared, a step's passes are.
        """
        if self.gpus_per_run == 1:
            return {}
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            try:
                size = value_of(key, section.get(key, default_of(key, stage)))
            except ValueError:  # a slip that the check of the runs will name
                return {}
            if size % self.gpus_per_run == 0:
                return {key: size // self.gpus_per_run}
        raise UserError(
            f"{self._where}: gpus_per_run: {self.gpus_per_run} divides neither per_device_train_batch_size nor "
            f"gradient_accumulation_steps of {stage}, so the GPUs cannot share its batch"
        )

    def _reads(self, run: Run) -> dict[str, Any]:
        """Run keys of the rows that `run` sees and of what other steps have made for it."""
        row, draw = STAGES[run.stage], self.draw(run.seed)
        upstream = {key: ",".join(str(other.directory) for other in read) for key, read in self.upstream(run).items()}
        if row.rows == "prompts":
            draw = self.prompt_draw(run.seed)
            return {**self.prompt_data(draw), "tokenized_path": str(self.prompts(draw)), **upstream}
        reference = {"reference_path": str(self.reference(draw))} if row.reference_pass else {}
        return {**self.data(draw), "tokenized_path": str(self.tokens(draw)), **reference, **upstream}

    def upstream(self, run: Run) -> dict[str, list[Run]]:
        """Run key -> the runs that `run` reads: in ppo its reward model and, if its arm has one, its Beta Head.

        A variant reads what the grid's run of its arm and seed does, unless it is a control that names several reward
        models. They have the arm's states and seed. Where idle arms are only proved, the twin's whole run
        stands for the one that an idle arm does not have: it would be equal. So a proof reads what
        the twin's proof reads. Only an idle head comes from a proof: that it is there, and
        changes nothing, is the point.
        """
        found, variant = {}, self.variant(run)
        for reading in STAGES[run.stage].reads:
            arm, proves = run.arm.trained_as(reading.stage), self.idle_arms == "prove"
            if not reading.idea and variant and variant.reward_models:
                found[reading.key] = [self._named(reading.stage, name, arm, run.seed) for name in variant.reward_models]
            elif reading.idea and proves and run.arm.state(reading.idea) is State.IDLE:
                found[reading.key] = [self.run(reading.stage, arm, run.seed, proof=True)]
            elif not reading.idea or run.arm.has(reading.idea):
                found[reading.key] = [self.run(reading.stage, arm.twin if proves else arm, run.seed)]
        return found

    def _named(self, stage: str, name: str, arm: Arm, seed: int) -> Run:
        """The run of `stage` with the name of an arm, or of a control of this arm."""
        return self.run(stage, arm, seed, variant="" if name == arm.name else name)

    def proof_length(self, stage: str) -> int:
        """After how many steps of `stage` a proof stops: prove_steps optimiser steps, rounded up.

        In ppo a step is an update, which is ppo_epochs * ppo_buffer_size optimiser steps.
        """
        if not STAGES[stage].step_factors:
            return self.prove_steps
        if stage not in self._proof_lengths:
            settings = {"stage": stage, "model_name_or_path": "-", **self._sections[stage]}
            config, _ = RunConfig.from_mapping(settings, f"{self._where}: {stage}")
            steps = math.prod(getattr(config, key) for key in STAGES[stage].step_factors)
            self._proof_lengths[stage] = -(-self.prove_steps // steps)
        return self._proof_lengths[stage]

    def proof_text(self, stage: str) -> str:
        """E.g. `first 20 steps`, or `first 3 updates` in ppo."""
        length, noun = self.proof_length(stage), STAGES[stage].step
        return f"first {length} {noun}s" if length > 1 else f"first {noun}"

    # --- what the runs share

    @property
    def model(self) -> dict[str, Any]:
        """Run keys of the model that reference and policy of the first seed start from."""
        return self.model_of(self.draw(self.seeds[0]))

    def model_of(self, draw: str) -> dict[str, Any]:
        """Run keys of the model that reference and policy of one draw start from."""
        return {"model_name_or_path": str(self.base_of(draw))} if self.sft else self._model

    def world_of(self, draw: str) -> Path:
        """The folder of the world that a draw's pairs are of: one for all, unless each seed has its own."""
        return self.shared_directory / "world" / (draw if self.own_worlds else "")

    def base_of(self, draw: str) -> Path:
        """The folder of the base that the study trains, likewise."""
        return self.shared_directory / "base" / (draw if self.own_worlds else "")

    def own_draws(self) -> list[str]:
        """Of each world and base that the study makes, a draw that has it."""
        return self.draws() if self.own_worlds else self.draws()[:1]

    def _truth(self, seed: int) -> dict[str, str]:
        """`ground_truth` of a policy: of a world with a truth of its own, its record."""
        if not self.world:
            return {}
        if self.own_worlds or self.world["qualities"] != "shared":
            return {"ground_truth": str(self.world_of(self.draw(seed)) / "world.json")}
        return {"ground_truth": "world"}

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

    def answers(self, run: Run) -> Path:
        """The folder of the reference's answers to the prompts of `run`, which all arms of its stage and seed read."""
        return self.shared_directory / "answers" / run.stage / f"seed-{run.seed}"

    def _reads_answers(self, stage: str) -> bool:
        """Whether runs of a stage may be measured by responses of the reference: policies, and what ranks them."""
        return STAGES[stage].is_policy or bool(self._sections[stage].get("best_of"))

    def _has_answers(self, run: Run) -> bool:
        """Whether the answers of the reference that its seed's runs share are its own too: not a replicate's, beside
        which the reference answers from the same random streams as the replicate does."""
        return self._reads_answers(run.stage) and self._random_streams(run) == run.seed

    def is_answered(self, run: Run) -> bool:
        """Whether `run` is measured by the reference's responses, beside its own or by how it ranks them, and these
        are its seed's."""
        return self._has_answers(run) and not run.proof and bool(self.config(run).reference_samples)

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
        calibration = {"calibration_dataset": str(pairs / "calibration.jsonl")} if self.world["calibration"] else {}
        return {"dataset": str(pairs / "train.jsonl"), "eval_dataset": str(pairs / "eval.jsonl"), **calibration}

    def has_calibration(self) -> bool:
        """Whether there are calibration rows beside the training and held-out ones."""
        return "calibration_dataset" in self.data(self.draw(self.seeds[0]))

    def prompt_data(self, draw: str) -> dict[str, Any]:
        """Run keys of the prompts of one draw: those of the preference data unless the study has a section of them."""
        if self._prompts:
            return self._prompts
        return {key: value for key, value in self.data(draw).items() if key != "calibration_dataset"}

    def shared(self) -> list[tuple[str, Path]]:
        """What is computed once for many runs, as (label, folder with a cost.json)."""
        bases = self.own_draws() if self.sft else []
        folders = [(f"base, {draw}" if self.own_worlds else "base", self.base_of(draw)) for draw in bases]
        if self.reference_stage:
            folders += [(f"reference, {draw}", self.reference(draw)) for draw in self.draws()]
        answered = {self.answers(run): run for run in self._runs if self.is_answered(run)}
        return folders + [(f"answers, {run.stage}, seed {run.seed}", folder) for folder, run in answered.items()]

    def base_settings(self, draw: str | None = None) -> dict[str, Any]:
        """The run YAML of stage sft: the base, trained on the world's corpus or on the study's own data.

        draw: whose base, if each has its own; the first one's unless it is said.
        """
        draw = draw or self.draws()[0]
        if self.world:
            world = self.world_of(draw)
            corpus = {"dataset": str(world / "sft.jsonl"), "tokenizer_name": str(world / "tokenizer")}
        else:
            corpus = {key: self._data[key] for key in CORPUS_KEYS if key in self._data}
        ours = {"stage": BASE_STAGE, "output_dir": str(self.base_of(draw)), "finetuning_type": "full"}
        seed = {"seed": _seed_of(draw)} if self.own_worlds else {}
        return ours | corpus | self.sft | seed | {"overwrite_output_dir": True}

    def base_config(self, draw: str | None = None) -> RunConfig:
        """The checked config of the base that the study trains, for one draw, if each has its own."""
        return self._checked(self.base_settings(draw), "base: sft")

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
            **({} if draw == "all" else {"seed": _seed_of(draw)}),
            **self.model_of(draw),
            **data,
            "tokenized_path": str(directory),
            "output_dir": str(directory),
        }

    def reference_settings(self, draw: str) -> dict[str, Any]:
        """The run YAML of `discobeta reference`: only what the reference's numbers depend on."""
        stage = self.reference_stage
        section = self._sections[stage]
        return self.prepare_settings(draw) | {
            "stage": stage,
            "output_dir": str(self.reference(draw)),
            "reference_path": str(self.reference(draw)),
            **{key: section[key] for key in REFERENCE_KEYS if key in section},
        }

    def answers_settings(self, stage: str, seed: int | str) -> dict[str, Any]:
        """The run YAML of `discobeta answers`: only what the reference's answers depend on."""
        run = self._answering(stage, seed)
        section, folder = self._sections[stage], str(self.answers(run))
        rows = self._reads(run)
        return {
            "stage": stage,
            "seed": run.seed,
            **self.model_of(self.draw(run.seed)),
            **{key: rows[key] for key in (*DATA_KEYS, "tokenized_path") if key in rows},
            "output_dir": folder,
            "reference_answers_path": folder,
            **{key: section[key] for key in answers_keys(self.config(run)) if key in section},
        }

    def answers_rows(self, stage: str, seed: int | str) -> Path:
        """The folder of the tokenised rows whose prompts the reference answers."""
        return self.rows_of(self._answering(stage, seed))

    def _answering(self, stage: str, seed: int | str) -> Run:
        """A run that is measured beside these answers."""
        places = ((stage, arm, int(seed), False, "") for arm in self.arms_of(stage))
        return next(self._by_place[place] for place in places if place in self._by_place)

    def resolved(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings of `prepare`, `reference` or `answers`, with today's defaults of all keys that they read."""
        config, _ = RunConfig.from_mapping(settings, self._where)
        own = {"reference_path": REFERENCE_KEYS, "reference_answers_path": answers_keys(config)}
        names = [*TOKENS_DEPEND_ON, *(name for path, keys in own.items() if path in settings for name in keys)]
        known = config.resolved()
        return settings | {name: known[name] for name in names}

    def decides_shared(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Those of `resolved` on which the outcome of the step depends: no stage, and not the cache."""
        return {key: value for key, value in self.resolved(settings).items() if key not in ("stage", "cache_dir")}

    def decides_world(self, step: str, draw: str | None = None) -> dict[str, Any]:
        """What the world's corpus, or its pairs, depend on; draw: whose corpus, if each has its own."""
        if not self.world:
            return {}
        own = {"seed": _seed_of(draw or self.draws()[0])} if self.own_worlds else {}
        return {key: (self.world | own)[key] for key in WORLD_STEPS[step]}

    # --- making and checking

    def _runs_of(self, stage: str) -> list[Run]:
        """The grid's, by arm, and those beside it."""
        beside = [
            Run(stage, arm, seed, self.directory / "runs" / stage / arm.name / name / f"seed-{seed}", variant=name)
            for arm, name in self.variants_of(stage)
            for seed in self.seeds
        ]
        return [run for arm in self.arms_of(stage) for run in self._runs_of_arm(stage, arm)] + beside

    def _runs_of_arm(self, stage: str, arm: Arm) -> list[Run]:
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

    def _check(self, file: StudyFile, beside: list[Variant]) -> None:
        """Every run config of the study, through the same checks as `discobeta train`."""
        if self.sft:
            self.base_config()
        known = ["none", *(truth for truth in self._truth(self.seeds[0]).values() if truth == "world")]
        for stage in self.stages if self.world else ():
            if (truth := self._sections[stage].get("ground_truth", "none")) not in known:
                raise UserError(
                    f"{self._where}: {stage}: ground_truth: {shown(truth)} is another world than the study's, which "
                    "says it itself: leave it out"
                )
        for run in self._runs:
            if run.seed == self.seeds[0]:
                self.config(run)
        self._check_variants(beside)
        for stage in STAGES:
            if stage not in self.stages and getattr(file, stage):  # where a slip is one too
                settings = {"stage": stage, "model_name_or_path": "-", "tokenized_path": "-"}
                self._checked(settings | self._sections[stage], stage)
        if self._prompts and all(STAGES[stage].has_pairs for stage in self.stages):
            self._checked(self.prompt_settings(self.prompt_draw(self.seeds[0])), "prompts")

    def _check_variants(self, beside: list[Variant]) -> None:
        """Each must be trained as no other run is, on what all runs of its stage share."""
        trained: dict[tuple[str, Arm, str], str] = {}
        for variant in beside:
            section = "controls" if variant.control else "sweep"
            where = f"{self._where}: {section}: {variant.control or variant.stage}"
            has_reference = STAGES[variant.stage].is_policy or self._sections[variant.stage].get("best_of")
            fixed = [*REFERENCE_KEYS, *ANSWERS_KEYS] if has_reference else []
            if shared := [key for key in variant.settings if key in fixed]:
                raise UserError(
                    f"{where}: {shared[0]}: what all runs of {variant.stage} share of the reference depends on it"
                )
            rows = self._data if STAGES[variant.stage].has_pairs else self._prompts or self._data
            if variant.replicate and rows.get("val_size"):
                raise UserError(f"{where}: replicate: with val_size the seed also draws the rows: give eval_dataset")
            if variant.stage not in self.stages:
                settings = {"stage": variant.stage, "model_name_or_path": "-", "tokenized_path": "-"}
                for reading in STAGES[variant.stage].reads:
                    if not reading.idea or variant.arm.has(reading.idea):
                        settings[reading.key] = ",".join(variant.reward_models or ["-"]) if not reading.idea else "-"
                settings |= variant.arm.flags | self._sections[variant.stage] | variant.settings
                self._checked(settings, f"{variant.stage}, {variant.name}")
                continue
            for name in ("", variant.name):
                run = self.run(variant.stage, variant.arm, self.seeds[0], variant=name)
                text = as_text(self.config(run).as_trained())
                if (known := trained.setdefault((run.stage, run.arm, text), name)) != name:
                    twin = ", ".join(filter(None, [run.arm.name, known]))
                    cure = "leave it out" + (", or sweep other arms (`arms: [...]` beside it)" if variant.point else "")
                    raise UserError(f"{where}: {name} would be trained just as {run.stage} of {twin}: {cure}")

    def _checked(self, settings: dict[str, Any], label: str) -> RunConfig:
        where = f"{self._where}: {label}"
        config, notes = RunConfig.from_mapping(settings, where)
        if notes:
            raise UserError(f"{where}: {notes[0]}: leave it out of a study")
        in_grid = config.stage in STAGES
        if in_grid and not STAGES[config.stage].has_pairs and not config.num_eval_generations:
            raise UserError(f"{where}: num_eval_generations: 0: nothing else of a {config.stage} run can be measured")
        return config


def _seed_of(draw: str) -> int:
    return int(draw.removeprefix("seed-"))


def plan(study: Study) -> str:
    """What the study trains, one line per run with its folder, and where the tables will be."""
    lines = [f"{study.name}: {len(study.runs())} runs in {study.directory}"]
    for run in study.runs():
        steps = study.proof_text(run.stage) if run.proof else "whole run"
        name = f"{run.arm.name}, {run.variant}" if run.variant else run.arm.name
        lines.append(f"{run.stage:4} {name:29} seed {run.seed:<4} {steps:16} {run.directory}")
    lines.append(f"tables: {study.tables_directory}   figures: {study.figures_directory}")
    return "\n".join(lines)


def as_text(settings: dict[str, Any]) -> str:
    """A run config on one line: JSON, which is YAML too and, once per job of a study, twenty times as fast to write."""
    return json.dumps(settings, ensure_ascii=False)
