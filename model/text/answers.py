"""Finds which characters of a rendered conversation the assistant said, for templates that don't mark them.

The messages before an answer are rendered alone, and again with the answer. If the whole text begins with both, the
answer is the difference between the two. Some templates rewrite earlier messages: they leave out reasoning, for
example. Then the answer is replaced by a mark. What differs, back to where the template asks for an answer and on to
the end of its turn, is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]
"""Characters [start, end) of a rendered text"""
Write = Callable[[Messages, bool], str]
"""Renders messages with the template; the flag says whether the text asks for an answer at its end"""


class Indistinct(Exception):
    """The answer with this index in the messages can't be told apart from the text around it."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def find_answers(messages: Messages, prompted: bool, write: Write, endings: Sequence[str]) -> tuple[str, list[Span]]:
    """Returns the whole text, and the span of each answer in order, up to the end of its turn.

    prompted: whether the text asks for an answer at its end. endings: what a template may put after all messages, and
    only there. Raises Indistinct, and what `write` raises.
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
    """If `part`, perhaps without an ending at its end, occurs in `whole` at `at`: where it ends there. Else None."""
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
    # The request may include the beginning of an answer, such as an empty thought, that not every answer has.
    start = asked + min(_common(request[after:], whole[asked:]), before - asked)
    if not asked <= start <= end:
        raise Indistinct(index)
    return start, end


def _turn(
    messages: Messages, index: int, prompted: bool, whole: str, write: Write, endings: Sequence[str]
) -> tuple[int, int]:
    """Up to where the text is the same whatever the message says, and where the message's turn ends."""
    before, behind = _around(write(_marked(messages, [index]), prompted), index)
    closing = _around(write(_marked(messages[: index + 1], [index]), False), index)[1]
    end = _beginning(whole, closing, endings, len(whole) - len(behind))
    if not whole.endswith(behind) or end is None:
        raise Indistinct(index)
    return _common(before, whole), end


def _common(one: str, other: str) -> int:
    """The length of the beginning that both have in common."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        half = (same + most + 1) // 2
        if one.startswith(other[:half]):
            same = half
        else:
            most = half - 1
    return same


def _mark(index: int) -> str:
    return f"\ue0f0{index}\ue0f1"  # from Unicode's private use area


def _marked(messages: Messages, indices: Sequence[int]) -> Messages:
    return [{**message, "content": _mark(i)} if i in indices else message for i, message in enumerate(messages)]


def _around(text: str, index: int) -> tuple[str, str]:
    """The text before and after the mark of an answer. Raises Indistinct unless the mark occurs exactly once."""
    if text.count(_mark(index)) != 1:
        raise Indistinct(index)
    before, _, behind = text.partition(_mark(index))
    return before, behind


def _check(messages: Messages, prompted: bool, whole: str, spans: Sequence[Span], write: Write) -> None:
    """Raises Indistinct unless everything outside the answers stays the same when the answers are replaced."""
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
