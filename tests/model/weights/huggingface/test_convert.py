"""From a published folder to ours and back, bit for bit; and what was trained here, into a folder that others read."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.commands.main import main
from isthmus.errors import ConfigError
from isthmus.model.config import PRESETS, MixtureConfig, ModelConfig
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.transformer import Params, abstract_params
from isthmus.model.weights.checkpoint import Checkpoints
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.huggingface.export import published_config, stored_dtypes, write_weights
from isthmus.model.weights.huggingface.families import read_config
from isthmus.model.weights.huggingface.files import TensorFiles
from isthmus.model.weights.huggingface.load import PublishedSource
from isthmus.model.weights.layout import stack_params
from isthmus.model.weights.load import load_params
from tests.model.weights.huggingface.folders import loaded, write_folder
from tests.model.weights.test_hub import adapter as write_adapter
from tests.parity.families import golden, others_slow, published
from tests.support import TINY, as_kept, forward, largest_file, on_host, random_params, relative_error

PEERS_PYTHON = Path(__file__).parents[4] / ".venv-peers" / "bin" / "python"


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    files = TensorFiles(folder)
    return {name: np.array(files.array(name)) for name in files.tensors}


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("family", others_slow("deepseek_v3", "gemma3", "gpt_oss", "mixtral", "phi4"))
def test_every_family_comes_back_bit_for_bit(family: str, mesh: Mesh, tmp_path: Path) -> None:
    """A converted model that is off by one bit in one tensor can't be told from one that was tampered with."""
    source = write_folder(tmp_path / "bf16", family, dtype=ml_dtypes.bfloat16)
    kind, config = read_config(source / "config.json")
    params = loaded(source, mesh)
    target = tmp_path / "back"
    target.mkdir()
    write_weights(target, kind, config, params, stored_dtypes(TensorFiles(source)), 60_000)
    assert (target / "model.safetensors.index.json").is_file(), "no sharded file was tried"
    assert_same_bits(tensors_of(target), tensors_of(source))


def test_the_command_goes_there_and_back(tmp_path: Path) -> None:
    """Experts and reordered heads through the whole command, with all that travels beside weights."""
    source = write_folder(tmp_path / "source", "deepseek_v3", dtype=ml_dtypes.bfloat16, shards=3)
    correction = "model.layers.1.mlp.gate.e_score_correction_bias"
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(source), str(ours)]) == 0
    assert main(["convert", str(ours), str(back), "--max-shard-gb", "0.0001"]) == 0
    assert_same_bits(tensors_of(back), tensors_of(source))
    assert correction in tensors_of(back)
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    folder = open_folder(ours)
    assert folder.family is None and folder.tokenizer.eos_ids == {3, 5} and folder.chat is not None
    assert open_folder(back).config == open_folder(source).config == folder.config


@pytest.mark.parametrize("family", others_slow("deepseek_v3", "gpt_oss", "phi3"))
def test_an_export_in_bfloat16_serves_the_weights_of_its_checkpoint(family: str, mesh: Mesh, tmp_path: Path) -> None:
    """What was trained in float32 becomes bfloat16 in two places, and must become the same model. Norms, which serving
    keeps in float32, are bfloat16 in such a file."""
    kind, config = read_config(write_folder(tmp_path / "source", family) / "config.json")
    params = random_params(config, mesh)
    write_weights(tmp_path, kind, config, params, {"": "BF16"}, 1 << 30)
    source = PublishedSource(TensorFiles(tmp_path), kind, config, mesh)
    exported = load_params(source, abstract_params(config, mesh, dtype="bfloat16"))
    served, kinds = as_kept(config, mesh, params, "bfloat16"), set()
    assert exported.keys() == served.keys()
    for path, got in exported.items():
        kinds.add(got.dtype.name)
        assert got.dtype == served[path].dtype
        if got.dtype == ml_dtypes.bfloat16:
            np.testing.assert_array_equal(np.asarray(got), np.asarray(served[path]), err_msg=path)
    assert kinds == {"float32", "bfloat16"}


