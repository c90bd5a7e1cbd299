"""Settings people have: names and values of LLaMA-Factory, transformers and TRL mean what they mean there."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from discobeta.cli import main
from discobeta.design import config_names
from discobeta.design.config import RunConfig
from discobeta.design.study import Study
from discobeta.design.yaml_text import parse_overrides
from discobeta.errors import UserError, did_you_mean, edits

DOCS = Path(__file__).parents[1] / "docs" / "llama-factory.md"
KEYS = {entry.name for entry in dataclasses.fields(RunConfig)}
KNOWN = {*KEYS, *config_names.IGNORED, *config_names.REFUSED, *config_names.RENAMED}


def parsed(**settings):
    return RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": "m"} | settings)


def refusal(**settings) -> str:
    with pytest.raises(UserError) as caught:
        parsed(**settings)
    return str(caught.value)


# --- the lists of names

# name -> default, of the argument classes of llamafactory 0.9.5 (PyPI) that a training YAML is read into
LLAMA_FACTORY = {
    "model_name_or_path": None, "adapter_name_or_path": None, "adapter_folder": None, "cache_dir": None,
    "use_fast_tokenizer": True, "resize_vocab": False, "split_special_tokens": False, "add_tokens": None,
    "add_special_tokens": None, "new_special_tokens_config": None, "init_special_tokens": "noise_init",
    "model_revision": "main", "low_cpu_mem_usage": True, "rope_scaling": None, "flash_attn": "auto",
    "shift_attn": False, "mixture_of_depths": None, "use_unsloth": False, "use_unsloth_gc": False,
    "enable_liger_kernel": False, "moe_aux_loss_coef": None, "disable_gradient_checkpointing": False,
    "use_reentrant_gc": True, "upcast_layernorm": False, "upcast_lmhead_output": False, "train_from_scratch": False,
    "infer_backend": "huggingface", "offload_folder": "offload", "use_kv_cache": True, "use_v1_kernels": False,
    "infer_dtype": "auto", "hf_hub_token": None, "ms_hub_token": None, "om_hub_token": None,
    "print_param_status": False, "trust_remote_code": False, "quantization_method": "bnb", "quantization_bit": None,
    "quantization_type": "nf4", "double_quantization": True, "quantization_device_map": None,
    "image_max_pixels": 589824, "image_min_pixels": 1024, "image_do_pan_and_scan": False, "crop_to_patches": False,
    "video_max_pixels": 65536, "video_min_pixels": 256, "video_fps": 2.0, "video_maxlen": 128,
    "use_audio_in_video": False, "audio_sampling_rate": 16000, "export_dir": None, "export_size": 5,
    "export_device": "cpu", "export_quantization_bit": None, "export_quantization_dataset": None,
    "export_quantization_nsamples": 128, "export_quantization_maxlen": 1024, "export_legacy_format": False,
    "export_hub_model_id": None, "vllm_maxlen": 4096, "vllm_gpu_util": 0.7, "vllm_enforce_eager": False,
    "vllm_max_lora_rank": 32, "vllm_config": None, "sglang_maxlen": 4096, "sglang_mem_fraction": 0.7,
    "sglang_tp_size": -1, "sglang_config": None, "sglang_lora_backend": "triton", "use_kt": False,
    "kt_weight_path": None, "kt_expert_checkpoint_path": None, "kt_use_lora_experts": None, "kt_lora_expert_num": None,
    "kt_lora_expert_intermediate_size": None, "compute_dtype": None, "device_map": None, "model_max_length": None,
    "block_diag_attn": False, "template": None, "dataset": None, "eval_dataset": None, "dataset_dir": "data",
    "media_dir": None, "cutoff_len": 2048, "train_on_prompt": False, "mask_history": False, "streaming": False,
    "buffer_size": 16384, "mix_strategy": "concat", "interleave_probs": None, "overwrite_cache": False,
    "preprocessing_batch_size": 1000, "preprocessing_num_workers": None, "max_samples": None, "eval_num_beams": None,
    "ignore_pad_token_for_loss": True, "val_size": 0.0, "eval_on_each_dataset": False, "packing": None,
    "neat_packing": False, "tool_format": None, "default_system": None, "enable_thinking": True,
    "preserve_thinking": False, "tokenized_path": None, "data_shared_file_system": False, "freeze_trainable_layers": 2,
    "freeze_trainable_modules": "all", "freeze_extra_modules": None, "additional_target": None, "lora_alpha": None,
    "lora_dropout": 0.0, "lora_rank": 8, "lora_target": "all", "loraplus_lr_ratio": None,
    "loraplus_lr_embedding": 1e-06, "use_rslora": False, "use_dora": False, "pissa_init": False, "pissa_iter": 16,
    "pissa_convert": False, "create_new_adapter": False, "module_dropout": 0.0, "oft_rank": 0, "oft_block_size": 32,
    "oft_target": "all", "pref_beta": 0.1, "pref_ftx": 0.0, "pref_bco_weight": 0.0, "pref_loss": "sigmoid",
    "dpo_label_smoothing": 0.0, "kto_chosen_weight": 1.0, "kto_rejected_weight": 1.0, "simpo_gamma": 0.5,
    "ppo_buffer_size": 1, "ppo_epochs": 4, "ppo_score_norm": False, "ppo_target": 6.0, "ppo_whiten_rewards": False,
    "ref_model": None, "ref_model_adapters": None, "ref_model_quantization_bit": None, "reward_model": None,
    "reward_model_adapters": None, "reward_model_quantization_bit": None, "reward_model_type": "lora",
    "ld_alpha": None, "use_galore": False, "galore_target": "all", "galore_rank": 16, "galore_update_interval": 200,
    "galore_scale": 2.0, "galore_proj_type": "std", "galore_layerwise": False, "use_apollo": False,
    "apollo_target": "all", "apollo_rank": 16, "apollo_update_interval": 200, "apollo_scale": 32.0,
    "apollo_proj": "random", "apollo_proj_type": "std", "apollo_scale_type": "channel", "apollo_layerwise": False,
    "apollo_scale_front": False, "use_badam": False, "badam_mode": "layer", "badam_start_block": None,
    "badam_switch_mode": "ascending", "badam_switch_interval": 50, "badam_update_ratio": 0.05,
    "badam_mask_mode": "adjacent", "badam_verbose": 0, "use_swanlab": False, "swanlab_project": "llamafactory",
    "swanlab_workspace": None, "swanlab_run_name": None, "swanlab_mode": "cloud", "swanlab_api_key": None,
    "swanlab_logdir": None, "swanlab_lark_webhook_url": None, "swanlab_lark_secret": None, "pure_bf16": False,
    "stage": "sft", "finetuning_type": "lora", "use_llama_pro": False, "use_adam_mini": False, "use_mca": False,
    "use_hyper_parallel": False, "hyper_parallel_args": None, "use_muon": False, "use_dft_loss": False,
    "use_asft_loss": False, "asft_alpha": 0.1, "use_eaft_loss": False, "eaft_alpha": 1.0, "freeze_vision_tower": True,
    "freeze_multi_modal_projector": True, "freeze_language_model": False, "compute_accuracy": False,
    "disable_shuffling": False, "early_stopping_steps": None, "plot_loss": False,
    "include_effective_tokens_per_second": False, "do_sample": True, "temperature": 0.95, "top_p": 0.7, "top_k": 50,
    "num_beams": 1, "max_length": 1024, "max_new_tokens": 1024, "repetition_penalty": 1.0, "length_penalty": 1.0,
    "skip_special_tokens": True, "ray_num_workers": 1, "ray_init_kwargs": None, "master_addr": None,
    "master_port": None, "enable_torch_profiler": False, "profiler_output_dir": None, "profiler_wait_steps": 1,
    "profiler_warmup_steps": 1, "profiler_active_steps": 1, "profiler_repeat": 1, "profiler_record_shapes": True,
    "profiler_profile_memory": True, "profiler_with_stack": True, "profile_modules": None, "fp8": False,
    "fp8_backend": "auto", "fp8_enable_fsdp_float8_all_gather": False, "overwrite_output_dir": False,
}  # fmt: skip

EARLIER = [
    "ray_run_name",
    "ray_storage_path",
    "resources_per_worker",
    "placement_strategy",
    "dpo_beta",
    "dpo_loss",
    "dpo_ftx",
    "kto_beta",
    "kto_ftx",
    "orpo_beta",
    "name_module_trainable",
    "num_layer_trainable",
    "sft_packing",
    "visual_inputs",
    "image_resolution",
    "kt_optimize_rule",
    "evaluation_strategy",
    "no_cuda",
    "logging_dir",
    "save_safetensors",
    "fp16_opt_level",
    "half_precision_backend",
    "group_by_length",
    "include_tokens_per_second",
    "split_batches",
    "dispatch_batches",
    "use_ipex",
    "jit_mode_eval",
    "adafactor",
    "warmup_ratio",
]
"""Of versions before, of LLaMA-Factory and of transformers' Trainer."""


