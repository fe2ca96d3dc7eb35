"""Counts what a serialized message holds before it is parsed: parsing can't be interrupted, and a few bytes can hold
many fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from isthmus.errors import InvalidRequest

MAX_TEXT_BYTES = 4 << 20
"""The most bytes that a field may take; for a repeated field, that all its values may take together"""
MAX_NUMBERS_BYTES = 1 << 20
"""The most bytes that the lists of numbers in a message may take together; fewer than for text, because each number is
parsed by itself, a million in about 12 ms"""
MAX_FIELDS = 1 << 15
"""Most fields of a message, including those of the messages in it; parsing them takes about 10 ms"""

_Span = tuple[int, int, Any, str]
"""Start, end, the Descriptor of the message between them, and the name of the field that holds it"""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_TEXT = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
_NUMBERS = "lists of numbers"
"""What they take together is counted by this name, which no field has"""
_OUTER = "GenerateStreamRequest"
"""The message whose only field is left out of the names of the fields in it"""


def check_wire(data: bytes, message_type: Any) -> None:
    """Raises InvalidRequest, naming the field, if a message has more fields or longer ones than may be parsed.

    message_type: the message's Descriptor. Bytes that aren't a message are left for the parser to refuse.
    """
    sizes = Counter[str]()
    todo: list[_Span] = [(0, len(data), message_type, "")]
    count = 0
    while todo:
        span = todo.pop()
        for _ in _fields(data, span, sizes, todo):
            count += 1
            if count > MAX_FIELDS:
                raise InvalidRequest(
                    span[3] or message_type.name, f"has more than {MAX_FIELDS} values and messages in it"
                )


def _fields(data: bytes, span: _Span, sizes: Counter[str], todo: list[_Span]) -> Iterator[None]:
    """Yields for each field of a message that the parser would read, and appends the messages in it to `todo`."""
    at, end, kind, name = span
    try:
        while at < end:
            yield
            tag, at = _varint(data, at)
            wire = tag & 7
            if wire == _VARINT:
                _, at = _varint(data, at)
            elif wire == _BYTES:
                size, at = _varint(data, at)
                if at + size > end:
                    return
                field = kind.fields_by_number.get(tag >> 3)
                inner = name if field is None or kind.name == _OUTER else f"{name}.{field.name}".lstrip(".")
                if field is not None and field.message_type is not None:
                    todo.append((at, at + size, field.message_type, inner))
                else:
                    _add(sizes, inner, size, field, kind)
                at += size
            else:
                at += {_FIXED64: 8, _FIXED32: 4}.get(wire, 0)
    except IndexError:
        return


def _add(sizes: Counter[str], name: str, size: int, field: FieldDescriptor | None, kind: Any) -> None:
    if field is None or field.type in _TEXT:
        counted, most, says = name, MAX_TEXT_BYTES, "has"
    else:
        counted, most, says = _NUMBERS, MAX_NUMBERS_BYTES, "makes the message's lists of numbers together have"
    sizes[counted] += size
    if sizes[counted] > most:
        raise InvalidRequest(name or kind.name, f"{says} {sizes[counted]} bytes; at most {most} are taken")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where the next one begins. Raises IndexError where the data ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError
