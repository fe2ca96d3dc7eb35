"""Which text is kept out of training: a share of all bytes, and the same text whatever else is there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from isthmus.train.documents import Document

TAIL_BYTES = 8 << 10
"""The most that is held out of a text whose share of it would be less: about four sequences"""


class Parts(NamedTuple):
    """A document's two parts; None is nothing of it."""

    train: Document | None
    heldout: Document | None


class Split(NamedTuple):
    train: list[Document]
    heldout: list[Document]


def part(document: Document, fraction: float) -> Parts:
    """What of a document is held out, which depends on its content and on `fraction` alone: adding, removing, moving or
    renaming others moves nothing, and of two that are equal the same is held out.

    Each holds out `fraction` of its bytes in the mean. A conversation, or a text of at most TAIL_BYTES, is held out
    whole with that probability; a text so long that its share exceeds TAIL_BYTES loses its share at its end; one in
    between, with the probability that makes the mean right, TAIL_BYTES at its end. So no text weighs more than
    max(TAIL_BYTES, fraction of it). What is held out at a fraction is also held out at a greater one.
    """
    dice, size = _dice(document), document.size
    if document.kind == "messages" or size <= TAIL_BYTES:
        return Parts(None, document) if dice < fraction else Parts(document, None)
    share = size * fraction
    if dice >= share / TAIL_BYTES:
        return Parts(document, None)
    return _hold(document, max(TAIL_BYTES, round(share)))


def split(documents: Sequence[Document], fraction: float) -> Split:
    """The parts of all documents, in their order.

    A few documents can't be thrown dice for. Where less than half of what was asked for comes out, more is held out:
    texts or their ends, or else whole conversations, in the order of their hashes; where more than half of all does,
    though less was asked for, that alone is. What is held out so depends on what else is there, until there is more
    text. Either list may be empty where there is too little to split.
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
    """Holds out about `wanted` bytes more, and something at least, of what is trained on whole; never all of it. Equal
    documents go together."""
    alike: dict[bytes, tuple[Document, list[int]]] = {}
    for index, (document, heldout) in enumerate(parts):
        if document is not None and heldout is None:
            alike.setdefault(document.digest, (document, []))[1].append(index)
    groups = sorted(alike.values(), key=lambda group: _turn(group[0]))
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
            parts[index] = _hold(document, tail)
            held += _size([parts[index].heldout])
        left = wanted - held


def _dice(document: Document) -> float:
    """In [0, 1), thrown by its content."""
    return (int.from_bytes(document.digest[:8], "big") >> 11) / 2**53


def _turn(document: Document) -> tuple[bool, float]:
    """Texts first, each the sooner the longer it is: as a byte drawn at random would find them (Efraimidis and Spirakis
    2006, "Weighted random sampling with a reservoir")."""
    text = document.kind == "text"
    return not text, -math.log(1 - _dice(document)) / (document.size if text else 1)


def _hold(document: Document, tail: int) -> Parts:
    """Holds out about `tail` bytes at the document's end, in whole characters; none of a single character."""
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
