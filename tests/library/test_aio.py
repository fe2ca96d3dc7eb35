"""The async forms: many streams on one loop, each as it would be alone, and ended when nobody waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from isthmus import (
    LLM,
    AsyncClient,
    AsyncModel,
    BatchError,
    Completion,
    DeadlineExceeded,
    InvalidRequest,
    SamplingParams,
)
from tests.serve.api.harness import LONG, PATIENCE, PROMPT, RunningServer, wait_for

DRAWN = SamplingParams(max_tokens=24, seed=5)
MANY = 32

Opened = Callable[[], AbstractAsyncContextManager[AsyncModel]]


@pytest.fixture(params=["LLM", "Client"])
def opened(request: pytest.FixtureRequest, llm: LLM, server: RunningServer) -> Opened:
    """Each kind of AsyncModel."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[AsyncModel]:
        if request.param == "LLM":
            yield llm.aio
        else:
            async with AsyncClient(server.address) as client:
                yield client

    return opened


@pytest.fixture
def in_flight(opened: Opened, llm: LLM, server: RunningServer) -> Callable[[], int]:
    """Requests that either engine still works on."""
    return lambda: llm._engine.in_flight + server.engine.in_flight


async def gather_stream(model: AsyncModel, prompt: str, **options: Any) -> Completion:
    deltas = [delta async for delta in model.stream(prompt, DRAWN, **options)]
    whole = deltas[-1].completion
    assert whole is not None and "".join(delta.text for delta in deltas) == whole.text
    return whole


def test_many_streams_at_once(opened: Opened, llm: LLM) -> None:
    """More than the engine runs at once; each must be what it is alone, in its own order."""
    alone = [llm.generate(f"x = {index}", DRAWN).token_ids for index in range(MANY)]

    async def work() -> list[Completion]:
        async with opened() as model:
            return await asyncio.gather(*(gather_stream(model, f"x = {index}") for index in range(MANY)))

    assert [one.token_ids for one in asyncio.run(work())] == alone


def test_lists_are_answered_in_order(opened: Opened, llm: LLM) -> None:
    prompts = [f"x = {index}" for index in range(20)]

    async def work() -> None:
        async with opened() as model:
            found = await model.generate(prompts, DRAWN)
            assert [one.token_ids for one in found] == [one.token_ids for one in llm.generate(prompts, DRAWN)]
            assert (await model.generate("a", DRAWN)).token_ids == llm.generate("a", DRAWN).token_ids
            with pytest.raises(BatchError) as failed:
                await model.generate(["a", ""], DRAWN)
            assert list(failed.value.errors) == [1] and isinstance(failed.value.results[0], Completion)
            ids = await model.tokenize(PROMPT)
            assert ids == llm.tokenize(PROMPT) and await model.detokenize(ids) == PROMPT
            with pytest.raises(InvalidRequest) as refused:
                await model.generate("a", temperature=-1)
            assert refused.value.field == "temperature"

    asyncio.run(work())


def test_a_cancelled_task_ends_its_request(opened: Opened, in_flight: Callable[[], int]) -> None:
    """A web client that goes away would be computed for to its end."""

    async def work() -> None:
        async with opened() as model:
            tasks = [
                asyncio.create_task(model.generate(PROMPT, max_tokens=LONG, ignore_eos=True)),
                asyncio.create_task(model.generate([PROMPT] * 3, max_tokens=LONG, ignore_eos=True)),  # type: ignore[arg-type]
                asyncio.create_task(gather_stream(model, PROMPT, max_tokens=LONG, ignore_eos=True)),
            ]
            while in_flight() < 5:
                await asyncio.sleep(0.001)
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(each) for each in ended] == [asyncio.CancelledError] * 3
            await asyncio.to_thread(wait_for, lambda: in_flight() == 0, "the end of the requests")

    asyncio.run(work())


def test_leaving_a_stream_ends_its_request(opened: Opened, in_flight: Callable[[], int]) -> None:
    async def work() -> None:
        async with opened() as model:
            async for delta in model.stream(PROMPT, max_tokens=LONG, ignore_eos=True):
                assert delta.completion is None
                break
            await asyncio.to_thread(wait_for, lambda: in_flight() == 0, "the end of the request")

    asyncio.run(work())


def test_a_timeout_ends_the_request(opened: Opened, in_flight: Callable[[], int]) -> None:
    async def work() -> None:
        async with opened() as model:
            with pytest.raises(DeadlineExceeded, match=r"within its timeout of 0\.05 s"):
                await model.generate(PROMPT, max_tokens=LONG, ignore_eos=True, timeout=0.05)
            with pytest.raises(DeadlineExceeded, match=r"within its timeout of 0\.05 s"):
                async for _ in model.stream(PROMPT, max_tokens=LONG, ignore_eos=True, timeout=0.05):
                    pass
            await asyncio.to_thread(wait_for, lambda: in_flight() == 0, "the end of the requests")

    asyncio.run(work())


def test_several_loops_share_a_model(llm: LLM) -> None:
    """Each thread of a server may have its own."""
    alone = llm.generate(PROMPT, DRAWN).token_ids

    async def work() -> tuple[int, ...]:
        return (await gather_stream(llm.aio, PROMPT)).token_ids

    async def both() -> list[tuple[int, ...]]:
        return await asyncio.gather(*(asyncio.to_thread(asyncio.run, work()) for _ in range(3)))

    assert asyncio.run(both()) == [alone] * 3


def test_a_task_that_is_cancelled_before_its_request_began_leaves_none(llm: LLM) -> None:
    """A thread prepares it meanwhile, and would hand it over to the engine, where it runs to its end unheard."""
    began, go_on = threading.Event(), threading.Event()
    preparation = llm._preparation
    prepare = type(preparation).requests

    def slow(self: Any, *given: Any, **more: Any) -> Any:
        began.set()
        assert go_on.wait(PATIENCE)
        return prepare(self, *given, **more)

    async def cancelled() -> None:
        task = asyncio.create_task(llm.aio.generate("abc", regex="(x|y|z){2000}", max_tokens=2000))
        await asyncio.to_thread(began.wait, PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        assert (await llm.aio.generate("abc", regex="(x|y)", max_tokens=2)).text in ("x", "y")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(preparation), "requests", slow)
        asyncio.run(cancelled())
    assert llm._engine.in_flight == 0
