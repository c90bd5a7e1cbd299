"""Losses against numbers derived by hand: values, slopes and curvatures at zero, tails, shapes."""

import math
import subprocess
import sys

import pytest
import torch

from discobeta.losses import (
    conservative_logistic_loss,
    earlier_probit_loss,
    flipped_label_nll,
    ipo_loss,
    logistic_loss,
    pessimistic_scores,
    probit_loss,
    robust_logistic_loss,
)

pytestmark = pytest.mark.numeric


def slope_and_curvature(loss, at=0.0):
    x = torch.tensor([at], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    return slope.item(), curvature.item()


def test_logistic_loss_has_the_textbook_values():
    # -log sigmoid(0) = log 2; -log sigmoid(log 3) = log(4/3); -log sigmoid(-log 3) = log 4
    margin = torch.tensor([0.0, math.log(3), -math.log(3)])
    expected = torch.tensor([math.log(2), math.log(4 / 3), math.log(4)])
    torch.testing.assert_close(logistic_loss(margin, 1.0), expected)
    torch.testing.assert_close(logistic_loss(margin / 0.1, 0.1), expected)


def test_probit_loss_has_the_tabulated_values():
    # Phi(0) = 1/2, Phi(1) = 0.841344746, Phi(-2) = 0.022750132
    margin, variance = torch.tensor([0.0, 3.0, -4.0]), torch.tensor([1.0, 9.0, 4.0])
    expected = -torch.log(torch.tensor([0.5, 0.841344746, 0.022750132]))
    torch.testing.assert_close(probit_loss(margin, variance), expected)


def test_fresh_disco_has_the_logistic_slope_and_curvature():
    """At variance 8/pi: slope -phi(0)/Phi(0)/sqrt(8/pi) = -1/2, curvature (phi/Phi)^2 pi/8 = 1/4."""
    variance = torch.tensor([8 / math.pi])
    slope, curvature = slope_and_curvature(lambda x: probit_loss(x, variance))
    assert slope == pytest.approx(-0.5, abs=1e-6) and curvature == pytest.approx(0.25, abs=1e-6)
    slope, curvature = slope_and_curvature(lambda x: logistic_loss(x, 1.0))
    assert slope == pytest.approx(-0.5, abs=1e-6) and curvature == pytest.approx(0.25, abs=1e-6)


def test_the_fresh_head_has_that_variance():
    from discobeta.method.heads import SIGMA0

    assert pytest.approx(8 / math.pi) == 2 * SIGMA0**2


def test_earlier_scale_had_a_smaller_slope():
    slope, _ = slope_and_curvature(lambda x: earlier_probit_loss(x, 1.0))
    assert slope / -0.5 == pytest.approx(0.677, abs=1e-3)  # 0.6 / sqrt(pi) / 0.5


def test_probit_tail_is_finite_where_the_naive_formula_is_not():
    margin = torch.tensor([-30.0], requires_grad=True)
    loss = probit_loss(margin, torch.ones(1))
    # -log Phi(-z) ~ z^2/2 + log(z sqrt(2 pi)) + 1/z^2 for large z
    assert loss.item() == pytest.approx(450 + math.log(30 * math.sqrt(2 * math.pi)) + 1 / 900, rel=1e-5)
    loss.sum().backward()
    assert margin.grad.item() == pytest.approx(-30 - 1 / 30, rel=1e-3)  # grows linearly: hence clipping
    assert torch.isinf(torch.log(0.5 * (1 + torch.erf(torch.tensor(-6.0) / math.sqrt(2)))))


def test_ipo_is_the_squared_distance_to_the_margin_that_beta_names():
    """beta = 1/4: a pair is drawn to a margin of 2, so 3, 2, 0 and -1 cost 1, 0, 4 and 9; slope -1/beta at 0."""
    margin = torch.tensor([3.0, 2.0, 0.0, -1.0])
    torch.testing.assert_close(ipo_loss(margin, 0.25), torch.tensor([1.0, 0.0, 4.0, 9.0]))
    assert slope_and_curvature(lambda x: ipo_loss(x, 0.25)) == pytest.approx((-4.0, 2.0))


def test_smoothed_losses_have_values_by_hand():
    """beta * margin = log 3, whose losses are log(4/3) and, turned round, log 4; a tenth of the labels is flipped."""
    margin = torch.tensor([math.log(3) / 0.5])
    conservative = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    robust = (0.9 * math.log(4 / 3) - 0.1 * math.log(4)) / 0.8
    assert conservative_logistic_loss(margin, 0.5, 0.1).item() == pytest.approx(conservative, rel=1e-6)
    assert robust_logistic_loss(margin, 0.5, 0.1).item() == pytest.approx(robust, rel=1e-6)


def test_the_robust_loss_of_flipped_labels_is_on_average_that_of_the_true_ones():
    margin = torch.linspace(-3, 3, 13)
    for flips in (0.1, 0.3, 0.45):
        mean = (1 - flips) * robust_logistic_loss(margin, 0.7, flips) + flips * robust_logistic_loss(
            -margin, 0.7, flips
        )
        expected = torch.log1p(torch.exp(-0.7 * margin))
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)


