"""Whatever arrives and leaves in whatever order, each request reads its own prefix and nothing is left behind."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.serve.engine import drafts
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.messages import Ending, Request
from isthmus.serve.engine.pooling import Pooling
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.engine.scheduler import Scheduler
from tests.serve.engine.harness import only_tokens
from tests.serve.engine.simulation import EOS, VOCAB, Simulation, expected_completion, run_until

MODEL = ModelConfig(vocab_size=VOCAB, dim=8, layers=1, heads=1, kv_heads=1, head_dim=8, mlp_dim=8, context_length=40)


def engine_config(**changes: float) -> EngineConfig:
    """Small enough that a few requests fill it."""
    sizes = {
        "max_sequences": 4,
        "page_size": 4,
        "block_size": 8,
        "prefill_tokens": 16,
        "pages": 14,
        "draft_rows": 0,
        "steps_per_launch": 1,
        "launch_time": 100.0,  # a step takes a second here
    }
    return EngineConfig(**{**sizes, **changes}).resolve(MODEL)  # type: ignore[arg-type]


CONFIGS = {
    "few pages": engine_config(),
    "the fewest pages": engine_config(pages=11),
    "a page a block": engine_config(page_size=8, pages=6),
    "no prefix cache": engine_config(prefix_cache=False),
    "one block a step": engine_config(prefill_tokens=8, pages=16),
    "one sequence": engine_config(max_sequences=1, pages=11),
    "many slots": engine_config(max_sequences=9, pages=20),
    "room for all": engine_config(pages=50),
    "guesses": engine_config(draft_rows=8, pages=24),
    "guesses and few pages": engine_config(draft_rows=8),
    "several steps a launch": engine_config(steps_per_launch=5, pages=24),
    "several steps, guesses, few pages": engine_config(steps_per_launch=4, draft_rows=6, page_size=2, pages=24),
    "a token a page": engine_config(page_size=1, block_size=2, prefill_tokens=6, pages=60),
}

FAMILIES = [[1 + (i * k) % (VOCAB - 1) for i in range(39)] for k in (1, 5, 7)]
"""Prompts are beginnings of these, so that prefixes meet in the cache."""


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses where that is allowed, and mostly wrong ones."""
    monkeypatch.setattr(drafts, "GRAM", 1)
    monkeypatch.setattr(drafts, "PATIENCE", 0)


class EngineMachine(RuleBasedStateMachine):
    """Arrivals, cancels, bad rows and steps in any order."""

    @initialize(name=st.sampled_from(sorted(CONFIGS)))
    def start(self, name: str) -> None:
        self.simulation = Simulation(CONFIGS[name])

    @rule(
        family=st.integers(0, len(FAMILIES) - 1),
        shared=st.integers(0, 38),
        own=st.lists(st.integers(1, VOCAB - 1), max_size=4),
        max_tokens=st.integers(1, 30),
        eos=st.sampled_from([frozenset({EOS}), frozenset()]),
        stop=st.frozensets(st.integers(1, VOCAB - 1), max_size=1),
        options=st.fixed_dictionaries(
            {},
            optional={
                "tenant": st.sampled_from("ab"),
                "priority": st.integers(-1, 1),
                "max_queue_time": st.integers(0, 30),
                "cache_salt": st.sampled_from([b"", b"salt"]),
                "cache_read": st.booleans(),
                "cache_write": st.booleans(),
                "pooling": st.sampled_from(Pooling),
            },
        ),
        seconds=st.none() | st.integers(0, 60),
        scored=st.none() | st.integers(1, 38),
    )
    def submit(
        self,
        family: int,
        shared: int,
        own: list[int],
        max_tokens: int,
        eos: frozenset[int],
        stop: frozenset[int],
        options: dict[str, Any],
        seconds: int | None,
        scored: int | None,
    ) -> None:
        pools = "pooling" in options
        prompt = (FAMILIES[family][:shared] + own)[: 40 if pools else 39] or [1]
        room = 0 if pools else self.simulation.config.context_length - len(prompt)
        options["deadline"] = None if seconds is None else self.simulation.steps + seconds
        if scored is not None and scored < len(prompt) and not pools:
            options["scored_from"] = scored
            max_tokens -= 1  # none now and then
        self.simulation.submit(prompt, min(max_tokens, room), eos, stop, **options)

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.simulation.cancel(data.draw(st.sampled_from(sorted(self.simulation.live))))

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def poison(self, data: st.DataObject) -> None:
        self.simulation.poison.add(data.draw(st.sampled_from(sorted(self.simulation.live))))

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()


EngineMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestEngine = EngineMachine.TestCase


