"""Reading a published config.json field by field, so that no field is passed over in silence."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from model.config import ConfigError, RopeScaling
from model.files import read_json

_REQUIRED = object()

_NO_EFFECT = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation", "auto_map", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward", "do_sample", "dtype", "eos_token_id", "id2label",
    "initializer_range", "is_llama_config", "label2id", "max_length", "model_type", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "return_dict",
    "router_aux_loss_coef", "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip
"""What the logits don't depend on. Code that `auto_map` names is never loaded."""

_NEUTRAL: dict[str, Collection[Any]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "embd_pdrop": (0, None),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False,),
    "mlp_bias": (False, None),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "use_mrope": (False,),
    "resid_pdrop": (0, None),
    "hidden_dropout": (0, None),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
    "router_jitter_noise": (0, None),
    "tie_encoder_decoder": (False,),
}
"""What would change the computation, and the values with which it doesn't."""


class Fields:
    """The fields of a config.json. Every error names the file and the field."""

    def __init__(self, values: dict[str, Any], path: Path, read: set[str] | None = None) -> None:
        self._values, self.path = values, path
        self._read = set() if read is None else read

    @classmethod
    def load(cls, path: Path) -> Fields:
        """Raises ConfigError when there is no such file or it isn't a JSON object."""
        return cls(read_json(path), path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def error(self, name: str, why: str) -> ConfigError:
        return ConfigError(f"{self.path}: {name}={self._values.get(name)!r} {why}")

    def raw(self, name: str, default: Any = _REQUIRED) -> Any:
        self._read.add(name)
        if name in self._values:
            return self._values[name]
        if default is _REQUIRED:
            raise ConfigError(f"{self.path}: the field {name} is missing")
        return default

    def integer(self, name: str, default: Any = _REQUIRED, *, low: int = 1) -> int:
        value = self.raw(name, default)
        value = default if value is None and default is not _REQUIRED else value
        if type(value) is not int or not low <= value < 1 << 31:
            raise self.error(name, f"must be a whole number, at least {low}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self.raw(name, default)
        value = default if value is None and default is not _REQUIRED else value
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise self.error(name, "must be a number that is not negative")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw(name, default)
        if value not in (True, False):
            raise self.error(name, "must be true or false")
        return bool(value)

    def among(self, name: str, allowed: Collection[Any], default: Any = _REQUIRED) -> Any:
        value = self.raw(name, default)
        if not any(value == option and (value is None) == (option is None) for option in allowed):
            raise self.error(name, f"is not supported here; only {', '.join(map(repr, allowed))}")
        return value

    def integers(self, name: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        value = self.raw(name, default)
        value = default if value is None and default is not _REQUIRED else value
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            raise self.error(name, "must be a list of whole numbers")
        return tuple(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.raw(name)
        if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
            raise self.error(name, "must be a list of numbers")
        return tuple(map(float, value))

    def with_values(self, values: dict[str, Any]) -> Fields:
        """The same fields, with some values in place of what the file says (None: the field is absent)."""
        merged = {
            name: value for name, value in {**self._values, **values}.items() if name not in values or value is not None
        }
        return Fields(merged, self.path, self._read)

    def inner(self, name: str) -> Fields:
        """The object in field `name`; empty when it is absent or null."""
        value = self.raw(name, None)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return Fields(value or {}, Path(f"{self.path}: {name}"))

    def finish(self) -> None:
        """Raises ConfigError for a field that nobody read and that isn't known to have no effect."""
        for name, value in self._values.items():
            if name in self._read or name in _NO_EFFECT or (name in _NEUTRAL and value in _NEUTRAL[name]):
                continue
            hint = "; dequantize the model first" if name == "quantization_config" else ""
            raise self.error(name, f"is not supported{hint}")


def read_rope(fields: Fields, context: int, *, theta: float = 10000.0) -> tuple[float, RopeScaling]:
    """rope_theta and its scaling, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    if "rope_parameters" in fields:
        rope = fields.inner("rope_parameters")
        fields.raw("rope_theta", None)
        fields.raw("rope_scaling", None)
        theta = rope.number("rope_theta", theta)
    else:
        theta = fields.number("rope_theta", theta)
        rope = fields.inner("rope_scaling")
    rope.raw("partial_rotary_factor", None)  # the caller has read it
    original = "original_max_position_embeddings"
    scaling = read_scaling(rope, context, fields.integer(original) if fields.raw(original, None) else None)
    rope.finish()
    return theta, scaling


def read_scaling(rope: Fields, context: int, original: int | None = None) -> RopeScaling:
    """original: the original context, where it is given beside the object; it wins."""
    old_name = rope.raw("type", "default")
    kind = rope.among(
        "rope_type",
        ("default", "linear", "llama3", "yarn", "longrope", "su"),
        {"su": "longrope"}.get(old_name, old_name),
    )
    if original is None and kind in ("llama3", "yarn", "longrope"):
        original = rope.integer("original_max_position_embeddings")
    rope.raw("original_max_position_embeddings", None)
    match kind:
        case "default":
            return RopeScaling()
        case "linear":
            return RopeScaling("linear", rope.number("factor"))
        case "llama3":
            return RopeScaling(
                "llama3",
                rope.number("factor"),
                original or 0,
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
            )
        case "yarn":
            return _yarn(rope, original or 0, context)
        case _:
            return _longrope(rope, original or 0, context)


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn(rope: Fields, original: int, context: int) -> RopeScaling:
    factor = rope.number("factor", context / original)
    mscale, mscale_all = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    attention = _mscale(factor, mscale) / _mscale(factor, mscale_all) if mscale and mscale_all else _mscale(factor)
    return RopeScaling(
        "yarn",
        factor,
        original,
        rope.number("attention_factor", attention),
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        truncate=rope.flag("truncate", True),
    )


def _longrope(rope: Fields, original: int, context: int) -> RopeScaling:
    factor = rope.number("factor", context / original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        "longrope",
        1.0,
        original,
        rope.number("attention_factor", attention),
        short_factors=rope.numbers("short_factor"),
        long_factors=rope.numbers("long_factor"),
    )


def deepseek_scale(rope: Fields, head_dim: int) -> float:
    """What DeepSeek multiplies scores by: YaRN's correction of the softmax temperature is in it, not in the angles."""
    scale = head_dim**-0.5
    mscale_all = rope.number("mscale_all_dim", 0.0)
    if mscale_all and rope.raw("rope_type", rope.raw("type", "default")) != "default":
        scale *= _mscale(rope.number("factor"), mscale_all) ** 2
    return scale
