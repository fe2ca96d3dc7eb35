"""Which characters of a conversation, as a template writes it, the assistant said. For templates that don't say so.

Where the conversation begins as the messages before an answer are written alone, the answer is what lies between those
and the same with it. Some templates rewrite what was said earlier (they leave out reasoning, say): there an answer is
replaced by a mark, and what differs, up to where the template asks for an answer and to how it ends one, is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]
"""Characters [start, end) of a rendered text"""
Write = Callable[[Messages, bool], str]
"""Messages as the template writes them, and whether it asks for an answer at the end"""


class Indistinct(Exception):
    """The answer whose index this holds can't be told from what surrounds it."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def find_answers(messages: Messages, prompted: bool, write: Write, endings: Sequence[str]) -> tuple[str, list[Span]]:
    """The text, and each answer's characters, its end of turn included, in order.

    endings: what a template may put behind all messages, and only there. Raises Indistinct, and what `write` does.
    """
    whole = write(messages, prompted)
    spans: list[Span] = []
    rewritten = False
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise Indistinct(0)
        span = _as_written_alone(messages, index, whole, write, endings)
        if span is None:
            rewritten = True
            span = _by_mark(messages, index, prompted, whole, write, endings)
        if spans and span[0] < spans[-1][1]:
            raise Indistinct(index)
        spans.append(span)
    if rewritten:
        _check(messages, prompted, whole, spans, write)
    return whole, spans


def _as_written_alone(messages: Messages, index: int, whole: str, write: Write, endings: Sequence[str]) -> Span | None:
    start = write(messages[:index], True)
    end = _beginning(whole, write(messages[: index + 1], False), endings)
    return (len(start), end) if whole.startswith(start) and end is not None else None


def _beginning(whole: str, part: str, endings: Sequence[str], at: int = 0) -> int | None:
    """Where `part`, without what the template ends all it writes with, ends in `whole` when it begins at `at`."""
    for ending in ("", *endings):
        if part.endswith(ending) and whole.startswith(part.removesuffix(ending), at):
            return at + len(part) - len(ending)
    return None


def _by_mark(messages: Messages, index: int, prompted: bool, whole: str, write: Write, endings: Sequence[str]) -> Span:
    before, end = _turn(messages, index, prompted, whole, write, endings)
    asked = _turn(messages, index - 1, prompted, whole, write, endings)[1]
    told, request = write(messages[:index], False), write(messages[:index], True)
    after = _beginning(request, told, endings)
    if after is None:
        raise Indistinct(index)
    # The request may write the beginning of an answer too, as an empty thought, which isn't in every answer.
    start = asked + min(_common(request[after:], whole[asked:]), before - asked)
    if not asked <= start <= end:
        raise Indistinct(index)
    return start, end


def _turn(
    messages: Messages, index: int, prompted: bool, whole: str, write: Write, endings: Sequence[str]
) -> tuple[int, int]:
    """How far a message's turn is the same whatever it says, and where it ends."""
    before, behind = _around(write(_marked(messages, [index]), prompted), index)
    closing = _around(write(_marked(messages[: index + 1], [index]), False), index)[1]
    end = _beginning(whole, closing, endings, len(whole) - len(behind))
    if not whole.endswith(behind) or end is None:
        raise Indistinct(index)
    return _common(before, whole), end


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        half = (same + most + 1) // 2
        if one.startswith(other[:half]):
            same = half
        else:
            most = half - 1
    return same


def _mark(index: int) -> str:
    return f"\ue0f0{index}\ue0f1"  # characters that nobody uses


def _marked(messages: Messages, indices: Sequence[int]) -> Messages:
    return [{**message, "content": _mark(i)} if i in indices else message for i, message in enumerate(messages)]


def _around(text: str, index: int) -> tuple[str, str]:
    """What is written around an answer that is a mark."""
    if text.count(_mark(index)) != 1:
        raise Indistinct(index)
    before, _, behind = text.partition(_mark(index))
    return before, behind


def _check(messages: Messages, prompted: bool, whole: str, spans: Sequence[Span], write: Write) -> None:
    """Raises Indistinct unless all that lies outside the answers stays as it is when they are others."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    other, at = write(_marked(messages, answers), prompted), 0
    for index, start, end in zip(answers, [0, *(end for _, end in spans)], [start for start, _ in spans], strict=False):
        between = whole[start:end]
        at = other.find(between, at) if index != answers[0] else (0 if other.startswith(between) else -1)
        if at < 0:
            raise Indistinct(index)
        at = other.find(_mark(index), at + len(between))
        if at < 0:
            raise Indistinct(index)
    if not other.endswith(whole[spans[-1][1] :]):
        raise Indistinct(answers[-1])
