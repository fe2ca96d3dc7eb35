"""An engine whose cache is int8: what it takes, and that its text is the model's, on one device and split over two."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.programs import Served
from tests.serve.engine.harness import CONFIG, ENGINE, make
from tests.support import forward, random_params

INT8 = dataclasses.replace(ENGINE, cache_dtype="int8", draft_rows=0, steps_per_launch=1)


@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 96, 128, 256])
def test_the_bytes_that_are_planned_are_those_that_are_taken(head_dim: int, mesh: Mesh) -> None:
    """Pages are counted from the memory that is left: counted too small, a server dies when it starts."""
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    cache = Served(config, INT8, config.vocab_size).abstract_state(mesh).cache
    taken = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert taken == INT8.pages * INT8.page_size * INT8.kv_bytes_per_token(config, "float32")
    if head_dim % 64 == 0:  # 8.5 bits a number
        assert INT8.kv_bytes_per_token(config, "float32") == config.layers * config.cache_heads * head_dim * 17 // 16


@pytest.mark.parametrize("head_dim", [8, 24, 96])
@pytest.mark.parametrize(
    "kernels, tp",
    [("auto", 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in [("reference", 1), ("auto", 2)])],
)
def test_its_text_is_the_models(head_dim: int, kernels: str, tp: int) -> None:
    """Greedy, and each token among the likeliest of the network that has no cache at all."""
    config = dataclasses.replace(CONFIG, head_dim=head_dim, kv_heads=2)
    mesh = build_mesh(MeshShape(tp=tp))
    served = Served(config, INT8, config.vocab_size).with_kernels(kernels, mesh)
    executor = Executor(served, random_params(config, mesh), mesh)
    executor.warm_up()
    arrivals = [Arrival(make(f"{i}", size, 12)) for i, size in enumerate((1, 7, 19))]
    play(executor, arrivals)
    params = random_params(config, build_mesh(MeshShape()))
    for arrival in arrivals:
        logits = forward(config, params, np.asarray([arrival.tokens]))[0, len(arrival.request.prompt) - 1 : -1]
        lost = logits.max(axis=1) - logits[np.arange(len(arrival.completion)), arrival.completion]
        assert len(arrival.completion) == 12 and lost.max() < 0.05 * logits.std()
