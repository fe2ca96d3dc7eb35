"""The table of axes lays the model out as it says, on a mesh of eight devices."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.execution import Execution
from isthmus.model.sharding import MeshShape, build_mesh, check_divisible
from isthmus.model.transformer import Params, abstract_params
from isthmus.model.weights.layout import is_stacked, unstack_params
from isthmus.model.weights.random import init_params
from isthmus.train.config import OptimizerConfig
from isthmus.train.optimizer import build_optimizer
from isthmus.train.step import Trainer
from tests.support import TINY, on_host, random_params

GROUPED = dataclasses.replace(TINY, attention_bias=True, mlp_bias=True, qk_norm="head")
"""Every kind of parameter there is."""

# By hand, from what each parallelism is for: tp splits heads, MLP and vocabulary, fsdp the residual width.
LAYOUT: dict[str, tuple[str | None, ...]] = {
    "embedding": ("tp", "fsdp"),
    "head": ("fsdp", "tp"),
    "norm/scale": ("fsdp",),
    "attention_norm/scale": ("fsdp",),
    "mlp_norm/scale": ("fsdp",),
    "query_norm/scale": (None,),
    "key_norm/scale": (None,),
    "query/kernel": ("fsdp", "tp", None),
    "key/kernel": ("fsdp", "tp", None),
    "value/kernel": ("fsdp", "tp", None),
    "query/bias": ("tp", None),
    "key/bias": ("tp", None),
    "value/bias": ("tp", None),
    "out/kernel": ("tp", None, "fsdp"),
    "gate/kernel": ("fsdp", "tp"),
    "up/kernel": ("fsdp", "tp"),
    "gate/bias": ("tp",),
    "up/bias": ("tp",),
    "down/kernel": ("tp", "fsdp"),
    "down/bias": ("fsdp",),
}


def layout_of(path: str) -> tuple[str | None, ...]:
    return LAYOUT["/".join(path.split("/")[-2:])]


@pytest.fixture(scope="module")
def cube() -> Mesh:
    return build_mesh(MeshShape(2, 2, 2))


@pytest.fixture(scope="module")
def born_sharded(cube: Mesh) -> Params:
    return init_params(GROUPED, 5, cube)


def test_mesh_is_read_from_text() -> None:
    """--mesh is how a user says what goes where."""
    assert MeshShape.parse("dp=2, fsdp=4,tp=8") == MeshShape(2, 4, 8)
    assert MeshShape.parse("tp=2") == MeshShape(1, 1, 2)
    assert MeshShape.parse("") == MeshShape()
    assert MeshShape(2, 3, 4).devices == 24


@pytest.mark.parametrize("text", ["pp=2", "dp=2,dp=2", "dp", "dp=", "dp=0", "dp=-1", "dp=2.5", "dp=two", "2", "tp=²"])
def test_a_wrong_mesh_is_refused(text: str) -> None:
    """A typing error must not become a run on another mesh."""
    with pytest.raises(ConfigError, match="mesh"):
        MeshShape.parse(text)


def test_too_few_devices_are_counted_out() -> None:
    """The message must say how many there are, or the user can't choose."""
    with pytest.raises(ConfigError, match=r"needs 16 devices.*there are 8"):
        build_mesh(MeshShape(dp=16))


@pytest.mark.parametrize(
    ("field", "size", "shape"),
    [
        ("kv_heads", 2, MeshShape(tp=4)),
        ("heads", 6, MeshShape(tp=4)),
        ("mlp_dim", 66, MeshShape(tp=4)),
        ("vocab_size", 97, MeshShape(tp=2)),
        ("dim", 36, MeshShape(fsdp=8)),
    ],
)
def test_what_does_not_divide_is_named(field: str, size: int, shape: MeshShape) -> None:
    """Without the field's name the user learns it from a shape error deep in the compiler."""
    divisible = ModelConfig(vocab_size=64, dim=64, layers=1, heads=8, kv_heads=4, head_dim=8, mlp_dim=64)
    check_divisible(divisible, shape)
    wrong = dataclasses.replace(divisible, **{field: size})
    with pytest.raises(ConfigError, match=rf"model\.{field}={size} .*={max(shape.shape)}"):
        check_divisible(wrong, shape)


def test_every_parameter_is_split_as_planned(born_sharded: Params) -> None:
    """A weight that is replicated by mistake fits in a test and not in a device."""
    seen = set()
    for path, leaf in born_sharded.items():
        axes = layout_of(path)
        want = tuple(size // (1 if axis is None else 2) for size, axis in zip(leaf.shape, axes, strict=True))
        assert {shard.data.shape for shard in leaf.addressable_shards} == {want}, path
        assert tuple(leaf.sharding.spec) == axes, path
        seen.add(axes)
    assert seen == set(LAYOUT.values())


def test_stacked_parameters_keep_their_layout(cube: Mesh) -> None:
    """A leading layer axis must not shift the others by one."""
    for path, leaf in abstract_params(GROUPED, cube, stacked=True).items():
        assert is_stacked(path) == path.startswith("blocks/")
        layers = (None,) if is_stacked(path) else ()
        assert tuple(leaf.sharding.spec) == (*layers, *layout_of(path)), path


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_moments_are_split_as_their_parameter(scan_layers: bool, cube: Mesh) -> None:
    """AdamW keeps two numbers a parameter: replicated, they need more memory than the sharding saved."""
    optimizer = build_optimizer(OptimizerConfig(), 10, GROUPED)
    trainer = Trainer(GROUPED, optimizer, cube, Execution(scan_layers=scan_layers))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(GROUPED, cube, stacked=scan_layers))
    params = random_params(GROUPED, cube, stacked=scan_layers)
    made = jax.jit(optimizer.init, out_shardings=trainer.shardings.optimizer)(params)
    for state in (trainer.shardings.optimizer, jax.tree.map(lambda leaf: leaf.sharding, made)):
        for moment in ("mu", "nu"):
            assert jax.tree.all(jax.tree.map(lambda a, b: a == b, optax.tree.get(state, moment), shardings))


def test_a_seed_gives_the_same_parameters_on_any_mesh_and_layout(born_sharded: Params, mesh: Mesh) -> None:
    """A run started on eight devices must be the run started on one, scanned or not."""
    want = on_host(unstack_params(init_params(GROUPED, 5, mesh, stacked=True)))
    jax.tree.map(np.testing.assert_array_equal, on_host(born_sharded), want)
    first, second = (want[f"blocks/{layer}/mlp/up/kernel"] for layer in range(2))
    assert not np.array_equal(first, second), "two layers were born equal"
