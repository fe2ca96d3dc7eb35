"""Says where each parameter lies in published files. Each family has a table from our parameter's path to a tensor's
name and a view of the tensor.

The view has the parameter's shape and shares the tensor's memory. So one function serves both to read the tensor (copy
from the view) and to write it (assign to the view of a new array).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.model.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Describes the published tensor, or the part of one, that holds a parameter."""

    name: str
    """The tensor's name. {layer} and {expert} in it stand for their indices"""
    shape: Callable[[Shape, ModelConfig], Shape]
    """Returns the tensor's shape for the parameter's shape"""
    view: Callable[[np.ndarray, Shape, ModelConfig], np.ndarray]
    """Takes the tensor and the parameter's shape, and returns the parameter as a view of the tensor"""
    order: Callable[[ModelConfig], np.ndarray] | None = None
    """Returns, for each entry of the parameter's last axis, its index in the view; None means that the order is the
    same"""
    otherwise: Piece | None = None
    """The piece for files that don't have this tensor"""

    @property
    def by_expert(self) -> bool:
        """Whether each expert has a tensor of its own. Shape and view are then those of the parameter without its
        leading axis."""
        return "{expert}" in self.name

    def order_of(self, config: ModelConfig) -> np.ndarray | None:
        return None if self.order is None else self.order(config)


Table = dict[str, Piece]
"""The pieces by path: "embedding", "blocks/attention/query/kernel" for any layer, and "sparse/mlp/up/kernel" for what
differs in a layer with a mixture of experts."""


def as_stored(table: Table, names: Collection[str]) -> Table:
    """Returns the table for files that hold tensors of these names. `otherwise` replaces a piece where only its tensor
    is there."""
    found = {_NUMBER.sub(".#", name) for name in names}

    def choose(piece: Piece) -> Piece:
        other = piece.otherwise
        return other if other and _pattern(piece) not in found and _pattern(other) in found else piece

    return {path: choose(piece) for path, piece in table.items()}


_NUMBER = re.compile(r"\.\d+(?=\.)")


def _pattern(piece: Piece) -> str:
    return piece.name.format(layer="#", expert="#")


def plain(name: str) -> Piece:
    return Piece(name, lambda shape, _: shape, lambda raw, shape, _: raw)


def flat(name: str) -> Piece:
    """A tensor in which all axes of the parameter are joined to one."""
    return Piece(name, lambda shape, _: (math.prod(shape),), lambda raw, shape, _: raw.reshape(shape))


def linear(name: str, inputs: int = 1) -> Piece:
    """A tensor [outputs, inputs], as torch stores a Linear, for a parameter [*inputs, *outputs]. inputs: the number of
    input axes."""

    def tensor_shape(shape: Shape, config: ModelConfig) -> Shape:
        return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))

    return Piece(name, tensor_shape, lambda raw, shape, _: _transposed(raw, shape, inputs))


def _transposed(raw: np.ndarray, shape: Shape, inputs: int) -> np.ndarray:
    """Returns a tensor [outputs, inputs] as a view [*inputs, *outputs]. shape: that of the view. inputs: the number of
    input axes."""
    outputs = len(shape) - inputs
    axes = (*range(outputs, len(shape)), *range(outputs))
    return raw.reshape(*shape[inputs:], *shape[:inputs]).transpose(axes)


def rows(name: str, part: int, sizes: Callable[[ModelConfig], tuple[int, ...]]) -> Piece:
    """A Linear whose rows lie in one tensor with those of others. part: its index among them. sizes: returns the number
    of rows of each."""

    def tensor_shape(shape: Shape, config: ModelConfig) -> Shape:
        return (sum(sizes(config)), shape[0])

    def view(raw: np.ndarray, shape: Shape, config: ModelConfig) -> np.ndarray:
        start = sum(sizes(config)[:part])
        return _transposed(raw[start : start + sizes(config)[part]], shape, 1)

    return Piece(name, tensor_shape, view)


def interleaved(name: str, part: int) -> Piece:
    """Every other column, beginning with column `part`, of a tensor [..., 2n] that is not transposed."""
    return Piece(name, lambda shape, _: (*shape[:-1], 2 * shape[-1]), lambda raw, shape, _: raw[..., part::2])


def stacked_linear(name: str) -> Piece:
    """A tensor [experts, outputs, inputs] for a parameter [experts, inputs, outputs]."""
    return Piece(name, lambda shape, _: (shape[0], shape[2], shape[1]), lambda raw, shape, _: raw.transpose(0, 2, 1))


