"""The families: from a published config.json to ModelConfig. One network computes them all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import Activation, ConfigError, LatentConfig, MixtureConfig, ModelConfig
from model.huggingface import tensors
from model.huggingface.fields import Fields, deepseek_scale, read_rope, read_scaling

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class Family:
    """One `model_type`."""

    architecture: str
    read: Callable[[Fields], dict[str, Any]]
    """The fields of ModelConfig"""
    table: Callable[[ModelConfig], tensors.Table]
    """Where its parameters lie"""


def read_config(path: Path) -> tuple[Family, ModelConfig]:
    """Reads a published config.json. Raises ConfigError for an architecture that isn't known, or a field of one that is
    and that would not be honoured."""
    return read_fields(Fields.load(path))


def read_fields(fields: Fields) -> tuple[Family, ModelConfig]:
    """As read_config."""
    model_type = fields.raw("model_type", None)
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise fields.error("model_type", f"is none of the known families: {', '.join(FAMILIES)}")
    fields.among("architectures", ([family.architecture], None), None)
    config = ModelConfig(**family.read(fields))
    fields.finish()
    try:
        config.validate()
    except ConfigError as error:
        raise ConfigError(f"{fields.path}: {error}") from None
    return family, config


def _common(fields: Fields, *, context: int, eps: float, tied: bool = False, theta: float = 10000.0) -> dict[str, Any]:
    """What all families have; the arguments are what transformers takes for a field that is absent."""
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", dim // heads)
    length = fields.integer("max_position_embeddings", context)
    rotary = int(head_dim * _partial_rotary(fields))
    rope_theta, scaling = read_rope(fields, length, theta=theta)
    activation = fields.raw("hidden_activation", fields.raw("hidden_act", "silu"))
    if activation not in _ACTIVATIONS:
        raise fields.error("hidden_act", f"is none of {', '.join(_ACTIVATIONS)}")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "dim": dim,
        "layers": fields.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "mlp_dim": fields.integer("intermediate_size"),
        "context_length": length,
        "rope_theta": rope_theta,
        "rope_scaling": scaling,
        "rotary_dim": 0 if rotary == head_dim else rotary,
        "norm_eps": fields.number("rms_norm_eps", eps),
        "tie_embeddings": fields.flag("tie_word_embeddings", tied),
        "activation": _ACTIVATIONS[activation],
    }


def _partial_rotary(fields: Fields) -> float:
    beside = fields.raw("partial_rotary_factor", 1.0)
    inside = fields.raw("rope_parameters", None)
    value = inside.get("partial_rotary_factor", beside) if isinstance(inside, dict) else beside
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise fields.error("partial_rotary_factor", "must be above 0 and at most 1")
    return float(value)


def _windows(fields: Fields, layers: int, default: Callable[[int], bool], window: int | None) -> tuple[int, ...]:
    """The window of each layer, from `layer_types` or, where that is absent, `default(layer)`."""
    types = fields.raw("layer_types", None)
    if types is None:
        local = [default(layer) for layer in range(layers)]
    else:
        known = {"sliding_attention": True, "full_attention": False}
        if (
            not isinstance(types, list)
            or len(types) != layers
            or not all(isinstance(t, str) and t in known for t in types)
        ):
            raise fields.error("layer_types", f"must name one of {', '.join(known)} for each of the {layers} layers")
        local = [known[name] for name in types]
    if any(local) and window is None:
        raise fields.error("sliding_window", "must be a whole number: some layers have a window")
    return _shortest(tuple((window or 0) if is_local else 0 for is_local in local))


def _shortest(pattern: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shortest pattern that repeats into this one."""
    lengths = range(1, len(pattern) + 1)
    return next(pattern[:n] for n in lengths if all(pattern[i] == pattern[i % n] for i in range(len(pattern))))


def _window(fields: Fields, default: int | None = None) -> int | None:
    value = fields.raw("sliding_window", default)
    return None if value is None else fields.integer("sliding_window", default)


