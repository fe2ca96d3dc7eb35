"""The parts of ModelConfig, each with what it refuses; model.config is where to import them from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from isthmus.errors import ConfigError

RopeKind = Literal["none", "linear", "llama3", "yarn", "longrope"]

MAX_LAYERS = 4096
"""More are a mistake, or meant to fill memory"""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the length that a model was first trained on; see model/rotary.py."""

    kind: RopeKind = "none"
    factor: float = 1.0
    """Of the context's length (linear, llama3, yarn)"""
    original_context: int = 0
    """The length first trained on (llama3, yarn, longrope)"""
    attention_factor: float = 1.0
    """Multiplies the rotated queries and keys (yarn, longrope)"""
    low_freq_factor: float = 1.0
    """Wavelengths above original_context / this are stretched whole (llama3)"""
    high_freq_factor: float = 4.0
    """Wavelengths below original_context / this are left alone (llama3)"""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this within original_context are left alone (yarn)"""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are stretched whole (yarn)"""
    truncate: bool = True
    """Round the dimensions found so to whole ones (yarn)"""
    short_factors: tuple[float, ...] = ()
    """Divide each frequency in a sequence of up to original_context tokens (longrope)"""
    long_factors: tuple[float, ...] = ()
    """Divide each frequency in a longer one"""

    def validate(self, rotary_dim: int) -> None:
        """Raises ConfigError naming the field that can't work."""
        for name in ("factor", "attention_factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"model.rope_scaling.{name} must be positive and finite, not {getattr(self, name)}")
        if self.kind in ("llama3", "yarn", "longrope") and self.original_context < 1:
            raise ConfigError(f"model.rope_scaling.original_context must be at least 1 for kind={self.kind}")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError("model.rope_scaling.low_freq_factor must be below high_freq_factor")
        for name in ("short_factors", "long_factors") if self.kind == "longrope" else ():
            factors = getattr(self, name)
            if len(factors) != rotary_dim // 2 or not all(0 < factor < math.inf for factor in factors):
                raise ConfigError(
                    f"model.rope_scaling.{name} must be {rotary_dim // 2} positive numbers: half of rotary"
                )


@dataclass(frozen=True)
class MixtureConfig:
    """A mixture of experts in place of the MLP: each token goes to a few of many small MLPs, and none is dropped."""

    experts: int = 0
    """0 is a dense MLP"""
    per_token: int = 2
    """Experts that each token goes to"""
    dim: int = 0
    """Hidden width of an expert"""
    shared_dim: int = 0
    """Hidden width of the MLP that every token goes to as well; 0 is none (DeepSeek)"""
    dense_layers: tuple[int, ...] = ()
    """Layers that have a dense MLP all the same"""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """Of the router's logits"""
    normalize: bool = True
    """The chosen experts' scores are divided by their sum"""
    scale: float = 1.0
    """Multiplies the chosen experts' scores"""
    groups: int = 1
    """Experts are chosen from the best `groups_per_token` of this many groups (DeepSeek)"""
    groups_per_token: int = 1
    group_score: Literal["max", "top2"] = "max"
    """A group's score: its best expert's, or the sum of its best two"""
    router_bias: bool = False
    correction: bool = False
    """A bias that decides who is chosen and not with what weight; training moves it instead of a loss (DeepSeek-V3)"""

    def validate(self, layers: int) -> None:
        """Raises ConfigError naming the field that can't work."""
        if self.experts < 0:
            raise ConfigError(f"model.mixture.experts must not be negative, not {self.experts}")
        if self.experts == 0:
            return
        if self.dim < 1 or self.shared_dim < 0:
            raise ConfigError(
                f"model.mixture.dim={self.dim} must be at least 1, shared_dim={self.shared_dim} at least 0"
            )
        if self.groups < 1 or self.experts % self.groups:
            raise ConfigError(f"model.mixture.experts={self.experts} must be a multiple of groups={self.groups}")
        if not 1 <= self.groups_per_token <= self.groups:
            raise ConfigError(f"model.mixture.groups_per_token={self.groups_per_token} must be 1 to {self.groups}")
        eligible = self.experts // self.groups * self.groups_per_token
        if not 1 <= self.per_token <= eligible:
            raise ConfigError(f"model.mixture.per_token={self.per_token} must be 1 to {eligible}")
        if self.group_score == "top2" and self.experts // self.groups < 2:
            raise ConfigError("model.mixture.group_score=top2 needs groups of at least two experts")
        if not all(0 <= layer < layers for layer in self.dense_layers):
            raise ConfigError(f"model.mixture.dense_layers={self.dense_layers} names a layer that isn't there")


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention: keys and values are kept as one small vector a token (DeepSeek-V2, 2405.04434)."""

    rank: int = 0
    """Width of the vector; 0 is ordinary attention"""
    query_rank: int = 0
    """Width that queries are squeezed through; 0 is none"""
    rope_dim: int = 0
    """Dimensions of a head that turn by position, shared by all heads' keys"""
    nope_dim: int = 0
    """Dimensions of a head that don't"""
    value_dim: int = 0
    """Width of a head's value"""

    def validate(self) -> None:
        """Raises ConfigError naming the field that can't work."""
        if self.rank and (min(self.rope_dim, self.nope_dim, self.value_dim) < 1 or self.rope_dim % 2):
            raise ConfigError("model.latent: rope_dim (even), nope_dim and value_dim must be positive when rank is")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters: alpha / rank * (x·a)·b beside projections x·kernel (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 0
    """Columns of a and rows of b; 0 is no adapters"""
    alpha: float = 16.0
    """alpha / rank multiplies what an adapter adds"""
    targets: str = r"attention/(query|key|value|out)|mlp/(gate|up|down)"
    """A regular expression; who matches it with their whole path in a block, as mlp/shared/up, get an adapter"""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def validate(self) -> None:
        """Raises ConfigError naming the field that can't work."""
        if self.rank < 0:
            raise ConfigError(f"model.lora.rank must not be negative, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"model.lora.alpha={self.alpha} must be positive and finite")
        try:
            re.compile(self.targets)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"model.lora.targets={self.targets!r} is not a regular expression: {error}") from None


class LayerKind(NamedTuple):
    """What sets a layer apart from others of its network."""

    window: int
    rope: Literal["global", "local", "none"]
    sparse: bool
    """Has a mixture of experts"""
