"""Names that people's files hold and that are no keys of a run: those of LLaMA-Factory and transformers' Trainer.

Each is either *ignored*, because nothing of the result depends on it, or *refused* where it would change the
result, that is with any value but those that leave things as they are; or it is another program's name of a key.
Read from LLaMA-Factory 0.9.5, transformers 5.23 and TRL 1.16's DPOConfig and RewardConfig, with names that earlier
versions had, and those that PPO and PEFT are known by elsewhere.
docs/reference/names.md shows them.
"""

from __future__ import annotations

from typing import Any

NEUTRAL = (None, False, 0, "", "none", [], {})
"""Values of most refused names that ask for nothing."""

_IGNORED_BECAUSE = {
    "the tokenizer's own chat template is used, and without one the form '\\n\\nHuman: … \\n\\nAssistant:'": "template",
    "each row decides: without thoughts, and in ppo, the template's empty thought stands in the prompt": """
        enable_thinking""",
    "`discobeta train` trains, whatever this says": "do_train",
    "what is measured depends on eval_dataset, val_size, eval_strategy and num_eval_generations": """
        do_eval do_predict predict_with_generate compute_accuracy eval_delay eval_on_start prediction_loss_only
        eval_on_each_dataset eval_accumulation_steps eval_do_concat_batches eval_use_gather_object eval_num_beams
        batch_eval_metrics include_for_metrics include_inputs_for_metrics generation_max_length
        generation_num_beams generation_config label_names metric_for_best_model greater_is_better""",
    "rows are read and tokenised whole, once, and kept in tokenized_path": """
        overwrite_cache preprocessing_num_workers preprocessing_batch_size streaming buffer_size media_dir
        data_shared_file_system remove_unused_columns dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
        dataloader_in_order length_column_name tool_format dataset_num_proc pad_to_multiple_of padding_free""",
    "padding is never trained on": "ignore_pad_token_for_loss",
    "tokenizers are loaded as transformers does": "use_fast_tokenizer",
    "special tokens are always left out of a sampled text": "skip_special_tokens",
    "the newest checkpoint is kept until the run has finished, every save_steps": """
        save_strategy save_total_limit save_only_model save_safetensors save_on_each_node enable_jit_checkpoint
        restore_callback_states_from_checkpoint""",
    "log.jsonl has a line every logging_steps": """
        logging_strategy logging_first_step logging_dir logging_nan_inf_filter log_on_each_node log_level
        log_level_replica disable_tqdm overwrite_logging print_param_status debug skip_memory_metrics
        include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second""",
    "trackers are tensorboard and wandb (report_to)": """
        use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir
        swanlab_lark_webhook_url swanlab_lark_secret project trackio_space_id trackio_bucket_id
        trackio_static_space_id""",
    "nothing is uploaded or exported": """
        push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision
        push_to_hub_model_id push_to_hub_organization push_to_hub_token export_dir export_size export_device
        export_quantization_bit export_quantization_dataset export_quantization_nsamples
        export_quantization_maxlen export_legacy_format export_hub_model_id""",
    "hubs are logged in to by their own tools": "hf_hub_token ms_hub_token om_hub_token use_auth_token",
    "processes are started by `discobeta train RUN.yaml --processes N`": """
        ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
        local_rank ray_num_workers ray_init_kwargs ray_run_name ray_storage_path ray_storage_filesystem ray_scope
        resources_per_worker placement_strategy master_addr master_port tpu_num_cores tpu_metrics_debug
        mp_parameters""",
    "losses are means over the rows of a step, over all processes": "average_tokens_across_devices",
    "it would change speed or memory, and is not done": """
        low_cpu_mem_usage offload_folder device_map tf32 torch_compile torch_compile_backend torch_compile_mode
        torch_empty_cache_steps use_liger_kernel liger_kernel_config enable_liger_kernel use_v1_kernels use_cache
        use_kv_cache jit_mode_eval use_ipex torchdynamo activation_offloading precompute_ref_batch_size""",
    "sharding over processes would change memory and speed, and is not done": "deepspeed fsdp sharded_ddp",
    "gradient_checkpointing alone says whether activations are recomputed": """
        disable_gradient_checkpointing use_reentrant_gc use_unsloth_gc gradient_checkpointing_kwargs
        activation_checkpointing_kwargs""",
    "no other engine samples": """
        infer_backend infer_dtype vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config
        sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend""",
    "rows are text": """
        image_max_pixels image_min_pixels image_resolution image_do_pan_and_scan crop_to_patches video_max_pixels
        video_min_pixels video_resolution video_fps video_maxlen use_audio_in_video audio_sampling_rate
        freeze_vision_tower freeze_multi_modal_projector visual_inputs""",
    "nothing is profiled": """
        enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps
        profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules""",
    "it belongs to a method that is refused by its own name": """
        quantization_method quantization_type quantization_device_map double_quantization fp8_backend
        fp8_enable_fsdp_float8_all_gather fp16_opt_level fp16_backend half_precision_backend init_special_tokens
        freeze_trainable_layers freeze_trainable_modules freeze_extra_modules name_module_trainable
        num_layer_trainable loraplus_lr_embedding pissa_iter pissa_convert module_dropout oft_rank oft_block_size
        oft_target kto_chosen_weight kto_rejected_weight simpo_gamma asft_alpha eaft_alpha galore_target
        galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise apollo_target apollo_rank
        apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise
        apollo_scale_front badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio
        badam_mask_mode badam_verbose hyper_parallel_args fsdp_config fsdp_min_num_params
        fsdp_transformer_layer_cls_to_wrap kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts
        kt_lora_expert_num kt_lora_expert_intermediate_size kt_optimize_rule kt_maxlen kt_use_cuda_graph kt_mode
        kt_force_think cpu_infer chunk_size mode length_penalty block_diag_attn f_alpha_divergence_coef discopop_tau
        ref_model_mixup_alpha ref_model_sync_steps""",
}

