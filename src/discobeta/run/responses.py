"""What a run makes of responses: those that it samples, and those of the reference that it ranks.

A policy answers held-out prompts beside the reference. A run of pairs, whose reward rates any response, ranks n of the
reference's responses to each prompt (`best_of`). All arms rank the same ones, and whichever is taken as the best of m,
the divergence from the reference is that of best-of-m, at most log m - (m - 1)/m (Beirami et al. 2024,
arXiv:2401.01879): arms are compared at an equal KL by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from discobeta import identity, metrics, record
from discobeta.data.batches import Batch, PerToken, Responses
from discobeta.data.rows import TokenisedData
from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.errors import UserError, say
from discobeta.inputs import answers as reference_answers
from discobeta.inputs.answers import Answers
from discobeta.method.stage import Stage
from discobeta.model.forward import LOGITS_AT_ONCE, hidden_states, logits_of, response_logps, vocabulary_size
from discobeta.model.generation import has_ended, response_text, stop_ids
from discobeta.model.inference import in_batches
from discobeta.model.layout import pairs_for
from discobeta.model.pretrained import load_reference
from discobeta.run import load as runs
from discobeta.run.truth import scale_metrics, topic_name, truth_numbers, without_gaps

if TYPE_CHECKING:
    from discobeta.method.translation import Translation

BEST_OF = (4, 16)
"""Of how many responses the best one's true reward is given."""

MARKS = (".", "?")
"""How a response of the world ends; one that ends in `?` is the noisier."""

MOST_LEVELS = 16
"""Of noise, that are measured apart."""

UNWRITTEN = ("kl", "mark_kl")
"""Columns of sampled responses whose means are metrics, and that stand in no file."""


@dataclass
class Beside:
    """What the responses of a run are measured beside, on its device."""

    prompts: list[np.ndarray]
    given: Answers | None  # of the reference, where they were sampled before
    reference: nn.Module | None  # None where only its answers are wanted, and are there
    judges: list[runs.RewardModel]  # of ppo
    translations: list[Translation | None]  # into the tokens of each judge


def beside(stage: Stage, data: TokenisedData, run: record.Record, tokenizer: Any) -> Beside:
    """Raises UserError if a reward model is not what the run was trained with, or cannot be given the prompts."""
    config, row = run.config, STAGES[run.config.stage]
    prompts = reference_answers.prompts_of(config, data)
    given = reference_answers.read(config, prompts)
    if not row.is_policy and given is not None:
        return Beside(prompts, given, None, [], [])
    reference = load_reference(config)
    runs.together(stage, reference)
    judges = runs.judges_together(runs.load_reward_models(config), stage, reference) if row.judge else []
    if judges:
        run.check_fact("reward_model", identity.one_of([judge.fingerprint for judge in judges]), config.reward_model)
    translations = [judge.translation(config, reference, tokenizer) for judge in judges]
    return Beside(prompts, given, reference, judges, translations)


def measure_responses(
    stage: Stage, data: TokenisedData, run: record.Record, tokenizer: Any
) -> tuple[pd.DataFrame | None, dict[str, Any], str]:
    """What a policy answers to prompts (None of a reward model), the metrics of responses, and the hash of the
    reference's."""
    config, row = run.config, STAGES[run.config.stage]
    others = beside(stage, data, run, tokenizer)
    prompts, sampled = others.prompts, []
    if row.is_policy:
        each = config.generations_per_prompt
        sampled = reference_answers.sample(config, stage.model, tokenizer, prompts, "policy", each)
    given = others.given or reference_answers.answer(config, others.reference, tokenizer, prompts)
    measured, answers = {}, None
    if row.is_policy:
        answers = compare_answers(stage, others, data, run, tokenizer, sampled, given)
        measured |= policy_metrics(answers)
        answers = answers.drop(columns=[name for name in UNWRITTEN if name in answers])
    if row.has_pairs and config.best_of:
        measured |= ranking_metrics(*rank(stage, data, config, tokenizer, prompts, given))
    return answers, measured, reference_answers.hash_of(given.first(len(prompts), config.reference_samples))