def stacked_rows(name: str, part: int) -> Piece:
    """A part of a tensor [experts, 2 * outputs, inputs], which holds the outputs of two parameters [experts, inputs,
    outputs] one after the other. part: 0 for the first, 1 for the second."""

    def view(raw: np.ndarray, shape: Shape, config: ModelConfig) -> np.ndarray:
        return raw[:, part * shape[2] : (part + 1) * shape[2]].transpose(0, 2, 1)

    return Piece(name, lambda shape, _: (shape[0], 2 * shape[2], shape[1]), view)


def latent_up(part: int) -> Piece:
    """The keys (part 0) or the values (part 1) of `kv_b_proj` [heads * (nope + value), rank], in which the keys of each
    head precede its values."""

    def tensor_shape(shape: Shape, config: ModelConfig) -> Shape:
        return (config.heads * (config.latent.nope_dim + config.latent.value_dim), config.latent.rank)

    def view(raw: np.ndarray, shape: Shape, config: ModelConfig) -> np.ndarray:
        by_head = raw.reshape(config.heads, -1, config.latent.rank)
        nope = config.latent.nope_dim
        return (by_head[:, nope:] if part else by_head[:, :nope]).transpose(2, 0, 1)

    return Piece("model.layers.{layer}.self_attn.kv_b_proj.weight", tensor_shape, view)


def pairs_last(piece: Piece, plain_dims: Callable[[ModelConfig], int]) -> Piece:
    """Reorders the part of queries and keys that the rotary embedding turns. DeepSeek turns neighbours (2i, 2i + 1)
    together, and we turn the two halves. No score changes when queries and keys are reordered alike. plain_dims:
    returns how many entries before that part are not turned."""

    def order(config: ModelConfig) -> np.ndarray:
        first, turned = plain_dims(config), config.latent.rope_dim
        pairs = np.arange(turned).reshape(-1, 2).T.reshape(-1)
        return np.concatenate([np.arange(first), first + pairs])

    return Piece(piece.name, piece.shape, piece.view, order)


def _or(piece: Piece, otherwise: Piece) -> Piece:
    return dataclasses.replace(piece, otherwise=otherwise)


def _experts(name: str, gate: str, up: str, down: str) -> dict[str, Piece]:
    """The matrices of experts. Files hold one tensor per expert and matrix. Alternatively, they hold one tensor for all
    experts, which is how transformers 5 has them in memory and may write them."""
    fused = "mlp.experts.gate_up_proj"
    return {
        "mlp/gate/kernel": _or(_layer(f"{name}.{{expert}}.{gate}.weight"), _layer(fused, stacked_rows, part=0)),
        "mlp/up/kernel": _or(_layer(f"{name}.{{expert}}.{up}.weight"), _layer(fused, stacked_rows, part=1)),
        "mlp/down/kernel": _or(
            _layer(f"{name}.{{expert}}.{down}.weight"), _layer("mlp.experts.down_proj", stacked_linear)
        ),
    }


def _or_experts(name: str, make: Callable[..., Piece], **options: Any) -> Piece:
    """A piece with one tensor for all experts, or alternatively one per expert, which is what experts that are stored
    as codes are read as."""
    return _or(
        _layer(f"mlp.experts.{name}", make, **options), _layer(f"mlp.experts.{{expert}}.{name}", make, **options)
    )


def _block(entries: dict[str, Piece]) -> Table:
    return {f"blocks/{path}": piece for path, piece in entries.items()}


def _sparse(entries: dict[str, Piece]) -> Table:
    return {f"sparse/{path}": piece for path, piece in entries.items()}


def _layer(name: str, make: Callable[..., Piece] = linear, **options: Any) -> Piece:
    return make(f"model.layers.{{layer}}.{name}", **options)


def _mlp(path: str, name: str) -> dict[str, Piece]:
    table = {}
    for part in ("gate", "up", "down"):
        table[f"{path}/{part}/kernel"] = _layer(f"{name}.{part}_proj.weight")
        table[f"{path}/{part}/bias"] = _layer(f"{name}.{part}_proj.bias", plain)
    return table


def _norms(**names: str) -> Table:
    return _block({f"{ours}/scale": _layer(f"{theirs}.weight", plain) for ours, theirs in names.items()})