_REFUSED_BECAUSE = {
    "use bf16: true (the losses are float32 in any case)": "fp16",
    "precision is that of bf16: true or false": """
        pure_bf16 fp8 bf16_full_eval fp16_full_eval upcast_layernorm upcast_lmhead_output compute_dtype""",
    "runs are data parallel only (`discobeta train RUN.yaml --processes N`)": """
        parallelism_config accelerator_config use_mca use_hyper_parallel use_kt""",
    "quantised bases are not supported": """
        quantization_bit ref_model_quantization_bit reward_model_quantization_bit load_in_8bit load_in_4bit""",
    "only plain LoRA is supported": """
        use_dora use_rslora pissa_init loraplus_lr_ratio use_llama_pro additional_target freeze_language_model
        modules_to_save lora_modules_to_save""",
    "the adapter that adapter_name_or_path names is trained on": "create_new_adapter",
    "name the whole path in adapter_name_or_path": "adapter_folder",
    "an extra SFT loss would change what the study compares": "pref_ftx dpo_ftx kto_ftx rpo_alpha",
    "another loss would change what the study compares": """
        pref_bco_weight use_dft_loss use_asft_loss use_eaft_loss center_rewards_coefficient
        reference_free use_weighting sync_ref_model loss_weights""",
    "labels of pairs are smoothed by dpo_label_smoothing, and targets of tokens never": """
        label_smoothing label_smoothing_factor""",
    "noise on the embeddings would change what the study compares": "neftune_noise_alpha noise_alpha",
    "the reference is the base model that the policy starts from": """
        ref_model ref_model_adapters reference_model ref_model_path ref_model_name_or_path""",
    "the value head has an optimiser of its own, so its loss needs no factor: set value_learning_rate": "vf_coef",
    "name the directory of the reward model in reward_model": "reward_model_adapters",
    "pairs are not packed": "packing neat_packing sft_packing",
    "every response is trained on, and no prompt": "train_on_prompt mask_history",
    "a system message stands in the rows": "default_system system_message",
    "tools stand in the rows": "tools",
    "the tokenizer, its template and its special tokens are the base's": "chat_template_path eos_token pad_token",
    "the chat template says what becomes of earlier thoughts": "preserve_thinking",
    "the vocabulary and the embeddings are the base's": """
        resize_vocab split_special_tokens add_tokens add_special_tokens new_special_tokens_config""",
    "the architecture is the base's": """
        rope_scaling shift_attn mixture_of_depths moe_aux_loss_coef router_aux_loss_coef model_init_kwargs""",
    "only transformers models are supported": "use_unsloth",
    "all rows of an epoch are drawn in an order made of seed": """
        disable_shuffling group_by_length dataloader_drop_last ignore_data_skip sortish_sampler
        split_batches dispatch_batches""",
    "a base from scratch is stage: sft with model_type": "train_from_scratch",
    "only AdamW is supported": """
        use_galore use_apollo use_badam use_adam_mini use_muon adafactor optim_args optim_target_modules""",
    "schedules have no settings of their own": "lr_scheduler_kwargs",
    "the weights of the last step are kept": "load_best_model_at_end early_stopping_steps",
    "the batch is what the YAML says": "auto_find_batch_size",
    "use deterministic: true": "full_determinism",
    "use gradient_checkpointing: true": "activation_checkpointing",
    "hide the GPUs instead (CUDA_VISIBLE_DEVICES=)": "use_cpu no_cuda use_mps_device",
}

