"""Measurements of one run: metrics.json, one row per held-out pair, and sampled responses.

metrics.json and examples.parquet are functions of the weights and the data alone (no times, names
or paths), so that equal runs give equal bytes; what the evaluation took is in evaluation_cost.json.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from discobeta import lock, metrics, record
from discobeta.data.batches import Pairs
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.errors import UserError, say
from discobeta.files import check_regular, remove, replacing, sha256, write_json, write_text
from discobeta.method.heads import SIGMA0
from discobeta.method.stage import Stage, stage_class
from discobeta.model import preflight
from discobeta.model.forward import pooled
from discobeta.model.inference import in_batches
from discobeta.model.kernels import choose_kernels
from discobeta.model.layout import pairs_for
from discobeta.model.pretrained import load_tokenizer
from discobeta.run import card, elsewhere, posthoc
from discobeta.run import load as runs
from discobeta.run.responses import measure_responses
from discobeta.run.truth import is_probability, known, scale_metrics, topic_name, truth_numbers, without_gaps
from discobeta.run.votes import vote_metrics


def evaluate(
    directory: str | Path,
    settings: dict[str, Any] | None = None,
    *,
    output: str | Path | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Measure the run in `directory` on its held-out rows. Writes the files and returns the metrics.

    settings: of the evaluation (num_eval_generations, temperature, ...), where they are not those in the run's config.
    Those of other held-out rows (`elsewhere.OTHER_ROWS`: eval_dataset, ...) measure the run on these; what is measured
    of them stands in `output`, by default RUN_DIR/evaluations/<name of the data>, and never in the place of the run's
    own metrics. A ppo run without held-out rows answers prompts that it was trained on. Nothing is written outside of
    `directory`, which is held meanwhile, and `output`; base, trust_remote_code and cache_dir are the caller's word
    (`load_policy`), and what the run's config says of the last two counts for nothing. Raises UserError for a run that
    is unfinished or damaged, and if its base, its data or its reward model is not what it was trained with.
    """
    directory, settings = Path(directory), settings or {}
    asked = record.read(directory, weights=False).config  # before anything is made there
    asked, other_rows = elsewhere.with_settings(asked, settings)
    output = elsewhere.output_of(directory, output, other_rows)
    with lock.holding(directory):
        reader = {"base": base, "trust_remote_code": trust_remote_code, "cache_dir": cache_dir}
        run = runs.read_run(directory, *STAGES, **reader)
        own, run = run.config, replace(run, config=elsewhere.with_settings(run.config, settings)[0])
        if other_rows:
            elsewhere.check_unseen(own, run.config)
        if output == directory:
            measured = _evaluate(run, asked, directory)
            card.write(directory)
        else:
            with elsewhere.holding(output):
                measured = _evaluate(run, asked, output, other_rows)
        return measured


def _evaluate(
    run: record.Record, asked: RunConfig, output: Path, other_rows: dict[str, Any] | None = None
) -> dict[str, Any]:
    """asked: the config as it names its files where it was trained; output: the folder for what is measured;
    other_rows: what was said of the rows, if they are not the run's own."""
    directory, config = run.directory, run.config
    row = STAGES[config.stage]
    started = time.monotonic()
    choose_kernels(config)
    tokenizer = load_tokenizer(config)
    data = load_or_tokenise(config, tokenizer, write=False)
    facts: dict[str, Any] = data.keys()
    if other_rows:
        for name, key in (("data", "eval_dataset"), ("calibration", "calibration_dataset")):
            if facts.get(name) == run.facts["data"]:
                raise elsewhere.seen(key, other_rows[key])
        data = replace(data, held_out=data.train)
        facts = {"rows": other_rows, "held_out": facts["data"]}
    else:
        for key, now in facts.items():
            run.check_fact(key, now, config.dataset or config.tokenized_path)
    for key, now in stage_class(config.stage).hashes_of_inputs(config).items():
        run.check_fact(key, now, getattr(config, key))
    if config.reference_samples and config.ground_truth not in ("none", "world"):
        check_regular(Path(config.ground_truth))
        facts["ground_truth"] = sha256(Path(config.ground_truth))
    if data.held_out is None and row.has_pairs:
        raise UserError(f"{directory} has no held-out rows: its config needs eval_dataset or val_size")
    if not (row.has_pairs or config.num_eval_generations):
        raise UserError(
            f"{directory}: a {row.name} run is measured by sampled responses, and num_eval_generations is 0"
        )
    stage = runs.load_stage(run)
    preflight.check(stage.model, data, config, tokenizer)
    parts = {name: rows for name, rows in data.parts().items() if name != "train"} if row.has_pairs else {}
    columns = stage.columns(config, parts, write=False)  # before the stage is on the device: it may need a model there
    device = runs.together(stage)
    examples = answers = None
    measured: dict[str, Any] = {}
    if row.has_pairs:
        pairs = {name: pairs_for(stage.model, config, rows, columns[name]) for name, rows in parts.items()}
        examples, states = compare_all(stage, pairs["eval"], with_states="calibration" in pairs)
        measured |= preference_metrics(examples)
        if "calibration" in pairs:
            calibration, their_states = compare_all(stage, pairs["calibration"], "calibration", with_states=True)
            measured |= calibration_metrics(calibration)
            if states is not None:
                of_pairs = margins_of(examples, states), margins_of(calibration, their_states)
                if controls := posthoc.measure(*of_pairs, config.seed):
                    measured["posthoc"] = controls
    if config.reference_samples:
        answers, of_responses, facts["reference_answers"] = measure_responses(stage, data, run, tokenizer)
        measured |= of_responses
    if output != directory:
        elsewhere.claim(output)
    if answers is not None:
        lines = (json.dumps(row, ensure_ascii=False) for row in answers.to_dict("records"))
        write_text(output / "generations.jsonl", "".join(f"{line}\n" for line in lines))
    else:
        remove(output / "generations.jsonl")  # of an evaluation with other settings
    with replacing(output / "examples.parquet") as temporary:
        (answers if examples is None else examples).to_parquet(temporary, index=False)
    seconds = time.monotonic() - started
    on_gpu = device.type == "cuda"
    write_json(output / "evaluation_cost.json", {"seconds": seconds, "gpu_seconds": seconds if on_gpu else 0.0})
    record.write_evaluation(output, asked, measured, facts, directory)
    return measured


