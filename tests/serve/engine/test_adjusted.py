"""Penalties, bias and masks through a whole engine: what is drawn is the likeliest of what the definitions leave of the
training's forward pass, at every position, also after a preemption."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Ending, Request
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import MOST_BIASED, Sampling
from tests.serve.engine.harness import FOUR
from tests.support import TINY, as_kept, forward, random_params

ENGINE = dataclasses.replace(FOUR, pages=15)
"""Pages for two of the longest sequences, so that requests are preempted"""
EOS = 5


def asked(index: int, rng: np.random.Generator) -> dict[str, Any]:
    """Each option alone, then all together, then none."""
    vocab = TINY.vocab_size
    bias = tuple((int(token), float(rng.uniform(-3, 3))) for token in rng.choice(vocab, 12, replace=False))
    each: list[dict[str, Any]] = [
        {"repetition_penalty": 1.6},
        {"frequency_penalty": 0.8},
        {"presence_penalty": 1.5},
        {"bias": bias},
        {"allowed": frozenset(range(10, 50))},
        {"bad": frozenset(range(0, vocab, 2))},
        {"min_tokens": 7},
        {"repetition_penalty": 0.7, "frequency_penalty": -0.5, "presence_penalty": -1, "bias": bias, "min_tokens": 4},
        {},
    ]
    return each[index % len(each)]


def expected(request: Request, drawn: list[int], logits: np.ndarray) -> np.ndarray:
    """float64[ids]: what the token after `drawn` is drawn from, one id at a time. logits: the model's own there."""
    by, out = request.sampling, logits.astype(np.float64)
    for token, value in by.bias:
        out[token] += value
    for token in {*request.prompt, *drawn}:
        out[token] = out[token] / by.repetition_penalty if out[token] > 0 else out[token] * by.repetition_penalty
    for token in set(drawn):
        out[token] -= by.frequency_penalty * drawn.count(token) + by.presence_penalty
    banned = set(by.bad) | (set(range(len(out))) - by.allowed if by.allowed is not None else set())
    if len(drawn) < by.min_tokens:
        banned |= request.eos_ids | request.stop_ids
    out[list(banned)] = -np.inf
    return out


@pytest.mark.parametrize("kernels", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
def test_adjusted_text_is_what_the_definitions_leave(kernels: str, mesh: Mesh) -> None:
    """Who asks for a penalty would otherwise get a text of another, and who forbids a token would get it."""
    params = random_params(TINY, mesh)
    served = Served(TINY, ENGINE.resolve(TINY), TINY.vocab_size).with_kernels(kernels, mesh)
    executor = Executor(served, as_kept(TINY, mesh, params, "float32"), mesh)
    executor.warm_up()
    rng = np.random.default_rng(0)
    arrivals = []
    for index in range(18):
        prompt = rng.integers(0, TINY.vocab_size, int(rng.integers(1, 30))).tolist()
        sampling = Sampling(temperature=0, **asked(index, rng))
        ends = frozenset({EOS, EOS + 1, EOS + 2})
        request = Request(f"r{index}", prompt, sampling, int(rng.integers(8, 64 - len(prompt))), eos_ids=ends)
        arrivals.append(Arrival(request, step=int(rng.integers(0, 20))))
    engine = play(executor, arrivals).engine
    assert engine.scheduler.counters.preemptions > 0, "nothing was taken up again"
    assert executor.recompilations == 0
    changed = 0
    tokens = np.zeros((len(arrivals), TINY.context_length), np.int32)
    for row, arrival in zip(tokens, arrivals, strict=True):
        row[: len(arrival.tokens)] = arrival.tokens
    for arrival, logits in zip(arrivals, forward(TINY, params, tokens), strict=True):
        request, text = arrival.request, arrival.completion
        for at, token in enumerate(text):
            own = logits[len(request.prompt) + at - 1]
            want = expected(request, text[:at], own)
            assert want[token] >= want.max() - 1e-4, f"{request.id} at {at}"
            changed += own.argmax() != token
        assert arrival.ending in (Ending.EOS, Ending.LENGTH, Ending.CONTEXT_LENGTH)
        assert len(text) >= request.sampling.min_tokens
    assert changed > 100, "the options decide nothing"


def test_the_largest_bias_fits(mesh: Mesh) -> None:
    """A list of the length that is allowed must have its place, to its last entry."""
    config = dataclasses.replace(TINY, vocab_size=MOST_BIASED + 7)
    engine = dataclasses.replace(ENGINE, max_sequences=1, prefill_tokens=16, draft_rows=0, steps_per_launch=1).resolve(
        config
    )
    served = Served(config, engine, config.vocab_size).with_kernels("auto", mesh)
    executor = Executor(served, as_kept(config, mesh, random_params(config, mesh), "float32"), mesh)
    executor.warm_up()
    bias = (*((token, -100.0) for token in range(MOST_BIASED - 1)), (MOST_BIASED + 6, 100.0))
    arrival = Arrival(Request("r", [1, 2, 3], Sampling(temperature=0, bias=bias), 5))
    play(executor, [arrival])
    assert arrival.completion == [MOST_BIASED + 6] * 5
