"""Families of causal language models as transformers has them: one tiny random checkpoint of each."""

# ruff: noqa: E501 (one family a line)
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", "Ġ", ".", "?", *"abcdefghijklmnopqrstuvwxyz"]  # Ġ: a space
VOCABULARY = 40  # more rows than the tokenizer has tokens, as embeddings mostly have

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


RUNS = "runs"


@dataclass(frozen=True)
class Family:
    """model_type, and what its config has beside SIZES; what becomes of its runs: RUNS, or words of the line that
    refuses them."""

    name: str
    model_type: str
    more: dict = field(default_factory=dict)
    rm: str = RUNS
    dpo: str = RUNS
    remark: str = ""


def _gpt(**more):
    return {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 24, **more}


MOE = {"num_experts_per_tok": 2}
FAMILIES = [
    Family("Llama", "llama"),
    Family("Llama, tied embeddings", "llama", {"tie_word_embeddings": True}, remark="as Llama 3.2 1B, Qwen3-0.6B"),
    Family("Mistral", "mistral", {"sliding_window": 4}, remark="sliding window"),
    Family("Mixtral", "mixtral", {"num_local_experts": 4} | MOE, remark="experts"),
    Family("Qwen2", "qwen2"),
    Family("Qwen2-MoE", "qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8} | MOE, remark="experts"),
    Family("Qwen3", "qwen3"),
    Family("Qwen3-MoE", "qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 8} | MOE, remark="experts"),
    Family("Qwen3-Next", "qwen3_next", {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]} | MOE, remark="recurrent layers; experts as in DeepSeek-V2"),
    Family("Gemma", "gemma"),
    Family("Gemma 2", "gemma2", {"sliding_window": 4}, remark="capped logits"),
    Family("Gemma 3, text", "gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    Family("Phi", "phi"),
    Family("Phi-3", "phi3"),
    Family("GPT-2", "gpt2", _gpt(), remark="dropout of 0.1, switched off; Conv1D counts as linear"),
    Family("GPT-Neo", "gpt_neo", {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}, remark="local attention"),
    Family("GPT-J", "gptj", _gpt(rotary_dim=4)),
    Family("GPT-NeoX (Pythia)", "gpt_neox"),
    Family("GPT-BigCode (StarCoder)", "gpt_bigcode", _gpt(), remark="dropout of 0.1, switched off"),
    Family("StarCoder2", "starcoder2"),
    Family("CodeGen", "codegen", _gpt(rotary_dim=4, num_attention_heads=4, head_dim=None), rm="no CodeGenForSequenceClassification"),
    Family("OPT", "opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}, remark="dropout of 0.1, switched off; positions with an offset"),
    Family("OPT, narrower embeddings", "opt", {"ffn_dim": 24, "word_embed_proj_dim": 8, "do_layer_norm_before": False}, remark="as OPT-350m: states are narrower than hidden_size"),
    Family("BLOOM", "bloom", {"n_layer": 2, "n_head": 2}, remark="ALiBi"),
    Family("Falcon", "falcon", {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 1}),
    Family("Falcon, ALiBi", "falcon", {"head_dim": None, "alibi": True, "multi_query": False}, remark="as Falcon-RW"),
    Family("MPT", "mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}, remark="ALiBi"),
    Family("StableLM", "stablelm"),
    Family("OLMo", "olmo"),
    Family("OLMo 2", "olmo2"),
    Family("OLMoE", "olmoe", {"num_experts": 4} | MOE, rm="no OlmoeForSequenceClassification", remark="experts"),
    Family("Cohere", "cohere", rm="no CohereForSequenceClassification", remark="scaled logits"),
    Family("Cohere 2", "cohere2", {"sliding_window": 4}, rm="no Cohere2ForSequenceClassification", remark="scaled logits"),
    Family("Granite", "granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0078125}, rm="no GraniteForSequenceClassification", remark="scaled logits"),
    Family("SmolLM3", "smollm3"),
    Family("Seed-OSS", "seed_oss", remark="dropout of 0.1, switched off"),
    Family("GLM", "glm"),
    Family("GLM-4", "glm4"),
    Family("Nemotron", "nemotron"),
    Family("Persimmon", "persimmon"),
    Family("XGLM", "xglm", {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2}, rm="no XGLMForSequenceClassification", remark="dropout of 0.1, switched off"),
    Family("BioGPT", "biogpt", remark="dropout of 0.1, switched off"),
    Family("DBRX", "dbrx", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "attn_config": {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}}, rm="no DbrxForSequenceClassification", remark="experts"),
    Family("DeepSeek-V2", "deepseek_v2", {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2} | MOE, remark="experts: `lora_target: all` means them too, by PEFT's renaming"),
    Family("DeepSeek-V3", "deepseek_v3", {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2} | MOE, remark="as DeepSeek-V2"),
    Family("GPT-OSS", "gpt_oss", {"num_local_experts": 4, "sliding_window": 4} | MOE, remark="experts, attention sinks"),
    Family("MiniMax", "minimax", {"num_local_experts": 4, "layer_types": ["full_attention", "linear_attention"], "block_size": 8} | MOE, remark="experts, linear attention"),
    Family("Mamba", "mamba", {"state_size": 4}, rm="no MambaForSequenceClassification", dpo="incompatible with Mamba-based models", remark="recurrent; PEFT has no LoRA for its mixers"),
    Family("Mamba 2", "mamba2", {"state_size": 4, "num_heads": 4, "n_groups": 1, "expand": 2, "chunk_size": 8}, rm="no Mamba2ForSequenceClassification", dpo="incompatible with Mamba-based models", remark="as Mamba"),
    Family("RWKV", "rwkv", {"attention_hidden_size": 16, "context_length": 64}, rm="no RwkvForSequenceClassification", remark="recurrent"),
    Family("RecurrentGemma", "recurrent_gemma", {"lru_width": 16, "attention_window_size": 4, "block_types": ["recurrent", "attention"]}, rm="no RecurrentGemmaForSequenceClassification", remark="recurrent; capped logits"),
    Family("Jamba", "jamba", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False} | MOE, remark="recurrent layers, experts"),
    Family("Bamba", "bamba", {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8}, rm="no BambaForSequenceClassification", remark="recurrent layers"),
    Family("Falcon-H1", "falcon_h1", {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8, "mamba_d_ssm": 32, "lm_head_multiplier": 0.5}, rm="no FalconH1ForSequenceClassification", dpo="incompatible with Mamba-based models", remark="scaled logits; PEFT has no LoRA for its mixers"),
    Family("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"]}, rm="no Lfm2ForSequenceClassification", remark="convolutions"),
    Family("EXAONE 4", "exaone4", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    Family("MiniCPM 3", "minicpm3", {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2}, remark="scaled logits"),
    Family("nanochat", "nanochat", rm="no NanoChatForSequenceClassification", remark="capped logits"),
    Family("Llama 4, text", "llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 24, "attention_chunk_size": 4, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1}, rm="no Llama4TextForSequenceClassification", remark="experts, chunked attention"),
    Family("Gemma 3, text and images", "gemma3", {"text_config": {**SIZES, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4}, remark="the text model; images are not used"),
    Family("Qwen3.5", "qwen3_5_text", {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}, remark="recurrent layers"),
    Family("BERT, as a decoder", "bert", {"is_decoder": True}, rm="no linear `score`", dpo="before the output layer", remark="a transform stands before its output layer"),
    Family("Gemma 3, read both ways", "gemma3_text", {"use_bidirectional_attention": True, "layer_types": ["full_attention"] * 2}, rm="looks ahead", dpo="looks ahead", remark="as EmbeddingGemma"),
    Family("T5", "t5", {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}, rm="no linear `score`", dpo="no T5ForCausalLM", remark="an encoder and a decoder"),
    Family("RoBERTa, as a decoder", "roberta", {"is_decoder": True}, rm="no linear `score`", dpo="before the output layer", remark="as BERT"),
    Family("BART decoder", "bart", {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}, rm="no linear `score`", remark="dropout of 0.1, switched off"),
    Family("OpenAI GPT", "openai-gpt", _gpt(), remark="as GPT-2"),
]  # fmt: skip


def save(family: Family, folder: Path) -> Path:
    """A model with weights large enough that attention, positions and caps matter, and a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # what a Qwen2Tokenizer insists on
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    sizes = SIZES | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | family.more
    config = CONFIG_MAPPING[family.model_type](**{name: value for name, value in sizes.items() if value is not None})
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    model = kind.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def table() -> str:
    """The families as a table in Markdown."""
    lines = ["| family | model_type | rm | dpo | remark |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        rm, dpo = (fate if fate == RUNS else f"refused: {fate}" for fate in (family.rm, family.dpo))
        lines.append(f"| {family.name} | `{family.model_type}` | {rm} | {dpo} | {family.remark} |")
    return "\n".join(lines) + "\n"
