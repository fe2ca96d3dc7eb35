"""The parts of ModelConfig and their validation. Import them from isthmus.model.config."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import tyro

from isthmus.errors import ConfigError

RopeKind = Literal["none", "linear", "llama3", "yarn", "longrope"]

MAX_LAYERS = 4096
"""A configuration of more layers is a mistake, or meant to fill memory"""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than in the first training; see model/rotary.py."""

    kind: RopeKind = "none"
    """Method that stretches the frequencies; none leaves them as they are"""
    factor: float = 1.0
    """How many times longer the context becomes (linear, llama3, yarn)"""
    original_context: int = 0
    """Context length of the first training, in tokens (llama3, yarn, longrope)"""
    attention_factor: float = 1.0
    """Multiplies the rotated queries and keys (yarn, longrope)"""
    low_freq_factor: float = 1.0
    """Wavelengths above original_context / low_freq_factor are stretched by the whole factor (llama3)"""
    high_freq_factor: float = 4.0
    """Wavelengths below original_context / high_freq_factor are left alone (llama3)"""
    beta_fast: float = 32.0
    """Dimensions that make more than this many turns within original_context are left alone (yarn)"""
    beta_slow: float = 1.0
    """Dimensions that make fewer turns than this are stretched by the whole factor (yarn)"""
    truncate: bool = True
    """Round the limits that beta_fast and beta_slow set to whole dimensions (yarn)"""
    short_factors: tuple[float, ...] = ()
    """Divisors, one per frequency, for sequences of up to original_context tokens (longrope)"""
    long_factors: tuple[float, ...] = ()
    """Divisors, one per frequency, for longer sequences (longrope)"""

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
                    f"model.rope_scaling.{name} must be {rotary_dim // 2} positive numbers, one per frequency"
                )


@dataclass(frozen=True)
class MixtureConfig:
    """A mixture of experts in place of the MLP: each token goes to a few of many small MLPs; no token is dropped."""

    experts: int = 0
    """Number of experts in each layer; 0 means a dense MLP"""
    per_token: int = 2
    """How many experts each token goes to"""
    dim: int = 0
    """Hidden width of each expert"""
    shared_dim: int = 0
    """Hidden width of one more MLP, which every token goes to; 0 means none (DeepSeek)"""
    dense_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that have a dense MLP instead"""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """Function that turns the router's logits into scores"""
    normalize: bool = True
    """Divide the scores of a token's experts by their sum"""
    scale: float = 1.0
    """Multiplies the scores of a token's experts"""
    groups: int = 1
    """Number of groups of experts; a token's experts come from its best `groups_per_token` groups (DeepSeek)"""
    groups_per_token: int = 1
    """How many groups a token's experts may come from"""
    group_score: Literal["max", "top2"] = "max"
    """Score of a group: that of its best expert (max), or the sum of its best two (top2)"""
    router_bias: bool = False
    """Add a bias to the router's logits"""
    correction: bool = False
    """Add a bias that affects the choice of experts but not their weights; training balances by it (DeepSeek-V3)"""

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
    """Multi-head latent attention: the cache holds one small vector per token (DeepSeek-V2, arXiv 2405.04434)."""

    rank: int = 0
    """Width of that vector without the rope_dim dimensions beside it; 0 means ordinary attention"""
    query_rank: int = 0
    """Width of a low-rank projection that queries pass through first; 0 means none"""
    rope_dim: int = 0
    """Dimensions of each head that the rotary embedding rotates, an even number; all heads' keys share them"""
    nope_dim: int = 0
    """Dimensions of each head that are not rotated"""
    value_dim: int = 0
    """Width of each head's value"""

    def validate(self) -> None:
        """Raises ConfigError naming the field that can't work."""
        if self.rank and (min(self.rope_dim, self.nope_dim, self.value_dim) < 1 or self.rope_dim % 2):
            raise ConfigError("model.latent: rope_dim (even), nope_dim and value_dim must be positive when rank is")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters, which add alpha / rank * (x·a)·b to projections x·kernel (LoRA; Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 0
    """Columns of a and rows of b; 0 means no adapters"""
    alpha: float = 16.0
    """An adapter's output is multiplied by alpha / rank"""
    targets: str = r"attention/(query|key|value|out)|mlp/(gate|up|down)"
    """Regular expression; a projection gets an adapter if its whole path in the block matches, such as mlp/shared/up"""

    adapters: Annotated[int, tyro.conf.Fixed, tyro.conf.Suppress] = 0
    """How many adapters there are, of which each token has one, or none, when it is served; 0 is a single one that all
    tokens have. Of several, `alpha` is the rank: the factors b are already multiplied by each adapter's own scale"""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def validate(self) -> None:
        """Raises ConfigError naming the field that can't work."""
        for name in ("rank", "adapters"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.lora.{name} must not be negative, not {getattr(self, name)}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"model.lora.alpha={self.alpha} must be positive and finite")
        try:
            re.compile(self.targets)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"model.lora.targets={self.targets!r} is not a regular expression: {error}") from None


class LayerKind(NamedTuple):
    """The properties in which the layers of one network may differ."""

    window: int
    """How many of the last tokens the layer attends to; 0 means all"""
    rope: Literal["global", "local", "none"]
    """The base of the rotary frequencies: rope_theta (global) or local_rope_theta (local); none means no rotation"""
    sparse: bool
    """Whether it has a mixture of experts in place of the MLP"""
