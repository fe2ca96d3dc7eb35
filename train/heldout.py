"""Decides which text is held out of training: a share of all bytes, and the same text whatever else is there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from isthmus.train.documents import Document

TAIL_BYTES = 8 << 10
"""Bytes that are held out of a long text, unless its share is more; they make about four sequences"""


class Parts(NamedTuple):
    """The two parts of a document; None if a part is empty."""

    train: Document | None
    heldout: Document | None


class Split(NamedTuple):
    train: list[Document]
    heldout: list[Document]


def part(document: Document, fraction: float) -> Parts:
    """Decides what of a document is held out, by its content and `fraction` alone. Adding, removing, moving or renaming
    other documents changes nothing, and equal documents are split alike.

    On average, `fraction` of a document's bytes is held out. A conversation, or a text of at most TAIL_BYTES, is held
    out whole with the probability `fraction`. A text whose share, fraction * size, exceeds TAIL_BYTES loses its share
    at its end. A text in between loses TAIL_BYTES at its end, with the probability share / TAIL_BYTES. So of no text
    more than max(TAIL_BYTES, share) is held out. What is held out at one fraction is also held out at a greater one.
    """
    dice, size = _dice(document), document.size
    if document.kind == "messages" or size <= TAIL_BYTES:
        return Parts(None, document) if dice < fraction else Parts(document, None)
    share = size * fraction
    if dice >= share / TAIL_BYTES:
        return Parts(document, None)
    return _hold_out_end(document, max(TAIL_BYTES, round(share)))


def split(documents: Sequence[Document], fraction: float) -> Split:
    """The parts of all documents, in their order.

    With few documents, chance may miss `fraction` by far. If less than half of it is held out, more is added: texts or
    their ends, or else whole conversations, in the order of `_sampling_key`. If too much is held out (everything, or
    more than half of everything and more than twice what was asked for), only such additions are held out. In these
    cases what is held out depends on the other documents, until there is more text. Either list may be empty if there
    is too little to split.
    """
    parts = [part(document, fraction) for document in documents]
    held, total = _size(both.heldout for both in parts), _size(document for both in parts for document in both)
    if held > max(total / 2, 2 * fraction * total) or held == total:
        parts, held = [Parts(document, None) for document in documents], 0
    if held < fraction * total / 2 or not held:
        _top_up(parts, fraction * total - held)
    return Split([both.train for both in parts if both.train], [both.heldout for both in parts if both.heldout])


def _size(documents: Iterable[Document | None]) -> int:
    return sum(document.size for document in documents if document is not None)


def _top_up(parts: list[Parts], wanted: float) -> None:
    """Holds out about `wanted` more bytes of the documents that are trained on as a whole: at least something, never
    all. Equal documents are split alike."""
    alike: dict[bytes, tuple[Document, list[int]]] = {}
    for index, (document, heldout) in enumerate(parts):
        if document is not None and heldout is None:
            alike.setdefault(document.digest, (document, []))[1].append(index)
    groups = sorted(alike.values(), key=lambda group: _sampling_key(group[0]))
    training, left, held = sum(both.train is not None for both in parts), wanted, 0
    for document, indices in groups:
        if held and left <= wanted / 4:
            return
        copies = len(indices)
        if training > copies and (document.kind == "messages" or document.size * copies <= left):
            tail = document.size
            training -= copies
        elif document.kind == "text":
            tail = min(max(1, round(left / copies)), document.size - 1)
        else:
            continue
        for index in indices:
            parts[index] = _hold_out_end(document, tail)
            held += _size([parts[index].heldout])
        left = wanted - held


def _dice(document: Document) -> float:
    """A number in [0, 1) that depends on the document's content alone."""
    return (int.from_bytes(document.digest[:8], "big") >> 11) / 2**53


def _sampling_key(document: Document) -> tuple[bool, float]:
    """The key to sort documents by: texts come first, in the order in which drawing bytes at random would find them, so
    that long ones tend to come early (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir")."""
    text = document.kind == "text"
    return not text, -math.log(1 - _dice(document)) / (document.size if text else 1)


def _hold_out_end(document: Document, tail: int) -> Parts:
    """Holds out about `tail` bytes at the document's end, in whole characters; nothing if it is a single character."""
    if tail >= document.size:
        return Parts(None, document)
    data = document.text.encode()
    wanted = len(data) - tail
    near = range(max(1, wanted - 3), min(len(data), wanted + 4))  # a character has up to four bytes
    starts = [at for at in near if data[at] & 0xC0 != 0x80]
    if not starts:
        return Parts(document, None)
    at = min(starts, key=lambda at: abs(at - wanted))
    return Parts(
        dataclasses.replace(document, text=data[:at].decode()),
        dataclasses.replace(document, text=data[at:].decode(), tail=True),
    )
