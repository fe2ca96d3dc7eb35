"""Orbax checkpoints: saved in the background, committed atomically, restored to any mesh.

A model folder holds `config.json`, `tokenizer.json` and `checkpoints/STEP/{params,optimizer,progress}`. Arrays are
stored in the stacked layout, whatever layout the run used, so that a run in one layout can be served or resumed in the
other. On disk, a parameter's path is a path through nested dicts.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.ops.rounding import narrowed
from isthmus.model.transformer import Params, parameter_specs
from isthmus.model.weights import quantization
from isthmus.model.weights.layout import is_params, stack_params, unstack
from isthmus.model.weights.load import Read

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every save, and every error that it also raises

FOLDER = "checkpoints"
QUANTIZATION = "quantization"
"""The key, in a checkpoint's progress, of the rules that its integers were made by."""


class CheckpointError(RuntimeError):
    """A checkpoint can't be read or written. The message says which one and why."""


@dataclass(frozen=True)
class Restored:
    step: int
    params: Params
    optimizer: Any
    progress: dict


class Checkpoints:
    """The checkpoints of one model folder."""

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        """keep: how many of the newest checkpoints to keep; None keeps all. With `keep`, unfinished saves in the folder
        are deleted, so nobody else may be saving to it."""
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
        """Starts a save and returns once the arrays may be donated again. optimizer: None leaves it out. progress: must
        be JSON. Raises CheckpointError when this save can't be started, or when the previous one failed."""
        self.wait()
        snapshot = _snapshot((params, optimizer))
        params = _nested(quantization.to_arrays(snapshot[0]))
        items: dict[str, Any] = {"params": ocp.args.StandardSave(params), "progress": ocp.args.JsonSave(progress)}
        if optimizer is not None:
            items["optimizer"] = ocp.args.StandardSave(_nested(snapshot[1]))
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:  # TensorStore raises many types
            raise self._failure(error) from None

    def check(self) -> None:
        """Raises CheckpointError when a save in the background has failed."""
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until no save is under way. Raises CheckpointError when the last one failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # TensorStore raises many types
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
        """Returns the newest checkpoint in the stacked layout. params, optimizer: abstract arrays with the shapes,
        dtypes and shardings that the arrays are to have.

        Raises CheckpointError when there is no checkpoint, or it can't be read.
        """
        step = self._newest()
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(_nested(params)),
            optimizer=ocp.args.StandardRestore(_nested(optimizer)),
            progress=ocp.args.JsonRestore(),
        )
        return Restored(step, _flat(items["params"]), _flat(items["optimizer"]), items["progress"])

    def newest_params(self) -> StoredParams:
        """Opens the parameters of the newest checkpoint, which can be read one by one. Raises CheckpointError when
        there is no checkpoint."""
        return StoredParams(self._path / str(self._newest()))

    def progress(self) -> dict:
        """Returns the progress that the newest checkpoint holds. Raises CheckpointError when there is no checkpoint, or
        it can't be read."""
        return self._restore(self._newest(), progress=ocp.args.JsonRestore())["progress"]

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # TensorStore raises many types
            raise _unreadable(self._path / str(step), error) from error

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


class StoredParams:
    """The parameters of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array by its path. Raises CheckpointError when the checkpoint can't be read."""
        try:
            tree = self._reader.metadata(self._folder / "params").item_metadata.tree
            return {path: tuple(found.shape) for path, found in flatten_dict(tree, sep="/").items()}
        except Exception as error:  # TensorStore raises many types
            raise _unreadable(self._folder, error) from error

    def check(self, wanted: Params) -> None:
        """Raises CheckpointError naming an array that is missing, has another shape than `wanted` gives it, or isn't in
        `wanted`."""
        for path in sorted(wanted.keys() | self.shapes.keys()):
            held, shape = self.shapes.get(path), wanted[path].shape if path in wanted else None
            if held != shape:
                said = "is missing" if held is None else f"has the shape {list(held)}"
                made = "is none of the model's" if shape is None else f"is {list(shape)} in the model"
                raise CheckpointError(
                    f"{self._folder} can't be read as a checkpoint of this model: {path} {said}, and {made}"
                )

    def read(self, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        """Reads one array with the dtype and the sharding of `leaf`. Raises CheckpointError when it can't be read."""
        item = unflatten_dict({path: leaf}, sep="/")
        arguments = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        try:
            return flatten_dict(self._reader.restore(self._folder / "params", args=arguments), sep="/")[path]
        except Exception as error:  # TensorStore raises many types
            raise _unreadable(self._folder, error) from error


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder} can't be read as a checkpoint of this model: {_reason(error)}; where it is damaged, delete it to go "
        "on from the one before"
    )


