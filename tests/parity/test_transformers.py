"""The network is the one that the published families describe: its logits are those of transformers in torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.sharding import MeshShape, build_mesh
from model.transformer import Params, bind, init_params
from train.step import packed_attention

PEERS = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "dim": 64,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 24,
    "mlp_dim": 112,
}

FAMILIES = {
    "Llama": ModelConfig(**SIZES, context_length=64, rope_theta=500000.0, tie_embeddings=False),
    "Qwen2": ModelConfig(**{**SIZES, "head_dim": 16}, context_length=64, attention_bias=True),
    "Qwen3": ModelConfig(**SIZES, context_length=64, qk_norm="head", norm_eps=1e-6),
}


def hf_names(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Our parameters under the names, and in the [out, in] layout, of the published checkpoints."""

    def matrix(kernel: jax.Array, inputs: int) -> np.ndarray:
        size = int(np.prod(kernel.shape[:inputs]))
        return np.ascontiguousarray(np.asarray(kernel).reshape(size, -1).T)

    out = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["norm"]["scale"]}
    if not config.tie_embeddings:
        out["lm_head.weight"] = np.asarray(params["head"]).T
    for layer, block in params["blocks"].items():
        prefix = f"model.layers.{layer}"
        out[f"{prefix}.input_layernorm.weight"] = block["attention_norm"]["scale"]
        out[f"{prefix}.post_attention_layernorm.weight"] = block["mlp_norm"]["scale"]
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            part = block["attention"][ours]
            out[f"{prefix}.self_attn.{theirs}_proj.weight"] = matrix(part["kernel"], 1)
            if "bias" in part:
                out[f"{prefix}.self_attn.{theirs}_proj.bias"] = np.asarray(part["bias"]).ravel()
        out[f"{prefix}.self_attn.o_proj.weight"] = matrix(block["attention"]["out"]["kernel"], 2)
        if config.qk_norm != "none":
            out[f"{prefix}.self_attn.q_norm.weight"] = block["attention"]["query_norm"]["scale"]
            out[f"{prefix}.self_attn.k_norm.weight"] = block["attention"]["key_norm"]["scale"]
        for name in ("gate", "up", "down"):
            out[f"{prefix}.mlp.{name}_proj.weight"] = matrix(block["mlp"][name]["kernel"], 1)
    return {name: np.ascontiguousarray(np.asarray(array, np.float32)) for name, array in out.items()}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.context_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }


@pytest.mark.peers
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    """Converted weights of a published family would not give the published model's answers."""
    if not PEERS.is_file():
        pytest.skip("no .venv-peers: `make peers` builds it")
    config = FAMILIES[family]
    # Norms and biases start as ones and zeros, which would hide a mistake: everything is random here.
    params = init_params(config, 0, build_mesh(MeshShape()))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x * 3 + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, noisy)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 48))

    segments = jnp.zeros(tokens.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    model = bind(config, params)
    hidden, _ = model(jnp.asarray(tokens), positions, packed_attention(segments), None)
    ours = np.asarray(model.logits(hidden))

    spec = {"config_class": f"{family}Config", "model_class": f"{family}ForCausalLM", "config": hf_config(config)}
    packed = np.frombuffer(json.dumps(spec).encode(), np.uint8)
    source, target = tmp_path / "in.npz", tmp_path / "out.npy"
    np.savez(source, spec=packed, tokens=tokens, **hf_names(config, params))
    script = Path(__file__).with_name("hf_logits.py")
    subprocess.run([str(PEERS), str(script), str(source), str(target)], check=True, timeout=300)
    theirs = np.load(target)
    assert theirs.std() > 0.5, "the comparison says nothing: the logits are all alike"
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
