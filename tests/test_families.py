"""Two steps of rm and dpo on a tiny random model of every family in `families`, or one line that refuses it.

What a run computes is compared with the plain transformers model, which reads one text at a time, without padding, and
whose own class turns states into logits. Tolerances: float32 sums of up to six log-probabilities of size 4 in another
order; a fault of attention, positions, caps or dropout moves them by 1e-2 and more, as weights have a deviation of .3.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import preference_rows, write_rows
from families import FAMILIES, RUNS, save, table
from safetensors.torch import load_file

import discobeta
from discobeta import cli
from discobeta.data.batches import pack
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.config import RunConfig
from discobeta.design.yaml_text import read_yaml
from discobeta.errors import UserError
from discobeta.method.dpo import DirectPreference
from discobeta.method.rm import RewardModelling
from discobeta.model import forward, pretrained
from discobeta.model.generation import generate

pytestmark = pytest.mark.numeric

DOCS = Path(__file__).parents[1] / "docs" / "models.md"

by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)

PROMPTS = [np.array(ids) for ids in ([4, 9, 10, 11], [9, 10, 11, 20, 21, 22, 23], [14])]
RESPONSES = [np.array(ids) for ids in ([12, 13], [24, 25, 26, 9, 14, 2], [15, 31, 2])]
"""Three lengths, the longest of which no sliding window here holds."""


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("families"), {}

    def get(family):
        if family.name not in made:
            made[family.name] = save(family, root / str(len(made)))
        return made[family.name]

    return get


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", preference_rows(4, 1))


@pytest.fixture
def train(folder_of, rows, tmp_path, capsys):
    """train(family, stage): exit status, what the command said on standard error, and the run directory."""

    def go(family, stage):
        settings = {
            "stage": stage, "model_name_or_path": str(folder_of(family)), "dataset": str(rows), "seed": 7,
            "output_dir": str(tmp_path / "run"), "cutoff_len": 64, "per_device_train_batch_size": 4, "max_steps": 2,
            "learning_rate": 1e-2, "logging_steps": 1, "lora_rank": 2, "lora_target": "all", "pref_beta": 0.1,
        }  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings))
        status = cli.main(["train", str(path)])
        return status, capsys.readouterr().err, tmp_path / "run"

    return go


@pytest.fixture
def at_the_end(monkeypatch):
    """at_the_end(class, quantity): a list that gets quantity(stage) when a run is about to be saved."""

    def watch(kind, quantity):
        found, save_stage = [], kind.save

        @torch.no_grad()
        def saving(stage, directory):
            found.append(quantity(stage.eval()))
            save_stage(stage, directory)

        monkeypatch.setattr(kind, "save", saving)
        return found

    return watch


def assert_refused(status, said, directory, reason):
    line = said.splitlines()[-1]
    assert status == 2 and line.startswith("discobeta: ") and reason in line, line
    assert "DISCOBETA_TRACEBACK" not in line, line  # it was foreseen
    assert not directory.exists()


def first_loss(directory):
    return json.loads((directory / "log.jsonl").read_text().splitlines()[0])["loss"]


def our_logps(model):
    batch = pack(PROMPTS, RESPONSES)
    return forward.response_logps(model, forward.hidden_states(model, batch), batch)


@torch.no_grad()
def plain_logps(model):
    """log pi(y|x) of each text alone, from the logits of the model's own class."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
        logps = model(input_ids=ids).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(logps.gather(1, torch.from_numpy(response)[:, None]).sum())
    return torch.stack(found)


