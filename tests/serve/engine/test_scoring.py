"""What is told about tokens that are given is what is told where they are drawn, whatever happens around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.chain import Chain
from isthmus.checks.crowd import Arrival, play
from isthmus.errors import InvalidRequest
from isthmus.model.config import ModelConfig, RopeScaling
from isthmus.model.execution import Execution
from isthmus.model.ops.cpu import library
from isthmus.model.weights.quantization import SCHEMES, quantize_params
from isthmus.serve.engine import drafts
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Ending, Event, Request
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling
from tests.serve.engine.harness import FOUR, HookedExecutor
from tests.serve.engine.simulation import Simulation, run_until
from tests.support import TINY, as_kept, forward, random_params

ENGINE = replace(FOUR, pages=19)
"""Pages for two of the longest sequences, so that requests are preempted"""
VOCAB = TINY.vocab_size


def made(
    mesh: Mesh, scheme: str = "none", *, kernels: str = "auto", config: ModelConfig = TINY, **sizes: Any
) -> Executor:
    engine = replace(ENGINE, **sizes).resolve(config)
    served = Served(config, engine, config.vocab_size, Execution("float32")).with_kernels(kernels, mesh)
    params = as_kept(config, mesh, random_params(config, mesh), "float32")
    quantize_params(config, params, SCHEMES[scheme])
    executor = Executor(served, params, mesh)
    executor.warm_up()
    return executor


def drawn(count: int, logprobs: int = 3) -> list[Request]:
    """Greedy requests, some of which begin alike; most draw to a text of more than one block."""
    rng = np.random.default_rng(8)
    shared = rng.integers(0, VOCAB, 40).tolist()
    requests = []
    for index in range(count):
        prompt = rng.integers(0, VOCAB, int(rng.integers(1, 30))).tolist()
        if index % 3 == 0:
            prompt = shared[: int(rng.integers(17, 40))] + prompt[:4]
        most = int(rng.integers(12, 64 - len(prompt)))
        requests.append(Request(f"d{index}", prompt, Sampling(temperature=0, logprobs=logprobs), most))
    return requests


def scored(text: Arrival, name: str, first: int, last: int | None = None, **options: Any) -> Request:
    """The request that scores a text from index `first` to before `last`, and draws no more."""
    sampling = options.pop("sampling", text.request.sampling)
    return Request(name, text.tokens[:last], sampling, options.pop("max_tokens", 0), scored_from=first, **options)


@pytest.mark.parametrize("scheme, cache_dtype", [("none", "model"), ("int8", "model"), ("int8", "int8")])
def test_scores_are_the_bits_that_drawing_tells(scheme: str, cache_dtype: Any, mesh: Mesh) -> None:
    """Otherwise a policy's ratio isn't 1 where nothing has changed. Alone, and in a crowd that takes each other's pages
    and has guesses checked; from a cold cache and from a warm one."""
    if reason := library.why_not():
        pytest.skip(reason)
    executor = made(mesh, scheme, cache_dtype=cache_dtype)
    texts = [Arrival(request) for request in drawn(12)]
    play(executor, texts)
    alone = [Arrival(scored(text, f"{text.request.id} alone", len(text.request.prompt))) for text in texts]
    for arrival in alone:
        play(executor, [arrival])
    crowd = [
        Arrival(scored(text, f"{text.request.id} {turn}", len(text.request.prompt), priority=turn), 2 * index)
        for turn in range(2)
        for index, text in enumerate(texts)
    ]
    beside = [Arrival(replace(text.request, id=f"b{index}"), 2 * index) for index, text in enumerate(texts)]
    counters = play(executor, [*crowd, *beside]).engine.scheduler.counters
    again = sum(arrival.end.progress.preemptions for arrival in crowd if arrival.end is not None)
    assert again > 0 and counters.cached_prompt_tokens > 0, "nothing happened around them"
    assert executor.recompilations == 0
    for text, arrival in zip([*texts] * 3, [*alone, *crowd], strict=True):
        assert text.end is not None and arrival.end is not None
        assert arrival.end.prompt_logprobs == text.end.logprobs, arrival.request.id
        assert arrival.ending is Ending.LENGTH and not arrival.completion and not arrival.end.logprobs
    for text, arrival in zip(texts, beside, strict=True):
        assert arrival.end is not None and text.end is not None
        assert (arrival.end.tokens, arrival.end.logprobs) == (text.end.tokens, text.end.logprobs)


def test_events_tell_each_score_once_and_in_order(mesh: Mesh) -> None:
    """Whoever reads a stream gets what the end holds, and then the text, which goes on as without scores; also where
    the text has penalties, a form, or tokens that it may not have, which the prompt has."""
    if reason := library.why_not():
        pytest.skip(reason)
    executor = made(mesh)
    texts = [Arrival(request) for request in drawn(4, 2)]
    play(executor, texts)
    options: list[dict[str, Any]] = [
        {"sampling": Sampling(temperature=0.9, top_p=0.9, seed=3, logprobs=2)},
        {"sampling": Sampling(repetition_penalty=1.4, frequency_penalty=0.3, seed=4, logprobs=2)},
        {"sampling": Sampling(temperature=0, bad=frozenset(range(0, VOCAB, 2)), min_tokens=3, logprobs=2)},
        {"sampling": Sampling(seed=5, logprobs=2), "constraint": Chain(VOCAB, VOCAB)},
    ]
    arrivals, plain = [], []
    for index, (text, option) in enumerate(zip(texts, options, strict=True)):
        first, last = len(text.request.prompt), len(text.request.prompt) + 9
        request = scored(text, f"s{index}", first, last, max_tokens=12, **option)
        arrivals.append(Arrival(request))
        plain.append(Arrival(replace(request, id=f"p{index}", scored_from=None)))
    heard: dict[str, list[Event]] = {}
    events = play(executor, [*arrivals, *plain]).events
    for event in events:
        heard.setdefault(event.request.id, []).append(event)
    for text, one, other in zip(texts, arrivals, plain, strict=True):
        assert text.end is not None and one.end is not None and other.end is not None
        assert one.end.prompt_logprobs == text.end.logprobs[:9] and not other.end.prompt_logprobs
        assert (one.end.tokens, one.end.logprobs) == (other.end.tokens, other.end.logprobs), one.request.id
        own = heard[one.request.id]
        told = [each for event in own for each in event.prompt_logprobs]
        assert tuple(told) == one.end.prompt_logprobs
        kinds = [bool(event.tokens) for event in own if event.end is None]
        assert kinds == sorted(kinds), "a score came after the text had begun"


@pytest.mark.parametrize("kernels", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
def test_scores_are_those_of_the_training_forward_pass(kernels: str, mesh: Mesh) -> None:
    """Another model's numbers would be as good as these. Of the whole prompt but its first token, to 1e-5, with the
    likeliest tokens in their order; a prompt may fill the context."""
    params = random_params(TINY, mesh)
    executor = made(mesh, kernels=kernels)
    rng = np.random.default_rng(1)
    arrivals = []
    for index, length in enumerate([2, 5, 17, 33, 50, TINY.context_length]):
        prompt = rng.integers(0, VOCAB, length).tolist()
        arrivals.append(Arrival(Request(f"r{index}", prompt, Sampling(0.5, logprobs=4), 0, scored_from=1), index))
    play(executor, arrivals)
    for arrival in arrivals:
        prompt = list(arrival.request.prompt)
        want = log_softmax(forward(TINY, params, [prompt])[0])[:-1]
        assert arrival.end is not None and len(arrival.end.prompt_logprobs) == len(want) == len(prompt) - 1
        for row, token, told in zip(want, prompt[1:], arrival.end.prompt_logprobs, strict=True):
            assert told.token == pytest.approx(row[token], abs=1e-5)
            np.testing.assert_allclose(told.top, np.sort(row)[::-1][:4], atol=1e-5)
            np.testing.assert_allclose(row[list(told.top_tokens)], told.top, atol=1e-5)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def test_guesses_go_on_beside_scores(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an engine of few slots both fill up the rows of one step; neither may show in the other's numbers."""
    if reason := library.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(drafts, "PATIENCE", 0)
    allowed = Sampling(temperature=0.0, logprobs=2, allowed=frozenset(range(9, 12)))
    requests = [replace(request, sampling=allowed) for request in drawn(6, 2)]
    plain, guessing = made(mesh, pages=40, draft_rows=0, steps_per_launch=1), made(mesh, pages=40, draft_rows=12)
    texts = [Arrival(request) for request in requests]
    play(plain, texts)
    drawing = [Arrival(replace(request, id=f"g{index}"), 3 * index) for index, request in enumerate(requests)]
    scoring = [
        Arrival(scored(text, f"s{index}", len(text.request.prompt)), 3 * index + 1) for index, text in enumerate(texts)
    ]
    both = 0

    class Watched(HookedExecutor):
        def launch(self, plan: Any) -> Any:
            nonlocal both
            forced = plan.draws["forced"] >= 0
            both += plan.guesses and bool(forced.any())
            return super().launch(plan)

    guessing.__class__ = Watched
    counters = play(guessing, [*drawing, *scoring]).engine.scheduler.counters
    assert both > 0 and counters.accepted_tokens > 10, "no step held both"
    for text, one, other in zip(texts, drawing, scoring, strict=True):
        assert text.end is not None and one.end is not None and other.end is not None
        assert (one.end.tokens, one.end.logprobs) == (text.end.tokens, text.end.logprobs)
        assert other.end.prompt_logprobs == text.end.logprobs


