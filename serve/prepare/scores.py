"""Turns questions about given texts into the engine's requests, which draw nothing, and their ends into answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from isthmus.arguments import check_flag, check_int
from isthmus.errors import InvalidRequest
from isthmus.forms import check_string
from isthmus.scores import Embedding, EmbedQuestion, Score, ScoreQuestion, check_pooling
from isthmus.serve.engine.messages import End, Ending, Request
from isthmus.serve.engine.pooling import Pooling
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.prepare.answer import error_of, told_of
from isthmus.serve.prepare.checks import check_token_ids
from isthmus.serve.prepare.request import Preparation, sharing
from isthmus.serve.prepare.sampling import check_logprobs
from isthmus.types import TokenPrompt, check_sized

_POOLING = {"mean": Pooling.MEAN, "last": Pooling.LAST}


def score_requests(
    preparation: Preparation, question: ScoreQuestion, *, tenant: str = "", deadline: float | None = None
) -> list[Request]:
    """The engine's requests for a question, one for each continuation. tenant, deadline: as in Preparation.request.
    Raises InvalidRequest."""
    preparation.check_count("continuations", len(question.continuations))
    # Whether a continuation is the likeliest is seen by the likeliest token.
    sampling = Sampling(temperature=0.0, logprobs=max(1, check_logprobs("logprobs", question.logprobs)))
    plain = preparation.plain(question.request_id, question.service, tenant=tenant, deadline=deadline)
    before, after = _encoded(preparation, question, preparation.kept_tokens(question.truncate_prompt_tokens))
    for field, ids in after.items():
        total = len(before) + len(ids)
        if not ids:
            raise InvalidRequest(field, "adds no token to the prompt")
        if total > preparation.context_length:
            raise InvalidRequest(
                field, f"with the prompt makes {total} tokens; the context holds {preparation.context_length}"
            )
    scored = replace(plain, sampling=sampling, scored_from=len(before))
    return sharing([replace(scored, prompt=[*before, *ids]) for ids in after.values()])


def _encoded(
    preparation: Preparation, question: ScoreQuestion, last: int | None
) -> tuple[list[int], dict[str, list[int]]]:
    """The tokens of the prompt, the last ones if only those are kept, and of each continuation, by its field."""
    prompt, tokenizer = question.prompt, preparation.tokenizer
    named = {f"continuations[{index}]": given for index, given in enumerate(question.continuations)}
    texts = {field: check_string(field, given) for field, given in named.items() if isinstance(given, str)}
    if isinstance(prompt, TokenPrompt):
        before = preparation.prompt_ids(prompt, last)
        encoded = [tokenizer.encode_part(text) for text in texts.values()]
    else:
        before, encoded = preparation.continued(prompt, texts, last)
    of_texts = dict(zip(texts, encoded, strict=True))
    after = {
        field: of_texts[field]
        if isinstance(given, str)
        else check_token_ids(field, check_sized(field, given), tokenizer.vocab_size).tolist()
        for field, given in named.items()
    }
    return before, after


def embed_request(
    preparation: Preparation, question: EmbedQuestion, *, tenant: str = "", deadline: float | None = None
) -> Request:
    """The engine's request for a question. tenant, deadline: as in Preparation.request. Raises InvalidRequest."""
    check_flag("normalize", question.normalize)
    _check_dimensions(question.dimensions, preparation.embedding_size)
    pooling = _POOLING[check_pooling(question.pooling)]
    plain = preparation.plain(question.request_id, question.service, tenant=tenant, deadline=deadline)
    prompt = preparation.prompt_ids(question.prompt, preparation.kept_tokens(question.truncate_prompt_tokens), room=0)
    return replace(plain, prompt=prompt, pooling=pooling)


def scores_of(requests: Sequence[Request], ends: Sequence[End], question: ScoreQuestion) -> list[Score]:
    """The answers to a question by its requests and their ends. Raises RequestError if one ended without a result."""
    return [_score_of(request, end, question.logprobs) for request, end in zip(requests, ends, strict=True)]


def _score_of(request: Request, end: End, asked: int | None) -> Score:
    if end.reason is not Ending.LENGTH:
        raise error_of(end)
    assert request.scored_from is not None
    ids = tuple(request.prompt[request.scored_from :])
    return Score(
        logprob=math.fsum(each.token for each in end.prompt_logprobs),
        is_greedy=all(each.top_tokens[0] == token for each, token in zip(end.prompt_logprobs, ids, strict=True)),
        token_ids=ids,
        logprobs=None if asked is None else told_of(end.prompt_logprobs, asked),
        prompt_tokens=request.scored_from,
        cached_prompt_tokens=end.progress.cached_tokens,
    )


def embedding_of(request: Request, end: End, question: EmbedQuestion) -> Embedding:
    """The answer to a question by its request and that one's end. Raises RequestError if it ended without a result."""
    if end.reason is not Ending.EMBEDDED:
        raise error_of(end)
    assert end.embedding is not None
    vector = end.embedding[: question.dimensions].astype(np.float64)
    if question.normalize and (length := math.sqrt(float(vector @ vector))) > 0:
        vector /= length
    return Embedding(
        values=tuple(vector.astype(np.float32).tolist()),
        prompt_tokens=len(request.prompt),
        cached_prompt_tokens=end.progress.cached_tokens,
    )


def _check_dimensions(asked: int | None, size: int) -> None:
    if asked is not None and not 1 <= check_int("dimensions", asked) <= size:
        raise InvalidRequest("dimensions", f"must be 1 to {size}, not {asked}")
