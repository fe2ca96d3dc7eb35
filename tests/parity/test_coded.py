"""Folders of codes mean to us what they mean to the libraries that define them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.huggingface.coded.files import open_tensors
from tests.model.weights.huggingface.coded_folders import Kind, compressed, fp8, write_coded, write_mxfp4
from tests.parity.test_families import TOLERANCE, _logits, batch_of
from tests.support import relative_error

pytestmark = pytest.mark.peers

PEERS = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"
SCRIPT = Path(__file__).with_name("check_coded.py")
EVEN = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
"""transformers finds a tile's size by dividing"""


def ask(*arguments: object) -> None:
    if not PEERS.exists():
        pytest.skip("no .venv-peers: `make peers` builds it")
    subprocess.run([PEERS, SCRIPT, *map(str, arguments)], check=True)


@pytest.mark.parametrize("case", ["fp8", "mxfp4"])
def test_logits_are_transformers_dequantized(case: str, mesh: Mesh, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if case == "fp8":
        write_coded(path, "llama3", fp8((16, 16)), **EVEN)
    else:
        write_mxfp4(path)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 24))
    np.save(tmp_path / "tokens.npy", tokens)
    ask(path, tmp_path / "tokens.npy", tmp_path / "logits.npy")
    folder = open_folder(path)
    got = np.asarray(_logits(folder.config)(folder.load_params(mesh), batch_of(tokens, [24, 24])))
    assert relative_error(got, np.load(tmp_path / "logits.npy")) <= TOLERANCE


COMPRESSED: dict[str, Kind] = {
    "int4 groups": compressed(4, "group", group=8),
    "int4 groups, zeros": compressed(4, "group", group=8, symmetric=False),
    "int4 channels, zeros": compressed(4, "channel", symmetric=False),
    "int8 packed": compressed(8, "group", group=8),
    "int3 packed": compressed(3, "group", group=8),
    "int8 channels": compressed(8, "channel", packed=False),
    "float channels": compressed(8, "channel", packed=False, kind="float"),
    "float blocks": compressed(8, "block", packed=False, kind="float", block=(8, 8)),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_matrices_are_those_of_compressed_tensors(case: str, tmp_path: Path) -> None:
    """To the bit: a product of an integer and a scale is rounded once."""
    if not PEERS.exists() or subprocess.run([PEERS, "-c", "import compressed_tensors"], capture_output=True).returncode:
        pytest.skip("no compressed-tensors in .venv-peers: remove the folder, and `make peers` builds it anew")
    folder, _ = write_coded(tmp_path / "model", "llama3", COMPRESSED[case])
    ask("--compressed", folder, tmp_path / "out.npz")
    opened = open_folder(folder)
    assert opened.family is not None
    files = open_tensors(folder, opened.family.method)
    for name, wanted in np.load(tmp_path / "out.npz").items():
        np.testing.assert_array_equal(files.array(name), wanted, err_msg=name)
