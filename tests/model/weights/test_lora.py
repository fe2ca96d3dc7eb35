"""Adapters: what they compute, how they lie among parameters, and which settings are refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.errors import ConfigError
from isthmus.model.block import Block
from isthmus.model.config import LatentConfig, LoraConfig, MixtureConfig, ModelConfig
from isthmus.model.execution import DEFAULT_EXECUTION
from isthmus.model.layers import Linear
from isthmus.model.ops.rounding import narrowed
from isthmus.model.sharding import MeshShape, build_mesh, use_mesh
from isthmus.model.transformer import Params, abstract_params
from isthmus.model.weights.layout import is_stacked, stack_params, unstack_params
from isthmus.model.weights.lora import Merge, split
from isthmus.model.weights.random import init_params
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling
from tests.support import TINY, forward, merged, next_tokens, on_host, random_params, relative_error

EVERYTHING = r"attention/(query_down|query|latent|out)|mlp/(shared/)?(gate|up|down)"
"""What can be adapted in every network, with latent attention or without."""
LORA = LoraConfig(3, 5.0)
LATENT = dataclasses.replace(
    TINY,
    layers=3,
    kv_heads=1,
    head_dim=16,
    latent=LatentConfig(rank=8, query_rank=12, rope_dim=8, nope_dim=6, value_dim=10),
    mixture=MixtureConfig(experts=4, dim=8, shared_dim=16, dense_layers=(0,)),
    lora=dataclasses.replace(LORA, targets=EVERYTHING),
)
ENGINE = EngineConfig(max_sequences=2, page_size=8, block_size=16, prefill_tokens=16, draft_rows=0, steps_per_launch=1)
NETWORKS = {
    "dense": dataclasses.replace(TINY, lora=LORA),
    "with biases": dataclasses.replace(TINY, attention_bias=True, mlp_bias=True, qk_norm="head", lora=LORA),
    "attention alone": dataclasses.replace(TINY, lora=LoraConfig(2, 3.0, "attention/.*")),
    "latent attention, shared expert": LATENT,
}


def some_tokens(config: ModelConfig, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, config.vocab_size, (2, 20)).astype(np.int32)


def without(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, lora=LoraConfig())


def is_adapter(path: str) -> bool:
    return path.endswith(("/lora_a", "/lora_b"))


def assert_same(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, on_host(got), on_host(want))


# what they compute


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_adapter_is_a_change_of_the_kernel(name: str, tp: int) -> None:
    """A merged model that answers otherwise than the trained one would waste the training."""
    config, mesh = NETWORKS[name], build_mesh(MeshShape(tp=tp))
    params, tokens = random_params(config, mesh), some_tokens(config)
    with use_mesh(mesh):
        adapted = forward(config, params, tokens)
        added = forward(*merged(config, params), tokens)
        plain = forward(without(config), split(config, params)[0], tokens)
    assert relative_error(adapted, added) <= 5e-6
    assert relative_error(adapted, plain) > 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_scanned_adapters_are_the_unrolled_ones(name: str, mesh: Mesh) -> None:
    """What is trained under a scan is served unrolled, merged or not."""
    config = NETWORKS[name]
    params, tokens = random_params(config, mesh), some_tokens(config)
    want = forward(config, params, tokens)
    stack = stack_params(params)
    assert relative_error(forward(config, stack, tokens), want) <= 1e-6
    plain, added = merged(config, stack)
    assert plain == without(config)
    assert relative_error(unstack_params(added), merged(config, params)[1]) <= 1e-6


def test_an_adapter_is_born_beside_the_same_model(mesh: Mesh) -> None:
    """What else a model starts from must not depend on whether it has adapters; and b starts as zeros, a doesn't."""
    config = NETWORKS["dense"]
    base, adapters = split(config, init_params(config, 4, mesh))
    assert_same(base, init_params(without(config), 4, mesh))
    for path, leaf in adapters.items():
        assert bool(leaf.any()) == path.endswith("/lora_a")