# --- a policy's own responses


def compare_answers(
    stage: Stage,
    others: Beside,
    data: TokenisedData,
    run: record.Record,
    tokenizer: Any,
    sampled: list[np.ndarray],
    given: Answers,
) -> pd.DataFrame:
    """The policy's and the reference's sampled responses to prompts, with what is known of them.

    One row per response of the policy, those to one prompt side by side (`sample` counts them, if there are several),
    each beside one of the reference's. Policy and reference draw from streams of their own, the same ones in every
    arm, so arms are compared with the same samples of the reference and with common random numbers.
    A ppo run's responses have the scores of its reward model, in its own unit, without a penalty on uncertainty; of
    several reward models they have the mean (`metrics.mean_scores`).
    """
    config, each = run.config, run.config.generations_per_prompt
    prompts, reference = others.prompts, others.reference
    theirs = given.first(len(prompts), each)
    repeated = [prompt for prompt in prompts for _ in range(each)]
    divergence = divergences(stage.model, reference, Responses(repeated, sampled), config)
    terms = divergence["kl_terms"]
    kl_terms = np.split(terms.values.double().numpy(), np.cumsum(terms.sizes)[:-1])
    stops = stop_ids(reference, tokenizer)
    answers = pd.DataFrame(
        {
            "prompt": [tokenizer.decode(ids) for ids in repeated],
            **({"sample": np.tile(np.arange(each), len(prompts))} if each > 1 else {}),
            "response": [response_text(tokenizer, ids) for ids in sampled],
            "reference_response": [response_text(tokenizer, ids) for ids in theirs],
            "length": [len(ids) for ids in sampled],
            "ended": [has_ended(ids, stops) for ids in sampled],
            "log_ratio": divergence["log_ratio"].double().numpy(),
            "kl": [of_tokens.sum() for of_tokens in kl_terms],
        }
    )
    if judges := others.judges:
        scores = [scores_of(judges, others.translations, config, repeated, texts) for texts in (sampled, theirs)]
        for side, values in zip(("", "reference_"), metrics.mean_scores(*scores), strict=True):
            answers[f"{side}reward"] = values
        if (log_s := stage.log_s_of(reference, prompts)) is not None:
            answers["log_s"] = np.repeat(log_s.double().numpy(), each)
    if config.ground_truth != "none":
        from discobeta.inputs.world import ground_truth

        world = ground_truth(config.ground_truth)
        truth = truth_of_prompts(data, config)
        answers = answers.assign(**{name: np.repeat(values, each) for name, values in truth.items()})
        for side in ("", "reference_"):
            texts = list(zip(answers["prompt"], answers[f"{side}response"], strict=True))
            answers[f"{side}true_reward"] = [world.true_reward(*text) for text in texts]
            answers[f"{side}well_formed"] = [bool(world.well_formed(*text)) for text in texts]
        places = answers["length"] - 1 - answers["ended"]  # of the last word
        answers["mark_kl"] = [
            of_tokens[place] if last_word(text) in MARKS else 0.0
            for of_tokens, place, text in zip(kl_terms, places, answers["response"], strict=True)
        ]
    return answers


def scores_of(
    judges: list[runs.RewardModel], translations: list[Any], config: RunConfig,
    prompts: list[np.ndarray], responses: list[np.ndarray],
) -> np.ndarray:  # fmt: skip
    """(N, M) scores of N responses by M reward models."""
    columns = []
    for judge, translation in zip(judges, translations, strict=True):
        texts = (prompts, responses) if translation is None else translation(prompts, responses)
        columns.append(judge.score_ids(*texts, config.per_device_eval_batch_size)[0].double().numpy())
    return np.stack(columns, 1)


def truth_of_prompts(data: TokenisedData, config: RunConfig) -> dict[str, np.ndarray]:
    """What is known of the N prompts that are answered."""
    rows, asked = data.to_answer(config.num_eval_generations)
    return {name: rows.truth[name][asked] for name in ("topic", "noise", "familiarity") if name in rows.truth}