COMPANIONS = [
    *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model", "spm.model", "tekken.json"),
    *("qwen.tiktoken", "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"),
    *("generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("LICENSE", "LICENSE.txt", "Notice", "USE_POLICY.md"),
]
"""As tokenizers, processors and converters of transformers, vLLM and llama.cpp look for them"""
LEFT = [
    *("tokenization_custom.py", "tokenizer.bin", "vocab.pkl", "tokenizer.pt", "modeling.py", "training_args.bin"),
    *("private_chats.json", "notes.txt", "quantize_config.json", "trainer_state.json", "README.md", ".hidden"),
    *("additional_chat_templates/run.py", "other/tokenizer.json"),
]
"""Code and pickles, what describes other weights, and what is nobody's business"""


def test_all_that_others_read_beside_weights_goes_along(tmp_path: Path) -> None:
    """Without its tokenizer.model llama.cpp can't convert a model; without its templates a chat is another one."""
    source = write_folder(tmp_path / "source", "llama3")
    for name in (*COMPANIONS, *LEFT):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "linked.model").symlink_to(source / "notes.txt")  # as in a cache of downloads
    (source / "huge.model").touch()
    os.truncate(source / "huge.model", 1 << 30)
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(source), str(ours)]) == 0
    assert main(["convert", str(ours), str(back)]) == 0
    own = {"config.json", "model.safetensors", "tokenizer.json"}
    files = {path.relative_to(back).as_posix() for path in back.rglob("*") if path.is_file()}
    assert files == {*COMPANIONS, "linked.model", *own}
    for name in COMPANIONS:
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_ours_written_anew_stays_what_it_was_made_from(tmp_path: Path) -> None:
    """Without the published config.json a model that is quantized, say, forgets what ends its texts and its family."""
    source = write_folder(tmp_path / "source", "llama3", dtype=ml_dtypes.bfloat16, eos_token_id=[5, 7])
    ours, again, back = tmp_path / "ours", tmp_path / "again", tmp_path / "back"
    assert main(["convert", str(source), str(ours)]) == 0
    assert main(["convert", str(ours), str(again), "--to", "isthmus"]) == 0
    assert main(["convert", str(again), str(back)]) == 0
    assert open_folder(again).tokenizer.eos_ids == open_folder(source).tokenizer.eos_ids == {5, 7}
    assert_same_bits(tensors_of(back), tensors_of(source))


@pytest.mark.parametrize("kind", ["huggingface", "isthmus"])
def test_a_merged_adapter_speaks_as_the_adapter_does(kind: str, tmp_path: Path) -> None:
    """An adapter brings the template that it was trained with: under its base model's a merged one answers worse."""
    base = write_folder(tmp_path / "base", "llama3")
    (base / "chat_template.jinja").write_text("base {{ messages[0].content }}")
    tuned = write_adapter(tmp_path / "tuned", str(base))
    (tuned / "chat_template.jinja").write_text("tuned {{ messages[0].content }}")
    (tuned / "tokenizer_config.json").write_text("{}")
    assert main(["convert", str(tuned), str(tmp_path / "merged"), "--to", kind]) == 0
    chat = open_folder(tmp_path / "merged").chat
    assert chat is not None and chat.render([{"role": "user", "content": "hi"}]) == "tuned hi"


