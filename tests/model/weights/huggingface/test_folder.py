"""A folder that is damaged, hostile or not understood gives an error that says so, and never a wrong model."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.errors import ConfigError
from isthmus.model.weights.folder import GenerationDefaults, open_folder
from isthmus.model.weights.huggingface.files import INDEX, SINGLE
from tests.model.weights.huggingface.folders import write_folder, write_tensors
from tests.parity.families import GOLDEN
from tests.parity.weights import family_tensors


def load(folder: Path, mesh: Mesh) -> Any:
    return open_folder(folder).load_params(mesh)


def tensors(family: str = "llama3") -> dict[str, np.ndarray]:
    return family_tensors(GOLDEN / family)


def truncate(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) * 2 // 3])


def empty(folder: Path) -> None:
    (folder / SINGLE).write_bytes(b"")


def huge_header(folder: Path) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def long_header(folder: Path) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", 200_000_000) + b" " * 1000)


def header_of_lies(folder: Path) -> None:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [32], "data_offsets": [0, 1 << 40]}}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 128)


def overlapping(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 128)


def missing_tensor(folder: Path) -> None:
    write_tensors(folder, {n: t for n, t in tensors().items() if n != "model.layers.1.mlp.up_proj.weight"})


def surplus_tensor(folder: Path) -> None:
    write_tensors(folder, {**tensors(), "model.layers.0.self_attn.q_proj.bias": np.zeros(4, np.float32)})


def another_layer(folder: Path) -> None:
    all_of_them = tensors()
    write_tensors(folder, {**all_of_them, "model.layers.99.mlp.up_proj.weight": np.zeros((2, 2), np.float32)})


def wrong_shape(folder: Path) -> None:
    all_of_them = tensors()
    name = "model.layers.0.mlp.down_proj.weight"
    write_tensors(folder, {**all_of_them, name: np.ascontiguousarray(all_of_them[name].T)})


def not_a_number(folder: Path) -> None:
    all_of_them = tensors()
    all_of_them["model.layers.1.self_attn.k_proj.weight"][1, 2] = np.nan
    write_tensors(folder, all_of_them)


def infinite(folder: Path) -> None:
    all_of_them = tensors()
    all_of_them["model.embed_tokens.weight"][5, 0] = np.inf
    write_tensors(folder, all_of_them)


def integers(folder: Path) -> None:
    write_tensors(folder, {**tensors(), "model.norm.weight": np.ones(32, np.int8)})


def no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def bad_index(folder: Path, placed: Any) -> None:
    write_tensors(folder, tensors(), shards=2)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps(placed))


def path_out_of_the_folder(folder: Path) -> None:
    bad_index(folder, {"weight_map": {"model.norm.weight": "../secret.safetensors"}})


def absolute_path(folder: Path) -> None:
    bad_index(folder, {"weight_map": {"model.norm.weight": "/etc/model.safetensors"}})


def pickle_in_the_index(folder: Path) -> None:
    bad_index(folder, {"weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}})


def missing_shard(folder: Path) -> None:
    bad_index(folder, {"weight_map": {"model.norm.weight": "model-00007-of-00007.safetensors"}})


def index_of_lies(folder: Path) -> None:
    bad_index(
        folder,
        {
            "weight_map": {
                "model.norm.weight": "model-00001-of-00002.safetensors",
                "x": "model-00002-of-00002.safetensors",
            }
        },
    )


def index_is_a_list(folder: Path) -> None:
    bad_index(folder, ["model.norm.weight"])


def set_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def write_config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "not a whole safetensors file"),
    "empty": (empty, "not a whole safetensors file"),
    "huge header": (huge_header, "not a whole safetensors file"),
    "long header": (long_header, "not a whole safetensors file"),
    "offsets past the end": (header_of_lies, "not a whole safetensors file"),
    "overlapping tensors": (overlapping, "not a whole safetensors file"),
    "missing tensor": (missing_tensor, r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
    "surplus tensor": (surplus_tensor, r"q_proj\.bias is no part"),
    "surplus layer": (another_layer, r"layers\.99\..* is no part"),
    "wrong shape": (wrong_shape, r"down_proj\.weight has the shape"),
    "NaN": (not_a_number, r"layers\.1\.self_attn\.k_proj\.weight holds numbers that are not finite"),
    "infinity": (infinite, r"embed_tokens\.weight holds numbers that are not finite"),
    "integers": (integers, "stored as I8"),
    "no weights": (no_weights, "holds neither"),
    "pickle": (pickled, "a pickle, which can run code"),
    "path out of the folder": (path_out_of_the_folder, "is not the name of a .safetensors file"),
    "absolute path": (absolute_path, "is not the name of a .safetensors file"),
    "pickle in the index": (pickle_in_the_index, "is not the name of a .safetensors file"),
    "missing shard": (missing_shard, "00007-of-00007.safetensors does not exist"),
    "index of lies": (index_of_lies, "says that"),
    "a shard with a long name": (
        lambda folder: bad_index(folder, {"weight_map": {"x": "a" * 5000 + ".safetensors"}}),
        "'a{150,}….* is not the name of",
    ),
    "a shard with half a character": (
        lambda folder: bad_index(folder, {"weight_map": {"x": "\ud800.safetensors"}}),
        "can't be read as JSON",
    ),
    "a shard with a NUL": (
        lambda folder: bad_index(folder, {"weight_map": {"x": "a\0.safetensors"}}),
        "is not the name of",
    ),
    "index is a list": (index_is_a_list, "is not a JSON object"),
    "no such architecture": (set_config(model_type="mamba"), "model_type='mamba' is none of the known families"),
    "another class": (set_config(architectures=["LlamaForSequenceClassification"]), "architectures=.* is not"),
    "a field nobody knows": (set_config(attention_magic=3), "attention_magic=3 is not supported"),
    "quantized": (
        set_config(quantization_config={"quant_method": "hqq"}),
        "quant_method='hqq' is not supported.*dequantize",
    ),
    "an activation": (set_config(hidden_act="relu2"), "hidden_act='relu2' is none of"),
    "a list of activations": (set_config(hidden_act=["silu"]), r"hidden_act=\['silu'\] is none of"),
    "a rope": (set_config(rope_parameters={"rope_type": "dynamic"}), "rope_type='dynamic' is not supported"),
    "a rope's field": (
        set_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "twist": 2}),
        r"rope_parameters\.twist=2 is not supported.*--ignore-field rope_parameters\.twist",
    ),
    "half a rope": (set_config(rope_parameters={"rope_type": "yarn"}), r"the field rope_parameters\.factor is missing"),
    "a rope of words": (set_config(rope_parameters="linear"), "rope_parameters='linear' must be an object"),
    "text for a number": (set_config(hidden_size="32"), "hidden_size='32' must be a whole number"),
    "negative": (set_config(num_hidden_layers=-1), "num_hidden_layers=-1 must be a whole number, at least 1"),
    "too many layers": (set_config(num_hidden_layers=7), "num_hidden_layers=7, and the files hold 5 layers"),
    "heads that don't divide": (set_config(num_key_value_heads=3), "must be a multiple"),
    "a null": (set_config(vocab_size=None), "vocab_size=None must be a whole number"),
    "not JSON": (write_config("{'model_type': 'llama'}"), "can't be read as JSON"),
    "a JSON list": (write_config("[1]"), "is not a JSON object"),
    "deep JSON": (write_config("[" * 100_000), "can't be read as JSON"),
    "not UTF-8": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{") and None, "can't be read as UTF-8"),
    "a missing field": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 96}') and None,
        "the field .* is missing",
    ),
    "end ids": (set_config(eos_token_id="2"), "eos_token_id"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, mesh: Mesh, tmp_path: Path) -> None:
    """A model that is quietly wrong costs its user weeks; a stack trace from the depths costs an hour."""
    damage, message = DAMAGE[name]
    write_folder(tmp_path, "llama3")
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, mesh)


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_never_gives_another_model(seed: int, mesh: Mesh, tmp_path: Path) -> None:
    """Whatever byte of the header is hit: an error, or the very same tensors under the very same names."""
    write_folder(tmp_path, "llama3")
    data = bytearray((tmp_path / SINGLE).read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    names = set(tensors())
    rng = random.Random(seed)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(8 + size)] = rng.randrange(256)
        (tmp_path / SINGLE).write_bytes(damaged)
        try:
            from isthmus.model.weights.huggingface.files import TensorFiles

            files = TensorFiles(tmp_path)
        except ConfigError:
            continue
        for name in names & set(files.tensors):
            stored = files.tensors[name]
            assert stored.start >= 8 and stored.start + stored.nbytes <= len(data)
            files.array(name).copy()


PUBLISHED_EXTRAS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2": (
        "llama2",
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": {}}},
    ),
    "SmolLM3": ("smollm3", {"pretraining_tp": 2, "max_window_layers": 28}),
    "Qwen2.5": ("qwen2", {"sliding_window": 131072, "use_mrope": False}),
    "Gemma 2": ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
    "Phi-4-mini": ("phi4", {"full_attn_mod": 1, "lm_head_bias": False, "mlp_bias": False, "attention_bias": False}),
    "gpt-oss": ("gpt_oss", {"experts_per_token": 3, "initial_context_length": 4096, "router_aux_loss_coef": 0.9}),
    "DeepSeek-V2": ("deepseek_v2", {"aux_loss_alpha": 0.001, "moe_layer_freq": 1, "scoring_func": "softmax"}),
    "DeepSeek-V3": ("deepseek_v3", {"ep_size": 1, "topk_method": "noaux_tc", "num_nextn_predict_layers": 1}),
}


@pytest.mark.parametrize("name", PUBLISHED_EXTRAS)
def test_fields_that_are_published_without_effect_are_read(name: str, tmp_path: Path) -> None:
    """Strictness must not shut out the very folders people have."""
    family, extras = PUBLISHED_EXTRAS[name]
    plain = open_folder(write_folder(tmp_path / "plain", family)).config
    extra = open_folder(write_folder(tmp_path / "extra", family, **extras))
    assert (extra.config, extra.warnings) == (plain, ())


def test_code_in_the_folder_is_never_run(mesh: Mesh, tmp_path: Path) -> None:
    """`auto_map` asks other loaders to import the folder's Python; serving a stranger's model must not."""
    trap = tmp_path / "ran"
    write_folder(tmp_path / "model", "phi3", auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    (tmp_path / "model" / "modeling_phi3.py").write_text(f"open({str(trap)!r}, 'w')")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    assert load(tmp_path / "model", mesh) and not trap.exists()


def test_what_old_folders_carry_along_is_left(mesh: Mesh, tmp_path: Path) -> None:
    """Llama 2's folders store the rotary frequencies, DeepSeek-V3's a layer that inference leaves out."""
    write_folder(tmp_path / "llama", "llama2")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    write_tensors(tmp_path / "llama", {**tensors("llama2"), **extra})
    assert load(tmp_path / "llama", mesh)
    write_folder(tmp_path / "deepseek", "deepseek_v3")
    extra = {"model.layers.4.eh_proj.weight": np.ones((4, 4), np.float32)}
    write_tensors(tmp_path / "deepseek", {**tensors("deepseek_v3"), **extra})
    assert load(tmp_path / "deepseek", mesh)


def test_linked_files_are_read(mesh: Mesh, tmp_path: Path) -> None:
    """The hub's cache is a folder of links to blobs."""
    write_folder(tmp_path / "model", "llama3")
    (tmp_path / "blob").write_bytes((tmp_path / "model" / SINGLE).read_bytes())
    (tmp_path / "model" / SINGLE).unlink()
    (tmp_path / "model" / SINGLE).symlink_to(tmp_path / "blob")
    assert load(tmp_path / "model", mesh)


