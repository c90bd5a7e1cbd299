"""Measurements of one run: metrics.json, one row per held-out pair, and sampled responses.

metrics.json and examples.parquet are functions of the weights and the data alone (no times, names
or paths), so that equal runs give equal bytes; what the evaluation took is in evaluation_cost.json.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from discobeta import lock, metrics, record
from discobeta.data.batches import Pairs, Responses
from discobeta.data.rows import TokenisedData
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.config import RunConfig, keys_of
from discobeta.design.stages import STAGES
from discobeta.errors import UserError, did_you_mean, say, shown
from discobeta.files import remove, replacing, write_json, write_text
from discobeta.inputs import answers as reference_answers
from discobeta.method.heads import SIGMA0
from discobeta.method.stage import Stage, stage_class
from discobeta.model import preflight
from discobeta.model.forward import hidden_states, response_logps
from discobeta.model.generation import has_ended, response_text, stop_ids
from discobeta.model.inference import in_batches
from discobeta.model.layout import pairs_for
from discobeta.model.pretrained import load_reference, load_tokenizer, use_deterministic_kernels
from discobeta.run import load as runs
from discobeta.run.votes import vote_metrics


def evaluate(
    directory: str | Path,
    settings: dict[str, Any] | None = None,
    *,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Measure the run in `directory` on its held-out rows. Writes the files and returns the metrics.

    settings: of the evaluation (num_eval_generations, temperature, ...), where they are not those in the run's config.
    A ppo run without held-out rows answers prompts that it was trained on. Nothing is written outside of `directory`,
    which is held meanwhile; trust_remote_code and cache_dir are the caller's word, and what the run's config says of
    them counts for nothing. Raises UserError for a run that is unfinished or damaged, and if its base, its data or its
    reward model is not what it was trained with.
    """
    directory = Path(directory)
    record.read(directory, weights=False)  # before anything is made there
    with lock.holding(directory):
        reader = {"trust_remote_code": trust_remote_code, "cache_dir": cache_dir}
        run = runs.read_run(directory, *STAGES, **reader)
        return _evaluate(replace(run, config=_with_settings(run.config, settings or {})))


