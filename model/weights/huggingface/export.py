"""Writes a model's weights as Hugging Face publishes them, in safetensors files with an index, and makes its
config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.ops.rounding import narrowed
from isthmus.model.process.files import replace_file
from isthmus.model.transformer import Params, parameter_specs
from isthmus.model.weights.huggingface.families import FAMILIES, Family, read_fields
from isthmus.model.weights.huggingface.fields import Fields
from isthmus.model.weights.huggingface.files import DTYPES, INDEX, SINGLE, WeightFiles
from isthmus.model.weights.huggingface.load import Part, parts_of

DTYPES_FILE = "huggingface_dtypes.json"
"""The file in which a converted model's folder keeps the dtypes of the published tensors, so that they can be written
back."""


@dataclass(frozen=True)
class Origin:
    """A parameter, or a slice of one, that is part of a tensor."""

    path: str
    """The parameter's path"""
    index: tuple[int, ...]
    """The index of the slice along the parameter's leading axes"""
    part: Part


@dataclass(frozen=True)
class Target:
    """A tensor that is to be written."""

    origins: list[Origin]
    """The parameters that it is assembled from"""
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def published_config(config: ModelConfig) -> dict[str, Any]:
    """Returns a config.json of the first family that computes this network. Raises ConfigError when there is none.

    Each candidate is read back. It counts only if the result is this very network.
    """
    for candidate in _candidates(config):
        try:
            _, read = read_fields(Fields(dict(candidate), Path("config.json")))
        except ConfigError:
            continue
        if read.computes_as(config):
            return candidate
    raise ConfigError("no family of Hugging Face's computes this network; convert it from the folder it came from")


def _candidates(config: ModelConfig) -> list[dict[str, Any]]:
    """The config.json of each family that the network might belong to, the most common family first."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    common = {
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.context_length,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }
    mixture, window = config.mixture, config.windows[0] or None
    biases = {"attention_bias": config.attention_bias}
    experts = {"num_local_experts": mixture.experts, "num_experts_per_tok": mixture.per_token}
    without_head_dim = {name: value for name, value in common.items() if name != "head_dim"}
    extras: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("llama", common, {**biases, "mlp_bias": config.mlp_bias}),
        ("mistral", common, {"sliding_window": window}),
        ("qwen2", without_head_dim, {}),
        ("qwen3", common, biases),
        ("olmo2", without_head_dim, biases),
        ("mixtral", {**common, "intermediate_size": mixture.dim}, {**experts, "sliding_window": window}),
        (
            "qwen3_moe",
            common,
            {
                **biases,
                "num_experts": mixture.experts,
                "num_experts_per_tok": mixture.per_token,
                "moe_intermediate_size": mixture.dim,
                "norm_topk_prob": mixture.normalize,
                "mlp_only_layers": list(mixture.dense_layers),
            },
        ),
    ]
    return [
        {"architectures": [FAMILIES[name].architecture], "model_type": name, **shared, **special}
        for name, shared, special in extras
    ]


def stored_dtypes(files: WeightFiles) -> dict[str, str]:
    """The dtypes of tensors, with safetensors' names. The most common dtype is under "", and tensors with another one
    are under their names."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    dtypes = {name: names[stored.dtype] for name, stored in files.tensors.items()}
    common = max(set(dtypes.values()), key=list(dtypes.values()).count)
    return {"": common, **{name: dtype for name, dtype in dtypes.items() if dtype != common}}


def write_weights(
    folder: Path,
    family: Family,
    config: ModelConfig,
    params: Params,
    dtypes: dict[str, str],
    max_shard_bytes: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes `params`, which are in the unstacked layout, as one file or as shards with an index.

    dtypes: as `stored_dtypes` returns them. A float32 parameter that was read from a narrower dtype is written back
    without loss. max_shard_bytes: the most bytes of a shard, unless a single tensor has more.
    """
    targets = targets_of(config, family, dtypes)
    shards = _shards({name: target.nbytes for name, target in targets.items()}, max_shard_bytes)
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in shard:
            tensors[name] = assemble(targets[name], params, config)
            placed[name] = file
            on_progress(targets[name].nbytes)
        try:
            replace_file(folder / file, partial(save_file, tensors, metadata={"format": "pt"}))
        except SafetensorError as error:
            raise ConfigError(f"{folder / file} can't be written: {error}") from None
    if len(shards) > 1:
        total = sum(target.nbytes for target in targets.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def weight_bytes(config: ModelConfig, family: Family, dtypes: dict[str, str]) -> int:
    """The number of bytes that `write_weights` will write."""
    return sum(target.nbytes for target in targets_of(config, family, dtypes).values())


def targets_of(config: ModelConfig, family: Family, dtypes: dict[str, str]) -> dict[str, Target]:
    """The tensors of a published model by name, in the order of the layers. dtypes: as `stored_dtypes` returns them."""

    def target(name: str, origins: list[Origin]) -> Target:
        part = origins[0].part
        stored = dtypes.get(name) or dtypes.get(part.other_name) or dtypes[""]
        dtype = np.dtype(DTYPES[stored])
        return Target(origins, part.piece.shape(part.shape, config), dtype)

    return {name: target(name, origins) for name, origins in _origins(config, family).items()}


def _origins(config: ModelConfig, family: Family) -> dict[str, list[Origin]]:
    """The parameters that each tensor is assembled from, in the order of the layers."""
    table = family.table(config)
    origins: dict[str, list[Origin]] = {}

    def add(path: str, index: tuple[int, ...], parts: Part | list) -> None:
        if isinstance(parts, Part):
            origins.setdefault(parts.name, []).append(Origin(path, index, parts))
        else:
            for i, part in enumerate(parts):
                add(path, (*index, i), part)

    for path, spec in parameter_specs(config).items():
        add(path, (), parts_of(config, table, path, spec.shape))
    return dict(sorted(origins.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """The key that sorts names by the value of the numbers in them."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in name.split(".")]


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Divides tensors, in order, into shards of at most `limit` bytes. A tensor that is larger has a shard of its
    own."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def assemble(target: Target, params: Params, config: ModelConfig) -> np.ndarray:
    """Assembles a tensor from the parameters."""
    raw = np.empty(target.shape, target.dtype)
    for origin in target.origins:
        piece = origin.part.piece
        view = piece.view(raw, origin.part.shape, config)
        values = np.asarray(narrowed(params[origin.path][origin.index], target.dtype))
        order = piece.order_of(config)
        if order is None:
            view[...] = values
        else:
            view[..., order] = values
    return raw
