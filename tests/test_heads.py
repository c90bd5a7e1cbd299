"""What the heads compute, how they start, and that they come back bit for bit."""

import json
import math

import pytest
import torch

from discobeta.errors import UserError
from discobeta.method.heads import BetaHead, DiscoHead, bounded, build, load, save

pytestmark = pytest.mark.numeric

BOTH = ("disco", "beta")


def test_bounded_is_the_identity_near_zero_and_stays_within_log_3():
    x = torch.tensor([0.0, 1e-3, 100.0, -100.0])
    torch.testing.assert_close(bounded(x), torch.tensor([0.0, 1e-3, math.log(3), -math.log(3)]), rtol=1e-5, atol=1e-9)


def test_fresh_heads_say_sigma0_and_one():
    heads = build(BOTH, 16, seed=1, prompt_features=torch.randn(50, 16))
    states = torch.randn(5, 16)
    assert torch.equal(heads.disco.log_sigma(states), torch.zeros(5))
    assert torch.equal(heads.beta.log_s(states), torch.zeros(5))


def test_beta_head_standardises_by_the_training_prompts():
    """h = (3, 10) with mean (1, 10) and std (2, 0): z = (1, 0); w = (0.5, 7) gives k tanh(0.5/k)."""
    head = BetaHead(2)
    head.standardise_by(torch.tensor([[-1.0, 10.0], [3.0, 10.0]]))
    head.weight.data = torch.tensor([0.5, 7.0])
    k = math.log(3)
    assert head.log_s(torch.tensor([[3.0, 10.0]])).item() == pytest.approx(k * math.tanh(0.5 / k), rel=1e-5)


def test_s_of_a_prompt_unlike_the_trainings_stays_within_a_factor_of_three():
    """Prompts of random tokens were seen up to 137 standard deviations from the mean, with log s of 33 unbounded."""
    head = BetaHead(2)
    head.weight.data = torch.tensor([0.5, -0.2])
    s = head.log_s(torch.tensor([[137.0, 0.0], [0.0, 137.0], [1e6, 1e6]])).exp()
    assert s.tolist() == pytest.approx([3, 1 / 3, 3])


def test_the_mean_is_a_copy_of_the_score_and_not_the_score():
    score = torch.nn.Linear(4, 1, bias=False)
    head = DiscoHead(4, score.weight.detach())
    assert torch.equal(head.mean.weight, score.weight)
    head.mean.weight.data += 1
    assert not torch.equal(head.mean.weight, score.weight)


def test_building_a_head_leaves_every_other_stream_alone():
    def state_after(architecture):
        torch.manual_seed(5)
        heads = build(architecture, 8, seed=2)
        return heads, torch.random.get_rng_state()

    without, before = state_after([])
    both, after = state_after(BOTH)
    disco_only, _ = state_after(["disco"])
    assert torch.equal(before, after) and not list(without.parameters())
    for name, value in disco_only.state_dict().items():
        assert torch.equal(both.state_dict()[name], value)


def test_heads_compute_in_float32_under_autocast():
    heads = build(BOTH, 16, seed=1)
    torch.nn.init.normal_(heads.disco.net[-1].weight)
    torch.nn.init.normal_(heads.beta.weight)
    heads.disco.steps.fill_(1)
    states = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = heads.disco.log_sigma(states), heads.beta.log_s(states)
    assert torch.equal(inside[0], heads.disco.log_sigma(states)) and torch.equal(inside[1], heads.beta.log_s(states))


def alone(values):
    """The sum over all processes of one process."""
    return values


@pytest.fixture
def disco():
    """A Disco Head in training, with weights away from their start."""
    head = build(["disco"], 4, seed=3).disco
    torch.nn.init.normal_(head.net[-1].weight)
    return head


def test_the_mean_state_has_sigma0_whatever_the_weights(disco):
    """So no change of the weights raises sigma for all responses alike."""
    disco.log_sigma(torch.tensor([[1.0, 2, 3, 4], [3.0, 2, 1, 0]]))
    disco.end_step(alone)
    assert torch.equal(disco.state_mean, torch.full((4,), 2.0))
    said = disco.log_sigma(torch.tensor([[2.0, 2, 2, 2], [1.0, 2, 3, 4], [3.0, 2, 1, 0]]))
    assert said[0].item() == 0 and said[1].item() == pytest.approx(-said[2].item(), rel=1e-5) and said[1].abs() > 0.01


def test_the_running_mean_is_plain_at_first_and_exponential_then(disco):
    """Steps of mean 1, 2, ..., 12: 5.5 after ten; then 5.5 + .1 (11 - 5.5) = 6.05, and 6.05 + .1 (12 - 6.05)."""
    means = []
    for step in range(1, 13):
        disco.log_sigma(torch.full((3, 4), float(step)))
        disco.end_step(alone)
        means.append(disco.state_mean[0].item())
    assert means[0] == 1 and means[9:] == pytest.approx([5.5, 6.05, 6.645], rel=1e-5)


def test_a_step_in_passes_and_over_processes_is_the_step(disco):
    whole, parts = build(["disco"], 4, seed=3).disco, build(["disco"], 4, seed=3).disco
    states = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)) + 5
    whole.log_sigma(states)
    whole.end_step(alone)
    for part in states[:6].split([1, 3, 2]):  # and another process has the other half
        parts.log_sigma(part)
    parts.end_step(lambda sums: sums + torch.cat([states[6:].double().sum(0), torch.tensor([6.0])]))
    torch.testing.assert_close(parts.state_mean, whole.state_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.state_mean, states.mean(0), rtol=1e-6, atol=0)


def test_the_first_step_has_no_gradient_because_its_mean_is_not_known(disco):
    disco.log_sigma(torch.randn(5, 4)).sum().backward()
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in disco.net.parameters())
    disco.end_step(alone)
    disco.log_sigma(torch.randn(5, 4)).sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in disco.net.parameters())


def test_measuring_moves_no_mean(disco):
    with torch.no_grad():
        disco.log_sigma(torch.randn(5, 4))
    disco.eval().log_sigma(torch.randn(5, 4))
    disco.train().log_sigma(torch.ones(1, 4))
    disco.end_step(alone)
    assert torch.equal(disco.state_mean, torch.ones(4))


def test_a_disco_head_without_the_gauge_is_refused_in_one_line(tmp_path):
    """As versions before left it: with biases, and nothing that it is centred by."""
    save(build(BOTH, 8, seed=4), tmp_path)
    description = json.loads((tmp_path / "heads.json").read_text())
    description["disco"] = {"hidden_size": 8, "mean": False}
    (tmp_path / "heads.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="its Disco Head is not centred: train the run again") as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", [[], ["beta"], BOTH])
@pytest.mark.parametrize("score", [None, torch.ones(1, 8)])
def test_save_and_load_bitwise(tmp_path, architecture, score):
    heads = build(architecture, 8, seed=4, score_weight=score, prompt_features=torch.randn(9, 8))
    for weight in heads.parameters():
        torch.nn.init.normal_(weight)
    save(heads, tmp_path)
    again = load(tmp_path)
    assert again.state_dict().keys() == heads.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in heads.state_dict().items())


def test_heads_that_do_not_fit_their_description_are_refused(tmp_path):
    save(build(BOTH, 8, seed=4), tmp_path)
    (tmp_path / "heads.json").write_text(json.dumps({"beta": {"hidden_size": 9}}))
    with pytest.raises(UserError, match="does not fit heads.json"):
        load(tmp_path)
