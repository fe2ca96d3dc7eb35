"""What was saved comes back, bit for bit, on any mesh and in either layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isthmus.errors import ConfigError
from isthmus.model.config import PRESETS, ModelConfig
from isthmus.model.ops.rounding import narrowed
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.transformer import Params, abstract_params
from isthmus.model.weights.checkpoint import FOLDER, CheckpointError, Checkpoints, CheckpointSource
from isthmus.model.weights.layout import stack_params, unstack_params
from isthmus.model.weights.load import load_params
from tests.support import on_host, random_params


def abstract_state(config: ModelConfig, mesh: Mesh) -> tuple[Params, dict[str, Any]]:
    """Parameters, and an optimizer state that mirrors them twice and counts."""
    params = abstract_params(config, mesh, stacked=True)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return params, {"mu": params, "nu": params, "count": count}


def make_state(config: ModelConfig, mesh: Mesh, *, stacked: bool = False) -> tuple[Params, dict[str, Any]]:
    params, mu, nu = (random_params(config, mesh, seed, stacked=stacked) for seed in range(3))
    return params, {"mu": mu, "nu": nu, "count": jnp.int32(7)}


def load(folder: Path, config: ModelConfig, mesh: Mesh, dtype: str | None = None, *, stacked: bool = False) -> Params:
    return load_params(
        CheckpointSource(folder, config, mesh), abstract_params(config, mesh, stacked=stacked, dtype=dtype)
    )


def assert_equal(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, on_host(got), on_host(want))


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
def test_saved_on_eight_devices_restored_on_one(stacked: bool, tiny: ModelConfig, mesh: Mesh, tmp_path: Path) -> None:
    """A run must be able to move to another machine, and to change its layout, without losing a bit."""
    params, optimizer = make_state(tiny, build_mesh(MeshShape(fsdp=4, tp=2)), stacked=stacked)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, params, optimizer, {"step": 7, "tokens": 123})
    checkpoints.close()

    reopened = Checkpoints(tmp_path)
    restored = reopened.restore(*abstract_state(tiny, mesh))
    reopened.close()
    assert restored.step == 7
    assert restored.progress == {"step": 7, "tokens": 123}
    layout = (lambda tree: tree) if stacked else unstack_params
    assert_equal(layout(restored.params), params)
    assert_equal(layout(restored.optimizer), optimizer)
    assert all(leaf.sharding.device_set == set(mesh.devices.flat) for leaf in jax.tree.leaves(restored.params))


def test_saved_on_one_device_restored_on_eight(
    tiny: ModelConfig, tiny_params: Params, mesh: Mesh, tmp_path: Path
) -> None:
    """Growing a run onto more devices must put each shard where that mesh wants it."""
    params, optimizer = make_state(tiny, mesh)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, params, optimizer, {})
    cube = build_mesh(MeshShape(2, 2, 2))
    restored = checkpoints.restore(*abstract_state(tiny, cube))
    checkpoints.close()
    assert_equal(restored.params, stack_params(params))
    wanted = abstract_params(tiny, cube, stacked=True)
    assert jax.tree.all(jax.tree.map(lambda x, leaf: x.sharding == leaf.sharding, restored.optimizer["nu"], wanted))


def test_a_save_under_way_does_not_read_the_next_step(tiny: ModelConfig, mesh: Mesh, tmp_path: Path) -> None:
    """The next step reuses the buffers of the state: a save that still read them would hold half of each step."""
    params, optimizer = make_state(tiny, mesh)
    want = on_host((params, optimizer))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, params, optimizer, {})
    for leaf in jax.tree.leaves((params, optimizer)):
        leaf.delete()
    restored = checkpoints.restore(*abstract_state(tiny, mesh))
    checkpoints.close()
    assert_equal(unstack_params((restored.params, restored.optimizer)), want)


def test_the_newest_are_kept(tiny: ModelConfig, mesh: Mesh, tmp_path: Path) -> None:
    """keep=2 must keep the last two, and resuming must take the last."""
    params, optimizer = make_state(tiny, mesh)
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, params, {**optimizer, "count": jnp.int32(step)}, {"step": step})
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["2", "3"]
    reopened = Checkpoints(tmp_path)
    assert reopened.latest() == 3
    assert int(reopened.restore(*abstract_state(tiny, mesh)).optimizer["count"]) == 3
    reopened.close()


@pytest.fixture(scope="module")
def model_folder(tiny: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint of parameters as training leaves it."""
    folder = tmp_path_factory.mktemp("model")
    checkpoints = Checkpoints(folder)
    params, optimizer = make_state(tiny, build_mesh(MeshShape(fsdp=4, tp=2)))
    checkpoints.save(3, params, optimizer, {})
    checkpoints.close()
    return folder


