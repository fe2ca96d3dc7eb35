"""The mixture of experts against a plain loop over tokens, and over devices against one device."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isthmus.errors import ConfigError
from isthmus.model.config import MixtureConfig
from isthmus.model.execution import DEFAULT_EXECUTION, Execution
from isthmus.model.experts import Mixture, balanced
from isthmus.model.ops.grouped_matmul import grouped_matmul
from isthmus.model.ops.kernels import REFERENCES, choose
from isthmus.model.ops.operation import Setting
from isthmus.model.sharding import MeshShape, build_mesh, check_divisible, partition_spec, use_mesh
from isthmus.model.transformer import Params, abstract_params, bind, by_path
from isthmus.model.weights.layout import stack_params, unstack_params
from isthmus.train.config import OptimizerConfig
from isthmus.train.data import Batch
from isthmus.train.step import Gradients, balance_experts, gradients, packed_attention
from tests.parity.test_families import batch_of
from tests.support import TINY, on_host, packed_params, random_params, relative_error

MIXTURE = MixtureConfig(
    experts=8, per_token=3, dim=16, shared_dim=16, dense_layers=(0,), router_bias=True, correction=True, scale=1.5
)
SPARSE = dataclasses.replace(TINY, layers=2, mlp_bias=True, mixture=MIXTURE)


def reference_product(x: np.ndarray, weights: np.ndarray, sizes: list[int]) -> np.ndarray:
    out = np.zeros((len(x), weights.shape[2]))
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            out[row] = x[row].astype(np.float64) @ weights[group].astype(np.float64)
            row += 1
    return out


@jax.jit
def product_and_pull(x: jax.Array, weights: jax.Array, sizes: jax.Array, cotangent: jax.Array) -> tuple:
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, weights)
    return out, *pull(cotangent)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 120), min_size=5, max_size=5))
def test_grouped_products_are_a_loop_over_rows(cuts: list[int]) -> None:
    """Empty groups, groups that end inside a block and rows of nobody: a wrong edge gives a token another's expert."""
    rng = np.random.default_rng(0)
    ends = sorted(cuts)
    sizes = np.diff([0, *ends]).tolist()
    x, cotangent = rng.standard_normal((120, 5)).astype(np.float32), rng.standard_normal((120, 7)).astype(np.float32)
    weights = rng.standard_normal((5, 5, 7)).astype(np.float32)
    out, dx, dweights = product_and_pull(x, weights, np.asarray(sizes, np.int32), cotangent)
    np.testing.assert_allclose(out, reference_product(x, weights, sizes), atol=1e-5)
    np.testing.assert_allclose(dx, reference_product(cotangent, weights.swapaxes(1, 2), sizes), atol=1e-5)
    for group, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        mine = slice(end - size, end)
        np.testing.assert_allclose(dweights[group], x[mine].T @ cotangent[mine], atol=1e-4)


