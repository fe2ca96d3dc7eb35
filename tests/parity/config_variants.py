"""Changes to a published config.json that decide which model it is: old and new spellings together, nulls, gaps.

Data alone, without torch or jax: `make_config_golden.py` asks transformers what it makes of each.
"""

from __future__ import annotations

from typing import Any

ABSENT = "<absent>"
"""Instead of a value: the field is left out"""

BASES = {
    "llama": "llama2",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen2_window",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi4",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
    "gpt_oss": "gpt_oss",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
}
"""By model_type, the golden folder whose config.json is changed"""

_ROPE_FIELDS = (
    "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor",
    "original_max_position_embeddings",
)  # fmt: skip
_DEFAULT = {"rope_type": "default"}
_LINEAR = {"rope_type": "linear", "factor": 2.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 2.0,
    "beta_slow": 0.1,
}
"""Whose bounds fall between two dimensions, so that cutting them off shows"""


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


_ROPES: dict[str, dict[str, Any]] = {
    "no rope": {},
    "theta": {"rope_theta": 1e5},
    "theta null": {"rope_theta": None},
    "theta a word": {"rope_theta": "100000"},
    "theta inside": {"rope_parameters": {**_DEFAULT, "rope_theta": 1e5}},
    "theta inside alone": {"rope_parameters": {"rope_theta": 1e5}},
    "theta inside null": {"rope_parameters": {**_DEFAULT, "rope_theta": None}},
    "theta inside null, and outside": {"rope_parameters": {**_DEFAULT, "rope_theta": None}, "rope_theta": 1e5},
    "theta inside and outside": {"rope_parameters": {**_DEFAULT, "rope_theta": 2e3}, "rope_theta": 1e5},
    "theta inside, null outside": {"rope_parameters": {**_DEFAULT, "rope_theta": 1e5}, "rope_theta": None},
    "new null, theta": {"rope_parameters": None, "rope_theta": 1e5},
    "new empty, theta": {"rope_parameters": {}, "rope_theta": 1e5},
    "new without theta, theta": {"rope_parameters": _DEFAULT, "rope_theta": 1e5},
    "new without theta": {"rope_parameters": _DEFAULT},
    "new null": {"rope_parameters": None},
    "new llama3 without theta, theta": {"rope_parameters": _LLAMA3, "rope_theta": 1e5},
    "new default, old llama3": {"rope_parameters": {**_DEFAULT, "rope_theta": 2e3}, "rope_scaling": _LLAMA3},
    "new default, old llama3, theta": {"rope_parameters": _DEFAULT, "rope_scaling": _LLAMA3, "rope_theta": 1e5},
    "new llama3, old default": {"rope_parameters": {**_LLAMA3, "rope_theta": 1e5}, "rope_scaling": _DEFAULT},
    "new llama3, old null": {"rope_parameters": {**_LLAMA3, "rope_theta": 1e5}, "rope_scaling": None},
    "new llama3, old empty": {"rope_parameters": {**_LLAMA3, "rope_theta": 1e5}, "rope_scaling": {}},
    "new null, old linear": {"rope_parameters": None, "rope_scaling": _LINEAR, "rope_theta": 1e5},
    "old linear": {"rope_scaling": _LINEAR, "rope_theta": 1e5},
    "old linear, old word": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e5},
    "old linear, theta inside": {"rope_scaling": {**_LINEAR, "rope_theta": 1e5}},
    "old linear, theta inside and outside": {"rope_scaling": {**_LINEAR, "rope_theta": 2e3}, "rope_theta": 1e5},
    "old null, theta": {"rope_scaling": None, "rope_theta": 1e5},
    "two kinds": {"rope_scaling": {**_LINEAR, "type": "yarn"}, "rope_theta": 1e5},
    "kind null": {"rope_parameters": {"rope_type": None, "rope_theta": 1e5}},
    "old word null": {"rope_parameters": {"type": None, "rope_theta": 1e5}},
    "linear without a factor": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5}},
    "linear, factor null": {"rope_parameters": {**_LINEAR, "factor": None, "rope_theta": 1e5}},
    "llama3": {"rope_parameters": {**_LLAMA3, "rope_theta": 1e5}},
    "llama3 without an original length": {
        "rope_parameters": {**_without(_LLAMA3, "original_max_position_embeddings"), "rope_theta": 1e5}
    },
    "llama3, original length null": {
        "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": None, "rope_theta": 1e5}
    },
    "llama3, low factor null": {"rope_parameters": {**_LLAMA3, "low_freq_factor": None, "rope_theta": 1e5}},
    "llama3 without a high factor": {"rope_parameters": {**_without(_LLAMA3, "high_freq_factor"), "rope_theta": 1e5}},
    "yarn": {"rope_parameters": {**_YARN, "rope_theta": 1e5}},
    "yarn, old": {"rope_scaling": _YARN, "rope_theta": 1e5},
    "yarn without an original length": {
        "rope_scaling": _without(_YARN, "original_max_position_embeddings"),
        "rope_theta": 1e5,
    },
    "yarn, original length null": {
        "rope_scaling": {**_YARN, "original_max_position_embeddings": None},
        "rope_theta": 1e5,
    },
    "yarn, original length outside": {
        "rope_scaling": _without(_YARN, "original_max_position_embeddings"),
        "original_max_position_embeddings": 24,
        "rope_theta": 1e5,
    },
    "yarn, two original lengths": {
        "rope_scaling": {**_YARN, "original_max_position_embeddings": 48},
        "original_max_position_embeddings": 24,
        "rope_theta": 1e5,
    },
    "yarn, original length null outside": {
        "rope_scaling": _YARN,
        "original_max_position_embeddings": None,
        "rope_theta": 1e5,
    },
    "yarn without a factor": {"rope_scaling": _without(_YARN, "factor"), "rope_theta": 1e5},
    "yarn, factor null": {"rope_scaling": {**_YARN, "factor": None}, "rope_theta": 1e5},
    "yarn, all options null": {
        "rope_scaling": {
            **_YARN,
            **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
        },
        "rope_theta": 1e5,
    },
    "linear, original length outside": {
        "rope_scaling": _LINEAR,
        "original_max_position_embeddings": 24,
        "rope_theta": 1e5,
    },
    "default, original length outside": {"original_max_position_embeddings": 24, "rope_theta": 1e5},
    "yarn, no options": {"rope_scaling": _without(_YARN, "beta_fast", "beta_slow"), "rope_theta": 1e5},
    "yarn, truncate null": {"rope_scaling": {**_YARN, "truncate": None}, "rope_theta": 1e5},
    "yarn, truncate false": {"rope_scaling": {**_YARN, "truncate": False}, "rope_theta": 1e5},
    "yarn, mscale": {"rope_scaling": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.9}, "rope_theta": 1e5},
    "yarn, attention factor": {"rope_scaling": {**_YARN, "attention_factor": 1.5}, "rope_theta": 1e5},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_theta": 1e5},
    "su": {"rope_scaling": {"type": "su", "factor": 2.0}, "rope_theta": 1e5},
    "half rotary": {"rope_theta": 1e5, "partial_rotary_factor": 0.5},
    "half rotary inside": {"rope_parameters": {**_DEFAULT, "rope_theta": 1e5, "partial_rotary_factor": 0.5}},
    "half rotary, two words": {
        "rope_parameters": {**_DEFAULT, "rope_theta": 1e5, "partial_rotary_factor": 0.5},
        "partial_rotary_factor": 1.0,
    },
    "rotary null": {"rope_theta": 1e5, "partial_rotary_factor": None},
    "rotary null inside": {"rope_parameters": {**_DEFAULT, "rope_theta": 1e5, "partial_rotary_factor": None}},
    "rotary whole": {"rope_theta": 1e5, "partial_rotary_factor": 1.0},
}

