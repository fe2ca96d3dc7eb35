"""The models that every peer runs, as the scripts of benchmarks/peers write them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from isthmus.benchmarks.peers.make_gguf import exact
from isthmus.benchmarks.peers.rescale import rescale
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.weights.folder import open_folder
from tests.model.weights.huggingface.folders import write_folder, write_tensors
from tests.parity.families import GOLDEN
from tests.parity.weights import family_tensors
from tests.support import forward


@pytest.mark.parametrize(
    ("stated", "kind"),
    [({"dtype": "bfloat16"}, "bf16"), ({"torch_dtype": "float16"}, "f16"), ({"dtype": "float32"}, "f32"), ({}, "f32")],
)
def test_what_is_quantized_is_exactly_what_was_published(stated: dict[str, str], kind: str, tmp_path: Path) -> None:
    """float32 weights that went through a bfloat16 file would make llama.cpp's types look worse than they are."""
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert exact(tmp_path) == kind


@pytest.mark.parametrize("family", ["llama2", "gemma3"])
def test_off_its_grid_a_model_says_what_it_said(family: str, tmp_path: Path) -> None:
    """Every matrix of a layer changes, in each of its groups by many factors, and the function doesn't."""
    folder = write_folder(tmp_path / "model", family)
    before = {name: array.astype(np.float32) for name, array in family_tensors(GOLDEN / family).items()}
    after = {name: array.copy() for name, array in before.items()}
    rescale(json.loads((folder / "config.json").read_text()), after, np.random.default_rng(0))
    for name, array in before.items():
        if name.endswith("proj.weight"):
            factors = after[name] / array
            assert np.unique(np.round(factors[0], 4)).size > 4, name
            assert factors.min() > 0.6 and factors.max() < 1.6, name
    tokens = np.random.default_rng(1).integers(0, 64, (1, 24))
    said = []
    for tensors in (before, after):
        write_tensors(folder, tensors)
        opened = open_folder(folder)
        said.append(forward(opened.config, opened.load_params(build_mesh(MeshShape())), tokens))
    assert np.abs(said[1] - said[0]).max() < 1e-4 * np.abs(said[0]).max()
