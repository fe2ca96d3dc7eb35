"""The shape of a transformer, its published sizes, and what it costs: parameters, FLOPs and bytes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]


class ConfigError(ValueError):
    """A configuration that can't work; the message names the field and the limit."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides what the network computes. `config.json` beside a checkpoint holds it."""

    vocab_size: int = 32000
    """Rows of the embedding; 0 means the tokenizer's size"""
    dim: int = 768
    """Width of the residual stream"""
    layers: int = 12
    heads: int = 12
    """Query heads"""
    kv_heads: int = 12
    """Key and value heads; fewer than `heads` is grouped-query attention"""
    head_dim: int = 64
    mlp_dim: int = 2048
    """Hidden width of the SwiGLU"""
    context_length: int = 2048
    """Most tokens of prompt and completion together"""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    """The head is the embedding, transposed"""
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)"""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head (Qwen3)"""
    dtype: Dtype = "float32"
    """Of activations and KV cache; parameters are trained in float32"""
    scan_layers: bool = False
    """One compiled body for all layers: compile time stops growing with depth (right on accelerators, slow on CPU)"""
    remat: Remat = "none"
    """What the backward pass computes again: nothing, everything but matmuls, or everything"""

    def validate(self) -> None:
        """Raises ConfigError when no such network exists."""
        for name, choices in (("dtype", get_args(Dtype)), ("remat", get_args(Remat))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"model.{name}={getattr(self, name)!r} is none of {', '.join(choices)}")
        for field in dataclasses.fields(self):
            if field.type == "int" and type(getattr(self, field.name)) is not int:
                raise ConfigError(f"model.{field.name}={getattr(self, field.name)!r} must be a whole number")
        if self.vocab_size < 0:
            raise ConfigError(f"model.vocab_size must not be negative, not {self.vocab_size}")
        for name in ("dim", "layers", "heads", "kv_heads", "head_dim", "mlp_dim", "context_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim={self.head_dim} must be even: rotary turns pairs")

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token multiplies: all but the norms, biases and an untied embedding."""
        attention = self.dim * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.dim * self.mlp_dim) + self.vocab_size * self.dim

    @property
    def parameters(self) -> int:
        """Every parameter."""
        norms = self.dim * (2 * self.layers + 1) + (2 * self.head_dim * self.layers if self.qk_norm else 0)
        biases = 0
        if self.attention_bias:
            biases += self.layers * self.head_dim * (self.heads + 2 * self.kv_heads)
        if self.mlp_bias:
            biases += self.layers * (2 * self.mlp_dim + self.dim)
        untied = 0 if self.tie_embeddings else self.vocab_size * self.dim
        return self.matmul_parameters + norms + biases + untied

    def forward_flops(self, tokens: int, attended: int) -> int:
        """FLOPs of a forward pass over `tokens` tokens that attend, all together, to `attended` positions.

        Two for each multiply-add: 2N a token, and 4·heads·head_dim a layer for each query-key pair.
        """
        return 2 * self.matmul_parameters * tokens + 4 * self.layers * self.heads * self.head_dim * attended

    def train_flops(self, batch: int, seq: int) -> int:
        """FLOPs of a training step, causal attention counted as the half that is needed: 3x the forward pass."""
        return 3 * self.forward_flops(batch * seq, batch * seq * (seq + 1) // 2)

    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache a token takes, all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_dim * (4 if self.dtype == "float32" else 2)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Reads `config.json`. Raises ConfigError when a field is unknown or missing."""
        try:
            config = cls(**json.loads(path.read_text(encoding="utf-8")))
            config.validate()
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: is {path.parent} a folder that `isthmus train` wrote?") from None
        except (TypeError, ValueError) as error:  # JSON and UTF-8 errors are ValueErrors, and so is ConfigError
            raise ConfigError(f"{path} is not a model configuration: {error}") from None
        return config


def _preset(dims: tuple[int, int, int, int, int, int], **fields: Any) -> ModelConfig:
    dim, layers, heads, kv_heads, head_dim, mlp_dim = dims
    return ModelConfig(
        dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, mlp_dim=mlp_dim, **fields
    )


_LARGE: dict[str, Any] = {"scan_layers": True, "dtype": "bfloat16", "rope_theta": 500000.0}

PRESETS: dict[str, ModelConfig] = {
    # nanoGPT's CPU recipe in this architecture: SwiGLU of 8/3 the width has the parameters of a 4x GELU.
    "nano": _preset((128, 4, 4, 4, 32, 344), vocab_size=0, context_length=64),
    "5m": _preset((256, 4, 4, 2, 64, 768), vocab_size=0, context_length=512),
    "25m": _preset((384, 8, 6, 3, 64, 1024), vocab_size=0, context_length=1024),
    "125m": _preset((768, 12, 12, 12, 64, 2048)),
    "350m": _preset((1024, 24, 16, 8, 64, 2816), scan_layers=True, dtype="bfloat16"),
    "1b": _preset((2048, 16, 32, 8, 64, 8192), vocab_size=128256, context_length=4096, remat="dots", **_LARGE),
    "3b": _preset((3072, 28, 24, 8, 128, 8192), vocab_size=128256, context_length=4096, remat="full", **_LARGE),
    "8b": _preset(
        (4096, 32, 32, 8, 128, 14336),
        vocab_size=128256,
        context_length=8192,
        remat="full",
        tie_embeddings=False,
        **_LARGE,
    ),
}
"""Sizes to start from, by their rough number of parameters: dim, layers, heads, kv_heads, head_dim, mlp_dim, …"""
