"""Intervals over seeds, against hand-derived numbers and tabulated quantiles."""

import itertools
import math
from math import comb

import numpy as np
import pytest

from discobeta.report.statistics import (
    bootstrap,
    detectable,
    equivalence_p,
    holm,
    mean_ci,
    sign_flip_p,
    student_t,
    wilson,
)


def test_two_seeds_have_the_quantile_of_one_degree_of_freedom():
    # s = 0.02 / sqrt(2), so s / sqrt(2) = 0.01; t(0.975, 1) = 12.706
    mean, half_width = mean_ci([0.70, 0.72])
    assert mean == pytest.approx(0.71)
    assert half_width == pytest.approx(0.12706, abs=1e-5)


def test_three_seeds_have_the_quantile_of_two_degrees_of_freedom():
    # s = 1; t(0.975, 2) = 4.303
    assert mean_ci([1, 2, 3]) == (2, pytest.approx(4.3027 / math.sqrt(3), abs=1e-4))


@pytest.mark.parametrize(
    ("degrees", "tabulated"), [(1, 12.7062), (4, 2.7764), (11, 2.2010), (30, 2.0423), (120, 1.9799)]
)
def test_quantiles_are_the_tabulated_ones(degrees, tabulated):
    assert student_t(0.95, degrees) == pytest.approx(tabulated, abs=6e-5)


def test_another_level_has_another_quantile():
    assert mean_ci([1, 2, 3], level=0.90)[1] == pytest.approx(2.920 / math.sqrt(3), abs=1e-3)


def test_one_seed_has_no_interval_and_no_seed_no_mean():
    assert mean_ci([0.7])[0] == 0.7
    assert math.isnan(mean_ci([0.7])[1])
    assert all(map(math.isnan, mean_ci([])))


def test_equal_seeds_have_no_width():
    assert mean_ci([0.1, 0.1, 0.1]) == (pytest.approx(0.1), pytest.approx(0, abs=1e-15))


def test_wilson_interval_of_no_success_ends_at_z2_over_n_plus_z2():
    # 3.8415 / 13.8415
    assert wilson(0, 10) == (pytest.approx(0, abs=1e-12), pytest.approx(0.27753, abs=1e-5))
    assert wilson(10, 10) == (pytest.approx(1 - 0.27753, abs=1e-5), pytest.approx(1, abs=1e-12))


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0], 1),
        ([1.0, 2.0], 2 / 4),
        ([1.0, 2.0, 3.0], 2 / 8),
        ([-1.0, -2.0, -3.0, -0.5, -0.25], 2 / 32),
        ([0.1] * 6, 2 / 64),  # the first number of seeds that can be below 0.05
        ([3.0, -1.0, 1.0], 6 / 8),  # |sum| is 3; 5, 3, 3, 1 and their negatives are possible
        ([0.0, 0.0, 0.0], 1),
        ([0.3, -0.1, -0.2], 1),  # the sum is zero but for rounding
    ],
)
def test_sign_flips_are_counted_exactly(differences, p):
    assert sign_flip_p(differences) == p
    assert sign_flip_p([-d for d in differences]) == p


def test_sign_flips_of_unequal_numbers_are_all_tried():
    differences = np.random.default_rng(3).normal(0.4, 1, size=9)
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product([1, -1], repeat=9)]
    assert sign_flip_p(differences) == np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)


def test_a_sum_of_nothing_is_reached_by_every_choice_of_signs():
    """In floats .01 + .02 + .03 - .06 + .05 - .05 is 1e-17 and not 0, which no smaller sum may be told from."""
    assert sign_flip_p([0.01, 0.02, 0.03, -0.06, 0.05, -0.05]) == 1


def test_sign_flips_of_many_numbers_are_drawn():
    """16 of 21 equal differences are positive: twice the binomial tail. 5 standard errors of 2^20 draws."""
    p = 2 * sum(comb(21, k) for k in range(6)) / 2**21
    assert sign_flip_p([1.0] * 16 + [-1.0] * 5) == pytest.approx(p, abs=5 * math.sqrt(p / 2**20))
    assert sign_flip_p([1.0] * 40) == pytest.approx(1 / (2**20 + 1))  # 2^-39; no draw can be as extreme


def test_no_difference_has_no_p():
    assert math.isnan(sign_flip_p([]))


def test_holm_multiplies_the_smallest_by_all_and_the_largest_by_one():
    # 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1 is raised to what the one before it has
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.5]) == [1, 1]
    with_a_gap = holm([0.01, math.nan, 0.02])
    assert with_a_gap[::2] == pytest.approx([0.02, 0.02])
    assert math.isnan(with_a_gap[1])