def test_a_row_of_a_product_depends_on_that_row_alone() -> None:
    """Who else is in the batch must not reach a token through its expert, not even in its last bit."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((96, 40)).astype(np.float32)
    weights = rng.standard_normal((4, 40, 24)).astype(np.float32)
    product = jax.jit(grouped_matmul)
    whole = np.asarray(product(x, weights, jnp.array([30, 0, 50, 16], jnp.int32)))
    moved = np.concatenate([x[30:35], x[0:30], x[35:]])  # the second group's rows come first, as another group's
    other = np.asarray(product(moved, weights, jnp.array([0, 0, 96, 0], jnp.int32)))
    np.testing.assert_array_equal(other[:5], whole[30:35])
    np.testing.assert_array_equal(other[35:80], whole[35:80])


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_token_gets_the_same_bits_in_any_batch(scores: Any, mesh: Mesh) -> None:
    """By the CPU's kernels: else a text of a mixture changes with the load, as XLA orders the sums of a router's
    product and softmax by how many tokens there are."""
    mixture = MixtureConfig(experts=32, per_token=8, dim=64, scores=scores)
    config = dataclasses.replace(TINY, dim=256, mixture=mixture)
    params = packed_params(config, random_params(config, mesh))
    execution = Execution(kernels=choose("cpu", Setting(config, "float32", "cpu")))
    run = jax.jit(lambda params, x: bind(config, execution, params).blocks[0].mlp(x)[0])
    x = np.random.default_rng(2).standard_normal((512, 256)).astype(np.float32)
    whole = np.asarray(run(params, x))
    for rows in (1, 7, 64, 200):
        np.testing.assert_array_equal(run(params, x[:rows]), whole[:rows])


def forward(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    model = bind(SPARSE, DEFAULT_EXECUTION, params)
    hidden, _, load = model.run(batch.tokens, batch.positions, packed_attention(batch.segments), None)
    return model.logits(hidden), load


def placed(params: Params, mesh: Mesh, *, stacked: bool = False) -> Params:
    """Parameters of SPARSE, split over the devices of `mesh`."""
    abstract = abstract_params(SPARSE, mesh, stacked=stacked)
    return jax.device_put(on_host(params), {path: abstract[path].sharding for path in params})


def random_batch(rows: int, seq: int = 24) -> Batch:
    tokens = np.random.default_rng(3).integers(0, TINY.vocab_size, (rows, seq))
    return batch_of(tokens, [seq] * rows)


def eight() -> Batch:
    """Eight sequences, as the one part of a step."""
    return jax.tree.map(lambda x: np.asarray(x)[None], random_batch(8))


def test_a_mixture_is_each_tokens_own_experts(mesh: Mesh) -> None:
    """Sorting, grouping and putting back must give what a loop over tokens and their experts gives."""
    prefix = "blocks/1/mlp/"
    whole = on_host(random_params(SPARSE, mesh))
    params = {path.removeprefix(prefix): array for path, array in whole.items() if path.startswith(prefix)}
    with nnx.use_eager_sharding(False):
        module = Mixture(SPARSE, REFERENCES, nnx.Rngs(0))
    graph, state = nnx.split(module)
    for path, leaf in by_path(state).items():
        leaf.set_value(jnp.asarray(params[path]))
    module = nnx.merge(graph, state)
    x = np.random.default_rng(4).standard_normal((37, SPARSE.dim)).astype(np.float32)
    got, load = jax.jit(lambda x: module(x))(jnp.asarray(x))

    def mlp(row: np.ndarray, expert: int | None) -> np.ndarray:
        def pick(path: str) -> np.ndarray:
            return params[f"shared/{path}"] if expert is None else params[path][expert]

        gate, up = (row @ pick(f"{name}/kernel") + pick(f"{name}/bias") for name in ("gate", "up"))
        return gate / (1 + np.exp(-gate)) * up @ pick("down/kernel") + pick("down/bias")

    want, count = np.zeros_like(x), np.zeros(MIXTURE.experts)
    for token, row in enumerate(x):
        logits = row @ params["router/linear/kernel"] + params["router/linear/bias"]
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        chosen = np.argsort(-(scores + params["router/correction"]))[: MIXTURE.per_token]
        for expert in chosen:
            want[token] += MIXTURE.scale * scores[expert] / scores[chosen].sum() * mlp(row, expert)
            count[expert] += 1
        want[token] += mlp(row, None)
    assert relative_error(got, want) < 1e-5
    np.testing.assert_array_equal(load, count)


@pytest.fixture(scope="module")
def small(mesh: Mesh) -> Params:
    return jax.tree.map(lambda x: x if x.ndim == 1 else 0.5 * x, random_params(SPARSE, mesh))


@pytest.fixture(scope="module")
def of_one_device(small: Params) -> Gradients:
    """Those of `small` on `eight`, on one device."""
    return jax.jit(partial(gradients, SPARSE, DEFAULT_EXECUTION))(small, eight())


@pytest.mark.parametrize(
    ("shape", "scan_layers"),
    [
        (MeshShape(ep=4, tp=2), False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(MeshShape(dp=2, fsdp=2, ep=2), False), (MeshShape(ep=8), True)]
        ),
    ],
    ids=str,
)
def test_experts_over_devices_are_one_devices(
    shape: MeshShape, scan_layers: bool, small: Params, of_one_device: Gradients
) -> None:
    """Expert parallelism is for size and speed only: same loss, gradients, loads and logits."""
    want = of_one_device
    devices = build_mesh(shape)
    params = placed(stack_params(small) if scan_layers else small, devices, stacked=scan_layers)
    split = NamedSharding(devices, PartitionSpec(None, *partition_spec(("batch", "seq"))))
    step = jax.jit(partial(gradients, SPARSE, Execution(scan_layers=scan_layers)))
    with use_mesh(devices):
        got = step(params, jax.device_put(eight(), split))
    assert abs(float(got.loss) - float(want.loss)) < 1e-5
    np.testing.assert_array_equal(got.load, want.load)
    assert relative_error(unstack_params(on_host(got.grads)), on_host(want.grads)) < 2e-4


def test_serving_splits_experts_too(mesh: Mesh) -> None:
    """A mixture too large for one device must be served from several: a flat axis of tokens, experts split."""
    params = random_params(SPARSE, mesh)
    batch = random_batch(1, 13)
    want, _ = jax.jit(forward)(params, batch)
    devices = build_mesh(MeshShape(ep=4, tp=2))
    with use_mesh(devices):
        got, _ = jax.jit(forward)(placed(params, devices), batch)
    assert relative_error(got, want) < 1e-5


def test_the_correction_moves_towards_balance(mesh: Mesh) -> None:
    """Without it a few experts take all tokens and the others are never trained."""
    moved = balanced(jnp.zeros(3), jnp.array([10.0, 2.0, 0.0]), 0.01)
    np.testing.assert_allclose(moved, [-0.01, 0.01, 0.01])
    many = dataclasses.replace(SPARSE, layers=12)
    params = random_params(many, mesh)
    load = jnp.arange(11 * 8, dtype=jnp.float32).reshape(11, 8) ** 2
    rate = OptimizerConfig().correction_rate
    for layout in (lambda tree: tree, stack_params):
        after = unstack_params(balance_experts(many, layout(params), load, rate))
        for layer in range(1, 12):  # more than ten: "10" must not come before "2"
            path = f"blocks/{layer}/mlp/router/correction"
            np.testing.assert_array_equal(after[path], balanced(params[path], load[layer - 1], rate))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"per_token": 9}, "per_token"),
        ({"dim": 0}, "dim"),
        ({"groups": 3}, "groups"),
        ({"groups": 4, "groups_per_token": 5}, "groups_per_token"),
        ({"groups": 8, "groups_per_token": 8, "group_score": "top2"}, "group_score"),
        ({"dense_layers": (7,)}, "dense_layers"),
    ],
)
def test_an_impossible_mixture_is_named(changes: dict[str, Any], named: str) -> None:
    """Else it fails deep in the compiler, or routes to experts that aren't there."""
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(SPARSE, mixture=dataclasses.replace(MIXTURE, **changes)).validate()


def test_a_correction_that_moves_backwards_is_named() -> None:
    """It would send every token to the experts that have too many."""
    with pytest.raises(ConfigError, match=r"optimizer\.correction_rate=-1"):
        OptimizerConfig(correction_rate=-1.0).validate()


def test_a_mesh_that_cannot_split_experts_is_named() -> None:
    """The user must learn which number to change."""
    with pytest.raises(ConfigError, match=r"experts=8 is not divisible by ep=3"):
        check_divisible(SPARSE, MeshShape(ep=3))
    with pytest.raises(ConfigError, match="has none"):
        check_divisible(TINY, MeshShape(ep=2))
