"""Adapters in a tree of parameters: leaves "lora_a" and "lora_b" beside the "kernel" that they adapt.

model/layers.py: Linear says what they compute, model/weights/huggingface/adapters.py how they are stored.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from isthmus.model.config import LoraConfig, ModelConfig
from isthmus.model.ops.rounding import narrowed
from isthmus.model.transformer import Params
from isthmus.model.weights.huggingface.adapters import load_adapter, save_adapter

__all__ = ["LEAVES", "is_adapter", "join", "load_adapter", "merge", "save_adapter", "split"]

LEAVES = ("lora_a", "lora_b")


def is_adapter(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at a tree path is an adapter's, or an optimizer's moment of one."""
    return bool(path) and getattr(path[-1], "key", None) in LEAVES


def split(params: Params) -> tuple[Params, Params]:
    """(base, adapters): the parameters without adapters, and the adapters alone, without empty dicts."""
    base: Params = {}
    adapters: Params = {}
    for name, node in params.items():
        if isinstance(node, dict):
            for side, part in zip((base, adapters), split(node), strict=True):
                if part:
                    side[name] = part
        else:
            (adapters if name in LEAVES else base)[name] = node
    return base, adapters


def join(base: Params, adapters: Params) -> Params:
    """The inverse of split."""
    joined = dict(base)
    for name, node in adapters.items():
        if isinstance(node, dict):
            joined[name] = join(joined.get(name, {}), node)
        else:
            assert name in LEAVES and name not in joined, name
            joined[name] = node
    return joined


def merge(config: ModelConfig, params: Params, *, donate: bool = False) -> tuple[ModelConfig, Params]:
    """The same network without adapters: each kernel + alpha / rank * a·b, computed in float32 and rounded to the
    kernel's dtype so that what is less than its steps isn't lost, in the kernel's sharding.

    params: in the layout of `config`. donate: gives the kernels that are adapted away, so that no second copy is made.
    """
    if not config.lora.rank:
        return config, params

    def walk(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if LEAVES[0] not in node:
            return {name: walk(child) for name, child in node.items()}
        rest = {name: leaf for name, leaf in node.items() if name not in LEAVES}
        kernel, a, b = (node[name] for name in ("kernel", *LEAVES))
        return {**rest, "kernel": _merged(kernel, a, b, config.lora.scale, config.scan_layers, donate)}

    return dataclasses.replace(config, lora=LoraConfig()), walk(params)


def _merged(kernel: Any, a: Any, b: Any, scale: float, stacked: bool, donate: bool) -> jax.Array:
    if isinstance(kernel, jax.core.Tracer):  # the program around this decides about sharding and donation
        return _add_product(kernel, a, b, scale, stacked=stacked)
    sharding = kernel.sharding if isinstance(kernel, jax.Array) else None
    return _program(sharding, donate and sharding is not None)(kernel, a, b, scale, stacked=stacked)


@lru_cache(maxsize=64)
def _program(sharding: jax.sharding.Sharding | None, donate: bool) -> Any:
    donated = ("kernel",) if donate else ()
    return jax.jit(_add_product, static_argnames="stacked", donate_argnames=donated, out_shardings=sharding)


def _add_product(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: Any, *, stacked: bool) -> jax.Array:
    """kernel[*inputs, *outputs] + scale * a[*inputs, rank] @ b[rank, *outputs]; stacked: a leading axis of layers."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision="highest")

    added = scale * (jax.vmap(product) if stacked else product)(a, b)
    return narrowed(kernel.astype(jnp.float32) + added, kernel.dtype)
