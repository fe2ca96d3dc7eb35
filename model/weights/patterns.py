"""Checks and matches regular expressions that come from users and from published files. Those that could take forever
to match are refused."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import regex

LENGTH = 200
"""The most characters that a pattern may have, unless the caller allows more."""
_UNBOUNDED = 3
"""The most quantifiers without an upper limit that a pattern may have. Each multiplies the time by the length of a
name. With three, matching 1,000 names of 100 characters takes 0.1 s to 15 s, depending on what follows the third."""
NAME = 100
"""The characters of a long name. A quantifier without an upper limit counts as this many ways to match."""
SECONDS = 10.0
"""The most that `Matching` takes for all that it matches, unless the caller says otherwise"""
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)


class _RefusedError(Exception):
    """Signals that a pattern is refused. The message is the reason."""


def check_pattern(pattern: str, longest: int = LENGTH, unbounded: int = _UNBOUNDED, choices: int = 1) -> str | None:
    """Returns why a regular expression is refused, as words that follow it ("has a quantifier …"). Returns None where
    it can be matched with names in bounded time.

    `re` may try every way in which a pattern matches a name, so the number of ways is limited. A pattern may have few
    quantifiers, of which `unbounded` may be without an upper limit, and none over a group that itself matches in
    several ways. choices: the ways that all else in a pattern may have beside as many quantifiers without a limit.
    """
    if len(pattern) > longest:
        return f"is longer than {longest} characters"
    try:
        parsed = parser.parse(pattern)
        if (count := _unbounded(parsed)) > unbounded:
            return f"has {count} quantifiers without an upper limit (*, +), and at most {unbounded} are allowed"
        if _ways(parsed) > max(NAME**_UNBOUNDED, choices * NAME**count):
            return "can match a name in too many ways: use fewer quantifiers and alternatives"
        re.compile(pattern)  # which refuses more than parsing does
    except _RefusedError as refused:
        return str(refused)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    return None


class Matching:
    """Matches names with regular expressions, all together in bounded time, while other threads run.

    `re` does neither: it tries every way in which a pattern may match, and nothing ends it."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._left = seconds

    def begins(self, pattern: regex.Pattern[str], name: str) -> bool:
        """Whether a pattern from `compiled` matches the beginning of a name. Raises TimeoutError."""
        return self._timed(pattern.match, name)

    def is_whole(self, pattern: regex.Pattern[str], name: str) -> bool:
        """Whether a pattern from `compiled` matches a whole name. Raises TimeoutError."""
        return self._timed(pattern.fullmatch, name)

    def _timed(self, match: Callable[..., Any], name: str) -> bool:
        begun = time.perf_counter()
        try:
            if self._left <= 0:
                raise TimeoutError
            return match(name, timeout=self._left, concurrent=True) is not None
        finally:
            self._left -= time.perf_counter() - begun


def compiled(pattern: str) -> regex.Pattern[str]:
    """A pattern that `check_pattern` lets through and in which `is_common` finds nothing else than `re` does."""
    return regex.compile(pattern, regex.VERSION0)


def is_common(pattern: str) -> bool:
    """Whether a pattern means the same to `re` and to `regex`, which knows names of classes in brackets, and braces
    that say how much may differ."""
    return re.search(r"\[[:.=]|\{(?!\d*,?\d*\})", pattern) is None


def ways(pattern: str) -> int:
    """An upper bound on the number of ways in which a pattern that is not refused can match the same name."""
    return _ways(parser.parse(pattern))


def _inner(argument: Any) -> Iterable[Any]:
    """The patterns in the argument of a parsed operation, at any depth of its tuples and lists."""
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _inner(part)


def _unbounded(parsed: Any) -> int:
    """Counts the quantifiers without an upper limit that a single match can go through. Of several alternatives, the
    one with the most counts."""
    count = 0
    for operation, argument in parsed:
        count += operation in _REPEATS and argument[1] == codes.MAXREPEAT
        inner = [_unbounded(each) for each in _inner(argument)]
        count += max(inner, default=0) if operation == codes.BRANCH else sum(inner)
    return count


def _ways(parsed: Any) -> int:
    """An upper bound on the number of ways in which a pattern can match the same name."""
    return math.prod(_ways_of(operation, argument) for operation, argument in parsed)


def _ways_of(operation: Any, argument: Any) -> int:
    if operation in _REPEATS:
        return _ways_repeated(*argument)
    inside = [_ways(part) for part in _inner(argument)]
    if operation is codes.BRANCH:
        return max(inside) if _apart(argument[1]) else sum(inside)
    return math.prod(inside)


def _ways_repeated(low: int, high: int, body: Any) -> int:
    inside = _ways(body)
    if high <= 1:
        return inside + (low == 0)
    if inside > 1 or body.getwidth()[0] == 0:
        raise _RefusedError("has a quantifier over a group that itself matches in several ways, such as (.*)*")
    return int(min(high - low + 1, NAME))


def _apart(alternatives: list[Any]) -> bool:
    """Whether each alternative begins with a different literal character, so that at most one of them can match."""
    first = [part[0] if len(part) else (None, None) for part in alternatives]
    return all(operation is codes.LITERAL for operation, _ in first) and len({code for _, code in first}) == len(first)
