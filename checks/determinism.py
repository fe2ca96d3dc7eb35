"""Whether a request gets the same bits whatever happens around it: each is run in a crowd and again alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from isthmus.checks.chain import Chain
from isthmus.checks.crowd import Arrival, play
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import End, Ending, Event, Request
from isthmus.serve.engine.sampling import Sampling


@dataclass(frozen=True)
class Difference:
    """Where a request got something else in the crowd than alone."""

    request: Request
    at: int
    """The index of the token in the completion"""
    crowd: str
    alone: str

    def __str__(self) -> str:
        request = self.request
        plain = asdict(Sampling())
        asked = [f"{name}={value}" for name, value in asdict(request.sampling).items() if value != plain[name]]
        return (
            f"request {request.id} ({len(request.prompt)} tokens of prompt, {', '.join(asked)}) at token {self.at}: "
            f"{self.crowd} in the crowd, {self.alone} alone"
        )


@dataclass(frozen=True)
class Verdict:
    """What came of a check."""

    requests: int
    tokens: int
    """That were compared, each with its log-probabilities"""
    differences: tuple[Difference, ...]
    """The first one of each request that differs"""
    preemptions: int
    cached_tokens: int
    """Tokens of prompts that the crowd read from the prefix cache"""
    cancelled: int

    @property
    def holds(self) -> bool:
        return not self.differences


def crowd_config(context_length: int, sequences: int = 16) -> EngineConfig:
    """An engine in which much happens: pages for a quarter of the sequences at full length, so that some are preempted,
    and small blocks, so that prompts are cut often."""
    page = 8
    pages = 1 + max(1, sequences // 4) * -(-context_length // page)
    return EngineConfig(
        max_sequences=sequences,
        context_length=context_length,
        pages=pages,
        page_size=page,
        block_size=16,
        prefill_tokens=64,
        max_waiting=1 << 20,
    )


def random_arrivals(vocab: int, context_length: int, count: int, seed: int = 0, ids: int = 0) -> list[Arrival]:
    """Requests of every length and with every option, some of which begin alike, that come a few each step, of several
    tenants with priorities and salts; one in ten is cancelled in the middle, and one in seven has a constraint.

    ids: the width of the model's logits; 0 is vocab.
    """
    rng = np.random.default_rng(seed)
    shared = [rng.integers(0, vocab, context_length // 2).tolist() for _ in range(3)]
    made = []
    for index in range(count):
        prompt = rng.integers(0, vocab, int(rng.integers(1, context_length // 2))).tolist()
        if rng.random() < 0.4:
            prompt = shared[int(rng.integers(3))][: int(rng.integers(1, context_length // 2))] + prompt[:5]
        limit = int(rng.integers(1, context_length // 2 - 4))
        stops = frozenset(rng.integers(0, vocab, 2).tolist()) if rng.random() < 0.3 else frozenset()
        request = Request(
            f"r{index}",
            prompt,
            random_sampling(rng, vocab, index),
            limit,
            stop_ids=stops,
            constraint=Chain(vocab, ids or vocab) if rng.random() < 1 / 7 else None,
            tenant=str(rng.choice(["a", "a", "b"])),
            priority=int(rng.choice([0, 0, 0, 1])),
            cache_salt=bytes(rng.choice([b"", b"", b"salt"])),
            cache_read=rng.random() < 0.9,
            cache_write=rng.random() < 0.9,
        )
        cancel = int(rng.integers(1, limit + 1)) if rng.random() < 0.1 else None
        made.append(Arrival(request, step=int(rng.integers(0, 2 + 2 * count)), cancel_after=cancel))
    return made


def random_sampling(rng: np.random.Generator, vocab: int, seed: int) -> Sampling:
    """Any combination of options; each is off in most of them, as with people."""

    def some(value: float, off: float) -> float:
        return value if rng.random() < 0.3 else off

    ids = rng.choice(vocab, min(vocab // 2, 40), replace=False).tolist()
    return Sampling(
        temperature=some(0.0, float(rng.uniform(0.2, 1.5))),
        top_k=int(some(int(rng.integers(1, 60)), 0)),
        top_p=some(float(rng.uniform(0.3, 1)), 1.0),
        min_p=some(float(rng.uniform(0, 0.2)), 0.0),
        seed=seed * 0x9E3779B97F4A7C15 % 2**64,
        logprobs=int(rng.integers(0, 4)),
        repetition_penalty=some(float(rng.uniform(0.8, 1.6)), 1.0),
        frequency_penalty=some(float(rng.uniform(-0.5, 1)), 0.0),
        presence_penalty=some(float(rng.uniform(-0.5, 1)), 0.0),
        bias=tuple((token, float(rng.uniform(-5, 5))) for token in ids[:9]) if rng.random() < 0.2 else (),
        allowed=frozenset(ids) if rng.random() < 0.1 else None,
        bad=frozenset(ids[:5]) if rng.random() < 0.2 else frozenset(),
        min_tokens=int(some(int(rng.integers(1, 6)), 0)),
    )


def check(executor: Executor, arrivals: Sequence[Arrival], on_done: Callable[[], None] = lambda: None) -> Verdict:
    """Runs all in a crowd, and each again alone from a cold cache. on_done: called for each that has ended, in the
    crowd and alone."""

    def report(events: Sequence[Event]) -> None:
        for event in events:
            if event.end is not None:
                on_done()

    played = play(executor, arrivals, report)
    counters = played.engine.scheduler.counters
    differences, tokens = [], 0
    for arrival in arrivals:
        alone = Arrival(replace(arrival.request, id=f"{arrival.request.id} alone"))
        play(executor, [alone])
        assert arrival.end is not None and alone.end is not None
        tokens += len(arrival.end.tokens)
        differences += list(compared(arrival.request, arrival.end, alone.end))[:1]
        on_done()
    return Verdict(
        len(arrivals),
        tokens,
        tuple(differences),
        counters.preemptions,
        counters.cached_prompt_tokens,
        sum(arrival.ending is Ending.CANCELLED for arrival in arrivals),
    )


def compared(request: Request, crowd: End, alone: End) -> Iterator[Difference]:
    """Yields every token at which the two differ, by its id or by a bit of what was told about it. A request that was
    cancelled has a beginning of what it gets alone."""
    for at in range(max(len(crowd.tokens), len(alone.tokens))):
        if at >= len(crowd.tokens) and crowd.reason is Ending.CANCELLED:
            return
        one, other = told(crowd, at), told(alone, at)
        if one != other:
            yield Difference(request, at, one, other)
    if crowd.reason not in (alone.reason, Ending.CANCELLED):
        yield Difference(request, len(crowd.tokens), crowd.reason.value, alone.reason.value)


def told(end: End, at: int) -> str:
    """A token and all that was told about it, to the last bit."""
    if at >= len(end.tokens):
        return f"the end ({end.reason.value})"
    own = end.logprobs[at]
    top = ", ".join(f"{token} {value.hex()}" for token, value in zip(own.top_tokens, own.top, strict=True))
    return f"token {end.tokens[at]} with log-probability {own.token.hex()}" + (f" [{top}]" if top else "")