def trainer_defaults() -> dict:
    from transformers import Seq2SeqTrainingArguments

    found = {}
    for entry in dataclasses.fields(Seq2SeqTrainingArguments):
        made = entry.default is dataclasses.MISSING
        found[entry.name] = entry.default_factory() if made else entry.default
    return {name: str(value.value) if hasattr(value, "value") else value for name, value in found.items()}


def test_no_name_is_unknown():
    from trl import DPOConfig, RewardConfig

    theirs = {*LLAMA_FACTORY, *EARLIER, *trainer_defaults()}
    theirs |= {entry.name for make in (DPOConfig, RewardConfig) for entry in dataclasses.fields(make)}
    assert not theirs - KNOWN


def test_each_name_has_one_fate():
    fates = [KEYS, config_names.IGNORED, config_names.REFUSED, config_names.RENAMED]
    names = [name for fate in fates for name in fate]
    assert len(names) == len(set(names))
    for name, key in config_names.RENAMED.items():
        assert key.split()[0].rstrip(":,") in KEYS, name


@pytest.mark.parametrize(
    "name", sorted({*LLAMA_FACTORY} - {"stage", "model_name_or_path", "max_length", "model_max_length"})
)
def test_every_default_of_llama_factory_is_accepted(name):
    parsed(**{name: LLAMA_FACTORY[name]})


