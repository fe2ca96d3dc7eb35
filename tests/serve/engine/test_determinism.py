"""A request gives the same tokens, and the same bits of log-probabilities and embedding, whatever happens around it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.model.config import LatentConfig, LoraConfig, MixtureConfig, ModelConfig
from isthmus.model.execution import Execution
from isthmus.model.ops.cpu import library
from isthmus.model.transformer import Params
from isthmus.model.weights.quantization import SCHEMES, quantize_params
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import End, Ending, Request
from isthmus.serve.engine.pooling import Pooling
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling
from tests.support import TINY, as_kept, narrowest_dtype, random_params

ENGINE = EngineConfig(
    max_sequences=4, page_size=8, block_size=16, prefill_tokens=32, pages=19, max_waiting=64, draft_rows=4
)
"""Pages for two of the longest sequences, so that requests are preempted"""
REQUESTS, EMBEDDINGS = 16, 12
EXPERTS = MixtureConfig(experts=32, per_token=8, dim=24, shared_dim=16, router_bias=True)
NETWORKS: dict[str, dict[str, Any]] = {
    "dense": {},
    "windows": {"windows": (12, 0)},
    "experts": {"mixture": EXPERTS},
    "latent": {
        "kv_heads": 1,
        "head_dim": 32,
        "latent": LatentConfig(rank=24, query_rank=16, rope_dim=8, nope_dim=12, value_dim=20),
        "mixture": dataclasses.replace(EXPERTS, scores="sigmoid", groups=4, groups_per_token=2, group_score="top2"),
    },
    "adapters": {"lora": LoraConfig(rank=3)},
}
CASES: dict[tuple[str, Any, str, Any], None] = dict.fromkeys(
    [
        ("dense", "model", "none", "float32"),
        ("dense", "model", "none", narrowest_dtype()),
        ("dense", "int8", "int8", "float32"),
        ("windows", "int8", "none", narrowest_dtype()),
        ("experts", "model", "none", "float32"),
        ("experts", "int8", "int4", narrowest_dtype()),
        ("latent", "model", "none", narrowest_dtype()),
        ("latent", "int8", "int8", "float32"),
        ("adapters", "model", "none", narrowest_dtype()),
    ]
)
"""(network, cache's dtype, the scheme of integers that matrices become, dtype); `isthmus check determinism` has more"""


def requests(prefix: str, vocab: int) -> list[Request]:
    """Of every length and kind, alike for every prefix; some begin alike, so that the cache serves them."""
    rng = np.random.default_rng(3)
    shared = rng.integers(0, vocab, 48).tolist()
    made = []
    for index in range(REQUESTS):
        prompt = rng.integers(0, vocab, int(rng.integers(1, 40))).tolist()
        if index % 3 == 0:
            prompt = shared[: int(rng.integers(17, 48))] + prompt[:4]
        sampling = Sampling(
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1.0, 0.8])),
            seed=index,
            logprobs=int(rng.choice([-1, 0, 3])),
        )
        served: dict[str, Any] = {"tenant": str(index % 3), "priority": index % 4 // 2}
        made.append(Request(f"{prefix}{index}", prompt, sampling, int(rng.integers(1, 64 - len(prompt))), **served))
    for index in range(EMBEDDINGS):
        prompt = shared[: int(rng.integers(17, 48))] + rng.integers(0, vocab, int(rng.integers(1, 17))).tolist()
        pooling = [Pooling.MEAN, Pooling.LAST][index % 2]
        made.append(Request(f"{prefix}e{index}", prompt, Sampling(), 0, pooling=pooling, tenant=str(index % 3)))
    return made


def bits(end: End) -> bytes:
    """An embedding's; none without one."""
    return b"" if end.embedding is None else end.embedding.tobytes()


@pytest.mark.parametrize("network, cache_dtype, scheme, dtype", CASES)
def test_together_and_alone_are_the_same_bits(
    network: str, cache_dtype: Any, scheme: str, dtype: Any, mesh: Mesh
) -> None:
    """Bits that differ are a text that changes with the load: nobody can reproduce it, test it or train on it."""
    if reason := library.why_not():
        pytest.skip(reason)
    config = dataclasses.replace(TINY, **NETWORKS[network])
    executor = made(config, cache_dtype, scheme, dtype, mesh)
    together = requests("t", config.vocab_size)
    steps = np.random.default_rng(4).integers(0, 30, len(together))
    arrivals = [Arrival(request, int(step)) for request, step in zip(together, steps, strict=True)]
    cancelled = [Arrival(Request(f"c{n}", [n] * 20, Sampling(seed=n), 30), 3 * n, cancel_after=4) for n in range(5)]
    engine = play(executor, [*arrivals, *cancelled]).engine
    counters = engine.scheduler.counters
    assert counters.preemptions > 0 and counters.cached_prompt_tokens > 0, "nothing happened around them"
    for one, request in zip(arrivals, requests("a", config.vocab_size), strict=True):
        alone = Arrival(request)
        play(executor, [alone])
        assert one.end is not None and alone.end is not None
        assert one.end.tokens == alone.end.tokens, request.id
        assert one.end.logprobs == alone.end.logprobs, request.id
        assert len(one.end.logprobs) == (len(one.end.tokens) if request.sampling.logprobs >= 0 else 0)
        assert bits(one.end) == bits(alone.end), request.id
        assert (one.ending is Ending.EMBEDDED) == (request.pooling is not None) == (one.end.embedding is not None)
    pooled = [one.end.progress for one in arrivals if one.end is not None and one.request.pooling is not None]
    assert any(each.recomputed_tokens for each in pooled) and any(each.cached_tokens for each in pooled)


def made(config: ModelConfig, cache_dtype: Any, scheme: str, dtype: Any, mesh: Mesh) -> Executor:
    engine = dataclasses.replace(ENGINE, cache_dtype=cache_dtype).resolve(config)
    served = Served(config, engine, config.vocab_size, Execution(dtype)).with_kernels("auto", mesh)
    params: Params = as_kept(config, mesh, random_params(config, mesh), dtype)
    quantize_params(config, params, SCHEMES[scheme])
    executor = Executor(served, params, mesh)
    executor.warm_up()
    return executor