def _reason(error: Exception) -> str:
    """The error in one line: the operating system's message where TensorStore quotes its code, else the first line."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


@jax.jit
def _snapshot(tree: Any) -> Any:
    """Copies the tree to new buffers in the stacked layout, so that the next step can't overwrite them while they are
    being written."""
    return jax.tree.map(jnp.copy, stack_params(tree))


def _nested(tree: Any) -> Any:
    """Returns `tree` with each dict of parameters by path as nested dicts, which is the form on disk."""
    return jax.tree.map(
        lambda node: unflatten_dict(node, sep="/") if is_params(node) else node, tree, is_leaf=is_params
    )


def _flat(tree: Any) -> Any:
    """The inverse of `_nested`."""

    def is_nested(node: Any) -> bool:
        return isinstance(node, dict) and "blocks" in node

    return jax.tree.map(lambda node: flatten_dict(node, sep="/") if is_nested(node) else node, tree, is_leaf=is_nested)


@dataclass(frozen=True)
class CheckpointSource:
    """A source of the newest parameters in a model folder of ours. Each stored array is read separately."""

    folder: Path
    config: ModelConfig
    mesh: Mesh

    def __post_init__(self) -> None:
        """Raises ConfigError when the folder holds no checkpoints."""
        if not (self.folder / FOLDER).is_dir():
            raise ConfigError(f"{self.folder} holds no {FOLDER}/: is it a folder that `isthmus train` wrote?")

    @cached_property
    def _params(self) -> StoredParams:
        checkpoints = Checkpoints(self.folder)
        try:
            _check_made_by(self.config, checkpoints.progress(), self.folder)
            return checkpoints.newest_params()
        finally:
            checkpoints.close()

    @cached_property
    def _stored(self) -> Params:
        return quantization.abstract_stored(self.config, self.mesh)

    @property
    def nbytes(self) -> int:
        """The size of all stored arrays in bytes."""
        return sum(map(_nbytes, self._stored.values()))

    def reads(self, abstract: Params) -> Iterator[Read]:
        """Yields one read for each array, and one for the two arrays of each quantized matrix."""
        self._params.check(self._stored)
        together: dict[str, dict[str, str]] = {}
        for path in self._stored:
            matrix, part = quantization.parts_of_integers(path) or (path, "")
            together.setdefault(matrix, {})[part] = path
        for matrix, parts in together.items():
            size = sum(_nbytes(self._stored[path]) for path in parts.values())
            yield Read(size, partial(self._read, matrix, parts, abstract))

    def _read(self, matrix: str, parts: Mapping[str, str], abstract: Params) -> Params:
        """Reads one stored array, or the parts of one quantized matrix, as parameters in the layout of `abstract`.

        matrix: the stored path. parts: the path of each part by its name; an array that isn't quantized is a single
        part named "".
        """
        paths = [matrix] if matrix in abstract else [path for path, _ in unstack(matrix, None)]
        arrays = {part: self._params.read(path, self._stored[path]) for part, path in parts.items()}
        if "" in parts:
            return dict(zip(paths, _layers(arrays[""], [abstract[path] for path in paths]), strict=True))
        specs, formats = parameter_specs(self.config), quantization.formats(self.config, self.config.quantization)
        layers = {part: _layers(array, [_layer_of(array, len(paths))] * len(paths)) for part, array in arrays.items()}
        return {
            path: quantization.from_parts(specs[path], formats[path], {part: layers[part][i] for part in layers})
            for i, path in enumerate(paths)
        }


def _layers(array: jax.Array, leaves: Sequence[jax.ShapeDtypeStruct]) -> Sequence[jax.Array]:
    """Returns the layers of a stored array, or the array alone where it has the shape of the only leaf, in the dtypes
    and the shardings of `leaves`. Numbers are rounded exactly as training rounds them when it multiplies in such a
    dtype."""
    stacked = array.shape != leaves[0].shape
    return _program(stacked, leaves[0].dtype, tuple(leaf.sharding for leaf in leaves))(array)


@lru_cache(maxsize=64)
def _program(stacked: bool, dtype: np.dtype, shardings: tuple[Sharding, ...]) -> Callable[[jax.Array], Any]:
    def convert(array: jax.Array) -> list[jax.Array]:
        narrow = partial(narrowed, dtype=dtype)
        return list(jax.vmap(narrow)(array)) if stacked else [narrow(array)]

    return jax.jit(convert, out_shardings=list(shardings))


def _layer_of(array: jax.Array, layers: int) -> jax.ShapeDtypeStruct:
    """Describes one of the `layers` layers of a stored array, sharded as the array is. An array that isn't stacked is
    described whole."""
    sharding = array.sharding
    if array.ndim == 2:
        assert layers == 1, array.shape
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    assert isinstance(sharding, NamedSharding), sharding
    spec = PartitionSpec(*sharding.spec[1:])
    return jax.ShapeDtypeStruct(array.shape[1:], array.dtype, sharding=NamedSharding(sharding.mesh, spec))


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize


def _check_made_by(config: ModelConfig, progress: Any, folder: Path) -> None:
    """Raises CheckpointError where the rules in config.json differ from those that the integers were made by, because
    the same bytes would then mean other numbers."""
    made_by = progress.get(QUANTIZATION, []) if isinstance(progress, dict) else None
    if made_by != list(config.quantization):
        said = ", ".join(map(str, made_by)) if isinstance(made_by, list) else ""
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization isn't what the integers were made by, which is "
            f"{said or 'not known'}; put it back, or convert the model that it was made from again"
        )
