"""Orbax checkpoints: saved in the background, committed atomically, restored to any mesh.

A model folder holds `config.json`, `tokenizer.json` and `checkpoints/STEP/{params,optimizer,progress}`. Arrays are
stored in the stacked layout whatever the run used, so that training on one layout can serve or resume on the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from model import quantization
from model.config import ConfigError, ModelConfig
from model.ops.rounding import narrowed
from model.sharding import use_mesh
from model.transformer import Params, abstract_params, kept_dtype, stack_blocks, unstack_blocks

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save at INFO and WARNING

FOLDER = "checkpoints"


class CheckpointError(RuntimeError):
    """A checkpoint that can't be read; the message says which and why."""


@dataclass(frozen=True)
class Restored:
    step: int
    params: Params
    optimizer: Any
    progress: dict


class Checkpoints:
    """The checkpoints of one model folder."""

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        """keep: how many of the newest to keep; None keeps all."""
        self._path = (folder / FOLDER).resolve()
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self._path, options=options, item_handlers=handlers)

    def save(self, step: int, params: Params, optimizer: Any, progress: dict) -> None:
        """Starts a save and returns once the arrays may be donated again. optimizer: None leaves it out; progress:
        JSON."""
        snapshot = _snapshot((params, optimizer))
        items: dict[str, Any] = {"params": ocp.args.StandardSave(snapshot[0]), "progress": ocp.args.JsonSave(progress)}
        if optimizer is not None:
            items["optimizer"] = ocp.args.StandardSave(snapshot[1])
        self._manager.save(step, args=ocp.args.Composite(**items))

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, params: Params, optimizer: Any) -> Restored:
        """The newest checkpoint, stacked, in the shapes, dtypes and shardings of abstract `params` and `optimizer`.

        Raises CheckpointError when there is none.
        """
        step = self._newest()
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                optimizer=ocp.args.StandardRestore(optimizer),
                progress=ocp.args.JsonRestore(),
            ),
        )
        return Restored(step, items["params"], items["optimizer"], items["progress"])

    def restore_params(self, params: Params) -> Params:
        """The newest parameters alone. Raises CheckpointError when there are none."""
        step = self._newest()
        args = ocp.args.Composite(params=ocp.args.StandardRestore(params))
        return self._manager.restore(step, args=args)["params"]

    def _newest(self) -> int:
        step = self._manager.latest_step()
        if step is None:
            raise CheckpointError(f"{self._path} holds no finished checkpoint")
        return step

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.close()


@jax.jit
def _snapshot(tree: Any) -> Any:
    """The stacked layout in fresh buffers, which the next step can't overwrite while they are being written."""
    return quantization.to_arrays(jax.tree.map(jnp.copy, stack_blocks(tree)))


def load_params(folder: Path, config: ModelConfig, mesh: Mesh, dtype: str | None = None) -> Params:
    """A model folder's newest parameters, sharded over `mesh`, in the layout `config` asks for.

    dtype: what to keep matrices in (norms stay float32); None keeps float32. Raises ConfigError when the folder is
    not a model's, CheckpointError when it holds no checkpoint.
    """
    if not (folder / FOLDER).is_dir():
        raise ConfigError(f"{folder} holds no {FOLDER}/: is it a folder that `isthmus train` wrote?")
    checkpoints = Checkpoints(folder)
    try:
        params = checkpoints.restore_params(quantization.abstract_stored(config, mesh))
    finally:
        checkpoints.close()
    if config.quantization:
        return quantization.restored(config, params, dtype)
    return serving_layout(config, mesh, dtype)(params)


def serving_layout(config: ModelConfig, mesh: Mesh, dtype: str | None) -> Callable[[Params], Params]:
    """Turns stacked float32 parameters into what serving reads each step: the very numbers that training in `dtype`
    multiplies by."""

    def convert(params: Params) -> Params:
        params = params if config.scan_layers else unstack_blocks(params)
        return jax.tree_util.tree_map_with_path(lambda path, x: narrowed(x, kept_dtype(path, dtype)), params)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))

    def run(params: Params) -> Params:
        with use_mesh(mesh):
            return jax.jit(convert, out_shardings=shardings)(params)

    return run
