"""A constraint decides each token by the ones before it, also while the next step is launched ahead, and concerns its
own request alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.chain import Chain, may_follow
from isthmus.checks.crowd import Arrival, play
from isthmus.serve.engine.constraint import Constraint, ConstraintError
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Ending, Request
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling
from tests.serve.engine.harness import FOUR
from tests.support import TINY, as_kept, random_params

ENGINE = replace(FOUR, pages=15)
VOCAB = TINY.vocab_size


@pytest.fixture(scope="module")
def executor(mesh: Mesh) -> Executor:
    served = Served(TINY, ENGINE.resolve(TINY), VOCAB).with_kernels("auto", mesh)
    executor = Executor(served, as_kept(TINY, mesh, random_params(TINY, mesh), "float32"), mesh)
    executor.warm_up()
    return executor


def request(index: int, constraint: Constraint | None, **options: object) -> Request:
    prompt = np.random.default_rng(index).integers(0, VOCAB, 3 + index).tolist()
    sampling = Sampling(temperature=index % 2, seed=index, logprobs=2)
    return replace(Request(f"r{index}", prompt, sampling, 25, constraint=constraint), **options)  # type: ignore[arg-type]


def test_each_token_follows_from_the_one_before(executor: Executor) -> None:
    """A mask that is a step old lets a token through that makes the text invalid. The unconstrained get what they get
    alone."""
    arrivals = [Arrival(request(index, Chain(VOCAB, VOCAB) if index % 3 else None), step=index) for index in range(16)]
    engine = play(executor, arrivals).engine
    assert engine.scheduler.counters.preemptions > 0 and executor.recompilations == 0
    for index, arrival in enumerate(arrivals):
        if index % 3:
            for before, token in zip([0, *arrival.completion], arrival.completion, strict=False):
                assert token in may_follow(before, VOCAB)
        alone = Arrival(arrival.request)
        play(executor, [alone])
        assert alone.end is not None and arrival.end is not None
        assert (alone.end.tokens, alone.end.logprobs) == (arrival.end.tokens, arrival.end.logprobs)
        assert len(arrival.completion) == 25


def test_the_text_ends_where_nothing_may_follow(executor: Executor) -> None:
    arrivals = [Arrival(request(index, Chain(VOCAB, VOCAB, length=1 + index))) for index in range(5)]
    play(executor, arrivals)
    assert [len(arrival.completion) for arrival in arrivals] == [1, 2, 3, 4, 5]
    assert {arrival.ending for arrival in arrivals} == {Ending.COMPLETE}
    assert all(arrival.end is not None and arrival.end.stop_token is None for arrival in arrivals)


def test_a_constraint_that_cannot_go_on_ends_its_request_alone(executor: Executor) -> None:
    """A grammar that meets its limit in the middle is somebody's mistake, and not everybody's."""
    arrivals = [
        Arrival(request(0, None)),
        Arrival(request(1, Chain(VOCAB, VOCAB, fails_at=4))),
        Arrival(request(2, Chain(VOCAB, VOCAB))),
    ]
    play(executor, arrivals)
    assert [arrival.ending for arrival in arrivals] == [Ending.LENGTH, Ending.ERROR, Ending.LENGTH]
    failed = arrivals[1].end
    assert failed is not None and isinstance(failed.failure, ConstraintError) and len(failed.tokens) == 4


def test_options_hold_beside_a_constraint_as_far_as_they_can(executor: Executor) -> None:
    """A bad token isn't drawn, unless nothing else may come."""
    bad = frozenset(range(0, VOCAB, 2))
    sampling = Sampling(temperature=1, seed=1, bad=bad)
    arrival = Arrival(request(1, Chain(VOCAB, VOCAB), sampling=sampling))
    play(executor, [arrival])
    for before, token in zip([0, *arrival.completion], arrival.completion, strict=False):
        assert token in (may_follow(before, VOCAB) - bad or may_follow(before, VOCAB))