@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "mixed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_long_crowded_run(name: str, mixed: bool) -> None:
    """Hundreds of requests over the same few pages: what a server does in an hour, where a lost page shows."""
    rng = random.Random(name)
    simulation = Simulation(CONFIGS[name])
    for _ in range(200):
        prompt = rng.choice(FAMILIES)[: rng.randrange(1, 39)]
        prompt = prompt + [rng.randrange(1, VOCAB) for _ in range(rng.randrange(3))]
        prompt = prompt[:39]
        options: dict[str, Any] = {
            "tenant": rng.choice("aab"),
            "priority": rng.choice([0, 0, 0, 1, -1]),
            "cache_salt": rng.choice([b"", b"", b"salt"]),
            "cache_read": rng.random() < 0.9,
            "cache_write": rng.random() < 0.9,
            "pooling": rng.choice([None, None, None, *Pooling]),
        }
        eos = rng.choice([frozenset({EOS}), frozenset()])
        options = options if mixed else {}
        pools = options.get("pooling") is not None
        scores = not pools and len(prompt) > 1 and rng.random() < 0.3
        if scores:
            options["scored_from"] = rng.randrange(1, len(prompt))
        draws = not pools and not (scores and rng.random() < 0.5)
        simulation.submit(prompt, draws * rng.randrange(1, 41 - len(prompt)), eos, **options)
        if simulation.live and rng.random() < 0.1:
            simulation.cancel(rng.choice(sorted(simulation.live)))
        if simulation.live and rng.random() < 0.05:
            simulation.poison.add(rng.choice(sorted(simulation.live)))
        while len(simulation.live) > 12 or rng.random() < 0.6:
            simulation.step()
    simulation.drain()
    counters = simulation.scheduler.counters
    assert len(simulation.finished) == 200
    assert counters.completion_tokens == sum(len(r.completion) for r in simulation.finished)
    assert counters.prompt_tokens == sum(s.prompt_length for s in simulation.finished)
    if mixed:
        return
    if name in ("few pages", "the fewest pages", "a page a block", "many slots", "a token a page"):
        assert counters.preemptions > 2, "the pages were enough, so running out of them isn't tested"
    if name in ("room for all", "one sequence"):
        assert counters.preemptions == 0
    assert (counters.cached_prompt_tokens > 100) == CONFIGS[name].prefix_cache


def test_a_preempted_request_goes_on_where_it_was() -> None:
    """Running out of pages must cost time only; the tokens already sent stand."""
    simulation = Simulation(CONFIGS["the fewest pages"])
    requests = [simulation.submit(FAMILIES[i][:6], 30) for i in range(2)]
    simulation.drain()
    assert sum(r.preemptions for r in requests) > 0
    assert all(r.completion == expected_completion(r.request) and len(r.completion) == 30 for r in requests)
    assert requests[0].preemptions == 0, "the oldest must go on, or nobody ever ends"


def test_a_prompt_that_was_seen_is_not_computed_again() -> None:
    """The prefix cache is what makes a long system prompt affordable."""
    simulation = Simulation(CONFIGS["room for all"])
    first = simulation.submit(FAMILIES[0][:33], 1)
    simulation.drain()
    computed = simulation.tokens_computed
    second = simulation.submit(FAMILIES[0][:33], 1)
    simulation.drain()
    assert (first.cached_tokens, second.cached_tokens) == (0, 32)
    assert simulation.tokens_computed - computed == 1


def test_the_whole_prompt_in_the_cache_still_computes_its_last_token() -> None:
    """Its logits are what the first token is drawn from; they are not in the cache."""
    simulation = Simulation(CONFIGS["room for all"])
    for _ in range(2):
        request = simulation.submit(FAMILIES[0][:32], 3)
        simulation.drain()
    assert request.cached_tokens == 24 and len(request.completion) == 3


def test_a_conversation_continues_from_its_own_answer() -> None:
    """The next turn of a chat begins with the last one: prompt and answer must both be found."""
    simulation = Simulation(CONFIGS["room for all"])
    first = simulation.submit(FAMILIES[0][:6], 20)
    simulation.drain()
    second = simulation.submit([*first.tokens, 3], 5)
    simulation.drain()
    assert second.cached_tokens == 24


def test_without_the_prefix_cache_nothing_is_shared() -> None:
    """prefix_cache=False is for measuring and for tenants that must not learn of each other."""
    simulation = Simulation(CONFIGS["no prefix cache"])
    for _ in range(2):
        request = simulation.submit(FAMILIES[0][:33], 1)
        simulation.drain()
    assert request.cached_tokens == 0 and simulation.scheduler.pool.cached == 0


def test_first_come_first_served() -> None:
    """A short request must not pass a long one for ever."""
    simulation = Simulation(CONFIGS["one sequence"])
    requests = [simulation.submit(FAMILIES[i % 3][: 30 - 9 * i], 3) for i in range(3)]
    simulation.drain()
    assert simulation.finished == requests


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    """Somebody else's long prompt must not stop the text that is being streamed."""
    simulation = Simulation(CONFIGS["one block a step"])
    reader = simulation.submit(FAMILIES[0][:3], 30)
    run_until(simulation, lambda: len(reader.completion) == 2)
    long = simulation.submit(FAMILIES[1][:30], 2)
    for expected in range(3, 7):  # four blocks of eight
        simulation.step()
        assert len(reader.completion) == expected
    assert long.computed == 30


