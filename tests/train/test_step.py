"""A training step is the same step on any mesh, however it is cut, and its optimizer is AdamW."""

from __future__ import annotations

import dataclasses
import math
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isthmus.model.config import ModelConfig
from isthmus.model.execution import DEFAULT_EXECUTION, Execution
from isthmus.model.sharding import MeshShape, build_mesh, partition_spec, use_mesh
from isthmus.model.transformer import Params, parameter_specs
from isthmus.model.weights.layout import stack_params, unstack_params
from isthmus.train.config import OptimizerConfig
from isthmus.train.data import Batch
from isthmus.train.optimizer import build_optimizer, build_schedule
from isthmus.train.step import Trainer, TrainState, gradients
from tests.support import on_host, random_params, relative_error

CONFIG = ModelConfig(
    vocab_size=64,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    context_length=16,
    mlp_bias=True,
)
SEQUENCES, SEQ = 8, 16


def random_batch(seed: int = 0, accumulate: int = 1) -> Batch:
    """Sequences of two documents each, the last ones ending in padding of different lengths."""
    rng = np.random.default_rng(seed)
    shape = (SEQUENCES, SEQ)
    cuts = rng.integers(1, SEQ, SEQUENCES)[:, None]
    index = np.broadcast_to(np.arange(SEQ), shape)
    segments = (index >= cuts).astype(np.int32)
    weights = np.ones(shape, np.float32)
    for row in range(SEQUENCES // 2, SEQUENCES):
        padding = int(rng.integers(1, SEQ))
        weights[row, SEQ - padding :] = 0
        segments[row, SEQ - padding :] = -1
    batch = Batch(
        rng.integers(0, CONFIG.vocab_size, shape).astype(np.int32),
        rng.integers(0, CONFIG.vocab_size, shape).astype(np.int32),
        np.where(index >= cuts, index - cuts, index).astype(np.int32),
        segments,
        weights,
    )
    return Batch(*(x.reshape(accumulate, -1, SEQ) for x in batch))


def small_params(mesh: Mesh) -> Params:
    """As large as in training: with larger ones the loss would magnify rounding instead of mistakes."""
    return jax.tree.map(lambda x: x if x.ndim == 1 else 0.4 * x, random_params(CONFIG, mesh))


grad_on_one_device = jax.jit(partial(gradients, CONFIG, DEFAULT_EXECUTION))


def run_gradients(shape: MeshShape, *, scan_layers: bool = False, batch: Batch) -> tuple[float, Params]:
    """Loss and gradients, unstacked, of fixed parameters on a mesh of `shape`."""
    mesh = build_mesh(shape)
    params = small_params(mesh)
    params = stack_params(params) if scan_layers else params
    sharding = NamedSharding(mesh, PartitionSpec(None, *partition_spec(("batch", "seq"))))
    with use_mesh(mesh):
        step = jax.jit(partial(gradients, CONFIG, Execution(scan_layers=scan_layers)))
        loss, grads, _ = step(params, jax.device_put(batch, sharding))
    return float(loss), unstack_params(on_host(grads))


@cache
def one_device() -> tuple[float, Params]:
    return run_gradients(MeshShape(), batch=random_batch())


@pytest.mark.parametrize(
    ("mesh", "scan_layers"),
    [
        ("", True),
        ("dp=8", False),
        ("fsdp=8", False),
        ("tp=2", False),
        ("dp=2,fsdp=2,tp=2", False),
        ("fsdp=4,tp=2", False),
        ("fsdp=4,tp=2", True),
    ],
)
def test_any_mesh_and_layout_trains_the_same_model(mesh: str, scan_layers: bool) -> None:
    """Parallelism must decide how fast a model is trained and nothing else."""
    loss, grads = run_gradients(MeshShape.parse(mesh), scan_layers=scan_layers, batch=random_batch())
    want_loss, want = one_device()
    assert loss == pytest.approx(want_loss, rel=1e-5)
    assert relative_error(grads, want) <= 1e-5


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_accumulation_changes_nothing(scan_layers: bool) -> None:
    """Accumulating is for memory: parts with more padding must not weigh more than the others."""
    batch = random_batch(accumulate=4)
    assert len({float(part.sum()) for part in batch.weights}) > 2, "the parts should differ in padding"
    loss, grads = run_gradients(MeshShape(), scan_layers=scan_layers, batch=batch)
    want_loss, want = one_device()
    assert loss == pytest.approx(want_loss, rel=1e-6)
    assert relative_error(grads, want) <= 1e-6


def test_padding_teaches_nothing() -> None:
    """Whatever lies in padding must not reach the loss: it would change with the packing."""
    batch = random_batch()
    other = batch._replace(
        targets=np.where(batch.weights > 0, batch.targets, 1),
        tokens=np.where(batch.weights > 0, batch.tokens, 2),
    )
    loss, grads = run_gradients(MeshShape(), batch=other)
    want_loss, want = one_device()
    assert loss == pytest.approx(want_loss, rel=1e-6)
    assert relative_error(grads, want) <= 1e-6


def test_the_loss_is_the_mean_over_targets(mesh: Mesh) -> None:
    """Held-out loss and training loss are compared with each other and with other people's: both in nats a target."""
    trainer = Trainer(CONFIG, build_optimizer(OptimizerConfig(), 5, CONFIG), mesh)
    batch = random_batch()
    nats = float(trainer.evaluate(small_params(mesh), batch))
    assert nats / batch.weights.sum() == pytest.approx(one_device()[0], rel=1e-6)


# the optimizer


class NumpyAdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with clipping by the global norm, in float64."""

    def __init__(self, config: OptimizerConfig, params: Params) -> None:
        self.config = config
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.mean = jax.tree.map(np.zeros_like, self.params)
        self.square = jax.tree.map(np.zeros_like, self.params)
        self.steps = 0

    def step(self, grads: Params, lr: float) -> float:
        """Returns the gradient's norm before clipping."""
        c = self.config
        grads = jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
        norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * min(1.0, c.clip / norm), grads)
        self.steps += 1
        self.mean = jax.tree.map(lambda m, g: c.beta1 * m + (1 - c.beta1) * g, self.mean, grads)
        self.square = jax.tree.map(lambda v, g: c.beta2 * v + (1 - c.beta2) * g**2, self.square, grads)

        def update(path: tuple, p: np.ndarray, m: np.ndarray, v: np.ndarray) -> np.ndarray:
            m, v = m / (1 - c.beta1**self.steps), v / (1 - c.beta2**self.steps)
            decay = 0.0 if path[-1].key.endswith(("/scale", "/bias")) else c.weight_decay
            return p - lr * (m / (np.sqrt(v) + 1e-8) + decay * p)

        self.params = jax.tree_util.tree_map_with_path(update, self.params, self.mean, self.square)
        return norm


