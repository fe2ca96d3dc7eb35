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
"""Units of work of an iteration, a call, a filter; a character that is made is one unit"""
ITEM = 16
"""Units of an item of a list that is made"""
MAX_INT_BITS = 4096
_LOOK = 1024 * STEP
"""Units between two looks at the clock"""
_SEVERAL: Any = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))


@dataclass(frozen=True)
class RenderLimits:
    """What one rendering may use."""

    output: int = 4 << 20
    """Characters of the result, and of any string on the way to it"""
    work: int = 64 << 20
    """Units: about the characters that all its operations may make together"""
    seconds: float = 1.0
    """Processor time of the thread, so that a busy machine fails no honest template"""


class OverLimit(TemplateRuntimeError):
    """The template makes too much, or works too long."""


class Meter:
    """Every operation of a template pays here; one that could make much of little pays before it runs."""

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._left = limits.work
        self._look_at = limits.work
        self._deadline = time.thread_time() + limits.seconds
        self.written = 0
        """Characters of the output so far"""
        self.generated: list[tuple[int, str]] = []
        """Where each {% generation %} block began, and its text"""

    def spend(self, units: int) -> None:
        """Raises OverLimit when that is more than is left, or the time is up."""
        self._left -= max(0, units)
        if self._left < 0:
            raise OverLimit(f"it takes more work than the {self._limits.work} units that a chat template may use")
        if self._left <= self._look_at:
            self._look_at = self._left - _LOOK
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
        """Pays for a result that is at most a few times larger than what it was made of."""
        if isinstance(value, str):
            self.make(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend(ITEM * len(value))
        elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise OverLimit(f"it makes a number of more than {MAX_INT_BITS} bits")
        return value

    def walk(self, value: Any) -> int:
        """Characters that `value` has as text, about; pays for a look at all of it.

        A list that holds another twice, which holds another twice, is short, but takes Python for ever to compare, hash
        or write out: whatever does so is walked first.
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
        """The same items, each paid for."""
        for item in items:
            self.spend(STEP)
            yield item

    def settled(self, value: Any) -> Any:
        """What a generator gives, as a list that can be walked; other values as they are."""
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return list(self.each(value))
        return value


_METER: ContextVar[Meter] = ContextVar("meter")


def current() -> Meter:
    """Of the rendering under way in this thread."""
    return _METER.get()


@contextmanager
def metered(limits: RenderLimits) -> Iterator[Meter]:
    """Whatever a template does inside is paid for by this meter."""
    meter = Meter(limits)
    token = _METER.set(meter)
    try:
        yield meter
    finally:
        _METER.reset(token)
