"""The supported architectures. For each, a GGUF file's metadata and tensors are mapped to the config.json and the
tensors that Hugging Face would have, which model/weights/huggingface reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from isthmus.errors import ConfigError
from isthmus.model.config import MAX_LAYERS
from isthmus.model.weights.gguf import ropes
from isthmus.model.weights.gguf.header import Header
from isthmus.model.weights.gguf.metadata import Metadata

Fields = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How files with one value of `general.architecture` are mapped."""

    fields: Callable[[Metadata, Header], Fields]
    """Returns the fields of config.json that not all architectures have"""
    layer: dict[str, str] = field(default_factory=dict)
    """The names of a layer's tensors that differ from those of most architectures: from llama.cpp's to Hugging
    Face's"""
    pairs: bool = False
    """Whether the two rows of queries or keys that the rotary embedding turns together are neighbours, and not half a
    head apart"""
    norm_offset: float = 0.0
    """The number that the file adds to the weights of norms"""
    head_dim: bool = True
    """Whether config.json has the field head_dim"""


_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MIXTRAL_LAYER = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
_QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}

_WITHOUT_EFFECT = frozenset(
    {"vocab_size", "rope.dimension_count", "rope.scaling.finetuned", "attention.causal", "tensor_data_layout",
     "attention.value_length", "expert_group_count", "expert_group_used_count", "leading_dense_block_count"}
)  # fmt: skip
"""Keys, without the architecture's name, that are read elsewhere or have no effect on what the model computes."""
_CONSTANTS = re.compile(r"rope_freqs\.weight|rope_factors_(?:long|short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
"""The names of tensors that become fields of config.json."""


def config_of(metadata: Metadata, header: Header) -> Fields:
    """Returns the config.json of the model. Raises ConfigError for an unknown architecture, or for metadata that isn't
    supported and may change what the model computes."""
    architecture = architecture_of(metadata)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConfigError(f"{header.path}: the tensor token_embd.weight is missing, or no matrix")
    heads, dim = (
        metadata.integer(metadata.own("attention.head_count")),
        metadata.integer(metadata.own("embedding_length")),
    )
    size = _head_dim(metadata, dim // max(1, heads))
    context = metadata.integer(metadata.own("context_length"))
    layers = metadata.integer(metadata.own("block_count"))
    if not 0 < layers <= MAX_LAYERS:
        raise metadata.error(metadata.own("block_count"), f"must be 1 to {MAX_LAYERS}")
    fields = {
        "vocab_size": embedding.shape[0],
        "hidden_size": dim,
        "intermediate_size": metadata.integer(metadata.own("feed_forward_length")),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(metadata.own("attention.head_count_kv"), heads),
        "max_position_embeddings": context,
        "rms_norm_eps": metadata.number(metadata.own("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **({"head_dim": size} if architecture.head_dim else {}),
        **ropes.fields(metadata, header, size),
        **architecture.fields(metadata, header),
    }
    metadata.finish(_WITHOUT_EFFECT)
    return fields


def architecture_of(metadata: Metadata) -> Architecture:
    """The architecture of a file. Raises ConfigError for an unknown one."""
    name = metadata.architecture
    if name == "llama" and metadata.integer(metadata.own("expert_count"), 0):
        return MIXTRAL
    if name not in ARCHITECTURES:
        raise metadata.error("general.architecture", f"is not supported; those that are: {', '.join(ARCHITECTURES)}. "
                             "Perhaps the folder of safetensors that the file was made from is")  # fmt: skip
    return ARCHITECTURES[name]


def published_name(architecture: Architecture, name: str) -> str:
    """Hugging Face's name for a tensor of the file. {expert} in the name stands for the index along the tensor's first
    axis. The name is "" for a tensor that becomes a field of config.json. An unknown name is returned unchanged."""
    if _CONSTANTS.fullmatch(name):
        return ""
    match = re.fullmatch(r"blk\.(\d+)\.([a-z_0-9]+)(?:\.(\d+))?\.(weight|bias)", name)
    if match is None:
        return _TOP.get(name, name)
    layer, part, expert, kind = match.groups()
    if expert is not None:  # older files have one tensor per expert
        part += "_exps"
    found = {**_LAYER, **architecture.layer}.get(part)
    if found is None:
        return name
    if expert is not None:
        found = found.replace("{expert}", expert)
    return f"model.layers.{layer}.{found}.{kind}"


def file_names(architecture: Architecture, name: str) -> str:
    """The GGUF file's name for one of Hugging Face's tensors. All experts of a layer have the same name."""
    top = {theirs: ours for ours, theirs in _TOP.items()}
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return top[name]
    layer, part, kind = match.groups()
    parts = {theirs: ours for ours, theirs in {**_LAYER, **architecture.layer}.items()}
    return f"blk.{layer}.{parts[re.sub(r'experts[.][0-9]+', 'experts.{expert}', part)]}.{kind}"


def _head_dim(metadata: Metadata, default: int) -> int:
    rotated = metadata.integer(metadata.own("rope.dimension_count"), default)
    size: int = metadata.integer(metadata.own("attention.key_length"), max(default, rotated))
    if not size:
        raise metadata.error(metadata.own("attention.key_length"), "must be at least 1")
    if metadata.integer(metadata.own("attention.value_length"), size) != size:
        raise metadata.error(metadata.own("attention.value_length"), f"must be {size}, the length of keys")
    return size


def _llama(metadata: Metadata, header: Header) -> Fields:
    biases = {
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    }
    window = metadata.integer(metadata.own("attention.sliding_window"), 0)
    if window:
        return {"model_type": "mistral", "sliding_window": window}
    return {"model_type": "llama", **biases}


def _mixtral(metadata: Metadata, header: Header) -> Fields:
    window = metadata.integer(metadata.own("attention.sliding_window"), 0)
    return {
        "model_type": "mixtral",
        "intermediate_size": metadata.integer(
            metadata.own("expert_feed_forward_length"), metadata.integer(metadata.own("feed_forward_length"))
        ),
        "sliding_window": window or None,
        "num_local_experts": metadata.integer(metadata.own("expert_count")),
        "num_experts_per_tok": metadata.integer(metadata.own("expert_used_count")),
    }


def _plain(model_type: str) -> Callable[[Metadata, Header], Fields]:
    return lambda metadata, header: {"model_type": model_type}


def _biased(model_type: str) -> Callable[[Metadata, Header], Fields]:
    return lambda metadata, header: {"model_type": model_type, "attention_bias": "blk.0.attn_q.bias" in header.tensors}


def _qwen3_moe(metadata: Metadata, header: Header) -> Fields:
    return {
        "model_type": "qwen3_moe",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "num_experts": metadata.integer(metadata.own("expert_count")),
        "num_experts_per_tok": metadata.integer(metadata.own("expert_used_count")),
        "moe_intermediate_size": metadata.integer(metadata.own("expert_feed_forward_length")),
        "norm_topk_prob": True,
    }


def _gemma_scalar(metadata: Metadata, largest: int) -> int:
    """The value of query_pre_attn_scalar, which a GGUF file lacks. As in llama.cpp, it is dim / heads in the model with
    `largest` layers, and the size of a head in smaller ones."""
    dim, heads = (metadata.integer(metadata.own(name)) for name in ("embedding_length", "attention.head_count"))
    whole = metadata.integer(metadata.own("block_count")) == largest
    return dim // max(1, heads) if whole else _head_dim(metadata, dim // max(1, heads))


def _gemma2(metadata: Metadata, header: Header) -> Fields:
    return {
        "model_type": "gemma2",
        "query_pre_attn_scalar": _gemma_scalar(metadata, 46),
        "sliding_window": metadata.integer(metadata.own("attention.sliding_window"), 4096),
        "attn_logit_softcapping": metadata.number(metadata.own("attn_logit_softcapping"), 50.0),
        "final_logit_softcapping": metadata.number(metadata.own("final_logit_softcapping"), 30.0),
    }


def _gemma3(metadata: Metadata, header: Header) -> Fields:
    layers, window = metadata.integer(metadata.own("block_count")), metadata.own("attention.sliding_window")
    local = _local_layers(metadata, layers) if metadata.integer(window, 0) else [False] * layers
    return {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _gemma_scalar(metadata, 62),
        "sliding_window": metadata.integer(window, 0) or None,
        "layer_types": ["sliding_attention" if each else "full_attention" for each in local],
        "final_logit_softcapping": metadata.number(metadata.own("final_logit_softcapping"), 0.0) or None,
        "rope_local_base_freq": metadata.number(metadata.own("rope.freq_base_swa"), 10000.0),
    }


def _local_layers(metadata: Metadata, layers: int) -> list[bool]:
    """Whether each layer has the sliding window. The file says so by one entry per layer, or by a number n, where every
    n-th layer has no window."""
    name = metadata.own("attention.sliding_window_pattern")
    pattern = metadata.raw(name, 6)
    if type(pattern) is int and pattern > 0:
        return [(layer + 1) % pattern != 0 for layer in range(layers)]
    found = metadata.numbers(name, layers)
    assert found is not None
    return [bool(each) for each in found]


def _phi3(metadata: Metadata, header: Header) -> Fields:
    window = metadata.integer(metadata.own("attention.sliding_window"), 0)
    return {"model_type": "phi3", "sliding_window": window or None}


MIXTRAL = Architecture(_mixtral, _MIXTRAL_LAYER, pairs=True)
ARCHITECTURES = {
    "llama": Architecture(_llama, pairs=True),
    "qwen2": Architecture(_plain("qwen2"), head_dim=False),
    "qwen3": Architecture(_biased("qwen3")),
    "qwen3moe": Architecture(_qwen3_moe, _QWEN_EXPERTS),
    "gemma2": Architecture(_gemma2, _GEMMA, norm_offset=1.0),
    "gemma3": Architecture(_gemma3, _GEMMA, norm_offset=1.0),
    "phi3": Architecture(
        _phi3, {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}, head_dim=False
    ),
    "olmo2": Architecture(
        _biased("olmo2"),
        {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
        head_dim=False,
    ),
    "smollm3": Architecture(_biased("smollm3"), pairs=True, head_dim=False),
}  # fmt: skip
"""The architectures by `general.architecture`. A file of llama's with experts is read by MIXTRAL."""
