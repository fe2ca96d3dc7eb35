"""How a model is laid out over devices: the one table from logical axis names to mesh axes.

Every parameter and activation names its axes in the model's terms ("embed", "heads", …). RULES maps those names to the
axes of the mesh (dp, fsdp, ep, tp). Another kind of parallelism is another mesh; the model stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from flax.core import spmd
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig

MESH_AXES = ("dp", "fsdp", "ep", "tp")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # parameters
    ("layers", None),
    ("embed", "fsdp"),
    ("heads", "tp"),
    ("kv_heads", "tp"),
    ("head_dim", None),
    ("mlp", "tp"),
    ("vocab", "tp"),
    ("experts", "ep"),
    ("routes", None),
    ("latent", None),
    # activations
    ("batch", ("dp", "fsdp", "ep")),
    ("seq", None),
    ("tokens", None),
    ("residual", None),
    ("latent_head", None),
    ("routed", ("dp", "fsdp")),  # a training batch's tokens, joined over "ep" where experts read them
    # the paged cache
    ("pages", None),
)


@dataclass(frozen=True)
class MeshShape:
    """How many devices each kind of parallelism uses; 1 means that it isn't used."""

    dp: int = 1
    """Data parallel: replicas of the parameters"""
    fsdp: int = 1
    """Data parallel with the parameters sharded"""
    tp: int = 1
    """Tensor parallel: heads, MLP and vocabulary are split"""
    ep: int = 1
    """Expert parallel: experts are split; everything else is data parallel"""

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Reads `dp=2,fsdp=2,tp=2`; an axis that isn't named is 1. Raises ConfigError."""
        sizes: dict[str, int] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, _, size = part.partition("=")
            if name not in MESH_AXES or name in sizes:
                raise ConfigError(f"mesh: {part!r} is not one of {', '.join(f'{a}=N' for a in MESH_AXES)}, each once")
            if not size.isdecimal() or int(size) < 1:
                raise ConfigError(f"mesh: {part!r} needs a whole number of devices, at least 1")
            sizes[name] = int(size)
        return cls(**sizes)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The sizes in the order of MESH_AXES."""
        return (self.dp, self.fsdp, self.ep, self.tp)

    @property
    def data(self) -> int:
        """How many parts a training batch is split into."""
        return self.dp * self.fsdp * self.ep

    @property
    def devices(self) -> int:
        return math.prod(self.shape)


def build_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over the first devices of this process. Raises ConfigError when there are too few."""
    devices = jax.devices() if devices is None else devices
    if shape.devices > len(devices):
        raise ConfigError(
            f"mesh: {shape} needs {shape.devices} devices, and there are {len(devices)} ({devices[0].platform})"
        )
    return jax.make_mesh(
        shape.shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices[: shape.devices]
    )


def check_divisible(config: ModelConfig, shape: MeshShape) -> None:
    """Raises ConfigError naming the first dimension that the mesh can't split evenly."""
    split = [("heads", config.heads, "tp"), ("mlp_dim", config.mlp_dim, "tp"), ("vocab_size", config.vocab_size, "tp")]
    split += [("dim", config.dim, "fsdp")]
    if not config.latent.rank:
        split.insert(0, ("kv_heads", config.kv_heads, "tp"))
    if config.mixture.experts:
        mixture = config.mixture
        split += [("mixture.experts", mixture.experts, "ep"), ("mixture.dim", mixture.dim, "tp")]
        split += [("mixture.shared_dim", mixture.shared_dim, "tp")]
    elif shape.ep > 1:
        raise ConfigError(f"mesh: ep={shape.ep} splits experts, and this model has none")
    for name, size, axis in split:
        if size % (parts := getattr(shape, axis)):
            raise ConfigError(f"mesh: model.{name}={size} is not divisible by {axis}={parts}")


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Traces and compiles under `mesh` with RULES in force."""
    with jax.set_mesh(mesh), spmd.logical_axis_rules(RULES):
        yield


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes for an array whose dimensions have the logical `axes`."""
    table = dict(RULES)
    return PartitionSpec(*(table[name] if name is not None else None for name in axes))


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that the logical axis `name` is split over."""
    axes = dict(RULES)[name]
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def named_sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes))


_LEADING = {1: ("tokens",), 2: ("batch", "seq")}


def shard(x: jax.Array, *trailing: str) -> jax.Array:
    """Constrains the sharding of an activation [tokens, *trailing] or [batch, seq, *trailing]; no-op without a mesh."""
    return constrain(x, *_LEADING[x.ndim - len(trailing)], *trailing)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an array with these logical axes to lie as RULES say; no-op without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
