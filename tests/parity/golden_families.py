"""The families of the golden files: a tiny configuration of each, with everything on that is peculiar to it.

Sizes differ from each other wherever the architecture lets them, so that a swapped axis can't pass. Windows, original
rope lengths and periods of layer kinds are short, so that 60 tokens and 4 to 7 layers go past them and leave a rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB = 96
FIRST_TOKEN = 3
"""Tokens are drawn from here up: torch gives an embedding's padding row no gradient."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 150.0,
    "factor": 4.0,
    "beta_fast": 1.5,
    "beta_slow": 0.25,
    "original_max_position_embeddings": 24,
}


@dataclass(frozen=True)
class Family:
    """A family's config class, model class and sizes; `published` holds config.json keys before transformers 5."""

    config: str
    model: str
    sizes: dict[str, Any]
    published: dict[str, Any] = field(default_factory=dict)


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **scaling}


def _longrope(size: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.0625 * i for i in range(size)],
        "long_factor": [1.5 + i for i in range(size)],
        "original_max_position_embeddings": 24,
        **more,
    }


LLAMA = ("LlamaConfig", "LlamaForCausalLM")
MISTRAL = ("MistralConfig", "MistralForCausalLM")
QWEN2 = ("Qwen2Config", "Qwen2ForCausalLM")
PHI3 = ("Phi3Config", "Phi3ForCausalLM")

FAMILIES: dict[str, Family] = {
    "llama2": Family(*LLAMA, {"rope_parameters": _rope(10000.0)}, {"pretraining_tp": 1}),
    "llama3": Family(
        *LLAMA,
        {
            "head_dim": 12,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 2000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        {"pretraining_tp": 1},
    ),
    "llama_yarn": Family(*LLAMA, {"head_dim": 12, "rope_parameters": YARN}),
    "llama_linear": Family(
        *LLAMA,
        {
            "head_dim": 16,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": _rope(10000.0, rope_type="linear", factor=4.0),
        },
    ),
    "mistral": Family(*MISTRAL, {"sliding_window": 8, "rope_parameters": _rope(10000.0)}),
    "mistral_nemo": Family(*MISTRAL, {"head_dim": 12, "sliding_window": None, "rope_parameters": _rope(1000000.0)}),
    "mixtral": Family(
        "MixtralConfig",
        "MixtralForCausalLM",
        {
            "intermediate_size": 28,
            "num_hidden_layers": 4,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "rope_parameters": _rope(1000000.0),
        },
    ),
    "qwen2": Family(
        *QWEN2,
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            "max_window_layers": 2,
            "rope_parameters": _rope(1000000.0),
        },
        {"sliding_window": 8},
    ),
    "qwen2_window": Family(
        *QWEN2,
        {
            "rms_norm_eps": 1e-6,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
            "rope_parameters": YARN,
        },
    ),
    "qwen3": Family(
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {"head_dim": 12, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_parameters": _rope(1000000.0)},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 12,
            "rms_norm_eps": 1e-6,
            "num_hidden_layers": 4,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
            "rope_parameters": _rope(1000000.0),
        },
    ),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 12,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "sliding_window": 8,
            "query_pre_attn_scalar": 18,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "rope_parameters": _rope(10000.0),
        },
        {"hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 12,
            "num_hidden_layers": 7,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "sliding_window": 8,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 18,
            "rope_parameters": {
                "sliding_attention": _rope(10000.0),
                "full_attention": _rope(1000000.0, rope_type="linear", factor=8.0),
            },
        },
    ),
    "phi3": Family(
        *PHI3,
        {
            "hidden_size": 48,
            "pad_token_id": 0,
            "sliding_window": 40,
            "original_max_position_embeddings": 24,
            "rope_parameters": _longrope(6),
        },
    ),
    "phi4": Family(
        *PHI3,
        {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "sliding_window": None,
            "original_max_position_embeddings": 24,
            "rope_parameters": _longrope(6, partial_rotary_factor=0.75),
        },
    ),
    "olmo2": Family(
        "Olmo2Config",
        "Olmo2ForCausalLM",
        {"rms_norm_eps": 1e-6, "pad_token_id": 0, "rope_parameters": _rope(500000.0)},
    ),
    "smollm3": Family(
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {
            "num_hidden_layers": 7,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "no_rope_layer_interval": 3,
            "rope_parameters": _rope(5000000.0),
        },
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "head_dim": 12,
            "intermediate_size": 28,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 8,
            "swiglu_limit": 1.5,
            "rope_parameters": {**YARN, "truncate": False},
        },
        {"experts_per_token": 3, "initial_context_length": 24},
    ),
    "deepseek_v2": Family(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 11,
            "rms_norm_eps": 1e-6,
            "moe_intermediate_size": 18,
            "n_routed_experts": 6,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "rope_parameters": {**YARN, "rope_theta": 100.0, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        {"scoring_func": "softmax", "moe_layer_freq": 1, "seq_aux": True, "aux_loss_alpha": 0.001},
    ),
    "deepseek_v2_groups": Family(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "q_lora_rank": 20,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 11,
            "rms_norm_eps": 1e-6,
            "moe_intermediate_size": 18,
            "n_routed_experts": 9,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "n_group": 3,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 16.0,
            "rope_parameters": {**YARN, "rope_theta": 100.0, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        {"scoring_func": "softmax", "moe_layer_freq": 1, "seq_aux": True, "aux_loss_alpha": 0.001},
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 20,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 11,
            "rms_norm_eps": 1e-6,
            "moe_intermediate_size": 18,
            "n_routed_experts": 9,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "n_group": 3,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**YARN, "rope_theta": 100.0, "mscale": 1.0, "mscale_all_dim": 0.8},
        },
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1},
    ),
}

_NEW_KEYS = ("rope_parameters", "dtype", "_sliding_window_pattern", "qk_head_dim", "rope_interleave", "swiglu_alpha")
_NEW_KEYS_UNLESS = {"layer_types": ("gpt_oss", "smollm3")}
_RENAMED = {"qwen3_moe": {"num_local_experts": "num_experts"}}
_SCALING_TYPE_KEY = {"llama": "rope_type", "gpt_oss": "rope_type", "gemma3_text": "rope_type"}


def published_config(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 wrote, as the family's own repository has it: the keys of transformers 4."""
    kind = config["model_type"]
    renamed = _RENAMED.get(kind, {})
    out = {
        renamed.get(key, key): value
        for key, value in config.items()
        if key not in _NEW_KEYS and not (key in _NEW_KEYS_UNLESS and kind not in _NEW_KEYS_UNLESS[key])
    }
    if kind.startswith("deepseek") or config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
        out.pop("head_dim", None)
    out |= _published_rope(kind, config) | family.published
    return dict(sorted({**out, "torch_dtype": config["dtype"], "transformers_version": "4.46.0"}.items()))


def _published_rope(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config["rope_parameters"])
    out: dict[str, Any] = {}
    if "full_attention" in rope:
        out["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    out["rope_theta"] = rope.pop("rope_theta")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        out["partial_rotary_factor"] = config["rope_parameters"]["partial_rotary_factor"]
    if "original_max_position_embeddings" in config:
        rope.pop("original_max_position_embeddings")
    rope_type = rope.pop("rope_type")
    scaling = {**rope, _SCALING_TYPE_KEY.get(kind, "type"): rope_type}
    return {**out, "rope_scaling": None if rope_type == "default" else scaling}
