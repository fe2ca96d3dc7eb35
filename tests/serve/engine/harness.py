"""Runs a real engine on requests that arrive, and are cancelled, at chosen steps: no clock decides anything."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serve.engine.engine import Engine
from serve.engine.executor import Executor
from serve.engine.request import Output, Request


@dataclass
class Arrival:
    request: Request
    step: int = 0
    """Comes with the outputs of this step, counted in steps that gave any"""
    cancel_after: int | None = None
    """Cancelled when it has this many tokens"""


@dataclass
class Played:
    engine: Engine
    outputs: list[Output] = field(default_factory=list)


def play(executor: Executor, arrivals: Sequence[Arrival], on_step: Callable[[int], None] = lambda step: None) -> Played:
    """Runs all of `arrivals` to their end. Raises what the engine thread raised."""
    waiting = sorted(arrivals, key=lambda arrival: arrival.step)
    cancels = {a.request.id: a.cancel_after for a in arrivals if a.cancel_after is not None}
    finished, done = 0, threading.Event()
    errors: list[BaseException] = []
    step = 0

    def submit_due(due: int) -> None:
        while waiting and waiting[0].step <= due:
            engine.submit(waiting.pop(0).request)

    def sink(outputs: list[Output]) -> None:
        nonlocal finished, step
        if errors:
            return
        try:
            played.outputs += outputs
            step += 1
            on_step(step)
            for output in outputs:
                finished += output.finish_reason is not None
                request = output.request
                if output.finish_reason is None and len(request.completion) == cancels.get(request.id):
                    engine.cancel(request.id)
            submit_due(step)
            if engine.in_flight == 0 and waiting:  # nothing would ever come again
                submit_due(waiting[0].step)
        except BaseException as error:
            errors.append(error)
            done.set()
            raise
        if finished >= len(arrivals):
            done.set()

    engine = Engine(executor, sink)
    played = Played(engine)
    submit_due(waiting[0].step)
    engine.start()
    try:
        assert done.wait(300), "the engine stopped giving outputs"
    finally:
        engine.close()
    if errors or engine.error is not None:
        raise (errors or [engine.error])[0]  # type: ignore[misc]
    engine.scheduler.check()
    assert engine.scheduler.idle and engine.scheduler.pool.in_use == 0
    return played
