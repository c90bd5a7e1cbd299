"""The reference pass is the live reference, and only ever this run's."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from discobeta import files
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.inputs import reference
from discobeta.model.pretrained import load_causal_lm, load_tokenizer

pytestmark = pytest.mark.numeric


def load(config, train, held_out):
    found = reference.load_or_compute(config, {"train": train, "eval": held_out})
    return found["train"], found["eval"]


@pytest.fixture
def prepared(settings, tmp_path):
    def make(**changes):
        wanted = settings("dpo", reference_path=str(tmp_path / "reference")) | changes
        config, _ = RunConfig.from_mapping(wanted)
        data = load_or_tokenise(config, load_tokenizer(config))
        return config, data.train, data.held_out

    return make


def test_cached_is_live(prepared):
    """Against transformers' own forward pass, one sequence at a time and unpadded (float32 rounding)."""
    config, train, held_out = prepared()
    columns, _ = load(config, train, held_out)
    model = load_causal_lm(config)
    with torch.no_grad():
        for index in (0, 7, 39):
            prompt = train.prompt_ids[index].tolist()
            for side, responses in enumerate((train.chosen_ids, train.rejected_ids)):
                ids = torch.tensor([prompt + responses[index].tolist()])
                output = model(ids, output_hidden_states=True)
                logps = output.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
                assert columns["reference_logps"][index, side].item() == pytest.approx(logps.item(), abs=1e-4)
            state = output.hidden_states[-1][0, len(prompt) - 1]
            torch.testing.assert_close(columns["prompt_features"][index], state, rtol=1e-4, atol=1e-5)


def test_it_is_computed_once_and_read_bit_for_bit(prepared, monkeypatch):
    config, train, held_out = prepared()
    first = load(config, train, held_out)
    monkeypatch.setattr(reference, "compute", None)  # a second computation would fail
    again = load(config, train, held_out)
    for one, other in zip(first, again, strict=True):
        assert one.keys() == other.keys() == {"reference_logps", "prompt_features"}
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 99},
        {"pref_beta": 0.9},
        {"lora_rank": 2},
        {"learning_rate": 1.0},
        {"add_disco_head": True, "disco_pref": True},
    ],
)
def test_what_an_arm_changes_is_not_in_its_key(prepared, changes):
    config, train, held_out = prepared()
    other, _, _ = prepared(**changes)
    parts = {"train": train, "eval": held_out}
    assert reference.cache_key(config, parts) == reference.cache_key(other, parts)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cutoff_len": 12}, "cutoff_len"),
        ({"bf16": True}, "dtype"),
        ({"flash_attn": "disabled"}, "attention"),
        ({"max_samples": 20}, "train rows"),
    ],
)
def test_another_truncation_dtype_or_data_is_detected(prepared, changes, named):
    config, train, held_out = prepared()
    load(config, train, held_out)
    other, train, held_out = prepared(**changes, max_unusable_rows=1.0)
    with pytest.raises(UserError, match=f"another {named}"):
        load(other, train, held_out)


def test_another_base_is_detected(prepared, base, tmp_path):
    config, train, held_out = prepared()
    load(config, train, held_out)
    shutil.copytree(base, tmp_path / "other")
    model = load_causal_lm(config)
    model.get_input_embeddings().weight.data[3, 3] += 1e-6
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another base"):
        load(config.replace(model_name_or_path=str(tmp_path / "other")), train, held_out)


def test_a_shuffled_cache_is_detected(prepared):
    config, train, held_out = prepared()
    load(config, train, held_out)
    path = reference.Path(config.reference_path) / "train.safetensors"
    columns = load_file(path)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    save_file({**columns, "reference_logps": columns["reference_logps"][order]}, path)
    with pytest.raises(UserError, match="changed after it was written"):
        load(config, train, held_out)
    # even if its checksum were mended: whole rows in another order do not fit the run's rows
    save_file({name: value[order] for name, value in columns.items()}, path)
    record = path.with_name("reference.json")
    mended = files.read_sealed(record)
    mended["sha256"]["train"] = reference.sha256(path)
    files.write_sealed(record, mended)
    with pytest.raises(UserError, match="another order"):
        load(config, train, held_out)


def test_nothing_is_left_of_a_pass_that_failed(prepared, monkeypatch):
    config, train, held_out = prepared()
    passes = iter([reference.compute])

    def fail_on_the_second(*arguments):
        return next(passes)(*arguments)

    monkeypatch.setattr(reference, "compute", fail_on_the_second)
    with pytest.raises(StopIteration):
        load(config, train, held_out)
    folder = reference.Path(config.reference_path)
    assert not folder.exists() and not list(folder.parent.glob(".reference*"))


def test_the_batch_of_the_pass_does_not_matter(prepared):
    config, train, _ = prepared()
    model, device = load_causal_lm(config), torch.device("cpu")
    one = reference.compute(model, train, config.replace(per_device_eval_batch_size=1), device)
    many = reference.compute(model, train, config.replace(per_device_eval_batch_size=40), device)
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=1e-4, atol=1e-5)