def test_a_text_that_passes_the_switch_of_frequencies_is_scored_as_it_is_drawn(mesh: Mesh) -> None:
    """Such a text is computed anew where it grows past the switch, by frequencies that turn it otherwise."""
    if reason := library.why_not():
        pytest.skip(reason)
    factors = {"short_factors": (1.0, 1.1, 1.2, 1.3), "long_factors": (1.5, 2.0, 3.0, 4.0)}
    switch = RopeScaling("longrope", original_context=30, **factors)
    executor = made(mesh, config=replace(TINY, rope_scaling=switch), pages=40)
    texts = [Arrival(Request(f"t{n}", [5 + n, 9, 2], Sampling(0, logprobs=1), 50)) for n in range(3)]
    play(executor, texts)
    scoring = [Arrival(scored(text, f"s{index}", 3)) for index, text in enumerate(texts)]
    play(executor, scoring)
    for text, arrival in zip(texts, scoring, strict=True):
        assert text.end is not None and arrival.end is not None and arrival.end.progress.preemptions > 0
        assert arrival.end.prompt_logprobs == text.end.logprobs


# without a device


def simulation(rows: int = 8) -> Simulation:
    config = EngineConfig(
        max_sequences=rows,
        page_size=4,
        block_size=8,
        prefill_tokens=8,
        pages=80,
        draft_rows=0,
        steps_per_launch=1,
        context_length=40,
    )
    return Simulation(config.resolve(ModelConfig()))


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 7, length).tolist()


