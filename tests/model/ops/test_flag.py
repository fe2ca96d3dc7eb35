"""A loop on the device hears of what the host wants."""

from __future__ import annotations

import ctypes

import jax
import jax.numpy as jnp
import pytest

from isthmus.model.ops.cpu import library
from isthmus.model.ops.flag import Flag, raised
from isthmus.model.ops.operation import REFERENCE


def turns(flag: Flag, implementation: str) -> int:
    """How many turns a loop has that goes on while the flag is down, at most 7."""

    def run(address: jax.Array) -> jax.Array:
        def goes_on(turn: jax.Array) -> jax.Array:
            return (turn < 7) & ~raised(address, turn, implementation=implementation)

        return jax.lax.while_loop(goes_on, lambda turn: turn + 1, jnp.int32(0))

    return int(jax.jit(run)(flag.address))


def test_a_raised_flag_ends_a_loop() -> None:
    """Whoever cancels would wait for a whole launch."""
    if reason := library.why_not():
        pytest.skip(reason)
    flag = Flag()
    assert turns(flag, "cpu") == 7
    flag.set(True)
    assert turns(flag, "cpu") == 0
    flag.set(False)
    assert turns(flag, "cpu") == 7


def test_without_the_kernel_a_flag_is_down() -> None:
    """A device that can't see the host's memory must not end its loops, or never."""
    flag = Flag()
    flag.set(True)
    assert turns(flag, REFERENCE) == 7


def test_its_memory_outlives_it() -> None:
    """A launch that is under way when its engine ends on an error would read what is somebody else's by then."""
    flags = [Flag() for _ in range(100)]
    for flag in flags:
        flag.set(True)
    addresses = [flag.address for flag in flags]
    del flag, flags
    others = [ctypes.c_int32(0) for _ in range(1000)]
    numbers = [ctypes.c_int32.from_address(int(low) | int(high) << 32).value for low, high in addresses]
    assert numbers == [1] * 100 and len(others) == 1000
