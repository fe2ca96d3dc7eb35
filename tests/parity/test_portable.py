"""Portable: one program for CPU, GPU and TPU, and a cache that stays in place on each that can be compiled for here."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from isthmus.model.config import MixtureConfig, ModelConfig
from isthmus.model.execution import Execution
from isthmus.model.sharding import MESH_AXES, use_mesh
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.plan import empty_plan
from isthmus.serve.engine.programs import Served, draw_and_arguments, forward_and_arguments, lower_forward
from isthmus.serve.engine.sampling import MOST_LOGPROBS
from isthmus.serve.engine.state import State, empty_state
from isthmus.train.config import OptimizerConfig
from isthmus.train.data import Batch
from isthmus.train.optimizer import build_optimizer
from isthmus.train.step import Metrics, Trainer
from tests.support import TINY, random_params

PLATFORMS = ["cpu", "cuda", "tpu"]
ENGINE = EngineConfig(max_sequences=4, page_size=8, block_size=16, prefill_tokens=32).resolve(TINY)
SERVED = Served(TINY, ENGINE, 90)


def abstract_batch(accumulate: int, sequences: int, seq: int) -> Batch:
    ints = jax.ShapeDtypeStruct((accumulate, sequences, seq), jnp.int32)
    return Batch(ints, ints, ints, ints, jax.ShapeDtypeStruct(ints.shape, jnp.float32))


def export_flat(step: Callable[..., Any], args: Any, mesh: Mesh) -> export.Exported:
    """Exports over a flat list of arrays, which any runtime can call, for every platform at once."""
    leaves, tree = jax.tree.flatten(args)

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(step(*jax.tree.unflatten(tree, leaves)))

    with use_mesh(mesh):
        exported = export.export(jax.jit(flat), platforms=PLATFORMS)(*leaves)
    return export.deserialize(exported.serialize())


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_step_is_one_program_for_every_platform(scan_layers: bool, accumulate: int, mesh: Mesh) -> None:
    """Code that only lowers on the machine it was written on can't be trained anywhere else."""
    execution = Execution("bfloat16", scan_layers, remat="dots")
    trainer = Trainer(TINY, build_optimizer(OptimizerConfig(), 10, TINY), mesh, execution)
    args = (trainer.abstract, abstract_batch(accumulate, 2, 16))
    exported = export_flat(trainer._step, args, mesh)
    assert set(exported.platforms) == set(PLATFORMS)
    assert len(exported.out_avals) == len(jax.tree.leaves(args[0])) + len(Metrics._fields)


