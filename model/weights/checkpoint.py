"""Orbax checkpoints: saved in the background, committed atomically, restored to any mesh.

A model folder holds `config.json`, `tokenizer.json` and `checkpoints/STEP/{params,optimizer,progress}`. Arrays are
stored in the stacked layout whatever the run used, so that training on one layout can serve or resume on the other.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.ops.rounding import narrowed
from isthmus.model.sharding import use_mesh
from isthmus.model.transformer import Params, abstract_params, kept_dtype, stack_blocks, unstack_blocks
from isthmus.model.weights import quantization

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates saves, and each error before it raises it

FOLDER = "checkpoints"
QUANTIZATION = "quantization"
"""In a checkpoint's progress: the rules that its integers were made by"""


class CheckpointError(RuntimeError):
    """A checkpoint that can't be read or written; the message says which and why."""


@dataclass(frozen=True)
class Restored:
    step: int
    params: Params
    optimizer: Any
    progress: dict


class Checkpoints:
    """The checkpoints of one model folder."""

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        """keep: how many of the newest to keep; None keeps all. A folder opened with `keep` is the caller's alone: what
        an earlier save left unfinished in it is deleted."""
        self._path, self._saving = (folder / FOLDER).resolve(), 0
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=keep is not None, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self._path, options=options, item_handlers=handlers)

    def save(self, step: int, params: Params, optimizer: Any, progress: dict) -> None:
        """Starts a save and returns once the arrays may be donated again. optimizer: None leaves it out; progress:
        JSON. Raises CheckpointError when it, or the save before it, fails."""
        self.wait()
        snapshot = _snapshot((params, optimizer))
        items: dict[str, Any] = {"params": ocp.args.StandardSave(snapshot[0]), "progress": ocp.args.JsonSave(progress)}
        if optimizer is not None:
            items["optimizer"] = ocp.args.StandardSave(snapshot[1])
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:  # TensorStore's are of many types
            raise self._failure(error) from None

    def check(self) -> None:
        """Raises CheckpointError when a save in the background has failed."""
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until no save is under way. Raises CheckpointError when the last one failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # TensorStore's are of many types
            raise self._failure(error) from None
        self._saving = 0

    def _failure(self, error: Exception) -> CheckpointError:
        step, self._saving = self._saving, 0
        latest = self.latest()
        kept = "there is no earlier one" if latest is None else f"that of step {latest} is whole"
        return CheckpointError(
            f"the checkpoint of step {step} can't be written in {self._path}: {_reason(error)}; {kept}"
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, params: Params, optimizer: Any) -> Restored:
        """The newest checkpoint, stacked, in the shapes, dtypes and shardings of abstract `params` and `optimizer`.

        Raises CheckpointError when there is none, or it can't be read.
        """
        step = self._newest()
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(params),
            optimizer=ocp.args.StandardRestore(optimizer),
            progress=ocp.args.JsonRestore(),
        )
        return Restored(step, items["params"], items["optimizer"], items["progress"])

    def restore_params(self, params: Params) -> Params:
        """The newest parameters alone. Raises CheckpointError when there are none, or they can't be read."""
        return self._restore(self._newest(), params=ocp.args.StandardRestore(params))["params"]

    def progress(self) -> dict:
        """The newest checkpoint's. Raises CheckpointError when there is none, or it can't be read."""
        return self._restore(self._newest(), progress=ocp.args.JsonRestore())["progress"]

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # TensorStore's are of many types
            raise CheckpointError(
                f"{self._path / str(step)} can't be read as a checkpoint of this model: {_reason(error)}; where it is "
                "damaged, delete it to go on from the one before"
            ) from error

    def _newest(self) -> int:
        step = self._manager.latest_step()
        if step is None:
            raise CheckpointError(f"{self._path} holds no finished checkpoint")
        return step

    def close(self) -> None:
        """Waits for saves under way. Raises CheckpointError when one failed."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _reason(error: Exception) -> str:
    """In one line; what the system said, where TensorStore quotes it."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


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
        _check_made_by(config, checkpoints.progress(), folder)
        params = checkpoints.restore_params(quantization.abstract_stored(config, mesh))
    finally:
        checkpoints.close()
    if config.quantization:
        return quantization.restored(config, params, dtype)
    return serving_layout(config, mesh, dtype)(params)


def _check_made_by(config: ModelConfig, progress: Any, folder: Path) -> None:
    """Raises CheckpointError where config.json has other rules than the integers were made by: the same bytes would
    mean other numbers."""
    made_by = progress.get(QUANTIZATION, []) if isinstance(progress, dict) else None
    if made_by != list(config.quantization):
        said = ", ".join(map(str, made_by)) if isinstance(made_by, list) else ""
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization isn't what the integers were made by, which is "
            f"{said or 'not known'}; put it back, or convert the model that it was made from again"
        )


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