def compare_all(
    stage: Stage, pairs: Pairs, kind: str = "held-out", *, with_states: bool = False
) -> tuple[pd.DataFrame, torch.Tensor | None]:
    """One row per pair, in the order of the data: what the run says of it, beside what is known. And, on demand, the
    (pairs, 2, hidden_size) pooled states of chosen and rejected, of a run whose P is sigmoid(margin); else None.

    kind: what the pairs are called.
    """
    config = stage.config

    def of_batch(indices: np.ndarray) -> dict[str, torch.Tensor]:
        comparison = stage.compare(pairs.batch(indices).to(stage.device))
        said = comparison.measured()
        is_logistic = comparison.nll is not None and not comparison.opinions and config.pref_loss == "sigmoid"
        if with_states and is_logistic:
            evidence = comparison.evidence
            states = pooled(evidence.hidden, evidence.batch, config.head_pooling)
            said["states"] = states.unflatten(0, (2, -1)).transpose(0, 1)
        return said

    measured = in_batches(
        pairs.places, config.per_device_eval_batch_size, of_batch,
        step="evaluation", tokens_per_pass=config.tokens_per_pass, progress_bar=f"{kind} pairs",
    )  # fmt: skip
    states = measured.pop("states", None)
    measured = {name: values.double().numpy() for name, values in measured.items()}
    decisive = [measured[name] for name in ("nll", "mean_margin") if name in measured]
    if broken := int((~np.isfinite(decisive).all(0)).sum()):
        raise UserError(
            f"{broken} of {len(pairs)} {kind} pairs have a loss or a margin that is no finite number: "
            "the run's weights have diverged, or are damaged"
        )
    examples = pd.DataFrame({"row": np.arange(len(pairs)), "source": pairs.rows.source, **measured})
    if "nll" in examples:
        examples.insert(2, "probability", np.exp(-examples["nll"]))
    # the truth's own `probability` is that of the label under the oracle
    truth = {{"probability": "oracle_probability"}.get(name, name): values for name, values in pairs.rows.truth.items()}
    votes = {f"votes_{side}": numbers for side, numbers in pairs.rows.votes.items()}
    return pd.concat([examples, pd.DataFrame(truth), pd.DataFrame(votes)], axis=1), states


def calibration_metrics(examples: pd.DataFrame) -> dict[str, dict[str, float]]:
    """`calibration`: accuracy, nll and, with a known truth, excess_kl of calibration pairs; nothing without a
    likelihood."""
    if "nll" not in examples:
        return {}
    found = metrics.classification(examples["nll"], examples["mean_margin"])
    measured = {"accuracy": found["accuracy"], "nll": found["nll"]}
    if (oracle := known(examples, "oracle_probability", is_probability)) is not None:
        measured["excess_kl"] = metrics.against_oracle(examples["nll"], oracle)["excess_kl"]
    return {"calibration": measured}


def margins_of(examples: pd.DataFrame, states: torch.Tensor) -> posthoc.Margins:
    """What post-hoc controls take of pairs."""
    sigma = [known(examples, f"{side}_sigma") for side in ("chosen", "rejected")]
    return posthoc.Margins(
        examples["mean_margin"].to_numpy(),
        states,
        examples["topic"].map(topic_name).to_numpy(object) if "topic" in examples else None,
        known(examples, "oracle_probability", is_probability),
        None if any(of_side is None for of_side in sigma) else np.stack(sigma, 1),
    )


def preference_metrics(examples: pd.DataFrame) -> dict[str, Any]:
    """Accuracy and, of a likelihood, NLL, Brier score and calibration; overall, per topic, against a known truth
    and against the votes of several people.

    What the truth leaves undefined is said and left out.
    """
    measured: dict[str, Any] = metrics.classification(examples.get("nll"), examples["mean_margin"])
    if {"oracle_probability", "nll"} <= set(examples):
        q = truth_numbers(examples, "oracle_probability", "probability in [0, 1]", is_probability)
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
        topics = examples["topic"].map(topic_name)
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
