"""What the runs of a study left behind, and which of them count.

A run counts if its directory holds the finished run that the study asks for now: sealed and undamaged, of these
settings, trained on the base, the rows and (in ppo) the other runs that are there now. Whatever does not count is in
no mean, figure or sum, and is named.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from discobeta import files, identity, record
from discobeta.data.sources import contents_hash
from discobeta.design.config import RunConfig
from discobeta.design.study import Run, Study
from discobeta.errors import UserError, shorten, shown, telling
from discobeta.report.measures import DRAWN, GAINED, LANDMARKS, METRICS, PREDICTED, SCALES, SIGMAS

LONGEST_REASON = 200
TRUTHS = {"chosen_sigma", "rejected_sigma", "familiarity"}
"""Columns of examples.parquet that came with the data."""


@dataclass
class Found:
    """What stands in the directory of one run.

    fault: why the run does not count, `KIND` or `KIND (why)`, KIND being not trained, not finished, stale or damaged.
    unmeasured: why nothing was measured of it, though it is trained; None of a proof, which nobody measures.
    log, examples: None unless they were asked for and count.
    """

    fault: str | None = None
    unmeasured: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # provenance.json
    evaluation: dict[str, Any] = field(default_factory=dict)  # evaluation.json
    metrics: dict[str, float] = field(default_factory=dict)  # nested ones with slashes
    cost: dict[str, float] = field(default_factory=dict)
    evaluation_cost: dict[str, float] = field(default_factory=dict)
    log: pd.DataFrame | None = None
    examples: pd.DataFrame | None = None

    @property
    def absence(self) -> str | None:
        return self.fault or self.unmeasured


class Results:
    """The runs of a study as they stand on the disk now, each read once.

    curves: read logs and examples too, which figures draw. weights: look whether weight files are undamaged too.
    """

    def __init__(self, study: Study, *, curves: bool = False, weights: bool = False) -> None:
        self.study = study
        self.bases: dict[str, dict[str, str] | None] = {}  # draw -> hashes of base and tokenizer; None if they are away
        self.found = {run: _read(study, run, curves, weights) for run in study.runs()}
        self._check_world()
        self._check_base()
        self._check_rows()
        self._check_upstream()

    def __getitem__(self, run: Run) -> Found:
        return self.found[run]

    def counts(self, run: Run) -> bool:
        """Whether the run is trained, and the one that the study asks for."""
        return self.found[run].fault is None

    def is_measured(self, run: Run) -> bool:
        return self.counts(run) and not run.proof and self.found[run].unmeasured is None

    def absence(self, run: Run) -> str | None:
        """Why the run is in no mean; None if it is in them."""
        return self.found[run].absence

    def whole_runs(self, stage: str) -> list[Run]:
        """The grid's runs of a stage that are no proofs."""
        return [run for run in self.study.grid_runs() if run.stage == stage and not run.proof]

    def variant_runs(self, stage: str) -> list[Run]:
        """The runs of a stage beside the grid: controls and points of sweeps."""
        return [run for run in self.study.runs() if run.stage == stage and run.variant]

    def describe_missing(self, runs: Iterable[Run]) -> str:
        """The runs that do not count, e.g. `baseline: seeds 2, 3 (not trained)`; empty if all do."""
        seeds: dict[tuple[str, str], list[int]] = {}
        for run in runs:
            if reason := self.absence(run):
                seeds.setdefault((run.name, reason), []).append(run.seed)
        texts = []
        for (name, reason), missing in seeds.items():
            texts.append(f"{name}: {enumerate_seeds(missing)} {reason if '(' in reason else f'({reason})'}")
        return "; ".join(texts)

    def require_all(self) -> None:
        """Raise UserError, in two lines, unless every run counts."""
        missing = [run for run, found in self.found.items() if found.absence]
        if missing:
            stages = dict.fromkeys(run.stage for run in missing)
            said = "; ".join(
                f"{stage}, {self.describe_missing(run for run in missing if run.stage == stage)}" for stage in stages
            )
            raise UserError(
                f"{len(missing)} of {len(self.found)} runs of {self.study.name} do not count: {shorten(said, 1000)}\n"
                f"Nothing was written. The workflow makes what is not there; remove the folder of a run that is damaged"
            )

    # --- what a run was made from, against what is there now

    def _check_world(self) -> None:
        """Refuse runs of another world than the study's, or of another number of pairs: run configs say neither."""
        study = self.study
        if not study.world:
            return
        for seed in study.seeds:
            runs, draw = [run for run in study.runs() if run.seed == seed], study.draw(seed)
            record_of_world = study.world_of(draw) / "world.json"
            self._refuse(runs, _other(record_of_world, study.decides_world("corpus", draw)))
            pairs = study.decides_world("pairs") | {"seed": seed}
            if record_of_world.exists():
                pairs["world"] = files.sha256(record_of_world)
            self._refuse(runs, _other(study.pairs(draw) / "pairs.json", pairs))
            self._check_truth(runs, pairs.get("world"))

    def _check_truth(self, runs: list[Run], world: str | None) -> None:
        """Measure no policy by what was true in another world; `world`: the sha256 of its record, if it is here."""
        for run in [run for run in runs if self.is_measured(run)]:
            measured_by = self.found[run].evaluation.get("ground_truth")
            if None not in (world, measured_by) and measured_by != world:
                self.found[run].unmeasured = "evaluated in another world"

    def _check_base(self) -> None:
        """Refuse runs on another base than the study's; where that is not here, those on another than most."""
        study = self.study
        for draw in study.own_draws():
            of_base = [run for run in study.runs() if not study.own_worlds or study.draw(run.seed) == draw]
            folder = study.base_of(draw)
            fault = study.sft and folder.exists() and record.fault(folder, study.base_config(draw))
            if fault:
                self._refuse(of_base, f"stale (the base is {_named(fault, folder)})")
                continue
            try:
                with telling("the base cannot be read"):
                    self.bases[draw] = _base_now(study.config(of_base[0]))
            except UserError as error:
                self._refuse(of_base, f"stale ({shorten(str(error), LONGEST_REASON)})")
                continue
            for key in ("base", "tokenizer"):
                self._compare(of_base, key, self.bases[draw])

    def _check_rows(self) -> None:
        study, of_draw = self.study, {}
        for run in study.runs():
            of_draw.setdefault(study.rows_of(run), []).append(run)
        for folder, runs in of_draw.items():
            now = None
            if folder.exists():
                try:
                    keys = files.read_sealed(folder / "tokens.json")["keys"]
                    others = {"held_out": keys.get("eval"), "calibration": keys.get("calibration")}
                    now = {"data": keys["train"], **others}
                except (UserError, KeyError, TypeError, AttributeError):
                    self._refuse(runs, f"stale (there are no rows in {folder})")
                    continue
            for key in ("data", "held_out", "calibration"):
                self._compare(runs, key, now)
            try:
                with telling("no data"):
                    now = {"sources": contents_hash(study.config(runs[0]))}
            except UserError:  # not on this machine
                now = None
            self._compare(runs, "sources", now)

    def _check_upstream(self) -> None:
        """A ppo run is the study's if the runs that it has read are, and still say the same."""
        for run in self.study.runs():
            for key, others in self.study.upstream(run).items():
                if not self.counts(run):
                    continue
                if fault := next(filter(None, (self.found[other].fault for other in others)), None):
                    self._refuse([run], f"stale (its {key} is {shorten(fault, LONGEST_REASON)})")
                    continue
                now = [_hash_of_part(self.found[other].facts["files"], key) for other in others]
                if self.found[run].facts.get(key) != identity.one_of(now):
                    self._refuse([run], f"stale ({key} has changed)")

    def _compare(self, runs: list[Run], key: str, now: dict[str, Any] | None) -> None:
        """Refuse runs whose `key` is not what it is now, or, where nobody knows that, not what it is in most."""
        runs = [run for run in runs if self.counts(run)]
        name = "dataset" if key == "sources" else key
        there = {run: _hashable(self.found[run].facts.get(key)) for run in runs}
        if now is not None:
            self._refuse([run for run in runs if there[run] != now[key]], f"stale ({name} has changed)")
            return
        ranks = Counter(there.values()).most_common(2)
        is_tied = len(ranks) == 2 and ranks[0][1] == ranks[1][1]
        odd = [run for run in runs if is_tied or there[run] != ranks[0][0]]
        self._refuse(odd, f"stale ({name} is not the other runs')")

    def _refuse(self, runs: Iterable[Run], fault: str | None) -> None:
        for run in runs:
            if fault and self.counts(run):
                self.found[run] = Found(fault)

    # --- shared work

    def shared_costs(self) -> list[tuple[str, dict[str, float]]]:
        """(label, cost.json) of what is computed once for many runs; empty where it is not there, stale or damaged."""
        return [(label, self._shared_cost(label, folder)) for label, folder in self.study.shared()]

    def _base_beside(self, part: str) -> dict[str, str] | None:
        """The hashes of the base that a pass over a draw was made with: `seed-3`, `dpo, seed 3`."""
        is_its = [not self.study.own_worlds or part.replace(" ", "-").endswith(draw) for draw in self.bases]
        return next((base for base, its in zip(self.bases.values(), is_its, strict=True) if its), None)

    def _shared_cost(self, label: str, folder: Path) -> dict[str, float]:
        try:
            work, _, part = label.partition(", ")
            if work == "base":
                if record.fault(folder, self.study.base_config(part or None)):
                    return {}
            else:
                base, now = files.read_sealed(folder / f"{work}.json")["key"]["base"], self._base_beside(part)
                if now is not None and base != now["base"]:
                    return {}
            return _cost(folder / "cost.json")
        except (UserError, KeyError, TypeError):
            return {}