_LOCAL = {"sliding_attention": {**_DEFAULT, "rope_theta": 2e3}, "full_attention": {**_LINEAR, "rope_theta": 1e5}}
_GEMMA_ROPES: dict[str, dict[str, Any]] = {
    "both": {"rope_parameters": _LOCAL},
    "both, old thetas": {"rope_parameters": _LOCAL, "rope_theta": 5e5, "rope_local_base_freq": 7e3},
    "both without thetas, old thetas": {
        "rope_parameters": {"sliding_attention": _DEFAULT, "full_attention": _LINEAR},
        "rope_theta": 5e5,
        "rope_local_base_freq": 7e3,
    },
    "both without thetas": {"rope_parameters": {"sliding_attention": _DEFAULT, "full_attention": _LINEAR}},
    "both, old linear": {
        "rope_parameters": {"sliding_attention": _DEFAULT, "full_attention": _DEFAULT},
        "rope_scaling": _LINEAR,
        "rope_theta": 5e5,
    },
    "both, old default": {"rope_parameters": _LOCAL, "rope_scaling": _DEFAULT},
    "full alone": {"rope_parameters": {"full_attention": {**_LINEAR, "rope_theta": 1e5}}, "rope_local_base_freq": 7e3},
    "local alone": {"rope_parameters": {"sliding_attention": {**_DEFAULT, "rope_theta": 2e3}}, "rope_theta": 5e5},
    "local null": {"rope_parameters": {**_LOCAL, "sliding_attention": None}, "rope_local_base_freq": 7e3},
    "full null": {"rope_parameters": {**_LOCAL, "full_attention": None}, "rope_theta": 5e5},
    "full null, old linear": {"rope_parameters": {**_LOCAL, "full_attention": None}, "rope_scaling": _LINEAR},
    "old local theta": {"rope_local_base_freq": 7e3, "rope_theta": 5e5},
    "old local theta null": {"rope_local_base_freq": None, "rope_theta": 5e5},
    "local linear": {"rope_parameters": {**_LOCAL, "sliding_attention": {**_LINEAR, "rope_theta": 2e3}}},
    "full linear, old word": {
        "rope_parameters": {**_LOCAL, "full_attention": {"type": "linear", "factor": 2.0, "rope_theta": 1e5}}
    },
    "full llama3": {"rope_parameters": {**_LOCAL, "full_attention": {**_LLAMA3, "rope_theta": 1e5}}},
}