def test_a_bad_row_ends_its_request_alone() -> None:
    """A network that gives NaN for one prompt must not take the others with it."""
    simulation = Simulation(CONFIGS["room for all"])
    good, bad = (simulation.submit(FAMILIES[i][:9], 12) for i in range(2))
    run_until(simulation, lambda: len(bad.completion) == 3)
    simulation.poison.add(bad.request.id)
    simulation.drain()
    assert bad.ending is Ending.ERROR and len(bad.completion) < 12
    assert good.ending is Ending.LENGTH


def test_cancelling_frees_pages_at_once() -> None:
    """A client that hangs up must make room for the next one, also with its step in flight."""
    simulation = Simulation(CONFIGS["the fewest pages"])
    first = simulation.submit(FAMILIES[0][:30], 10)
    second = simulation.submit(FAMILIES[1][:30], 10)
    run_until(simulation, lambda: len(first.completion) == 1)
    assert second.slot == -1, "there is no room for both"
    held = simulation.scheduler.pool.in_use
    simulation.cancel(first.request.id)
    assert held > 0 and simulation.scheduler.pool.in_use == 0
    simulation.step()
    assert second.slot >= 0
    simulation.drain()
    assert len(first.completion) == 1 and len(second.completion) == 10


# sizes


def test_every_load_has_a_bucket() -> None:
    """A step without a shape of its own would have to be compiled while clients wait."""
    config = engine_config(max_sequences=6, prefill_tokens=24)
    assert config.buckets == (
        *(Bucket(rows, 0, 8) for rows in (1, 2, 4, 6)),
        *(Bucket(6, blocks, 8, 3) for blocks in (1, 2, 3)),
    )
    for rows in range(7):
        for blocks in range(4):
            if rows or blocks:
                bucket = config.bucket(rows, blocks)
                fits = [b for b in config.buckets if b.rows >= rows and b.blocks >= blocks]
                assert bucket in fits and bucket.tokens == min(b.tokens for b in fits)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("max_sequences", {"max_sequences": 0}),
        ("page_size", {"page_size": 0}),
        ("prefill_tokens", {"prefill_tokens": 0}),
        ("max_waiting", {"max_waiting": 0}),
        ("context_length", {"context_length": 41}),
        ("context_length", {"context_length": 1}),
        ("block_size", {"block_size": 6}),
        ("prefill_tokens", {"prefill_tokens": 12}),
        ("pages", {"pages": 10}),
    ],
)
def test_sizes_that_cannot_work_are_named(field: str, changes: dict[str, int]) -> None:
    """Found at start, with the field's name, and not at the first long prompt."""
    with pytest.raises(ConfigError, match=rf"engine\.{field}"):
        engine_config(**changes)


def test_sizes_that_are_left_out_hold_a_whole_context() -> None:
    """The defaults must run any model."""
    config = EngineConfig(page_size=4, block_size=4, prefill_tokens=4, max_sequences=1).resolve(MODEL)
    assert config.context_length == 40 and config.pages == 1 + 10
    assert engine_config(pages=0, max_sequences=8).pages == 1 + 40


def test_every_row_is_drawn_with_its_requests_own_sampling() -> None:
    """Rows change with every request that comes or goes; a slot's settings must come along, to the last bit of a
    seed, and be the next request's once the slot is."""
    config = EngineConfig(max_sequences=3, context_length=64, steps_per_launch=1).resolve(ModelConfig())
    scheduler = Scheduler(config)
    asked = [
        Sampling(0.7, 5, 0.9, 0.05, (1 << 63) + 7),
        Sampling(0.0),
        Sampling(1.5, 1 << 30, 0.1, 1.0, (1 << 64) - 1),
        Sampling(0.3, 2, 1.0, 0.0, 1 << 32),
    ]
    for index, sampling in enumerate(asked):
        scheduler.add(Request(str(index), [1, 2, 3], sampling, 2 + index % 2))
    seen = set()
    while (plan := scheduler.plan()) is not None:
        for row, sequence in plan.samples:
            got, want = plan.draws[row], sequence.request.sampling
            assert got["slot"] == sequence.slot
            assert got["position"] == sequence.computed - len(plan.rows_ahead(sequence))
            for name in ("temperature", "top_k", "top_p", "min_p"):
                assert got[name] == got.dtype[name].type(getattr(want, name))
            assert int(got["seed_low"]) | int(got["seed_high"]) << 32 == want.seed
            seen.add((sequence.request.id, row, plan.bucket.blocks > 0))
        scheduler.commit(plan, only_tokens(np.full(plan.bucket.samples, 9, np.int32)))
    assert {name for name, _, _ in seen} == {"0", "1", "2", "3"} and {prompt for _, _, prompt in seen} == {True, False}