def test_serving_loads_either_layout(tiny: ModelConfig, tiny_params: Params, mesh: Mesh, model_folder: Path) -> None:
    """The layout is the server's choice, not the trainer's."""
    assert_equal(load(model_folder, tiny, mesh), tiny_params)
    assert_equal(load(model_folder, tiny, mesh, stacked=True), stack_params(tiny_params))


def test_serving_casts_matrices_and_keeps_norms(
    tiny: ModelConfig, tiny_params: Params, mesh: Mesh, model_folder: Path
) -> None:
    """Weights are cast once at load; norms stay in float32, where a bfloat16 scale would cost accuracy for nothing."""
    loaded = load(model_folder, tiny, mesh, "bfloat16")
    assert loaded.keys() == tiny_params.keys()
    for path, leaf in loaded.items():
        dtype = jnp.float32 if path.endswith("/scale") else jnp.bfloat16
        assert leaf.dtype == dtype, path
        np.testing.assert_array_equal(leaf, narrowed(tiny_params[path], dtype))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_path_is_a_path_through_dicts_on_disk(tiny: ModelConfig, tiny_params: Params, model_folder: Path) -> None:
    """Folders of earlier versions hold nested dicts, stacked: written otherwise, neither could read the other's."""
    tree = ocp.PyTreeCheckpointer().restore(model_folder.resolve() / FOLDER / "3" / "params")
    assert tree.keys() == {"embedding", "blocks", "norm", "head"} and tree["blocks"].keys() == {"0-1"}
    want = stack_params(tiny_params)["blocks/0-1/attention/query/kernel"]
    np.testing.assert_array_equal(tree["blocks"]["0-1"]["attention"]["query"]["kernel"], want)


def test_a_folder_that_is_no_model_is_named(tiny: ModelConfig, mesh: Mesh, tmp_path: Path) -> None:
    """Pointing the server at the wrong folder is common; a stack trace from Orbax is no answer."""
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load(tmp_path, tiny, mesh)
    with pytest.raises(ConfigError, match="nowhere"):
        load(tmp_path / "nowhere", tiny, mesh)


def test_a_run_without_a_checkpoint_is_named(tiny: ModelConfig, mesh: Mesh, tmp_path: Path) -> None:
    """A run that was stopped before its first checkpoint has a folder and nothing in it."""
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load(tmp_path, tiny, mesh)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        checkpoints.restore(*abstract_state(tiny, mesh))
    checkpoints.close()


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    """The server must build the network that was trained."""
    PRESETS[name].save(tmp_path / "config.json")
    assert ModelConfig.load(tmp_path / "config.json") == PRESETS[name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '{"width": 8}',
        '{"dim": "8"}',
        '{"dim": null}',
        '{"heads": 3, "kv_heads": 2}',
        "\xff",
    ],
)
def test_a_wrong_configuration_names_its_file(text: str, tmp_path: Path) -> None:
    """A file that was edited by hand or copied from elsewhere must be named, with no stack trace."""
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.load(path)


def test_a_missing_configuration_names_its_file(tmp_path: Path) -> None:
    """The message must lead to the folder that was meant."""
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ModelConfig.load(tmp_path / "config.json")


def test_fields_left_out_take_their_default(tmp_path: Path) -> None:
    """A model folder of an earlier version must still load."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"vocab_size": 64, "dim": 32, "heads": 4, "kv_heads": 4, "head_dim": 8}))
    assert ModelConfig.load(path) == ModelConfig(vocab_size=64, dim=32, heads=4, kv_heads=4, head_dim=8)


def test_an_earlier_versions_execution_is_passed_over(tmp_path: Path) -> None:
    """config.json said once how the network is computed and trained, too; it is the same network without."""
    path = tmp_path / "config.json"
    fields = dataclasses.asdict(PRESETS["1b"])
    fields |= {"dtype": "bfloat16", "scan_layers": True, "remat": "dots"}
    fields["mixture"]["correction_rate"] = 0.001
    path.write_text(json.dumps(fields))
    assert ModelConfig.load(path) == PRESETS["1b"]
