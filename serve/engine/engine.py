"""The engine: one thread that plans, launches and commits, and alone owns every request.

Others talk to it through `submit` and `cancel`, which only put a message into its inbox, and through `load_adapter`,
which leaves it factors to place; it answers through its sink, once a step, on its own thread.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.errors import DuplicateRequest, FailedPrecondition, InvalidRequest, Overloaded, RequestFailed, Unavailable
from isthmus.model.weights.lora import Adapter
from isthmus.serve.engine.adapters import Resident, Standing, check_fits, factors_of, resident
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.executor import Executor, Launched
from isthmus.serve.engine.messages import Cancel, End, Ending, Event, Progress, Request
from isthmus.serve.engine.outcomes import Counters
from isthmus.serve.engine.pooling import check_pooled
from isthmus.serve.engine.scheduler import Scheduler
from isthmus.serve.engine.scoring import check_scored

logger = logging.getLogger("isthmus.engine")

Sink = Callable[[list[Event]], None]


@dataclass(frozen=True)
class Load:
    """A snapshot of how busy the engine is."""

    running: int
    waiting: int
    pages_total: int
    pages_in_use: int
    pages_cached: int
    counters: Counters
    recompilations: int
    draining: bool


@dataclass
class StepTimes:
    """Where the engine thread's time went since the engine was made, in seconds."""

    plan: float = 0.0
    launch: float = 0.0
    wait: float = 0.0
    """Waiting for the device"""
    masks: float = 0.0
    """Making masks, while the device computes"""
    commit: float = 0.0
    deliver: float = 0.0
    steps: int = 0


