"""Runs beside the grid: an arm of a stage with other settings, by the study's `controls:` or `sweep:`.

A variant is a control, a point of the stage's sweep, or a point of a swept control, and its name is a folder:
`probit`, `pref_beta=0.35`, `probit,pref_beta=0.35`. What a study may say of them is checked in `study_file`; here it
becomes the list of them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from discobeta.design.arms import Arm
from discobeta.design.config import FIELDS, default_of, unknown, value_of
from discobeta.design.stages import STAGES
from discobeta.design.study_sections import place_of
from discobeta.errors import UserError, shown

if TYPE_CHECKING:
    from discobeta.design.study_file import Control, StudyFile


TUNED, AS_IN_THE_GRID = "tuned-beta", "as in the grid"
"""What tables call the β that calibration pairs choose, and an arm's own run: names and labels of no control."""

LONGEST_FOLDER = 200
"""Characters of a folder's name: file systems take 255 bytes, and files beside it have its name and more."""


@dataclass(frozen=True)
class Variant:
    """An arm of a stage as it is trained beside the grid; never with an idle head."""

    stage: str
    arm: Arm
    name: str  # its folder
    label: str  # what tables call it
    settings: dict[str, Any]  # run keys on top of those of the stage's section
    point: dict[str, Any] = field(default_factory=dict)  # those of them that the sweep sets
    control: str = ""
    replicate: int = 0
    reward_models: tuple[str, ...] = ()


def fault_of(key: str, stage: str) -> str | None:
    """Why a run key may not differ between the runs of an arm in a stage; None if it may."""
    if key not in FIELDS:
        return unknown(key, stage)
    if place := place_of(key, stage):
        return f"{key} may not stand here: {place}"
    of = FIELDS[key].metadata["of"]
    if of in ("log", "bookkeeping"):
        return f"{key} may not stand here: it changes nothing that is trained"
    if of == "evaluation":
        return f"{key} may not stand here: all runs of a stage are measured alike (say it in `{stage}:`)"
    return None


def text_of(value: Any) -> str:
    """A value in the name of a folder: 0.35, 1e-05, 2 (of 2.0), true, null. Raises ValueError for one that is none."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
    if not re.fullmatch(r"[A-Za-z0-9_.+-]{1,50}", text):
        raise ValueError(f"{shown(value)}: a value that is swept names a folder: letters, digits, _ . + - only")
    return text


def name_of(control: str, point: dict[str, Any]) -> str:
    """The folder of a variant."""
    return ",".join(filter(None, [control, *(f"{key}={text_of(value)}" for key, value in point.items())]))


def variants(
    file: StudyFile, sections: dict[str, dict[str, Any]], arms_of: Callable[[str], list[Arm]], where: str
) -> list[Variant]:
    """Every variant that the study asks for, by stage and arm; of an arm the controls first.

    sections: stage -> its run keys, as the grid has them. A point with the values that the stage's section has is the
    grid's own run (or the control's own), and not among them. Raises UserError.
    """
    found = []
    points_of = {stage: _points(file, stage, sections[stage], where) for stage in STAGES}
    for name, control in file.controls.items():
        if control.swept and not any(points_of[stage] for stage in control.stages):
            raise UserError(f"{where}: controls: {name}: swept: true, and there is no sweep of {control.stages[0]}")
    for stage, points in points_of.items():
        wanted = file.sweep.model_dump()[stage].get("arms")
        swept = [Arm.from_name(name).trained_as(stage) for name in wanted or [arm.name for arm in arms_of(stage)]]
        controls = {name: control for name, control in file.controls.items() if stage in control.stages}
        for name, control in controls.items():
            _check(file, stage, name, control, points, arms_of, where)
        if stage in file.stages and (absent := [arm.name for arm in swept if arm not in arms_of(stage)]):
            raise UserError(f"{where}: sweep: {stage}: arms: {absent[0]} is no arm of this study: add it to `arms:`")
        for arm in arms_of(stage):
            for name, control in controls.items():
                if Arm.from_name(control.arm).trained_as(stage) == arm:
                    found += [_control(stage, arm, name, control, point) for point in [{}, *points * control.swept]]
            if arm in swept and not arm.is_idle:
                found += [Variant(stage, arm, name_of("", point), _said(point), point, point) for point in points]
    for name in (one.name for one in found if len(one.name) > LONGEST_FOLDER):
        size = f"{len(name)} characters, of at most {LONGEST_FOLDER}"
        raise UserError(f"{where}: {name[:40]}… would be the name of a folder of {size}: sweep fewer keys at once")
    return found


def _control(stage: str, arm: Arm, name: str, control: Control, point: dict[str, Any]) -> Variant:
    label = "; ".join(filter(None, [control.label or name, _said(point)]))
    settings = {key: value_of(key, value) for key, value in control.settings.items()} | point
    models = tuple(control.reward_models)
    return Variant(stage, arm, name_of(name, point), label, settings, point, name, control.replicate, models)


def _said(point: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {text_of(value)}" for key, value in point.items())


def _points(file: StudyFile, stage: str, section: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The product of the values, the last key fastest, without the point that the section is."""
    sweep = file.sweep.model_dump()[stage]
    values = {key: sweep[key] for key in FIELDS if key in sweep}
    own = {}
    for key in values:
        try:
            own[key] = value_of(key, section.get(key, default_of(key, stage)))
        except ValueError:  # a slip that the check of the grid's runs will name
            own[key] = section.get(key)
        if values[key] == [own[key]]:
            raise UserError(f"{where}: sweep: {stage}: {key}: {own[key]!r} is what every run of {stage} has already")
    points = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())] if values else []
    return [point for point in points if point != own]


def _check(
    file: StudyFile,
    stage: str,
    name: str,
    control: Control,
    points: list[dict[str, Any]],
    arms_of: Callable[[str], list[Arm]],
    where: str,
) -> None:
    """Refuse a control whose arm, reward models or swept keys are not what they are taken for."""
    where = f"{where}: controls: {name}"
    for key, value in control.settings.items():
        try:
            value_of(key, value)
        except ValueError as error:
            raise UserError(f"{where}: settings: {key}: {error}") from None
    arm = Arm.from_name(control.arm).trained_as(stage)
    if stage not in file.stages:
        return
    if arm not in arms_of(stage):
        raise UserError(f"{where}: arm: {control.arm} is no arm of this study: add it to `arms:`")
    if control.swept and points and (both := sorted(set(control.settings) & set(points[0]))):
        raise UserError(f"{where}: settings: {both[0]} is swept: leave one of them out")
    judge = STAGES[stage].judge
    for model in control.reward_models:
        other = file.controls.get(model)
        is_control = other is not None and judge.stage in other.stages
        if not is_control and model not in {arm.name for arm in arms_of(judge.stage) if not arm.is_idle}:
            raise UserError(f"{where}: reward_models: no arm and no control of {judge.stage} is called {shown(model)}")
        of_model = Arm.from_name(other.arm if is_control else model).trained_as(judge.stage)
        if of_model != arm.trained_as(judge.stage):
            raise UserError(
                f"{where}: reward_models: {model} is of arm {of_model.name}, and a policy of arm {control.arm} is "
                f"given reward models of arm {arm.trained_as(judge.stage).name}"
            )
