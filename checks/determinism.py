"""Whether a request gets the same bits whatever happens around it: each is run in a crowd and again alone, and some
are resumed in the middle, or have what they drew scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from isthmus.checks.chain import Chain
from isthmus.checks.crowd import Arrival, Guest, play
from isthmus.checks.trained import Learner
from isthmus.serve.engine.adapters import Resident
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.constraint import Constraint
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import End, Ending, Event, Logprobs, Request
from isthmus.serve.engine.pooling import Pooling
from isthmus.serve.engine.sampling import Sampling


@dataclass(frozen=True)
class Difference:
    """Where a request got something else than alone."""

    request: Request
    at: int
    """The index of the token in the completion; of the prompt's last token it is -1"""
    other: str
    alone: str
    where: str = "in the crowd"
    """Where it got `other`"""

    def __str__(self) -> str:
        request = self.request
        plain = asdict(Sampling())
        asked = [f"{name}={value}" for name, value in asdict(request.sampling).items() if value != plain[name]]
        return (
            f"request {request.id} ({len(request.prompt)} tokens of prompt, {', '.join(asked)}) at token {self.at}: "
            f"{self.other} {self.where}, {self.alone} alone"
        )


@dataclass(frozen=True)
class Verdict:
    """What came of a check."""

    requests: int
    tokens: int
    """That were compared, each with its log-probabilities"""
    resumed: int
    scored: int
    """Requests that were also resumed in the middle, and whose tokens were also scored"""
    trained: int
    """Requests whose tokens also went through the forward pass of training"""
    differences: tuple[Difference, ...]
    """The first one of each request that differs"""
    preemptions: int
    cached_tokens: int
    """Tokens of prompts that the crowd read from the prefix cache"""
    cancelled: int
    accepted: int
    """Tokens that the crowd had guessed rightly"""
    recalled: int
    """Those of them that were guessed by earlier texts"""

    @property
    def holds(self) -> bool:
        return not self.differences