def last_word(text: str) -> str:
    return text.split()[-1] if text.split() else ""


def divergences(
    policy: nn.Module, reference: nn.Module, texts: Responses, config: RunConfig
) -> dict[str, Tensor | PerToken]:
    """Of N responses, on the CPU: `log_ratio` (N,), log pi(y|x)/ref(y|x), and `kl_terms`, their `token_divergences`.

    Under samples of pi both sums over the response have the mean KL(pi || ref); that of the terms knows what else
    could have been drawn at every place, varies less, and is never negative (Amini et al. 2025, arXiv:2504.10637).
    """
    device = next(policy.parameters()).device

    def of_batch(indices: np.ndarray) -> dict[str, Tensor | PerToken]:
        batch = texts.batch(indices).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            states = [hidden_states(model, batch) for model in (policy, reference)]
            own, other = map(response_logps, (policy, reference), states, (batch, batch))
            terms = token_divergences(policy, reference, *states, batch)
        return {
            "log_ratio": own - other,
            "kl_terms": PerToken(terms, np.array([len(texts.responses[i]) for i in indices])),
        }

    return in_batches(
        texts.lengths, 2 * config.per_device_eval_batch_size, of_batch,  # which counts pairs
        step="evaluation", tokens_per_pass=config.tokens_per_pass,
    )  # fmt: skip


