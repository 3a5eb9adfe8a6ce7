"""The families that are compared with transformers: what makes each tiny, and what is special about it.

Sliding windows and index sizes are shorter than the sequences of the tests, so that they matter.
"""

from typing import Any

_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_LINEAR_AND_FULL = ["linear_attention", "full_attention"] * 2

# Families call the same numbers by different names; a configuration ignores those it does not know.
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_SMALL_HEADS = {**_EXPERTS, "head_dim": 8}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": _LINEAR_AND_FULL,
    "head_dim": 8,
}
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_TEXT = {**SHAPE, "head_dim": 8}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}}
_QWEN_IDS = {
    "image_token_id": 95,
    "video_token_id": 94,
    "vision_start_token_id": 93,
    "vision_end_token_id": 92,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "layer_types": _ALTERNATING,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "layer_types": _ALTERNATING,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "final_logit_softcapping": 1.5,
        "tie_word_embeddings": True,
    },
    "phi3": {},
    "apertus": {},
    "arcee": {},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "biogpt": {"tie_word_embeddings": True},
    "bitnet": {},
    "bloom": {"n_layer": 4, "tie_word_embeddings": True},
    "codegen": {"rotary_dim": 4, "n_ctx": 128},
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"sliding_window": 6},
    "ctrl": {"dff": 48},
    "cwm": {},
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "exaone4": {"sliding_window": 6, "layer_types": _ALTERNATING},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "gemma": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt2": {"tie_word_embeddings": True},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 6},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gptj": {"rotary_dim": 4},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 2.0},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "internlm3": {},
    "jais2": {},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "minicpm3": _LATENT,
    "ministral": {"head_dim": 8, "sliding_window": 6},
    "modernbert-decoder": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 128},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 6, "layer_types": _ALTERNATING},
    "olmo_hybrid": _DELTA,
    "openai-gpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "qwen3_5_text": _DELTA,
    "recurrent_gemma": {},
    "rwkv": {},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {},
    "starcoder2": {"sliding_window": 6},
    "vaultgemma": {"head_dim": 8, "sliding_window": 6, "layer_types": _ALTERNATING},
    "xglm": {"ffn_dim": 48, "tie_word_embeddings": True},
    # transformers zeroes the embedding of the padding token while it loads; the tests' text has token 0.
    "youtu": {**_LATENT, "pad_token_id": 1},
}

EXPERTS: dict[str, dict[str, Any]] = {
    "afmoe": {**_SMALL_HEADS, "num_dense_layers": 1},
    "aria_text": {"moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_topk": 2, "head_dim": 8},
    "axk1": {**_EXPERTS, **_LATENT},
    "bailing_hybrid": {**_EXPERTS, **_LATENT},
    "cohere2_moe": {**_SMALL_HEADS, "sliding_window": 6},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "d_model": 32,
    },
    "deepseek_v2": {**_EXPERTS, **_LATENT},
    "deepseek_v3": {**_EXPERTS, **_LATENT, "n_group": 2, "topk_group": 1},
    "deepseek_v32": {
        **_EXPERTS,
        **_LATENT,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 8,
    },
    "dots1": _SMALL_HEADS,
    "ernie4_5_moe": {**_SMALL_HEADS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone_moe": _SMALL_HEADS,
    "flex_olmo": _SMALL_HEADS,
    "gemma4_text": {
        **_SMALL_HEADS,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 96,
        "num_kv_shared_layers": 0,
        "sliding_window": 6,
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "layer_types": _ALTERNATING,
    },
    "glm4_moe": _SMALL_HEADS,
    "glm4_moe_lite": {**_EXPERTS, **_LATENT},
    "gpt_oss": {**_SMALL_HEADS, "sliding_window": 6, "layer_types": _ALTERNATING},
    "granitemoe": {**_SMALL_HEADS, "residual_multiplier": 0.5},
    "granitemoehybrid": {
        **_SMALL_HEADS,
        **_MAMBA,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "granitemoeshared": {**_SMALL_HEADS, "shared_intermediate_size": 24},
    "hunyuan_v1_moe": {**_SMALL_HEADS, "moe_topk": 2},
    "hy_v3": _SMALL_HEADS,
    "laguna": _SMALL_HEADS,
    "lfm2_moe": {**_SMALL_HEADS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {**_SMALL_HEADS, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 64},
    "mellum": _SMALL_HEADS,
    "mimo_v2_flash": _SMALL_HEADS,
    "minimax": {**_SMALL_HEADS, "layer_types": _LINEAR_AND_FULL},
    "minimax_m2": _SMALL_HEADS,
    "mixtral": {**_SMALL_HEADS, "sliding_window": 6},
    "nemotron_h": {
        **_SMALL_HEADS,
        "hybrid_override_pattern": "M-*E",
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 24,
    },
    "olmoe": _SMALL_HEADS,
    "phimoe": _SMALL_HEADS,
    "qwen2_moe": {**_SMALL_HEADS, "mlp_only_layers": [0]},
    "qwen3_5_moe_text": {**_SMALL_HEADS, **_DELTA},
    "qwen3_moe": {**_SMALL_HEADS, "mlp_only_layers": [0], "norm_topk_prob": True},
    "qwen3_next": {**_SMALL_HEADS, **_DELTA},
    "solar_open": _SMALL_HEADS,
}

# Their text towers; images are never read.
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**_TEXT, "sliding_window": 6},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 95,
        "boi_token_index": 94,
        "eoi_token_index": 93,
    },
    "llama4": {
        "text_config": {
            **_TEXT,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 6,
        },
        "vision_config": {
            **_VISION,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        "image_token_index": 95,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": 95,
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, **_MROPE},
        "vision_config": {"depth": 4, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4},
        **_QWEN_IDS,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, **_MROPE},
        "vision_config": {**_QWEN_VISION, "depth": 4, "fullatt_block_indexes": [1]},
        **_QWEN_IDS,
    },
    "qwen3_5": {
        "text_config": {**_TEXT, **_DELTA, **_MROPE},
        "vision_config": _QWEN_VISION,
        **_QWEN_IDS,
    },
    "qwen3_vl_moe": {
        "text_config": {**_TEXT, **_EXPERTS, **_MROPE, "moe_intermediate_size": 24},
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
        **_QWEN_IDS,
    },
}

# Slow to run on a CPU (27 s for a tiny model), and so not converted by the tests.
_SLOW = ("bailing_hybrid",)
FAMILY_SETTINGS = {**DENSE, **EXPERTS, **MULTIMODAL}
# Families that tests convert as a whole.
CONVERTED = tuple(family for family in FAMILY_SETTINGS if family not in _SLOW)

# Family -> its settings, and what it is refused for.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({}, "attention is not causal"),
    "bart": ({}, "encoder-decoder"),
    "cpmant": ({}, "does not run without its blocks"),
    "falcon_mamba": ({}, "dt_proj: the linear is not called"),
    "glm_moe_dsa": (
        {**_EXPERTS, **_LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
        "block 1 is handed something that an earlier block made",
    ),
    "inkling2_text": ({**_SMALL_HEADS}, "reads the embeddings as well"),
    "jamba": ({**_EXPERTS}, "dt_proj: the linear is not called"),
    "jetmoe": ({**_EXPERTS, "kv_channels": 8}, "a 3-D weight that is not of a torch.nn.Linear"),
    "longcat_flash": ({**_EXPERTS, **_LATENT}, "one list of 4 decoder blocks"),
    "mamba": ({}, "dt_proj: the linear is not called"),
    "zaya": ({**_SMALL_HEADS, "num_experts_per_tok": 1}, "runs twice"),
}