_PHI_FACTORS = {"short_factor": [1.0 + i / 16 for i in range(6)], "long_factor": [1.5 + i for i in range(6)]}
_PHI_ROPES: dict[str, dict[str, Any]] = {
    name: {"partial_rotary_factor": 0.75, "rope_theta": 1e5, **change}
    for name, change in {
        "three quarters": {},
        "longrope": {
            "rope_scaling": {"type": "longrope", **_PHI_FACTORS},
            "original_max_position_embeddings": 24,
        },
        "longrope, su": {"rope_scaling": {"type": "su", **_PHI_FACTORS}, "original_max_position_embeddings": 24},
        "longrope, yarn": {"rope_scaling": {"type": "yarn", **_PHI_FACTORS}, "original_max_position_embeddings": 24},
        "longrope without an original length": {"rope_scaling": {"type": "longrope", **_PHI_FACTORS}},
        "longrope, original length inside": {
            "rope_scaling": {"type": "longrope", **_PHI_FACTORS, "original_max_position_embeddings": 24}
        },
        "longrope, two original lengths": {
            "rope_scaling": {"type": "longrope", **_PHI_FACTORS, "original_max_position_embeddings": 48},
            "original_max_position_embeddings": 24,
        },
        "longrope, factor": {
            "rope_scaling": {"type": "longrope", **_PHI_FACTORS, "factor": 8.0},
            "original_max_position_embeddings": 24,
        },
        "longrope, attention factor null": {
            "rope_scaling": {"type": "longrope", **_PHI_FACTORS, "attention_factor": None, "factor": None},
            "original_max_position_embeddings": 24,
        },
        "new and old": {
            "rope_parameters": {**_DEFAULT, "rope_theta": 2e3, "partial_rotary_factor": 0.75},
            "rope_scaling": {"type": "longrope", **_PHI_FACTORS},
            "original_max_position_embeddings": 24,
        },
        "null inside": {"rope_parameters": {**_DEFAULT, "partial_rotary_factor": None}},
        "inside": {"rope_parameters": {**_DEFAULT, "partial_rotary_factor": 0.5}},
    }.items()
}