def token_divergences(
    policy: nn.Module, reference: nn.Module, hidden: Tensor, reference_hidden: Tensor, batch: Batch
) -> Tensor:
    """(M,) float32 KL(pi(.|x,y_<t) || ref(.|x,y_<t)) at each response token, in nats, of the whole next-token
    distributions; half of LOGITS_AT_ONCE of both models at a time."""
    size = max(1, LOGITS_AT_ONCE // (2 * vocabulary_size(policy)))
    states = (values.flatten(0, 1)[batch.predictor_index].split(size) for values in (hidden, reference_hidden))
    terms = []
    for own, other in zip(*states, strict=True):
        log_p = logits_of(policy, own).log_softmax(-1)
        log_ratio = log_p - logits_of(reference, other).log_softmax(-1)
        terms.append(torch.einsum("mv,mv->m", log_p.exp_(), log_ratio))
    return torch.cat(terms)


def policy_metrics(answers: pd.DataFrame) -> dict[str, Any]:
    """Means over the sampled responses.

    kl_per_sequence estimates KL(policy || reference) = E_policy[log policy/reference], in nats, and so does
    kl_rao_blackwell (`divergences`); they do so without bias only for samples at temperature 1 without top_p or top_k.
    reward_gain is in units of the standard deviation of the reference's rewards. Of the world, question_kl is the part
    of kl_rao_blackwell at the place of the last word of responses that end in `.` or `?`, where the two are chosen
    from; regret is the true reward of the oracle's policy of the same KL minus the own. Says what cannot be: a
    negative divergence, responses of which none ends.
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
    if "kl" in answers:
        measured["kl_rao_blackwell"] = float(answers["kl"].mean())
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
            topics = answers["topic"].map(topic_name)
            measured["true_reward_by_topic"] = answers.groupby(topics)["true_reward"].mean().to_dict() or None
    if "mark_kl" in answers:
        from discobeta.inputs.world import frontier_reward

        measured["question_share"] = float(answers["response"].map(last_word).eq("?").mean())
        measured["question_kl"] = float(answers["mark_kl"].mean())
        measured["regret"] = frontier_reward(measured["kl_rao_blackwell"]) - measured["true_reward"]
        if "noise" in answers:
            levels = noise_levels(answers)
            measured["kl_by_noise"] = {name: float(answers["kl"][rows].mean()) for name, rows in levels.items()} or None
    return without_gaps(measured)


# --- the reference's responses, ranked


def rank(
    stage: Stage, data: TokenisedData, config: RunConfig, tokenizer: Any, prompts: list[np.ndarray], given: Answers
) -> tuple[np.ndarray, np.ndarray | None, pd.DataFrame]:
    """(N, n) scores of the reference's n responses to N prompts, their true rewards where known, and what is known of
    the prompts.

    A score is the run's mean reward of a response: r or mu of a reward model, in dpo beta * log(pi(y|x) / ref(y|x)),
    where beta may be the prompt's.
    """
    each, count = config.best_of, len(prompts)
    responses = given.first(count, each)
    rows = reference_answers.candidates(prompts, responses, each)
    columns = dict(given.columns)
    if "prompt_features" in columns:
        columns["prompt_features"] = columns["prompt_features"].repeat_interleave(len(rows) // count, 0)
    pairs = pairs_for(stage.model, config, rows, columns)

    def of_batch(indices: np.ndarray) -> dict[str, Tensor]:
        return {"rewards": stage.rewards_of_pairs(pairs.batch(indices).to(stage.device)).T}

    rewards = in_batches(
        pairs.places, config.per_device_eval_batch_size, of_batch,
        step="evaluation", tokens_per_pass=config.tokens_per_pass, progress_bar="ranked pairs",
    )["rewards"]  # fmt: skip
    scores = reference_answers.of_candidates(rewards.double().numpy(), each)
    if broken := int((~np.isfinite(scores)).sum()):
        raise UserError(
            f"{broken} of {scores.size} of the reference's responses have a score that is no finite number: the run's "
            "weights have diverged, or are damaged"
        )
    true_rewards = None
    if config.ground_truth != "none":
        from discobeta.inputs.world import ground_truth

        world = ground_truth(config.ground_truth)
        asked = [tokenizer.decode(ids) for ids in prompts for _ in range(each)]
        texts = zip(asked, (response_text(tokenizer, ids) for ids in responses), strict=True)
        true_rewards = np.array([world.true_reward(*text) for text in texts], float).reshape(count, each)
    truth = truth_of_prompts(data, config)
    return scores, true_rewards, pd.DataFrame(truth, index=range(count))


def ranking_metrics(scores: np.ndarray, true_rewards: np.ndarray | None, prompts: pd.DataFrame) -> dict[str, Any]:
    """Means over N prompts of what (N, n) scores make of n responses to each.

    best_of_m is the expected true reward of the response with the highest score among m of the n (`metrics.best_of`).
    score_spread is the standard deviation of the scores within a prompt, by the prompt's noise and in units of its
    mean over all of them; the ratio is that of the lowest noise over that of the highest.
    """
    measured: dict[str, Any] = {}
    if true_rewards is not None:
        for m in BEST_OF:
            if m <= scores.shape[1]:
                best = metrics.best_of(scores, true_rewards, m)
                measured[f"best_of_{m}"] = {"true_reward": float(best.mean())}
        correlations = metrics.spearman_within(scores, true_rewards)
        known = correlations[~np.isnan(correlations)]
        measured["within_prompt_spearman"] = float(known.mean()) if len(known) else None
    if "noise" in prompts:
        spread, levels = scores.std(axis=1, ddof=1), noise_levels(prompts)
        spreads = {name: float(spread[rows].mean()) for name, rows in levels.items()}
        mean = float(spread[np.any(list(levels.values()), axis=0)].mean()) if levels else 0.0
        measured["score_spread"] = {name: value / mean for name, value in spreads.items()} if mean else None
        lowest, *others = spreads.values() if spreads else [0.0]
        measured["score_spread_ratio"] = lowest / others[-1] if others and others[-1] else None
    return without_gaps(measured)


def noise_levels(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Level of noise, ascending, as text -> (rows,) where it is; nothing where there are more than MOST_LEVELS."""
    noise = truth_numbers(rows, "noise", "number above 0", lambda noise: noise > 0)
    levels = np.unique(noise[~np.isnan(noise)])
    return {f"{level:g}": noise == level for level in levels} if len(levels) <= MOST_LEVELS else {}