def kind_of(absence: str | None) -> str:
    """stale, damaged or missing."""
    kind = (absence or "").partition(" (")[0]
    return kind if kind in ("stale", "damaged") else "missing"


def enumerate_seeds(seeds: list[int]) -> str:
    """`seed 3`, `seeds 1, 2`, `seeds 1–6, 9`."""
    return f"seed{'s' * (len(seeds) > 1)} {seeds_text(seeds)}"


def seeds_text(seeds: list[int]) -> str:
    """Numbers in their order, three or more in a row as their ends."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def overlap_note(results: Results, stage: str) -> str | None:
    """How many held-out prompts of a stage's runs are training prompts too, as was counted when their rows were read.

    None where no run that counts says it. Several numbers are those of several draws of the data.
    """
    rows = [
        results[run].facts.get("rows") for run in results.study.runs() if run.stage == stage and results.counts(run)
    ]
    shared, calibration = (
        sorted({of_run[key] for of_run in rows if isinstance(of_run, dict) and type(of_run.get(key)) is int})
        for key in ("shared_prompts", "shared_calibration")
    )
    if not shared:
        return None
    if max(shared) == 0:
        text = "No held-out prompt is a prompt of the training rows"
    else:
        seen = "also are prompts of the training rows, so what is measured was partly seen"
        text = f"{_count(shared)} held-out prompts {seen}"
    if calibration and max(calibration):
        text += f"; {_count(calibration)} calibration rows also are training or held-out rows"
    return f"{text}."


def _count(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


# --- reading one run: whatever a file of it holds, the outcome is a Found


def _read(study: Study, run: Run, curves: bool, weights: bool) -> Found:
    directory = run.directory
    try:
        with telling("unreadable"):
            if fault := record.fault(directory, study.config(run), weights=weights):
                return Found(_named(fault, directory))
            found = Found(facts=files.read_sealed(directory / "provenance.json"))
            if (directory / "cost.json").exists():
                found.cost = _cost(directory / "cost.json")
            if curves:
                found.log = read_log(directory / "log.jsonl")
                _check_log(found.log, directory / "log.jsonl")
            if run.proof:
                return found
            if fault := record.measurement_fault(directory, study.config(run)):
                if fault.startswith("damaged"):
                    return Found(_named(fault, directory))
                found.unmeasured = fault
                return found
            found.evaluation = files.read_sealed(directory / "evaluation.json")
            found.metrics = _metrics(directory / "metrics.json")
            if (directory / "evaluation_cost.json").exists():
                found.evaluation_cost = _cost(directory / "evaluation_cost.json")
            if curves and (directory / "examples.parquet").exists():
                found.examples = _examples(directory / "examples.parquet")
    except UserError as error:
        return Found(_named(f"damaged: {error}", directory))
    return found


def _named(fault: str, directory: Path) -> str:
    """`stale: why` as `stale (why)`, without the folder's name, which whoever reads it knows."""
    kind, _, why = fault.replace(f"{directory}/", "").partition(": ")
    return f"{kind} ({shorten(' '.join(why.split()), LONGEST_REASON)})" if why else kind


