"""Threads for work that takes long, over a text or a folder, so that it doesn't hold up the streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from isthmus.errors import Overloaded, Unavailable

T = TypeVar("T")

SHORT = 8 << 10
"""Most bytes or items that aren't worth waking a thread for; they take about 3 ms"""
THREADS = 2
"""More threads would let the event loop wait longer for the interpreter, which each may keep for 5 ms"""


Item = tuple[Future[Any], Callable[[], Any]]


class Workers:
    """A few threads, with a bounded amount of work that waits for them. What runs doesn't keep the process from ending,
    as it would on the threads of concurrent.futures."""

    def __init__(self, calls: int = 256, size: int = 64 << 20) -> None:
        """calls: most that wait or run at once. size: most bytes of all of them together."""
        self._calls, self._size = calls, size
        self._held_calls = self._held_size = 0
        self._changed = threading.Condition()
        self._closed = False
        self._waiting: list[Item] = []
        self._threads = 0

    async def run(self, size: int, work: Callable[..., T], *args: Any, always: bool = False) -> T:
        """Returns work(*args), run on a thread if its `size`, in bytes, is more than SHORT, or if `always`.

        Work that still waits is dropped when its caller is cancelled. Raises what `work` raises, Overloaded if too much
        is waiting already, and Unavailable once closed.
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
        def free(done: Future[T]) -> None:
            with self._changed:
                self._held_calls, self._held_size = self._held_calls - 1, self._held_size - size
                if done.cancelled():  # no longer kept, nor is its text
                    self._waiting = [item for item in self._waiting if item[0] is not done]

        submitted: Future[T] = Future()
        submitted.add_done_callback(free)
        with self._changed:
            if self._closed:
                raise Unavailable("the engine is shutting down")
            # A text of any size is taken when there is no other.
            if self._held_calls and (self._held_calls >= self._calls or self._held_size + size > self._size):
                raise Overloaded(f"{self._held_calls} calls with {self._held_size} bytes wait for a thread already")
            if self._threads < min(THREADS, self._held_calls + 1):
                self._start_thread()
            self._held_calls, self._held_size = self._held_calls + 1, self._held_size + size
            self._waiting.append((submitted, partial(work, *args)))
            self._changed.notify()
        return submitted

    def _start_thread(self) -> None:
        """The lock is held. Raises Overloaded if the system gives no thread and there is none yet."""
        try:
            threading.Thread(target=self._work, name="work", daemon=True).start()
        except RuntimeError as error:
            if not self._threads:
                raise Overloaded(f"there is no thread for it: {error}") from None
        else:
            self._threads += 1

    @property
    def waiting(self) -> int:
        """Calls that wait or run."""
        return self._held_calls

    def close(self) -> None:
        """Ends the calls that wait with Unavailable; those that run go on."""
        with self._changed:
            self._closed = True
            left, self._waiting = self._waiting, []
            self._changed.notify_all()
        for future, _ in left:
            future.cancel()

    def _work(self) -> None:
        """Does what waits, one after the other, until no more can come."""
        while (item := self._next()) is not None:
            future, work = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del item, future, work  # else what was made lives until there is more to do

    def _next(self) -> Item | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self._waiting.pop(0) if self._waiting else None
