"""What a transformer computes, its published sizes, and what it costs: parameters, FLOPs and bytes."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from isthmus.errors import ConfigError
from isthmus.model.config_parts import MAX_LAYERS, LatentConfig, LayerKind, LoraConfig, MixtureConfig, RopeScaling
from isthmus.model.process.files import read_json, write_json

Activation = Literal["silu", "gelu", "gelu_tanh", "clamped_swiglu"]

EXECUTION_FIELDS = ("dtype", "scan_layers", "remat")
"""Fields of `isthmus.model.execution.Execution` that config.json holds in older folders."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides what the network computes. The file `config.json` beside a checkpoint holds it."""

    vocab_size: int = 32000
    """Rows of the embedding table; 0 means the tokenizer's vocabulary size, rounded up to a multiple of 128"""
    dim: int = 768
    """Width of the residual stream"""
    layers: int = 12
    """Number of blocks, 1 to 4096"""
    heads: int = 12
    """Number of query heads, a multiple of `kv_heads`"""
    kv_heads: int = 12
    """Number of key and value heads; fewer than `heads` means grouped-query attention"""
    head_dim: int = 64
    """Width of each head; it must be even"""
    mlp_dim: int = 2048
    """Hidden width of the gated MLP"""
    context_length: int = 2048
    """Most tokens that prompt and completion may have together"""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies"""
    local_rope_theta: float = 0.0
    """Base of the rotary frequencies in layers with a window, to which rope_scaling then doesn't apply; 0 means that
    they use rope_theta and rope_scaling like all layers (Gemma 3)"""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rotary_dim: int = 0
    """How many of each head's first dimensions the rotary embedding rotates, an even number; 0 is all (Phi-4-mini)"""
    rope_pattern: tuple[bool, ...] = (True,)
    """Whether each layer uses the rotary embedding; the pattern repeats over the layers (SmolLM3)"""
    windows: tuple[int, ...] = (0,)
    """How many of the last tokens each layer attends to; the pattern repeats over the layers; 0 means all tokens"""
    norm_eps: float = 1e-5
    """Added to the mean square in every norm, against division by zero"""
    norm_offset: float = 0.0
    """Added to the learned scale of every norm (Gemma: 1)"""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Where a block has norms: before attention and MLP, after them (OLMo 2), or both (Gemma)"""
    tie_embeddings: bool = True
    """Use the transposed embedding table as the output head"""
    embedding_scale: float = 1.0
    """Multiplies the embeddings before the first block (Gemma: the square root of dim)"""
    logit_soft_cap: float = 0.0
    """Limits logits smoothly: c * tanh(logits / c) with this c; 0 means no limit (Gemma 2)"""
    attention_bias: bool = False
    """Add biases to the query, key and value projections (Qwen2)"""
    attention_out_bias: bool = False
    """Add a bias to the output projection of attention"""
    attention_scale: float = 0.0
    """Multiplies the attention scores; 0 means 1 / sqrt(width of a query head)"""
    attention_soft_cap: float = 0.0
    """Limits attention scores smoothly: c * tanh(scores / c) with this c; 0 means no limit"""
    attention_sinks: bool = False
    """Add to each head's softmax a learned logit that takes a share of the weights but adds no value (gpt-oss)"""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMSNorm on queries and keys: over each head (Qwen3), or over all heads together (projection, OLMo 2)"""
    mlp_bias: bool = False
    """Add biases to the projections of the MLP"""
    activation: Activation = "silu"
    """Activation of the gated MLP; clamped_swiglu is gpt-oss's (up + 1) * gate * sigmoid(1.702 * gate)"""
    activation_limit: float = 7.0
    """Value at which clamped_swiglu clips gate and up; other activations don't use it"""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantization: tuple[str, ...] = ()
    """Rules that say which matrices the folder holds as integers (model/weights/quantization.py); `isthmus convert
    --quantize` sets it"""

    def validate(self) -> None:
        """Raises ConfigError when no such network exists."""
        _check_types(self, "model")
        if self.vocab_size < 0:
            raise ConfigError(f"model.vocab_size must not be negative, not {self.vocab_size}")
        for name in ("dim", "layers", "heads", "kv_heads", "head_dim", "mlp_dim", "context_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if self.layers > MAX_LAYERS:
            raise ConfigError(f"model.layers must be at most {MAX_LAYERS}, not {self.layers}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim={self.head_dim} must be even: it is rotated in pairs")
        if not 0 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ConfigError(f"model.rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_dim}")
        if not self.windows or min(self.windows) < 0:
            raise ConfigError(f"model.windows={self.windows} must be one or more numbers that are not negative")
        if not self.rope_pattern:
            raise ConfigError("model.rope_pattern must not be empty")
        for name in ("rope_theta", "norm_eps", "embedding_scale", "activation_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be positive and finite")
        for name in ("local_rope_theta", "attention_scale", "attention_soft_cap", "logit_soft_cap", "norm_offset"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be finite and not negative")
        if self.rope_scaling.kind == "yarn" and self.rope_theta == 1:
            raise ConfigError("model.rope_theta must not be 1 with yarn: all frequencies would be the same")
        self.rope_scaling.validate(self.rotated)
        self.mixture.validate(self.layers)
        self.latent.validate()
        self.lora.validate()
        if self.latent.rank and (self.kv_heads != 1 or self.head_dim != self.latent.rank + self.latent.rope_dim):
            raise ConfigError("model.latent: kv_heads must be 1 and head_dim must be rank + rope_dim")
        if self.latent.rank and (self.qk_norm != "none" or self.attention_bias or self.rotary_dim):
            raise ConfigError("model.latent needs qk_norm=none, attention_bias=False and rotary_dim=0")
        if self.lora.rank and not any(self.adapted(kind) for kind in self.layer_kinds):
            known = sorted({path for kind in self.layer_kinds for path in self.projections(kind)})
            raise ConfigError(
                f"model.lora.targets={self.lora.targets!r} matches none of {', '.join(known)} "
                "(experts and their router can't be adapted)"
            )

    def computes_as(self, other: ModelConfig) -> bool:
        """Whether both compute the same function of parameters and tokens, even if spelt differently; adapters don't
        count."""
        return self.canonical() == other.canonical()

    def canonical(self) -> ModelConfig:
        """The one spelling that stands for all configurations that compute the same function."""
        return dataclasses.replace(
            self,
            context_length=0,
            lora=LoraConfig(),
            windows=tuple(kind.window for kind in self.layer_kinds),
            rope_pattern=tuple(kind.rope != "none" for kind in self.layer_kinds),
            rotary_dim=self.rotated,
            attention_scale=self.attention_scale or self.head_dim**-0.5,
        )

    @property
    def rotated(self) -> int:
        """Dimensions of each head that the rotary embedding rotates."""
        return self.latent.rope_dim if self.latent.rank else self.rotary_dim or self.head_dim

    def layer_kind(self, layer: int) -> LayerKind:
        window = self.windows[layer % len(self.windows)]
        local = window > 0 and self.local_rope_theta > 0
        turns = self.rope_pattern[layer % len(self.rope_pattern)]
        sparse = self.mixture.experts > 0 and layer not in self.mixture.dense_layers
        return LayerKind(window, ("local" if local else "global") if turns else "none", sparse)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        return tuple(map(self.layer_kind, range(self.layers)))

    def projections(self, kind: LayerKind) -> tuple[str, ...]:
        """The projections of a block of `kind` that can have an adapter, as paths within the block."""
        latent = ("query_down", "query") if self.latent.query_rank else ("query",)
        attention = (*latent, "latent", "out") if self.latent.rank else ("query", "key", "value", "out")
        mlp = "mlp/shared" if kind.sparse else "mlp"
        width = self.mixture.shared_dim if kind.sparse else self.mlp_dim
        parts = ("gate", "up", "down") if width else ()
        return (*(f"attention/{part}" for part in attention), *(f"{mlp}/{part}" for part in parts))

    def adapted(self, kind: LayerKind) -> tuple[str, ...]:
        """The projections of a block of `kind` that lora.targets names. Raises ConfigError when it names one that
        can't have an adapter."""
        if not self.lora.rank:
            return ()
        targets = re.compile(self.lora.targets)
        # Latent attention reads the kernels of these two directly, so an adapter would have no effect.
        for path in ("attention/key", "attention/value") if self.latent.rank else ():
            if targets.fullmatch(path):
                raise ConfigError(
                    f"model.lora.targets={self.lora.targets!r} matches {path}, which can't be adapted in latent "
                    "attention; attention/(query|latent|out) can"
                )
        return tuple(path for path in self.projections(kind) if targets.fullmatch(path))

    @property
    def sparse_layers(self) -> int:
        """Layers with a mixture of experts."""
        return sum(kind.sparse for kind in self.layer_kinds)

    @property
    def rope_switch(self) -> int:
        """With longrope, a sequence of more tokens than this uses other rotary frequencies from its first token on;
        0 means never."""
        return self.rope_scaling.original_context if self.rope_scaling.kind == "longrope" else 0

    @property
    def cache_heads(self) -> int:
        """Vectors of head_dim that the KV cache holds per token and layer: keys and values, or one latent vector."""
        return 1 if self.latent.rank else 2 * self.kv_heads

    def _attention_parameters(self) -> int:
        """Attention parameters of one layer, without biases and norms."""
        latent = self.latent
        if not latent.rank:
            return self.dim * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        query_dim = self.heads * (latent.nope_dim + latent.rope_dim)
        query = latent.query_rank * (self.dim + query_dim) if latent.query_rank else self.dim * query_dim
        up = latent.rank * self.heads * (latent.nope_dim + latent.value_dim)
        return query + self.dim * self.head_dim + up + self.heads * latent.value_dim * self.dim

    def _mlp_parameters(self, experts: int) -> int:
        """MLP parameters of all layers, without biases; of each mixture, `experts` experts are counted."""
        mixture, sparse = self.mixture, self.sparse_layers
        dense = (self.layers - sparse) * self.mlp_dim + sparse * (mixture.shared_dim + experts * mixture.dim)
        return 3 * self.dim * dense + sparse * self.dim * mixture.experts

    @property
    def matmul_parameters(self) -> int:
        """Parameters that each token is multiplied by: all but norms, biases, an untied embedding, adapters, and the
        experts that are not chosen."""
        mlp = self._mlp_parameters(self.mixture.per_token)
        return self.layers * self._attention_parameters() + mlp + self.vocab_size * self.dim

    @property
    def parameters(self) -> int:
        """Number of all parameters except those of adapters."""
        matrices = self.layers * self._attention_parameters() + self._mlp_parameters(self.mixture.experts)
        tables = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return matrices + tables + self._norm_parameters() + self._bias_parameters()

    def _norm_parameters(self) -> int:
        block = self.dim * (4 if self.norm_placement == "both" else 2) + self.latent.rank + self.latent.query_rank
        block += {
            "none": 0,
            "head": 2 * self.head_dim,
            "projection": self.head_dim * (self.heads + self.kv_heads),
        }[self.qk_norm]
        return self.dim + self.layers * block

    def _bias_parameters(self) -> int:
        mixture, sparse = self.mixture, self.sparse_layers
        total = self.layers * self.heads if self.attention_sinks else 0
        if self.attention_bias:
            total += self.layers * self.head_dim * (self.heads + 2 * self.kv_heads)
        if self.attention_out_bias:
            total += self.layers * self.dim
        if self.mlp_bias:
            widths = (self.layers - sparse) * (2 * self.mlp_dim + self.dim)
            widths += sparse * mixture.experts * (2 * mixture.dim + self.dim)
            total += widths + (sparse * (2 * mixture.shared_dim + self.dim) if mixture.shared_dim else 0)
        return total + sparse * mixture.experts * (mixture.router_bias + mixture.correction)

    def forward_flops(self, tokens: int, attended: int) -> int:
        """FLOPs of a forward pass over `tokens` tokens that attend to `attended` positions in total.

        A multiply-add counts as two. So there are 2 * matmul_parameters per token, and 4 * heads * head_dim per layer
        and query-key pair. What windows save is not subtracted.
        """
        return 2 * self.matmul_parameters * tokens + 4 * self.layers * self.heads * self.head_dim * attended

    def train_flops(self, batch: int, seq: int) -> int:
        """FLOPs of a training step: 3x the forward pass, with only the half of attention that is causal."""
        return 3 * self.forward_flops(batch * seq, batch * seq * (seq + 1) // 2)

    def save(self, path: Path) -> None:
        """Writes `config.json`, whole or not at all."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """The inverse of dataclasses.asdict; JSON's lists become tuples. Fields of older folders that concern execution
        or training are ignored. Raises TypeError for an unknown field."""
        fields = {name: value for name, value in fields.items() if name not in EXECUTION_FIELDS}
        if isinstance(mixture := fields.get("mixture"), dict):
            fields["mixture"] = {name: value for name, value in mixture.items() if name != "correction_rate"}
        nested = {"rope_scaling": RopeScaling, "mixture": MixtureConfig, "latent": LatentConfig, "lora": LoraConfig}
        made = {name: kind(**_tuples(fields[name])) for name, kind in nested.items() if name in fields}
        return cls(**{**_tuples(fields), **made})

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Reads `config.json`. Raises ConfigError when it can't be read, or a field is unknown or invalid."""
        fields = read_json(path)
        try:
            config = cls.from_dict(fields)
            config.validate()
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is not a model configuration: {error}") from None
        return config


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _check_types(config: Any, name: str) -> None:
    """Raises ConfigError for a field whose value has another type than it declares, as JSON may bring."""
    for key, declared in typing.get_type_hints(type(config)).items():
        value, full = getattr(config, key), f"{name}.{key}"
        if dataclasses.is_dataclass(value):
            _check_types(value, full)
        elif typing.get_origin(declared) is Literal:
            if value not in (choices := typing.get_args(declared)):
                raise ConfigError(f"{full}={value!r} is none of {', '.join(choices)}")
        elif typing.get_origin(declared) is tuple:
            inner = typing.get_args(declared)[0]
            if type(value) is not tuple or not all(_is_a(item, inner) for item in value):
                raise ConfigError(f"{full}={value!r} must be a list of {inner.__name__}")
        elif not _is_a(value, declared):
            wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(declared, declared.__name__)
            raise ConfigError(f"{full}={value!r} must be {wanted}")


def _is_a(value: Any, declared: type) -> bool:
    return type(value) is declared or (declared is float and type(value) is int)


def _preset(dims: tuple[int, int, int, int, int, int], **fields: Any) -> ModelConfig:
    """dims: dim, layers, heads, kv_heads, head_dim, mlp_dim."""
    dim, layers, heads, kv_heads, head_dim, mlp_dim = dims
    return ModelConfig(
        dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, mlp_dim=mlp_dim, **fields
    )


_LARGE: dict[str, Any] = {"context_length": 4096, "vocab_size": 128256, "rope_theta": 500000.0}

PRESETS: dict[str, ModelConfig] = {
    # The sizes of nanoGPT's CPU recipe. A SwiGLU of 8/3 the width has as many parameters as a GELU MLP of 4x.
    "nano": _preset((128, 4, 4, 4, 32, 344), vocab_size=0, context_length=64),
    "5m": _preset((256, 4, 4, 2, 64, 768), vocab_size=0, context_length=512),
    "25m": _preset((384, 8, 6, 3, 64, 1024), vocab_size=0, context_length=1024),
    "125m": _preset((768, 12, 12, 12, 64, 2048)),
    "350m": _preset((1024, 24, 16, 8, 64, 2816)),
    "1b": _preset((2048, 16, 32, 8, 64, 8192), **_LARGE),
    "3b": _preset((3072, 28, 24, 8, 128, 8192), **_LARGE),
    "8b": _preset((4096, 32, 32, 8, 128, 14336), **{**_LARGE, "context_length": 8192}, tie_embeddings=False),
}
"""Sizes to start from, named by their rough number of parameters"""