def _metrics(path: Path) -> dict[str, float]:
    measured = files.read_mapping(path)
    for name in (*METRICS, *LANDMARKS):
        if not isinstance(measured.get(name), int | float | None) or isinstance(measured.get(name), bool):
            raise UserError(f"{path}: {name}: {shown(measured[name])} is no number")
    return dict(numbers(measured))


def _cost(path: Path) -> dict[str, float]:
    cost = dict(numbers(files.read_mapping(path)))
    if not cost.get("seconds", -1) >= 0:
        raise UserError(f"{path} should hold seconds, a number")
    return cost


def numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers in nested mappings, with their path; texts and nulls are left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def read_log(path: Path) -> pd.DataFrame:
    """log.jsonl as a frame; the half line of a process that was killed is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path}: a line should hold a JSON object, not {shown(rows[-1])}")
    return pd.DataFrame(rows)


def _check_log(log: pd.DataFrame, path: Path) -> None:
    """Refuse one whose quantities cannot be drawn over steps."""
    for name in [name for name in DRAWN if name in log]:
        values = log[["step", name]].dropna()
        for column in ("step", name) if len(values) else ():
            if not pd.api.types.is_numeric_dtype(values[column]) or pd.api.types.is_bool_dtype(values[column]):
                raise UserError(f"{path}: {column} should be numbers")
        if values["step"].duplicated().any():
            raise UserError(f"{path}: {name} is there twice for one step")


def _examples(path: Path) -> pd.DataFrame:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    wanted = dict.fromkeys([*PREDICTED, *GAINED, *SIGMAS, *SCALES])
    examples = table.select([name for name in wanted if name in table.column_names]).to_pandas()
    for name in TRUTHS & set(examples):
        examples[name] = pd.to_numeric(examples[name], errors="coerce")  # of somebody's data it may be anything
    for name in examples:
        if not pd.api.types.is_numeric_dtype(examples[name]) or pd.api.types.is_bool_dtype(examples[name]):
            raise UserError(f"{path}: {name} should be numbers")
    if "probability" in examples and not examples.probability.between(0, 1).all():
        raise UserError(f"{path}: probability should lie between 0 and 1")
    if "mean_margin" in examples and examples.mean_margin.isna().any():
        raise UserError(f"{path}: mean_margin should be numbers")
    return examples


# --- what is there now


def _other(path: Path, wanted: dict[str, Any]) -> str | None:
    """In what a sealed record of the world is not what is wanted; None if it is, or is not there."""
    if not path.exists():
        return None
    try:
        there = files.read_sealed(path)
    except UserError as error:
        return f"stale ({shorten(str(error), LONGEST_REASON)})"
    different = record.difference(there, wanted)
    return f"stale ({path.name}: {different})" if different else None


def _base_now(config: RunConfig) -> dict[str, str] | None:
    """Hashes of the base and of its tokenizer; None if it is not on this machine. The network is not asked."""
    named = {"model_name_or_path": config.model_name_or_path, "adapter_name_or_path": config.adapter_name_or_path}
    members = {"model_name_or_path": "config.json", "adapter_name_or_path": "adapter_config.json"}
    places = {key: _place(name, members[key], config) for key, name in named.items() if name}
    if None in places.values():
        return None
    config = config.replace(**{key: str(place) for key, place in places.items()})
    return {"base": identity.weights_hash(config), "tokenizer": identity.tokenizer_hash(config)}


def _place(name: str, member: str, config: RunConfig) -> Path | None:
    """The folder of a model or adapter, with weights in it: a local one or one of the hub's cache."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(name, member, cache_dir=config.cache_dir, revision=config.model_revision)
        except HFValidationError:
            return None
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    has_weights = (folder / member).is_file() and any(path.suffix in identity.WEIGHTS for path in folder.iterdir())
    return folder if has_weights else None


def _hash_of_part(written: dict[str, str], key: str) -> str:
    """What a ppo run's provenance says of a run that it has read, from that run's own manifest."""
    if key == "beta_head":
        return written.get("heads.safetensors", "")
    parts = [(*name.split("/"), digest) for name, digest in sorted(written.items()) if name.count("/") == 1]
    return identity.digest_of(
        (name, digest)
        for folder, name, digest in parts
        if folder in ("adapter", "model") and (name.endswith(identity.WEIGHTS) or name in identity.CONFIGS)
    )


def _hashable(value: Any) -> str | None:
    return value if isinstance(value, str | None) else "no hash"
