"""Threads for what takes long over a text, so that it holds up nobody's stream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from isthmus.errors import Overloaded, Unavailable

T = TypeVar("T")

SHORT = 8 << 10
"""Bytes or items that take less than waking a thread is worth: about 3 ms"""
THREADS = 2
"""More would have the event loop wait for the interpreter longer: each may keep it for 5 ms"""


class Workers:
    """A few threads, and only so much waiting for them."""

    def __init__(self, calls: int = 256, size: int = 64 << 20) -> None:
        """calls, size: most that wait or run, and their bytes together."""
        self._calls, self._size = calls, size
        self._held_calls = self._held_size = 0
        self._lock = threading.Lock()
        self._closed = False
        self._threads = ThreadPoolExecutor(THREADS, "text")

    async def run(self, size: int, work: Callable[..., T], *args: Any, always: bool = False) -> T:
        """work(*args), on a thread unless `size`, in bytes, is short; always: on a thread.

        What still waits is dropped when the caller is cancelled. Raises what `work` does, Overloaded where too much
        waits already, and Unavailable once closed.
        """
        if size <= SHORT and not always:
            return work(*args)
        waiting = self._submit(size, work, *args)
        try:
            return await asyncio.wrap_future(waiting)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise Unavailable("the engine is shutting down") from None
            raise

    def _submit(self, size: int, work: Callable[..., T], *args: Any) -> Future[T]:
        with self._lock:
            if self._closed:
                raise Unavailable("the engine is shutting down")
            # One of any size is taken when there is no other.
            if self._held_calls and (self._held_calls >= self._calls or self._held_size + size > self._size):
                raise Overloaded(f"{self._held_calls} texts of {self._held_size} bytes wait to be tokenized already")
            self._held_calls, self._held_size = self._held_calls + 1, self._held_size + size

        def free(_: Future[T]) -> None:
            with self._lock:
                self._held_calls, self._held_size = self._held_calls - 1, self._held_size - size

        submitted = self._threads.submit(work, *args)
        submitted.add_done_callback(free)
        return submitted

    @property
    def waiting(self) -> int:
        """Calls that wait or run."""
        return self._held_calls

    def close(self) -> None:
        """What waits ends with Unavailable; what runs goes on."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