def test_every_default_of_the_trainer_is_accepted():
    config, notes = parsed(**trainer_defaults())
    assert config.optim == "adamw_torch" and config.logging_steps == 500
    assert "optim: adamw_torch_fused is ignored: adamw_torch computes the same" in notes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("load_best_model_at_end", True),
        ("early_stopping_steps", 3),
        ("additional_target", "embed_tokens,lm_head"),
        ("reward_model_type", "api"),
        ("quantization_bit", 4),
        ("use_galore", True),
        ("use_badam", True),
        ("pissa_init", True),
        ("use_dora", True),
        ("loraplus_lr_ratio", 16.0),
        ("pref_ftx", 0.1),
        ("dpo_ftx", 0.1),
        ("ld_alpha", 0.5),
        ("ld_alpha", 0),
        ("pref_bco_weight", 0.1),
        ("dpo_label_smoothing", 0.5),
        ("label_smoothing", 0.1),
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5),
        ("ref_model", "other"),
        ("reward_model_adapters", "other"),
        ("create_new_adapter", True),
        ("resize_vocab", True),
        ("add_tokens", "<a>"),
        ("rope_scaling", "yarn"),
        ("train_on_prompt", True),
        ("mask_history", True),
        ("default_system", "Be brief."),
        ("preserve_thinking", True),
        ("packing", True),
        ("mix_strategy", "interleave_under"),
        ("interleave_probs", "0.5,0.5"),
        ("disable_shuffling", True),
        ("data_seed", 0),
        ("train_sampling_strategy", "group_by_length"),
        ("group_by_length", True),
        ("dataloader_drop_last", True),
        ("lr_scheduler_kwargs", {"num_cycles": 2}),
        ("optim_args", "r=1"),
        ("auto_find_batch_size", True),
        ("do_sample", False),
        ("num_beams", 4),
        ("repetition_penalty", 1.1),
        ("fp16", True),
        ("fp8", True),
        ("pure_bf16", True),
        ("deepspeed", {"optimizer": {"type": "Lion"}}),
        ("deepspeed", {"scheduler": {"type": "WarmupLR"}}),
        ("deepspeed", {"fp16": {"enabled": True}}),
        ("full_determinism", True),
        ("optim", "adafactor"),
        ("optim", "adamw_8bit"),
        ("finetuning_type", "freeze"),
        ("pref_loss", "simpo"),
        ("flash_attn", "fa3"),
    ],
)
def test_what_would_change_the_result_is_refused(name, value):
    message = refusal(**{name: value})
    assert message.startswith(f"run config: {name}: ") and "unknown" not in message and "\n" not in message


# llamafactory 0.9.5's examples/deepspeed/ds_z3_config.json, and the optimizer of transformers' documentation
ZERO3 = {
    "train_batch_size": "auto", "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0}, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3},
}  # fmt: skip
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}


