"""Reads the rotary embedding of a published config.json, in both spellings: `rope_parameters`, which transformers 5
writes, and the older `rope_theta`, `rope_scaling` and `partial_rotary_factor`. Together they mean what transformers 5
makes of them (RotaryEmbeddingConfigMixin in its modeling_rope_utils.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from isthmus.model.config import RopeScaling
from isthmus.model.weights.huggingface.fields import Fields

_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Rope:
    theta: float
    scaling: RopeScaling
    rotary: float = 1.0
    """The fraction of each head that is rotated"""
    mscale_all: float = 0.0
    """YaRN's mscale_all_dim, by which DeepSeek corrects the softmax temperature in its scores; 0 means no correction"""

    def context(self, published: int) -> int:
        """The most tokens of a sequence: `max_position_embeddings`, or the length to which YaRN stretches the original
        one where that is more. Users who turn on YaRN by hand, as Qwen's makers describe, leave max_position_embeddings
        at the length without YaRN."""
        if self.scaling.kind != "yarn":
            return published
        return max(published, int(min(self.scaling.original_context * self.scaling.factor, (1 << 31) - 1)))


def read_rope(
    fields: Fields,
    context: int,
    *,
    theta: float = 10000.0,
    partial: bool = False,
    default: Mapping[str, Any] | None = None,
    kinds: tuple[str, ...] = _KINDS,
    old_names: Mapping[str, str] = MappingProxyType({}),
    original: int | None = None,
) -> Rope:
    """Reads a rope that all layers share.

    context: max_position_embeddings. theta, default: the base and the parameters of a file without any. partial:
    whether the family can rotate a part of each head. kinds: the kinds of scaling that the family knows. old_names:
    older names of these. original: original_max_position_embeddings of a file that doesn't have it beside the
    parameters.

    An older rope_scaling that isn't empty replaces all of rope_parameters. rope_theta beside the parameters counts
    where they have none.
    """
    old, new = fields.inner("rope_scaling"), fields.inner("rope_parameters")
    if any(old) and any(new):
        fields.warn("rope_scaling takes the place of rope_parameters, as it does in transformers")
    if "rope_parameters" not in fields or fields.raw("rope_parameters") is None:
        new = fields.with_values({"rope_parameters": dict(default or {})}).inner("rope_parameters")
    rope = old if any(old) else new
    fields.raw("rope_theta", None)
    base = (rope if "rope_theta" in rope else fields).number("rope_theta", theta)
    if _ORIGINAL in fields:
        original = fields.raw(_ORIGINAL)
        rope = rope.with_values({_ORIGINAL: original})
    elif original is not None:
        rope = rope.with_values({_ORIGINAL: original})
    scaling, mscale_all = read_scaling(rope, context, kinds, old_names)
    rotary = _partial_rotary(fields, rope, partial)
    rope.finish()
    return Rope(base, scaling, rotary, mscale_all)


def _partial_rotary(fields: Fields, rope: Fields, partial: bool) -> float:
    name = "partial_rotary_factor"
    beside = fields.raw(name, None if not partial else 1.0)
    where = rope if name in rope else fields
    value = rope.raw(name, beside)
    if not partial:
        if value not in (None, 1.0):
            raise where.error(name, "is not supported: in transformers this family turns whole heads")
        return 1.0
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise where.error(name, "must be above 0 and at most 1")
    return float(value)


def read_scaling(
    rope: Fields,
    context: int,
    kinds: tuple[str, ...] = _KINDS,
    old_names: Mapping[str, str] = MappingProxyType({}),
) -> tuple[RopeScaling, float]:
    """Reads the scaling in `rope`, and its mscale_all_dim, which is 0 for every kind but YaRN."""
    kind = rope.raw("rope_type", rope.raw("type", "default"))
    kind = old_names.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in kinds or kind not in _KINDS:
        name = "rope_type" if "rope_type" in rope else "type"
        raise rope.error(name, f"is not supported here; only {', '.join(map(repr, kinds))}")
    rope.raw(_ORIGINAL, None)  # has no effect on some kinds
    match kind:
        case "linear":
            return RopeScaling("linear", rope.number("factor")), 0.0
        case "llama3":
            return _llama3(rope, context), 0.0
        case "yarn":
            return _yarn(rope, context)
        case "longrope":
            return _longrope(rope, context), 0.0
    return RopeScaling(), 0.0


def _llama3(rope: Fields, context: int) -> RopeScaling:
    return RopeScaling(
        "llama3",
        rope.number("factor"),
        rope.integer(_ORIGINAL, context),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
    )


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn(rope: Fields, context: int) -> tuple[RopeScaling, float]:
    original = rope.integer(_ORIGINAL, context)
    factor = rope.number("factor", null=context / original)
    mscale, mscale_all = rope.number("mscale", 0.0, null=0.0), rope.number("mscale_all_dim", 0.0, null=0.0)
    attention = _mscale(factor, mscale) / _mscale(factor, mscale_all) if mscale and mscale_all else _mscale(factor)
    scaling = RopeScaling(
        "yarn",
        factor,
        original,
        rope.number("attention_factor", attention, null=attention),
        beta_fast=rope.number("beta_fast", 32.0, null=32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0, null=1.0) or 1.0,
        truncate=rope.flag("truncate", True, null=False),
    )
    return scaling, mscale_all


def _longrope(rope: Fields, context: int) -> RopeScaling:
    original = rope.integer(_ORIGINAL, context, low=2)
    ratio = context / original
    factor = rope.number("factor", ratio, null=ratio)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        "longrope",
        1.0,
        original,
        rope.number("attention_factor", attention, null=attention),
        short_factors=rope.numbers("short_factor"),
        long_factors=rope.numbers("long_factor"),
    )


def read_local_and_global(fields: Fields, context: int) -> tuple[float, Rope]:
    """Reads Gemma 3's two ropes. Returns the base of layers with a window, which are never scaled, and the rope of the
    other layers.

    The older spelling has rope_local_base_freq for the former, and rope_theta and rope_scaling for the latter. What is
    inside rope_parameters takes precedence, except over rope_scaling, whose values replace those of full_attention.
    """
    both = fields.inner("rope_parameters")
    local, full = both.inner("sliding_attention"), both.inner("full_attention")
    both.finish()
    old = fields.inner("rope_scaling")
    if any(old):
        full = full.with_values({name: old.raw(name) for name in old})
        if "rope_type" not in full and "type" in full:
            raise old.error("type", "must be called rope_type: transformers passes over `type` in this family")
    local_theta = (local if "rope_theta" in local else fields).number(
        "rope_theta" if "rope_theta" in local else "rope_local_base_freq", 10000.0
    )
    fields.raw("rope_local_base_freq", None)
    fields.raw("rope_theta", None)
    theta = (full if "rope_theta" in full else fields).number("rope_theta", 1e6)
    local.among("rope_type" if "rope_type" in local else "type", ("default",), "default")
    local.finish()
    full.among("truncate", (True,), True)  # in this family, transformers never finds this field
    scaling, _ = read_scaling(full, context)
    full.finish()
    return local_theta, Rope(theta, scaling)


def deepseek_scale(rope: Rope, head_dim: int) -> float:
    """The factor that DeepSeek multiplies scores by. YaRN's correction of the softmax temperature is in this factor,
    not in the rotated queries and keys."""
    return head_dim**-0.5 * (_mscale(rope.scaling.factor, rope.mscale_all) ** 2 if rope.mscale_all else 1.0)
