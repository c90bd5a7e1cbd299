"""PPO's arithmetic against hand-derived numbers and against definitions written out with loops."""

import math

import numpy as np
import pytest
import torch

from discobeta.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    generalised_advantages,
    token_rewards,
    whiten,
)

pytestmark = pytest.mark.numeric

MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])


def test_the_score_comes_at_the_last_token_and_the_penalty_at_each():
    kl = torch.tensor([[0.1, 0.2, -0.4], [1.0, 9.0, 9.0], [0.5, 0.0, 9.0]])  # 9: beyond the end, to be ignored
    scores = torch.tensor([2.0, -1.0, 0.5])
    expected = [[-0.05, -0.1, 0.2 + 2.0], [-0.5 - 1.0, 0, 0], [-0.25, 0.5, 0]]
    torch.testing.assert_close(token_rewards(scores, kl, 0.5, MASK), torch.tensor(expected))
    per_prompt = token_rewards(scores, kl, torch.tensor([0.5, 0.1, 2.0]), MASK)
    expected = [[-0.05, -0.1, 2.2], [-0.1 - 1.0, 0, 0], [-1.0, 0.5, 0]]
    torch.testing.assert_close(per_prompt, torch.tensor(expected))


def test_a_constant_coefficient_per_prompt_is_the_scalar_bit_for_bit():
    kl, scores = torch.randn(3, 3), torch.randn(3)
    scalar = token_rewards(scores, kl, 0.2, MASK)
    assert torch.equal(scalar, token_rewards(scores, kl, 0.2 * torch.zeros(3).exp(), MASK))


def test_a_coefficient_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"must be \(N,\)"):
        token_rewards(torch.zeros(3), torch.zeros(3, 3), torch.ones(3, 1), MASK)


def test_advantages_by_hand():
    # gamma 1, lambda 1/2. First row: delta = (.5 - .5, .5 - .5, 1 - .5), A = (.125, .25, .5).
    # Second row: one token, delta = 3 - 1. Third row: delta = (1 + 2 - 0, 0 - 2), A = (3 - 1, -2).
    rewards = torch.tensor([[0.0, 0.0, 1.0], [3.0, 7.0, 7.0], [1.0, 0.0, 7.0]])
    values = torch.tensor([[0.5, 0.5, 0.5], [1.0, 7.0, 7.0], [0.0, 2.0, 7.0]])
    expected = [[0.125, 0.25, 0.5], [2.0, 0, 0], [2.0, -2.0, 0]]
    torch.testing.assert_close(generalised_advantages(rewards, values, MASK, 1.0, 0.5), torch.tensor(expected))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_advantages_are_the_defining_sum(gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_(t+k), written out for each token of each response."""
    random = np.random.default_rng(0)
    lengths = [1, 4, 9, 6]
    rewards, values = random.normal(size=(2, 4, 9))
    found = generalised_advantages(
        torch.tensor(rewards), torch.tensor(values), torch.arange(9) < torch.tensor(lengths)[:, None], gamma, lam
    )
    for row, length in enumerate(lengths):
        r, v = rewards[row, :length], [*values[row, :length], 0.0]
        for t in range(9):
            deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(t, length)]
            expected = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas))
            assert found[row, t].item() == pytest.approx(expected, abs=1e-5)


def test_lambda_one_is_the_return_minus_the_value():
    rewards, values = torch.randn(3, 3) * MASK, torch.randn(3, 3)
    found = generalised_advantages(rewards, values, MASK, 1.0, 1.0)
    returns = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(found, (returns - values) * MASK)


def test_the_clipped_policy_loss_by_hand():
    # ratio 1.5 and .5 with c = .2, for a good token (A = 1) and a bad one (A = -1), and ratio 1 with A = 3
    old = torch.zeros(5)
    new = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0]).log().requires_grad_()
    loss = clipped_policy_loss(new, old, torch.tensor([1.0, -1.0, 1.0, -1.0, 3.0]), 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, 1.5, -0.5, 0.8, -3.0]))
    loss.sum().backward()
    # d(-A ratio)/d log pi = -A ratio, and nothing where the clip holds
    torch.testing.assert_close(new.grad, torch.tensor([0.0, 1.5, -0.5, 0.0, -3.0]))


def test_the_clipped_value_loss_by_hand():
    # V_old = 1, R = 2, c = .2: V = 1.1 is within the clip: .9^2 / 2; V = 1.9 counts as 1.2: .8^2 / 2, no gradient;
    # V = .5 counts as .8 or as itself, whichever is worse: 1.5^2 / 2
    values = torch.tensor([1.1, 1.9, 0.5], requires_grad=True)
    loss = clipped_value_loss(values, torch.ones(3), torch.full((3,), 2.0), 0.2)
    torch.testing.assert_close(loss, torch.tensor([0.405, 0.32, 1.125]))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([-0.9, 0.0, -1.5]))


def test_whitening_by_hand():
    # 1, 2, 3, 4, 5, 6 have mean 3.5 and sample variance 3.5
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, 99.0], [5.0, 6.0, 99.0]])
    white = whiten(values, MASK)
    expected = torch.tensor([[-2.5, -1.5, -0.5], [0.5, 0, 0], [1.5, 2.5, 0]]) / math.sqrt(3.5)
    torch.testing.assert_close(white, expected)
    torch.testing.assert_close(whiten(values, MASK, keep_mean=True), expected + 3.5 * MASK)
    assert torch.equal(whiten(torch.full((3, 3), 2.0), MASK), torch.zeros(3, 3))  # and no division by zero
    assert whiten(torch.tensor([[2.0]]), torch.tensor([[True]])).item() == 0.0
