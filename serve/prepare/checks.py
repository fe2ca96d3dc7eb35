"""Checks of the values that a question brings, beside those of isthmus/arguments.py. Each raises InvalidRequest naming
the field and the limit."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from isthmus.arguments import not_a_token, refused_ids
from isthmus.errors import InvalidRequest
from isthmus.forms import check_string

T = TypeVar("T", int, float)


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
        raise refused_ids(field, ids, 63) from None
    wrong = np.flatnonzero((values < 0) | (values >= vocab_size))
    if wrong.size:
        said = not_a_token(int(values[wrong[0]]))
        raise InvalidRequest(f"{field}[{wrong[0]}]", f"{said}; the vocabulary has {vocab_size}")
    return values


def _integers(ids: Sequence[int]) -> np.ndarray:
    """int64[len(ids)]. Raises OverflowError or TypeError; numpy would cut fractions off and read numbers in strings."""
    if isinstance(ids, list | tuple):
        if bool in set(map(type, ids)):
            raise TypeError
        return np.frombuffer(array("q", ids), np.int64) if ids else np.zeros(0, np.int64)
    values = np.asarray(ids)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise TypeError
    if values.size and int(values.max()) >= 1 << 63:
        raise OverflowError
    return values.astype(np.int64)


def first(asked: T | None, recommended: T | None, default: T) -> T:
    return asked if asked is not None else recommended if recommended is not None else default
