"""How this process takes memory from the system. Imports nothing heavy, because it runs before jax is imported."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_heap() -> None:
    """Makes glibc keep freed memory, instead of mapping every large block anew.

    XLA on CPU allocates its temporaries with one malloc per step. If they are over 32 MB, glibc would map, fault in and
    unmap them each time (measured: a third of a small training step). Without Linux and glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 0)


def release_heap() -> None:
    """Gives unused memory of the heap back to the system, such as what files were read into while loading."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
