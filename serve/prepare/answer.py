"""Turns the engine's outputs into text, deltas and the completion, once for every front end."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.errors import Cancelled, RequestError, RequestFailed, Unavailable
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.serve.engine.request import FinishReason as Ending
from isthmus.serve.engine.request import Logprobs, Output, Request
from isthmus.types import Completion, Delta, FinishReason, TokenLogprobs

_REASONS = {
    Ending.EOS: FinishReason.EOS,
    Ending.STOP_TOKEN: FinishReason.STOP_TOKEN,
    Ending.LENGTH: FinishReason.LENGTH,
    Ending.CONTEXT_LENGTH: FinishReason.CONTEXT_LENGTH,
}


class Answer:
    """The text of one request as its outputs come."""

    def __init__(self, tokenizer: Tokenizer, request: Request, *, with_text: bool = True) -> None:
        """with_text: whether tokens are decoded; if not, all texts are empty."""
        self._request = request
        self._stream = tokenizer.stream(request.prompt) if with_text else None
        self._texts: list[str] = []

    def take(self, outputs: Sequence[Output]) -> Delta:
        """The delta that `outputs` add, which are at least one, in order. With the request's last output it has the
        completion. Raises RequestError if the request ended without a result."""
        end = outputs[-1].finish_reason
        if end is not None and end not in _REASONS:
            raise error_of(self._request)
        ids = [output.token for output in outputs if output.token is not None]
        if end in (Ending.EOS, Ending.STOP_TOKEN):
            ids.pop()
        text = self._decoded(ids, last=end is not None)
        told = _told(self._request, [output.logprobs for output in outputs[: len(ids)]])
        return Delta(text, tuple(ids), None if end is None else self._completion(), told)

    def whole(self) -> Completion:
        """The completion of a request that has ended, without a call of `take` before. Raises RequestError if it ended
        without a result."""
        if self._request.finish_reason not in _REASONS:
            raise error_of(self._request)
        self._decoded(text_ids(self._request), last=True)
        return self._completion()

    def _decoded(self, ids: list[int], *, last: bool) -> str:
        if self._stream is None:
            return ""
        text = self._stream.push(ids)
        if last:
            text += self._stream.flush()
        self._texts.append(text)
        return text

    def _completion(self) -> Completion:
        return completion_of(self._request, "".join(self._texts))


def text_ids(request: Request) -> list[int]:
    """The tokens that were drawn, without the one that ended the sequence."""
    drawn = request.completion
    return drawn if request.stop_token is None else drawn[:-1]


def _told(request: Request, logprobs: Sequence[Logprobs | None]) -> tuple[TokenLogprobs, ...] | None:
    """The log-probabilities of some of a request's tokens; None if it doesn't ask for them."""
    if request.sampling.logprobs < 0:
        return None
    known = (each for each in logprobs if each is not None)
    return tuple(TokenLogprobs(own, tuple(zip(tokens, top, strict=True))) for own, tokens, top in known)


def completion_of(request: Request, text: str) -> Completion:
    """The completion of a request that has ended with a result."""
    assert request.finish_reason is not None and request.finished_at is not None
    first = request.first_token_at or request.finished_at
    return Completion(
        text=text,
        token_ids=tuple(text_ids(request)),
        logprobs=_told(request, request.logprobs[: len(text_ids(request))]),
        finish_reason=_REASONS[request.finish_reason],
        stop_token_id=request.stop_token,
        seed=request.sampling.seed,
        prompt_tokens=len(request.prompt),
        cached_prompt_tokens=request.cached_tokens,
        completion_tokens=len(request.completion),
        recomputed_tokens=request.recomputed_tokens,
        preemptions=request.preemptions,
        queue_seconds=(request.admitted_at or first) - request.arrival,
        time_to_first_token=first - request.arrival,
        total_seconds=request.finished_at - request.arrival,
    )


def error_of(request: Request) -> RequestError:
    """The error that says why a request that has ended has no result."""
    if request.finish_reason is Ending.CANCELLED:
        return Cancelled("the request was cancelled")
    if request.finish_reason is Ending.CLOSED:
        return Unavailable("the engine was shut down before the request was done")
    match request.failure:
        case None:
            return RequestFailed("the model gave logits that are not finite for this request", "NON_FINITE_LOGITS")
        case RequestFailed() as ours:  # shared by all requests of an engine that has ended: each gets a copy
            failed, cause = RequestFailed(ours.message, ours.reason), ours.__cause__
        case cause:
            failed = RequestFailed("the engine failed at this request; its log says how", "REQUEST_FAILED")
    failed.__cause__ = cause
    return failed
