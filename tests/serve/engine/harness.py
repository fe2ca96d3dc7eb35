"""Runs a real engine on requests that arrive, and are cancelled, at chosen steps: no clock decides anything."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from isthmus.model.config import ModelConfig
from isthmus.model.ops.sampling import Drawn
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.executor import Executor, Launched, Served
from isthmus.serve.engine.plan import StepPlan
from isthmus.serve.engine.request import Output, Request
from isthmus.serve.engine.sampling import Sampling

CONFIG = ModelConfig(
    vocab_size=32,
    dim=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    context_length=32,
    tie_embeddings=False,
)
ENGINE = EngineConfig(max_sequences=2, page_size=8, block_size=16, prefill_tokens=16, max_waiting=3).resolve(CONFIG)
SERVED = Served(CONFIG, ENGINE, CONFIG.vocab_size)


class HookedExecutor(Executor):
    """Calls `hook` on the engine thread while a step is under way: after the inbox was read, before outputs go out."""

    hook: Callable[[], None] = staticmethod(lambda: None)

    def launch(self, plan: StepPlan) -> Launched:
        self.hook()
        return super().launch(plan)


def only_tokens(tokens: np.ndarray) -> Drawn:
    """What a step gives that drew these, where nobody asked for more."""
    none = np.zeros((len(tokens), 0))
    return Drawn(tokens, np.zeros(len(tokens)), none, none)


def make(name: str, prompt: int = 3, max_tokens: int = 8) -> Request:
    return Request(name, list(range(1, prompt + 1)), Sampling(temperature=0), max_tokens)


class Client:
    """Collects outputs and waits for ends."""

    def __init__(self, executor: Executor) -> None:
        self.outputs: list[Output] = []
        self._changed = threading.Condition()
        self.engine = Engine(executor, self._sink)

    def _sink(self, outputs: list[Output]) -> None:
        with self._changed:
            self.outputs += outputs
            self._changed.notify_all()

    def ends(self) -> Counter[str]:
        return Counter(output.request.id for output in self.outputs if output.finish_reason is not None)

    def wait_for_ends(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.ends().total() >= count, timeout=60), self.engine.error


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
