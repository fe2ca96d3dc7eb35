"""Files that keep a model's tensors in another layout than it was first published in."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file

from isthmus.errors import ConfigError
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.huggingface.export import stored_dtypes, write_weights
from isthmus.model.weights.huggingface.files import SINGLE, TensorFiles
from tests.model.weights.huggingface.folders import write_folder, write_tensors
from tests.parity.families import GOLDEN
from tests.parity.weights import family_tensors

PEERS = Path(__file__).resolve().parents[4] / ".venv-peers" / "bin" / "python"
SPARSE = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v2_groups", "deepseek_v3")
_EXPERT = re.compile(r"(model\.layers\.\d+)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(w[123]|\w+_proj)\.weight")


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As transformers 5 has them in memory: gate over up, and down, each of all experts [experts, outputs, inputs]."""
    kept: dict[str, np.ndarray] = {}
    experts: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(match[3], match[3])
            experts.setdefault(match[1], {}).setdefault(part, {})[int(match[2])] = tensor
        else:
            kept[name.replace("block_sparse_moe.gate", "mlp.gate")] = tensor
    for layer, parts in experts.items():
        gate, up, down = (
            np.stack([parts[part][i] for i in range(len(parts[part]))])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        kept[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        kept[f"{layer}.mlp.experts.down_proj"] = down
    return kept


def load(folder: Path, mesh: Mesh) -> Any:
    return open_folder(folder).load_params(mesh)


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("family", SPARSE)
def test_fused_experts_are_the_same_parameters(family: str, mesh: Mesh, tmp_path: Path) -> None:
    """What transformers 5 writes with save_original_format=False, and some publish."""
    plain = load(write_folder(tmp_path / "plain", family), mesh)
    folder = write_folder(tmp_path / "fused", family)
    write_tensors(folder, fused(family_tensors(GOLDEN / family)))
    assert_same(load(folder, mesh), plain)


def test_a_fused_folder_is_written_in_the_published_layout(mesh: Mesh, tmp_path: Path) -> None:
    """With each tensor's own dtype, also of one that has another name there."""
    tensors = family_tensors(GOLDEN / "mixtral")
    narrow = {
        name: array if name.endswith("gate.weight") else array.astype(np.float16) for name, array in tensors.items()
    }
    folder = write_folder(tmp_path / "fused", "mixtral")
    write_tensors(folder, fused(narrow))
    opened = open_folder(folder)
    assert opened.family is not None
    params = opened.load_params(mesh)
    (tmp_path / "written").mkdir()
    dtypes = stored_dtypes(TensorFiles(folder))
    write_weights(tmp_path / "written", opened.family, opened.config, params, dtypes, 1 << 30)
    written = load_file(tmp_path / "written" / SINGLE)
    assert {name: (array.dtype, array.shape) for name, array in written.items()} == {
        name: (array.dtype, array.shape) for name, array in narrow.items()
    }
    assert all(np.array_equal(written[name], narrow[name]) for name in narrow)


def test_half_a_fused_layer_is_named(mesh: Mesh, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "qwen3_moe")
    tensors = fused(family_tensors(GOLDEN / "qwen3_moe"))
    name = "model.layers.1.mlp.experts.down_proj"
    write_tensors(folder, {other: array for other, array in tensors.items() if other != name})
    with pytest.raises(ConfigError, match=re.escape(name) + " is missing"):
        load(folder, mesh)
    write_tensors(folder, {**tensors, name: np.ascontiguousarray(tensors[name].transpose(0, 2, 1))})
    with pytest.raises(ConfigError, match=re.escape(name) + r" has the shape \[8, 20, 40\].*makes it \[8, 40, 20\]"):
        load(folder, mesh)


@pytest.mark.peers
def test_what_transformers_writes_fused(mesh: Mesh, tmp_path: Path) -> None:
    """The layout above is transformers' own."""
    if not PEERS.is_file():
        pytest.skip("no .venv-peers: `make peers` builds it")
    folders = [write_folder(tmp_path / family, family) for family in SPARSE]
    script = Path(__file__).resolve().parents[3] / "parity" / "save_fused.py"
    subprocess.run([PEERS, script, tmp_path / "written", *folders], check=True, timeout=300)
    for folder in folders:
        written = tmp_path / "written" / folder.name
        assert any(name.endswith("experts.gate_up_proj") for name in TensorFiles(written).tensors)
        shutil.copyfile(folder / "tokenizer.json", written / "tokenizer.json")
        assert_same(load(written, mesh), load(folder, mesh))


def test_one_file_goes_before_several(mesh: Mesh, tmp_path: Path) -> None:
    """As in transformers, which doesn't look for an index where there is a whole file: one of the two is left over."""
    folder = write_folder(tmp_path, "llama3", shards=2)
    tensors = family_tensors(GOLDEN / "llama3")
    write_tensors(folder, {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1})
    got = np.asarray(load(folder, mesh)["norm/scale"])
    np.testing.assert_array_equal(got, tensors["model.norm.weight"] + 1)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "qwen3"])
def test_a_tied_head_that_is_stored_too(family: str, mesh: Mesh, tmp_path: Path) -> None:
    """Training code often saves the head beside the embedding. The same numbers, in whatever dtype, are no other model;
    different ones are, and transformers would use them."""
    plain = load(write_folder(tmp_path / "plain", family), mesh)
    tensors = family_tensors(GOLDEN / family)
    embedding = tensors["model.embed_tokens.weight"]
    folder = write_folder(tmp_path / "both", family)
    for same in (embedding.copy(), embedding.astype(np.float64)):
        write_tensors(folder, {**tensors, "lm_head.weight": same})
        assert_same(load(folder, mesh), plain)
    for other in (embedding + 1, np.zeros_like(embedding), embedding[:-1].copy(), embedding.T.copy()):
        write_tensors(folder, {**tensors, "lm_head.weight": other})
        with pytest.raises(ConfigError, match=r"set tie_word_embeddings to false .* or delete the tensor"):
            load(folder, mesh)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    write_tensors(folder, {**tensors, "lm_head.weight": embedding + 1})
    head = np.asarray(load(folder, mesh)["head"])
    np.testing.assert_array_equal(head, (embedding + 1).T)


def test_an_untied_head_that_is_missing(mesh: Mesh, tmp_path: Path) -> None:
    """The other way around: the default of most families is a head of its own."""
    folder = write_folder(tmp_path, "llama3", tie_word_embeddings=None)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is missing; if the head is the embedding, set tie_word"):
        load(folder, mesh)