def test_sharing_memory_is_ignored_and_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    why = "is ignored: sharding over processes would change memory and speed, and is not done"
    Path("ds.json").write_text(json.dumps(ZERO3 | ADAMW, indent="\t"))
    for value in ("examples/deepspeed/ds_z3_config.json", "ds.json", ZERO3, None):
        assert parsed(deepspeed=value)[1] == [f"deepspeed {why}"]
    assert parsed(fsdp="full_shard auto_wrap")[1] == [f"fsdp {why}"]
    Path("ds.json").write_text(json.dumps(ZERO3 | {"scheduler": {"type": "WarmupLR"}}))
    assert refusal(deepspeed="ds.json").endswith("'ds.json' is not supported: the schedule is lr_scheduler_type")


@pytest.mark.parametrize("name", sorted(config_names.REFUSED))
def test_a_refusal_says_why(name):
    message = refusal(**{name: "something"})
    assert message == f"run config: {name}: 'something' is not supported: {config_names.REFUSED[name][1]}"


def test_true_is_not_one():
    assert "num_beams" in refusal(num_beams=True) and "use_galore" in refusal(use_galore=1)


def test_what_is_ignored_is_said_once_with_its_reason():
    _, notes = parsed(template="llama3", ddp_timeout=180000000, enable_thinking=True, use_swanlab=False, packing=False)
    assert [note.partition(" ")[0] for note in notes] == ["template", "ddp_timeout", "enable_thinking", "use_swanlab"]
    assert "tokenizer's own chat template" in notes[0] and "Assistant:" in notes[0]
    assert "without thoughts, and in ppo, the template's empty thought stands in the prompt" in notes[2]


# --- values


@pytest.mark.parametrize("value", ["none", ["none"], [], None])
def test_no_tracker(value):
    assert parsed(report_to=value)[0].report_to == "none"


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_one_tracker_alone_or_in_a_list(tracker):
    assert parsed(report_to=tracker)[0].report_to == tracker
    assert parsed(report_to=[tracker])[0].report_to == tracker


@pytest.mark.parametrize("value", ["all", ["wandb", "tensorboard"], "swanlab", ["mlflow"], [["wandb"]], 3])
def test_other_trackers_are_refused(value):
    assert "should be none or tensorboard or wandb" in refusal(report_to=value)


def test_warmup_steps_below_one_are_a_share():
    """As in transformers 5; 3 % of 100 steps are 3 steps, by either key."""
    for share in (0.03, "0.03"):
        config, _ = parsed(warmup_steps=share)
        assert (config.warmup_steps, config.warmup_ratio) == (0, 0.03)
    assert parsed(warmup_steps=0.1, warmup_ratio=0.5)[0].warmup_ratio == 0.1
    assert parsed(warmup_steps=20)[0].warmup_steps == 20
    assert "warmup_steps: 2.5 should be a whole number" in refusal(warmup_steps=2.5)
    assert "warmup_steps" in refusal(warmup_steps=-0.1)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_hf", "adamw_torch"])
def test_implementations_of_adamw_are_one_optimiser(optim):
    assert parsed(optim=optim)[0] == parsed()[0]


@pytest.mark.parametrize("kind", ["lora", "full", None])
def test_the_directory_says_what_a_reward_model_is(kind):
    config, notes = parsed(stage="ppo", reward_model="r", reward_model_type=kind)
    assert config.reward_model == "r" and notes == []


# --- whole files, as they are

