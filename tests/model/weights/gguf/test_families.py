"""A GGUF file is the model that its folder was: the same network, the same weights, the same logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from jax.sharding import Mesh

from isthmus.model.ops.quantized import Quantized
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.quantization import matrices
from isthmus.serve.engine.build import open_model
from tests.model.weights.gguf.made import ARCHITECTURES, write_gguf
from tests.parity.families import GOLDEN, golden, load
from tests.parity.test_families import TOLERANCE, _logits, batch_of
from tests.parity.weights import family_tensors
from tests.support import relative_error

FIXED = {
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3": {"query_pre_attn_scalar": 12},
    "qwen3_moe": {"mlp_only_layers": []},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0, 1, 1, 1]},
}
"""What a GGUF file doesn't say, and llama.cpp holds to be so"""


@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - {"qwen3_moe"}))
def test_a_file_is_the_folder_that_it_was_made_from(family: str, tmp_path: Path, mesh: Mesh) -> None:
    """Another rope, another order of rows, or a norm without its 1 would be another model, and say so to nobody."""
    folder = open_folder(write_gguf(tmp_path / "model.gguf", family))
    _, want_config, want = load(family, mesh)
    got, changed = folder.config, FIXED.get(family, {})
    if "query_pre_attn_scalar" in changed:
        want_config = dataclasses.replace(want_config, attention_scale=changed["query_pre_attn_scalar"] ** -0.5)
    if "no_rope_layers" in changed:
        want_config = dataclasses.replace(want_config, rope_pattern=tuple(map(bool, changed["no_rope_layers"])))
    if family == "llama3":  # its factors came of another length than Llama's, and are kept one by one
        want_config = dataclasses.replace(want_config, rope_scaling=got.rope_scaling)
        assert got.rope_scaling.kind == "longrope"
    if got.rope_scaling.kind == "longrope" == want_config.rope_scaling.kind:  # a float32 in the file
        factor = got.rope_scaling.attention_factor
        assert factor == pytest.approx(want_config.rope_scaling.attention_factor, rel=1e-6)
        scaling = dataclasses.replace(want_config.rope_scaling, attention_factor=factor)
        want_config = dataclasses.replace(want_config, rope_scaling=scaling)
    assert got.canonical() == want_config.canonical()
    params = folder.load_params(mesh)
    assert params.keys() == want.keys()
    for path, array in want.items():
        # A norm's 1 is added and taken.
        np.testing.assert_allclose(params[path], array, rtol=0, atol=2e-7, err_msg=path)
    if changed:
        return
    truth = golden(family)
    logits = np.asarray(_logits(got)(params, batch_of(truth["tokens"], truth["lengths"])))
    for row, length in enumerate(truth["lengths"]):
        assert relative_error(logits[row, :length], truth["logits"][row, :length]) <= TOLERANCE


def sparse_everywhere() -> dict[str, np.ndarray]:
    """Qwen 3's mixture, with the first layer's experts those of the second: in a GGUF file all layers have some."""
    tensors = family_tensors(GOLDEN / "qwen3_moe")
    kept = {name: array for name, array in tensors.items() if ".layers.0.mlp." not in name}
    copies = {name.replace(".1.mlp.", ".0.mlp.", 1): array for name, array in kept.items() if ".layers.1.mlp." in name}
    return {**kept, **copies}


