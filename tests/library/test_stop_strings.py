"""Stop strings end a text the same wherever the model runs and however the answer travels, and end its request too."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from isthmus import LLM, AsyncClient, AsyncModel, Client, Completion, Model, SamplingParams
from tests.serve.api.harness import LONG, PROMPT, RunningServer, wait_for

DRAWN = SamplingParams(max_tokens=LONG, seed=5, ignore_eos=True)


@pytest.fixture
def models(llm: LLM, server: RunningServer) -> Iterator[tuple[Model, ...]]:
    with Client(server.address) as client:
        yield llm, client


@pytest.fixture
def free(llm: LLM) -> Completion:
    """What the model writes without a stop."""
    return llm.generate(PROMPT, DRAWN, max_tokens=40)


def told(answer: Completion | None) -> tuple[Any, ...]:
    assert answer is not None
    return answer.text, answer.token_ids, answer.finish_reason, answer.stop_string, answer.completion_tokens


def wanted(llm: LLM, free: Completion, stop: str, *, include: bool = False) -> tuple[Any, ...]:
    """The answer by a search in the text of the first tokens, one more each time."""
    count = next(n for n in range(41) if stop in llm.detokenize(free.token_ids[:n]))
    end = free.text.find(stop) + (len(stop) if include else 0)
    return free.text[:end], free.token_ids[:count], "STOP_STRING", stop, count


def test_they_end_a_text_and_its_request(
    models: tuple[Model, ...], llm: LLM, server: RunningServer, free: Completion
) -> None:
    """A model that plays the user's part, too, is computed for up to max_tokens, and the user sees all of it."""
    stop = free.text[30:36]
    before = [engine.load().counters.completion_tokens for engine in (llm._engine, server.engine)]
    for model in models:
        for include in (False, True):
            expected = wanted(llm, free, stop, include=include)
            options: dict[str, Any] = {"stop": ["\x00", stop], "include_stop": include}
            assert told(model.generate(PROMPT, DRAWN, **options)) == expected
            deltas = list(model.stream(PROMPT, DRAWN, **options))
            assert told(deltas[-1].completion) == expected
            assert "".join(delta.text for delta in deltas) == expected[0]
            assert tuple(token for delta in deltas for token in delta.token_ids) == expected[1]
        assert [told(one) for one in model.generate([PROMPT] * 9, DRAWN, stop=stop)] == [wanted(llm, free, stop)] * 9
    for engine, count in zip((llm._engine, server.engine), before, strict=True):
        wait_for(lambda engine=engine: engine.in_flight == 0, "the end of the requests")
        assert engine.load().counters.completion_tokens - count < LONG


def test_they_do_so_for_asyncio(llm: LLM, server: RunningServer, free: Completion) -> None:
    stop = free.text[30:36]

    async def work(model: AsyncModel) -> list[tuple[Any, ...]]:
        found = [await model.generate(PROMPT, DRAWN, stop=stop), *await model.generate([PROMPT] * 9, DRAWN, stop=stop)]
        deltas = [delta async for delta in model.stream(PROMPT, DRAWN, stop=stop)]
        return [told(one) for one in found] + [told(deltas[-1].completion)]

    async def both() -> None:
        async with AsyncClient(server.address) as client:
            for model in (llm.aio, client):
                assert await work(model) == [wanted(llm, free, stop)] * 11

    asyncio.run(both())


def test_a_text_without_them_is_whole(models: tuple[Model, ...], free: Completion) -> None:
    """What was held back because it might have become a stop would be missing at the end."""
    almost = free.text[-3:] + "\x00"
    for model in models:
        answer = model.generate(PROMPT, DRAWN, max_tokens=40, stop=almost)
        assert told(answer) == (free.text, free.token_ids, "LENGTH", None, 40)