def test_a_model_on_a_read_only_disk_is_read(tmp_path: Path) -> None:
    """Mounted into a container, of either kind: nothing may be written beside it, no lock and no folder."""
    source, ours, disk = write_folder(tmp_path / "source", "llama3"), tmp_path / "ours", tmp_path / "disk"
    assert main(["convert", str(source), str(ours)]) == 0
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        for folder in (source, ours):
            shutil.copytree(folder, disk / folder.name)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for name in ("source", "ours"):
            assert main(["convert", str(disk / name), str(tmp_path / f"of {name}")]) == 0
        assert_same_bits(tensors_of(tmp_path / "of ours"), tensors_of(source))
        assert main(["convert", str(source), str(disk / "new")]) == 2
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_nothing_is_overwritten_or_left_half_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that exists may be somebody's only copy; one that looks whole and isn't is worse than none."""
    source = write_folder(tmp_path / "source", "llama3")
    (tmp_path / "taken").mkdir()
    assert main(["convert", str(source), str(tmp_path / "taken")]) == 2
    assert "exists already" in capsys.readouterr().out
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    assert main(["convert", str(source), str(tmp_path / "new")]) == 2
    assert "not a whole safetensors file" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "taken"]


@pytest.mark.parametrize("options", [["--to", "huggingface"], ["--gguf", "f32"], ["--quantize", "int8", "--force"]])
def test_a_full_disk_is_one_line(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_folder(tmp_path / "source", "llama3")
    capsys.readouterr()
    with largest_file(2_000):
        assert main(["convert", str(source), str(tmp_path / "new"), *options]) == 2
    said = capsys.readouterr().out
    assert "File too large" in said and "None" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


EXPORTED = {
    "llama": dataclasses.replace(TINY, attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "mistral": dataclasses.replace(TINY, windows=(6,)),
    "qwen2": dataclasses.replace(TINY, attention_bias=True),
    "qwen3": dataclasses.replace(TINY, head_dim=16, qk_norm="head"),
    "olmo2": dataclasses.replace(TINY, qk_norm="projection", norm_placement="post"),
    "mixtral": dataclasses.replace(TINY, mlp_dim=24, mixture=MixtureConfig(4, 2, 24)),
    "qwen3_moe": dataclasses.replace(
        TINY, qk_norm="head", mixture=MixtureConfig(4, 2, 24, dense_layers=(0,), normalize=False)
    ),
}


@pytest.mark.parametrize("family", EXPORTED)
def test_a_network_of_ours_finds_its_family(family: str) -> None:
    """A model that was trained here must be readable by those who never heard of us."""
    assert published_config(EXPORTED[family])["model_type"] == family


@pytest.mark.parametrize("preset", [name for name, config in PRESETS.items() if config.vocab_size])
def test_every_preset_can_be_exported(preset: str) -> None:
    """A user who trains a preset for a week must not learn then that nobody else can read it."""
    assert published_config(PRESETS[preset])["model_type"] == "llama"


def test_a_network_of_no_family_is_said_to_be_so() -> None:
    """The nearest family would be another model."""
    with pytest.raises(ConfigError, match="no family"):
        published_config(dataclasses.replace(TINY, norm_placement="both", attention_sinks=True))


PLACED = {
    "deepseek_v3": MeshShape(fsdp=2, ep=3),
    "phi4": MeshShape(fsdp=2, tp=2),
    "gpt_oss": MeshShape(fsdp=2, tp=2, ep=2),
}
"""Each splits what it can: nine experts by three, fused projections by two, interleaved experts by two."""


@pytest.mark.parametrize("family", PLACED)
def test_placement_over_devices_changes_no_bit(family: str, mesh: Mesh) -> None:
    """Each device reads its own part of each tensor: a wrong slice is a wrong model on some meshes only."""
    folder = published(family)
    _, config = read_config(folder / "config.json")
    want = on_host(loaded(folder, mesh))
    devices = build_mesh(PLACED[family])
    got = loaded(folder, devices, stacked=True)
    layout = abstract_params(config, devices, stacked=True)
    assert jax.tree.all(jax.tree.map(lambda x, leaf: x.sharding == leaf.sharding, got, layout))
    jax.tree.map(np.testing.assert_array_equal, on_host(got), on_host(stack_params(want)))


def test_bfloat16_is_kept_or_widened(mesh: Mesh, tmp_path: Path) -> None:
    """Serving in bfloat16 must not pass through rounding twice; norms and routers stay float32."""
    source = write_folder(tmp_path, "qwen3_moe", dtype=ml_dtypes.bfloat16)
    wide, narrow = loaded(source, mesh), loaded(source, mesh, "bfloat16")
    assert narrow["blocks/1/mlp/gate/kernel"].dtype == "bfloat16"
    assert narrow["blocks/1/mlp/router/linear/kernel"].dtype == "float32"
    assert narrow["norm/scale"].dtype == "float32"
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b, np.float32)), wide, narrow)


def model_of_ours(folder: Path, config: ModelConfig, mesh: Mesh) -> Params:
    from isthmus.model.text.tokenizer import Tokenizer

    params = random_params(config, mesh, stacked=True)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, params, None, {"step": 1})
    checkpoints.close()
    config.save(folder / "config.json")
    Tokenizer.train(["a text"], 257).save(folder / "tokenizer.json")
    return params


def run_peers(script: str, *arguments: Any) -> None:
    if not PEERS_PYTHON.exists():
        pytest.fail("no .venv-peers: run `make peers`")
    command = [str(PEERS_PYTHON), str(Path(__file__).parents[3] / "parity" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.peers
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_transformers_reads_what_was_trained_here(family: str, mesh: Mesh, tmp_path: Path) -> None:
    """Loaded by AutoModelForCausalLM without a missing or surplus tensor, and with the same logits."""
    config = dataclasses.replace(EXPORTED[family], vocab_size=384)
    (tmp_path / "ours").mkdir()
    params = model_of_ours(tmp_path / "ours", config, mesh)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "exported"), "--max-shard-gb", "0.00005"]) == 0
    tokens = np.random.default_rng(0).integers(0, 384, (2, 20))
    np.save(tmp_path / "tokens.npy", tokens)
    run_peers("check_export.py", tmp_path / "exported", tmp_path / "tokens.npy", tmp_path / "logits.npy")
    assert relative_error(forward(config, params, tokens), np.load(tmp_path / "logits.npy")) < 2e-5
    described = json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())
    assert described["eos_token"] == "<|endoftext|>"


@pytest.mark.peers
@pytest.mark.parametrize("family", ["gpt_oss", "phi4", "deepseek_v3", "gemma3"])
def test_transformers_reads_what_came_from_its_layout(family: str, tmp_path: Path) -> None:
    """There and back through the command, then into transformers: config.json and index must be right too."""
    source = write_folder(tmp_path / "source", family)
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--max-shard-gb", "0.0001"]) == 0
    want = golden(family)
    np.save(tmp_path / "tokens.npy", want["tokens"][-1:])
    run_peers("check_export.py", tmp_path / "back", tmp_path / "tokens.npy", tmp_path / "logits.npy")
    assert relative_error(np.load(tmp_path / "logits.npy")[0], want["logits"][-1]) < 1e-6