def test_a_step_scores_as_many_tokens_as_it_has_rows() -> None:
    """One a step would take as long as drawing them does: a block for the first token, then eight a step."""
    played = simulation()
    scored = played.submit(prompt(0, 36), 0, scored_from=3)
    steps = 0
    while played.live:
        played.step()
        steps += 1
    assert len(scored.prompt_logprobs) == 33
    assert steps == 1 + -(-32 // 8) + 1, "the last step is read after it was launched"


def test_streams_go_on_beside_scores_which_share_what_is_left() -> None:
    """Each stream gets a token every step, also in steps with blocks of prompts, and the scored ones the rest."""
    played = simulation()
    streams = [played.submit(prompt(1 + index, 2), 30) for index in range(3)]
    run_until(played, lambda: all(len(stream.completion) >= 2 for stream in streams))
    scored = [played.submit(prompt(8 + index, 38), 0, scored_from=1) for index in range(2)]
    run_until(played, lambda: all(one.prompt_logprobs for one in scored))
    played.submit(prompt(11, 32), 1)
    blocks = 0
    for _ in range(5):
        blocks += played.in_flight is not None and played.in_flight.plan.blocks
        before = [len(one.completion) for one in streams], [len(one.prompt_logprobs) for one in scored]
        played.step()
        assert [len(one.completion) for one in streams] == [count + 1 for count in before[0]]
        if not any(one.ending for one in scored):
            taken = sorted(len(one.prompt_logprobs) - count for one, count in zip(scored, before[1], strict=True))
            assert taken == [2, 3], "eight rows less three"
    assert blocks == 4, "no blocks of a prompt were beside them"
    played.drain()


def test_what_was_told_is_not_told_again_after_a_preemption() -> None:
    """A list with a score twice would be another text's. The part that was told is computed in blocks again."""
    played = simulation(rows=2)
    victim = played.submit(prompt(3, 38), 2, scored_from=2)
    run_until(played, lambda: 0 < len(victim.prompt_logprobs) < 30)
    told = len(victim.prompt_logprobs)
    urgent = [played.submit(prompt(20 + index, 4), 3, priority=1) for index in range(2)]
    run_until(played, lambda: victim.preemptions > 0)
    assert len(victim.prompt_logprobs) >= told
    played.drain()
    assert len(victim.prompt_logprobs) == 36 and victim.recomputed_tokens > 0 and len(urgent[0].completion) == 3


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"scored_from": 0}, "scored_from"),
        ({"scored_from": 3}, "scored_from"),
        ({"sampling": Sampling()}, "logprobs"),
        ({"resumed": [1], "max_tokens": 4}, "resume_token_ids"),
        ({"prompt": [1, 2, 96]}, "prompt"),
        ({"prompt": [1, 2, -1]}, "prompt"),
        ({"prompt": [1] * 65}, "prompt"),
        ({"prompt": [1] * 64, "max_tokens": 1}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"scored_from": None}, "max_tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_refused(fields: dict[str, Any], named: str, mesh: Mesh) -> None:
    """Before it costs anything, with the name of the field; an id that isn't the vocabulary's would be no token."""
    served = Served(TINY, ENGINE.resolve(TINY), VOCAB).with_kernels("reference", mesh)
    engine = Engine(Executor(served, random_params(TINY, mesh), mesh), lambda events: None)
    asked = Request("r", [1, 2, 3], Sampling(logprobs=0), 0, scored_from=2)
    engine.validate(asked)
    engine.validate(replace(asked, prompt=[1] * 64))
    with pytest.raises(InvalidRequest) as refused:
        engine.validate(replace(asked, **fields))
    assert refused.value.field == named
