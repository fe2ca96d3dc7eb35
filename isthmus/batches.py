"""Asks lists of questions, a limited number at once. Outcomes come in order, and each question fails alone."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from isthmus.errors import RETRY_SECONDS, Overloaded, RequestError

Q = TypeVar("Q")
R = TypeVar("R")
Answer = TypeVar("Answer", covariant=True)
Tick = Callable[[int], None]
"""Called with how many more questions have ended; negative if some are asked again"""


class Pending(Protocol[Answer]):
    """A question that is being answered."""

    def result(self) -> Answer:
        """Waits for the answer. Raises RequestError."""

    def cancel(self) -> None:
        """Ends the request, unless it has ended already."""

    def then(self, call: Callable[[], object]) -> None:
        """Calls `call` once the request has ended, on another thread or at once. `call` must return quickly."""


def ask_all(
    begin: Callable[[Q], Pending[R]], questions: Sequence[Q], at_once: int, tick: Tick
) -> list[R | RequestError]:
    """The outcome of each question. Those refused as Overloaded are asked again, unless all that were asked were."""
    outcomes: dict[int, R | RequestError] = {}
    todo = list(range(len(questions)))
    while todo:
        found = _ask_once(begin, [questions[index] for index in todo], at_once, tick)
        outcomes.update(zip(todo, found, strict=True))
        todo, seconds = _to_repeat(outcomes, todo)
        tick(-len(todo))
        time.sleep(seconds)
    return [outcomes[index] for index in range(len(questions))]


def _to_repeat(outcomes: Mapping[int, object], asked: Sequence[int]) -> tuple[list[int], float]:
    """The questions to ask again, and after how many seconds: those that were Overloaded, unless all of them were."""
    refused = {index: outcome for index in asked if isinstance(outcome := outcomes[index], Overloaded)}
    if len(refused) == len(asked):
        return [], 0.0
    return [*refused], max((error.retry_after or RETRY_SECONDS for error in refused.values()), default=0.0)


def _ask_once(
    begin: Callable[[Q], Pending[R]], questions: Sequence[Q], at_once: int, tick: Tick
) -> list[R | RequestError]:
    room = threading.Semaphore(at_once)
    asked: list[Pending[R] | RequestError] = []

    def ended() -> None:
        room.release()
        tick(1)

    try:
        for question in questions:
            room.acquire()
            try:
                asked.append(pending := begin(question))
            except RequestError as error:
                asked.append(error)
                ended()
            else:
                pending.then(ended)
        return [_outcome(each) for each in asked]
    except BaseException:  # such as Ctrl-C: nobody waits for the others any more
        for each in asked:
            if not isinstance(each, RequestError):
                each.cancel()
        raise


def _outcome(pending: Pending[R] | RequestError) -> R | RequestError:
    if isinstance(pending, RequestError):
        return pending
    try:
        return pending.result()
    except RequestError as error:
        return error


async def ask_all_async(
    ask: Callable[[Q], Awaitable[R]], questions: Sequence[Q], at_once: int, tick: Tick
) -> list[R | RequestError]:
    """`ask_all` for asyncio. If it is cancelled, so is every question under way."""
    outcomes: dict[int, R | RequestError] = {}
    todo = list(range(len(questions)))
    while todo:
        found = await _ask_once_async(ask, [questions[index] for index in todo], at_once, tick)
        outcomes.update(zip(todo, found, strict=True))
        todo, seconds = _to_repeat(outcomes, todo)
        tick(-len(todo))
        await asyncio.sleep(seconds)
    return [outcomes[index] for index in range(len(questions))]


async def _ask_once_async(
    ask: Callable[[Q], Awaitable[R]], questions: Sequence[Q], at_once: int, tick: Tick
) -> list[R | RequestError]:
    room = asyncio.Semaphore(at_once)

    async def one(question: Q) -> R | RequestError:
        async with room:
            try:
                return await ask(question)
            except RequestError as error:
                return error
            finally:
                tick(1)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(question)) for question in questions]
    return [task.result() for task in tasks]


@contextlib.contextmanager
def progress_bar(total: int, progress: bool | None, doing: str) -> Iterator[Tick]:
    """Yields a function that advances a progress bar on standard error.

    progress: whether to show the bar; None shows it if standard error is a terminal. doing: what is shown beside it.
    """
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda more: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from isthmus.model.process.progress import Display

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Display(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda more: bar.advance(task, more)
