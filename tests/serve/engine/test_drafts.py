"""Guesses make a text that repeats come sooner, and no text come otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.model.ops.cpu import library
from isthmus.serve.engine import drafts
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.drafts import MOST_INDEXED, PATIENCE, Lookup
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Ending, Request
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling
from tests.support import TINY, as_kept, random_params

ENGINE = EngineConfig(
    max_sequences=3, page_size=8, block_size=16, prefill_tokens=32, pages=30, max_waiting=64, steps_per_launch=1
)


def test_what_repeats_is_foretold_and_what_does_not_is_not() -> None:
    """A guess costs a row: it must be worth it."""
    text = np.random.default_rng(0).integers(0, 1000, 40).tolist()
    lookup = Lookup()
    assert not lookup.follow(text)
    repeated = [*text, *text[: 3 + PATIENCE]]
    assert lookup.follow(repeated), "three tokens find the place, and the next ones are as foretold"
    assert lookup.guess(5) == tuple(text[3 + PATIENCE : 8 + PATIENCE])
    assert not lookup.follow([*repeated, 7])


def test_guesses_are_as_long_as_they_come_true() -> None:
    text = list(range(50))
    lookup = Lookup()
    assert lookup.follow([*text, *text[:10]])
    assert len(lookup.guess(99)) == drafts.MOST_GUESSES
    lookup.learn(7, 0)
    assert len(lookup.guess(99)) == 1
    lookup.learn(1, 1)
    assert len(lookup.guess(99)) == drafts.MOST_GUESSES


def test_a_long_prompt_is_looked_through_in_parts() -> None:
    """All of it at once would hold up everybody's next token."""
    text = [*range(MOST_INDEXED), *range(MOST_INDEXED)]
    lookup = Lookup()
    assert not lookup.follow(text) and lookup.follow(text)


@pytest.fixture(scope="module")
def plain(mesh: Mesh) -> Executor:
    return executor(mesh, 0)


@pytest.fixture(scope="module")
def guessing(mesh: Mesh) -> Executor:
    return executor(mesh, 8)


def executor(mesh: Mesh, draft_rows: int) -> Executor:
    if reason := library.why_not():
        pytest.skip(reason)
    engine = replace(ENGINE, draft_rows=draft_rows).resolve(TINY)
    served = Served(TINY, engine, TINY.vocab_size).with_kernels("auto", mesh)
    made = Executor(served, as_kept(TINY, mesh, random_params(TINY, mesh), "float32"), mesh)
    made.warm_up()
    return made


def arrivals() -> list[Arrival]:
    """Of few tokens, so that they repeat: greedy, drawn, with penalties, which look back at guesses, and with masks."""
    made = []
    for index in range(12):
        rng = np.random.default_rng(index)
        prompt = rng.integers(0, TINY.vocab_size, int(rng.integers(1, 12))).tolist()
        options = [
            {"temperature": 0.0},
            {"temperature": 0.2},
            {"temperature": 0.0, "frequency_penalty": 0.02, "presence_penalty": 0.01},
            {"temperature": 0.0, "bad": frozenset({10}), "min_tokens": 20},
        ][index % 4]
        allowed = frozenset(range(9, 13))
        sampling = Sampling(seed=index, logprobs=2, allowed=allowed, **options)  # type: ignore[arg-type]
        stops = frozenset({9}) if index % 3 == 0 else frozenset()
        request = Request(f"r{index}", prompt, sampling, int(rng.integers(20, 50)), stop_ids=stops)
        made.append(Arrival(request, step=12 * index))
    return made


