"""Guesses make a text that repeats come sooner, and no text come otherwise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.model.ops.cpu import library
from isthmus.serve.engine import drafts
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.drafts import MOST_INDEXED, PATIENCE, Lookup
from isthmus.serve.engine.executor import Executor, Served
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.sampling import Sampling
from tests.support import TINY, as_kept, random_params

ENGINE = EngineConfig(max_sequences=3, page_size=8, block_size=16, prefill_tokens=32, pages=30, max_waiting=64)


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


def executor(mesh: Mesh, draft_rows: int) -> Executor:
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


def test_texts_are_the_same_with_and_without_guesses(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit of each log-probability: a guess that was taken is what would have been drawn."""
    if reason := library.why_not():
        pytest.skip(reason)
    plain = arrivals()
    steps = play(executor(mesh, 0), plain).engine.scheduler.counters.steps
    guessing = executor(mesh, 8)
    for patience in (PATIENCE, 0):
        monkeypatch.setattr(drafts, "PATIENCE", patience)
        guessed = arrivals()
        engine = play(guessing, guessed).engine
        counters = engine.scheduler.counters
        assert counters.drafted_tokens > counters.accepted_tokens > 30, "right and wrong guesses"
        assert engine.executor.recompilations == 0
        for one, other in zip(plain, guessed, strict=True):
            assert one.end is not None and other.end is not None
            assert one.end.tokens == other.end.tokens, one.request.id
            assert one.end.logprobs == other.end.logprobs, one.request.id
            assert one.end.reason is other.end.reason
        assert patience == 0 or counters.steps < steps
