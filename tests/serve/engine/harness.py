"""Runs a real engine on requests that arrive, and are cancelled, at chosen steps: no clock decides anything."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isthmus.checks.crowd import end_of
from isthmus.model.config import ModelConfig
from isthmus.model.ops.paged_cache import PagedCache
from isthmus.model.ops.sampling import Drawn
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.executor import Executor, Launched
from isthmus.serve.engine.messages import End, Event, Request
from isthmus.serve.engine.plan import StepPlan
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.engine.state import State, empty_state

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
ENGINE = EngineConfig(
    max_sequences=2,
    page_size=8,
    block_size=16,
    prefill_tokens=16,
    max_waiting=3,
    draft_rows=2,
    steps_per_launch=1,
).resolve(CONFIG)
FOUR = EngineConfig(
    max_sequences=4, page_size=8, block_size=16, prefill_tokens=32, max_waiting=64, draft_rows=4, steps_per_launch=1
)
SERVED = Served(CONFIG, ENGINE, CONFIG.vocab_size)


class HookedExecutor(Executor):
    """Calls `hook` on the engine thread while a step is under way: after the inbox was read, before events go out."""

    hook: Callable[[], None] = staticmethod(lambda: None)

    def launch(self, plan: StepPlan) -> Launched:
        self.hook()
        return super().launch(plan)


def only_tokens(tokens: np.ndarray) -> Drawn:
    """What a step gives that drew these, where nobody asked for more."""
    none = np.zeros((len(tokens), 0))
    return Drawn(tokens, np.zeros(len(tokens)), none, none)


def stale_state(served: Served, mesh: Mesh) -> State:
    """A state whose pages hold what no token may read."""
    empty = empty_state(served.abstract_state(mesh), served.execution.kernels.paged_attention)
    return empty._replace(cache=PagedCache(jnp.full(empty.cache.pages.shape, jnp.nan, empty.cache.pages.dtype)))


def with_tables(state: State, plan: StepPlan) -> State:
    """The state with the pages that a plan brings."""
    for slot, pages in plan.tables:
        state = state._replace(tables=state.tables.at[slot].set(pages))
    return state


def make(name: str, prompt: int = 3, max_tokens: int = 8) -> Request:
    return Request(name, list(range(1, prompt + 1)), Sampling(temperature=0), max_tokens)


class Client:
    """Collects events and waits for ends."""

    def __init__(self, executor: Executor) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()
        self.engine = Engine(executor, self._sink)

    def _sink(self, events: list[Event]) -> None:
        with self._changed:
            self.events += events
            self._changed.notify_all()

    def ends(self) -> Counter[str]:
        return Counter(event.request.id for event in self.events if event.end is not None)

    def end(self, request: Request) -> End:
        return end_of(request, self.events)

    def wait_for_ends(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.ends().total() >= count, timeout=60), self.engine.error