MODEL = "model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct\ntrust_remote_code: true\n"
DATA = """
dataset: dpo_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
LORA = "do_train: true\nfinetuning_type: lora\nlora_rank: 8\nlora_target: all\n"
FULL = "do_train: true\nfinetuning_type: full\ndeepspeed: examples/deepspeed/ds_z3_config.json\n"
STAGES = {
    "rm": "stage: rm\noutput_dir: saves/reward\nlearning_rate: 1.0e-4\n",
    "dpo": "stage: dpo\noutput_dir: saves/dpo\nlearning_rate: 5.0e-6\npref_beta: 0.1\npref_loss: sigmoid\n",
    "ppo": "stage: ppo\noutput_dir: saves/ppo\nlearning_rate: 1.0e-5\nreward_model: saves/reward\n"
    "max_new_tokens: 512\ntop_k: 0\ntop_p: 0.9\n",
}


@pytest.mark.parametrize("report", ["none", "[wandb]"])
@pytest.mark.parametrize("method", [LORA, FULL])
@pytest.mark.parametrize("stage", STAGES)
def test_example_yamls_of_reward_dpo_and_ppo(tmp_path, stage, method, report):
    """The keys of LLaMA-Factory's examples llama3_lora_{reward,dpo,ppo}.yaml and of their qwen3 successors,
    and with all weights as in its examples/train_full, of which none is of these stages."""
    path = tmp_path / "run.yaml"
    path.write_text(MODEL + STAGES[stage] + method + DATA + f"report_to: {report}\n")
    config, notes = RunConfig.read(path)
    assert (config.stage, config.finetuning_type) == (stage, "lora" if method is LORA else "full")
    assert (config.report_to, config.cutoff_len, config.max_samples) == (report.strip("[]"), 2048, 1000)
    assert (config.warmup_ratio, config.lr_scheduler_type, config.bf16) == (0.1, "cosine", True)
    assert config.reward_model == ("saves/reward" if stage == "ppo" else None)
    ignored = "do_train template overwrite_cache preprocessing_num_workers dataloader_num_workers save_only_model"
    ignored = ignored.replace("template", "deepspeed template") if method is FULL else ignored
    assert [note.split()[0] for note in notes] == [*ignored.split(), "ddp_timeout"]


def test_a_yaml_of_the_web_page(tmp_path):
    """What llamafactory 0.9.5's page writes for dpo with LoRA: every switch of it, most of them off."""
    page = yaml.safe_load(
        """
        {bf16: true, fp16: false, pure_bf16: false, cutoff_len: 256, ddp_timeout: 180000000, do_train: true,
        enable_thinking: true, flash_attn: auto, include_num_input_tokens_seen: true, lora_alpha: 16, lora_dropout: 0,
        create_new_adapter: false, use_rslora: false, use_dora: false, pissa_init: false, pissa_convert: false,
        loraplus_lr_ratio: null, additional_target: null, neftune_noise_alpha: null, packing: false,
        neat_packing: false, train_on_prompt: false, mask_history: false, resize_vocab: false, use_llama_pro: false,
        use_galore: false, use_apollo: false, use_badam: false, use_swanlab: false, use_unsloth: false,
        enable_liger_kernel: false, rope_scaling: null, optim: adamw_torch, report_to: none, pref_ftx: 0,
        preprocessing_num_workers: 16, trust_remote_code: true, warmup_steps: 0, template: qwen3, plot_loss: true,
        quantization_method: bnb, double_quantization: true, val_size: 0.1, eval_strategy: steps, eval_steps: 100,
        reward_model_type: lora, freeze_vision_tower: true, image_max_pixels: 589824}
        """
    )
    config, _ = parsed(**page)
    assert (config.lora_alpha, config.val_size, config.eval_steps, config.bf16) == (16, 0.1, 100, True)


def test_a_tracker_of_a_list_that_is_not_installed(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings("dpo", report_to=["wandb"])))
    assert main(["train", str(path)]) == 2
    assert "report_to: wandb is not installed (pip install wandb)" in capsys.readouterr().err


def test_a_json_file_with_tabs(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"stage": "dpo", "model_name_or_path": "a\tb", "learning_rate": 1e-05}, indent="\t"))
    config, _ = RunConfig.read(path)
    assert (config.model_name_or_path, config.learning_rate) == ("a\tb", 1e-5)


# --- unknown names


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pref_btea", "unknown key 'pref_btea'; did you mean 'pref_beta'?"),
        ("learning_rat", "; did you mean 'learning_rate'?"),
        ("cutof_len", "; did you mean 'cutoff_len'?"),
        ("ddp_timout", "; did you mean 'ddp_timeout'?"),
        ("beta", "unknown key 'beta': it is pref_beta here"),
        ("dpo_beta", ": it is pref_beta here"),
        ("loss_type", ": it is pref_loss here"),
        ("max_length", ": it is cutoff_len (prompt + response)"),
        ("learning_rate_scheduler", ": it is lr_scheduler_type here"),
        ("batch_size", ": it is per_device_train_batch_size here"),
        ("evaluation_strategy", ": it is eval_strategy here"),
        ("lora_r", ": it is lora_rank here"),
        ("num_ppo_epochs", ": it is ppo_epochs here"),
    ],
)
def test_an_unknown_name_is_answered_by_the_right_one(name, says):
    assert says in refusal(**{name: 1})