@pytest.mark.parametrize(
    ("generation", "ends"),
    [
        ('{"eos_token_id": [3, 7]}', {3, 7}),
        ('{"eos_token_id": 4}', {4}),
        ("{}", {2}),
        (None, {2}),
        ('{"eos_token_id": [3, 1000]}', {3}),
    ],
)
def test_text_ends_where_the_folder_says(generation: str | None, ends: set[int], tmp_path: Path) -> None:
    """Llama 3's chat ends a turn with another id than a text; without it an answer never stops."""
    write_folder(tmp_path, "llama3", eos_token_id=2)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(generation)
    assert open_folder(tmp_path).tokenizer.eos_ids == ends


def test_recommended_stop_strings_are_read(tmp_path: Path) -> None:
    """A model that ends its turns by a text goes on and plays the user's part."""
    write_folder(tmp_path, "qwen2")
    path = tmp_path / "generation_config.json"
    for written, stops in (('"User:"', ("User:",)), ('["a", "b"]', ("a", "b")), ("null", ()), ("[]", ())):
        for sampled in ("true", "false"):
            path.write_text(f'{{"do_sample": {sampled}, "stop_strings": {written}}}')
            assert open_folder(tmp_path).generation.stop_strings == stops
    for wrong in ('""', "3", '["a", 3]', json.dumps(["a"] * 17), json.dumps("a" * 257)):
        path.write_text(f'{{"stop_strings": {wrong}}}')
        with pytest.raises(ConfigError, match="stop_strings="):
            open_folder(tmp_path)


