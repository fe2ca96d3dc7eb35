"""Reads the rotary embedding of a GGUF file: keys of its metadata, and tensors of the numbers that frequencies are
divided by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.process.files import shortened
from isthmus.model.weights.gguf.header import Header
from isthmus.model.weights.gguf.metadata import Metadata

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The scaling of Llama 3.1 to 3.3. Their GGUF files hold only the divisors that result from it."""


def fields(metadata: Metadata, header: Header, head_dim: int) -> dict[str, Any]:
    """Returns the fields of config.json that describe the rotary embedding. Raises ConfigError for an unknown kind of
    scaling."""
    theta = metadata.number(metadata.own("rope.freq_base"), 10000.0)
    rotated = metadata.integer(metadata.own("rope.dimension_count"), head_dim)
    if rotated % 2:
        raise metadata.error(metadata.own("rope.dimension_count"), f"must be even; heads have {head_dim} numbers")
    found: dict[str, Any] = {"rope_theta": theta}
    if rotated != head_dim:
        found["partial_rotary_factor"] = rotated / head_dim
    scaling = _divided(metadata, header, theta, rotated) or _scaled(metadata)
    attention = metadata.own("rope.scaling.attn_factor")
    if "attention_factor" not in scaling and _attention(metadata) != 1.0:
        raise metadata.error(
            attention,
            "is supported only with 'yarn' or 'longrope' scaling, and may change what the model computes; to go on "
            f"without it: ignore_field= (--ignore-field {shortened(attention)})",
        )
    if scaling.get("rope_type") == "longrope":  # Phi's config.json has this field outside rope_scaling
        found["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    return found | ({"rope_scaling": scaling} if scaling else {})


def _scaled(metadata: Metadata) -> dict[str, Any]:
    """The scaling that the metadata describes; empty where there is none."""
    name = metadata.own("rope.scaling.type")
    kind = metadata.text(name, "linear")  # llama.cpp's default
    factor = _factor(metadata)
    original = metadata.integer(metadata.own("rope.scaling.original_context_length"), 0)
    attention = _attention(metadata)
    if not factor or kind == "none":
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise metadata.error(name, "is not supported; only 'none', 'linear', 'yarn' and 'longrope' are")
    beta = {
        ours: metadata.number(metadata.own(f"rope.scaling.yarn_{ours}"), default)
        for ours, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    }
    found = {"rope_type": "yarn", "factor": factor, **beta}
    if attention != 1.0:  # in addition to the factor that YaRN's formula gives
        found["attention_factor"] = attention * (1.0 + 0.1 * math.log(factor))
    return found | ({"original_max_position_embeddings": original} if original else {})


def _attention(metadata: Metadata) -> float:
    """The factor that rotated queries and keys are multiplied by, in addition to the one that the scaling itself
    gives."""
    found: float = metadata.number(metadata.own("rope.scaling.attn_factor"), 1.0)
    return found


def _factor(metadata: Metadata) -> float:
    """The factor of the scaling; 0 means no scaling."""
    found = 0.0
    for name in ("rope.scale_linear", "rope.scaling.factor"):  # the old name, and the new one, which takes precedence
        found = metadata.number(metadata.own(name), found)
        if found < 0:
            raise metadata.error(metadata.own(name), "must be positive")
    return found


def _divided(metadata: Metadata, header: Header, theta: float, rotated: int) -> dict[str, Any]:
    """The scaling that tensors of divisors describe; empty where the file has none."""
    one = _factors(header, "rope_freqs.weight", rotated)
    if one is not None:
        if _attention(metadata) == 1.0 and (found := _llama3(theta, rotated, one)):
            return found
        table = _by_table(one, one, metadata.integer(metadata.own("context_length")))
        return table | {"attention_factor": _attention(metadata)}
    long, short = (_factors(header, f"rope_factors_{each}.weight", rotated) for each in ("long", "short"))
    if long is None or short is None:
        return {}
    metadata.text(metadata.own("rope.scaling.type"), "longrope")
    original = metadata.integer(metadata.own("rope.scaling.original_context_length"))
    return _by_table(short, long, original) | {"attention_factor": _attention(metadata)}


def _by_table(short: np.ndarray, long: np.ndarray, original: int) -> dict[str, Any]:
    """Describes arbitrary divisors of the frequencies as Phi's config.json does."""
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": original,
        "short_factor": [float(each) for each in short],
        "long_factor": [float(each) for each in long],
    }


def _llama3(theta: float, rotated: int, factors: np.ndarray) -> dict[str, Any]:
    """The scaling from which llama.cpp's converter makes these divisors; empty where there is none."""
    factor = float(factors.max())
    low, high, original = _LLAMA3.values()
    if not np.allclose(factors, llama3_factors(theta, rotated, factor, low, high, original), rtol=1e-4):
        return {}
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def llama3_factors(theta: float, rotated: int, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """Returns float64[rotated / 2], the number that Llama 3.1's scaling divides each frequency by. low, high:
    frequencies that turn less than `low` times within the original length are divided by `factor`, and those that turn
    more than `high` times by 1."""
    rounds = original / (2 * np.pi * theta ** (np.arange(0, rotated, 2) / rotated))
    smooth = np.clip((rounds - low) / (high - low), 0, 1)
    found: np.ndarray = 1 / ((1 - smooth) / factor + smooth)
    return found


def _factors(header: Header, name: str, rotated: int) -> np.ndarray | None:
    """The divisors in a tensor, float32[rotated / 2]; None where there is no such tensor. Raises ConfigError for
    another shape or dtype, or numbers that are not positive."""
    stored = header.tensors.get(name)
    if stored is None:
        return None
    if stored.shape != (rotated // 2,) or stored.kind.name != "F32":
        raise ConfigError(f"{header.path}: the tensor {name} must be {rotated // 2} float32 numbers")
    factors = np.frombuffer(stored.memory, np.float32, rotated // 2, stored.start)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise ConfigError(f"{header.path}: the tensor {name} must hold positive numbers")
    return factors
