"""A flag that the host raises while a program runs, which ends a loop early."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.ops.cpu.kernel import cpu_kernel
from isthmus.model.ops.operation import REFERENCE, Operation

_KEPT: list[ctypes.c_int32] = []
"""The numbers of all flags: a program may run on when whoever launched it is gone, as after an error"""


class Flag:
    """A number of the host's memory, which stays readable for as long as the process runs."""

    def __init__(self) -> None:
        self._value = ctypes.c_int32(0)
        _KEPT.append(self._value)
        address = ctypes.addressof(self._value)
        self.address = np.array([address & 0xFFFFFFFF, address >> 32], np.uint32)
        """uint32[2]: where it lies, the lower half first"""

    def set(self, raised: bool) -> None:
        """Raises the flag, or takes it down. Thread-safe."""
        self._value.value = raised


def raised(address: jax.Array, turn: jax.Array, *, implementation: str = REFERENCE) -> jax.Array:
    """bool[]: whether the flag at an `address` is raised now. A device that can't look at the host's memory finds it
    down.

    turn: int32[], which is another in each turn of a loop, so that it is looked at in each.
    """
    return FLAG[implementation](address, turn)


def _reference(address: jax.Array, turn: jax.Array) -> jax.Array:
    return jnp.zeros((), bool)


def _cpu(address: jax.Array, turn: jax.Array) -> jax.Array:
    call = jax.ffi.ffi_call("isthmus_read_flag", jax.ShapeDtypeStruct((), jnp.int32), has_side_effect=True)
    value: jax.Array = call(address, turn)
    return value != 0


FLAG: Operation[Callable[[jax.Array, jax.Array], jax.Array]] = Operation(
    "flag", _reference, (cpu_kernel(_cpu),), is_used=lambda setting: setting.page_size > 0
)
