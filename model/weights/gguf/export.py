"""Writes a model as a GGUF file that llama.cpp can read, using the package gguf."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig, RopeScaling
from isthmus.model.text.chat import special_tokens
from isthmus.model.transformer import Params
from isthmus.model.weights.described import Described
from isthmus.model.weights.gguf.architectures import ARCHITECTURES, MIXTRAL, Architecture, config_of, file_names
from isthmus.model.weights.gguf.files import read_headers
from isthmus.model.weights.gguf.metadata import Metadata
from isthmus.model.weights.gguf.ropes import llama3_factors
from isthmus.model.weights.gguf.tokenizer_export import tokenizer_metadata
from isthmus.model.weights.huggingface.export import assemble, targets_of
from isthmus.model.weights.huggingface.families import Family, read_fields
from isthmus.model.weights.huggingface.fields import Fields

if TYPE_CHECKING:
    from gguf import GGUFWriter

KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""The kinds that matrices can be written as, with llama.cpp's names for them. With q4_0, the embedding and the head are
written as q8_0. Vectors and routers are always float32. A matrix whose rows can't be cut into whole blocks is written
as f16."""
_NAMES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "olmo2": "olmo2",
    "smollm3": "smollm3",
}  # fmt: skip
"""The value of general.architecture by model_type."""


def architecture_name(model_type: Any) -> str:
    """Returns the value of general.architecture. Raises ConfigError for a family that can't be written."""
    if model_type not in _NAMES:
        raise ConfigError(f"gguf: models of the family {model_type} are not written as GGUF; only {', '.join(_NAMES)}")
    return _NAMES[model_type]


