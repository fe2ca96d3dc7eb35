"""Training in bfloat16: what is summed is summed in float32, and what is trained is what is served."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.model.execution import DEFAULT_EXECUTION, Execution
from isthmus.model.ops.linear import linear, lookup
from isthmus.model.transformer import abstract_params
from isthmus.model.weights import lora
from isthmus.model.weights.checkpoint import Checkpoints, CheckpointSource
from isthmus.model.weights.layout import stack_params
from isthmus.model.weights.load import load_params
from isthmus.train.step import gradients, multiplied
from tests.support import merged, on_host, random_params
from tests.train.test_lora import LORA
from tests.train.test_step import CONFIG, random_batch

BF16 = Execution("bfloat16")


@pytest.mark.parametrize("scan", [False, True])
def test_training_multiplies_by_the_weights_that_serving_reads(scan: bool, mesh: Mesh, tmp_path: Path) -> None:
    """Otherwise the served model is another one than the loss was measured on."""
    plain = random_params(CONFIG, mesh)
    trained = multiplied(CONFIG, Execution("bfloat16", scan), stack_params(plain) if scan else plain)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, plain, None, {})
    checkpoints.close()
    abstract = abstract_params(CONFIG, mesh, stacked=scan, dtype="bfloat16")
    served = load_params(CheckpointSource(tmp_path, CONFIG, mesh), abstract)
    jax.tree.map(np.testing.assert_array_equal, on_host(trained), on_host(served))
    assert trained["embedding"].dtype == jnp.bfloat16 and trained["norm/scale"].dtype == jnp.float32


def test_float32_is_not_rounded(mesh: Mesh) -> None:
    params = random_params(CONFIG, mesh)
    jax.tree.map(np.testing.assert_array_equal, multiplied(CONFIG, DEFAULT_EXECUTION, params), params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_that_comes_often_counts_as_often(dtype: str) -> None:
    """In bfloat16, 1 added 4,096 times ends at 256."""
    table, tokens = jnp.ones((8, 4), dtype), jnp.full(4096, 3)
    grad = jax.grad(lambda table: lookup(table, tokens, 4, "float32").sum())(table)
    want = np.zeros((8, 4))
    want[3] = 4096
    np.testing.assert_array_equal(np.asarray(grad, np.float64), want)


def test_a_matrix_gradient_is_summed_in_float32_over_the_batch() -> None:
    """The same of a product: the gradient of a row's weight is its input, 4,096 times."""
    x, weight = jnp.ones((4096, 2), jnp.bfloat16), jnp.ones((2, 3), jnp.float32)
    grad = jax.grad(lambda weight: linear(x, weight, (3,)).sum())(weight)
    np.testing.assert_array_equal(grad, np.full((2, 3), 4096, np.float32))


def test_products_of_the_gradient_have_two_bfloat16_operands() -> None:
    """A float32 operand would make each of them a float32 product, at half of the speed or less."""
    x, weight = jnp.ones((8, 4), jnp.bfloat16), jnp.ones((4, 3), jnp.bfloat16)
    program = jax.make_jaxpr(jax.grad(lambda x, w: linear(x, w, (3,)).sum(), (0, 1)))(x, weight)
    operands = [eqn.invars for eqn in _equations(program.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(operands) >= 2 and {str(v.aval.dtype) for pair in operands for v in pair} == {"bfloat16"}


def _equations(jaxpr: jax.extend.core.Jaxpr) -> list:
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += _equations(inner)
    return found


def test_parts_of_a_batch_are_added_in_float32(mesh: Mesh) -> None:
    """Accumulated in bfloat16, late parts would be lost beside the sum of the early ones."""
    params = jax.tree.map(lambda x: x if x.ndim == 1 else 0.4 * x, random_params(CONFIG, mesh))
    whole = jax.jit(partial(gradients, CONFIG, BF16))(params, random_batch())
    parts = jax.jit(partial(gradients, CONFIG, BF16))(params, random_batch(accumulate=4))
    assert {leaf.dtype for leaf in jax.tree.leaves(parts.grads)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(whole.grads)} == {jnp.dtype("float32")}
    for got, want in zip(jax.tree.leaves(parts.grads), jax.tree.leaves(whole.grads), strict=True):
        assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


def test_an_adapter_smaller_than_the_weights_steps_is_merged(mesh: Mesh) -> None:
    """An adapter that moves each weight of about 1 by 1e-3 changes nothing in bfloat16 when it is added and rounded to
    the nearest; by hand, the mean of what is added is alpha / rank * the mean of a·b."""
    base, adapters = lora.split(LORA, random_params(LORA, mesh))
    base = jax.tree.map(lambda x: (1 + 0.001 * jnp.sign(x)).astype(jnp.bfloat16), base)
    adapters = jax.tree.map(lambda x: jnp.full_like(x, 0.02), adapters)
    _, moved_base = merged(LORA, {**base, **adapters})
    before, after = (params["blocks/0/mlp/up/kernel"] for params in (base, moved_base))
    moved = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    want = LORA.lora.scale * LORA.lora.rank * 0.02**2
    assert after.dtype == jnp.bfloat16 and np.count_nonzero(moved) < moved.size
    assert abs(moved.mean() - want) < 0.2 * want
