"""Files of a LLaMA-Factory user, as they are: a reward model, dpo, then ppo on that reward model."""

import json
import math

import pytest

from discobeta import files
from discobeta.cli import main

pytestmark = pytest.mark.numeric

# LLaMA-Factory's examples/train_lora/qwen3_lora_{reward,dpo}.yaml and llama3_lora_ppo.yaml (there is no qwen3 one), but
# for the model and the sizes in capitals.
REWARD = """\
### model
model_name_or_path: MODEL
trust_remote_code: true

### method
stage: rm
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: dpo_en_demo
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/qwen3-4b/lora/reward
logging_steps: LOGGING
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
# eval_dataset: dpo_en_demo
# val_size: 0.1
# per_device_eval_batch_size: 1
# eval_strategy: steps
# eval_steps: 500
"""
DPO = (
    REWARD.replace("stage: rm", "stage: dpo")
    .replace("lora_target: all\n", "lora_target: all\npref_beta: 0.1\npref_loss: sigmoid  # choices: [sigmoid (dpo)]\n")
    .replace("lora/reward", "lora/dpo")
    .replace("1.0e-4", "5.0e-6")
)
PPO = """\
### model
model_name_or_path: MODEL
reward_model: saves/qwen3-4b/lora/reward
trust_remote_code: true

### method
stage: ppo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/qwen3-4b/lora/ppo
logging_steps: LOGGING
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000

### generate
max_new_tokens: NEW_TOKENS
top_k: 0
top_p: 0.9
"""
EVAL = """
val_size: 4
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: LOGGING
"""
DATASETS = {  # as in LLaMA-Factory's data/dataset_info.json
    "identity": {"file_name": "identity.json"},
    "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"},
    "dpo_en_demo": {
        "file_name": "dpo_en_demo.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working directory: data/, as LLaMA-Factory has it, and model/, a tiny Qwen3 that speaks bytes in ChatML."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    monkeypatch.chdir(tmp_path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained("model")
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=64, max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained("model")

    asked = [{"instruction": f"Count to {n}.", "input": "", "output": f"{n}."} for n in range(3, 7)]
    pairs = [
        {
            "conversations": [{"from": "human", "value": f"How tall is tower {n}?"}],
            "chosen": {"from": "gpt", "value": f"{n} metres."},
            "rejected": {"from": "gpt", "value": "No."},
        }
        for n in range(12)
    ]
    data = tmp_path / "data"
    data.mkdir()
    for name, content in (("dataset_info", DATASETS), ("identity", asked[:2]), ("alpaca_en_demo", asked)):
        (data / f"{name}.json").write_text(json.dumps(content))
    (data / "dpo_en_demo.json").write_text(json.dumps(pairs))
    return tmp_path


def train(home, name: str, text: str) -> dict:
    """What provenance.json says of the run of a YAML, which ends well."""
    sizes = {"MODEL": "model", "LOGGING": "1", "NEW_TOKENS": "8"}
    for word, size in sizes.items():
        text = text.replace(word, size)
    (home / f"{name}.yaml").write_text(text)
    assert main(["train", f"{name}.yaml"]) == 0
    return files.read_sealed(home / "saves" / "qwen3-4b" / "lora" / name / "provenance.json")


def log(home, name: str) -> list[dict]:
    path = home / "saves" / "qwen3-4b" / "lora" / name / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


STAGES = {"reward": "rm", "dpo": "dpo", "ppo": "ppo"}
LORA = "finetuning_type: lora\nlora_rank: 8\nlora_target: all\n"
FULL = "finetuning_type: full\ndeepspeed: examples/deepspeed/ds_z3_config.json\n"
"""In the place of `LORA` in LLaMA-Factory's examples/train_full."""
DISCO = "add_disco_head: true\ndisco_pref: true\n"
LEDPO = "add_beta_head: true\nuse_dynamic_beta: true\n"


def chain(home, texts: dict[str, str]) -> dict[str, str]:
    """Train the three files in order, and say which arm each run was."""
    known = {name: train(home, name, text) for name, text in texts.items()}
    assert {name: run["stage"] for name, run in known.items()} == STAGES
    updates = log(home, "ppo")
    assert [row["step"] for row in updates] == [1, 2, 3]
    assert all(math.isfinite(row[key]) for row in updates for key in ("reward", "loss", "kl_per_sequence"))
    return {name: run["arm"] for name, run in known.items()}


def test_reward_then_dpo_then_ppo_on_that_reward_model(home):
    arms = chain(home, {"reward": REWARD, "dpo": DPO, "ppo": PPO})
    assert arms == {"reward": "baseline", "dpo": "baseline", "ppo": "baseline"}
    updates = log(home, "dpo")
    assert len(updates) == 6 and updates[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_the_four_flags_stand_beside_the_rest_of_the_files(home):
    beta_head = "beta_head: saves/qwen3-4b/lora/dpo\n"
    more = {"reward": DISCO + EVAL, "dpo": DISCO + LEDPO + EVAL, "ppo": DISCO + LEDPO + beta_head}
    arms = chain(home, {name: text + more[name] for name, text in (("reward", REWARD), ("dpo", DPO), ("ppo", PPO))})
    both = "disco-used_beta-used"
    assert arms == {"reward": "disco-used_beta-absent", "dpo": both, "ppo": both}
    assert all(row["log_s"] != 0 for row in log(home, "ppo"))


def test_all_weights_with_the_deepspeed_of_their_files(home, capsys):
    texts = {name: text.replace(LORA, FULL) for name, text in (("reward", REWARD), ("dpo", DPO), ("ppo", PPO))}
    arms = chain(home, texts)
    assert set(arms.values()) == {"baseline"}
    for name in STAGES:
        folder = home / "saves" / "qwen3-4b" / "lora" / name
        assert (folder / "model" / "model.safetensors").exists() and not (folder / "adapter").exists()
    assert "discobeta: deepspeed is ignored: " in capsys.readouterr().err