@pytest.mark.parametrize("name", ["data_size", "x", "", "frobnicate", "score", "beta_size"])
def test_no_suggestion_where_nothing_is_near(name):
    assert refusal(**{name: 1}) == f"run config: unknown key {name!r}; `discobeta keys dpo` lists them all"


NEAR = """
pref_btea:pref_beta learning_rat:learning_rate cutof_len:cutoff_len valsize:val_size prefbeta:pref_beta
LearningRate:learning_rate max-steps:max_steps steps_max:max_steps lamb:lam gama:gamma seeds:seed ppo_epoch:ppo_epochs
temprature:temperature max_sample:max_samples eval_size:val_size val_steps:eval_steps lora_rnak:lora_rank
dynamic_beta:use_dynamic_beta use_disco_pref:disco_pref train_epochs:num_train_epochs score_norm:ppo_score_norm
per_device_train_bacth_szie:per_device_train_batch_size
"""
FAR = """
batch_size use_swanlab data_size beta_size rate model head output sample_size eval_data top_b lan use_dpo max_token
batch_rule train_size lora_size val_data ref_size lora_steps use_trl x adam_rate save_size
"""


@pytest.mark.parametrize("pair", NEAR.split())
def test_a_slip_is_near(pair):
    name, meant = pair.split(":")
    assert did_you_mean(name, KEYS) == f"; did you mean {meant!r}?"


@pytest.mark.parametrize("name", FAR.split())
def test_another_word_is_another_name(name):
    """However many letters two names have in common: `batch_size` is no slip of `val_size`."""
    assert did_you_mean(name, KEYS) == ""


def test_no_key_is_a_slip_of_another():
    """But for those that differ in one letter themselves, or by a word that one of them has more."""
    for key in KEYS:
        for other in re.findall("'(.*?)'", did_you_mean(key, KEYS - {key})):
            words, others = set(key.split("_")), set(other.split("_"))
            assert words < others or others < words or edits(key, other) == 1, (key, other)


def test_edits_are_counted_as_by_trying_them_all():
    """Every word of one edit of `abcd`, and every one of two, made one edit after the other."""

    def after_one(word: str) -> set[str]:
        places = range(len(word) + 1)
        made = {word[:i] + word[i + 1 :] for i in places[:-1]}
        made |= {word[:i] + letter + word[i:] for i in places for letter in "abcdx"}
        made |= {word[:i] + letter + word[i + 1 :] for i in places[:-1] for letter in "abcdx"}
        return made | {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in places[:-2]}

    once = after_one("abcd") - {"abcd"}
    assert {edits("abcd", word) for word in once} == {1} and edits("abcd", "abcd") == 0
    twice = set().union(*map(after_one, once)) - once - {"abcd"}
    assert len(twice) > 700 and {edits("abcd", word) for word in twice} <= {2, 3}
    swapped = {word for word in twice if edits("abcd", word) == 3}  # letters that were swapped are not edited again
    assert all(any(pair[0] in word and pair[1] in word for pair in ("ba", "cb", "dc")) for word in swapped)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("kl_coef", "it is pref_beta here"),
        ("num_mini_batches", "it is ppo_buffer_size here"),
        ("per_device_batch_size", "it is per_device_train_batch_size here"),
        ("gae_lambda", "it is lam here"),
        ("precompute_ref_log_probs", "it is reference_path here"),
        ("use_disco", "it is add_disco_head (whether there is a head) and disco_pref (whether the loss reads it) here"),
        ("torch_dtype", "it is bf16: true or false here"),
        ("dpo.pref_beta", "a run has one stage and flat keys: write pref_beta"),
    ],
)
def test_a_name_of_another_program_is_answered_by_the_key(name, says):
    assert refusal(**{name: 1}) == f"run config: unknown key {name!r}: {says}"


def test_names_that_are_no_keys_say_what_becomes_of_them():
    assert parsed(template="llama3")[1] == [
        "template is ignored: the tokenizer's own chat template is used, and without one the form "
        "'\\n\\nHuman: … \\n\\nAssistant:'"
    ]
    assert refusal(dpo_ftx=0.1).endswith("0.1 is not supported: an extra SFT loss would change what the study compares")
    assert "labels of pairs are smoothed by dpo_label_smoothing" in refusal(label_smoothing=0.1)
    assert "the reference is the base model that the policy starts from" in refusal(ref_model="m2")
    assert parsed(kl_estimator="k1")[1] == [] and "(k1)" in refusal(kl_estimator="k3")


