"""Regular expressions of other people: those that could take for ever are refused before they are used."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

LENGTH = 200
_UNBOUNDED = 3
"""Quantifiers without an upper limit: each multiplies the time by the length of a name. With three, 1,000 names of 100
characters take from a tenth of a second to some 15 s, by what follows the third."""
_NAME = 100
"""Characters of a long name: as many ways as a quantifier without an upper limit counts for"""
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)


class _RefusedError(Exception):
    """Why."""


def check_pattern(pattern: str, longest: int = LENGTH) -> str | None:
    """Why a regular expression is refused, as words that follow it ("has a quantifier …"), or None where it can be
    matched with names in bounded time. `re` goes back and tries every way in which a pattern can be laid over a name,
    so what counts is how many ways there are: few quantifiers, and none over what itself matches in several ways."""
    if len(pattern) > longest:
        return f"is longer than {longest} characters"
    try:
        parsed = parser.parse(pattern)
        if (count := _unbounded(parsed)) > _UNBOUNDED:
            return f"has {count} quantifiers without an upper limit (*, +), and at most {_UNBOUNDED} are allowed"
        if _ways(parsed) > _NAME**_UNBOUNDED:
            return "can match a name in too many ways: use fewer quantifiers and alternatives"
    except _RefusedError as refused:
        return str(refused)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    return None


def _inner(argument: Any) -> Iterable[Any]:
    """The patterns in an operation's argument, however deep in its tuples and lists."""
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _inner(part)


def _unbounded(parsed: Any) -> int:
    """Quantifiers without an upper limit that one name can meet, one after the other: the most of any alternative."""
    count = 0
    for operation, argument in parsed:
        count += operation in _REPEATS and argument[1] == codes.MAXREPEAT
        inner = [_unbounded(each) for each in _inner(argument)]
        count += max(inner, default=0) if operation == codes.BRANCH else sum(inner)
    return count


def _ways(parsed: Any) -> int:
    """In how many ways a pattern can be laid over the same name, at most."""
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
    return int(min(high - low + 1, _NAME))


def _apart(alternatives: list[Any]) -> bool:
    """Whether the first character says which of them it is."""
    first = [part[0] if len(part) else (None, None) for part in alternatives]
    return all(operation is codes.LITERAL for operation, _ in first) and len({code for _, code in first}) == len(first)