def test_bootstrap_of_many_is_the_normal_interval_and_of_few_there_is_none():
    values = np.random.default_rng(5).normal(3, 2, size=400)
    half_width = 1.96 * values.std() / math.sqrt(400)
    # 10,000 resamples place a 2.5 % quantile within 4 % of the half-width (5 standard errors)
    low, high = bootstrap(values.tolist())
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.06 * half_width)
    assert all(map(math.isnan, bootstrap([1, 2, 3, 4, 5])))
    assert bootstrap([1.0] * 6) == (1, 1)


# --- with a direction, equivalence, and what can be found


@pytest.mark.parametrize(
    ("differences", "greater", "less"),
    [
        ([1.0, 2.0, 3.0], 1 / 8, 8 / 8),
        ([-1.0, -2.0, -3.0], 8 / 8, 1 / 8),
        ([3.0, -1.0, 1.0], 3 / 8, 7 / 8),  # the sum is 3, of 5, 3, 3, 1 and their negatives
        ([0.0, 0.0], 1, 1),
        ([0.1] * 5, 1 / 32, 1),
    ],
)
def test_a_direction_counts_the_sums_on_its_side(differences, greater, less):
    assert sign_flip_p(differences, "greater") == greater
    assert sign_flip_p(differences, "less") == less


def test_a_direction_agrees_with_trying_all_signs():
    rng = np.random.default_rng(5)
    for n in (3, 7, 10):
        differences = rng.normal(0.3, 1, n)
        sums = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=n)]
        share = np.mean(np.array(sums) >= sum(differences) - 1e-12)
        assert sign_flip_p(differences.tolist(), "greater") == pytest.approx(share)
        assert sign_flip_p((-differences).tolist(), "less") == pytest.approx(share)


def test_many_differences_are_drawn_with_a_direction_too():
    """All of 24 agree: no draw of 2^20 is likely to, so p is that of the observed one alone."""
    assert sign_flip_p([0.1] * 24, "greater") <= 3 / 2**20
    assert sign_flip_p([0.1] * 24, "less") == 1


def test_equivalence_excludes_both_sides():
    """Six that lie within ±3 by far: each test is at its least. One at -4: d + 3 is 3, 3, 3, 3, 3, -1, whose sum is 14,
    and 16 with the last one turned; all other sums are less. All beyond 3: the sum is the greatest of all."""
    assert equivalence_p([0.5, -0.5, 0.2, 0.1, -0.1, 0.3], 3) == 1 / 64
    assert equivalence_p([0, 0, 0, 0, 0, -4], 3) == 2 / 64
    assert equivalence_p([0, 0, 0, 0, 0, 4], 3) == 2 / 64
    assert equivalence_p([5.5] * 6, 3) == 1


def test_the_size_of_equivalence_is_nominal_where_the_truth_is_the_margin():
    """Rejections of a mean of exactly ±margin, with sd .3 of it: 5 % within three standard errors, and never more."""
    rng = np.random.default_rng(11)
    for edge in (1, -1):
        rejected = np.mean([equivalence_p(rng.normal(edge, 0.3, 10).tolist(), 1) <= 0.05 for _ in range(2000)])
        assert abs(rejected - 51 / 1024) < 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_what_can_be_found_has_a_closed_form_where_all_must_agree():
    """At alpha = 2^-n the test rejects where all differences are positive: Φ(δ)^n = .8; within a margin, |z| < m."""
    # Φ(1.7099) = .8^(1/5) = .95635, and Φ(2.0174) = (1 + .95635) / 2
    assert detectable(5, 1 / 32) == pytest.approx(1.7099, rel=0.02)
    assert detectable(5, 1 / 32, margin=True) == pytest.approx(2.0174, rel=0.02)


@pytest.mark.parametrize(("n", "alpha"), [(12, 0.0125), (16, 0.05)])
def test_what_can_be_found_is_found_with_its_power(n, alpha):
    rng = np.random.default_rng(17)
    effect, margin = detectable(n, alpha), detectable(n, alpha, margin=True)
    found = np.mean([sign_flip_p(rng.normal(effect, 1, n).tolist(), "greater") <= alpha for _ in range(1000)])
    shown = np.mean([equivalence_p(rng.normal(0, 1, n).tolist(), margin) <= alpha for _ in range(1000)])
    assert abs(found - 0.8) < 0.05 and abs(shown - 0.8) < 0.05  # four standard errors, and its own error


def test_nothing_can_be_found_of_too_few():
    assert detectable(5, 0.03) == math.inf  # 2^-5 = .03125
    assert math.isfinite(detectable(5, 0.032))
