"""Which kernels the operations may use while a program is traced; by default none: plain jnp, right everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_cpu_kernels: ContextVar[bool] = ContextVar("cpu_kernels", default=False)


@contextmanager
def use_cpu_kernels(on: bool = True) -> Iterator[None]:
    """Traces for one CPU device with the kernels of model/ops/cpu, whose library must be loaded. They have no
    gradient."""
    token = _cpu_kernels.set(on)
    try:
        yield
    finally:
        _cpu_kernels.reset(token)


def cpu_kernels() -> bool:
    return _cpu_kernels.get()