def test_recommended_sampling_is_read(tmp_path: Path) -> None:
    """What a model's makers recommend: greedy, if they don't ask for sampling. What we don't do is listed."""
    write_folder(tmp_path, "qwen2")
    path = tmp_path / "generation_config.json"
    path.write_text(
        '{"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "num_beams": 3}'
    )
    recommended = open_folder(tmp_path).generation
    assert (recommended.temperature, recommended.top_p, recommended.top_k, recommended.min_p) == (0.7, 0.8, 20, None)
    assert recommended.repetition_penalty == 1.05
    assert recommended.ignored == ("num_beams=3",)
    path.write_text('{"repetition_penalty": 1.2}')
    assert open_folder(tmp_path).generation.repetition_penalty == 1.2, "transformers heeds it in greedy text as well"
    for values in ("{}", '{"temperature": 0.7, "top_p": 0.8}', '{"do_sample": false, "temperature": 0.7}'):
        path.write_text(values)
        recommended = open_folder(tmp_path).generation
        assert (recommended.temperature, recommended.top_p) == (0.0, None), "transformers draws nothing"
    path.write_text('{"do_sample": true}')
    assert open_folder(tmp_path).generation.temperature is None
    path.write_text('{"do_sample": true, "top_p": 7}')
    with pytest.raises(ConfigError, match="top_p=7 must be"):
        open_folder(tmp_path)
    path.unlink()
    assert open_folder(tmp_path).generation == GenerationDefaults()