@pytest.mark.parametrize("tensors", [1, 2])
def test_stacked_experts_are_each_themselves(tensors: int, tmp_path: Path) -> None:
    """One expert in another's place changes what the model says, and not that it talks. Over two devices, too."""
    written = sparse_everywhere()
    folder = open_folder(write_gguf(tmp_path / "model.gguf", "qwen3_moe", tensors=written))
    assert folder.config.mixture.dense_layers == () and folder.config.mixture.normalize
    params = folder.load_params(build_mesh(MeshShape(tp=tensors)))
    for layer in range(folder.config.layers):
        for expert in range(folder.config.mixture.experts):
            for name in ("gate", "up", "down"):
                want = written[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"].T
                np.testing.assert_array_equal(params[f"blocks/{layer}/mlp/{name}/kernel"][expert], want)


KINDS = [GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_become_the_numbers_of_package_gguf(
    kind: GGMLQuantizationType, dtype: str, tmp_path: Path, mesh: Mesh
) -> None:
    """To the bit in float32, and rounded once in bfloat16; also where rows are put in another order."""
    tensors, sizes = wide_llama()
    folder = open_folder(write_gguf(tmp_path / "model.gguf", "llama2", kind, tensors, **sizes))
    params = folder.load_params(mesh, dtype)
    for name, path in {
        "self_attn.q_proj": "attention/query",
        "self_attn.k_proj": "attention/key",
        "mlp.down_proj": "mlp/down",
    }.items():
        got = params[f"blocks/0/{path}/kernel"]
        array = tensors[f"model.layers.0.{name}.weight"]
        want = gguf.dequantize(gguf.quantize(array, kind), kind).T.astype(got.dtype)
        np.testing.assert_array_equal(np.asarray(got).reshape(want.shape), want)


FEWER_BITS = {"Q8_0": 2, "Q5_0": 3, "Q4_0": 9}
"""Matrices that `--quantize int4`, which keeps embedding and head in 8 bits and values in 6, leaves as they are"""


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", FEWER_BITS)
def test_what_our_formats_hold_stays_integers(name: str, tp: int, tmp_path: Path) -> None:
    """Served, a file's integers are those that it was published with, and take as many bytes; the start says so."""
    kind = GGMLQuantizationType[name]
    tensors, sizes = wide_llama()
    folder = open_model(write_gguf(tmp_path / "model.gguf", "llama2", kind, tensors, **sizes), "float32")
    assert f"9 in {name} stay integers" in folder.remarks[-1]
    params = folder.load_params(build_mesh(MeshShape(tp=tp)), "float32")
    held: dict[str, np.ndarray] = {}
    for path in matrices(folder.config):
        assert isinstance(params[path], Quantized), path
        held[path] = np.asarray(params[path].dequantize())
    for path, stored in {
        "embedding": "model.embed_tokens", "head": "lm_head",
        "blocks/0/mlp/down/kernel": "model.layers.0.mlp.down_proj",
        "blocks/0/attention/query/kernel": "model.layers.0.self_attn.q_proj",
        "blocks/0/attention/out/kernel": "model.layers.0.self_attn.o_proj",
    }.items():  # fmt: skip
        want = gguf.dequantize(gguf.quantize(tensors[f"{stored}.weight"], kind), kind).T
        np.testing.assert_array_equal(held[path], want, err_msg=path)
    assert len(held) == 9
    assert len(open_model(folder.source, "float32", quantize="int4").kept_integers) == FEWER_BITS[name]


def wide_llama() -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Matrices whose rows are whole blocks."""
    heads, kv, size, dim, mlp, layers = 2, 1, 32, 64, 96, 1
    shapes = {
        "model.embed_tokens.weight": (96, dim), "lm_head.weight": (96, dim), "model.norm.weight": (dim,),
        "model.layers.0.input_layernorm.weight": (dim,), "model.layers.0.post_attention_layernorm.weight": (dim,),
        "model.layers.0.self_attn.q_proj.weight": (heads * size, dim),
        "model.layers.0.self_attn.k_proj.weight": (kv * size, dim),
        "model.layers.0.self_attn.v_proj.weight": (kv * size, dim),
        "model.layers.0.self_attn.o_proj.weight": (dim, heads * size),
        "model.layers.0.mlp.gate_proj.weight": (mlp, dim), "model.layers.0.mlp.up_proj.weight": (mlp, dim),
        "model.layers.0.mlp.down_proj.weight": (dim, mlp),
    }  # fmt: skip
    rng = np.random.default_rng(7)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return tensors, {"hidden_size": dim, "intermediate_size": mlp, "num_attention_heads": heads, "head_dim": size,
                     "num_key_value_heads": kv, "num_hidden_layers": layers}  # fmt: skip
