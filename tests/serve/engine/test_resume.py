"""A text that broke off goes on as it would have, on any engine of the same model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.chain import Chain
from isthmus.checks.crowd import Arrival, play
from isthmus.model.ops.cpu import library
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling
from tests.serve.engine.harness import FOUR
from tests.support import TINY, as_kept, random_params

ENGINE = replace(FOUR, pages=30)
VOCAB = TINY.vocab_size


def requests() -> list[Request]:
    """With each option for which it matters how far the text has come."""
    options = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.3},
        {"temperature": 0.0, "min_tokens": 15, "bad": frozenset({3})},
    ]
    made = []
    for index in range(8):
        prompt = np.random.default_rng(index).integers(0, VOCAB, 2 + 3 * index).tolist()
        sampling = Sampling(seed=index, logprobs=2, **options[index % 4])  # type: ignore[arg-type]
        chain = Chain(VOCAB, VOCAB) if index > 5 else None
        made.append(Request(f"r{index}", prompt, sampling, 24, stop_ids=frozenset({7, 8}), constraint=chain))
    return made


def test_what_is_resumed_goes_on_where_it_was(mesh: Mesh) -> None:
    """To the bit of each log-probability, wherever it broke off, from a cold cache and from a warm one."""
    if reason := library.why_not():
        pytest.skip(reason)
    served = Served(TINY, ENGINE.resolve(TINY), VOCAB).with_kernels("auto", mesh)
    executor = Executor(served, as_kept(TINY, mesh, random_params(TINY, mesh), "float32"), mesh)
    executor.warm_up()
    whole = [Arrival(request) for request in requests()]
    play(executor, whole)
    cuts = [(arrival, cut) for arrival in whole for cut in {1, 9, len(arrival.completion) - 1} if cut > 0]
    cuts = [(arrival, cut) for arrival, cut in cuts if cut < len(arrival.completion)]
    assert len(cuts) > 12
    resumed = [
        Arrival(replace(arrival.request, id=f"{arrival.request.id} from {cut}", resumed=arrival.completion[:cut]))
        for arrival, cut in cuts
    ]
    play(executor, resumed)
    for (arrival, cut), rest in zip(cuts, resumed, strict=True):
        assert arrival.end is not None and rest.end is not None
        assert rest.end.tokens == arrival.end.tokens[cut:], rest.request.id
        assert rest.end.logprobs == arrival.end.logprobs[cut:], rest.request.id
        assert rest.end.reason is arrival.end.reason
