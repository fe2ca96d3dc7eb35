"""Turns the engine's events into text, deltas and the completion, once for every front end."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.errors import Cancelled, DeadlineExceeded, Overloaded, RequestError, RequestFailed, Unavailable
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.serve.engine.messages import End, Ending, Event, Logprobs, Request
from isthmus.types import Completion, Delta, FinishReason, TokenLogprobs

_REASONS = {
    Ending.EOS: FinishReason.EOS,
    Ending.STOP_TOKEN: FinishReason.STOP_TOKEN,
    Ending.LENGTH: FinishReason.LENGTH,
    Ending.CONTEXT_LENGTH: FinishReason.CONTEXT_LENGTH,
}


class Answer:
    """The text of one request as its events come."""

    def __init__(self, tokenizer: Tokenizer, request: Request, *, with_text: bool = True) -> None:
        """with_text: whether tokens are decoded; if not, all texts are empty."""
        self._request = request
        self._stream = tokenizer.stream(request.prompt) if with_text else None
        self._texts: list[str] = []

    def take(self, events: Sequence[Event]) -> Delta:
        """The delta that `events` add, which are at least one, in order. With the request's last event it has the
        completion. Raises RequestError if the request ended without a result."""
        end = events[-1].end
        if end is not None and end.reason not in _REASONS:
            raise error_of(end)
        ids = [token for event in events for token in event.tokens]
        if end is not None and end.stop_token is not None:
            ids.pop()
        text = self._decoded(ids, last=end is not None)
        logprobs = [each for event in events for each in event.logprobs]
        told = _told(self._request, logprobs[: len(ids)])
        return Delta(text, tuple(ids), None if end is None else self._completion(end), told)

    def whole(self, end: End) -> Completion:
        """The completion of the request, which has ended, without a call of `take` before. Raises RequestError if it
        ended without a result."""
        if end.reason not in _REASONS:
            raise error_of(end)
        self._decoded(text_ids(end), last=True)
        return self._completion(end)

    def _decoded(self, ids: Sequence[int], *, last: bool) -> str:
        if self._stream is None:
            return ""
        text = self._stream.push(ids)
        if last:
            text += self._stream.flush()
        self._texts.append(text)
        return text

    def _completion(self, end: End) -> Completion:
        return completion_of(self._request, end, "".join(self._texts))


def text_ids(end: End) -> tuple[int, ...]:
    """The tokens that were drawn, without the one that ended the sequence."""
    return end.tokens if end.stop_token is None else end.tokens[:-1]


def _told(request: Request, logprobs: Sequence[Logprobs]) -> tuple[TokenLogprobs, ...] | None:
    """The log-probabilities of some of a request's tokens; None if it doesn't ask for them."""
    if request.sampling.logprobs < 0:
        return None
    return tuple(TokenLogprobs(own, tuple(zip(tokens, top, strict=True))) for own, tokens, top in logprobs)


def completion_of(request: Request, end: End, text: str) -> Completion:
    """The completion of a request that has ended with a result."""
    ids = text_ids(end)
    first = end.first_token_at or end.finished_at
    return Completion(
        text=text,
        token_ids=ids,
        logprobs=_told(request, end.logprobs[: len(ids)]),
        finish_reason=_REASONS[end.reason],
        stop_token_id=end.stop_token,
        seed=request.sampling.seed,
        prompt_tokens=len(request.prompt),
        cached_prompt_tokens=end.cached_tokens,
        completion_tokens=len(end.tokens),
        recomputed_tokens=end.recomputed_tokens,
        preemptions=end.preemptions,
        queue_seconds=(end.admitted_at or first) - request.arrival,
        time_to_first_token=first - request.arrival,
        total_seconds=end.finished_at - request.arrival,
    )


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
    match end.failure:
        case None:
            return RequestFailed("the model gave logits that are not finite for this request", "NON_FINITE_LOGITS")
        case RequestFailed() as ours:  # shared by all requests of an engine that has ended: each gets a copy
            failed, cause = RequestFailed(ours.message, ours.reason), ours.__cause__
        case cause:
            failed = RequestFailed("the engine failed at this request; its log says how", "REQUEST_FAILED")
    failed.__cause__ = cause
    return failed