@pytest.mark.parametrize("bucket", [ENGINE.buckets[0], ENGINE.buckets[-1]], ids=["decode", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_step_is_the_same_for_every_platform(bucket: Bucket, dtype: Any, mesh: Mesh) -> None:
    """The same for serving."""
    served = dataclasses.replace(SERVED, execution=Execution(dtype))
    step, args = forward_and_arguments(served, bucket, mesh)
    exported = export_flat(step, args, mesh)
    assert set(exported.platforms) == set(PLATFORMS)
    state = served.abstract_state(mesh)
    assert tuple(exported.out_avals[0].shape) == state.cache.pages.shape
    logits, hidden = exported.out_avals[-2:]
    assert (tuple(logits.shape), logits.dtype) == ((bucket.samples, TINY.vocab_size), jnp.float32)
    assert (tuple(hidden.shape), hidden.dtype) == ((bucket.tokens, TINY.dim), jnp.dtype(dtype))
    for adjusted in (False, True):
        step, args = draw_and_arguments(served, bucket.samples, mesh, adjusted=adjusted)
        exported = export_flat(step, args, mesh)
        assert set(exported.platforms) == set(PLATFORMS)
        rows, told = (bucket.samples,), (bucket.samples, MOST_LOGPROBS)
        assert [tuple(out.shape) for out in exported.out_avals] == [state.tokens.shape, rows, rows, told, told]


def test_an_exported_step_computes_what_the_engine_computes(mesh: Mesh) -> None:
    """The artifact must be the program, not only lower without an error."""
    bucket = ENGINE.buckets[-1]
    step, args = forward_and_arguments(SERVED, bucket, mesh)
    exported = export_flat(step, args, mesh)
    packed, arrays = empty_plan(ENGINE, bucket)
    arrays.positions[bucket.rows : bucket.rows + 13] = np.arange(13)
    arrays.tokens[bucket.rows : bucket.rows + 13] = np.arange(13)
    arrays.slots[bucket.rows] = 1
    arrays.sample_token[bucket.rows] = bucket.rows + 12

    def state() -> State:
        empty = empty_state(SERVED.abstract_state(mesh), "reference")
        return empty._replace(tables=empty.tables.at[1, :2].set(jnp.asarray((3, 5))))

    params = random_params(TINY, mesh)
    with use_mesh(mesh):
        want = step(params, state(), packed)
        got = exported.call(*jax.tree.leaves((params, state(), packed)))
    for one, other in zip(got, jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(want[0].cache.pages)).max() > 0
    logits = np.asarray(want[1])
    assert logits[bucket.rows].any() and not np.delete(logits, bucket.rows, 0).any(), "nothing is drawn from the others"


# the cache stays in place


def cache_bytes(served: Served) -> int:
    engine = served.engine
    return engine.pages * engine.page_size * engine.kv_bytes_per_token(served.model, served.execution.dtype)


def served_from_pages(dtype: Any, cache_mb: int, *, scan_layers: bool = False, cache_dtype: Any = "model") -> Served:
    """A small network over a cache of about `cache_mb` MB: any copy of it, or of one layer of it, stands out."""
    config = ModelConfig(
        vocab_size=256,
        dim=256,
        layers=4,
        heads=8,
        kv_heads=4,
        head_dim=128,
        mlp_dim=256,
        context_length=512,
    )
    engine = EngineConfig(max_sequences=4, page_size=16, block_size=32, prefill_tokens=64, cache_dtype=cache_dtype)
    engine = dataclasses.replace(engine, pages=(cache_mb << 20) // (engine.kv_bytes_per_token(config, dtype) * 16))
    return Served(config, engine.resolve(config), config.vocab_size, Execution(dtype, scan_layers))


def memory(served: Served, which: int, mesh: Mesh) -> Any:
    return lower_forward(served, served.engine.buckets[which], mesh).compile().memory_analysis()


@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("which", [0, -1], ids=["decode", "mixed"])
def test_the_cache_stays_in_place_on_a_cpu(which: int, scan_layers: bool, cache_dtype: Any, mesh: Mesh) -> None:
    """A step that copies the cache takes longer the more memory one gives it."""
    used = []
    for size in (64, 256):
        served = served_from_pages("float32", size, scan_layers=scan_layers, cache_dtype=cache_dtype)
        analysis = memory(served, which, mesh)
        assert analysis.alias_size_in_bytes >= cache_bytes(served)
        assert analysis.temp_size_in_bytes < cache_bytes(served) / served.model.layers
        used.append(analysis.temp_size_in_bytes)
    assert used[1] <= used[0] * 1.01, "memory beside the cache grows with it: something copies it"


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU needs libtpu: pip install 'isthmus[tpu-aot]'",
)


def tpu_mesh(tp: int, ep: int = 1) -> Mesh:
    if tp * ep == 1:
        topology = topologies.get_topology_desc("v5e:1x1", "tpu", chips_per_host_bounds=(1, 1, 1))
    else:
        topology = topologies.get_topology_desc("v5e:2x2", "tpu")
    return mesh_of(topology.devices[: tp * ep], (1, 1, ep, tp))


def mesh_of(devices: Any, shape: tuple[int, ...]) -> Mesh:
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@needs_libtpu
@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("which", [0, -1], ids=["decode", "mixed"])
def test_the_cache_stays_in_place_on_a_tpu(which: int, scan_layers: bool, tp: int) -> None:
    """The same, compiled for a TPU v5e that needn't be there. Not of int8: from some number of pages on, XLA takes
    temporaries of half such a cache, whether a vector has one scale or several."""
    served = served_from_pages("bfloat16", 256, scan_layers=scan_layers)
    analysis = memory(served, which, tpu_mesh(tp))
    share = cache_bytes(served) // tp
    assert analysis.alias_size_in_bytes >= share
    assert analysis.temp_size_in_bytes < share / served.model.layers


@needs_libtpu
def test_experts_are_served_from_several_chips() -> None:
    """Experts split over chips, windows and sinks: one program for a TPU, its cache in place."""
    served = served_from_pages("bfloat16", 256)
    mixture = MixtureConfig(experts=8, per_token=2, dim=256, shared_dim=256)
    config = dataclasses.replace(served.model, mixture=mixture, windows=(64, 0), attention_sinks=True)
    analysis = memory(dataclasses.replace(served, model=config), 0, tpu_mesh(1, ep=4))
    share = cache_bytes(served)
    assert analysis.alias_size_in_bytes >= share
    assert analysis.temp_size_in_bytes < share / config.layers


@needs_libtpu
@pytest.mark.parametrize("devices", [1, 4])
def test_a_training_step_compiles_for_a_tpu(devices: int) -> None:
    """And so does training, sharded over the chips, its state updated in place."""
    config = dataclasses.replace(TINY, dim=256, mlp_dim=256, vocab_size=256)
    mesh = mesh_of(tpu_mesh(devices).devices, (1, devices, 1, 1))
    execution = Execution("bfloat16", scan_layers=True, remat="full")
    trainer = Trainer(config, build_optimizer(OptimizerConfig(), 10, config), mesh, execution)
    state = trainer.abstract
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=trainer._batch_sharding),
        abstract_batch(2, 4, 64),
    )
    analysis = trainer.lower(state, batch).compile().memory_analysis()
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    assert analysis.alias_size_in_bytes >= held
