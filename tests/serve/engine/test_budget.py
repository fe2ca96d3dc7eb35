"""A long prompt beside streams holds up none of their tokens by more than was asked for, and comes soon itself."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.model.config import ModelConfig
from isthmus.serve.engine.budget import FACTOR, Budget
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.engine.scheduler import Scheduler
from tests.serve.engine.harness import only_tokens

PLAIN, BLOCK = 0.016, 0.060
"""Seconds of a step without prompts, and what a block of 32 tokens adds"""
PROMPT = 7000
MODEL = ModelConfig(context_length=8192)


def served(target_itl: float, streams: int) -> tuple[list[float], float]:
    """The times between a stream's tokens while a long prompt is computed, and the time to that one's first token."""
    scheduler = Scheduler(
        EngineConfig(target_itl=target_itl, draft_rows=0, steps_per_launch=1, max_waiting=64).resolve(MODEL)
    )
    for index in range(streams):
        scheduler.add(Request(f"stream {index}", [1, 2, 3], Sampling(), 4000))
    now, last, came, gaps, in_flight = 0.0, 0.0, None, [], None
    while True:
        if in_flight is not None and came is None and now > 1:
            came = now
            scheduler.add(Request("long", [7] * PROMPT, Sampling(), 1))
        plan = scheduler.plan(now)
        if in_flight is not None:
            now += PLAIN + BLOCK * in_flight.blocks
            events = scheduler.commit(in_flight, only_tokens(np.full(in_flight.bucket.samples, 9)), now)
            for event in events:
                if event.request.id == "stream 0":
                    gaps += [now - last] if came is not None else []
                    last = now
                if event.request.id == "long" and event.tokens:
                    return gaps, now - (came or 0.0)
        in_flight = plan
        if plan is None:
            now += PLAIN
        if came is None and not streams and now > 1:
            came = now
            scheduler.add(Request("long", [7] * PROMPT, Sampling(), 1))


@pytest.mark.parametrize(("target", "most"), [(0.0, FACTOR * PLAIN), (0.2, 0.2)])
def test_the_time_between_tokens_is_what_was_asked_for(target: float, most: float) -> None:
    """A block at least is computed in each step; and who asks for little delay pays with the prompt's."""
    alone = served(target, 0)[1]
    gaps, first = served(target, 8)
    assert np.quantile(gaps[3:], 0.99) <= max(most, PLAIN + BLOCK) * 1.01
    assert np.median(gaps) >= 2 * PLAIN, "prompts are computed beside the streams"
    assert first <= 1.3 * alone


def test_without_streams_nothing_is_held_back() -> None:
    budget = Budget(EngineConfig().resolve(MODEL))
    assert budget.blocks(8) == 16, "nothing is known yet"
    budget.learn(0, PLAIN)
    budget.learn(4, PLAIN + 4 * BLOCK)
    assert budget.blocks(0) == 16 and budget.blocks(1) == 1


def test_cheap_blocks_are_not_held_back() -> None:
    """On a machine where a prompt's tokens cost next to nothing, all of a step's room is used."""
    budget = Budget(EngineConfig().resolve(MODEL))
    budget.learn(0, 0.01)
    budget.learn(16, 0.011)
    assert budget.blocks(8) == 16
