"""How this process takes memory from the system. Imports nothing heavy: it runs before jax does."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_heap() -> None:
    """Lets glibc keep what is freed, instead of mapping every large block anew.

    XLA on CPU takes its temporaries with one malloc a step; over 32 MB, glibc would map, fault in and unmap them each
    time (measured: a third of a small training step). Elsewhere than Linux with glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 0)


def release_heap() -> None:
    """Gives back what the heap keeps and nobody uses: after loading, what the files were read into."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