@torch.no_grad()
def plain_scores(model, weight, prompts, responses):
    """w . h, h being the state of the classifier's trunk at the last token of each text alone."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        found.append(inner.base_model(input_ids=ids).last_hidden_state[0, -1].float() @ weight[0])
    return torch.stack(found)


@by_family
def test_dpo(family, train, folder_of, at_the_end):
    ends = at_the_end(DirectPreference, lambda stage: our_logps(stage.model))
    status, said, directory = train(family, "dpo")
    if family.dpo != RUNS:
        return assert_refused(status, said, directory, family.dpo)
    assert status == 0, said.splitlines()[-1]
    assert first_loss(directory) == pytest.approx(math.log(2), abs=1e-5)  # policy = reference, and no dropout

    config, _ = RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": str(folder_of(family))})
    base = pretrained.load_causal_lm(config)
    start = plain_logps(base)
    torch.testing.assert_close(our_logps(base).detach(), start, rtol=0, atol=1e-4)
    trained = discobeta.load_policy(directory).model
    torch.testing.assert_close(plain_logps(trained), ends[0], rtol=0, atol=1e-4)
    assert (ends[0] - start).abs().max() > 1e-3  # it has been trained


@by_family
def test_rm(family, train, at_the_end):
    ends = at_the_end(RewardModelling, lambda stage: stage.rewards(pack(PROMPTS, RESPONSES))[0])
    status, said, directory = train(family, "rm")
    if family.rm != RUNS:
        return assert_refused(status, said, directory, family.rm)
    assert status == 0, said.splitlines()[-1]

    config, _ = RunConfig.from_mapping(read_yaml(directory / "config.yaml"))
    found = load_or_tokenise(config, pretrained.load_tokenizer(config)).train
    scorer = pretrained.load_scorer(config)
    chosen, rejected = (
        plain_scores(scorer, scorer.score.weight, found.prompt_ids, ids)
        for ids in (found.chosen_ids, found.rejected_ids)
    )
    by_hand = torch.log1p((rejected - chosen).exp()).mean().item()  # no dropout either
    assert first_loss(directory) == pytest.approx(by_hand, abs=1e-4)

    trained = discobeta.load_reward_model(directory)
    adapter = load_file(directory / "adapter" / "adapter_model.safetensors")
    (weight,) = (tensor for name, tensor in adapter.items() if name.endswith("score.weight"))
    expected = plain_scores(trained.model, weight, PROMPTS, RESPONSES)
    torch.testing.assert_close(ends[0], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(trained.score_ids(PROMPTS, RESPONSES)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["RWKV", "BART decoder", "BLOOM", "Mamba", "OPT", "GPT-2"])
def test_responses_do_not_depend_on_the_padding_of_prompts(name, folder_of):
    """Against a draw of one token after the other from the plain model, which reads one text and keeps no cache."""
    (family,) = (family for family in FAMILIES if family.name == name)
    config, _ = RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": str(folder_of(family))})
    model, tokenizer = pretrained.load_causal_lm(config), pretrained.load_tokenizer(config)
    uniforms = np.random.default_rng(0).random((len(PROMPTS), 6))
    for prompt, draws, response in zip(PROMPTS, uniforms, generate(model, tokenizer, PROMPTS, uniforms), strict=True):
        ids = list(prompt)
        for u in draws:
            with torch.no_grad():
                ends = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1).cumsum(-1)
            ids.append(int((ends <= u).sum()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert response.tolist() == ids[len(prompt) :]


def test_a_model_that_draws_at_random_in_training_is_refused(base, monkeypatch):
    model = pretrained.load_causal_lm(RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": str(base)})[0])
    norm = model.model.norm

    def noisy(states, read=norm.forward):
        return read(states) * (1 + 0.01 * torch.randn(states.shape) * norm.training)

    before = torch.get_rng_state()
    pretrained.check_padding(model, "quiet")
    monkeypatch.setattr(norm, "forward", noisy)
    with pytest.raises(UserError, match="^noisy: Qwen3ForCausalLM .* in training, .* draws at random$"):
        pretrained.check_padding(model, "noisy")
    assert torch.equal(torch.get_rng_state(), before)  # whatever it has drawn
    assert not model.training


def test_there_are_enough_families():
    assert len({family.model_type for family in FAMILIES if RUNS in (family.rm, family.dpo)}) >= 24


def test_the_document_holds_the_table():
    assert table() in DOCS.read_text(encoding="utf-8")