_REFUSED_UNLESS: dict[str, tuple[tuple, str]] = {
    **dict.fromkeys(  # keys of earlier versions
        ("disco_mean_penalty", "disco_spread_penalty", "beta_mean_penalty", "beta_spread_penalty"),
        ((None, 0), "heads are centred and have no penalties any more (docs/decisions/0023)"),
    ),
    "mix_strategy": ((None, "concat"), "datasets named together are concatenated"),
    "interleave_probs": ((None,), "datasets named together are concatenated"),
    "reward_model_type": ((None, "lora", "full"), "a reward model is a directory, which says what it holds"),
    "kl_estimator": ((None, "k1"), "the KL to the reference is the drawn tokens' own log-ratio (k1)"),
    "ld_alpha": ((None, 1), "another loss would change what the study compares"),
    "data_seed": ((None,), "all rows of an epoch are drawn in an order made of seed"),
    "f_divergence_type": ((None, "reverse_kl"), "another loss would change what the study compares"),
    "truncation_mode": ((None, "keep_start"), "a response is cut at its end, a prompt never"),
    "disable_dropout": ((None, True), "the base's dropout is off, and the adapter's is lora_dropout"),
    "train_sampling_strategy": ((None, "random"), "all rows of an epoch are drawn in an order made of seed"),
    "do_sample": ((None, True), "responses are sampled (a low temperature comes near to greedy decoding)"),
    "num_beams": ((None, 1), "responses are sampled, one by one"),
    "repetition_penalty": ((None, 1), "responses are sampled from the policy itself"),
}

