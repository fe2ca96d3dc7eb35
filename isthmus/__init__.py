"""One Flax transformer, trained with jax.jit over a mesh and served with continuous batching on a paged KV cache.

Names are imported when they are first used, so that importing one of them costs only what that one needs: a `Client`
needs no jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.client import Client, Completion, generate_request
    from isthmus.errors import ConfigError

__all__ = ["Client", "Completion", "ConfigError", "generate_request"]

_HOME = {
    "isthmus.client": ("Client", "Completion", "generate_request"),
    "isthmus.errors": ("ConfigError",),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
