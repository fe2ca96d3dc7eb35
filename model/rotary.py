"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), and how it is stretched to longer contexts.

Frequencies are constants. They are computed on the host in float32, as published implementations do, because at
position 100,000 the last bit of a frequency changes the angle visibly.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.config import ModelConfig, RopeScaling

Angles = dict[str, tuple[jax.Array, jax.Array]]
"""For each LayerKind.rope that occurs: cos, and sin negated in its first half, float32[..., 1, rotated dimensions]"""


def rotary_angles(config: ModelConfig, positions: jax.Array, uses_long_rope: jax.Array | None = None) -> Angles:
    """The angles of tokens at int32 positions [...].

    uses_long_rope: bool[...], whether each token is part of a sequence of more than rope_scaling.original_context
    tokens; None means that no token is. Only longrope reads it.
    """
    angles: Angles = {}
    for kind in sorted({kind.rope for kind in config.layer_kinds} - {"none"}):
        scaling = config.rope_scaling if kind == "global" else RopeScaling()
        theta = config.rope_theta if kind == "global" else config.local_rope_theta
        frequency = jnp.asarray(frequencies(theta, config.rotated, scaling, "short"))
        if scaling.kind == "longrope" and uses_long_rope is not None:
            stretched = jnp.asarray(frequencies(theta, config.rotated, scaling, "long"))
            frequency = jnp.where(uses_long_rope[..., None, None], stretched, frequency)
        angle = positions[..., None, None].astype(jnp.float32) * frequency
        cos, sin = (part * jnp.float32(scaling.attention_factor) for part in (jnp.cos(angle), jnp.sin(angle)))
        angles[kind] = (jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))
    return angles


def frequencies(theta: float, dim: int, scaling: RopeScaling, length: Literal["short", "long"]) -> np.ndarray:
    """Radians per position, float32[dim / 2]. length: whether longrope takes the factors of short or long sequences."""
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelength = np.float32(theta) ** exponent
    plain = np.float32(1) / wavelength
    match scaling.kind:
        case "none":
            return plain
        case "linear":  # Chen et al. 2023, arXiv 2306.15595
            return plain / np.float32(scaling.factor)
        case "llama3":
            return _llama3(plain, scaling)
        case "yarn":
            return _yarn(plain, np.float32(1) / (np.float32(scaling.factor) * wavelength), theta, dim, scaling)
        case "longrope":  # Ding et al. 2024, arXiv 2402.13753
            factors = scaling.long_factors if length == "long" else scaling.short_factors
            return np.float32(1) / (np.asarray(factors, np.float32) * wavelength)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Stretches long wavelengths, keeps short ones and blends those between (Llama 3.1, arXiv 2407.21783)."""
    wavelength = np.float32(2 * math.pi) / plain
    longest = scaling.original_context / scaling.low_freq_factor
    shortest = scaling.original_context / scaling.high_freq_factor
    span = np.float32(scaling.high_freq_factor - scaling.low_freq_factor)
    keep = (np.float32(scaling.original_context) / wavelength - np.float32(scaling.low_freq_factor)) / span
    stretched = plain / np.float32(scaling.factor)
    blended = (np.float32(1) - keep) * stretched + keep * plain
    return np.where(wavelength > longest, stretched, np.where(wavelength < shortest, plain, blended)).astype(np.float32)


def _yarn(plain: np.ndarray, stretched: np.ndarray, theta: float, dim: int, scaling: RopeScaling) -> np.ndarray:
    """Blends plain and stretched frequencies by how many turns a dimension makes within the original context (Peng et
    al. 2023, arXiv 2309.00071)."""

    def dimension(turns: float) -> float:
        return dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low if high != low else 0.001)
    keep = np.float32(1) - np.clip(ramp, 0, 1)
    return (stretched * (1 - keep) + plain * keep).astype(np.float32)
