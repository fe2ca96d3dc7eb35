"""The programs that this process compiles: kept on disk from one start to the next, and counted."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from isthmus.errors import ConfigError
from isthmus.model.process.cache_folder import CacheError, open_cache, user_cache

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

_count = 0


def _on_event(event: str, duration_secs: float, **_: Any) -> None:
    global _count
    _count += event == _COMPILE_EVENT


jax.monitoring.register_event_duration_secs_listener(_on_event)


def compilations() -> int:
    """How many programs this process has compiled, or read from the cache, since this module was imported."""
    return _count


def same_bits(mesh: Mesh) -> dict[str, Any]:
    """Compiler options for a program whose numbers must not depend on its layout, and whose speed doesn't matter.

    On CPU, LLVM rounds numbers that fill a vector differently from those left over, and which ones are left over
    depends on the mesh. At level 0 it uses no vectors.
    """
    return {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else {}


def enable_compilation_cache(named: Path | None = None) -> str | None:
    """Keeps compiled programs in a folder that model/process/cache_folder.py accepts, by default ~/.cache/isthmus/xla.

    Returns a warning for the user if programs compiled now won't be there at the next start, else None. Raises
    ConfigError for a folder that was named and can't even be read.
    """
    try:
        folder = named or user_cache("xla")
        unwritable = open_cache(folder)
    except CacheError as error:
        if named is not None:
            raise ConfigError(f"compilation_cache: {error}") from None
        return f"compiled programs are not kept for the next start: {error}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # JAX reads these settings only once, at its first compilation
    # JAX goes on without a program that it can't read or keep, but would warn of each one.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    return unwritable and f"programs compiled now are not kept for the next start: {unwritable}"
