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
    states = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = heads.disco.log_sigma(states), heads.beta.log_s(states)
    assert torch.equal(inside[0], heads.disco.log_sigma(states)) and torch.equal(inside[1], heads.beta.log_s(states))


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
