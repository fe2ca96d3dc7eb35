"""What a step gave the sequences that it drew for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from isthmus.model.ops.sampling import Drawn
from isthmus.serve.engine.messages import Ending, Event, Logprobs, Request
from isthmus.serve.engine.sequence import Sequence


@dataclass
class Counters:
    """Totals since the engine started."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    """Guesses that were checked"""
    accepted_tokens: int = 0
    """Guesses that were right, which are among completion_tokens"""
    recalled_tokens: int = 0
    """Those of drafted_tokens that were from earlier texts of whoever asked"""
    accepted_recalled_tokens: int = 0
    """Those of accepted_tokens that were"""


def stops(sequence: Sequence, token: int, context_length: int) -> Ending | None:
    """Why a sequence ends with the token that it has just got; None if it goes on, by its constraint, too. Raises
    ConstraintError."""
    request = sequence.request
    if token in request.eos_ids:
        return Ending.EOS
    if token in request.stop_ids:
        return Ending.STOP_TOKEN
    if sequence.constraint is not None:
        sequence.constraint.accept(token)
        if sequence.constraint.done:
            return Ending.COMPLETE
    if len(sequence.tokens) - sequence.prompt_length >= request.max_tokens:
        return Ending.CONTEXT_LENGTH if len(sequence.tokens) >= context_length else Ending.LENGTH
    return None


def joined(events: list[Event]) -> Event:
    """What a step gave one request, as one event."""
    tokens = tuple(token for event in events for token in event.tokens)
    return replace(events[-1], tokens=tokens, logprobs=tuple(each for event in events for each in event.logprobs))


def logprobs_of(request: Request, drawn: Drawn, row: int) -> tuple[Logprobs, ...]:
    """What is told about a row's token; nothing if it wasn't asked for."""
    count = request.sampling.logprobs
    if count < 0:
        return ()
    tokens, top = drawn.top_tokens[row, :count].tolist(), drawn.top_log_probabilities[row, :count].tolist()
    return (Logprobs(float(drawn.log_probability[row]), tuple(tokens), tuple(top)),)
