"""Losses against numbers derived by hand: values, slopes and curvatures at zero, tails, shapes."""

import math
import subprocess
import sys

import pytest
import torch

from discobeta.losses import earlier_probit_loss, logistic_loss, probit_loss

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
