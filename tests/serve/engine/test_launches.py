"""Several steps a launch draw what they would one by one, and end where the host has a say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.model.ops.cpu import library
from isthmus.serve.engine.config import LOOPED_ROWS, EngineConfig
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.executor import Executor, Launched
from isthmus.serve.engine.messages import End, Ending, Event, Request
from isthmus.serve.engine.plan import MOST_ENDS, StepPlan
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.engine.scheduler import Scheduler
from tests.support import TINY, as_kept, random_params

STEPS = 5
ENGINE = EngineConfig(
    max_sequences=3,
    page_size=8,
    block_size=16,
    prefill_tokens=32,
    pages=30,
    draft_rows=0,
    steps_per_launch=STEPS,
    launch_time=3600,
).resolve(TINY)
"""Steps are launched together however slow they are on this machine"""


def made(mesh: Mesh, engine: EngineConfig = ENGINE) -> Executor:
    served = Served(TINY, engine, TINY.vocab_size).with_kernels("auto", mesh)
    executor = Executor(served, as_kept(TINY, mesh, random_params(TINY, mesh), "float32"), mesh)
    executor.warm_up()
    return executor


@pytest.fixture(scope="module")
def executor(mesh: Mesh) -> Executor:
    return made(mesh)


class Steps:
    """An engine's turns, one by one: what each launch drew is read before the next."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.scheduler, self.now = executor, Scheduler(ENGINE, vocab_size=TINY.vocab_size), 0.0
        self.scheduler._budget.learn(0, 1.0)
        executor.flag.set(False)
        self.launches: list[tuple[StepPlan, int]] = []
        """The plans so far, and how many steps each had"""

    def submit(self, name: str, max_tokens: int = 20, **options: Any) -> Request:
        given = {"prompt": [3, 1, 4], "sampling": Sampling(temperature=0), **options}
        request = Request(name, max_tokens=max_tokens, **given)
        self.scheduler.add(request)
        return request

    def turn(self) -> list[Event]:
        plan = self.scheduler.plan(self.now)
        assert plan is not None
        launched = self.executor.launch(plan)
        self.executor.sample(launched, None if plan.bias is None else self.scheduler.mask(plan))
        drawn, hidden = launched.read()
        self.launches.append((plan, len(drawn.token) // plan.bucket.rows if plan.steps > 1 else 1))
        self.now += 1.0
        events = self.scheduler.commit(plan, drawn, self.now, hidden) + self.scheduler.take_ended()
        self.scheduler.check()
        return events

    def most(self) -> int:
        """Steps of the next launch."""
        self.turn()
        return self.launches[-1][0].steps


def fill(executor: Executor, pages: np.ndarray, number: float) -> None:
    cache = executor.state.cache
    filled = replace(cache, pages=cache.pages.at[pages].set(number))
    executor.state = executor.state._replace(cache=filled)


def arrivals() -> list[Arrival]:
    """One after the other, two at a time now and then; with ends that come in mid-launch."""
    asked = []
    for index in range(12):
        sampling = Sampling(temperature=0.9 * (index % 3 > 0), top_p=0.9, seed=index, logprobs=index % 4 - 1)
        stops = frozenset(range(9)) if index % 2 else frozenset()
        request = Request(f"r{index}", [*range(1, 3 + index)], sampling, 13 + index, stop_ids=stops)
        asked.append(Arrival(request, step=20 * (index - index % 2)))
    return asked


def test_the_bits_are_those_of_single_steps(mesh: Mesh) -> None:
    """How many steps are launched at once depends on what else happens, which must change no bit of an answer."""
    if reason := library.why_not():
        pytest.skip(reason)
    single, several = arrivals(), arrivals()
    steps = play(made(mesh, replace(ENGINE, steps_per_launch=1)), single)
    launches = play(made(mesh), several)
    assert len(launches.events) < len(steps.events) / 2 and launches.engine.executor.recompilations == 0
    for one, other in zip(single, several, strict=True):
        assert one.end is not None and other.end is not None
        assert (one.end.tokens, one.end.reason) == (other.end.tokens, other.end.reason), one.request.id
        assert one.end.logprobs == other.end.logprobs, one.request.id


def test_a_launch_ends_with_a_sequence(executor: Executor) -> None:
    """Its slot and pages must not wait for tokens that nobody gets, and no token behind the last one must come."""
    plain = Steps(executor)
    plain.submit("a")
    text = [token for _ in range(3) for event in plain.turn() for token in event.tokens]
    stop = text[3]
    assert text.index(stop) == 3, "the test's text doesn't repeat so early"
    steps = Steps(executor)
    request = steps.submit("a", stop_ids=frozenset({stop}))
    other = steps.submit("b", sampling=Sampling(seed=5))
    events = [event for _ in range(2) for event in steps.turn()]
    assert [count for _, count in steps.launches] == [1, 3] and steps.launches[1][0].steps == STEPS
    (end,) = (event.end for event in events if event.end is not None)
    assert end.tokens == tuple(text[:4]) and end.reason is Ending.STOP_TOKEN
    assert sum(len(event.tokens) for event in events if event.request is other) == 4
    assert steps.scheduler.counters.steps == 4
    assert request not in [sequence.request for sequence in steps.scheduler.running]


def test_a_raised_flag_ends_a_launch_after_a_step(executor: Executor) -> None:
    """Who comes or cancels must not wait for all of a launch, on a device that can look at the host's memory."""
    steps = Steps(executor)
    steps.submit("a")
    steps.turn()
    executor.flag.set(True)
    steps.turn()
    plan, count = steps.launches[-1]
    assert plan.steps == STEPS and count == (1 if library.why_not() is None else STEPS)
    executor.flag.set(False)
    steps.turn()
    assert steps.launches[-1][1] == STEPS


class Watched(Launched):
    executor: Executor
    raised = False
    """Whether the flag was when it was read"""

    def read(self) -> Any:
        self.raised = bool(self.executor.flag._value.value)
        return super().read()


class Interrupted(Executor):
    """Calls `arrive` once, on the engine's thread, when a launch of several steps has just begun."""

    arrive: Callable[[], object] | None = None
    watched: Watched | None = None

    def launch(self, plan: StepPlan) -> Launched:
        launched = super().launch(plan)
        if plan.steps == 1 or self.arrive is None:
            return launched
        arrive, self.arrive = self.arrive, None
        arrive()
        self.watched = Watched(**vars(launched))
        self.watched.executor = self
        return self.watched


def test_a_launch_goes_on_when_nothing_is_cancelled(executor: Executor) -> None:
    """The API cancels every request of a call that ends, also one that has ended by itself, and a client may cancel
    what it likes: neither is a reason to end the launch of all others."""
    engine = Engine(executor, lambda events: None)
    assert not engine.cancel("nobody") and not executor.flag._value.value
    engine.submit(Request("a", [3, 1, 4], Sampling(temperature=0), 4))
    executor.flag.set(False)
    assert engine.cancel("a") and executor.flag._value.value
    executor.flag.set(False)
    assert not engine.cancel("a") and not executor.flag._value.value
    engine.close()
    executor.flag.set(False)


@pytest.mark.parametrize(("sequences", "drafts"), [(3, 8), (3, 0), (1, 8), (4, 8), (32, 8)])
def test_as_many_sequences_as_may_be_launched_together_have_a_program(sequences: int, drafts: int) -> None:
    """Rows for guesses change which numbers of rows there are, and three sequences would never be launched together."""
    config = EngineConfig(max_sequences=sequences, draft_rows=drafts).resolve(TINY)
    rows = min(LOOPED_ROWS, sequences)
    assert [config.bucket(each, 0, steps=2).rows >= each for each in range(1, rows + 1)] == [True] * rows
    assert max(bucket.rows for bucket in config.loops) <= LOOPED_ROWS


@pytest.mark.parametrize("what", ["arrival", "cancel"])
def test_what_comes_when_a_launch_has_just_begun_ends_it(what: str, executor: Executor, mesh: Mesh) -> None:
    """Also while the step before it is still being read: reading the inbox then must not take the flag down, or a
    caller waits for all of the steps."""
    one = Interrupted(executor.served, executor.params, mesh)
    one.warm_up(executor._programs)
    ends: SimpleQueue[End] = SimpleQueue()

    def sink(events: list[Event]) -> None:
        for event in events:
            if event.end is not None:
                ends.put(event.end)

    engine = Engine(one, sink)
    first = Request("a", [3, 1, 4], Sampling(temperature=0), 40)
    other = Request("b", [2, 7], Sampling(temperature=0), 2)
    one.arrive = {
        "arrival": lambda: engine.submit(other),
        "cancel": lambda: engine.cancel(first),
    }[what]
    engine.submit(first)
    engine.start()
    assert ends.get(timeout=60).reason in (Ending.LENGTH, Ending.CANCELLED)
    engine.close()
    assert one.watched is not None and one.watched.raised


def test_bad_logits_end_one_sequence_in_mid_launch(executor: Executor) -> None:
    """A row that isn't finite ends as an error, with the tokens before it, and its neighbour goes on."""
    steps = Steps(executor)
    bad, good = steps.submit("bad"), steps.submit("good")
    steps.turn()
    (slot,) = (sequence.slot for sequence in steps.scheduler.running if sequence.request is bad)
    page = next(sequence.pages[0] for sequence in steps.scheduler.running if sequence.slot == slot)
    rows = np.arange(TINY.layers) * ENGINE.pages + page
    fill(executor, rows, np.nan)
    events = steps.turn()
    ended = {event.request.id: event.end.reason for event in events if event.end is not None}
    assert ended == {"bad": Ending.ERROR} and steps.launches[-1] == (steps.launches[-1][0], 1)
    assert [sequence.request for sequence in steps.scheduler.running] == [good]
    fill(executor, rows, 0)


def test_the_host_has_its_say(executor: Executor) -> None:
    """Whoever waits, computes a prompt, or draws under rules is not passed over by a launch of several steps."""
    steps = Steps(executor)
    steps.submit("a", max_tokens=60)
    assert steps.most() == 1, "a prompt"
    assert steps.most() == STEPS
    steps.submit("b", max_tokens=30, sampling=Sampling(temperature=0, repetition_penalty=1.1))
    assert steps.most() == 1, "another's prompt"
    assert steps.most() == 1, "a penalty looks back"
    (rules,) = (sequence.request for sequence in steps.scheduler.running if sequence.request.id == "b")
    steps.scheduler.cancel(rules)
    assert steps.most() == STEPS
    many = steps.submit("c", stop_ids=frozenset(range(1000, 1001 + MOST_ENDS)))
    steps.turn()
    assert steps.most() == 1, "more ends than a launch has room for"
    steps.scheduler.cancel(many)
    for name in "def":
        steps.submit(name, max_tokens=3)
    steps.turn()
    assert steps.scheduler.waiting and steps.most() == 1, "one waits"


def test_no_launch_goes_beyond_max_tokens_or_its_pages(executor: Executor) -> None:
    """It would write into pages that others hold; and it preempts nobody in order to be longer."""
    steps = Steps(executor)
    steps.submit("a", max_tokens=3)
    assert [steps.most(), steps.most()] == [1, 2] and steps.scheduler.idle
    steps.submit("b", prompt=[3, 1, 4, 1, 5])
    steps.turn()
    pool = steps.scheduler.pool
    taken = pool.allocate(pool.free)
    plan = steps.scheduler.plan(steps.now)
    assert taken is not None and plan is not None
    assert plan.steps == ENGINE.page_size - 5 < STEPS
    pool.release(taken)


def test_a_page_of_the_second_step_is_on_the_device(executor: Executor) -> None:
    """A single token's page comes with its row, which only the first step of a launch has."""
    steps = Steps(executor)
    steps.submit("a", prompt=[3, 1, 4, 1, 5, 9, 2], max_tokens=3)
    steps.turn()
    steps.turn()
    (plan, count) = steps.launches[-1]
    assert (plan.steps, count) == (2, 2) and int(plan.draws["position"][0]) == ENGINE.page_size
    assert int(executor.state.tables[0, 1]) == int(steps.scheduler._packer.tables.rows[0, 1]) > 0