def zero_b(params: Params) -> Params:
    """The same parameters with adapters that add nothing yet."""
    return {path: leaf * 0 if path.endswith("/lora_b") else leaf for path, leaf in params.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_new_adapter_changes_no_bit(name: str, dtype: Any, mesh: Mesh) -> None:
    """Training starts from the base model's own answers. Operation by operation: XLA may round two programs apart."""
    config = NETWORKS[name]
    params, tokens = zero_b(random_params(config, mesh)), some_tokens(config)
    base = split(config, params)[0]
    with jax.disable_jit():
        got = forward(config, params, tokens, dtype=dtype)
        want = forward(without(config), base, tokens, dtype=dtype)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_engine_serves_the_adapted_model(tp: int) -> None:
    """Served with its adapter, split over devices or not, a model gives the text that it was trained to."""
    config, mesh = NETWORKS["with biases"], build_mesh(MeshShape(tp=tp))
    params = random_params(config, mesh)
    rng = random.Random(0)
    prompts = [[rng.randrange(90) for _ in range(rng.randrange(1, 40))] for _ in range(6)]
    arrivals = [
        Arrival(Request(f"{i}", prompt, Sampling(temperature=0), 16), step=i) for i, prompt in enumerate(prompts)
    ]
    executor = Executor(Served(config, ENGINE.resolve(config), 90).with_kernels("auto", mesh), params, mesh)
    executor.warm_up()
    play(executor, arrivals)
    sequences, single = [arrival.tokens for arrival in arrivals], on_host(params)
    adapted = next_tokens(config, single, sequences, 90)
    plain = next_tokens(without(config), split(config, single)[0], sequences, 90)
    for arrival, row, other in zip(arrivals, adapted, plain, strict=True):
        part = slice(len(arrival.request.prompt) - 1, len(arrival.tokens) - 1)
        assert arrival.completion == row[part].tolist(), arrival.request.id
        assert arrival.completion != other[part].tolist(), "the adapter decides nothing"


def merged_inside(config: ModelConfig, params: Params) -> Params:
    """As `tests.support.merged`, by a plain sum within a program that somebody else compiles."""
    base, adapters = split(config, params)
    for path in [path for path in base if path.removesuffix("kernel") + "lora_a" in adapters]:
        a, b = (adapters[path.removesuffix("kernel") + factor] for factor in ("lora_a", "lora_b"))
        product = partial(jnp.tensordot, axes=1, precision="highest")
        added = config.lora.scale * (jax.vmap(product) if is_stacked(path) else product)(a, b)
        base[path] = narrowed(base[path].astype(jnp.float32) + added, base[path].dtype)
    return base


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
def test_merging_keeps_dtype_and_sharding(stacked: bool, mesh: Mesh) -> None:
    """A merged model that lands on one device, or in float32, may not fit where the model did."""
    config = NETWORKS["dense"]

    def narrow(params: Params) -> Params:
        return {path: leaf.astype("float32" if is_adapter(path) else "bfloat16") for path, leaf in params.items()}

    exact = random_params(config, build_mesh(MeshShape(fsdp=2, tp=2)), stacked=stacked)
    params, alone = narrow(exact), narrow(random_params(config, mesh, stacked=stacked))
    want = {path: (leaf.dtype, leaf.sharding) for path, leaf in split(config, params)[0].items()}
    inside = on_host(jax.jit(lambda params: merged_inside(config, params))(params))
    got = merged(config, params)[1]
    assert {path: (leaf.dtype, leaf.sharding) for path, leaf in got.items()} == want
    assert_same(got, inside)
    # How XLA adds up may depend on the layout; where it does, a number comes out a step of bfloat16 apart.
    assert relative_error(on_host(got), on_host(merged(config, alone)[1])) <= 0.004
    assert relative_error(got, merged(config, exact)[1]) <= 0.01


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
def test_merging_takes_no_memory_of_its_own(stacked: bool) -> None:
    """A model that fills the devices must fit with its adapter added, too: what is merged takes the kernel's place."""
    config, devices = NETWORKS["dense"], build_mesh(MeshShape(fsdp=2, tp=2))
    base, adapters = split(config, random_params(config, devices, stacked=stacked))
    merge = Merge(on_host(unstack_params(adapters)), config.lora.scale)
    for path, weight in base.items():
        kept = merge(path, weight)
        assert weight.is_deleted() == any(name.startswith(path.removesuffix("kernel") + "lora") for name in adapters)
        assert (kept is weight) != weight.is_deleted()


# among parameters


def test_split_and_join_are_inverses(mesh: Mesh) -> None:
    """Training holds the two apart; a leaf on the wrong side would be frozen, or trained and not stored."""
    for config, stacked in itertools.product(NETWORKS.values(), (False, True)):
        params = abstract_params(config, stacked=stacked)
        base, adapters = split(config, params)
        assert base == abstract_params(without(config), stacked=stacked)
        assert all(map(is_adapter, adapters)) and not any(map(is_adapter, base))
        assert {**base, **adapters} == params
        assert split(config, base) == (base, {})
    config = NETWORKS["attention alone"]
    _, adapters = split(config, abstract_params(config))
    assert {tuple(path.split("/")[::2])[:2] for path in adapters} == {("blocks", "attention")}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_projection_can_be_named(name: str) -> None:
    """A projection that is in the block and not on the list could never be adapted, and nobody would be told."""
    config = without(NETWORKS[name])
    for kind in set(config.layer_kinds):
        with nnx.use_eager_sharding(False):
            block = nnx.eval_shape(lambda kind=kind: Block(config, DEFAULT_EXECUTION, kind, nnx.Rngs(0)))
        found = {"/".join(path) for path, module in nnx.iter_modules(block) if isinstance(module, Linear)}
        read_past = {"attention/key", "attention/value"} if config.latent.rank else set()
        assert set(config.projections(kind)) == found - read_past - {"mlp/router/linear"}


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        (LoraConfig(-1), r"model\.lora\.rank.*-1"),
        (LoraConfig(1, 0.0), r"model\.lora\.alpha=0"),
        (LoraConfig(1, math.inf), r"model\.lora\.alpha=inf"),
        (LoraConfig(1, targets="attention/("), r"model\.lora\.targets.*regular expression"),
        (LoraConfig(1, targets="query"), r"model\.lora\.targets='query' matches none of attention/latent, .*mlp/gate"),
        (LoraConfig(1, targets="mlp/router/linear"), r"model\.lora\.targets.*matches none"),
        (LoraConfig(1, targets="attention/(query|key)"), r"model\.lora\.targets.*matches attention/key, which can't"),
        (LoraConfig(1.5), r"model\.lora\.rank=1\.5 must be a whole number"),  # type: ignore[arg-type]
        (LoraConfig(1, targets=3), r"model\.lora\.targets=3"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_are_named(lora: LoraConfig, match: str) -> None:
    """A typing error must not become an adapter that nobody asked for, or none."""
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(LATENT, lora=lora).validate()


def test_experts_alone_can_not_be_adapted() -> None:
    """Where every MLP is experts, mlp/gate is nothing that could be adapted."""
    mixture = MixtureConfig(experts=4, dim=8)
    config = dataclasses.replace(TINY, mixture=mixture, lora=LoraConfig(1, targets="mlp/(gate|up|down)"))
    with pytest.raises(ConfigError, match=r"model\.lora\.targets.*experts and their router can't be adapted"):
        config.validate()
    dense_first = dataclasses.replace(config, mixture=dataclasses.replace(mixture, dense_layers=(0,)))
    dense_first.validate()
    _, adapters = split(dense_first, abstract_params(dense_first))
    assert {path.split("/")[1] for path in adapters} == {"0"}


def test_settings_are_kept_in_json(tmp_path: Path) -> None:
    """config.json is how a run, and a server, learn them."""
    config = NETWORKS["attention alone"]
    config.save(tmp_path / "config.json")
    assert ModelConfig.load(tmp_path / "config.json") == config
