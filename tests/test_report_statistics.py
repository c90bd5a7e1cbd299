"""Intervals over seeds, against hand-derived numbers and tabulated quantiles."""

import math

import pytest

from discobeta.report.statistics import mean_ci, student_t, wilson


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
