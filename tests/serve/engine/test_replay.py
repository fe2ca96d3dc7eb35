"""What many clients get of one engine: nobody is forgotten, nobody takes another's share, and waiting has bounds."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from isthmus.serve.engine.messages import Ending
from isthmus.serve.engine.pooling import Pooling
from isthmus.serve.engine.queue import AGEING
from isthmus.serve.engine.running import MOST_PREEMPTIONS
from isthmus.serve.engine.scheduler import MOST_PASSES, Scheduler
from tests.serve.engine.replay import ENGINE, Asked, Outcome, Replay, prompt


def crowd(count: int) -> Iterator[Asked]:
    """`count` requests of five tenants and three priorities, most of them one tenant's; some leave, some have no time,
    some are scored, some ask for embeddings. 50 come at once, again and again."""
    rng, scored, pooled = random.Random(5), random.Random(13), random.Random(17)
    step = 0
    for index in range(count):
        if index % 50 == 0:
            step += rng.choice([2, 28])
        draws = max(1, int(rng.expovariate(1 / 6)))
        tokens = prompt(rng, rng.choice([8, 30, 70, 300 if index % 9 == 0 else 8]), rng.randrange(4))
        most, first = max(1, draws + rng.choice([-4, 8, 200])), None
        if scored.random() < 0.15:
            most, first = scored.choice([0, most]), scored.choice([1, scored.randrange(1, len(tokens))])
        pooling = pooled.choice([Pooling.MEAN, Pooling.LAST]) if first is None and pooled.random() < 0.1 else None
        yield Asked(
            step,
            tokens,
            max_tokens=most if pooling is None else 0,
            draws=draws,
            scored_from=first,
            pooling=pooling,
            cancel_after=rng.randrange(40) if rng.random() < 0.05 else None,
            tenant=rng.choices("abcde", [12, 1, 1, 1, 1])[0],
            priority=rng.choices([-1, 0, 1], [1, 8, 1])[0],
            max_queue_time=20.0 if rng.random() < 0.1 else None,
        )


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_long_day(count: int) -> None:
    """Each of very many requests ends once, in a way that it asked for, and leaves nothing behind."""
    replay = Replay(dataclasses.replace(ENGINE, max_sequences=32, pages=300))

    def check(scheduler: Scheduler) -> None:
        if replay.steps % 500 == 0:
            scheduler.check()

    replay.run(crowd(count), 4 * count, check)
    assert len(replay.outcomes) == count, "a request was lost, or ended twice"
    endings = Counter(outcome.end.reason for outcome in replay.outcomes)
    assert set(endings) == {Ending.EOS, Ending.LENGTH, Ending.EMBEDDED, Ending.CANCELLED, Ending.QUEUE_TIME}
    for asked, end in ((outcome.asked, outcome.end) for outcome in replay.outcomes):
        assert end.progress.preemptions <= MOST_PREEMPTIONS
        if end.reason in (Ending.EOS, Ending.LENGTH):
            assert len(end.tokens) == min(asked.draws, asked.max_tokens)
            assert len(end.prompt_logprobs) == len(asked.prompt) - (asked.scored_from or len(asked.prompt))
            assert asked.pooling is None
        if end.reason is Ending.QUEUE_TIME:
            assert asked.max_queue_time is not None and not end.tokens
            assert end.progress.at == asked.step + asked.max_queue_time
        if end.progress.admitted_at is not None and asked.max_queue_time is not None:
            assert end.progress.admitted_at < asked.step + asked.max_queue_time
        assert (end.progress.admitted_at or end.progress.at) - asked.step < 400, "a request is starved"


def percentile(outcomes: list[Outcome], tenant: str, share: float) -> float:
    waits = sorted(outcome.first_token_after for outcome in outcomes if outcome.asked.tenant == tenant)
    return waits[int(share * (len(waits) - 1))]


def quiet(count: int) -> list[Asked]:
    """A request now and then, sometimes three at once."""
    rng = random.Random(6)
    step, asked = 0, []
    for _ in range(count):
        step += rng.choice([0, 20, 40, 60])
        draws = rng.randrange(1, 40)
        asked.append(Asked(step, prompt(rng, rng.randrange(10, 250)), 64, draws, tenant="quiet"))
    return asked


@pytest.mark.parametrize("length", [20, 900], ids=["short prompts", "long prompts"])
def test_a_flooding_tenant_does_not_delay_a_quiet_one(length: int) -> None:
    """One client with a thousand requests must not make the service slow for all others."""
    alone, beside = Replay(), Replay()
    asked = quiet(150)
    alone.run(asked, 10**5)
    rng = random.Random(7)
    flood = [Asked(i // 2, prompt(rng, length), 100, rng.randrange(1, 100), tenant="flood") for i in range(1500)]
    beside.run(sorted([*asked, *flood], key=lambda one: one.step), 10**5)
    for share in (0.5, 0.99):
        assert percentile(beside.outcomes, "quiet", share) <= 1.5 * percentile(alone.outcomes, "quiet", share)
    assert percentile(beside.outcomes, "flood", 0.5) > 100, "there was no flood"


def test_short_requests_pass_one_that_finds_no_pages_and_it_starts_all_the_same() -> None:
    """A long prompt must neither hold up everybody behind it nor wait for ever while they go past."""
    rng = random.Random(8)
    config = dataclasses.replace(ENGINE, pages=1 + 64 + 8)
    first = [Asked(0, prompt(rng, 100), 100, 100, tenant="a") for _ in range(4)]
    big = Asked(1, prompt(rng, 960), 60, 60, tenant="a")
    short = [Asked(2 + 2 * i, prompt(rng, 16), 4, 4, tenant="a") for i in range(200)]
    replay = Replay(config)
    replay.run([*first, big, *short], 5000)
    began = {id(outcome.asked): outcome.end.progress.admitted_at or 0.0 for outcome in replay.outcomes}
    passed = [one for one in short if began[id(one)] < began[id(big)]]
    assert 0 < len(passed) <= MOST_PASSES
    assert max(began[id(one)] - one.step for one in passed) <= 2, "they waited behind it"
    drained = max(outcome.end.progress.at for outcome in replay.outcomes if outcome.asked in [*first, *passed])
    assert began[id(big)] <= drained + 1, "there was room, and it didn't start"


def test_a_low_priority_starts_now_and_then() -> None:
    """A stream of urgent requests must not keep the others from their answers for ever."""
    rng = random.Random(9)
    config = dataclasses.replace(ENGINE, max_sequences=1)
    urgent = [Asked(0, prompt(rng, 8), 2, 2, priority=5) for _ in range(100)]
    others = [Asked(0, prompt(rng, 8), 2, 2, priority=priority) for priority in (-3, 0) for _ in range(3)]
    replay = Replay(config)
    replay.run([*others, *urgent], 5000)
    order = [outcome.asked.priority for outcome in replay.outcomes]
    for priority in (-3, 0):
        places = [-1, *(place for place, one in enumerate(order) if one == priority)]
        assert max(after - before for before, after in itertools.pairwise(places)) <= AGEING + 3
    assert order[: AGEING - 1] == [5] * (AGEING - 1), "the urgent ones go first"


def test_an_urgent_request_starts_at_once_when_the_engine_is_full() -> None:
    """Whoever is in a hurry can't wait for somebody's long text to end."""
    rng = random.Random(10)
    running = [Asked(0, prompt(rng, 8), 200, 200) for _ in range(ENGINE.max_sequences + 5)]
    urgent = Asked(30, prompt(rng, 8), 2, 2, priority=1)
    replay = Replay()
    replay.run([*running, urgent], 5000)
    (outcome,) = (one for one in replay.outcomes if one.asked is urgent)
    assert outcome.first_token_after <= 2
    assert sum(one.end.progress.preemptions for one in replay.outcomes) == 1


def test_samples_of_one_prompt_compute_it_once() -> None:
    """Eight answers to one long prompt must not cost eight prompts."""
    rng = random.Random(11)
    tokens = prompt(rng, 800)
    replay = Replay()
    replay.run([Asked(0, tokens, 2, 2) for _ in range(8)], 100)
    assert replay.tokens <= 800 + 8 * (1 + ENGINE.block_size)


def test_whoever_waits_for_a_prompt_goes_on_if_its_owner_leaves() -> None:
    """The one who computes what others wait for may hang up at any time."""
    rng = random.Random(12)
    tokens = prompt(rng, 1000)
    for leaves in range(6):
        replay = Replay()
        first = Asked(0, tokens, 2, 2, cancel_after=leaves)
        replay.run([first, *(Asked(0, tokens, 2, 2) for _ in range(3))], 100)
        assert [one.end.reason for one in replay.outcomes].count(Ending.EOS) >= 3
        assert replay.tokens <= 1000 + 256 + 4 * (1 + ENGINE.block_size), "what was computed is kept"
