"""Reading weights: what is placed on a device must not change when the next one is read, or when the file goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.huggingface.files import TensorFiles
from isthmus.model.weights.huggingface.load import _fetch, parts_of
from tests.model.weights.huggingface.folders import loaded, write_folder, write_tensors
from tests.parity.families import GOLDEN
from tests.parity.weights import family_tensors

ROUTER = "block_sparse_moe.gate.weight"


def one_expert(folder: Path, dtype: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """A mixture of one expert, and its tensors: its router's kernel [dim, 1] is the tensor [1, dim], turned."""
    write_folder(folder, "mixtral", num_local_experts=1, num_experts_per_tok=1)
    kept = {
        name: (array[:1] if name.endswith(ROUTER) else array).astype(dtype)
        for name, array in family_tensors(GOLDEN / "mixtral").items()
        if ".experts." not in name or ".experts.0." in name
    }
    write_tensors(folder, kept)
    return folder, kept


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_a_device_may_take_as_it_is_has_memory_of_its_own(dtype: Any, tmp_path: Path) -> None:
    """A CPU device keeps a contiguous array where it is. In the mapped file it would change with the file; in memory
    that the next tensor is written over, one layer's router would silently become another's."""
    path, tensors = one_expert(tmp_path / "model", dtype)
    folder, files = open_folder(path), TensorFiles(path)
    assert folder.family is not None
    table, shape = folder.family.table(folder.config), (folder.config.dim, 1)
    whole = (slice(0, shape[0]), slice(0, 1))

    def fetch(layer: int) -> np.ndarray:
        parts = parts_of(folder.config, table, f"blocks/{layer}/mlp/router/linear/kernel", shape)
        return _fetch(files, folder.config, parts, np.dtype(np.float32), whole)

    first, second = fetch(0), fetch(1)
    assert first.flags.c_contiguous and second.flags.c_contiguous, "nothing that a device may take was tried"
    for layer, got in enumerate((first, second)):
        name = f"model.layers.{layer}.{ROUTER}"
        assert not np.shares_memory(got, files.array(name))
        np.testing.assert_array_equal(got, tensors[name].astype(np.float32).T)
    assert not np.shares_memory(first, second)


def test_a_mixture_of_one_expert_is_read_whole(mesh: Mesh, tmp_path: Path) -> None:
    """As above, through the loader."""
    path, tensors = one_expert(tmp_path / "model", ml_dtypes.bfloat16)
    params = loaded(path, mesh)
    for layer in range(open_folder(path).config.layers):
        got = params[f"blocks/{layer}/mlp/router/linear/kernel"]
        np.testing.assert_array_equal(got, tensors[f"model.layers.{layer}.{ROUTER}"].astype(np.float32).T)
