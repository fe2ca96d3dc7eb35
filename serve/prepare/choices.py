"""The answers to one question, which may be several completions of its prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from isthmus.model.text.tokenizer import Tokenizer
from isthmus.serve.engine.messages import Event, Request
from isthmus.serve.prepare.answer import Answer
from isthmus.types import Completion, Delta


class Choices:
    """The texts of a question's requests as their events come."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        cancel: Callable[[Request], object],
        *,
        with_text: bool = True,
    ) -> None:
        """requests: in the order of their indices. cancel: ends a request, which may have ended already. with_text: as
        in Answer."""
        self._open = {
            request: (index, Answer(tokenizer, request, with_text=with_text)) for index, request in enumerate(requests)
        }
        self._cancel = cancel

    @property
    def ended(self) -> bool:
        """Whether every completion has had its last delta."""
        return not self._open

    def take(self, events: Sequence[Event]) -> list[Delta]:
        """What `events` add, in order, a delta for each completion that they are of. A request whose completion a stop
        string ends is cancelled. Raises RequestError if a request ended without a result."""
        by_request: dict[Request, list[Event]] = {}
        for event in events:
            if event.request in self._open:  # it may have ended, which the engine didn't know
                by_request.setdefault(event.request, []).append(event)
        deltas = []
        for request, some in by_request.items():
            index, answer = self._open[request]
            delta = dataclasses.replace(answer.take(some), index=index)
            if delta.completion is not None:
                del self._open[request]
                self._cancel(request)
            deltas.append(delta)
        return deltas


def completion_of_all(choices: Sequence[Completion]) -> Completion:
    """The first of a question's completions, with the others as its alternatives."""
    first, *others = choices
    return dataclasses.replace(first, alternatives=tuple(others)) if others else first
