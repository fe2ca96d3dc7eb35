"""Long texts wait for a few threads, and not without end."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from isthmus.errors import Overloaded, Unavailable
from isthmus.serve.prepare.workers import SHORT, THREADS, Workers

PATIENCE = 60


class Job:
    """Runs until it is let go."""

    def __init__(self) -> None:
        self.started, self.go = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.started.set()
        assert self.go.wait(PATIENCE)
        return "done"


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    made = [Job() for _ in range(THREADS + 3)]
    yield made
    for job in made:
        job.go.set()


async def _fill(workers: Workers, jobs: list[Job], size: int) -> list[asyncio.Task[str]]:
    """Each job in a task, in their order; the first THREADS of them run."""
    tasks = []
    for job in jobs:
        tasks.append(asyncio.create_task(workers.run(size, job)))
        await asyncio.sleep(0)
    for job in jobs[:THREADS]:
        assert await asyncio.to_thread(job.started.wait, PATIENCE)
    return tasks


def test_a_caller_who_is_gone_has_no_text_encoded(jobs: list[Job]) -> None:
    """At its deadline, or when it is cancelled, a call that waits must not cost anything any more."""

    async def main() -> None:
        workers = Workers()
        tasks = await _fill(workers, jobs, SHORT + 1)
        tasks[THREADS].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[THREADS]
        assert workers.waiting == len(jobs) - 1
        for job in jobs:
            job.go.set()
        kept = [task for index, task in enumerate(tasks) if index != THREADS]
        assert await asyncio.gather(*kept) == ["done"] * len(kept)
        assert not jobs[THREADS].started.is_set() and workers.waiting == 0
        workers.close()

    asyncio.run(main())


def test_a_caller_who_is_gone_leaves_nothing(jobs: list[Job]) -> None:
    """A client that sends long texts and cancels them, while others are encoded, would fill the memory."""

    class Text:
        pass

    async def main() -> None:
        workers = Workers()
        tasks = await _fill(workers, jobs[:THREADS], SHORT + 1)
        texts = []
        for _ in range(20):
            text = Text()
            texts.append(weakref.ref(text))
            task = asyncio.create_task(workers.run(SHORT + 1, id, text))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            del text, task
        await asyncio.sleep(0)
        gc.collect()  # what tells of each cancellation
        assert not any(text() for text in texts)
        for job in jobs:
            job.go.set()
        assert await asyncio.gather(*tasks) == ["done"] * THREADS
        workers.close()

    asyncio.run(main())


def test_a_system_without_threads_is_waited_for(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on processes that is reached for a moment must not keep texts from being encoded ever after."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        workers = Workers()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(THREADS + 1):
                with pytest.raises(Overloaded, match="can't start new thread"):
                    await workers.run(SHORT + 1, jobs[0])
        jobs[0].go.set()
        assert await workers.run(SHORT + 1, jobs[0]) == "done" and workers.waiting == 0
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)  # the one that there is does all
            running = [asyncio.create_task(workers.run(SHORT + 1, jobs[0])) for _ in range(3)]
            await asyncio.sleep(0)
        assert await asyncio.gather(*running) == ["done"] * 3
        workers.close()

    asyncio.run(main())


@pytest.mark.parametrize("limits", [{"calls": THREADS + 2}, {"size": (THREADS + 2) * (SHORT + 1)}])
def test_too_much_waiting_is_refused(limits: dict[str, int], jobs: list[Job]) -> None:
    """Else whoever sends prompts faster than they are encoded fills the memory."""

    async def main() -> None:
        workers = Workers(**limits)
        tasks = await _fill(workers, jobs[: THREADS + 2], SHORT + 1)
        with pytest.raises(Overloaded):
            await workers.run(SHORT + 1, jobs[-1])
        assert await workers.run(SHORT, lambda: "short") == "short", "short ones don't wait"
        for job in jobs:
            job.go.set()
        await asyncio.gather(*tasks)
        assert await workers.run(SHORT + 1, jobs[-1]) == "done"
        workers.close()

    asyncio.run(main())


def test_one_that_is_larger_than_all_room_is_taken_alone(jobs: list[Job]) -> None:
    jobs[0].go.set()

    async def main() -> None:
        workers = Workers(size=1)
        assert await workers.run(SHORT + 1, jobs[0]) == "done"
        workers.close()

    asyncio.run(main())


def test_closing_ends_what_waits(jobs: list[Job]) -> None:
    """A call that waits for a thread must hear that the server is going."""

    async def main() -> None:
        workers = Workers()
        tasks = await _fill(workers, jobs, SHORT + 1)
        workers.close()
        for job in jobs:
            job.go.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert ends[:THREADS] == ["done"] * THREADS
        assert {type(end) for end in ends[THREADS:]} == {Unavailable}
        with pytest.raises(Unavailable):
            await workers.run(SHORT + 1, jobs[0])

    asyncio.run(main())


def test_a_process_ends_while_they_work() -> None:
    """A server that has drained must not wait for an adapter that a slow disk gives."""
    program = """if True:
        import asyncio, threading
        from isthmus.serve.prepare.workers import Workers

        async def main():
            started, workers = threading.Event(), Workers()
            task = asyncio.create_task(workers.run(0, lambda: started.set() or threading.Event().wait(), always=True))
            await asyncio.to_thread(started.wait)
            workers.close()
            task.cancel()

        asyncio.run(main())
        """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)


def test_an_error_is_the_callers() -> None:
    def fail() -> None:
        raise ValueError("no text")

    async def main() -> None:
        workers = Workers()
        for size in (1, SHORT + 1):
            with pytest.raises(ValueError, match="no text"):
                await workers.run(size, fail)
        assert workers.waiting == 0
        workers.close()

    asyncio.run(main())
