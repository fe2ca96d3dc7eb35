"""Checks of the values that a question brings. Each raises InvalidRequest naming the field and the limit."""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from isthmus.errors import InvalidRequest
from isthmus.forms import check_string

T = TypeVar("T", int, float)

_MOST_BITS = 256
"""Bits of a whole number that a message about it can show"""


def check_text(field: str, text: str) -> str:
    """Returns the text. Raises InvalidRequest if it is empty, or isn't text."""
    if not check_string(field, text):
        raise InvalidRequest(field, "must not be empty")
    return text


def check_token_ids(field: str, ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """The ids as int64[len(ids)]. Raises InvalidRequest for what aren't whole numbers, and for the first id that the
    tokenizer doesn't have."""
    try:
        values = _integers(ids)
    except (OverflowError, TypeError, ValueError):
        raise InvalidRequest(field, "must hold whole numbers below 2^63") from None
    wrong = np.flatnonzero((values < 0) | (values >= vocab_size))
    if wrong.size:
        token = values[wrong[0]]
        raise InvalidRequest(f"{field}[{wrong[0]}]", f"{token} is not a token id; the vocabulary has {vocab_size}")
    return values


def _integers(ids: Sequence[int]) -> np.ndarray:
    """int64[len(ids)]. Raises OverflowError or TypeError; numpy would cut fractions off and read numbers in strings."""
    if isinstance(ids, list | tuple):
        return np.frombuffer(array("q", ids), np.int64) if ids else np.zeros(0, np.int64)
    values = np.asarray(ids)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise TypeError
    if values.size and int(values.max()) >= 1 << 63:
        raise OverflowError
    return values.astype(np.int64)


def first(asked: T | None, recommended: T | None, default: T) -> T:
    return asked if asked is not None else recommended if recommended is not None else default


def check_int(field: str, value: int) -> int:
    """A whole number as Python's own. Raises InvalidRequest."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise InvalidRequest(field, f"must be a whole number, not {_shown(value)}") from None
    if number.bit_length() > _MOST_BITS:
        raise InvalidRequest(field, f"must have at most {_MOST_BITS} bits, not {number.bit_length()}")
    return number


def _shown(value: object) -> str:
    """A wrong value for a message, whatever it is."""
    return f"{value!r:.80}" if isinstance(value, str | bytes | float | bool | None) else f"a value of {type(value)}"


def check_flag(field: str, value: bool) -> bool:
    if not isinstance(value, bool | np.bool_ | int):
        raise InvalidRequest(field, f"must be True or False, not {_shown(value)}")
    return bool(value)


def check_whole(field: str, value: int, bits: int) -> int:
    value = check_int(field, value)
    if not 0 <= value < 1 << bits:
        raise InvalidRequest(field, f"must be below 2^{bits}, not {value}" if value > 0 else f"must not be {value}")
    return value


def check_within(field: str, value: float, low: float, high: float, *, open_low: bool = False) -> float:
    try:
        finite = math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest(field, f"must be a number in [{low:g}, {high:g}], not {_shown(value)}") from None
    if not finite or not low <= value <= high or (open_low and value == low):
        raise InvalidRequest(field, f"must be a number in {'(' if open_low else '['}{low:g}, {high:g}], not {value}")
    return value