# --- the wrong place, file or option


STUDY = {"study": "s", "data": {"dataset": "a.jsonl", "val_size": 2}, "base": {"model_name_or_path": "m"}}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("plan --config study.yaml", "plan: unknown option --config; did you mean --configfile study.yaml?"),
        ("plan --config seeds=[1]", "plan: unknown option --config; did you mean --set seeds=[1]?"),
        ("plan --configf study.yaml", "plan: unknown option --configf; did you mean '--configfile'?"),
        ("plan study.yaml", "required: --configfile; did you mean --configfile study.yaml?"),
        ("plan --configfile study.yaml seeds=[1]", "there is no file seeds=[1]; --set seeds=[1] sets a key"),
        ("plan --configfile run.yaml", "run.yaml: this is a run (it has `stage:`) and no study"),
        (
            "train study.yaml",
            "study.yaml is a study and no run: `snakemake --cores all --configfile study.yaml` t",
        ),
        ("train --configfile study.yaml", "unknown option --configfile: this command takes a run"),
        ("train run.yaml pref_beta=1", "unrecognized arguments: pref_beta=1; did you mean --set pref_beta=1?"),
        ("train --set pref_beta=1 run.yaml", "required: RUN.yaml; --set takes all words after it"),
        ("train run.yaml --no-eval", "unknown option --no-eval; did you mean '--no-evaluate'?"),
        ("train run.yaml --procesess 2", "unknown option --procesess; did you mean '--processes'?"),
        (
            "train run.yaml --set dpo.pref_beta=1",
            "unknown key 'dpo.pref_beta': a run has one stage and flat keys: ",
        ),
        ("train run.yaml --set seeds=[1]", "unknown key 'seeds'; did you mean 'seed'?"),
        ("trian run.yaml", "'trian' is none; did you mean 'train'?"),
        ("frobnicate", "'frobnicate' is none; it may be grid, keys, "),
    ],
)
def test_a_wrong_word_on_the_command_line_gets_the_right_one_in_a_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(STUDY))
    Path("run.yaml").write_text(yaml.safe_dump({"stage": "dpo", "model_name_or_path": "m", "dataset": "d"}))
    with pytest.raises(SystemExit) as caught:
        sys.exit(main(words.split()))
    message = capsys.readouterr().err
    assert caught.value.code == 2 and says in message
    assert message.startswith("discobeta") and message.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (
            "pref_beta=1",
            "'pref_beta': it is `dpo: {pref_beta: 1}` (or in `ppo:`, `common:`); on the command line ",
        ),
        ("ppo.pref_beta=1", "'ppo.pref_beta': it is `ppo: {pref_beta: 1}`; on the command line `--set 'ppo={pref"),
        ("kl_coef=1", "'kl_coef': it is `dpo: {pref_beta: 1}` (or in `ppo:`, `common:`); on"),
        ("lora_rank=1", "'lora_rank': it is `common: {lora_rank: 1}` (or in `rm:`, `dpo:`, `ppo:`); on"),
        ("cutoff_len=9", "'cutoff_len': it is `data: {cutoff_len: 9}` (or in `prompts:`); on"),
        (
            "vocab_size=9",
            "'vocab_size': it is `base: {sft: {vocab_size: 9}}`; on the command line `--set 'base=",
        ),
        ("disco_pref=true", "'disco_pref': its arm says it: `arms: [baseline, …]` (`discobeta grid`)"),
        ("output_dir=x", "'output_dir': the study sets it"),
        ("seed=1", "'seed'; did you mean 'seeds'?"),
        ("use_swanlab=true", "'use_swanlab': nothing depends on it (trackers are "),
        ("configfile=x.yaml", "'configfile': it is an option of snakemake, and no key: --configfile"),
        ("frobnicate=1", "'frobnicate'; the keys are study, environment, "),
    ],
)
def test_a_key_of_a_run_at_the_top_of_a_study_is_told_its_place(word, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(STUDY))
    assert main(["plan", "--configfile", "study.yaml", "--set", word]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"discobeta: study.yaml: unknown key {says}") and message.count("\n") == 1
    if (match := re.search(r"--set '(.*)'`$", message.strip())) and "base=" not in match[1]:  # this study has a model
        Study.read(["study.yaml"], [match[1]])


