"""A tiny network whose predictions are far from flat, and plain ways to run it."""

from __future__ import annotations

import dataclasses
import math
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.errors import ConfigError
from isthmus.model.config import LoraConfig, ModelConfig
from isthmus.model.device.hardware import check_dtype
from isthmus.model.execution import Execution
from isthmus.model.ops.cpu import library
from isthmus.model.ops.rounding import narrowed
from isthmus.model.parameter import Dtype
from isthmus.model.transformer import Params, abstract_params, bind, parameter_specs
from isthmus.model.weights.layout import is_stacked, unstack_params
from isthmus.model.weights.lora import Merge, split
from isthmus.model.weights.packing import pack_params
from isthmus.train.step import packed_attention


def without_progress(text: str) -> str:
    """What a command printed, but for the lines that say how far it has come, which a machine that takes long gets."""
    return re.sub(r"(?m)^.*\(\d+ s\)\n", "", text)


TINY = ModelConfig(
    vocab_size=96,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context_length=64,
    tie_embeddings=False,
)
"""Grouped queries, and a head of its own: a tied one of random weights only repeats the token before."""


def random_params(config: ModelConfig, mesh: Mesh, seed: int = 0, *, stacked: bool = False) -> Params:
    """Parameters large enough that attention and argmax have something to choose from; biases and norms included.

    Values depend on the path and the shape only, so two configurations share what they have in common.
    """

    def made(path: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        normal = np.random.default_rng([seed, *path.encode()]).standard_normal(abstract.shape)
        return jax.device_put(_scaled(config, path.split("/"), normal).astype(np.float32), abstract.sharding)

    return {path: made(path, leaf) for path, leaf in abstract_params(config, mesh, stacked=stacked).items()}


def _scaled(config: ModelConfig, names: list[str], normal: np.ndarray) -> np.ndarray:
    if names[-1] == "scale":
        return 1 + 0.2 * normal
    if names[-1] == "bias":
        return 0.3 * normal
    if names[-1] == "embedding":
        return normal
    if names[-1] == "head":
        return 2 * normal / math.sqrt(config.dim)
    fan_in = {"out": config.heads * config.head_dim, "down": config.mlp_dim}.get(names[-2], config.dim)
    return 1.5 * normal / math.sqrt(fan_in)


def packed_params(config: ModelConfig, params: Params) -> Params:
    """The same, laid out for the CPU's kernels; `params` stay as they are. Skips the test where there are none."""
    if reason := library.why_not():
        pytest.skip(reason)
    return pack_params(parameter_specs(config), dict(params))


def as_kept(config: ModelConfig, mesh: Mesh, params: Params, dtype: str | None) -> Params:
    """Unstacked float32 `params` as serving keeps them when the network computes in `dtype`."""
    abstract = abstract_params(config, mesh, dtype=dtype)
    return {
        path: jax.device_put(narrowed(x, abstract[path].dtype), abstract[path].sharding) for path, x in params.items()
    }


def merged(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The network of `params`, in either layout, with its adapters added to the kernels; `params` stay as they are."""
    base, adapters = split(config, params)
    merge = Merge({path: np.asarray(x) for path, x in unstack_params(adapters).items()}, config.lora.scale)
    plain = dataclasses.replace(config, lora=LoraConfig())
    return plain, {path: merge(path, jnp.array(x)) for path, x in base.items()}


def narrowest_dtype() -> Dtype:
    """The dtype of least bits that this jax serves on this backend: bfloat16, and float32 on CPU before jax 0.12."""
    try:
        check_dtype("bfloat16")
    except ConfigError:
        return "float32"
    return "bfloat16"


def on_host(tree: Any) -> Any:
    """The same tree of numpy arrays."""
    return jax.tree.map(np.asarray, tree)


def relative_error(got: Any, want: Any) -> float:
    """The largest |got - want| / |want| (Euclidean) of any leaf."""
    errors = jax.tree.map(
        lambda g, w: float(np.linalg.norm(np.asarray(g, np.float64) - w) / max(np.linalg.norm(w), 1e-12)),
        got,
        jax.tree.map(lambda w: np.asarray(w, np.float64), want),
    )
    return max(jax.tree.leaves(errors))


@lru_cache(maxsize=64)
def _forward(config: ModelConfig, execution: Execution) -> Any:
    def forward(params: Params, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        model = bind(config, execution, params)
        hidden, _ = model(tokens, positions, packed_attention(segments), None)
        return model.logits(hidden)

    return jax.jit(forward)


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Any,
    positions: Any = None,
    segments: Any = None,
    *,
    dtype: Dtype = "float32",
) -> np.ndarray:
    """Logits float32[batch, seq, vocab] of tokens [batch, seq] through the training side of the seam, computed in
    `dtype` with parameters in either layout."""
    tokens = np.asarray(tokens, np.int32)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    if segments is None:
        segments = np.zeros(tokens.shape, np.int32)
    execution = Execution(dtype, scan_layers=any(map(is_stacked, params)))
    return np.asarray(_forward(config, execution)(params, tokens, np.asarray(positions), np.asarray(segments)))


def next_tokens(config: ModelConfig, params: Params, sequences: list[list[int]], vocab: int) -> np.ndarray:
    """int[len(sequences), context]: the likeliest token after each position, by the training forward pass."""
    tokens = np.zeros((len(sequences), config.context_length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    return forward(config, params, tokens)[..., :vocab].argmax(axis=-1)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow past `size` bytes: what a quota or a full disk does, without being root."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
