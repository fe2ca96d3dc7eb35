"""Adapters among a network's parameters: the factors "…/lora_a" and "…/lora_b" beside the "…/kernel" that they adapt.

`Linear` in model/layers.py says what they compute, and model/weights/huggingface/adapters.py how they are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.config import LoraConfig, ModelConfig
from isthmus.model.ops.linear import Weight
from isthmus.model.ops.rounding import narrowed
from isthmus.model.parameter import Role, Spec
from isthmus.model.transformer import Params, parameter_specs
from isthmus.model.weights.layout import is_stacked, unstack
from isthmus.model.weights.load import Read, Source


def split(config: ModelConfig, params: Params) -> tuple[Params, Params]:
    """Returns (base, adapters): the parameters without adapters, and the adapters alone. params: in either layout."""
    adapters = adapter_paths(config)
    return (
        {path: weight for path, weight in params.items() if path not in adapters},
        {path: weight for path, weight in params.items() if path in adapters},
    )


@lru_cache(maxsize=16)
def adapter_paths(config: ModelConfig) -> frozenset[str]:
    """The paths of all adapters' factors, in both layouts."""
    layouts = (parameter_specs(config), parameter_specs(config, stacked=True))
    return frozenset(path for specs in layouts for path, spec in specs.items() if spec.role is Role.ADAPTER)


class Adapter(NamedTuple):
    """An adapter that was read from its folder."""

    lora: LoraConfig
    factors: dict[str, np.ndarray]
    """The factors in float32, by their paths in the unstacked layout"""


def in_place(config: ModelConfig, adapter: Adapter) -> dict[str, np.ndarray]:
    """An adapter's factors as each place for one in `config.lora` holds them: float32, by their paths in the unstacked
    layout, b times the adapter's scale. Where the adapter has a smaller rank, or none, there are zeros."""
    whole = {path: np.zeros(spec.shape[1:], np.float32) for path, spec in place_specs(config).items()}
    rank, scale = adapter.lora.rank, np.float32(adapter.lora.scale)
    for path, factor in adapter.factors.items():
        if path.endswith("/lora_a"):
            whole[path][..., :rank] = factor
        else:
            whole[path][:rank] = scale * factor
    return whole


@lru_cache(maxsize=16)
def place_specs(config: ModelConfig) -> Mapping[str, Spec]:
    """What the factors are of adapters that tokens choose among, by their paths in the unstacked layout."""
    return {path: spec for path, spec in parameter_specs(config).items() if spec.role is Role.ADAPTERS}


def side_by_side(config: ModelConfig, adapters: Iterable[Adapter]) -> dict[str, np.ndarray]:
    """The factors of adapters that tokens choose among, each `in_place`, in the first of the places that `config.lora`
    has: float32[adapters, ...] by their paths in the unstacked layout."""
    whole = {path: np.zeros(spec.shape, np.float32) for path, spec in place_specs(config).items()}
    for place, adapter in enumerate(adapters):
        for path, factor in in_place(config, adapter).items():
            whole[path][place] = factor
    return whole


@dataclass(frozen=True)
class AdapterSource:
    """A source of a base model's parameters together with those of an adapter, or of several."""

    base: Source
    adapters: Mapping[str, np.ndarray]
    """The factors in float32, by their paths in the unstacked layout; those of several adapters side by side"""

    @property
    def nbytes(self) -> int:
        """The size of the base model in bytes. An adapter is small beside it and isn't counted."""
        return self.base.nbytes

    def reads(self, abstract: Params) -> Iterator[Read]:
        """Yields the base model's reads, and one read for the whole adapter."""
        ours = {path: leaf for path, leaf in abstract.items() if next(unstack(path, None))[0] in self.adapters}
        yield from self.base.reads({path: leaf for path, leaf in abstract.items() if path not in ours})
        yield Read(0, lambda: {path: self._placed(path, leaf) for path, leaf in ours.items()})

    def _placed(self, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(narrowed(_held(self.adapters, path), leaf.dtype), leaf.sharding)


def _held(adapters: Mapping[str, np.ndarray], path: str) -> np.ndarray:
    """Returns the factor at a path of either layout. adapters: factors in the unstacked layout."""
    layers = [adapters[each] for each, _ in unstack(path, None)]
    return np.stack(layers) if is_stacked(path) else layers[0]


class Merge:
    """A transform of `isthmus.model.weights.load` that adds an adapter to the kernels that it adapts.

    A kernel becomes kernel + alpha / rank * a·b in the kernel's sharding and its memory. The sum is computed in
    float32, and `narrowed` rounds it to the kernel's dtype so that changes smaller than a step of that dtype aren't
    lost on average.
    """

    def __init__(self, adapters: Mapping[str, np.ndarray], scale: float) -> None:
        """adapters: the factors in float32, by their paths in the unstacked layout. scale: alpha / rank."""
        self._adapters, self._scale = adapters, scale

    def __call__(self, path: str, weight: Weight) -> Weight:
        """Returns a kernel with its adapter added, and any other parameter as it is. path: in either layout."""
        first, _ = next(unstack(path, None))
        if f"{_module(first)}/lora_a" not in self._adapters or not first.endswith("/kernel"):
            return weight
        a, b = (_held(self._adapters, f"{_module(path)}/{factor}") for factor in ("lora_a", "lora_b"))
        assert isinstance(weight, jax.Array), "adapters are merged before matrices become integers"
        return _program(weight.sharding)(weight, a, b, self._scale, stacked=is_stacked(path))


def _module(path: str) -> str:
    return path.rpartition("/")[0]


@lru_cache(maxsize=64)
def _program(sharding: jax.sharding.Sharding) -> Any:
    return jax.jit(_add_product, static_argnames="stacked", donate_argnames="kernel", out_shardings=sharding)


def _add_product(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: Any, *, stacked: bool) -> jax.Array:
    """Returns kernel[*inputs, *outputs] + scale * a[*inputs, rank] @ b[rank, *outputs]. stacked: whether all three have
    a leading axis of layers."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision="highest")

    added = scale * (jax.vmap(product) if stacked else product)(a, b)
    return narrowed(kernel.astype(jnp.float32) + added, kernel.dtype)
