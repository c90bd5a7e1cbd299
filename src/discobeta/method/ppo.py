"""Proximal policy optimisation against a reward model, with a penalty on leaving the reference.

docs/ppo.md says where each choice comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from discobeta import identity, losses, seeds
from discobeta.data.batches import Batch, Pairs, PerToken, Responses, cut, joined, pack
from discobeta.data.rows import Rows, TokenisedData
from discobeta.design.config import RunConfig
from discobeta.design.schedule import Schedule
from discobeta.errors import UserError
from discobeta.method.heads import SIGMA0, WIDTH, Heads, full_precision
from discobeta.method.optim import Group, head_group, model_group
from discobeta.method.reward import RewardModel
from discobeta.method.rm import score_layer
from discobeta.method.signals import scaled
from discobeta.method.stage import Stage, Work
from discobeta.method.translation import is_needed
from discobeta.model.forward import (
    check_context,
    hidden_states,
    per_sequence,
    share_frozen_weights,
    state_at,
    switch_off_dropout,
    token_logps,
    width,
)
from discobeta.model.generation import generate, has_ended, stop_ids
from discobeta.model.inference import in_batches
from discobeta.model.layout import obeys_masks
from discobeta.model.preflight import check_answers, check_ids, check_rows
from discobeta.model.pretrained import load_causal_lm, load_reference, load_tokenizer

SCORED_FOR_SCALE = 256
"""Responses of the reference whose scores are standardised to mean 0 and deviation 1 by ppo_score_norm."""

KL_GAIN, KL_LARGEST_ERROR = 0.1, 0.2
"""What ppo_target does: a proportional controller, Ziegler et al. 2019 (arXiv:1909.08593), section 2.2."""


@dataclass
class Rollouts(Responses):
    """N responses of the policy as it was before the update, and what was computed for each token then."""

    columns: dict[str, PerToken]

    def batch(self, indices: np.ndarray) -> Batch:
        columns = {name: values.of(indices) for name, values in self.columns.items()}
        columns["tokens_per_response"] = torch.tensor(self.sizes.mean(), dtype=torch.float32)
        return super().batch(indices, columns)


class ValueHead(nn.Module):
    """V(x, y_<t) = w . h_t + b + net(h_t), the expected return from token t on, in the unit of the scaled scores.

    h_t is the reward model's last hidden state before token t. The linear part starts as `start`, the reward
    model's score, so V starts as the score of the unfinished response; net starts at zero. Without a start V = 0.
    """

    def __init__(self, size: int, start: nn.Linear | None):
        super().__init__()
        self.linear = nn.Linear(size, 1)
        nn.init.zeros_(self.linear.bias)
        if start is None:
            nn.init.zeros_(self.linear.weight)
        else:
            self.linear.weight.data.copy_(start.weight.float())
            if start.bias is not None:
                self.linear.bias.data.copy_(start.bias.float())
        self.net = nn.Sequential(nn.Linear(size, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    @torch.no_grad()
    def standardise(self, mean: float, deviation: float) -> None:
        """Follow the scores into their new unit, (score - mean) / deviation."""
        self.linear.weight /= deviation
        self.linear.bias.sub_(mean).div_(deviation)

    def forward(self, states: Tensor) -> Tensor:
        """(M,) float32 values of (M, hidden_size) states."""
        with full_precision(states):
            return (self.linear(states.float()) + self.net(states.float())).squeeze(-1)


class ProximalPolicy(Stage):
    """Maximise E[score(x, y)] - beta * KL(pi || ref) by clipped policy gradients; beta is pref_beta, or
    pref_beta * s(x) per prompt, with s from the frozen Beta Head of a dpo run.

    One step of the loop is an update: every prompt of the buffer is answered by the policy as it
    is, and `ppo_epochs` passes of optimiser steps are made over these responses. Values are
    read from the reward model's states by a head of their own, so policy and value share no weight.
    """

    task = "CAUSAL_LM"
    shown = ("reward", "kl_per_sequence", "response_length")

    @classmethod
    def load_base(cls, config: RunConfig):
        return load_causal_lm(config)

    @classmethod
    def head_starts(cls, model: nn.Module, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    @classmethod
    def fresh_heads(
        cls, config: RunConfig, model: nn.Module, columns: dict[str, Tensor], given: dict[str, Any]
    ) -> Heads:
        """The Beta Head of the dpo run in place of a fresh one."""
        heads = super().fresh_heads(config, model, columns, given)
        if "beta_head" in given:
            heads.beta = given["beta_head"].beta
        return heads

    def take(self, given: dict[str, Any]) -> None:
        """The reward model, beside the reference; and the value head, which starts from it."""
        config = self.config
        judge: RewardModel
        judge, *others = given["reward_model"]
        self.tokenizer = load_tokenizer(config)
        self.reference = load_reference(config)
        known: dict[str, str] = {}
        for model, name in zip((judge, *others), config.reward_models, strict=True):
            if (same := known.setdefault(model.fingerprint, name)) != name:
                raise UserError(f"reward_model: {same} and {name} are one model and say what one says: leave one out")
        self.reward_fingerprint = identity.one_of([model.fingerprint for model in (judge, *others)])
        if others and any(is_needed(self.tokenizer, model.tokenizer) for model in (judge, *others)):
            raise UserError(
                f"reward_model: one of {config.reward_model} has another tokenizer than {config.model_name_or_path}; "
                "several reward models must all read what the policy writes as it is"
            )
        self.reward, self.other_rewards = judge.stage, nn.ModuleList(other.stage for other in others)
        self.translation = judge.translation(config, self.reference, self.tokenizer)
        start = score_layer(judge.model) if self.translation is None else None
        size = width(self.reference) if start is None else start.in_features
        with seeds.global_stream(config.seed, "value head"):
            self.value_head = ValueHead(size, start)
        self.kl_coefficient, self.score_scale = config.pref_beta, None if config.ppo_score_norm else (0.0, 1.0)
        self.unit_of_each: list[tuple[float, float]] | None = None  # mean and deviation of each model's scores
        switch_off_dropout(self)  # the ratio compares two passes of one network, not two of its subnetworks
        self.freeze_unused()
        share_frozen_weights(self)

    def check_data(self, data: TokenisedData) -> None:
        check_answers(self.model, data, self.config, self.tokenizer)
        obeys_masks(self.reference)  # as of the others, by `check_rows`
        rows, tokenizer = data.train, self.tokenizer
        if self.translation is not None:
            rows, tokenizer = Rows(list(self.translation.prompts.values())), self.translation.judge
        for reward, named in zip((self.reward, *self.other_rewards), self.config.reward_models, strict=True):
            check_rows(reward.model, {"train": rows}, self.config, name=f"reward_model {named}", tokenizer=tokenizer)
            check_context(reward.model, int(rows.prompt_ids.lengths.max()), self.config.max_new_tokens)

    def parameter_groups(self) -> dict[str, Group]:
        """The Beta Head is in none: the penalty's gradient would only ask for a smaller s."""
        groups = {"model": model_group(self.model_parameters(), self.config)}
        if hasattr(self, "value_head"):  # else it is a finished run: there is a policy, and nothing is trained
            rate = self.config.rate("value_learning_rate")
            groups["value"] = head_group(self.value_head.parameters(), rate, self.config)
        return groups

    def facts(self) -> dict[str, str]:
        return {**self.hashes_of_inputs(self.config), "reward_model": self.reward_fingerprint}

    def state(self) -> dict:
        kept = {"kl_coefficient": self.kl_coefficient, "score_scale": self.score_scale}
        return kept | {"unit_of_each": self.unit_of_each}

    def restore(self, state: dict) -> None:
        self.kl_coefficient, self.score_scale = state["kl_coefficient"], state["score_scale"]
        self.unit_of_each = state["unit_of_each"]

    # --- what is trained on

    def collect(self, step: int, train: Pairs, schedule: Schedule, accelerator: Accelerator) -> Work:
        """Answer the step's prompts, judge the answers, and say in which order they are trained on.

        Each process answers its share; then all of them hold all answers, so that nothing that is
        computed from the whole buffer depends on how many processes there are.
        """
        self.eval()
        if self.score_scale is None:
            units = self.units_of_scores(train.rows) if accelerator.is_main_process else None
            self.score_scale, self.unit_of_each = broadcast_object_list([units])[0]
            if self.translation is None:  # otherwise V starts at 0, the mean of the scaled scores
                self.value_head.standardise(*self.unit_of_each[0])
        config, rows = self.config, schedule.step_rows(step)
        prompts = [train.rows.prompt_ids[row] for row in rows]
        uniforms = seeds.uniforms(config.seed, "rollouts", step, shape=(len(rows), config.max_new_tokens))
        shares = np.array_split(np.arange(len(rows)), accelerator.num_processes)
        mine = shares[accelerator.process_index]
        responses = self.respond(self.model, [prompts[i] for i in mine], uniforms[mine])
        judged = self.judge([prompts[i] for i in mine], responses)
        self.train()
        parts = gather_object([(responses, judged)]) if accelerator.num_processes > 1 else [(responses, judged)]
        responses = [ids for part, _ in parts for ids in part]
        judged = {name: _all_of([part[name] for _, part in parts]) for name in judged}
        rollouts, statistics = self.advantages(prompts, responses, judged)
        if config.ppo_target:
            error = statistics["kl_per_sequence"].mean().item() / config.ppo_target - 1
            self.kl_coefficient *= 1 + KL_GAIN * max(-KL_LARGEST_ERROR, min(error, KL_LARGEST_ERROR))
        minibatches = [
            minibatch
            for epoch in range(config.ppo_epochs)
            for minibatch in _minibatches(rollouts.lengths, schedule, config, step, epoch, accelerator.process_index)
        ]
        size = len(rows) // config.ppo_buffer_size
        return Work(rollouts, minibatches, size, len(rows), int(rollouts.lengths.sum()), statistics)

    def respond(self, model: nn.Module, prompts: list[np.ndarray], uniforms: np.ndarray) -> list[np.ndarray]:
        config = self.config
        with self.autocast():
            return generate(
                model, self.tokenizer, prompts, uniforms,
                temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
                batch_size=8 * config.per_device_eval_batch_size,
            )  # fmt: skip

    def judge(self, prompts: list[np.ndarray], responses: list[np.ndarray]) -> dict[str, Tensor | PerToken]:
        """What policy, reference, reward model and value head say, on the CPU, in the order of the responses.

        Per token of the response: `logps`, `entropy`, `reference_logps`, `values`, and `states`, the
        reward model's (hidden_size,), or, where that reads other tokens, the reference's. Per response: `scores`, a
        number or one of each reward model, `sigma` where it is asked for, and `log_s` where the coefficient is scaled.
        """
        rows, temperature, device = Responses(prompts, responses), self.config.temperature, self.device
        sizes, name = rows.sizes, f"reward_model {self.config.reward_model}"

        def of_batch(indices: np.ndarray) -> dict[str, Tensor | PerToken]:
            batch = rows.batch(indices).to(device)
            with self.autocast():
                policy, reference = (hidden_states(model, batch) for model in (self.model, self.reference))
                logps, entropy = token_logps(self.model, policy, batch, temperature, with_entropy=True)
                reference_logps, _ = token_logps(self.reference, reference, batch, temperature)
                log_s = self.signals.log_scale(state_at(reference, batch.prompt_end))
            if self.translation is None:
                check_ids(self.reward.model, [responses[i] for i in indices], name)
                reward = self.reward.hidden(batch)
                scores, log_sigma = self.reward.rewards_of(reward, batch)
            else:
                translated = self.translation([prompts[i] for i in indices], [responses[i] for i in indices])
                check_ids(self.reward.model, [*translated[0], *translated[1]], name)
                scores, log_sigma = self.reward.rewards(pack(*translated).to(device))
                reward = reference
            states = state_at(reward, batch.predictor_index)
            per_token = {
                "logps": logps, "entropy": entropy, "reference_logps": reference_logps,
                "states": states, "values": self.value_head(states),
            }  # fmt: skip
            per_response = {"scores": scores} if log_s is None else {"scores": scores, "log_s": log_s}
            if self.other_rewards:
                others = [other.rewards(batch)[0] for other in self.other_rewards]
                per_response["scores"] = torch.stack([scores, *others], 1)
            elif self.config.uncertainty_penalty:
                per_response["sigma"] = SIGMA0 * log_sigma.exp()
            return per_response | {name: PerToken(values, sizes[indices]) for name, values in per_token.items()}

        return in_batches(
            rows.lengths, self.config.per_device_eval_batch_size, of_batch,
            step="judging responses", tokens_per_pass=self.config.tokens_per_pass,
            lower="per_device_eval_batch_size, tokens_per_pass or max_new_tokens",
        )  # fmt: skip

    def log_s_of(self, reference: nn.Module, prompts: list[np.ndarray]) -> Tensor | None:
        """(N,) log s of prompts, on the CPU; None where the coefficient is one number."""
        rows = Responses([ids[:-1] for ids in prompts], [ids[-1:] for ids in prompts])

        def of_batch(indices: np.ndarray) -> dict[str, Tensor]:
            batch = rows.batch(indices).to(self.device)
            with self.autocast():
                log_s = self.signals.log_scale(state_at(hidden_states(reference, batch), batch.response_end))
            return {} if log_s is None else {"log_s": log_s}

        size, tokens = self.config.per_device_eval_batch_size, self.config.tokens_per_pass
        found = in_batches(rows.lengths, size, of_batch, step="evaluation", tokens_per_pass=tokens)
        return found.get("log_s")

    def judged_rewards(
        self, judged: dict[str, Tensor | PerToken], units: list[tuple[float, float]] | None
    ) -> tuple[Tensor, Tensor]:
        """(N,) rewards, and (N,) how uncertain each is: sigma, or the variance over several models; 0 if not asked for.

        Of several reward models the reward is the mean of their scores, each standardised by its own of `units`.
        """
        scores = judged["scores"]
        if scores.ndim > 1:
            mean, deviation = torch.tensor(units, dtype=torch.float64).T
            scores = ((scores.double() - mean) / deviation).float()
            return scores.mean(1), scores.var(1, correction=0)
        return scores, judged.get("sigma", torch.zeros_like(scores))

    def units_of_scores(self, rows: Rows) -> tuple[tuple[float, float], list[tuple[float, float]]]:
        """Mean and standard deviation of scores of the reference's responses to a random sample of prompts: of what is
        maximised, and of each reward model alone. With one model and no penalty these are the same."""
        config = self.config
        order = np.random.default_rng(seeds.derive(config.seed, "score scale")).permutation(len(rows))
        prompts = [rows.prompt_ids[i] for i in np.resize(order, SCORED_FOR_SCALE)]
        uniforms = seeds.uniforms(config.seed, "score scale", "responses", shape=(len(prompts), config.max_new_tokens))
        responses = self.respond(self.reference, prompts, uniforms)
        judged = self.judge(prompts, responses)
        raw = self.check_finite(judged["scores"], prompts, responses)
        of_each = raw.reshape(len(raw), -1).T
        units = [_unit(scores, name) for scores, name in zip(of_each, config.reward_models, strict=True)]
        scores = losses.pessimistic_scores(*self.judged_rewards(judged, units), config.uncertainty_penalty)
        return _unit(scores, config.reward_model), units

    def check_finite(self, scores: Tensor, prompts: list[np.ndarray], responses: list[np.ndarray]) -> Tensor:
        finite = scores.isfinite().reshape(len(scores), -1).all(1)
        if len(bad := (~finite).nonzero().flatten().tolist()):
            prompt, response = (self.tokenizer.decode(ids[bad[0]])[-60:] for ids in (prompts, responses))
            raise UserError(
                f"reward_model: {self.config.reward_model} gives {len(bad)} of {len(scores)} responses a score that "
                f"is no finite number, the first one ({scores[bad[0]].tolist()}) to {response!r} after {prompt!r}"
            )
        return scores

    def advantages(
        self, prompts: list[np.ndarray], responses: list[np.ndarray], judged: dict[str, Tensor | PerToken]
    ) -> tuple[Rollouts, dict[str, Tensor]]:
        """The buffer to train on, and what is logged of it: (N,) per response, (M,) per token or a number."""
        config = self.config
        raw, uncertainty = self.judged_rewards(judged, self.unit_of_each)
        judgement = losses.pessimistic_scores(raw, uncertainty, config.uncertainty_penalty)
        self.check_finite(judgement, prompts, responses)
        sizes = judged["logps"].sizes
        lengths = torch.from_numpy(sizes)
        stops = stop_ids(self.model, self.tokenizer)
        ended = torch.tensor([has_ended(ids, stops) for ids in responses])
        mask = torch.arange(lengths.max())[None, :] < lengths[:, None]  # (N, T) where there is a token
        logps, reference_logps, values = (
            torch.zeros(mask.shape).masked_scatter(mask, judged[name].values)
            for name in ("logps", "reference_logps", "values")
        )
        log_s = judged.get("log_s")
        mean, deviation = self.score_scale
        scores = (judgement - mean) / deviation - config.missing_eos_penalty * ~ended
        kl, coefficient = logps - reference_logps, scaled(self.kl_coefficient, log_s)
        rewards = losses.token_rewards(scores, kl, coefficient, mask)
        totals = rewards.sum(1)
        if config.ppo_whiten_rewards:
            rewards = losses.whiten(rewards, mask, keep_mean=True)
        advantages = losses.generalised_advantages(rewards, values, mask, config.gamma, config.lam)
        returns = advantages + values
        unexplained = (returns - values)[mask].var(correction=0) / returns[mask].var(correction=0).clamp_min(1e-8)
        columns = {
            "logps": logps, "values": values, "returns": returns, "advantages": losses.whiten(advantages, mask),
        }  # fmt: skip
        statistics = {
            "reward": raw,
            "penalised_reward": totals,
            "kl_per_sequence": kl.sum(1),
            "kl_per_token": kl[mask],
            "entropy": judged["entropy"].values,
            "beta_eff": coefficient if log_s is not None else torch.full_like(raw, coefficient),
            "explained_variance": 1 - unexplained,
            "response_length": lengths,
            "eos_rate": ended,
        }
        if log_s is not None:
            s = log_s.exp()
            statistics |= {"log_s": log_s, "s": s, "s_sd": s.std(correction=0), "s_min": s.min(), "s_max": s.max()}
        if self.other_rewards or config.uncertainty_penalty:
            statistics["uncertainty"] = uncertainty
        of_tokens = {name: PerToken(values[mask], sizes) for name, values in columns.items()}
        return Rollouts(prompts, responses, of_tokens | {"states": judged["states"]}), statistics

    # --- the loss

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(N,) objective of N responses, whose mean is the mean over tokens, and what is logged of it."""
        config, old = self.config, batch.columns
        with self.autocast():
            hidden = hidden_states(self.model, batch)
            logps, _ = token_logps(self.model, hidden, batch, config.temperature)
        values = self.value_head(old["states"])
        policy_loss = losses.clipped_policy_loss(logps, old["logps"], old["advantages"], config.cliprange)
        value_loss = losses.clipped_value_loss(values, old["values"], old["returns"], config.cliprange_value)
        log_ratio = logps.detach() - old["logps"]
        per_token = {
            "loss": policy_loss + value_loss,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "clip_fraction": ((log_ratio.exp() - 1).abs() > config.cliprange).float(),
            "approximate_kl": log_ratio.exp() - 1 - log_ratio,
        }
        per_response = {
            name: per_sequence(values, batch) / old["tokens_per_response"] for name, values in per_token.items()
        }
        return per_response["loss"], {name: values.detach() for name, values in per_response.items()}


def _unit(scores: Tensor, name: str) -> tuple[float, float]:
    """Mean and standard deviation of the scores of the reference's responses by the reward model `name`."""
    mean, deviation = scores.double().mean().item(), scores.double().std().item()
    if deviation < 1e-6:
        raise UserError(
            f"ppo_score_norm: reward_model {name} gives all responses of the reference the same score ({mean:.4g})"
        )
    return mean, deviation


def _all_of(parts: list[Tensor] | list[PerToken]) -> Tensor | PerToken:
    """What several processes say, the rows of one after those of another."""
    return joined(parts) if isinstance(parts[0], PerToken) else torch.cat(parts)


def _minibatches(
    lengths: np.ndarray, schedule: Schedule, config: RunConfig, step: int, epoch: int, process: int
) -> list[list[np.ndarray]]:
    """One pass over the buffer in random order: per optimiser step, the forward passes of one process."""
    order = np.random.default_rng(seeds.derive(config.seed, "minibatches", step, epoch)).permutation(len(lengths))
    minibatches = []
    for part in np.split(order, config.ppo_buffer_size):
        minibatches.append(cut(schedule.share(part, lengths, process), lengths, config.tokens_per_pass))
    return minibatches
