"""What a parameter is: its shape, its logical axes and its role. They are stated once, where the parameter is made, and
all code that handles parameters reads them there."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

INIT_STD = 0.02
NORMAL = nnx.initializers.normal(INIT_STD)

Dtype = Literal["float32", "bfloat16"]


class Role(enum.Enum):
    """What a parameter does in the network. Code that treats kinds of parameters differently decides by it."""

    MATRIX = "matrix"
    """Multiplies activations as a matrix [inputs, outputs]; may be kept as integers and packed for a kernel"""
    EMBEDDING = "embedding"
    """The embedding table [vocab, embed]; as integers or packed, it is the matrix that the head multiplies by"""
    HEADS = "heads"
    """A matrix [inputs, head, outputs] for each head; never integers"""
    TURNED_HEADS = "turned heads"
    """A matrix [outputs, head, inputs] for each head; never integers"""
    EXPERTS = "experts"
    """A matrix [expert, inputs, outputs] for each expert; never integers"""
    ROUTER = "router"
    """The matrix that chooses experts; small, and always float32"""
    VECTOR = "vector"
    """A norm's scale, a bias or the attention sinks; small, and added or multiplied in float32"""
    CORRECTION = "correction"
    """A router's correction, float32, which training moves by the experts' load and not by the gradient"""
    ADAPTER = "adapter"
    """One of the two factors of a matrix's adapter (LoRA)"""
    ADAPTERS = "adapters"
    """One of the two factors, [adapter, inputs, outputs], of each adapter of a matrix that tokens choose among"""

    @property
    def is_small(self) -> bool:
        """Whether the parameter is kept in float32 whatever dtype the network computes in."""
        return self in (Role.ROUTER, Role.VECTOR, Role.CORRECTION)

    @property
    def decays(self) -> bool:
        """Whether the optimizer's weight decay applies to the parameter."""
        return self not in (Role.VECTOR, Role.CORRECTION)

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter is a single matrix, which may be kept as integers."""
        return self in (Role.MATRIX, Role.EMBEDDING)

    @property
    def multiplies(self) -> bool:
        """Whether activations are multiplied by it as by one or more matrices, which a kernel may want packed."""
        return self.is_matrix or self in (
            Role.HEADS,
            Role.TURNED_HEADS,
            Role.EXPERTS,
            Role.ROUTER,
            Role.ADAPTER,
            Role.ADAPTERS,
        )


@dataclass(frozen=True)
class Spec:
    """The description of one parameter of a network."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """The logical name of each axis, which `isthmus.model.sharding.RULES` maps to mesh axes; None is never split"""
    role: Role
    inputs: int
    """How many numbers of an activation a matrix contracts; 0 if the parameter isn't a matrix"""

    @property
    def size(self) -> int:
        """How many numbers the parameter holds."""
        return math.prod(self.shape)

    def storage_dtype(self, dtype: str | None) -> str:
        """The dtype in which serving keeps the parameter when the network computes in `dtype`; float32 for None."""
        return "float32" if dtype is None or self.role.is_small else dtype

    @property
    def matrices(self) -> int:
        """How many matrices it is: one for each expert, head or chosen adapter, and otherwise one."""
        axis = {Role.EXPERTS: 0, Role.ADAPTERS: 0, Role.HEADS: 1, Role.TURNED_HEADS: 1}.get(self.role)
        return 1 if axis is None else self.shape[axis]

    def as_matrix(self, array: jax.Array) -> jax.Array:
        """`array`, which holds this matrix, as [inputs, outputs]."""
        return array.T if self.role is Role.EMBEDDING else array.reshape(self.inputs, -1)

    @property
    def layer(self) -> Spec:
        """The parameter of one layer, where this is that of a stack with a leading axis of layers."""
        assert self.axes[0] == "layers", self.axes
        return Spec(self.shape[1:], self.axes[1:], self.role, self.inputs)


class NoNumbers(nnx.Rngs):
    """Stands for random numbers where only the shapes of parameters are wanted. Tracing the initializers, which
    nnx.eval_shape does, takes a millisecond for each parameter."""


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    role: Role,
    *,
    inputs: int = 0,
    initializer: Callable = NORMAL,
) -> nnx.Param:
    """A float32 parameter that carries its logical axes, its role and, if it is a matrix, its inputs (see `Spec`)."""
    value = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        if isinstance(rngs, NoNumbers)
        else initializer(rngs.params(), shape, jnp.float32)
    )
    return nnx.Param(value, out_sharding=axes, role=role, inputs=inputs)
