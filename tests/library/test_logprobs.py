"""Log-probabilities say what the model thought, the same wherever it runs and however the answer travels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from isthmus import LLM, Client, InvalidRequest, Model, SamplingParams
from tests.library.conftest import OpenModel
from tests.serve.api.harness import PROMPT, RunningServer

DRAWN = SamplingParams(max_tokens=24, seed=5, temperature=0.8, top_k=30, logprobs=3)


@pytest.fixture
def models(llm: LLM, server: RunningServer) -> Iterator[tuple[Model, ...]]:
    with Client(server.address) as client:
        yield llm, client


def test_they_come_with_each_token(models: tuple[Model, ...]) -> None:
    """Evaluations add them up, and tools draw the alternatives."""
    plain = models[0].generate(PROMPT, DRAWN, logprobs=None)
    assert plain.logprobs is None
    answers = [model.generate(PROMPT, DRAWN) for model in models]
    for answer in answers:
        assert answer.token_ids == plain.token_ids and answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids) > 0
        for token, told in zip(answer.token_ids, answer.logprobs, strict=True):
            assert told.logprob < 0 and len(told.top) == 3
            values = [value for _, value in told.top]
            assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) <= 1 + 1e-5
            assert dict(told.top).get(token, told.logprob) == told.logprob <= values[0]
    assert answers[0].logprobs == answers[1].logprobs


def test_the_likeliest_is_what_greedy_draws(models: tuple[Model, ...]) -> None:
    for model in models:
        answer = model.generate(PROMPT, temperature=0, max_tokens=8, logprobs=1)
        assert answer.logprobs is not None
        assert [told.top for told in answer.logprobs] == [
            ((token, told.logprob),) for token, told in zip(answer.token_ids, answer.logprobs, strict=True)
        ]


def test_a_stream_tells_them_piece_by_piece(models: tuple[Model, ...]) -> None:
    """Also where the text of a token is held back until its character is whole."""
    for model in models:
        whole = model.generate(PROMPT, DRAWN)
        deltas = list(model.stream(PROMPT, DRAWN))
        assert all(len(delta.logprobs or ()) == len(delta.token_ids) for delta in deltas)
        assert tuple(told for delta in deltas for told in delta.logprobs or ()) == whole.logprobs
        last = deltas[-1].completion
        assert last is not None and last.logprobs == whole.logprobs
        assert all(delta.logprobs is None for delta in model.stream(PROMPT, DRAWN, logprobs=None))


def test_the_token_that_ends_the_text_has_none(models: tuple[Model, ...]) -> None:
    """They would be shifted against token_ids."""
    free = models[0].generate(PROMPT, DRAWN)
    stop = free.token_ids[5]
    for model in models:
        answer = model.generate(PROMPT, DRAWN, stop_token_ids=[stop], logprobs=0)
        assert answer.stop_token_id == stop and answer.logprobs is not None and free.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids) == free.token_ids.index(stop)
        assert [told.logprob for told in answer.logprobs] == [
            told.logprob for told in free.logprobs[: len(answer.logprobs)]
        ]
        assert all(told.top == () for told in answer.logprobs)


def test_they_are_the_same_bits_beside_others(open_model: OpenModel) -> None:
    """A policy that is trained on its own samples divides by them."""
    with open_model(kernels="auto") as llm:
        alone = [llm.generate(PROMPT[: 3 + n], DRAWN, seed=n) for n in range(6)]
        asked = [(PROMPT[: 3 + n], DRAWN.replace(seed=n)) for n in range(6)]
        streams = [llm.stream(prompt, sampling) for prompt, sampling in asked]
        firsts = [next(stream) for stream in streams]  # all are in flight
        together = [[first, *stream][-1].completion for first, stream in zip(firsts, streams, strict=True)]
        kernels = llm.generate("x", max_tokens=1).token_ids  # the engine still answers
    assert kernels and [one.logprobs for one in alone] == [one and one.logprobs for one in together]


@pytest.mark.parametrize("count", [-1, 21, 1 << 40, 1.5, "2"])
def test_another_number_is_refused_by_name(models: tuple[Model, ...], count: int) -> None:
    """The field and the limit say what to change."""
    for model in models:
        with pytest.raises(InvalidRequest) as refused:
            model.generate(PROMPT, logprobs=count)
        assert refused.value.field == "logprobs"


def test_a_text_that_ends_at_once_has_none_to_tell(models: tuple[Model, ...]) -> None:
    """No log-probabilities are something else than none that were asked for."""
    first = models[0].generate(PROMPT, DRAWN).token_ids[0]
    for model in models:
        answer = model.generate(PROMPT, DRAWN, stop_token_ids=[first])
        *_, last = model.stream(PROMPT, DRAWN, stop_token_ids=[first])
        assert answer.token_ids == () and answer.logprobs == () and last.completion is not None
        assert last.completion.logprobs == ()
