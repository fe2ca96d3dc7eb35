"""Compiled programs: kept on disk from one start to the next, and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

_count = 0


def _on_event(event: str, duration_secs: float, **_: Any) -> None:
    global _count
    _count += event == _COMPILE_EVENT


jax.monitoring.register_event_duration_secs_listener(_on_event)


def compilations() -> int:
    """Programs that this process has compiled, or read from the cache, since this module was imported."""
    return _count


def same_bits(mesh: Mesh) -> dict[str, Any]:
    """Compiler options of a program whose numbers must not depend on its layout, and whose speed doesn't matter.

    On CPU, LLVM rounds what fills a vector otherwise than what is left over, which depends on the mesh; at level 0 it
    makes no vectors.
    """
    return {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else {}


def enable_compilation_cache(folder: Path | None = None) -> Path:
    """Keeps compiled programs in `folder`, by default ~/.cache/isthmus/xla. It is the user's alone: what lies there is
    run."""
    folder = folder or Path("~/.cache/isthmus/xla").expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # JAX looks at the settings once, at its first compilation
    return folder