def write_model(
    path: Path,
    folder: Described,
    model_type: str,
    family: Family,
    params: Params,
    kind: str,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes `params`, which are in the unstacked layout, with the model's tokenizer and chat template.

    kind: one of KINDS. on_progress is called after each tensor with its size in bytes as float32. Raises ConfigError
    for a network or a tokenizer that a GGUF file can't describe. What the file says is read back, and must be this very
    network.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    title, config = architecture_name(model_type), folder.config
    architecture = MIXTRAL if config.mixture.experts and title == "llama" else ARCHITECTURES[title]
    writer = GGUFWriter(path, title, use_temp_file=False)
    writer.add_name(folder.name)
    writer.add_quantization_version(2)
    for key, value in {**_metadata(config, title), **_tokenizer(folder)}.items():
        _add(writer, key, value)
    targets = targets_of(config, family, {"": "F32"})
    plan = list(_planned(architecture, config, {name: target.shape for name, target in targets.items()}, kind))
    for written, _, shape, stored in plan:
        number = GGMLQuantizationType[stored]
        size = _row_bytes(number, shape[-1]) * int(np.prod(shape[:-1], dtype=np.int64))
        writer.add_tensor_info(written, _byte_shape(number, shape), np.dtype(np.uint8), size, number)
    constants = _rope_tensors(config)
    for written, array in constants.items():
        writer.add_tensor_info(written, array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with contextlib.ExitStack() as failed:
        failed.callback(_drop, writer)
        for written, names, _, stored in plan:
            arrays = [
                _changed(architecture, config, written, assemble(targets[each], params, config)) for each in names
            ]
            whole = arrays[0] if len(names) == 1 else np.stack(arrays)
            writer.write_tensor_data(_as_stored(np.ascontiguousarray(whole), stored))
            on_progress(whole.nbytes)
        for array in constants.values():
            writer.write_tensor_data(array)
        writer.close()
        failed.pop_all()
    _check(path, config)


def _drop(writer: Any) -> None:
    """Closes the files of a writer that failed, so that it doesn't try to flush them again when it is
    garbage-collected."""
    for file in writer.fout or ():
        with contextlib.suppress(OSError):
            file.close()


def _tokenizer(folder: Described) -> dict[str, Any]:
    tokenizer = folder.tokenizer
    first = [] if folder.end_id is None else [folder.end_id]
    ends = [*first, *sorted(tokenizer.eos_ids - set(first))]
    special = special_tokens(folder.adapter or folder.path) or special_tokens(folder.path)
    size = folder.config.vocab_size
    found = tokenizer_metadata(tokenizer.spec(), special, ends, tokenizer.encode(""), size)
    return found if folder.chat is None else {**found, "tokenizer.chat_template": folder.chat.source}


def _planned(
    architecture: Architecture, config: ModelConfig, shapes: dict[str, tuple[int, ...]], kind: str
) -> Iterator[tuple[str, list[str], tuple[int, ...], str]]:
    """Yields each tensor of the file as (its name, the names of Hugging Face's tensors that are stacked into it, its
    shape, its kind)."""
    stacked: dict[str, list[str]] = {}
    for name in shapes:
        stacked.setdefault(file_names(architecture, name), []).append(name)
    for written, names in stacked.items():
        shape = shapes[names[0]] if "_exps" not in written else (len(names), *shapes[names[0]])
        yield written, names, shape, _kind_of(written, shape, KINDS[kind])


def _kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "F32"
    if kind == "Q4_0" and name in ("token_embd.weight", "output.weight"):
        kind = "Q8_0"
    return "F16" if kind in ("Q8_0", "Q4_0") and shape[-1] % 32 else kind


def _changed(architecture: Architecture, config: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
    """Converts a tensor to the file's conventions: the order of the rows of queries and keys, and the offset of
    norms."""
    part = name.split(".")[2] if name.startswith("blk.") else ""
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(part, 0) if architecture.pairs else 0
    if heads:
        array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array + np.float32(architecture.norm_offset) if name.endswith("norm.weight") else array


def _as_stored(array: np.ndarray, kind: str) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    found: np.ndarray = quantize(array, GGMLQuantizationType[kind])
    return found


def _byte_shape(number: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], _row_bytes(number, shape[-1]))


def _row_bytes(number: Any, numbers: int) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[number]
    return int(numbers // block * size)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Adds an entry to the metadata. An int is written as uint32, a float as float32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _metadata(config: ModelConfig, title: str) -> dict[str, Any]:
    mixture, scaling = config.mixture, config.rope_scaling
    found: dict[str, Any] = {
        "context_length": config.context_length,
        "embedding_length": config.dim,
        "block_count": config.layers,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.rotated,
        "vocab_size": config.vocab_size,
    }
    if windows := [kind.window for kind in config.layer_kinds if kind.window]:
        found["attention.sliding_window"] = windows[0]
        if title == "gemma3":
            found["attention.sliding_window_pattern"] = [kind.window > 0 for kind in config.layer_kinds]
            found["rope.freq_base_swa"] = config.local_rope_theta
    if config.attention_soft_cap:
        found["attn_logit_softcapping"] = config.attention_soft_cap
    if config.logit_soft_cap:
        found["final_logit_softcapping"] = config.logit_soft_cap
    if mixture.experts:
        found |= {"expert_count": mixture.experts, "expert_used_count": mixture.per_token,
                  "expert_feed_forward_length": mixture.dim}  # fmt: skip
    if scaling.kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    one_table = _is_one_table(scaling)
    if scaling.kind in ("yarn", "longrope") and not one_table:
        found["rope.scaling.original_context_length"] = scaling.original_context
    if scaling.kind == "yarn":
        found |= {"rope.scaling.yarn_beta_fast": scaling.beta_fast, "rope.scaling.yarn_beta_slow": scaling.beta_slow}
    if scaling.kind == "longrope" and not one_table:
        found["rope.scaling.attn_factor"] = scaling.attention_factor
    return {f"{title}.{name}": value for name, value in found.items()}


def _is_one_table(scaling: RopeScaling) -> bool:
    """Whether the frequencies are divided by the same numbers at every length, which a single tensor can express."""
    same = scaling.short_factors == scaling.long_factors
    return scaling.kind == "longrope" and same and scaling.attention_factor == 1.0


def _rope_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    scaling = config.rope_scaling
    if _is_one_table(scaling):
        return {"rope_freqs.weight": np.array(scaling.short_factors, np.float32)}
    if scaling.kind == "longrope":
        both = {"short": scaling.short_factors, "long": scaling.long_factors}
        return {f"rope_factors_{name}.weight": np.array(factors, np.float32) for name, factors in both.items()}
    if scaling.kind == "llama3":
        factors = llama3_factors(
            config.rope_theta, config.rotated, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor,
            scaling.original_context,
        )  # fmt: skip
        return {"rope_freqs.weight": factors.astype(np.float32)}
    return {}


def _check(path: Path, config: ModelConfig) -> None:
    """Raises ConfigError where the file, read back, describes another network."""
    header = read_headers(path)
    values = config_of(Metadata(header.metadata, path), header)
    read = read_fields(Fields(values, path))[1].canonical()
    want = config.canonical()
    for name, value in vars(want).items():
        found = getattr(read, name)
        close = isinstance(value, float) and abs(found - value) <= 1e-6 * abs(value)
        if found != value and not close and name not in ("rope_scaling", "tie_embeddings"):
            raise ConfigError(f"gguf: a GGUF file can't say {name}={value!r}; it would be read as {found!r}")