# --- --set


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("a #b", "a #b"),
        ("#b", "#b"),
        ("runs/#1", "runs/#1"),
        ("'a' #b", "'a' #b"),
        ("[a, b] #c", "[a, b] #c"),
        ("1 #x", "1 #x"),
        ("&co a", "&co a"),
        ("- a", "- a"),
        ("a: b", "a: b"),
        ("a\nb", "a\nb"),
        ("--- a", "--- a"),
        ("!!str 1", "!!str 1"),
        ("C:\\models\\qwen", "C:\\models\\qwen"),
        ("%s", "%s"),
        ("@home/x", "@home/x"),
        ("a: b: c", "a: b: c"),
        ("*best*", "*best*"),
        ("`x`", "`x`"),
        ("'a #b'", "a #b"),
        ('"a"', "a"),
        ("[a, 'b #c']", ["a", "b #c"]),
        ("{a: 1}", {"a": 1}),
        ("1e-4", "1e-4"),
        ("5", 5),
        ("true", True),
        ("null", None),
        ("", None),
    ],
)
def test_the_value_of_set_is_what_was_written(written, value):
    assert parse_overrides([f"key={written}"]) == {"key": value}


def test_words_of_one_section_are_merged_as_snakemake_merges_them():
    words = ["dpo={pref_beta: 0.3, lora_rank: 4}", "seeds=[1]", "dpo={lora_rank: 8}", "seeds=[2]"]
    assert parse_overrides(words) == {"dpo": {"pref_beta": 0.3, "lora_rank": 8}, "seeds": [2]}


@pytest.mark.parametrize("written", ["[a", "{a", "'a", '"a', "a\0b", "half \ud83d"])
def test_a_value_that_is_begun_and_not_ended_is_refused(written):
    with pytest.raises(UserError, match=r"^--set key=[^\n]*: the value is n"):
        parse_overrides([f"key={written}"])


def test_a_number_with_a_comment_is_no_number():
    settings = {"stage": "dpo", "model_name_or_path": "m"}
    with pytest.raises(UserError, match="seed: '3 #best' should be a whole number"):
        RunConfig.from_mapping(settings | parse_overrides(["seed=3 #best"]))
    config, _ = RunConfig.from_mapping(settings | parse_overrides(["run_name=a #b", "output_dir=runs/ #1"]))
    assert (config.run_name, config.output_dir) == ("a #b", "runs/ #1")


# --- resume_from_checkpoint


def test_a_checkpoint_that_is_none_names_those_that_are(settings, tmp_path, capsys):
    def message(named: Path) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings("dpo", resume_from_checkpoint=str(named))))
        assert main(["train", str(path)]) == 2
        return capsys.readouterr().err

    missing, theirs = tmp_path / "saves" / "checkpoint-45", tmp_path / "checkpoint-45"
    theirs.mkdir()
    (theirs / "trainer_state.json").write_text("{}")
    assert f"{missing} is not there; {tmp_path / 'run'} holds no checkpoint" in message(missing)
    assert f"{theirs} is a directory and no checkpoint of a run; " in message(theirs)
    assert not (tmp_path / "run").exists()


def test_the_run_s_own_checkpoints_are_named(settings, run, tmp_path, monkeypatch, capsys):
    import torch

    step, count = torch.optim.AdamW.step, iter(range(100))

    def dying(self, *arguments, **options):
        if next(count) == 3:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        run("dpo", save_steps=2)
    monkeypatch.undo()
    own = tmp_path / "run" / "checkpoints" / "step-2.pt"
    with pytest.raises(UserError, match=f"checkpoint-45 is not there; {own} is there, and a run goes on from its own"):
        run("dpo", save_steps=2, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-45"))
    run("dpo", save_steps=2)
    assert f"resuming from {own}" in capsys.readouterr().out


def test_a_base_has_no_checkpoints_to_go_on_from():
    message = refusal(stage="sft", finetuning_type="full", resume_from_checkpoint="checkpoint-45")
    assert "stage sft writes no checkpoints" in message


# --- what the documents say of all this


def test_the_document_lists_the_names_that_are_used():
    listed = DOCS.read_text(encoding="utf-8").partition("## Used\n")[2].partition("\n\n")[2].partition("\n\n")[0]
    theirs = {*LLAMA_FACTORY, *EARLIER, *trainer_defaults()} & KEYS
    assert listed.replace("`", "").split() == [
        entry.name for entry in dataclasses.fields(RunConfig) if entry.name in theirs
    ]
