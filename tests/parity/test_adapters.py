"""Adapters go both ways: PEFT computes ours as we do, and we its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import save_file

from isthmus.errors import ConfigError
from isthmus.model.config import LoraConfig
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights.folder import ModelFolder, open_folder
from isthmus.model.weights.huggingface.adapters import load_adapter, save_adapter
from isthmus.model.weights.lora import split
from tests.parity.weights import family_tensors
from tests.support import forward, merged, random_params, relative_error

pytestmark = pytest.mark.peers

PEERS = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"
SCRIPT = Path(__file__).with_name("check_adapter.py")
GOLDEN = Path(__file__).with_name("golden")
TOLERANCE = 2e-5
"""Of the Euclidean norm of all logits"""

TARGETS = {
    "llama3": r"attention/(query|key|value|out)|mlp/(gate|up|down)",
    "phi3": r"attention/(query|value|out)|mlp/(gate|up|down)",
    "qwen3_moe": r"attention/(query|key|value|out)|mlp/(gate|up|down)",
    "gemma3": r"attention/(query|value)|mlp/up",
    "deepseek_v2": r"attention/(query|latent|out)|mlp/shared/(gate|up|down)",
    "deepseek_v3": r"attention/(query|query_down|latent|out)|mlp/(shared/)?(gate|up|down)",
}
THEIRS = {
    "llama3": "all-linear",
    "phi3": "all-linear",
    "qwen3_moe": "q_proj,k_proj,v_proj,o_proj",
    "gemma3": "all-linear",
    "deepseek_v2": "q_proj,kv_a_proj_with_mqa,o_proj",
    "deepseek_v3": "q_a_proj,q_b_proj,kv_a_proj_with_mqa,o_proj",
}


@pytest.fixture
def published(tmp_path: Path) -> Callable[[str], ModelFolder]:
    """Writes a tiny model of a family to tmp_path/FAMILY and opens it."""
    if not PEERS.is_file():
        pytest.skip("no .venv-peers: `make peers` builds it")

    def make(family: str) -> ModelFolder:
        folder = tmp_path / family
        folder.mkdir()
        shutil.copyfile(GOLDEN / family / "config.json", folder / "config.json")
        save_file(family_tensors(GOLDEN / family), folder / "model.safetensors", {"format": "pt"})
        Tokenizer.train(["a tiny tokenizer"], 257).save(folder / "tokenizer.json")
        return open_folder(folder)

    return make


def some_tokens(base: ModelFolder) -> np.ndarray:
    """Few enough that longrope keeps to its short factors."""
    return np.random.default_rng(0).integers(3, base.config.vocab_size, (2, 20)).astype(np.int32)


def peft_logits(base: ModelFolder, adapter: Path, *options: str) -> np.ndarray:
    tokens, out = adapter.with_suffix(".tokens.npy"), adapter.with_suffix(".logits.npy")
    np.save(tokens, some_tokens(base))
    subprocess.run([PEERS, SCRIPT, base.path, adapter, tokens, out, *options], check=True, timeout=300)
    return np.load(out)


@pytest.mark.parametrize("merge", [False, True], ids=["beside", "merged"])
@pytest.mark.parametrize("family", TARGETS)
def test_peft_computes_our_adapter(
    family: str, merge: bool, published: Callable[[str], ModelFolder], mesh: Mesh, tmp_path: Path
) -> None:
    """What was trained here goes on anywhere that reads PEFT's layout."""
    base, adapter = published(family), tmp_path / "adapter"
    lora = LoraConfig(3, 5.0, TARGETS[family])
    config = dataclasses.replace(base.config, lora=lora)
    params = {**base.load_params(mesh), **split(config, random_params(config, mesh))[1]}
    save_adapter(adapter, base, config, params)
    theirs = peft_logits(base, adapter, *(["--merge"] if merge else []))
    if merge:
        config, params = merged(config, params)
    ours = forward(config, params, some_tokens(base))
    assert relative_error(ours, theirs) <= TOLERANCE
    plain = forward(base.config, base.load_params(mesh), some_tokens(base))
    assert relative_error(plain, theirs) > 0.1, "the comparison says nothing: the adapter does nothing"


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("family", THEIRS)
def test_we_compute_pefts_adapter(
    family: str, rslora: bool, published: Callable[[str], ModelFolder], mesh: Mesh, tmp_path: Path
) -> None:
    """An adapter that somebody published, served here, gives what its author saw."""
    base, adapter = published(family), tmp_path / "adapter"
    theirs = peft_logits(
        base, adapter, "--make", "4", THEIRS[family], "--alpha", "6", *(["--rslora"] if rslora else [])
    )
    folder = open_folder(adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["use_rslora"] == rslora
    ours = forward(folder.config, folder.load_params(mesh), some_tokens(base))
    assert relative_error(ours, theirs) <= TOLERANCE
    ours = forward(base.config, folder.load_params(mesh, merge_adapter=True), some_tokens(base))
    assert relative_error(ours, theirs) <= TOLERANCE
    plain = forward(base.config, base.load_params(mesh), some_tokens(base))
    assert relative_error(plain, theirs) > 0.1, "the comparison says nothing: the adapter does nothing"


def test_experts_that_peft_adapted_are_refused(published: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    """An adapter's share of the experts can't be computed here, and leaving it out would be another model."""
    base = published("qwen3_moe")
    peft_logits(base, tmp_path / "adapter", "--make", "4", "q_proj,gate_proj,up_proj,down_proj")
    with pytest.raises(ConfigError, match=r"the tensor .*mlp\.experts\..* is no part of an adapter that is supported"):
        open_folder(tmp_path / "adapter")


def test_an_adapter_comes_back_from_peft_as_it_was(
    published: Callable[[str], ModelFolder], mesh: Mesh, tmp_path: Path
) -> None:
    """Loading a published adapter and saving it again gives PEFT the same one."""
    base = published("phi3")
    theirs = peft_logits(base, tmp_path / "adapter", "--make", "4", THEIRS["phi3"])
    folder = open_folder(tmp_path / "adapter")
    save_adapter(tmp_path / "again", base, folder.config, folder.load_params(mesh))
    np.testing.assert_array_equal(peft_logits(base, tmp_path / "again"), theirs)
    first, second = (load_adapter(tmp_path / name, base) for name in ("adapter", "again"))
    assert first[0] == second[0]