_PAIRS: dict[str, dict[str, Any]] = {
    "new activation": {"hidden_activation": "gelu_pytorch_tanh"},
    "old activation": {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": ABSENT},
    "two activations": {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "silu"},
    "new activation is null": {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
    "one key head": {"num_key_value_heads": 1},
    "two dtypes": {"torch_dtype": "bfloat16", "dtype": "float32"},
    "local experts": {"num_local_experts": 4, "num_experts": ABSENT},
    "experts": {"num_experts": 4, "num_local_experts": ABSENT},
    "two numbers of experts": {"num_experts": 4, "num_local_experts": 2},
    "experts of each token": {"num_experts_per_tok": ABSENT, "experts_per_token": 3},
    "two experts of each token": {"num_experts_per_tok": 2, "experts_per_token": 3},
    "window": {"sliding_window": 5},
    "window unused": {"sliding_window": 5, "use_sliding_window": False, "layer_types": ABSENT},
    "window used": {"sliding_window": 5, "use_sliding_window": True, "layer_types": ABSENT},
    "window used from the first": {
        "sliding_window": 5, "use_sliding_window": True, "layer_types": ABSENT, "max_window_layers": 0,
    },
    "window unused, layers named": {"sliding_window": 5, "use_sliding_window": False},
    "window null, layers named": {"sliding_window": None, "use_sliding_window": True},
    "window null, layers not named": {"sliding_window": None, "use_sliding_window": True, "layer_types": ABSENT},
    "an untied head": {"tie_word_embeddings": False},
    "a tied head": {"tie_word_embeddings": True},
    "old pattern": {"sliding_window_pattern": 2, "_sliding_window_pattern": ABSENT, "layer_types": ABSENT},
    "new pattern": {"sliding_window_pattern": ABSENT, "_sliding_window_pattern": 2, "layer_types": ABSENT},
    "two patterns": {"sliding_window_pattern": 3, "_sliding_window_pattern": 2, "layer_types": ABSENT},
    "no pattern": {"sliding_window_pattern": ABSENT, "_sliding_window_pattern": ABSENT, "layer_types": ABSENT},
    "pattern beside layers": {"sliding_window_pattern": 2},
}  # fmt: skip

_OTHER_NAMES = (
    "hidden_act", "hidden_activation", "torch_dtype", "dtype", "num_experts", "num_local_experts", "n_routed_experts",
    "sliding_window_pattern", "layer_types", "head_dim", "use_sliding_window", "max_window_layers",
    "no_rope_layers", "no_rope_layer_interval", "num_nextn_predict_layers", "quantization_config", "mlp_bias",
    "qk_head_dim", "rope_interleave", "n_group", "topk_group",
)  # fmt: skip
"""Beside those that transformers' class declares, whose null and absence are looked at too"""


def variants(model_type: str, base: dict[str, Any], declared: list[str]) -> dict[str, dict[str, Any]]:
    """Changes to `base` by name. declared: fields of transformers' class for it."""
    ropes = {**_ROPES, **(_GEMMA_ROPES if model_type == "gemma3_text" else {})}
    ropes |= _PHI_ROPES if model_type == "phi3" else {}
    found = {f"rope: {name}": {**dict.fromkeys(_ROPE_FIELDS, ABSENT), **change} for name, change in ropes.items()}
    found |= _PAIRS
    names = sorted({*base, *declared, *_OTHER_NAMES} - {"model_type", "architectures", "rope_parameters"})
    found |= {f"{name} null": {name: None} for name in names}
    found |= {f"{name} absent": {name: ABSENT} for name in names if name in base}
    return {"plain": {}, **found}


def changed(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in {**base, **change}.items() if not (isinstance(value, str) and value == ABSENT)
    }