def crowd_config(context_length: int, sequences: int = 16) -> EngineConfig:
    """An engine in which much happens: pages for a quarter of the sequences at full length, so that some are preempted,
    small blocks, so that prompts are cut often, rows for guesses however many run, and several steps a launch wherever
    that may be, however slow they are."""
    page = 8
    pages = 1 + max(1, sequences // 4) * -(-context_length // page)
    return EngineConfig(
        max_sequences=sequences,
        context_length=context_length,
        pages=pages,
        page_size=page,
        block_size=16,
        prefill_tokens=64,
        draft_rows=2 * sequences,
        launch_time=3600.0,
        max_waiting=1 << 20,
    )


def random_arrivals(
    vocab: int,
    context_length: int,
    count: int,
    seed: int = 0,
    ids: int = 0,
    constraints: Sequence[Constraint] = (),
    adapters: Sequence[Resident] = (),
    guests: Sequence[Guest] = (),
) -> list[Arrival]:
    """Requests of every length and with every option, some of which begin alike, that come a few each step, of several
    tenants with priorities and salts; one in ten is cancelled in the middle, one in seven has a constraint, and one in
    ten asks again, in the end, what another has asked.

    ids: the width of the model's logits; 0 is vocab. constraints: what to choose from besides a Chain.
    adapters: what to choose from besides none. guests: adapters of which one request in four gets one instead, which is
    loaded as it comes.
    """
    rng = np.random.default_rng(seed)
    shared = [rng.integers(0, vocab, context_length // 2).tolist() for _ in range(3)]
    made: list[Arrival] = []
    for index in range(count):
        prompt = rng.integers(0, vocab, int(rng.integers(1, context_length // 2))).tolist()
        if rng.random() < 0.4:
            prompt = shared[int(rng.integers(3))][: int(rng.integers(1, context_length // 2))] + prompt[:5]
        limit = int(rng.integers(1, context_length // 2 - 4))
        chosen = int(rng.integers(1 + len(constraints)))
        constraint = constraints[chosen - 1] if chosen else Chain(vocab, ids or vocab)
        stops = frozenset(rng.integers(0, vocab, 2).tolist()) if rng.random() < 0.3 else frozenset()
        request = Request(
            f"r{index}",
            prompt,
            random_sampling(rng, vocab, index),
            limit,
            stop_ids=stops,
            constraint=constraint if rng.random() < 1 / 7 else None,
            scored_from=int(rng.integers(1, len(prompt))) if len(prompt) > 1 and rng.random() < 0.1 else None,
            adapter=(None, *adapters)[int(rng.integers(1 + len(adapters)))],
            predicted=prompt[::-1] if rng.random() < 0.1 else (),
            tenant=str(rng.choice(["a", "a", "b"])),
            priority=int(rng.choice([0, 0, 0, 1])),
            cache_salt=bytes(rng.choice([b"", b"", b"salt"])),
            cache_read=rng.random() < 0.9,
            cache_write=rng.random() < 0.9,
        )
        if rng.random() < 0.07:  # it asks for an embedding, and draws nothing
            pooling = (Pooling.MEAN, Pooling.LAST)[index % 2]
            request = replace(request, max_tokens=0, scored_from=None, constraint=None, pooling=pooling)
        cancel = int(rng.integers(1, limit + 1)) if rng.random() < 0.1 else None
        step = int(rng.integers(0, 2 + 2 * count))
        guest = guests[int(rng.integers(len(guests)))] if guests and rng.random() < 0.25 else None
        if made and rng.random() < 0.1:
            again, step = made[int(rng.integers(len(made)))], 2 + 2 * count
            request, guest = replace(again.request, id=f"r{index}"), again.guest
        made.append(Arrival(request, step, cancel, guest))
    return made


def random_sampling(rng: np.random.Generator, vocab: int, seed: int) -> Sampling:
    """Any combination of options; each is off in most of them, as with people, and in two of five all those are that
    change what may be drawn next, with which several steps can't be launched at once."""

    def some(value: float, off: float) -> float:
        return value if rng.random() < 0.3 else off

    ids = rng.choice(vocab, min(vocab // 2, 40), replace=False).tolist()
    plain = Sampling(
        temperature=some(0.0, float(rng.uniform(0.2, 1.5))),
        top_k=int(some(int(rng.integers(1, 60)), 0)),
        top_p=some(float(rng.uniform(0.3, 1)), 1.0),
        min_p=some(float(rng.uniform(0, 0.2)), 0.0),
        seed=seed * 0x9E3779B97F4A7C15 % 2**64,
        logprobs=int(rng.integers(0, 4)),
    )
    if rng.random() < 0.4:
        return plain
    return replace(
        plain,
        repetition_penalty=some(float(rng.uniform(0.8, 1.6)), 1.0),
        frequency_penalty=some(float(rng.uniform(-0.5, 1)), 0.0),
        presence_penalty=some(float(rng.uniform(-0.5, 1)), 0.0),
        bias=tuple((token, float(rng.uniform(-5, 5))) for token in ids[:9]) if rng.random() < 0.2 else (),
        allowed=frozenset(ids) if rng.random() < 0.1 else None,
        bad=frozenset(ids[:5]) if rng.random() < 0.2 else frozenset(),
        min_tokens=int(some(int(rng.integers(1, 6)), 0)),
    )


def check(
    executor: Executor,
    arrivals: Sequence[Arrival],
    on_done: Callable[[], None] = lambda: None,
    learned: Learner | None = None,
) -> Verdict:
    """Runs all in a crowd, and each again alone from a cold cache. on_done: called for each that has ended, in the
    crowd and alone. learned: what training says of a text, which is compared where no adapter was chosen."""

    def report(events: Sequence[Event]) -> None:
        for event in events:
            if event.end is not None:
                on_done()

    played = play(executor, arrivals, report)
    counters = played.engine.scheduler.counters
    differences, tokens, resumed, scored, trained = [], 0, 0, 0, 0
    for index, arrival in enumerate(arrivals):
        request, end, guest = arrival.request, arrival.end, arrival.guest
        alone = _end_of(executor, replace(request, id=f"{request.id} alone"), guest)
        assert end is not None
        tokens += len(end.tokens) + len(end.prompt_logprobs)
        found = list(compared(request, end, alone))
        if index % 3 == 1 and len(alone.tokens) > 1:
            resumed += 1
            found += compared(request, _resumed(executor, request, guest, alone), alone, "resumed")
        if index % 3 == 2 and alone.tokens:
            scored += 1
            found += compared(request, _scored(executor, request, guest, alone), alone, "scored")
        if index % 3 == 0 and alone.tokens and request.adapter is None and guest is None and learned is not None:
            trained += 1
            drawn, learnt = _drawn(alone), learned([*request.prompt, *alone.tokens])[len(request.prompt) - 1 :]
            told_of = tuple(Logprobs(float(value), (), ()) for value in learnt)
            found += compared(request, replace(drawn, logprobs=told_of), drawn, "in training")
        differences += found[:1]
        on_done()
    return Verdict(
        len(arrivals),
        tokens,
        resumed,
        scored,
        trained,
        tuple(differences),
        counters.preemptions,
        counters.cached_prompt_tokens,
        sum(arrival.ending is Ending.CANCELLED for arrival in arrivals),
        counters.accepted_tokens,
        counters.accepted_recalled_tokens,
    )


def _end_of(executor: Executor, request: Request, guest: Guest | None) -> End:
    """How a request ends that is alone in a new engine, with its guest if it has one."""
    arrival = Arrival(request, guest=guest)
    play(executor, [arrival])
    assert arrival.end is not None
    return arrival.end


def _resumed(executor: Executor, request: Request, guest: Guest | None, alone: End) -> End:
    """What it gets if it breaks off in the middle, and goes on in a new engine."""
    half = len(alone.tokens) // 2
    rest = _end_of(executor, replace(request, resumed=alone.tokens[:half], scored_from=None), guest)
    return replace(
        rest,
        tokens=(*alone.tokens[:half], *rest.tokens),
        logprobs=(*alone.logprobs[:half], *rest.logprobs),
        prompt_logprobs=alone.prompt_logprobs,
    )


def _drawn(alone: End) -> End:
    """What was told of the tokens that were drawn, without the likeliest ones."""
    logprobs = tuple(Logprobs(told.token, (), ()) for told in alone.logprobs)
    return replace(alone, logprobs=logprobs, prompt_logprobs=())


def _scored(executor: Executor, request: Request, guest: Guest | None, alone: End) -> End:
    """What it is told about its tokens if they are given, as the end of a prompt."""
    scoring = Request(
        f"{request.id} scored",
        [*request.prompt, *alone.tokens],
        Sampling(logprobs=request.sampling.logprobs),
        0,
        scored_from=len(request.prompt),
        adapter=request.adapter,
    )
    return replace(alone, logprobs=_end_of(executor, scoring, guest).prompt_logprobs)


def compared(request: Request, other: End, alone: End, where: str = "in the crowd") -> Iterator[Difference]:
    """Yields every token at which the two differ, by its id or by a bit of what was told about it. A request that was
    cancelled has a beginning of what it gets alone."""
    cancelled = other.reason is Ending.CANCELLED
    first = -max(len(other.prompt_logprobs), len(alone.prompt_logprobs))
    for at in range(first, max(len(other.tokens), len(alone.tokens))):
        if cancelled and at >= (len(other.tokens) if at >= 0 else first + len(other.prompt_logprobs)):
            return
        one, two = told(other, at, first), told(alone, at, first)
        if one != two:
            yield Difference(request, at, one, two, where)
    if not cancelled and _vector(other) != _vector(alone):
        yield Difference(request, 0, f"embedding {_vector(other)[:32]}…", f"{_vector(alone)[:32]}…", where)
    if not cancelled and other.reason is not alone.reason:
        yield Difference(request, len(other.tokens), other.reason.value, alone.reason.value, where)


def _vector(end: End) -> str:
    """The bits of an embedding."""
    return "none" if end.embedding is None else end.embedding.tobytes().hex()


def told(end: End, at: int, first: int = 0) -> str:
    """A token and all that was told about it, to the last bit. at: as in Difference. first: where the prompt's tokens
    begin that were scored, which is 0 if none were."""
    if at >= len(end.tokens):
        return f"the end ({end.reason.value})"
    if at < 0 and at - first >= len(end.prompt_logprobs):
        return "nothing"
    own = end.logprobs[at] if at >= 0 else end.prompt_logprobs[at - first]
    top = ", ".join(f"{token} {value.hex()}" for token, value in zip(own.top_tokens, own.top, strict=True))
    token = f"token {end.tokens[at]}" if at >= 0 else "a token of the prompt"
    return f"{token} with log-probability {own.token.hex()}" + (f" [{top}]" if top else "")
