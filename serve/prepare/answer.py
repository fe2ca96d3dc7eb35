"""Turns the engine's events into text, deltas and the completion, once for every front end.

Stop strings are found here, in the text, and not by the engine: whoever reads an answer cancels its request as soon as
there is a completion. By then the engine may have drawn a token or two more, which are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from isthmus.errors import Cancelled, DeadlineExceeded, Overloaded, RequestError, RequestFailed, Unavailable
from isthmus.model.text.stops import MAX_STOP_CHARACTERS, StopStrings
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.serve.engine.constraint import ConstraintError
from isthmus.serve.engine.messages import End, Ending, Event, Logprobs, Progress, Request
from isthmus.types import Completion, Delta, FinishReason, TokenLogprobs

_REASONS = {
    Ending.EOS: FinishReason.EOS,
    Ending.STOP_TOKEN: FinishReason.STOP_TOKEN,
    Ending.COMPLETE: FinishReason.COMPLETE,
    Ending.LENGTH: FinishReason.LENGTH,
    Ending.CONTEXT_LENGTH: FinishReason.CONTEXT_LENGTH,
}


_MOST_RESUMED = 4 * MAX_STOP_CHARACTERS
"""So many tokens hold a stop string, if a character takes a token for each of its bytes"""


@dataclass(frozen=True)
class TextOptions:
    """How text is made of a request's tokens: its `text_options`."""

    stops: StopStrings | None = None
    """Strings that end the text"""
    include_stop: bool = False
    """Whether the text has the one that ended it"""
    keep_special: bool = False
    """Whether special tokens are text"""
    logprobs: int | None = None
    """How many of the likeliest tokens are told at the place of each that was drawn; None tells nothing"""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens"""


class Answer:
    """The text of one request as its events come. Its completion doesn't depend on how many come at once."""

    def __init__(self, tokenizer: Tokenizer, request: Request, *, with_text: bool = True) -> None:
        """with_text: whether there is to be any text; if not, all texts are empty."""
        self._options = options = request.text_options or TextOptions()
        self._request, self._with_text = request, with_text
        self._search = None if options.stops is None else options.stops.search(include=options.include_stop)
        before, resumed = [*request.prompt, *request.resumed], 0
        if self._search is not None:  # a stop string may have begun in what is resumed
            resumed = min(len(request.resumed), _MOST_RESUMED)
        decoded = with_text or self._search is not None
        known = before[: len(before) - resumed]
        self._stream = tokenizer.stream(known, keep_special=options.keep_special) if decoded else None
        self._resume(before[len(before) - resumed :])
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt: list[Logprobs] = []
        self._tells_prompt = options.prompt_logprobs is not None

    def _resume(self, tokens: Sequence[int]) -> None:
        """Goes on after tokens whose text, as far as it wasn't held back, the caller has."""
        for token in tokens:
            assert self._stream is not None and self._search is not None
            self._search.push(self._stream.push([token]))
            if self._found:
                return

    def take(self, events: Sequence[Event]) -> Delta:
        """The delta that `events` add, which are at least one, in order. The last delta has the completion: with the
        request's last event, or before it if a stop string is found. Raises RequestError if the request ended without
        a result."""
        known, last = len(self._ids), events[-1]
        self._prompt += [each for event in events for each in event.prompt_logprobs]
        text, progress = self._until_stop(events) if self._search else (self._all(events), last.progress)
        if not self._found and last.end is not None:
            if last.end.reason not in _REASONS:
                raise error_of(last.end)
            text += self._rest()
        ids = tuple(self._ids[known:])
        told = self._told([each for event in events for each in event.logprobs][: len(ids)])
        self._texts.append(text if self._with_text else "")
        ended = self._found or last.end is not None
        completion = self._completion(last.end, progress) if ended else None
        return Delta(
            self._texts[-1],
            ids,
            completion,
            told,
            prompt_logprobs=self._told_of_prompt(completion is not None or bool(ids)),
        )

    def whole(self, end: End) -> Completion:
        """The completion of the request, which has ended, without a call of `take` before. Raises RequestError if it
        ended without a result."""
        event = Event(self._request, end.tokens, end.logprobs, end, end.progress, end.prompt_logprobs)
        completion = self.take([event]).completion
        assert completion is not None
        return completion

    @property
    def _found(self) -> str | None:
        """The stop string that has ended the text."""
        return None if self._search is None else self._search.found

    def _all(self, events: Sequence[Event]) -> str:
        """Takes in the tokens of all events. Returns the text that they complete."""
        ids = [token for event in events for token in _text_ids(event)]
        self._ids += ids
        return "" if self._stream is None else self._stream.push(ids)

    def _until_stop(self, events: Sequence[Event]) -> tuple[str, Progress]:
        """Takes in tokens up to the one that completes a stop string, each by itself, so that it doesn't matter which
        come together. Returns the text that is not held back, and how far the request had come."""
        assert self._stream is not None and self._search is not None
        text = ""
        if self._found:  # in what was resumed
            return text, events[0].progress
        for event in events:
            for token in _text_ids(event):
                self._ids.append(token)
                text += self._search.push(self._stream.push([token]))
                if self._found:
                    return text, event.progress
        return text, events[-1].progress

    def _rest(self) -> str:
        """The text that is still held when no token follows."""
        text = "" if self._stream is None else self._stream.flush()
        if self._search is not None:
            text = self._search.push(text)
            text += self._search.flush()
        return text

    def _told(self, logprobs: Sequence[Logprobs]) -> tuple[TokenLogprobs, ...] | None:
        """The log-probabilities of the newest tokens; None if the request doesn't ask for them."""
        if self._options.logprobs is None:
            return None
        told = told_of(logprobs, self._options.logprobs)
        self._logprobs += told
        return told

    def _told_of_prompt(self, whole: bool) -> tuple[TokenLogprobs, ...] | None:
        """The log-probabilities of the prompt, once, when it is computed as a `whole`; None otherwise, and if the
        request doesn't ask for them."""
        if not whole or not self._tells_prompt:
            return None
        self._tells_prompt = False
        return told_of(self._prompt, self._options.prompt_logprobs or 0)

    def _completion(self, end: End | None, progress: Progress) -> Completion:
        """end: how the engine ended the request; not looked at where a stop string did."""
        request, found = self._request, self._found
        stop_token = None if found or end is None else end.stop_token
        first = progress.first_token_at or progress.at
        return Completion(
            text="".join(self._texts),
            token_ids=tuple(self._ids),
            logprobs=None if self._options.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=(
                None if self._options.prompt_logprobs is None else told_of(self._prompt, self._options.prompt_logprobs)
            ),
            finish_reason=FinishReason.STOP_STRING if found or end is None else _REASONS[end.reason],
            stop_token_id=stop_token,
            stop_string=found,
            seed=request.sampling.seed,
            prompt_tokens=len(request.prompt),
            cached_prompt_tokens=progress.cached_tokens,
            completion_tokens=len(self._ids) + (stop_token is not None),
            recomputed_tokens=progress.recomputed_tokens,
            preemptions=progress.preemptions,
            queue_seconds=(progress.admitted_at or first) - request.arrival,
            time_to_first_token=first - request.arrival,
            total_seconds=progress.at - request.arrival,
        )


