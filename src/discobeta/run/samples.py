"""What a run says, to be read: a policy's responses beside the reference's, or a reward model's scores of responses."""

from __future__ import annotations

import itertools
import json
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from discobeta import metrics, record
from discobeta.data.examples import Example, Prompt
from discobeta.data.layouts import SHAPING, is_given
from discobeta.data.local_files import file_rows
from discobeta.data.row_report import RowReport
from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.errors import UserError, did_you_mean, shown, telling
from discobeta.files import check_regular
from discobeta.inputs.answers import SAMPLED_WITH
from discobeta.run import load as runs

SETTINGS = (*SAMPLED_WITH, "generations_per_prompt", "ground_truth")
"""Run keys that may be set: how responses are sampled, and by what truth they are judged."""

COUNT = 5
"""Prompts that are shown, unless it is said how many."""

Asked = dict[str, Any]
"""`prompt`, a text or a conversation, and of a reward model `response`; `side` of a row of pairs: chosen, rejected."""


def samples(
    directory: str | Path,
    asked: list[Asked] | None = None,
    *,
    count: int | None = None,
    settings: dict[str, Any] | None = None,
    reward_model: str | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """What `discobeta samples` shows: `{"run", "stage", "arm", "from", "rows"}`.

    asked: prompts (of a reward model: prompts and responses); without them the responses that the run's evaluation has
    left (generations.jsonl), and where there are none, held-out prompts of the run's data. `count` prompts at most,
    those of pairs once.
    settings: how is sampled (`SETTINGS`); nothing stored is shown then. reward_model: a judge of the responses
    (`load_reward_model`), in the place of the one that a ppo run has.

    A policy's row has prompt, response, reference_response, and of both `reward` (by the reward model) and
    `true_reward` (where the truth is known), the reference's with `reference_` in front; a reward model's has prompt,
    response, `mean` and `sigma` (None where a reward is a number).
    """
    directory, settings = Path(directory), settings or {}
    if count is not None and count < 1:
        raise UserError(f"--count {count}: at least 1")
    reader = {"trust_remote_code": trust_remote_code, "cache_dir": cache_dir}
    run = record.read(directory, weights=False)
    row = STAGES[run.config.stage]
    _with_settings(run.config, settings)
    if not row.is_policy and (settings or reward_model):
        raise UserError(f"{directory} is a reward model: it scores, and samples nothing (--set and --reward-model)")
    told = {"run": str(directory), "stage": run.config.stage, "arm": run.config.arm.name}
    if row.is_policy and any("response" in one and "side" not in one for one in asked or ()):
        raise UserError(f"{directory} is a policy, which answers itself: responses are for a reward model")
    count = count or (len(asked) if asked else COUNT)
    if row.is_policy and not (asked or settings or reward_model) and (rows := _stored(directory, count)):
        return {**told, "from": "generations.jsonl, of its evaluation", "rows": rows}
    run = runs.read_run(directory, *STAGES, base=base, **reader)
    run = replace(run, config=_with_settings(run.config, settings))
    if asked and not row.is_policy and not all("response" in one for one in asked):
        raise UserError(f"{directory} is a reward model: give responses too (--response, or `response` in rows)")
    told["from"] = "what was asked" if asked else "held-out rows of its data"
    asked = _first(asked, count, once=row.is_policy) if asked else None
    if row.is_policy:
        return {**told, "rows": _sampled(run, asked, count, reward_model)}
    return {**told, "rows": _scored(run, asked, count, base, reader)}


def _with_settings(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    for name in settings:
        if name not in SETTINGS:
            hint = did_you_mean(name, SETTINGS) or f"; it may be {', '.join(SETTINGS)}"
            raise UserError(f"--set {shown(name)}: this is no setting of sampling{hint}")
    return RunConfig.from_mapping(config.resolved() | settings, "--set")[0]


def _stored(directory: Path, count: int) -> list[dict[str, Any]]:
    """What generations.jsonl holds of its first prompts, of an evaluation that counts."""
    path = directory / "generations.jsonl"
    if not path.is_file() or record.measurement_fault(directory) is not None:
        return []
    with path.open(encoding="utf-8") as lines:
        return _first(map(json.loads, lines), count)


def _first(rows: Iterable[Asked], count: int, *, once: bool = False) -> list[Asked]:
    """The rows of the first `count` prompts, a prompt's in a row; once: of the two of a pair only one."""
    found: list[Asked] = []
    for prompt, of_prompt in itertools.islice(itertools.groupby(rows, key=lambda row: row["prompt"]), count):
        for place, row in enumerate(of_prompt):
            if not (once and place and "side" in row):
                found.append({"prompt": prompt} if once else row)
    return found


# --- reward models


def _scored(run: record.Record, asked: list[Asked] | None, count: int, base: Any, reader: dict) -> list[dict[str, Any]]:
    judge = runs.load_reward_model(run.directory, base=base, **reader)
    if asked is None:
        rows = _held_out(run, judge.tokenizer)
        both = {"chosen": rows.chosen_ids, "rejected": rows.rejected_ids}
        taken = [(i, side) for i in range(min(count, len(rows))) for side in both]
        prompts, responses = [rows.prompt_ids[i] for i, _ in taken], [both[side][i] for i, side in taken]
        say = judge.tokenizer.decode
        texts = [
            {"prompt": say(prompt), "response": say(response), "side": side}
            for (_, side), prompt, response in zip(taken, prompts, responses, strict=True)
        ]
        mean, variance = judge.score_ids(prompts, responses)
    else:
        texts = [dict(one) for one in asked]
        mean, variance = judge.score([one["prompt"] for one in asked], [one["response"] for one in asked])
    sigma = [None] * len(mean) if variance is None else variance.sqrt().tolist()
    return [text | {"mean": mu, "sigma": s} for text, mu, s in zip(texts, mean.tolist(), sigma, strict=True)]


# --- policies


def _sampled(
    run: record.Record, asked: list[Asked] | None, count: int, reward_model: str | None
) -> list[dict[str, Any]]:
    from discobeta.inputs.answers import sample
    from discobeta.model.generation import response_text
    from discobeta.model.kernels import choose_kernels
    from discobeta.model.pretrained import load_reference, load_tokenizer
    from discobeta.run.responses import scores_of

    config = run.config
    choose_kernels(config)
    tokenizer = load_tokenizer(config)
    examples = [Example(one["prompt"], source=f"prompt {place}") for place, one in enumerate(asked or (), 1)]
    prompts = _prompt_ids(run, examples, count, tokenizer)
    stage = runs.load_stage(run)
    runs.together(stage)
    reference = load_reference(config)
    runs.together(stage, reference)
    settings = runs.judge_settings(config)
    named = [runs.load_reward_model(reward_model, **settings)] if reward_model else runs.load_reward_models(config)
    judges = runs.judges_together(named, stage, reference)
    translations = [judge.translation(config, reference, tokenizer) for judge in judges]
    if examples:  # a translation knows the rows of the run's data
        for translation in filter(None, translations):
            translation.add(examples, config, RowReport("prompts", len(examples)), "prompts for the reward model")
    each = config.generations_per_prompt
    own = sample(config, stage.model, tokenizer, prompts, "policy", each)
    other = sample(config, reference, tokenizer, prompts, "reference", each)
    repeated = [prompt for prompt in prompts for _ in range(each)]
    rows = [
        {
            "prompt": tokenizer.decode(prompt),
            "response": response_text(tokenizer, response),
            "reference_response": response_text(tokenizer, beside),
            "length": len(response),
            "reference_length": len(beside),
        }
        for prompt, response, beside in zip(repeated, own, other, strict=True)
    ]
    if judges:
        scores = [scores_of(judges, translations, config, repeated, texts) for texts in (own, other)]
        for side, values in zip(("", "reference_"), metrics.mean_scores(*scores), strict=True):
            for row, value in zip(rows, values.tolist(), strict=True):
                row[f"{side}reward"] = value
    if config.ground_truth != "none":
        from discobeta.inputs.world import ground_truth

        world = ground_truth(config.ground_truth)
        for row in rows:
            for side in ("", "reference_"):
                row[f"{side}true_reward"] = world.true_reward(row["prompt"], row[f"{side}response"])
    return rows


def _prompt_ids(run: record.Record, examples: list[Example], count: int, tokenizer: Any) -> list[np.ndarray]:
    """Of what is asked or, where nothing is, of held-out rows."""
    if not examples:
        rows = _held_out(run, tokenizer, count)
        return list(rows.prompt_ids)
    from discobeta.data.encode import encode

    report = RowReport("prompts", len(examples))
    rows = encode(examples, tokenizer, run.config.cutoff_len, "prompts", report)
    report.check(0.0)
    return list(rows.prompt_ids)


def _held_out(run: record.Record, tokenizer: Any, distinct: int | None = None):
    """The held-out rows of a run's data, those of its training if it has none; distinct: so many prompts of them."""
    from discobeta.data.tokens import load_or_tokenise

    data = load_or_tokenise(run.config, tokenizer, write=False)
    for key, now in data.keys().items():
        run.check_fact(key, now, run.config.dataset or run.config.tokenized_path)
    rows, taken = data.to_answer(len(data.train) if distinct is None else distinct)
    return rows if distinct is None else rows.select(taken)


# --- what is asked


def asked_for(prompts: list[str], responses: list[str], path: Path | None, *, chat: bool = False) -> list[Asked]:
    """What a command's words and file ask; nothing if they say nothing.

    One prompt takes all responses; several take one each. chat: every prompt that is a text is a user's turn.
    """
    if responses and len(prompts) not in (1, len(responses)):
        raise UserError(f"{len(responses)} --response for {len(prompts)} --prompt: one prompt, or one response to each")
    if responses:
        repeated = prompts * len(responses) if len(prompts) == 1 else prompts
        asked = [{"prompt": a, "response": b} for a, b in zip(repeated, responses, strict=True)]
    else:
        asked = [{"prompt": prompt} for prompt in prompts]
    for one in asked:
        runs.check_prompt(one["prompt"], "--prompt")
    asked += [] if path is None else read_prompts(path)
    if chat:
        for one in asked:
            if isinstance(one["prompt"], str):
                one["prompt"] = [{"role": "user", "content": one["prompt"]}]
    return asked


def read_prompts(path: Path) -> list[Asked]:
    """Prompts of a file: .jsonl and .json rows with `prompt` (a text or a conversation) and, for reward models,
    `response` or `responses`; of any other file every line that is not empty is a prompt."""
    check_regular(path)
    if path.name.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")):
        found = [one for where, row in file_rows(path) for one in _of_row(row, where)]
    else:
        with telling(f"cannot read {path}"):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        found = [{"prompt": line} for line in lines if line.strip()]
    if not found:
        raise UserError(f"{path} holds no prompt")
    return found


def _of_row(row: Any, where: str) -> list[Asked]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: {row}")
    if "prompt" not in row:
        raise UserError(f"{where}: a row needs `prompt`, a text or a conversation; it has {', '.join(map(str, row))}")
    runs.check_prompt(row["prompt"], f"{where}: prompt")
    if lost := [name for name in SHAPING if is_given(row.get(name))]:
        raise UserError(f"{where}: {lost[0]} is not read here: write the prompt as a conversation, or leave it out")
    responses = row.get("responses", [row["response"]] if "response" in row else [])
    sides = {side: row[side] for side in ("chosen", "rejected") if side in row and not responses}
    for response in [responses] if not isinstance(responses, list) else [*responses, *sides.values()]:
        if not isinstance(response, str):
            raise UserError(f"{where}: its responses should be texts")
        runs.check_text(response, f"{where}: a response")
    asked = [{"response": response} for response in responses]
    asked += [{"response": response, "side": side} for side, response in sides.items()]
    return [{"prompt": row["prompt"], **one} for one in asked or [{}]]


# --- shown


def as_text(told: dict[str, Any], width: int | None = None) -> str:
    """For a terminal of `width` characters: the two responses side by side, stacked where it is narrow."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 160)
    row = STAGES[told["stage"]]
    lines = [f"{told['run']}: {row.title}, {told['arm']}; {told['from']}"]
    for number, one in enumerate(told["rows"], 1):
        lines += ["", *_wrapped(f"{number}  {_said(one['prompt'])}", width, "   ")]
        if row.is_policy:
            lines += _two_columns(one, width)
        else:
            sigma = "" if one["sigma"] is None else f" ± {one['sigma']:.3g}"
            head = f"   {one['mean']:+.3f}{sigma}  " + (f"({one['side']}) " if one.get("side") else "")
            lines += _wrapped(head + _said(one["response"]), width, " " * 6)
    if means := _means(told["rows"]):
        lines += ["", f"means of {len(told['rows'])}: {means}"]
    return "\n".join(lines)


def _said(text: Prompt | Any) -> str:
    if isinstance(text, list):
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)
    return text if isinstance(text, str) else str(text)


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    lines = []
    for line in text.splitlines() or [""]:
        lines += textwrap.wrap(line, max(width, 20), subsequent_indent=indent, replace_whitespace=False) or [""]
    return lines


def _heading(one: dict[str, Any], side: str) -> str:
    names = {"reward": "reward", "true_reward": "true reward"}
    values = [f"{label} {one[side + name]:+.3f}" for name, label in names.items() if one.get(side + name) is not None]
    return ("reference" if side else "policy") + (f" ({', '.join(values)})" if values else "")


def _two_columns(one: dict[str, Any], width: int) -> list[str]:
    sides = (("reference_", "reference_response"), ("", "response"))
    if width < 72:
        return [
            line for side, key in sides for line in _wrapped(f"   {_heading(one, side)}: {one[key]}", width, "     ")
        ]
    half = (width - 3 - 3) // 2
    columns = [[_heading(one, side), *_wrapped(one[key], half, "")] for side, key in sides]
    longest = max(map(len, columns))
    left, right = ([*column, *[""] * (longest - len(column))] for column in columns)
    return [f"   {a:<{half}} | {b}".rstrip() for a, b in zip(left, right, strict=True)]


def _means(rows: list[dict[str, Any]]) -> str:
    labels = {"reward": "reward", "true_reward": "true reward"}
    said = []
    for name, label in labels.items():
        both = [[row.get(side + name) for row in rows] for side in ("reference_", "")]
        if rows and all(value is not None for values in both for value in values):
            before, after = (float(np.mean(values)) for values in both)
            said.append(f"{label} {before:+.3f} (reference) → {after:+.3f} (policy)")
    return "; ".join(said)