def _llama(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return {
        **_common(fields, context=2048, eps=1e-6),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": fields.flag("mlp_bias", False),
    }


def _mistral(fields: Fields) -> dict[str, Any]:
    common = _common(fields, context=131072, eps=1e-6)
    return {**common, "windows": (_window(fields, 4096) or 0,)}


def _mixtral(fields: Fields) -> dict[str, Any]:
    common = _common(fields, context=131072, eps=1e-5, theta=1e6)
    mixture = MixtureConfig(
        experts=fields.integer("num_local_experts", 8),
        per_token=fields.integer("num_experts_per_tok", 2),
        dim=common["mlp_dim"],
    )
    return {**common, "windows": (_window(fields) or 0,), "mixture": mixture}


def _qwen_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    first = fields.integer("max_window_layers", 28, low=0)
    used = fields.flag("use_sliding_window", False)
    window = _window(fields, 4096)
    return _windows(
        fields, layers, lambda layer: used and window is not None and layer >= first, window if used else None
    )


def _qwen2(fields: Fields) -> dict[str, Any]:
    common = _common(fields, context=32768, eps=1e-6)
    return {**common, "attention_bias": True, "windows": _qwen_windows(fields, common["layers"])}


def _qwen3(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    common = _common(_with_default(fields, "head_dim", 128), context=32768, eps=1e-6)
    windows = _qwen_windows(fields, common["layers"])
    return {**common, "qk_norm": "head", "attention_bias": bias, "attention_out_bias": bias, "windows": windows}


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    common = _common(fields, context=32768, eps=1e-6)
    layers, bias = common["layers"], fields.flag("attention_bias", False)
    # transformers gives every layer the window here; max_window_layers has no effect where it is published, and
    # sliding_window none without use_sliding_window.
    fields.raw("max_window_layers", None)
    fields.raw("sliding_window", None)
    window = _window(fields, 4096) if fields.flag("use_sliding_window", False) else None
    step = fields.integer("decoder_sparse_step", 1)
    dense = set(fields.integers("mlp_only_layers", ())) | {i for i in range(layers) if (i + 1) % step}
    experts = fields.integer("num_local_experts", None) if "num_local_experts" in fields else None
    mixture = MixtureConfig(
        experts=fields.integer("num_experts", experts or 128),
        per_token=fields.integer("num_experts_per_tok", 8),
        dim=fields.integer("moe_intermediate_size", 768),
        dense_layers=tuple(sorted(dense)),
        normalize=fields.flag("norm_topk_prob", False),
    )
    return {
        **common,
        "qk_norm": "head",
        "attention_bias": bias,
        "attention_out_bias": bias,
        "windows": (window or 0,),
        "mixture": mixture,
    }


def _gemma(fields: Fields, common: dict[str, Any]) -> dict[str, Any]:
    scalar = fields.number("query_pre_attn_scalar", 256)
    bias = fields.flag("attention_bias", False)
    return {
        **common,
        "norm_placement": "both",
        "norm_offset": 1.0,
        "embedding_scale": math.sqrt(common["dim"]),
        "attention_scale": scalar**-0.5,
        "attention_bias": bias,
        "attention_out_bias": bias,
    }


def _gemma2(fields: Fields) -> dict[str, Any]:
    fields = _with_default(_with_default(fields, "head_dim", 256), "hidden_activation", "gelu_pytorch_tanh")
    common = _common(fields, context=8192, eps=1e-6, tied=True)
    return {
        **_gemma(fields, common),
        "windows": _windows(fields, common["layers"], lambda layer: layer % 2 == 0, _window(fields, 4096)),
        "attention_soft_cap": fields.number(
            "attn_logit_softcapping", 0.0 if "attn_logit_softcapping" in fields else 50.0
        ),
        "logit_soft_cap": fields.number(
            "final_logit_softcapping", 0.0 if "final_logit_softcapping" in fields else 30.0
        ),
    }


def _gemma3(fields: Fields) -> dict[str, Any]:
    fields = _with_default(_with_default(fields, "head_dim", 256), "hidden_activation", "gelu_pytorch_tanh")
    local, full = _gemma3_ropes(fields)
    context = fields.integer("max_position_embeddings", 131072)
    theta = full.number("rope_theta", 1e6)
    scaling = read_scaling(full, context)
    full.finish()
    common = _common(
        fields.with_values({"rope_parameters": None, "rope_scaling": None, "rope_theta": None}),
        context=131072,
        eps=1e-6,
        tied=True,
    )
    fields.raw("_sliding_window_pattern", None)
    pattern = fields.integer("sliding_window_pattern", 6)
    return {
        **_gemma(fields, common),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "local_rope_theta": local,
        "qk_norm": "head",
        "windows": _windows(fields, common["layers"], lambda layer: (layer + 1) % pattern != 0, _window(fields, 4096)),
        "attention_soft_cap": fields.number("attn_logit_softcapping", 0.0),
        "logit_soft_cap": fields.number("final_logit_softcapping", 0.0),
    }


def _gemma3_ropes(fields: Fields) -> tuple[float, Fields]:
    """The base of layers with a window, which are never scaled, and the rope of the others."""
    old_local = fields.number("rope_local_base_freq", 10000.0)
    old_theta, old_scaling = fields.raw("rope_theta", 1e6), fields.raw("rope_scaling", None)
    if "rope_parameters" not in fields:
        scaling = fields.inner("rope_scaling") if old_scaling else Fields({}, Path("config.json"))
        return old_local, scaling.with_values({"rope_theta": old_theta})
    both = fields.inner("rope_parameters")
    local, full = both.inner("sliding_attention"), both.inner("full_attention")
    both.finish()
    local.among("rope_type", ("default",), "default")
    theta = local.number("rope_theta", old_local)
    local.finish()
    return theta, full


def _phi3(fields: Fields) -> dict[str, Any]:
    common = _common(fields, context=4096, eps=1e-5)
    return {**common, "windows": (_window(fields) or 0,)}


def _olmo2(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return {
        **_common(fields, context=2048, eps=1e-5),
        "norm_placement": "post",
        "qk_norm": "projection",
        "attention_bias": bias,
        "attention_out_bias": bias,
    }


def _smollm3(fields: Fields) -> dict[str, Any]:
    common = _common(fields, context=32768, eps=1e-6, tied=True, theta=2e6)
    layers, bias = common["layers"], fields.flag("attention_bias", False)
    interval = fields.integer("no_rope_layer_interval", 4)
    turns = fields.integers("no_rope_layers", tuple(int((layer + 1) % interval != 0) for layer in range(layers)))
    if len(turns) != layers or not set(turns) <= {0, 1}:
        raise fields.error("no_rope_layers", f"must hold 0 or 1 for each of the {layers} layers")
    used, window = fields.flag("use_sliding_window", False), _window(fields)
    fields.raw("max_window_layers", None)
    local = _windows(
        fields, layers, lambda layer: used and window is not None and not turns[layer], window if used else None
    )
    return {
        **common,
        "rope_pattern": _shortest(tuple(map(bool, turns))),
        "windows": local,
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": fields.flag("mlp_bias", False),
    }


def _gpt_oss(fields: Fields) -> dict[str, Any]:
    fields = _with_default(fields, "head_dim", 64)
    common = _common(fields, context=131072, eps=1e-5, theta=150000.0)
    bias = fields.flag("attention_bias", True)
    per_token = fields.integer("num_experts_per_tok", fields.raw("experts_per_token", 4))
    fields.raw("initial_context_length", None)
    fields.among("swiglu_alpha", (1.702,), 1.702)
    return {
        **common,
        "activation": "clamped_swiglu",
        "activation_limit": fields.number("swiglu_limit", 7.0),
        "attention_sinks": True,
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": True,
        "windows": _windows(fields, common["layers"], lambda layer: layer % 2 == 0, _window(fields, 128)),
        "mixture": MixtureConfig(
            experts=fields.integer("num_local_experts", 128),
            per_token=per_token,
            dim=common["mlp_dim"],
            router_bias=True,
        ),
    }


def _deepseek(fields: Fields) -> dict[str, Any]:
    """What V2 and V3 share."""
    fields.raw("head_dim", None)  # transformers writes the rotary part's size there
    fields.raw("qk_head_dim", None)
    query_rank = fields.raw("q_lora_rank", 1536)
    latent = LatentConfig(
        rank=fields.integer("kv_lora_rank", 512),
        query_rank=fields.integer("q_lora_rank", 1536) if query_rank is not None else 0,
        rope_dim=fields.integer("qk_rope_head_dim", 64),
        nope_dim=fields.integer("qk_nope_head_dim", 128),
        value_dim=fields.integer("v_head_dim", 128),
    )
    scale = deepseek_scale(fields.inner("rope_parameters" if "rope_parameters" in fields else "rope_scaling"),
                           latent.nope_dim + latent.rope_dim)  # fmt: skip
    common = _common(_with_value(fields, "head_dim", latent.rope_dim), context=2048, eps=1e-6)
    fields.among("attention_bias", (False,), False)
    fields.among("moe_layer_freq", (1,), 1)
    for training_only in ("aux_loss_alpha", "seq_aux", "ep_size", "num_mtp_layers", "num_nextn_predict_layers"):
        fields.raw(training_only, None)
    return {
        **common,
        "kv_heads": 1,
        "head_dim": latent.rank + latent.rope_dim,
        "rotary_dim": 0,
        "attention_scale": scale,
        "latent": latent,
    }


def _deepseek_mixture(fields: Fields, layers: int, dense: int, **routing: Any) -> MixtureConfig:
    width = fields.integer("moe_intermediate_size", 2048)
    shared = fields.raw("n_shared_experts", 1)
    return MixtureConfig(
        experts=fields.integer("n_routed_experts", 256),
        per_token=fields.integer("num_experts_per_tok", 8),
        dim=width,
        shared_dim=width * (fields.integer("n_shared_experts", 1) if shared else 0),
        dense_layers=tuple(range(min(fields.integer("first_k_dense_replace", dense, low=0), layers))),
        scale=fields.number("routed_scaling_factor", 1.0),
        **routing,
    )


def _deepseek_v2(fields: Fields) -> dict[str, Any]:
    common = _deepseek(fields)
    method = fields.among("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    fields.among("scoring_func", ("softmax",), "softmax")
    fields.among("norm_topk_prob", (False, None), False)
    groups = {"groups": fields.integer("n_group", 1), "groups_per_token": fields.integer("topk_group", 1)}
    routing = groups if method == "group_limited_greedy" else {}
    mixture = _deepseek_mixture(fields, common["layers"], 0, normalize=False, **routing)
    return {**common, "mlp_bias": fields.among("mlp_bias", (False,), False), "mixture": mixture}


def _deepseek_v3(fields: Fields) -> dict[str, Any]:
    common = _deepseek(fields)
    fields.among("topk_method", ("noaux_tc",), "noaux_tc")
    fields.among("scoring_func", ("sigmoid",), "sigmoid")
    fields.among("rope_interleave", (True,), True)
    mixture = _deepseek_mixture(
        fields,
        common["layers"],
        3,
        scores="sigmoid",
        correction=True,
        normalize=fields.flag("norm_topk_prob", True),
        groups=fields.integer("n_group", 8),
        groups_per_token=fields.integer("topk_group", 4),
        group_score="top2",
    )
    return {**common, "mixture": mixture}


def _named(table: tensors.Table) -> Callable[[ModelConfig], tensors.Table]:
    return lambda config: table


def _deepseek_table(config: ModelConfig) -> tensors.Table:
    return tensors.DEEPSEEK if config.latent.query_rank else tensors.DEEPSEEK_WHOLE_QUERY


def _with_default(fields: Fields, name: str, value: Any) -> Fields:
    return fields if fields.raw(name, None) is not None else _with_value(fields, name, value)


def _with_value(fields: Fields, name: str, value: Any) -> Fields:
    return fields.with_values({name: value})


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama, _named(tensors.LLAMA)),
    "mistral": Family("MistralForCausalLM", _mistral, _named(tensors.LLAMA)),
    "mixtral": Family("MixtralForCausalLM", _mixtral, _named(tensors.MIXTRAL)),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _named(tensors.LLAMA)),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _named(tensors.LLAMA)),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, _named(tensors.QWEN3_MOE)),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, _named(tensors.GEMMA)),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, _named(tensors.GEMMA)),
    "phi3": Family("Phi3ForCausalLM", _phi3, _named(tensors.PHI3)),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, _named(tensors.OLMO2)),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3, _named(tensors.LLAMA)),
    "gpt_oss": Family("GptOssForCausalLM", _gpt_oss, _named(tensors.GPT_OSS)),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _deepseek_v2, _deepseek_table),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _deepseek_v3, _deepseek_table),
}
"""By `model_type` of config.json."""
