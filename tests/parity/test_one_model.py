"""One model: what is served is what was trained, to the token.

The engine cuts prompts into blocks, pages its cache, shares prefixes, preempts and runs a step ahead of itself. None of
that may show: its tokens are those of the training forward pass, one sequence at a time.
"""

from __future__ import annotations

import dataclasses
import random
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.model.config import ModelConfig
from isthmus.model.sharding import MeshShape, build_mesh, use_mesh
from isthmus.model.transformer import Params
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Ending, Request
from isthmus.serve.engine.programs import Served, forward_step
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.engine.scheduler import Scheduler
from isthmus.serve.engine.sequence import Sequence
from tests.serve.engine.harness import only_tokens, stale_state, with_tables
from tests.support import forward, next_tokens, packed_params, random_params

VOCAB = 90
"""Of 96: the last ids are padding of the embedding."""
CONFIG = ModelConfig(
    vocab_size=96,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context_length=96,
    tie_embeddings=False,
    attention_bias=True,
    qk_norm="head",
)
ENGINE = EngineConfig(
    max_sequences=8, page_size=8, block_size=16, prefill_tokens=32, pages=40, steps_per_launch=1
).resolve(CONFIG)
GREEDY = Sampling(temperature=0)


def start_executor(config: ModelConfig, engine: EngineConfig, mesh: Mesh) -> Executor:
    executor = Executor(Served(config, engine, VOCAB).with_kernels("auto", mesh), random_params(config, mesh), mesh)
    executor.warm_up()
    return executor


@pytest.fixture(scope="module")
def params(mesh: Mesh) -> Params:
    return random_params(CONFIG, mesh)


@pytest.fixture(scope="module")
def executor(mesh: Mesh) -> Executor:
    return start_executor(CONFIG, ENGINE, mesh)


def random_arrivals(count: int, sampling: Any = lambda index: GREEDY, seed: int = 0) -> list[Arrival]:
    """Prompts of random lengths at random steps; one in three begins as another one did."""
    rng = random.Random(seed)
    common = [rng.randrange(VOCAB) for _ in range(80)]
    arrivals = []
    for index in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 60))]
        if rng.random() < 0.3:
            prompt = common[: rng.randrange(16, 60)] + prompt[:10]
        limit = rng.randrange(1, CONFIG.context_length - len(prompt) + 1)
        request = Request(f"r{index}", prompt, sampling(index), max_tokens=limit)
        arrivals.append(Arrival(request, step=rng.randrange(200)))
    return arrivals


def training_texts(params: Params, arrivals: list[Arrival]) -> list[list[int]]:
    """What the training's forward pass finds likeliest after each token before those that were drawn."""
    likeliest = next_tokens(CONFIG, params, [arrival.tokens for arrival in arrivals], VOCAB)
    prompts = [len(arrival.request.prompt) for arrival in arrivals]
    ends = [len(arrival.tokens) - 1 for arrival in arrivals]
    return [row[size - 1 : end].tolist() for row, size, end in zip(likeliest, prompts, ends, strict=True)]


def test_served_tokens_are_the_training_forwards(executor: Executor, params: Params) -> None:
    """A model that is evaluated in training and served otherwise is another model."""
    arrivals = random_arrivals(64)
    engine = play(executor, arrivals).engine
    for arrival, want in zip(arrivals, training_texts(params, arrivals), strict=True):
        assert len(arrival.completion) == arrival.request.max_tokens
        assert arrival.completion == want, arrival.request.id
    counters = engine.scheduler.counters
    assert counters.preemptions > 0, "pages were never short, so preemption isn't tested"
    assert counters.cached_prompt_tokens > 0, "no prefix was shared, so sharing isn't tested"
    assert counters.completion_tokens == sum(arrival.request.max_tokens for arrival in arrivals)
    distinct = [len(set(a.completion)) / len(a.completion) for a in arrivals if len(a.completion) >= 20]
    assert np.mean(distinct) > 0.3, "the model only repeats itself, so any engine would look right"