_RENAMED = {
    "pref_beta": "beta dpo_beta kto_beta orpo_beta kl_coef init_kl_coef kl_coefficient kl_beta",
    "pref_loss": "loss_type dpo_loss",
    "add_disco_head (whether there is a head) and disco_pref (whether the loss reads it)": """
        disco use_disco use_disco_head disco_head""",
    "add_beta_head (whether there is a head) and use_dynamic_beta (whether it scales beta)": """
        use_beta_head learned_beta ledpo use_ledpo""",
    "cutoff_len (prompt + response), or max_new_tokens of a sampled response": "max_length",
    "cutoff_len": "max_seq_length max_seq_len model_max_length max_len seq_length block_size",
    "cutoff_len (prompt + response; a prompt is never cut)": """
        max_prompt_length max_prompt_len prompt_max_len max_source_length""",
    "max_new_tokens": """
        max_completion_length response_length max_gen_length max_response_length generate_max_len max_tokens""",
    "learning_rate": "lr",
    "lr_scheduler_type": "learning_rate_scheduler lr_scheduler scheduler lr_schedule",
    "optim": "optimizer",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "adam_eps eps",
    "max_grad_norm": "gradient_clipping grad_clip clip_grad_norm max_norm",
    "warmup_ratio (a share of the steps) or warmup_steps": "warmup",
    "num_train_epochs": "epochs num_epochs max_epochs",
    "max_steps": "max_train_steps num_train_steps total_steps",
    "max_steps (of ppo: updates)": "total_episodes num_total_batches",
    "per_device_train_batch_size": """
        batch_size train_batch_size micro_batch_size per_gpu_train_batch_size per_device_batch_size
        micro_train_batch_size mini_batch_size per_device_train_batchsize""",
    "per_device_train_batch_size x gradient_accumulation_steps x ppo_buffer_size": "rollout_batch_size",
    "per_device_eval_batch_size": """
        per_gpu_eval_batch_size eval_batch_size local_rollout_forward_batch_size micro_rollout_batch_size""",
    "gradient_accumulation_steps": "grad_accum_steps grad_accumulation_steps gradient_accumulation accumulation_steps",
    "eval_strategy": "evaluation_strategy",
    "eval_steps": "eval_every eval_interval",
    "save_steps": "save_every save_interval checkpoint_steps",
    "logging_steps": "log_every log_interval logging_interval",
    "model_name_or_path": """
        model model_name model_path base_model sft_model_path sft_model base_model_name_or_path
        pretrained_model_name_or_path policy_model""",
    "model_revision": "revision",
    "tokenizer_name": "tokenizer tokenizer_name_or_path",
    "adapter_name_or_path": "adapter checkpoint_dir lora_path adapter_path peft_model_id",
    "reward_model": "reward_model_path reward_model_name_or_path rm_path reward_pretrain",
    "finetuning_type: lora or full": "use_peft use_lora",
    "lora_rank": "lora_r r rank lora_dim",
    "lora_target": "lora_target_modules target_modules lora_modules",
    "flash_attn": "attn_implementation attn",
    "flash_attn: fa2": "use_flash_attention_2 use_flash_attn",
    "bf16: true or false": "torch_dtype dtype mixed_precision precision",
    "dataset": "dataset_name dataset_path train_dataset train_file data_path",
    "dataset: an entry of dataset_info.json or datasets.yaml, with `subset:`": "dataset_config dataset_config_name",
    "dataset_dir": "data_dir",
    "eval_dataset": "validation_file validation_dataset val_dataset test_dataset test_file eval_file",
    "val_size": "test_size validation_split val_split val_ratio eval_ratio",
    "split": "dataset_train_split train_split dataset_split",
    "eval_split": "dataset_test_split test_split",
    "max_samples": "max_train_samples",
    "reference_path": "precompute_ref_log_probs",
    "num_eval_generations": "num_sample_generations",
    "generations_per_prompt": "num_generations num_return_sequences",
    "ppo_epochs": "num_ppo_epochs",
    "ppo_buffer_size": "num_mini_batches",
    "ppo_whiten_rewards": "whiten_rewards",
    "ppo_target": "target_kl kl_target adap_kl_ctrl",
    "missing_eos_penalty": "non_eos_penalty",
    "cliprange": "clip_range eps_clip cliprange_policy",
    "cliprange_value": "cliprange_vf value_clip clip_range_vf",
    "gamma": "discount",
    "lam": "lambda gae_lambda lambd",
    "output_dir": "output save_path save_dir",
    "run_name": "exp_name experiment_name",
    "seed": "random_seed",
}

RENAMED = {name: key for key, names in _RENAMED.items() for name in names.split()}
"""Other programs' names -> the key that says it here."""

IGNORED = {name: why for why, names in _IGNORED_BECAUSE.items() for name in names.split()}
"""Name -> why nothing depends on it."""

REFUSED = {name: (NEUTRAL, why) for why, names in _REFUSED_BECAUSE.items() for name in names.split()} | _REFUSED_UNLESS
"""Name -> the values that leave things as they are, and why others are refused."""

SAME_ADAMW = ("adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused", "adamw_hf")
"""Values of `optim` that are other implementations of adamw_torch."""


def is_neutral(value: Any, neutral: tuple) -> bool:
    """Whether `value` is one of `neutral`; True and False are no numbers."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)