def test_a_flipped_labels_nll_has_values_by_hand_and_a_floor():
    """sigmoid(log 3) = 3/4: .9 * 3/4 + .1 * 1/4 = .7, and .3 of the other label; never less likely than a flip."""
    margin = torch.tensor([math.log(3), -math.log(3), 200.0, -200.0]) / 0.5
    expected = [-math.log(0.7), -math.log(0.3), -math.log(0.9), -math.log(0.1)]
    assert flipped_label_nll(margin, 0.5, 0.1).tolist() == pytest.approx(expected, rel=1e-6)


def test_flipped_labels_draw_the_robust_loss_and_their_nll_to_the_same_margin():
    """Labels of P = .8 before a quarter is flipped, .8 * .75 + .2 * .25 = .65 after: both are least at log 4, with the
    curvatures .8 * .2 and ((1 - 2 / 4) * .8 * .2)^2 / (.65 * .35)."""
    for loss, expected in ((robust_logistic_loss, 0.16), (flipped_label_nll, 0.08**2 / 0.2275)):
        slope, curvature = slope_and_curvature(
            lambda x, loss=loss: 0.65 * loss(x, 1.0, 0.25) + 0.35 * loss(-x, 1.0, 0.25), at=math.log(4)
        )
        assert slope == pytest.approx(0, abs=1e-6) and curvature == pytest.approx(expected, rel=1e-5)


def test_the_conservative_loss_is_least_where_the_probability_is_that_of_an_unflipped_label():
    """sigmoid(margin) = .8 at margin log 4: no slope there, and curvature .8 * .2."""
    slope, curvature = slope_and_curvature(lambda x: conservative_logistic_loss(x, 1.0, 0.2), at=math.log(4))
    assert slope == pytest.approx(0, abs=1e-6) and curvature == pytest.approx(0.16, abs=1e-6)


def test_pessimistic_scores_are_lower_where_they_are_uncertain():
    mean, uncertainty = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    assert pessimistic_scores(mean, uncertainty, 0.5).tolist() == [0.75, 0.0]
    assert pessimistic_scores(mean, uncertainty, 0.0).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_are_float32_whatever_comes_in(dtype):
    margin = torch.tensor([0.5, -0.5], dtype=dtype)
    assert logistic_loss(margin, margin.abs()).dtype == torch.float32
    assert probit_loss(margin, margin.abs()).dtype == torch.float32


def test_a_constant_beta_per_pair_is_the_scalar_bit_for_bit():
    margin = torch.linspace(-3, 3, 50)
    assert torch.equal(logistic_loss(margin, torch.full((50,), 0.3)), logistic_loss(margin, 0.3))


@pytest.mark.parametrize("bad", [torch.ones(4, 1), torch.ones(3), torch.ones(1, 4)])
def test_shapes_that_would_broadcast_are_refused(bad):
    with pytest.raises(ValueError, match=r"must both be \(B,\)"):
        logistic_loss(torch.ones(4), bad)
    with pytest.raises(ValueError, match=r"must both be \(B,\)"):
        probit_loss(torch.ones(4), bad)


def test_swapping_chosen_and_rejected_gives_the_other_probability():
    margin, variance = torch.tensor([0.7, -1.3]), torch.tensor([1.0, 2.0])
    for loss in (lambda m: logistic_loss(m, 0.5), lambda m: probit_loss(m, variance)):
        torch.testing.assert_close((-loss(margin)).exp() + (-loss(-margin)).exp(), torch.ones(2))


def test_losses_import_torch_and_nothing_else_of_ours():
    code = (
        "import sys, discobeta.losses; "
        "print([m for m in sys.modules if m.startswith(('transformers', 'peft', 'accelerate', 'discobeta.'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['discobeta.losses']"
