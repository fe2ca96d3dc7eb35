"""Adapters are trained and nothing else is: their gradients are the chain rule's, their base stays as it was."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from isthmus.model.config import LoraConfig, MixtureConfig
from isthmus.model.execution import DEFAULT_EXECUTION, Execution
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.transformer import Params, abstract_params, runs
from isthmus.model.weights import lora
from isthmus.model.weights.layout import stack_params, unstack_params
from isthmus.train.config import OptimizerConfig
from isthmus.train.optimizer import build_optimizer
from isthmus.train.speed import step_flops
from isthmus.train.step import Trainer, TrainState, gradients
from tests.support import merged, on_host, random_params, relative_error
from tests.train.test_step import CONFIG, random_batch

LORA = dataclasses.replace(CONFIG, lora=LoraConfig(3, 6.0, r"attention/(query|out)|mlp/up"))
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1)
SCANNED = Execution(scan_layers=True)


def small_parts(mesh: Mesh) -> tuple[Params, Params]:
    """(base, adapters), neither factor of an adapter zero, sized as in training."""
    params = jax.tree.map(lambda x: x if x.ndim == 1 else 0.4 * x, random_params(LORA, mesh))
    return lora.split(LORA, params)


def start(shape: str, *, scan_layers: bool) -> tuple[Trainer, TrainState]:
    mesh = build_mesh(MeshShape.parse(shape))
    trainer = Trainer(LORA, build_optimizer(OPTIMIZER, 5, LORA), mesh, Execution(scan_layers=scan_layers))
    parts = small_parts(build_mesh(MeshShape()))
    base, adapters = (stack_params(part) if scan_layers else part for part in parts)
    abstract = abstract_params(dataclasses.replace(LORA, lora=LoraConfig()), mesh, stacked=scan_layers)
    trainer.base = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), base, abstract)
    return trainer, trainer.state_from_params(jax.tree.map(jax.device_put, adapters, trainer.shardings.params))


def chain_rule(kernel_grads: Params, adapters: Params, scale: float) -> Params:
    """Gradients of a and b where kernel + scale * a·b has the gradient `kernel_grads`, in float64."""
    found: Params = {}
    for linear in {path.rpartition("/")[0] for path in adapters}:
        a, b = (np.asarray(adapters[f"{linear}/{factor}"], np.float64) for factor in ("lora_a", "lora_b"))
        inputs, rank = a.shape[:-1], a.shape[-1]
        grad = np.asarray(kernel_grads[f"{linear}/kernel"], np.float64).reshape(np.prod(inputs), -1)
        flat_a, flat_b = a.reshape(-1, rank), b.reshape(rank, -1)
        found[f"{linear}/lora_a"] = (scale * grad @ flat_b.T).reshape(a.shape)
        found[f"{linear}/lora_b"] = (scale * flat_a.T @ grad).reshape(b.shape)
    return found


@pytest.fixture(scope="module")
def by_hand() -> tuple[float, Params, Params]:
    """The loss, the adapters' gradients and the adapters after a step, from the merged network's gradients."""
    base, adapters = small_parts(build_mesh(MeshShape()))
    plain, params = merged(LORA, {**base, **adapters})
    loss, grads, _ = jax.jit(partial(gradients, plain, DEFAULT_EXECUTION))(params, random_batch())
    mine = chain_rule(on_host(grads), on_host(adapters), LORA.lora.scale)
    optimizer = build_optimizer(OPTIMIZER, 5, LORA)
    as_float = jax.tree.map(jnp.float32, mine)
    updates, _ = optimizer.update(as_float, optimizer.init(adapters), adapters)
    return float(loss), mine, on_host(optax.apply_updates(adapters, updates))


def test_gradients_are_the_chain_rules(by_hand: tuple[float, Params, Params]) -> None:
    """A factor alpha / rank too many or too few would still lower the loss."""
    base, adapters = small_parts(build_mesh(MeshShape()))
    loss, grads, _ = jax.jit(partial(gradients, LORA, DEFAULT_EXECUTION))(adapters, random_batch(), base)
    assert float(loss) == pytest.approx(by_hand[0], rel=1e-5)
    assert relative_error(grads, by_hand[1]) <= 1e-5


@pytest.mark.parametrize(("mesh", "scan_layers", "accumulate"), [("", False, 1), ("fsdp=2,tp=2", True, 2)])
def test_a_step_moves_the_adapters_alone(
    mesh: str, scan_layers: bool, accumulate: int, by_hand: tuple[float, Params, Params]
) -> None:
    """The base is what makes an adapter small: it must stay what it was, bit for bit, and cost no moments."""
    trainer, state = start(mesh, scan_layers=scan_layers)
    names = {path.rpartition("/")[2] for path in state.params}
    assert names == {"lora_a", "lora_b"}
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * trained, "the optimizer holds two moments of each adapter, and of nothing else"
    before = on_host(trainer.base)
    state, metrics = trainer.step(state, random_batch(accumulate=accumulate))
    assert float(metrics.loss) == pytest.approx(by_hand[0], rel=1e-5)
    assert relative_error(unstack_params(on_host(state.params)), by_hand[2]) <= 1e-5
    jax.tree.map(np.testing.assert_array_equal, on_host(trainer.base), before)


def test_adapters_start_as_nothing(mesh: Mesh) -> None:
    """A run starts from the model that was loaded; and the same seed starts the same run, scanned or not."""
    config = dataclasses.replace(LORA, lora=LoraConfig(8, targets="attention/query"))
    optimizer = build_optimizer(OPTIMIZER, 5, config)
    adapters = on_host(Trainer(config, optimizer, mesh).init(3).params)
    scanned = Trainer(config, optimizer, mesh, SCANNED).init(3).params
    jax.tree.map(np.testing.assert_array_equal, adapters, unstack_params(scanned))
    first, second = ([adapters[f"blocks/{layer}/attention/query/lora_{x}"] for x in "ab"] for layer in "01")
    assert not first[1].any() and not second[1].any()
    assert first[0].std() == pytest.approx(CONFIG.dim**-0.5, rel=0.2)
    assert (first[0] != second[0]).all()


@pytest.mark.parametrize("targets", ["attention/query", "mlp/up", "mlp/shared/up"])
def test_a_checkpoint_has_the_runs_of_the_network(targets: str, mesh: Mesh) -> None:
    """Layers with and without experts may have alike adapters, or some of them none: a run that is scanned must read
    what one that isn't has saved."""
    mixture = MixtureConfig(experts=4, dim=8, shared_dim=8, dense_layers=(1,))
    config = dataclasses.replace(LORA, layers=4, mixture=mixture, lora=LoraConfig(2, targets=targets))
    optimizer = build_optimizer(OPTIMIZER, 5, config)
    scanned = Trainer(config, optimizer, mesh, SCANNED)
    state = Trainer(config, optimizer, mesh).state_from_params(lora.split(config, random_params(config, mesh))[1])
    saved = stack_params(state, runs(config))
    shapes = jax.tree.map(jnp.shape, scanned.abstract)
    assert jax.tree.map(jnp.shape, saved) == shapes == jax.tree.map(jnp.shape, stack_params(saved))
    again = unstack_params(saved)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_flops_of_a_step_leave_out_what_is_not_computed() -> None:
    """Else the MFU would be half as much again as it is."""
    full, adapted = step_flops(CONFIG, 4, 16), step_flops(LORA, 4, 16)
    tokens, attended = 4 * 16, 4 * 16 * 17 // 2
    matrices, attention = 2 * CONFIG.matmul_parameters * tokens, 4 * 2 * 32 * attended
    assert full == 3 * (matrices + attention)
    adapters = 2 * 3 * (2 * (CONFIG.dim + 32) + CONFIG.dim + CONFIG.mlp_dim)
    assert adapted == 2 * matrices + 3 * attention + 6 * adapters * tokens