class Engine:
    """Runs requests until they finish, from `start` to `close`."""

    def __init__(self, executor: Executor, sink: Sink) -> None:
        """executor: warmed up. sink: called on the engine thread with the events of a step; it must return quickly."""
        self.executor = executor
        self.config: EngineConfig = executor.engine
        self.scheduler = Scheduler(self.config, executor.model.rope_switch, executor.model.vocab_size)
        self.adapters = executor.adapters
        """The adapters that requests may have, by their names"""
        self.times = StepTimes()
        self._sink = sink
        self._inbox: deque[Request | Cancel] = deque()
        self._wake = threading.Condition()
        self._live: dict[str, list[Request]] = {}
        """By id: those that were submitted together, without the ones that have ended or are cancelled"""
        self._tenants: Counter[str] = Counter()
        """How many of the live requests are whose"""
        self._cancelled: set[Request] = set()
        """Cancelled requests whose last event isn't delivered yet"""
        self._draining = False
        self._closing = False
        self._busy_since: float | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.error is None

    def validate(self, request: Request) -> None:
        """Raises InvalidRequest for a request that could never run here. Works before `start`, too."""
        limit = self.config.context_length
        self.adapters.check(request.adapter)
        if not request.prompt:
            raise InvalidRequest("prompt", "must hold at least one token")
        check_scored(request, self.executor.served.vocab)
        check_pooled(request)
        draws = request.max_tokens != 0 or (request.scored_from is None and request.pooling is None)
        if len(request.prompt) > limit - draws:
            room = f"at most {limit - 1} leave room for one more" if draws else f"the context holds {limit}"
            raise InvalidRequest("prompt", f"has {len(request.prompt)} tokens; {room}")
        if draws and request.max_tokens < 1:
            raise InvalidRequest("max_tokens", "must be at least 1")
        if draws and len(request.resumed) >= request.max_tokens:
            raise InvalidRequest(
                "resume_token_ids",
                f"has {len(request.resumed)} ids; max_tokens={request.max_tokens} leaves none to draw",
            )
        if len(request.prompt) + request.max_tokens > limit:
            total = len(request.prompt) + request.max_tokens
            raise InvalidRequest("max_tokens", f"with the prompt makes {total} tokens; the context holds {limit}")

    def submit(self, *requests: Request) -> None:
        """Hands requests of one caller over, which have one id: all or none. Their events come through the sink.
        Thread-safe.

        Raises InvalidRequest, DuplicateRequest, Overloaded, Unavailable, or RequestFailed where the engine has ended.
        """
        first, limit = requests[0], self.config.max_sequences + self.config.max_waiting
        for request in requests:
            self.validate(request)
        if len(requests) > limit:
            raise InvalidRequest("n", f"makes {len(requests)} requests at once; there is room for {limit}")
        with self._wake:
            self._check_takes()
            if first.id in self._live:
                raise DuplicateRequest("request_id", f"{first.id!r} is in flight already")
            if self._is_full(first.tenant, len(requests), limit) or len(self._cancelled) >= 4 * limit:
                raise Overloaded(f"{self.in_flight} requests are in flight already")
            self.adapters.hold(request.adapter for request in requests)
            self._live[first.id] = list(requests)
            self._tenants[first.tenant] += len(requests)
            self._inbox += requests
            self._interrupt()

    def _check_takes(self) -> None:
        """Raises what becomes of anything that is asked of an engine that has ended, or is about to."""
        if self.error is not None:
            raise self._death() from self.error
        if self._draining:
            raise Unavailable("the engine is shutting down")

    def _is_full(self, tenant: str, more: int, limit: int) -> bool:
        """Whether so many more requests of a tenant aren't taken. One with few of them is taken a little longer, so
        that another that fills the queue doesn't keep it out."""
        few = self._tenants[tenant] < limit // 8
        return self.in_flight + more > (limit + limit // 4 if few else limit)

    def cancel(self, request: Request | str) -> bool:
        """Ends this request, or those with this id, before the next plan; an id is free once none with it is left.
        Returns whether any was in flight. Thread-safe."""
        with self._wake:
            live = self._live.get(request if isinstance(request, str) else request.id, [])
            ended = [one for one in live if request in (one, one.id)]
            for one in ended:
                self._cancelled.add(one)
                self._remove_live(one)
                self._inbox.append(Cancel(one))
            if ended:
                self._interrupt()
            return bool(ended)

    def load_adapter(self, name: str, adapter: Adapter) -> Resident:
        """Lets requests that are submitted from now on have an adapter, which the engine thread writes into a free
        place before its next step. What is loaded already is left as it is. Thread-safe; it takes a while.

        Raises ConfigError for an adapter that the places can't hold, FailedPrecondition if none is free or the name is
        another adapter's, Unavailable, or RequestFailed where the engine has ended.
        """
        self.check_places()
        check_fits(self.executor.model, adapter)
        unplaced, factors = resident(name, 0, adapter), None
        while True:
            with self._wake:
                self._check_takes()
                if (held := self.adapters.held(name, unplaced.key)) is not None:
                    self.adapters.load(held, None)
                    return held
                place = self.adapters.free_place()
                if factors is not None:
                    placed = dataclasses.replace(unplaced, place=place)
                    self.adapters.load(placed, factors)
                    self._interrupt()
                    return placed
            factors = factors_of(self.executor.model, self.executor.mesh, adapter)

    def check_places(self) -> None:
        """Raises FailedPrecondition for an engine that can have no adapters."""
        if not self.adapters.places:
            raise FailedPrecondition("this model is served without places for adapters: engine.max_adapters makes some")

    def unload_adapter(self, name: str) -> Standing:
        """Lets no new request have an adapter; those in flight that have it go on, and hold its place. Thread-safe.
        Raises ModelNotFound."""
        with self._wake:
            return self.adapters.unload(name)

    def standings(self) -> list[Standing]:
        """The adapters that have a place. Thread-safe."""
        with self._wake:
            return self.adapters.standings()

    def drain(self) -> None:
        """Refuses new requests from now on; those in flight go on. Thread-safe."""
        with self._wake:
            self._draining = True

    @property
    def in_flight(self) -> int:
        """Requests that have not finished and aren't cancelled, waiting ones included."""
        return self._tenants.total()

    def load(self) -> Load:
        """A snapshot, as of now or of the step before. Thread-safe."""
        pool = self.scheduler.pool
        running = len(self.scheduler.running)
        return Load(
            running=running,
            waiting=max(0, self.in_flight - running),
            pages_total=pool.pages - 1,
            pages_in_use=pool.in_use,
            pages_cached=pool.cached,
            counters=self.scheduler.counters,
            recompilations=self.executor.recompilations,
            draining=self._draining,
        )

    @property
    def busy_seconds(self) -> float:
        """Seconds since the step under way began with its plan; 0 once its events are delivered. Thread-safe."""
        since = self._busy_since
        return 0.0 if since is None else time.perf_counter() - since

    def close(self, timeout: float | None = None) -> bool:
        """Ends the thread once the step in flight is read and its events are delivered. Requests that are left end as
        CLOSED, also if the thread doesn't end. Returns whether it ended within `timeout` seconds."""
        with self._wake:
            self._draining = self._closing = True
            self._interrupt()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._abandon(Ending.CLOSED)
        return not self._thread.is_alive()

    # the engine thread

    def _main(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            logger.exception("the engine thread died")
            with self._wake:
                self.error = error
            failure = self._death()
            failure.__cause__ = error
            self._abandon(Ending.ERROR, failure)

    @staticmethod
    def _death() -> RequestFailed:
        return RequestFailed("the engine has ended on an error", "ENGINE_DEAD")

    def _abandon(self, reason: Ending, failure: Exception | None = None) -> None:
        """Ends every request that is left, and delivers that."""
        with self._wake:
            left = [*(one for live in self._live.values() for one in live), *self._cancelled]
            self._live.clear()
            self._tenants.clear()
            self._cancelled.clear()
            self.adapters.release_all()
        if left:
            end = End(reason, failure=failure, progress=Progress(time.perf_counter()))
            self._sink([Event(request, end=end) for request in left])

    def _loop(self) -> None:
        clock = time.perf_counter
        in_flight: Launched | None = None
        while True:
            self._take_inbox(in_flight)
            self._busy_since = t0 = clock()
            closing = self._closing
            plan = None if closing else self.scheduler.plan(t0)
            t1 = clock()
            launched = None
            if plan is not None:
                launched = self.executor.launch(plan)
                if not plan.awaits:
                    self._sample(launched)
            t2 = clock()
            if in_flight is not None:
                drawn, hidden = in_flight.read()
                t3 = clock()
                events = self.scheduler.commit(in_flight.plan, drawn, t3, hidden)
                t4 = clock()
                self._deliver(events)
                times = self.times
                times.wait, times.commit, times.deliver = (
                    times.wait + t3 - t2,
                    times.commit + t4 - t3,
                    times.deliver + clock() - t4,
                )
                times.steps += 1
            if launched is not None and launched.plan.awaits:  # the device computes its forward pass meanwhile
                self._sample(launched)
            self._deliver(self.scheduler.take_ended())
            self._busy_since = None
            if closing:
                return
            self.times.plan += t1 - t0
            self.times.launch += t2 - t1
            in_flight = launched

    def _interrupt(self) -> None:
        """Wakes the engine thread, or ends a launch of several steps. The lock is held."""
        self.executor.flag.set(True)
        self._wake.notify()

    def _sample(self, launched: Launched) -> None:
        plan = launched.plan
        mask = None
        if plan.bias is not None:
            begun = time.perf_counter()
            mask = self.scheduler.mask(plan, begun)
            self.times.masks += time.perf_counter() - begun
        self.executor.sample(launched, mask)

    def _take_inbox(self, in_flight: Launched | None) -> None:
        """Takes in what has come, and waits for it if there is nothing to do. What comes while several steps are in
        flight is to end them, so their flag stays as it is until they are read."""
        with self._wake:
            while (
                in_flight is None and self.scheduler.idle and not (self._inbox or self._closing or self.adapters.coming)
            ):
                self._wake.wait()
            messages = list(self._inbox)
            self._inbox.clear()
            if in_flight is None or in_flight.plan.steps == 1:
                self.executor.flag.set(False)
            coming = self.adapters.take_coming() if self.adapters.coming else {}
        for place, factors in coming.items():  # no request that is known here has what was in that place
            self.executor.place_adapter(place, factors)
        cancelled = []
        for message in messages:
            if isinstance(message, Request):
                self.scheduler.add(message)
            else:
                cancelled += self.scheduler.cancel(message.request, time.perf_counter())
        self._deliver(cancelled)

    def _deliver(self, events: list[Event]) -> None:
        """Gives events to the sink, but for requests that were abandoned meanwhile: they have heard their end."""
        with self._wake:
            events = [event for event in events if self._awaits(event.request)]
            for event in events:
                if event.end is not None:
                    self._cancelled.discard(event.request)
                    if event.request.adapter is not None:
                        self.adapters.release(event.request.adapter)
                    if self._is_live(event.request):
                        self._remove_live(event.request)
        if events:
            self._sink(events)

    def _is_live(self, request: Request) -> bool:
        return request in self._live.get(request.id, ())

    def _remove_live(self, request: Request) -> None:
        live = self._live[request.id]
        live.remove(request)
        if not live:
            del self._live[request.id]
        self._tenants[request.tenant] -= 1
        if not self._tenants[request.tenant]:
            del self._tenants[request.tenant]

    def _awaits(self, request: Request) -> bool:
        return self._is_live(request) or request in self._cancelled
