"""What an argument must be: the same checks, and the same words, wherever a model runs; without jax. Each returns the
value, and raises InvalidRequest that names the field."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

from isthmus.errors import InvalidRequest

_MOST_BITS = 256
"""Bits of a whole number that a message about it can show"""


def shown(value: object) -> str:
    """A wrong value for a message, whatever it is."""
    return f"{value!r:.80}" if isinstance(value, str | bytes | float | bool | None) else type(value).__name__


def check_int(field: str, value: int) -> int:
    """A whole number as Python's own."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise InvalidRequest(field, f"must be a whole number, not {shown(value)}") from None
    if number.bit_length() > _MOST_BITS:
        raise InvalidRequest(field, f"must have at most {_MOST_BITS} bits, not {number.bit_length()}")
    return number


def check_whole(field: str, value: int, bits: int) -> int:
    """A whole number that so many bits hold, without a sign."""
    value = check_int(field, value)
    if not 0 <= value < 1 << bits:
        raise InvalidRequest(
            field, f"must be below 2^{bits}, not {value}" if value > 0 else f"must be 0 or more, not {value}"
        )
    return value


def check_flag(field: str, value: bool) -> bool:
    """A yes or no; 1 and 0, and numpy's, count as such."""
    if not isinstance(value, int) and type(value).__name__ not in ("bool", "bool_"):
        raise InvalidRequest(field, f"must be True or False, not {shown(value)}")
    return bool(value)


def check_number(field: str, value: float) -> float:
    """A number, as it is; not a number (NaN) and infinity are some."""
    try:
        math.isfinite(value)
    except (TypeError, ValueError):
        raise InvalidRequest(field, f"must be a number, not {shown(value)}") from None
    except OverflowError:
        raise InvalidRequest(field, "must be a number that a float can hold") from None
    return value


def check_within(field: str, value: float, low: float, high: float, *, open_low: bool = False) -> float:
    """A number from low to high, both included, unless open_low excludes low."""
    check_number(field, value)
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        raise InvalidRequest(field, f"must be a number in {'(' if open_low else '['}{low:g}, {high:g}], not {value}")
    return value


def refused_ids(field: str, ids: Sequence[int], bits: int) -> InvalidRequest:
    """The error for token ids that can't be read, which names the first that isn't a whole number of so many bits,
    without a sign."""
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            return InvalidRequest(f"{field}[{index}]", f"must be a whole number, not {shown(token)}")
        if not 0 <= token < 1 << bits:
            return InvalidRequest(f"{field}[{index}]", not_a_token(int(token)))
    return InvalidRequest(field, f"must be a sequence of token ids, not {type(ids).__name__}")


def not_a_token(number: int) -> str:
    """What is said of a number that no token has."""
    return f"{number} is not a token id" if number.bit_length() <= _MOST_BITS else "is not a token id"
