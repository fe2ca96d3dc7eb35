"""Scored requests: what is told about the tokens of a prompt from one of them on.

The prompt before them is computed in blocks. Each of them is then drawn like any token, from the row of the one before
it, by a draw that is forced to be that token: so what is told about it has the bits that are told where it is drawn.
The host knows them all, so a step takes many of a sequence, a row each, and is launched before the one in flight is
read. A sequence that is preempted keeps what was told, and computes those tokens in blocks again.
"""

from __future__ import annotations

from collections.abc import Iterator

from isthmus.errors import InvalidRequest
from isthmus.model.ops.sampling import BAD_ROW, Drawn
from isthmus.serve.engine.messages import Logprobs, Request
from isthmus.serve.engine.outcomes import logprobs_of
from isthmus.serve.engine.packing import Step, Work
from isthmus.serve.engine.sequence import Sequence


def check_scored(request: Request, vocab: int) -> None:
    """Raises InvalidRequest for what can't be scored. vocab: as in `Served`."""
    first = request.scored_from
    if first is None:
        return
    if not 1 <= first < len(request.prompt):
        length = len(request.prompt)
        raise InvalidRequest("scored_from", f"must be at least 1 and an index in the prompt of {length}, not {first}")
    if request.sampling.logprobs < 0:
        raise InvalidRequest("logprobs", "must be at least 0 where a prompt is scored")
    if request.resumed:
        raise InvalidRequest("resume_token_ids", "can't be given where a prompt is scored, which was told before them")
    scored = request.prompt[first:]
    if not 0 <= min(scored) <= max(scored) < vocab:
        raise InvalidRequest("prompt", f"has an id to be scored that is none of the vocabulary's, 0 to {vocab - 1}")


def divide(step: Step, rows: int, rope_switch: int) -> Iterator[tuple[Work, tuple[int, ...]]]:
    """Yields what each scored sequence of a step takes beside its next token: an equal share of what is left of so many
    rows. What was yielded must be in the step before the next one is asked for. rope_switch: as in ModelConfig."""
    works = [work for work in step.singles if work.sequence.scores]
    for index, work in enumerate(works):
        yield work, _ahead(work.sequence, (rows - step.rows) // (len(works) - index), rope_switch)


def _ahead(sequence: Sequence, most: int, rope_switch: int) -> tuple[int, ...]:
    """At most so many tokens of the prompt after those that the step computes. Nothing is scored behind its last one,
    and a sequence's rows of a step all turn by the same frequencies."""
    first, end = sequence.computed, sequence.prompt_length - 1
    if rope_switch and not sequence.uses_long_rope:
        end = min(end, rope_switch)
    return tuple(sequence.request.prompt[first : min(end, first + most)])


def take(sequence: Sequence, drawn: Drawn, rows: list[int]) -> tuple[Logprobs, ...] | None:
    """Takes in the next tokens of a sequence, which a step scored in these rows, and returns what is told about them;
    None, without a change, if some logits weren't finite."""
    if (drawn.token[rows] == BAD_ROW).any():
        return None
    told = tuple(each for row in rows for each in logprobs_of(sequence.request, drawn, row))
    sequence.tokens += sequence.request.prompt[len(sequence.tokens) : len(sequence.tokens) + len(rows)]
    sequence.prompt_logprobs += told
    return told
