"""The tables and figures of a study, a row each: what there is, of which stages, and what makes it.

The workflow takes its outputs from here, and `tables.write` and `figures.write` what they write; neither lists any.
What makes an output is named and not imported, so that a plan of thousands of jobs loads neither pandas nor matplotlib.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from discobeta.design.arms import CORNERS, IDEAS
from discobeta.design.stages import STAGES
from discobeta.design.study import Study
from discobeta.report.measures import TESTED

if TYPE_CHECKING:
    from discobeta.report.results import Results

TABLE = ("csv", "md", "tex")
FIGURE = ("svg", "pdf", "png")
"""Endings of the files; the page and Snakemake's report show the first."""


def always(study: Study, stage: str) -> bool:
    return True


@dataclass(frozen=True)
class Row:
    """A table or figure: one of the whole study, or, with `{stage}` in its name, one of each stage that has it."""

    name: str  # stem of its files
    maker: str  # module:function of (results), or of (results, stage); returns a Table or a Figure
    caption: str  # workflow/report/<caption>.rst stands beside it on the page
    title: str  # what it is called there
    endings: tuple[str, ...]
    stages: Callable[[Study, str], bool] = always  # whether a stage has it, of the whole study: whether any has


@dataclass(frozen=True)
class Output:
    """A row as one study has it: of one of its stages, or (None) of all."""

    row: Row
    stage: str | None

    @property
    def name(self) -> str:
        return self.row.name.format(stage=self.stage)

    @property
    def title(self) -> str:
        return self.row.title.format(stage=self.stage)

    @property
    def files(self) -> list[str]:
        return [f"{self.name}.{ending}" for ending in self.row.endings]

    def make(self, results: Results) -> Any:
        module, _, function = self.row.maker.partition(":")
        maker = getattr(importlib.import_module(module), function)
        return maker(results) if self.stage is None else maker(results, self.stage)


def tables(study: Study) -> list[Output]:
    return _of(study, TABLES)


def figures(study: Study) -> list[Output]:
    return _of(study, FIGURES)


def _of(study: Study, rows: tuple[Row, ...]) -> list[Output]:
    found = []
    for row in rows:
        of_each = "{stage}" in row.name
        stages = [stage for stage in study.stages if row.stages(study, stage)]
        found += [Output(row, stage) for stage in (stages if of_each else [None] * bool(stages))]
    return found


# --- which stages have it


def predicts(study: Study, stage: str) -> bool:
    """Whether its runs are measured on held-out pairs."""
    return STAGES[stage].has_pairs


def stands_beside(study: Study, stage: str) -> bool:
    """Whether it has controls or a sweep, or a baseline that evaluation calibrates."""
    return bool(study.variants_of(stage)) or (STAGES[stage].has_pairs and study.has_calibration())


def answers(study: Study, stage: str) -> bool:
    """Whether its runs are trained on what they answer to prompts."""
    return not STAGES[stage].has_pairs


def answers_in_the_world(study: Study, stage: str) -> bool:
    """Whether, besides, the answers' true reward is known, and the noise of each prompt."""
    return answers(study, stage) and bool(study.world)


def shows_an_interaction(study: Study, stage: str) -> bool:
    """Whether it has all arms without idle heads, and measures something that the hypotheses are about."""
    measured = set(TESTED) if study.world else set(TESTED) - {"true_reward"}
    return set(CORNERS) <= set(study.arms_of(stage)) and bool(measured & set(STAGES[stage].compared))


def has_effects(study: Study, stage: str) -> bool:
    """Whether one of its arms uses more than another does."""
    arms = study.arms_of(stage)
    return any(other.used < arm.used for arm in arms for other in arms)


def samples(study: Study, stage: str) -> bool:
    """Whether its policies answer prompts and the answers are judged: by the truth, or by a reward model."""
    judged = study.world or STAGES[stage].judge
    run = study.run(stage, next(arm.twin for arm in study.arms_of(stage)), study.seeds[0]) if judged else None
    return STAGES[stage].is_policy and run is not None and study.config(run).num_eval_generations > 0


def knows_sigma(study: Study, stage: str) -> bool:
    """Whether arms that use Disco are measured on pairs whose true σ is known, and is not the same everywhere."""
    return bool(study.world) and study.world["noise"] != "homoscedastic" and _says(study, stage, "sigma")


def knows_noise(study: Study, stage: str) -> bool:
    """Whether arms that use dynamic beta are measured on prompts whose noise and familiarity are known."""
    return bool(study.world) and _says(study, stage, "scale")


def _says(study: Study, stage: str, what: str) -> bool:
    """Whether a head that is trained there, and used, says this."""
    ideas = [idea.key for idea in IDEAS if idea.says == what and stage in idea.stages]
    return any(not arm.used.isdisjoint(ideas) for arm in study.arms_of(stage))


# --- what there is

TABLES = (
    Row("{stage}", "discobeta.report.cells:stage_table", "stage", "{stage}", TABLE),
    Row(
        "controls-{stage}", "discobeta.report.controls:controls_table",
        "controls", "controls and sweeps of {stage}", TABLE, stands_beside,
    ),
    Row("effects", "discobeta.report.effects:effects_table", "effects", "effects", TABLE),
    Row("comparisons", "discobeta.report.effects:comparisons_table", "comparisons", "comparisons", TABLE),
    Row("neutrality", "discobeta.report.neutrality:neutrality_table", "neutrality", "neutrality", TABLE),
    Row("cost", "discobeta.report.costs:cost_table", "cost", "cost", TABLE),
    Row("{stage}-grid", "discobeta.report.cells:grid_table", "grid", "the whole grid of {stage}", TABLE),
    Row("metrics", "discobeta.report.collect:metrics_table", "metrics", "every number", TABLE[:1]),
)  # fmt: skip

FIGURES = (
    Row("effects", "discobeta.report.forest:effects_forest", "effects-forest", "effects", FIGURE, has_effects),
    Row(
        "learning-curves-{stage}", "discobeta.report.curves:loss_curves",
        "learning-curves", "learning curves", FIGURE, predicts,
    ),
    Row(
        "learning-curves-{stage}", "discobeta.report.curves:rollout_curves",
        "learning-curves-rollouts", "learning curves", FIGURE, answers,
    ),
    Row(
        "reliability-{stage}", "discobeta.report.figures:reliability_diagram",
        "reliability", "reliability", FIGURE, predicts,
    ),
    Row(
        "reward-by-noise-{stage}", "discobeta.report.figures:reward_by_noise",
        "reward-by-noise", "reward by noise", FIGURE, answers_in_the_world,
    ),
    Row(
        "interaction-{stage}", "discobeta.report.figures:interaction",
        "interaction", "interaction", FIGURE, shows_an_interaction,
    ),
    Row(
        "reward-kl-{stage}", "discobeta.report.reward_kl:reward_kl",
        "reward-kl", "reward against KL", FIGURE, samples,
    ),
    Row("sigma-{stage}", "discobeta.report.head_figures:sigma_figure", "sigma", "σ against σ", FIGURE, knows_sigma),
    Row(
        "scale-{stage}", "discobeta.report.head_figures:scale_figure",
        "scale", "s by noise and familiarity", FIGURE, knows_noise,
    ),
)  # fmt: skip
