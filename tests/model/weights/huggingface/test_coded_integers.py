"""What our own formats hold exactly of a folder of codes stays integers where it is served."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.errors import ConfigError
from isthmus.model.ops.quantized import Quantized
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.weights.folder import ModelFolder
from isthmus.model.weights.quantization import Format, formats, matrices
from isthmus.serve.engine.build import abstract_served, open_model
from tests.model.weights.huggingface.coded_folders import (
    Kind,
    compressed,
    fp8,
    stored,
    write_coded,
    write_plain,
)
from tests.model.weights.huggingface.folders import loaded, write_tensors

WHOLE: dict[str, tuple[Kind, int]] = {
    "int8 channels": (compressed(8, "channel", packed=False), 14),
    "int8 a matrix": (compressed(8, "tensor", packed=False), 14),
    "int4 groups": (compressed(4, "group", group=32), 14),
    "int4 groups, zeros": (compressed(4, "group", group=32, symmetric=False), 0),
    "int4 groups in another order": (compressed(4, "group", group=32, order=True), 0),
    "fp8": (fp8((16, 24)), 0),
}


def served(folder: Path, quantize: str = "none") -> ModelFolder:
    return open_model(folder, "float32", quantize=quantize)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", WHOLE)
def test_what_our_formats_hold_stays_integers(case: str, tp: int, tmp_path: Path) -> None:
    """To the bit, and the start says how many did; the shapes that programs are compiled for are those that come."""
    kind, count = WHOLE[case]
    mesh = build_mesh(MeshShape(tp=tp))
    folder, plain = write_coded(tmp_path / "model", "llama3", kind)
    model = served(folder)
    assert len(model.kept_integers) == count
    said = f"{count} matrices stay integers" if count else "14 are turned back into floats as they are read"
    assert said in model.remarks[-1]
    params, wanted = model.load_params(mesh), loaded(write_plain(tmp_path / "plain", folder, plain), mesh)
    if tp == 1:
        abstract = abstract_served(model, mesh)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
            lambda x: (x.shape, x.dtype), params
        )
    found = 0
    for path, spec in matrices(model.config).items():
        weight, expected = params[path], wanted[path]
        if isinstance(weight, Quantized):
            found += 1
            weight, expected = weight.dequantize(), spec.as_matrix(expected)
        np.testing.assert_array_equal(np.asarray(weight), np.asarray(expected), err_msg=path)
    assert found == count


def test_integers_that_are_served_fit_in_their_bits(mesh: Mesh, tmp_path: Path) -> None:
    """100 in 4 bits would be served as 4, and is refused as it is where it's read as floats."""
    wide = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    folder, _ = write_coded(tmp_path / "model", "llama3", compressed(4, "group", group=32, packed=False), **wide)
    tensors, name = stored(folder), "model.layers.1.mlp.down_proj.weight"
    tensors[name] = np.full_like(tensors[name], 100)
    write_tensors(folder, tensors)
    model = served(folder)
    assert model.kept_integers
    with pytest.raises(ConfigError, match=rf"{name} holds integers outside -8\.\.7, .*damaged"):
        model.load_params(mesh)


def test_fused_and_reordered_matrices_stay_integers(mesh: Mesh, tmp_path: Path) -> None:
    """Of one tensor, the queries' rows are one matrix, the keys' another; rotary pairs are put in our order."""
    for family in ("phi3", "deepseek_v3"):
        folder, plain = write_coded(tmp_path / family, family, compressed(8, "channel", packed=False))
        model = served(folder)
        assert len(model.kept_integers) >= 8
        other = loaded(write_plain(tmp_path / f"{family} plain", folder, plain), mesh)
        params = model.load_params(mesh)
        for path in model.kept_integers:
            assert isinstance(params[path], Quantized)
            expected = matrices(model.config)[path].as_matrix(other[path])
            np.testing.assert_array_equal(params[path].dequantize(), expected)


def test_fewer_bits_are_made_where_they_are_asked_for(tmp_path: Path) -> None:
    """--quantize never adds bits to what is integers already, and takes some from it."""
    folder, _ = write_coded(tmp_path / "int8", "llama3", compressed(8, "channel", packed=False))
    assert len(served(folder, "int8").kept_integers) == 14
    assert len(served(folder, "int4").kept_integers) == 0
    folder, _ = write_coded(tmp_path / "int4", "llama3", compressed(4, "group", group=32))
    for scheme in ("int8", "int4"):
        model = served(folder, scheme)
        chosen = formats(model.config, model.quantize)
        assert len(model.kept_integers) == 14 and {chosen[path] for path in model.kept_integers} == {
            Format(4, 32, rotated=False)
        }
        assert chosen["embedding"] == Format(8, 32)
