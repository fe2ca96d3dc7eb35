"""What a rendering may use, and what it has used."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

STEP = 64
"""Units of work for an iteration, a call or a filter; each character that is made costs one unit"""
ITEM = 16
"""Units of work for each item of a list that is made"""
MAX_INT_BITS = 4096
_CLOCK_UNITS = 1024 * STEP
"""Units of work between two looks at the clock"""
_SEVERAL: Any = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))


@dataclass(frozen=True)
class RenderLimits:
    """What one rendering may use."""

    output: int = 4 << 20
    """Most characters of the result, and of any string on the way to it"""
    work: int = 64 << 20
    """Units of work: about the characters that all operations together may make"""
    seconds: float = 1.0
    """Processor time of the thread, which, unlike wall time, doesn't run out because the machine is busy"""


class OverLimit(TemplateRuntimeError):
    """The template makes too much text, or works for too long."""


class Meter:
    """Every operation of a template pays here; one that can make a large result of little pays before it runs."""

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._left = limits.work
        self._look_at = limits.work
        self._deadline = time.thread_time() + limits.seconds
        self.written = 0
        """Characters of the output so far"""
        self.generated: list[tuple[int, str]] = []
        """For each {% generation %} block, how many characters were written before it, and its text"""

    def spend(self, units: int) -> None:
        """Pays `units` of work. Raises OverLimit when fewer are left, or the time is up."""
        self._left -= max(0, units)
        if self._left < 0:
            raise OverLimit(f"it takes more work than the {self._limits.work} units that a chat template may use")
        if self._left <= self._look_at:
            self._look_at = self._left - _CLOCK_UNITS
            if time.thread_time() >= self._deadline:
                raise OverLimit(f"it takes longer than the {self._limits.seconds:g} s that a chat template may use")

    def make(self, characters: int) -> None:
        """Pays for a string that is about to be made. Raises OverLimit."""
        if characters > self._limits.output:
            raise OverLimit(f"it makes a text of more than {self._limits.output} characters")
        self.spend(characters)

    def write(self, text: str) -> None:
        """Counts a piece of the output. Raises OverLimit."""
        self.written += len(text)
        if self.written > self._limits.output:
            raise OverLimit(f"it makes a text of more than {self._limits.output} characters")

    def made(self, value: Any) -> Any:
        """Pays for a result that is at most a few times larger than what it was made of, and returns it."""
        if isinstance(value, str):
            self.make(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend(ITEM * len(value))
        elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise OverLimit(f"it makes a number of more than {MAX_INT_BITS} bits")
        return value

    def walk(self, value: Any) -> int:
        """Pays for a visit to all that `value` holds, and returns about how many characters it has as text.

        A list may hold another list twice, which again holds another one twice, and so on. It is short, but Python
        takes for ever to compare, hash or print it. So values are walked before anything does that.
        """
        characters, todo = 0, [value]
        while todo:
            item = todo.pop()
            size = len(item) if isinstance(item, str) else ITEM
            characters += size
            self.spend((size >> 4) + ITEM)
            if isinstance(item, Namespace):
                item = item._Namespace__attrs  # type: ignore[attr-defined]
            if isinstance(item, dict):
                todo.extend(item.keys())
                todo.extend(item.values())
            elif isinstance(item, _SEVERAL):
                todo.extend(item)
        return characters

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yields the same items, and pays for each."""
        for item in items:
            self.spend(STEP)
            yield item

    def settled(self, value: Any) -> Any:
        """A generator's items, paid for, as a list that can be walked; other values as they are."""
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return list(self.each(value))
        return value


_METER: ContextVar[Meter] = ContextVar("meter")


def current() -> Meter:
    """The meter of the rendering that is under way in this thread."""
    return _METER.get()


@contextmanager
def metered(limits: RenderLimits) -> Iterator[Meter]:
    """Yields the meter that pays for whatever a template does inside this context."""
    meter = Meter(limits)
    token = _METER.set(meter)
    try:
        yield meter
    finally:
        _METER.reset(token)