def test_stopping_is_the_training_forwards_too(executor: Executor, params: Params) -> None:
    """The text must end exactly where the model ends it."""
    eos, stop = 3, frozenset(range(60, 66))
    arrivals = random_arrivals(24, seed=2)
    for index, arrival in enumerate(arrivals):
        room = 96 - len(arrival.request.prompt)
        arrival.request = dataclasses.replace(arrival.request, max_tokens=room, eos_ids=frozenset({eos}), stop_ids=stop)
        arrival.step = index
    play(executor, arrivals)
    for arrival, want in zip(arrivals, training_texts(params, arrivals), strict=True):
        assert arrival.completion == want
        assert not {eos, *stop} & set(want[:-1]), "it went on after its end"
        if want[-1] == eos:
            assert arrival.ending is Ending.EOS
        elif want[-1] in stop:
            assert arrival.ending is Ending.STOP_TOKEN
        else:
            assert arrival.ending is Ending.CONTEXT_LENGTH
    assert len({arrival.ending for arrival in arrivals}) == 3, "not every way to end came up"


def test_a_seeded_text_is_the_same_alone_and_in_a_crowd(executor: Executor) -> None:
    """A seed is a promise: the same text, whoever else is being served, preempted or not, cached or not."""

    def sampling(index: int) -> Sampling:
        filters = [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}][index % 4]
        return Sampling(temperature=1.0, seed=index * 0x9E3779B97F4A7C15 % 2**64, **filters)

    crowd = random_arrivals(40, sampling, seed=1)
    engine = play(executor, crowd).engine
    assert engine.scheduler.counters.preemptions > 0
    for arrival in crowd[::4]:
        request = arrival.request
        alone = Arrival(Request("alone", request.prompt, request.sampling, request.max_tokens))
        play(executor, [alone])
        assert alone.completion == arrival.completion, request.id
    texts = {tuple(arrival.completion[:8]) for arrival in crowd if arrival.request.max_tokens >= 8}
    assert len(texts) == sum(arrival.request.max_tokens >= 8 for arrival in crowd), "two seeds gave one text"


@pytest.mark.slow
def test_tensor_parallel_serves_the_same_tokens(params: Params) -> None:
    """Splitting the heads and the cache over devices is for size and speed only."""
    engine = dataclasses.replace(ENGINE, max_sequences=4, prefill_tokens=16, pages=25, draft_rows=4)
    split = start_executor(CONFIG, engine, build_mesh(MeshShape(tp=2)))
    arrivals = random_arrivals(16)
    counters = play(split, arrivals).engine.scheduler.counters
    assert counters.preemptions > 0
    for arrival, want in zip(arrivals, training_texts(params, arrivals), strict=True):
        assert arrival.completion == want, arrival.request.id


@pytest.mark.parametrize("kernels", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def test_the_engines_logits_are_the_training_forwards(kernels: str, params: Params, mesh: Mesh) -> None:
    """Equal tokens could hide a drift that shows on a larger model; the numbers behind them must agree too."""
    engine = dataclasses.replace(ENGINE, max_sequences=4, prefill_tokens=32, pages=14, draft_rows=0, steps_per_launch=1)
    programs: dict[Bucket, Any] = {}
    kept = packed_params(CONFIG, params) if kernels == "cpu" else params
    served = Served(CONFIG, engine, VOCAB).with_kernels(kernels, mesh)

    def program(bucket: Bucket) -> Any:
        return jax.jit(partial(forward_step, served, bucket), donate_argnums=1)

    scheduler = Scheduler(engine)
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCAB) for _ in range(size)] for size in (1, 15, 16, 17, 40, 60)]
    sequences = [scheduler.add(Request(f"{i}", prompt, GREEDY, 20 + 3 * i)) for i, prompt in enumerate(prompts)]
    state = stale_state(served, mesh)
    seen: list[tuple[Sequence, int, np.ndarray]] = []
    while (plan := scheduler.plan()) is not None:
        run = programs.setdefault(plan.bucket, program(plan.bucket))
        with use_mesh(mesh):
            state, logits, _ = run(kept, with_tables(state, plan), plan.packed)
        rows = np.asarray(logits)
        seen += [(sequence, len(sequence.tokens) - 1, rows[row]) for row, sequence in plan.samples]
        scheduler.commit(plan, only_tokens(rows[:, :VOCAB].argmax(axis=1)))
        scheduler.check()
    assert scheduler.idle and scheduler.counters.preemptions > 0
    tokens = np.zeros((len(sequences), CONFIG.context_length), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence.tokens)] = sequence.tokens
    want = dict(zip(sequences, forward(CONFIG, params, tokens), strict=True))
    assert len(seen) >= sum(sequence.request.max_tokens for sequence in sequences)
    assert max(np.abs(logits - want[sequence][position]).max() for sequence, position, logits in seen) <= 1e-4