def told_of(logprobs: Iterable[Logprobs], most: int) -> tuple[TokenLogprobs, ...]:
    """What a caller is told about tokens, with at most so many of the likeliest ones at each place."""
    return tuple(
        TokenLogprobs(each.token, tuple(zip(each.top_tokens[:most], each.top[:most], strict=True))) for each in logprobs
    )


def _text_ids(event: Event) -> tuple[int, ...]:
    """The event's tokens, without the one that ended the sequence."""
    return event.tokens if event.end is None or event.end.stop_token is None else event.tokens[:-1]


def error_of(end: End) -> RequestError:
    """The error that says why a request that has ended has no result."""
    if end.reason is Ending.CANCELLED:
        return Cancelled("the request was cancelled")
    if end.reason is Ending.QUEUE_TIME:  # it could run as well as any other, later or on another server
        return Overloaded("the request waited for max_queue_time and could not start")
    if end.reason is Ending.DEADLINE:
        return DeadlineExceeded("the request's deadline passed while it waited")
    if end.reason is Ending.CLOSED:
        return Unavailable("the engine was shut down before the request was done")
    if isinstance(end.failure, ConstraintError):
        return RequestFailed(f"the form of the text can't be kept: {end.failure}", "CONSTRAINT_FAILED")
    match end.failure:
        case None:
            return RequestFailed("the model gave logits that are not finite for this request", "NON_FINITE_LOGITS")
        case RequestFailed() as ours:  # shared by all requests of an engine that has ended: each gets a copy
            failed, cause = RequestFailed(ours.message, ours.reason), ours.__cause__
        case cause:
            failed = RequestFailed("the engine failed at this request; its log says how", "REQUEST_FAILED")
    failed.__cause__ = cause
    return failed