def test_texts_are_the_same_with_and_without_guesses(
    plain: Executor, guessing: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit of each log-probability: a guess that was taken is what would have been drawn."""
    without = arrivals()
    steps = play(plain, without).engine.scheduler.counters.steps
    for patience in (PATIENCE, 0):
        monkeypatch.setattr(drafts, "PATIENCE", patience)
        guessed = arrivals()
        engine = play(guessing, guessed).engine
        counters = engine.scheduler.counters
        assert counters.drafted_tokens > counters.accepted_tokens > 30, "right and wrong guesses"
        assert engine.executor.recompilations == 0
        for one, other in zip(without, guessed, strict=True):
            assert one.end is not None and other.end is not None
            assert one.end.tokens == other.end.tokens, one.request.id
            assert one.end.logprobs == other.end.logprobs, one.request.id
            assert one.end.reason is other.end.reason
        assert patience == 0 or counters.steps < steps


def asked(name: str, at: int, step: int, seed: int | None = None, cancel: int | None = None, **served: Any) -> Arrival:
    """A request that is alike for every `at`, whose text doesn't repeat itself."""
    prompt = np.random.default_rng(at).integers(0, TINY.vocab_size, 12 + at).tolist()
    sampling = Sampling(temperature=1.0, seed=at if seed is None else seed, logprobs=1)
    return Arrival(Request(name, prompt, sampling, 40, **served), step, cancel)


def test_an_answer_that_comes_again_comes_in_fewer_steps(plain: Executor, guessing: Executor) -> None:
    """An agent's repeated question is what this is for; nearly all guesses are right, and the bits are the same."""
    steps = []
    for one in (plain, guessing):
        first = asked("first", 0, 0)
        again = [asked(f"again{n}", 0, 100 * n) for n in range(1, 4)]
        counters = play(one, [first, *again]).engine.scheduler.counters
        assert all(each.end is not None and first.end is not None for each in again)
        assert {each.end.logprobs for each in again} == {first.end.logprobs}  # type: ignore[union-attr]
        assert {each.end.tokens for each in again} == {first.end.tokens}  # type: ignore[union-attr]
        steps.append(counters.steps)
    assert counters.accepted_recalled_tokens > 0.95 * counters.recalled_tokens > 3 * 30
    assert steps[1] < steps[0] - 3 * 25


def test_texts_of_a_crowd_are_the_same_with_and_without_earlier_ones(
    plain: Executor, guessing: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other seeds for the same prompts and few tokens, of which guesses are wrong, with some that are cancelled in
    the middle, and some that give way to a higher priority and go on later."""
    monkeypatch.setattr(drafts, "PATIENCE", 0)

    def crowd() -> list[Arrival]:
        made = []
        for n in range(24):
            options: dict[str, Any] = {"cache_salt": b"s" * (n % 5 == 0), "priority": n // 4 % 2 * (n % 4 == 3)}
            seed, cancel = (n if n % 3 == 2 else None), (9 if n % 7 == 3 else None)
            one = asked(f"r{n}", n % 2, 15 * (n // 4), seed, cancel, **options)
            few = replace(one.request.sampling, allowed=frozenset(range(9, 17)))
            made.append(replace(one, request=replace(one.request, sampling=few)))
        return made

    without, recalled = crowd(), crowd()
    play(plain, without)
    counters = play(guessing, recalled).engine.scheduler.counters
    assert counters.preemptions > 0 and counters.recalled_tokens > counters.accepted_recalled_tokens > 100
    for one, other in zip(without, recalled, strict=True):
        assert one.end is not None and other.end is not None
        if one.ending is Ending.CANCELLED or other.ending is Ending.CANCELLED:
            most = min(len(one.end.tokens), len(other.end.tokens))
            assert one.end.logprobs[:most] == other.end.logprobs[:most]
            continue
        assert one.end.tokens == other.end.tokens and one.end.logprobs == other.end.logprobs, one.request.id
        assert one.ending is other.ending


@pytest.mark.parametrize(
    ("writes", "reads"),
    [
        ({"tenant": "a"}, {"tenant": "b"}),
        ({"cache_salt": b"a"}, {"cache_salt": b"b"}),
        ({"cache_write": False}, {}),
        ({}, {"cache_read": False}),
    ],
)
def test_nobody_is_faster_by_the_texts_of_others(
    writes: dict[str, Any], reads: dict[str, Any], guessing: Executor
) -> None:
    """A question that comes faster because somebody else has asked it tells who asks what."""
    counters = play(guessing, [asked("one", 0, 0, **writes), asked("other", 0, 99, **reads)]).engine.scheduler.counters
    assert counters.recalled_tokens == counters.accepted_recalled_tokens == 0