def _with_settings(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The run's config with other settings of its evaluation."""
    keys = keys_of("evaluation", config.stage)
    for name in settings:
        if name not in keys:
            hint = did_you_mean(name, keys) or f"; of a run of {config.stage} it may be {', '.join(keys)}"
            raise UserError(f"--set {shown(name)}: this is no setting of an evaluation{hint}")
    return RunConfig.from_mapping(config.resolved() | settings, "--set")[0]


def _evaluate(run: record.Record) -> dict[str, Any]:
    directory, config = run.directory, run.config
    row = STAGES[config.stage]
    started = time.monotonic()
    use_deterministic_kernels(config)
    tokenizer = load_tokenizer(config)
    data = load_or_tokenise(config, tokenizer, write=False)
    facts = data.keys()
    for key, now in facts.items():
        run.check_fact(key, now, config.dataset or config.tokenized_path)
    for key, now in stage_class(config.stage).hashes_of_inputs(config).items():
        run.check_fact(key, now, getattr(config, key))
    if data.held_out is None and row.has_pairs:
        raise UserError(f"{directory} has no held-out rows: its config needs eval_dataset or val_size")
    if not (row.has_pairs or config.num_eval_generations):
        raise UserError(
            f"{directory}: a {row.name} run is measured by sampled responses, and num_eval_generations is 0"
        )
    stage = runs.load_stage(run)
    preflight.check(stage.model, data, config, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage.to(device)
    examples = answers = None
    measured: dict[str, Any] = {}
    if row.has_pairs:
        columns = stage.columns(config, {"eval": data.held_out}, write=False)
        examples = compare_all(stage, pairs_for(stage.model, config, data.held_out, columns["eval"]))
        measured |= preference_metrics(examples)
    if row.is_policy and config.num_eval_generations:
        answers, facts["reference_answers"] = answer_prompts(stage, data, run, tokenizer)
        measured |= policy_metrics(answers)
        lines = (json.dumps(row, ensure_ascii=False) for row in answers.to_dict("records"))
        write_text(directory / "generations.jsonl", "".join(f"{line}\n" for line in lines))
    else:
        remove(directory / "generations.jsonl")  # of an evaluation with other settings
    with replacing(directory / "examples.parquet") as temporary:
        (answers if examples is None else examples).to_parquet(temporary, index=False)
    seconds = time.monotonic() - started
    on_gpu = device.type == "cuda"
    write_json(directory / "evaluation_cost.json", {"seconds": seconds, "gpu_seconds": seconds if on_gpu else 0.0})
    record.write_evaluation(directory, config, measured, facts)
    return measured


def compare_all(stage: Stage, pairs: Pairs) -> pd.DataFrame:
    """One row per pair, in the order of the data: what the run says of it, beside what is known."""

    def of_batch(indices: np.ndarray) -> dict[str, torch.Tensor]:
        return stage.compare(pairs.batch(indices).to(stage.device)).measured()

    measured = in_batches(
        pairs.places, stage.config.per_device_eval_batch_size, of_batch,
        step="evaluation", tokens_per_pass=stage.config.tokens_per_pass, progress_bar="held-out pairs",
    )  # fmt: skip
    measured = {name: values.double().numpy() for name, values in measured.items()}
    decisive = [measured[name] for name in ("nll", "mean_margin") if name in measured]
    if broken := int((~np.isfinite(decisive).all(0)).sum()):
        raise UserError(
            f"{broken} of {len(pairs)} held-out pairs have a loss or a margin that is no finite number: "
            "the run's weights have diverged, or are damaged"
        )
    examples = pd.DataFrame({"row": np.arange(len(pairs)), "source": pairs.rows.source, **measured})
    if "nll" in examples:
        examples.insert(2, "probability", np.exp(-examples["nll"]))
    # the truth's own `probability` is that of the label under the oracle
    truth = {{"probability": "oracle_probability"}.get(name, name): values for name, values in pairs.rows.truth.items()}
    votes = {f"votes_{side}": numbers for side, numbers in pairs.rows.votes.items()}
    return pd.concat([examples, pd.DataFrame(truth), pd.DataFrame(votes)], axis=1)


def preference_metrics(examples: pd.DataFrame) -> dict[str, Any]:
    """Accuracy and, of a likelihood, NLL, Brier score and calibration; overall, per topic, against a known truth
    and against the votes of several people.

    What the truth leaves undefined is said and left out.
    """
    measured: dict[str, Any] = metrics.classification(examples.get("nll"), examples["mean_margin"])
    if {"oracle_probability", "nll"} <= set(examples):
        q = truth_numbers(examples, "oracle_probability", "probability in [0, 1]", lambda q: (q >= 0) & (q <= 1))
        if count := int((q == 0).sum()):
            say(
                f"truth column probability: {count} of {len(q)} rows came out against a probability of 0, whose "
                "-log is infinite; oracle_nll is without them"
            )
        measured |= metrics.against_oracle(examples["nll"], q)
    if "variance_sum" in examples:
        log_sigma = np.log(np.concatenate([examples["sigma_chosen"], examples["sigma_rejected"]]) / SIGMA0)
        measured |= {"mean_log_sigma": float(log_sigma.mean()), "sd_log_sigma": float(log_sigma.std())}
        if {"chosen_sigma", "rejected_sigma"} & set(examples):
            truth = np.concatenate([truth_numbers(examples, f"{side}_sigma") for side in ("chosen", "rejected")])
            measured["sigma_spearman"] = metrics.spearman(log_sigma, truth)
    measured |= scale_metrics(examples)
    if "topic" in examples:
        topics = examples["topic"].map(_topic_name)
        measured["by_topic"] = {
            topic: metrics.classification(part.get("nll"), part["mean_margin"])
            for topic, part in examples.groupby(topics, sort=True)
        } or None
        if gaps := int(topics.isna().sum()):
            say(f"truth column topic: {gaps} of {len(topics)} rows hold none; by_topic is without them")
    of_votes = without_gaps({f"votes/{name}": value for name, value in vote_metrics(examples).items()})
    if of_votes:
        measured["votes"] = {name.removeprefix("votes/"): value for name, value in of_votes.items()}
    return without_gaps(measured)


def truth_numbers(
    examples: pd.DataFrame,
    name: str,
    wanted: str = "number",
    is_wanted: Callable[[np.ndarray], np.ndarray] = np.isfinite,
) -> np.ndarray:
    """(rows,) float64 of a truth column, NaN where a row holds nothing, text, or nothing `wanted`, which is said."""
    values = np.full(len(examples), np.nan)
    if name in examples:
        values = pd.to_numeric(examples[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    values = np.where(np.isfinite(values) & is_wanted(values), values, np.nan)
    if gaps := int(np.isnan(values).sum()):
        rest = "left out" if gaps == len(values) else "measured without them"
        column = name.removeprefix("oracle_")  # as the data call it
        say(f"truth column {column}: {gaps} of {len(values)} rows hold no {wanted}; what needs one is {rest}")
    return values


def _topic_name(topic: Any) -> str | None:
    """As text: 1 where gaps have made it 1.0; None of a row without one."""
    if pd.isna(topic) or topic == "":
        return None
    return str(int(topic)) if isinstance(topic, float) and topic.is_integer() else str(topic)


def without_gaps(measured: dict[str, Any]) -> dict[str, Any]:
    """Without what has no value, which is said."""
    infinite = [name for name, value in measured.items() if isinstance(value, float) and not math.isfinite(value)]
    undefined = [name for name, value in measured.items() if value is None]
    if undefined:
        say(f"not in metrics.json: {', '.join(undefined)} (too few rows that say enough, or nothing in them varies)")
    if infinite:
        say(f"not in metrics.json: {', '.join(infinite)} (no finite number)")
    return {name: value for name, value in measured.items() if name not in (*undefined, *infinite)}


def scale_metrics(examples: pd.DataFrame) -> dict[str, float | None]:
    """What s(x) does: its mean and spread, and what it follows; nothing where beta is one number."""
    if "log_s" not in examples:
        return {}
    log_s = examples["log_s"]
    measured = {"mean_log_s": float(log_s.mean()), "sd_log_s": float(log_s.std(ddof=0))}
    if {"noise", "familiarity"} & set(examples):
        noise = np.log(truth_numbers(examples, "noise", "number above 0", lambda noise: noise > 0))
        familiarity = truth_numbers(examples, "familiarity")
        measured["log_s_noise"] = metrics.partial_correlation(log_s, noise, given=familiarity)
        measured["log_s_familiarity"] = metrics.partial_correlation(log_s, familiarity, given=noise)
    return measured


def answer_prompts(stage: Stage, data: TokenisedData, run: record.Record, tokenizer: Any) -> tuple[pd.DataFrame, str]:
    """The policy's and the reference's sampled responses to prompts, with what is known of them; the reference's hash.

    One row per prompt. Policy and reference draw from streams of their own, the same ones in every
    arm, so arms are compared with the same samples of the reference and with common random numbers.
    A ppo run's responses have the scores of its reward model, in its own unit.
    """
    config = run.config
    prompts = reference_answers.prompts_of(config, data)
    reference = load_reference(config).to(stage.device)
    sampled = {
        "policy": reference_answers.sample(config, stage.model, tokenizer, prompts, "policy"),
        "reference": reference_answers.read(config, prompts)
        or reference_answers.sample(config, reference, tokenizer, prompts, "reference"),
    }
    of_policy = Responses(prompts, sampled["policy"])
    policy_logps, reference_logps = (_logps(model, of_policy, config) for model in (stage.model, reference))
    answers = pd.DataFrame(
        {
            "prompt": [tokenizer.decode(ids) for ids in prompts],
            "response": [response_text(tokenizer, ids) for ids in sampled["policy"]],
            "reference_response": [response_text(tokenizer, ids) for ids in sampled["reference"]],
            "length": [len(ids) for ids in sampled["policy"]],
            "ended": [has_ended(ids, stop_ids(reference, tokenizer)) for ids in sampled["policy"]],
            "log_ratio": (policy_logps - reference_logps).double().numpy(),
        }
    )
    if STAGES[config.stage].judge:
        judge = runs.load_reward_model(config.reward_model, **runs.judge_settings(config))
        run.check_fact("reward_model", judge.fingerprint, config.reward_model)
        judge.stage.to(stage.device)
        translation = judge.translation(config, reference, tokenizer)
        for side, name in (("", "policy"), ("reference_", "reference")):
            texts = (prompts, sampled[name]) if translation is None else translation(prompts, sampled[name])
            scores, _ = judge.score_ids(*texts, config.per_device_eval_batch_size)
            answers[f"{side}reward"] = scores.double().numpy()
        if (log_s := stage.log_s_of(reference, prompts)) is not None:
            answers["log_s"] = log_s.double().numpy()
    if config.ground_truth == "world":
        from discobeta.inputs import world

        rows, asked = data.to_answer(config.num_eval_generations)
        truth = {name: rows.truth[name][asked] for name in ("topic", "noise", "familiarity") if name in rows.truth}
        answers = answers.assign(**truth)
        for side in ("", "reference_"):
            texts = list(zip(answers["prompt"], answers[f"{side}response"], strict=True))
            answers[f"{side}true_reward"] = [world.true_reward(*text) for text in texts]
            answers[f"{side}well_formed"] = [bool(world.well_formed(*text)) for text in texts]
    return answers, reference_answers.hash_of(sampled["reference"])


def _logps(model: torch.nn.Module, texts: Responses, config: RunConfig) -> torch.Tensor:
    """(N,) log-probabilities of N responses under `model`, on the CPU."""
    device = next(model.parameters()).device

    def of_batch(indices: np.ndarray) -> dict[str, torch.Tensor]:
        batch = texts.batch(indices).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            return {"logps": response_logps(model, hidden_states(model, batch), batch)}

    return in_batches(
        texts.lengths, 2 * config.per_device_eval_batch_size, of_batch,  # which counts pairs
        step="evaluation", tokens_per_pass=config.tokens_per_pass,
    )["logps"]  # fmt: skip


def policy_metrics(answers: pd.DataFrame) -> dict[str, Any]:
    """Means over the sampled responses.

    kl_per_sequence estimates KL(policy || reference) = E_policy[log policy/reference], in nats; it
    does so without bias only for samples at temperature 1 without top_p or top_k. reward_gain is in
    units of the standard deviation of the reference's rewards. Says what cannot be: a negative divergence,
    responses of which none ends.
    """
    measured: dict[str, Any] = {
        "generations": len(answers),
        "kl_per_sequence": float(answers["log_ratio"].mean()),
        "response_length": float(answers["length"].mean()),
        "eos_rate": float(answers["ended"].mean()),
    }
    if measured["kl_per_sequence"] < -1e-4:  # nearer to 0 it may be the rounding of long responses' log-probabilities
        say(
            f"kl_per_sequence is {measured['kl_per_sequence']:.4g}, and a divergence is never negative: {len(answers)} "
            "sampled responses are too few, or not drawn at temperature 1 without top_p and top_k, which biases it"
        )
    if measured["eos_rate"] == 0:
        say(
            f"eos_rate is 0: none of {len(answers)} sampled responses ends within {answers['length'].max()} tokens; "
            "max_new_tokens is too small, or the policy never stops"
        )
    if "reward" in answers:
        before, after = answers["reference_reward"], answers["reward"]
        measured |= {"reward": float(after.mean()), "reference_reward": float(before.mean())}
        if (deviation := before.std()) > 0:
            measured["reward_gain"] = float((after - before).mean() / deviation)
        measured |= scale_metrics(answers)
    if "true_reward" in answers:
        difference = answers["true_reward"] - answers["reference_true_reward"]
        measured |= {
            "true_reward": float(answers["true_reward"].mean()),
            "reference_true_reward": float(answers["reference_true_reward"].mean()),
            "win_rate": float(((difference > 0) + 0.5 * (difference == 0)).mean()),
            "well_formed": float(answers["well_formed"].mean()),
        }
        if "topic" in answers:
            topics = answers["topic"].map(_topic_name)
            measured["true_reward_by_topic"] = answers.groupby(topics)["true_reward"].mean().to_dict() or None
    return without_gaps(measured)
