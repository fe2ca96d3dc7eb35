"""Reads the config.json of each family, field by field. Absent and null fields mean what they mean in transformers
5."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from isthmus.model.config import MAX_LAYERS, Activation, LatentConfig, MixtureConfig
from isthmus.model.weights.huggingface.fields import Fields
from isthmus.model.weights.huggingface.rope import Rope, deepseek_scale, read_local_and_global, read_rope

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_PHI_KINDS = ("default", "longrope")
_PHI_NAMES = {"su": "longrope", "yarn": "longrope"}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The rope of a file without rope_parameters."""


def _common(
    fields: Fields,
    *,
    context: int,
    eps: float,
    rope: Callable[[Fields, int], Rope] = read_rope,
    kv_heads: int | None = None,
    kv_null: bool = False,
    head_dim: int | None = None,
    head_dim_null: bool = False,
    activation: str = "hidden_act",
    tied: bool = False,
) -> dict[str, Any]:
    """Reads the fields that all families have.

    context, eps, kv_heads, head_dim, tied: what an absent field means. A kv_heads of None means as many as query heads,
    and a head_dim of None means hidden_size / num_attention_heads. kv_null, head_dim_null: whether null in the file
    means the same as None here; otherwise null is an error. activation: the name of the field with the activation.
    """
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    per_head = dim // heads
    size = fields.integer("head_dim", head_dim or per_head, **({"null": per_head} if head_dim_null else {}))
    groups = fields.integer("num_key_value_heads", kv_heads or heads, **({"null": heads} if kv_null else {}))
    fields.agrees("num_key_value_groups", heads // groups, "num_attention_heads / num_key_value_heads")
    length = fields.integer("max_position_embeddings", context)
    ropes = rope(fields, length)
    rotary = int(size * ropes.rotary)
    name = fields.raw(activation, "gelu_pytorch_tanh" if activation == "hidden_activation" else "silu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise fields.error(activation, f"is none of {', '.join(_ACTIVATIONS)}")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "dim": dim,
        "layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "heads": heads,
        "kv_heads": groups,
        "head_dim": size,
        "mlp_dim": fields.integer("intermediate_size"),
        "context_length": ropes.context(length),
        "rope_theta": ropes.theta,
        "rope_scaling": ropes.scaling,
        "rotary_dim": 0 if rotary == size else rotary,
        "norm_eps": fields.number("rms_norm_eps", eps),
        "tie_embeddings": fields.flag("tie_word_embeddings", tied),
        "activation": _ACTIVATIONS[name],
    }


def _rope(**options: Any) -> Callable[[Fields, int], Rope]:
    return lambda fields, context: read_rope(fields, context, **options)


def _renamed(fields: Fields, name: str, other: str, default: int) -> int:
    """Reads a field with a second name, which takes precedence, as it does in transformers."""
    fields.raw(name, None)
    return fields.integer(other if other in fields else name, default)


def _windows(fields: Fields, layers: int, default: Callable[[int], bool], window: int | None) -> tuple[int, ...]:
    """The shortest pattern of the layers' windows, where 0 means no window. `layer_types` says which layers have one;
    where it is absent, `default(layer)` does."""
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
    """The shortest pattern whose repetition gives this one."""
    lengths = range(1, len(pattern) + 1)
    return next(pattern[:n] for n in lengths if all(pattern[i] == pattern[i % n] for i in range(len(pattern))))


def _window(fields: Fields, default: int | None = None) -> int | None:
    return None if fields.raw("sliding_window", default) is None else fields.integer("sliding_window", default)


def llama(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return {
        **_common(fields, context=2048, eps=1e-6, kv_null=True, head_dim_null=True),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": fields.flag("mlp_bias", False),
    }


def mistral(fields: Fields) -> dict[str, Any]:
    common = _common(fields, context=131072, eps=1e-6, kv_heads=8, head_dim_null=True)
    return {**common, "windows": (_window(fields, 4096) or 0,)}


def mixtral(fields: Fields) -> dict[str, Any]:
    common = _common(fields, context=131072, eps=1e-5, kv_heads=8, head_dim_null=True, rope=_rope(theta=1e6))
    mixture = MixtureConfig(
        experts=_renamed(fields, "num_local_experts", "num_experts", 8),
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


def qwen2(fields: Fields) -> dict[str, Any]:
    common = _common(fields, context=32768, eps=1e-6, kv_heads=32, kv_null=True)
    return {**common, "attention_bias": True, "windows": _qwen_windows(fields, common["layers"])}


def qwen3(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    common = _common(fields, context=32768, eps=1e-6, kv_heads=32, kv_null=True, head_dim=128)
    windows = _qwen_windows(fields, common["layers"])
    return {**common, "qk_norm": "head", "attention_bias": bias, "attention_out_bias": bias, "windows": windows}


def qwen3_moe(fields: Fields) -> dict[str, Any]:
    common = _common(fields, context=32768, eps=1e-6, kv_heads=4)
    layers, bias = common["layers"], fields.flag("attention_bias", False)
    # transformers gives every layer the window in this family. max_window_layers has no effect in published files, and
    # sliding_window has none without use_sliding_window.
    fields.raw("max_window_layers", None)
    fields.raw("sliding_window", None)
    window = _window(fields, 4096) if fields.flag("use_sliding_window", False) else None
    step = fields.integer("decoder_sparse_step", 1)
    dense = set(fields.integers("mlp_only_layers", (), null=())) | {i for i in range(layers) if (i + 1) % step}
    mixture = MixtureConfig(
        experts=_renamed(fields, "num_experts", "num_local_experts", 128),
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
    bias = fields.flag("attention_bias", False)
    fields.raw("hidden_act", None)  # published beside hidden_activation, and never used
    fields.among("use_bidirectional_attention", (False, None), False)
    return {
        **common,
        "norm_placement": "both",
        "norm_offset": 1.0,
        "embedding_scale": math.sqrt(common["dim"]),
        "attention_scale": float(fields.integer("query_pre_attn_scalar", 256)) ** -0.5,
        "attention_bias": bias,
        "attention_out_bias": bias,
    }


def gemma2(fields: Fields) -> dict[str, Any]:
    common = _common(
        fields, context=8192, eps=1e-6, kv_heads=4, head_dim=256, activation="hidden_activation", tied=True
    )
    return {
        **_gemma(fields, common),
        "windows": _windows(fields, common["layers"], lambda layer: layer % 2 == 0, _window(fields, 4096)),
        "attention_soft_cap": fields.number("attn_logit_softcapping", 50.0, null=0.0),
        "logit_soft_cap": fields.number("final_logit_softcapping", 30.0, null=0.0),
    }


def gemma3(fields: Fields) -> dict[str, Any]:
    context = fields.integer("max_position_embeddings", 131072)
    local, full = read_local_and_global(fields, context)
    common = _common(
        fields,
        context=131072,
        eps=1e-6,
        rope=lambda fields, context: full,
        kv_heads=4,
        head_dim=256,
        activation="hidden_activation",
        tied=True,
    )
    layers = common["layers"]
    named = fields.raw("layer_types", None) is not None
    pattern = 6 if named else fields.integer("sliding_window_pattern", 6)
    fields.raw("sliding_window_pattern", None)
    return {
        **_gemma(fields, common),
        "local_rope_theta": local,
        "qk_norm": "head",
        "windows": _windows(fields, layers, lambda layer: (layer + 1) % pattern != 0, _window(fields, 4096)),
        "attention_soft_cap": fields.number("attn_logit_softcapping", 0.0, null=0.0),
        "logit_soft_cap": fields.number("final_logit_softcapping", 0.0, null=0.0),
    }


def phi3(fields: Fields) -> dict[str, Any]:
    rope = _rope(partial=True, kinds=_PHI_KINDS, old_names=_PHI_NAMES, original=4096)
    common = _common(fields, context=4096, eps=1e-5, kv_null=True, rope=rope)
    return {**common, "windows": (_window(fields) or 0,)}


def olmo2(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return {
        **_common(fields, context=2048, eps=1e-5, kv_null=True),
        "norm_placement": "post",
        "qk_norm": "projection",
        "attention_bias": bias,
        "attention_out_bias": bias,
    }


def smollm3(fields: Fields) -> dict[str, Any]:
    common = _common(fields, context=32768, eps=1e-6, kv_heads=4, kv_null=True, rope=_rope(theta=2e6), tied=True)
    layers, bias = common["layers"], fields.flag("attention_bias", False)
    interval = fields.integer("no_rope_layer_interval", 4)
    default = tuple(int((layer + 1) % interval != 0) for layer in range(layers))
    turns = fields.integers("no_rope_layers", default, null=default)
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


def gpt_oss(fields: Fields) -> dict[str, Any]:
    rope = _rope(theta=150000.0, default=_GPT_OSS_ROPE)
    common = _common(fields, context=131072, eps=1e-5, kv_heads=8, head_dim=64, rope=rope)
    bias = fields.flag("attention_bias", True)
    per_token = fields.integer("num_experts_per_tok", 4)
    fields.agrees("experts_per_token", per_token, "num_experts_per_tok")
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
            experts=_renamed(fields, "num_local_experts", "num_experts", 128),
            per_token=per_token,
            dim=common["mlp_dim"],
            router_bias=True,
        ),
    }


def _deepseek(fields: Fields, context: int, kv_heads: int | None = None) -> dict[str, Any]:
    """Reads the fields that V2 and V3 share."""
    latent = LatentConfig(
        rank=fields.integer("kv_lora_rank", 512),
        query_rank=0 if fields.raw("q_lora_rank", 1536) is None else fields.integer("q_lora_rank", 1536),
        rope_dim=fields.integer("qk_rope_head_dim", 64),
        nope_dim=fields.integer("qk_nope_head_dim", 128),
        value_dim=fields.integer("v_head_dim", 128),
    )
    ropes: list[Rope] = []

    def rope(fields: Fields, context: int) -> Rope:
        ropes.append(read_rope(fields, context))
        return ropes[0]

    fields.agrees("qk_head_dim", latent.nope_dim + latent.rope_dim, "qk_nope_head_dim + qk_rope_head_dim")
    # transformers writes the rotary part's size to head_dim, and doesn't read it
    common = _common(fields.without("head_dim"), context=context, eps=1e-6, kv_heads=kv_heads, kv_null=True, rope=rope)
    if common["kv_heads"] != common["heads"]:
        raise fields.error("num_key_value_heads", "must be num_attention_heads in this family")
    fields.among("attention_bias", (False,), False)
    fields.among("moe_layer_freq", (1,), 1)
    for training_only in ("aux_loss_alpha", "seq_aux", "ep_size", "num_mtp_layers", "num_nextn_predict_layers"):
        fields.raw(training_only, None)
    return {
        **common,
        "kv_heads": 1,
        "head_dim": latent.rank + latent.rope_dim,
        "rotary_dim": 0,
        "attention_scale": deepseek_scale(ropes[0], latent.nope_dim + latent.rope_dim),
        "latent": latent,
    }


def _deepseek_mixture(fields: Fields, layers: int, *, shared: int, dense: int, **routing: Any) -> MixtureConfig:
    """shared, dense: what an absent n_shared_experts and an absent first_k_dense_replace mean. routing: other fields of
    MixtureConfig."""
    width = routing["dim"]
    return MixtureConfig(
        shared_dim=width * fields.integer("n_shared_experts", shared, low=0),
        dense_layers=tuple(range(min(fields.integer("first_k_dense_replace", dense, low=0), layers))),
        **routing,
    )


def deepseek_v2(fields: Fields) -> dict[str, Any]:
    common = _deepseek(fields, 2048)
    method = fields.among("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    fields.among("scoring_func", ("softmax",), "softmax")
    fields.among("norm_topk_prob", (False, None), False)
    limited = method == "group_limited_greedy"
    for name in ("n_group", "topk_group"):
        fields.raw(name, None)
    groups = {"groups": fields.integer("n_group"), "groups_per_token": fields.integer("topk_group")} if limited else {}
    mixture = _deepseek_mixture(
        fields,
        common["layers"],
        shared=2,
        dense=0,
        experts=_renamed(fields, "n_routed_experts", "num_experts", 64),
        per_token=fields.integer("num_experts_per_tok"),
        dim=fields.integer("moe_intermediate_size", 1407),
        scale=fields.number("routed_scaling_factor", 1.0),
        normalize=False,
        **groups,
    )
    return {**common, "mlp_bias": fields.among("mlp_bias", (False,), False), "mixture": mixture}


def deepseek_v3(fields: Fields) -> dict[str, Any]:
    common = _deepseek(fields, 4096, kv_heads=128)
    fields.among("topk_method", ("noaux_tc",), "noaux_tc")
    fields.among("scoring_func", ("sigmoid",), "sigmoid")
    fields.among("rope_interleave", (True,), True)
    mixture = _deepseek_mixture(
        fields,
        common["layers"],
        shared=1,
        dense=3,
        experts=_renamed(fields, "n_routed_experts", "num_local_experts", 256),
        per_token=fields.integer("num_experts_per_tok", 8),
        dim=fields.integer("moe_intermediate_size", 2048),
        scale=fields.number("routed_scaling_factor", 2.5),
        scores="sigmoid",
        correction=True,
        normalize=fields.flag("norm_topk_prob", True, null=False),
        groups=fields.integer("n_group", 8),
        groups_per_token=fields.integer("topk_group", 4),
        group_score="top2",
    )
    return {**common, "mixture": mixture}