def copied(state: TrainState) -> TrainState:
    """In buffers of its own, for a step that donates."""
    return jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), state)


def test_five_steps_are_adamw(mesh: Mesh) -> None:
    """Clipping, schedule, moments or decay gone wrong still lower the loss, only less: no curve would show it."""
    optimizer = OptimizerConfig(lr=3e-3, schedule="wsd", warmup_steps=2, decay_fraction=0.4, weight_decay=0.5, clip=0.5)
    trainer = Trainer(CONFIG, build_optimizer(optimizer, 5, CONFIG), mesh)
    params = random_params(CONFIG, mesh)
    with use_mesh(mesh):
        state = TrainState(params, jax.jit(build_optimizer(optimizer, 5, CONFIG).init)(params))
    mine = NumpyAdamW(optimizer, on_host(params))
    learning_rate = build_schedule(optimizer, 5)
    for step in range(5):
        batch = random_batch(seed=step)
        loss, grads, _ = grad_on_one_device(state.params, batch)
        norm = mine.step(on_host(grads), float(learning_rate(step)))
        assert norm > optimizer.clip, "clipping isn't tested"
        state, metrics = trainer.step(copied(state), batch)
        assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
        assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5)
    assert relative_error(on_host(state.params), mine.params) <= 1e-5
    moved = relative_error(mine.params, on_host(params))
    assert moved > 1e-3, "the parameters hardly moved, so nothing was compared"


@pytest.mark.parametrize("stacked", [False, True])
def test_norms_and_biases_are_not_decayed(stacked: bool) -> None:
    """Decay pulls a norm's scale to 0, and with it the whole layer."""
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    params = {path: np.float32(1 + n) for n, path in enumerate(parameter_specs(config, stacked=stacked))}
    names = {path.rpartition("/")[2] for path in params}
    assert names == {"embedding", "head", "scale", "kernel", "bias"}, "something isn't tested"
    optimizer = build_optimizer(OptimizerConfig(lr=1.0, warmup_steps=0, weight_decay=0.25), 10, config)
    zero = jax.tree.map(np.zeros_like, params)
    updates = jax.jit(lambda p: optimizer.update(zero, optimizer.init(p), p)[0])(params)
    for path, param in params.items():
        share = 0 if path.endswith(("/scale", "/bias")) else -0.25
        assert float(updates[path]) == pytest.approx(share * float(param)), path


def test_cosine_at_points_worked_out_by_hand() -> None:
    """A wrong schedule costs a run without any sign."""
    lr = build_schedule(OptimizerConfig(lr=0.1, schedule="cosine", warmup_steps=10, final_lr=0.2), 110)
    for step, want in [(0, 0), (5, 0.05), (10, 0.1), (60, 0.06), (110, 0.02)]:
        assert float(lr(step)) == pytest.approx(want, abs=1e-7), step
    quarter = 0.02 + 0.08 * (1 + math.cos(math.pi / 4)) / 2
    assert float(lr(35)) == pytest.approx(quarter, abs=1e-7)


def test_wsd_at_points_worked_out_by_hand() -> None:
    """Warm-up, stable, then a straight line down to the last learning rate at the last step."""
    config = OptimizerConfig(lr=0.1, schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_lr=0.5)
    lr = build_schedule(config, 100)
    for step, want in [(0, 0), (5, 0.05), (10, 0.1), (50, 0.1), (80, 0.1), (90, 0.075), (100, 0.05)]:
        assert float(lr(step)) == pytest.approx(want, abs=1e-7), step


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_a_run_shorter_than_its_warmup_still_learns(schedule: Any, steps: int) -> None:
    """The defaults warm up for 100 steps: a first try of ten must not train at a rate of 0."""
    lr = build_schedule(OptimizerConfig(lr=0.1, schedule=schedule, warmup_steps=100), steps)
    rates = [float(lr(step)) for step in range(steps)]
    assert all(0 <= rate <= 0.1 + 1e-7 for rate in rates)
    assert max(rates) > 0 and all(map(math.isfinite, rates))
