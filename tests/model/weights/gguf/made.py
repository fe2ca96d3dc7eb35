"""GGUF files for the tests, written by package gguf from published folders: names are its own table's, and what is done
to the tensors on the way is written down here as llama.cpp's convert_hf_to_gguf.py does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType, get_tensor_name_map
from gguf.quants import quantize
from tokenizers import pre_tokenizers

from tests.parity.families import GOLDEN
from tests.parity.weights import family_tensors

ARCHITECTURES = {
    "llama2": MODEL_ARCH.LLAMA, "llama3": MODEL_ARCH.LLAMA, "llama_linear": MODEL_ARCH.LLAMA,
    "llama_yarn": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA, "mistral_nemo": MODEL_ARCH.LLAMA,
    "mixtral": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE, "gemma2": MODEL_ARCH.GEMMA2, "gemma3": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3, "phi4": MODEL_ARCH.PHI3, "olmo2": MODEL_ARCH.OLMO2, "smollm3": MODEL_ARCH.SMOLLM3,
}  # fmt: skip
_TURNED = (MODEL_ARCH.LLAMA, MODEL_ARCH.SMOLLM3)
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())[:93]
TOKENS = ["<|endoftext|>", *LETTERS, "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def published(family: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / family / "config.json").read_text())
    return config


def write_gguf(
    path: Path,
    family: str,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    tensors: dict[str, np.ndarray] | None = None,
    **fields: Any,
) -> Path:
    """A file of a golden folder's model. kind: of its matrices. fields: changes to config.json."""
    config = {**published(family), **fields}
    architecture = ARCHITECTURES[family]
    writer = GGUFWriter(path, _name(architecture))
    write_config(writer, config)
    write_tokenizer(writer)
    names = get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, array in _merged(tensors or family_tensors(GOLDEN / family)).items():
        stem, _, end = name.rpartition(".")
        found = names.get_name(stem)
        assert found is not None, name
        if architecture in _TURNED and stem.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
            array = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:]).swapaxes(1, 2)
            array = array.reshape(-1, *array.shape[3:])
        if architecture in (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3) and name.endswith("norm.weight"):
            array = array + 1
        write_tensor(writer, f"{found}.{end}", array, kind)
    if factors := _rope_factors(config):
        for name, values in factors.items():
            writer.add_tensor(name, np.asarray(values, np.float32))
    finish(writer)
    return path


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tensor(writer: GGUFWriter, name: str, array: np.ndarray, kind: GGMLQuantizationType) -> None:
    array = np.ascontiguousarray(array, np.float32)
    if array.ndim == 1 or "ffn_gate_inp" in name:  # llama.cpp keeps them so
        kind = GGMLQuantizationType.F32
    writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)


def write_config(writer: GGUFWriter, config: dict[str, Any]) -> None:
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    size = config.get("head_dim") or dim // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(dim)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config["vocab_size"])
    _write_rope(writer, config, size)
    if config.get("sliding_window") and config.get("use_sliding_window") is not False:
        writer.add_sliding_window(config["sliding_window"])
    if config.get("model_type") == "gemma3_text":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if cap := config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(cap)
    if cap := config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(cap)
    if experts := config.get("num_local_experts") or config.get("num_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", config["intermediate_size"]))


def _write_rope(writer: GGUFWriter, config: dict[str, Any], size: int) -> None:
    rope = config["rope_parameters"]
    if "full_attention" in rope:
        writer.add_key_value("gemma3.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"], 6)
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        ratio = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(np.sqrt(1 + np.log(ratio) / np.log(original)))


def _rope_factors(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{each}.weight": rope[f"{each}_factor"] for each in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original, factors = rope["original_max_position_embeddings"], []
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for i in range(0, size, 2):
        length = 2 * np.pi * rope["rope_theta"] ** (i / size)
        smooth = (original / length - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1 if length < original / high else factor if length > original / low else between)
    return {"rope_freqs.weight": factors}


def write_tokenizer(writer: GGUFWriter) -> None:
    """Of single bytes; tokens 94 and 95 mark turns."""
    control = [0, 94, 95]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL if i in control else TokenType.NORMAL for i in range(len(TOKENS))])
    writer.add_token_merges([f"{LETTERS[0]} {LETTERS[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(95)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


def _name(architecture: MODEL_ARCH) -> str:
    from gguf import MODEL_ARCH_NAMES

    return MODEL_ARCH_NAMES[architecture]


def _merged(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With all experts of a layer in one."""
    merged: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name, array in tensors.items():
        if ".experts." not in name:
            merged[name] = array
            continue
        before, _, after = name.partition(".experts.")
        part = after.partition(".")[2]
        layer = before.split(".")[2]
        mixtral = "block_sparse_moe" in before
        stem = f"layers.{layer}.feed_forward.experts.{part}" if mixtral else f"{before}.experts.{part}"
        experts.setdefault(stem, []).append(array)
    return merged | {name: np.stack(arrays) for name, arrays in experts.items()}