_TOP: Table = {
    "embedding": plain("model.embed_tokens.weight"),
    "norm/scale": plain("model.norm.weight"),
    "head": linear("lm_head.weight"),
}
_ATTENTION = _block(
    {
        **{f"attention/{ours}/kernel": _layer(f"self_attn.{theirs}_proj.weight")
           for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"))},
        **{f"attention/{ours}/bias": _layer(f"self_attn.{theirs}_proj.bias", flat)
           for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"))},
        "attention/out/kernel": _layer("self_attn.o_proj.weight", inputs=2),
        "attention/out/bias": _layer("self_attn.o_proj.bias", plain),
        "attention/query_norm/scale": _layer("self_attn.q_norm.weight", plain),
        "attention/key_norm/scale": _layer("self_attn.k_norm.weight", plain),
        "attention/sinks": _layer("self_attn.sinks", plain),
    }
)  # fmt: skip
_PRE_NORMS = _norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")

LLAMA: Table = {**_TOP, **_ATTENTION, **_PRE_NORMS, **_block(_mlp("mlp", "mlp"))}
GEMMA: Table = {
    **LLAMA,
    **_norms(
        attention_out_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_out_norm="post_feedforward_layernorm",
    ),
}
OLMO2: Table = {
    **LLAMA,
    **_norms(attention_out_norm="post_attention_layernorm", mlp_out_norm="post_feedforward_layernorm"),
}
MIXTRAL: Table = {
    **LLAMA,
    **_sparse(
        {
            "mlp/router/linear/kernel": _or(_layer("block_sparse_moe.gate.weight"), _layer("mlp.gate.weight")),
            **_experts("block_sparse_moe.experts", "w1", "w3", "w2"),
        }
    ),
}
QWEN3_MOE: Table = {
    **LLAMA,
    **_sparse(
        {
            **_experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
            "mlp/router/linear/kernel": _layer("mlp.gate.weight"),
        }
    ),
}
GPT_OSS: Table = {
    **LLAMA,
    **_sparse(
        {
            "mlp/router/linear/kernel": _layer("mlp.router.weight"),
            "mlp/router/linear/bias": _layer("mlp.router.bias", plain),
            "mlp/gate/kernel": _or_experts("gate_up_proj", interleaved, part=0),
            "mlp/gate/bias": _layer("mlp.experts.gate_up_proj_bias", interleaved, part=0),
            "mlp/up/kernel": _or_experts("gate_up_proj", interleaved, part=1),
            "mlp/up/bias": _layer("mlp.experts.gate_up_proj_bias", interleaved, part=1),
            "mlp/down/kernel": _or_experts("down_proj", plain),
            "mlp/down/bias": _layer("mlp.experts.down_proj_bias", plain),
        }
    ),
}


def _phi3_heads(config: ModelConfig) -> tuple[int, ...]:
    return tuple(heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads))


def _phi3_mlp(config: ModelConfig) -> tuple[int, ...]:
    return (config.mlp_dim, config.mlp_dim)


PHI3: Table = {
    **LLAMA,
    **_block(
        {
            "attention/query/kernel": _layer("self_attn.qkv_proj.weight", rows, part=0, sizes=_phi3_heads),
            "attention/key/kernel": _layer("self_attn.qkv_proj.weight", rows, part=1, sizes=_phi3_heads),
            "attention/value/kernel": _layer("self_attn.qkv_proj.weight", rows, part=2, sizes=_phi3_heads),
            "mlp/gate/kernel": _layer("mlp.gate_up_proj.weight", rows, part=0, sizes=_phi3_mlp),
            "mlp/up/kernel": _layer("mlp.gate_up_proj.weight", rows, part=1, sizes=_phi3_mlp),
        }
    ),
}


def _deepseek_query(name: str) -> Piece:
    return pairs_last(_layer(name), lambda config: config.latent.nope_dim)


DEEPSEEK: Table = {
    **QWEN3_MOE,
    **_block(
        {
            "attention/query_down/kernel": _layer("self_attn.q_a_proj.weight"),
            "attention/query_norm/scale": _layer("self_attn.q_a_layernorm.weight", plain),
            "attention/query/kernel": _deepseek_query("self_attn.q_b_proj.weight"),
            "attention/latent/kernel": pairs_last(
                _layer("self_attn.kv_a_proj_with_mqa.weight"), lambda config: config.latent.rank
            ),
            "attention/latent_norm/scale": _layer("self_attn.kv_a_layernorm.weight", plain),
            "attention/key/kernel": latent_up(0),
            "attention/value/kernel": latent_up(1),
        }
    ),
    **_sparse(
        {
            **_mlp("mlp/shared", "mlp.shared_experts"),
            "mlp/router/correction": _layer("mlp.gate.e_score_correction_bias", plain),
        }
    ),
}
DEEPSEEK_WHOLE_QUERY: Table = {
    **DEEPSEEK,
    **_block({"attention/query/kernel": _deepseek_query("self_attn.q_proj.weight")}),
}
"""The table for models without q_lora_rank, whose queries have no low-rank projection."""
