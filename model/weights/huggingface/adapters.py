"""Reads and writes adapters in PEFT's layout: A [rank, inputs] and B [outputs, rank] for a published module.

The family's table of weights says which module that is, and in which order its rows and columns are. A Piece's view of
an array of row (or column) numbers gives the row (or column) of each of our outputs (or inputs).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from isthmus.errors import ConfigError
from isthmus.model.config import LoraConfig, ModelConfig
from isthmus.model.parameter import Role
from isthmus.model.process.files import present, replace_file, write_json
from isthmus.model.transformer import Params, parameter_specs
from isthmus.model.weights.companions import PUBLISHED_CONFIG
from isthmus.model.weights.described import Described
from isthmus.model.weights.huggingface import tensors
from isthmus.model.weights.huggingface.adapter_config import ADAPTER_CONFIG, AdapterSettings, adapter_config
from isthmus.model.weights.huggingface.families import read_config
from isthmus.model.weights.huggingface.files import TensorFiles
from isthmus.model.weights.huggingface.load import Part, leaves_of, parts_of
from isthmus.model.weights.layout import unstack_params
from isthmus.model.weights.lora import Adapter, split

ADAPTER_FILE = "adapter_model.safetensors"
_STORED = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
_MODULES = (Role.MATRIX, Role.HEADS, Role.TURNED_HEADS, Role.EXPERTS, Role.ROUTER)
"""The roles of parameters that are the weight of a module in a published model. An embedding isn't one, because PEFT
treats it as another kind of module."""


@dataclass(frozen=True)
class Projection:
    """A projection of a layer, which is all or part of a published module."""

    layer: int
    path: str
    """The path within its block, as LoraConfig.targets matches it"""
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tensor: tuple[int, int]
    """The shape [outputs, inputs] of the whole module"""
    columns: np.ndarray
    """int[inputs]: the module's column for each of our inputs"""
    rows: np.ndarray
    """int[outputs]: the module's row for each of our outputs"""


@dataclass(frozen=True)
class Factors:
    """The adapter of a projection: scale * (x @ a[inputs, rank]) @ b[rank, outputs], with axes flattened, in our
    order."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]


Modules = dict[str, list[Projection]]


def _table(base: Described) -> tensors.Table:
    """The table of the base model's weights. For a folder of our own it is that of the published model that the base
    was made from. Where there is none, it is Llama's, with DeepSeek's entries for what Llama doesn't have."""
    family = base.family
    if family is None and present(base.path / PUBLISHED_CONFIG):
        family, _ = read_config(base.path / PUBLISHED_CONFIG, base.ignore_field)
    if family is not None:
        return family.table(base.config)
    if not base.config.latent.rank:
        return {**tensors.DEEPSEEK, **tensors.LLAMA}
    return tensors.DEEPSEEK if base.config.latent.query_rank else tensors.DEEPSEEK_WHOLE_QUERY


def _plain(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, lora=LoraConfig())


def adaptable_modules(config: ModelConfig, table: tensors.Table) -> Modules:
    """The modules that can be adapted, by their published names, with the projections that each consists of."""
    everything = sorted({path for kind in config.layer_kinds for path in config.projections(kind)})
    probe = dataclasses.replace(_plain(config), lora=LoraConfig(1, targets="|".join(everything)))
    specs = parameter_specs(probe)
    modules: Modules = {}
    for layer, kind in enumerate(config.layer_kinds):
        for path in config.projections(kind):
            linear = f"blocks/{layer}/{path}"
            inputs, outputs = specs[f"{linear}/lora_a"].shape[:-1], specs[f"{linear}/lora_b"].shape[1:]
            part = parts_of(config, table, f"{linear}/kernel", specs[f"{linear}/kernel"].shape)
            assert isinstance(part, Part)
            projection = _projection(config, layer, path, part, inputs, outputs)
            modules.setdefault(part.name.removesuffix(".weight"), []).append(projection)
    return modules


def _projection(
    config: ModelConfig, layer: int, path: str, part: Part, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> Projection:
    shape = part.piece.shape(part.shape, config)
    rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    # No memory of the tensor's size is needed: views of a broadcast array repeat its numbers.
    row_of, column_of = (part.piece.view(np.broadcast_to(n, shape), part.shape, config) for n in (rows, columns))
    order = part.piece.order_of(config)
    ours = row_of[(0,) * len(inputs)] if order is None else row_of[(0,) * len(inputs)][..., order]
    first_output: tuple[Any, ...] = (..., *(0,) * len(outputs))
    return Projection(
        layer, path, inputs, outputs, (shape[0], shape[1]), column_of[first_output].reshape(-1), ours.reshape(-1)
    )


# writing


def save_adapter(folder: Path, base: Described, config: ModelConfig, params: Params) -> None:
    """Writes the adapters among `params` to `folder` in PEFT's layout, as an adapter of `base`: adapter_config.json and
    adapter_model.safetensors, in float32. params: of `config`, which has lora, in either layout."""
    table, rank = _table(base), config.lora.rank
    held = dict(_held(split(config, params)[1]))
    modules = {
        name: projections
        for name, projections in adaptable_modules(config, table).items()
        if any((projection.layer, projection.path) in held for projection in projections)
    }
    stored: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for name, projections in modules.items():
        a, b = _fused(projections, [held.get((projection.layer, projection.path)) for projection in projections], rank)
        ranks[name] = len(a)
        stored[f"base_model.model.{name}.lora_A.weight"] = a
        stored[f"base_model.model.{name}.lora_B.weight"] = b
    targets = _targets(config, modules, _weights(config, table))
    settings = adapter_config(base.path, rank, config.lora.alpha, targets, _multiples(ranks, rank))
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / ADAPTER_FILE, lambda path: save_file(stored, path, {"format": "pt"}))
    write_json(folder / ADAPTER_CONFIG, settings)


def _held(adapters: Params) -> Iterator[tuple[tuple[int, str], tuple[np.ndarray, np.ndarray]]]:
    """Yields ((layer, path), (lora_a, lora_b)) of every adapter, in float32."""
    layers = unstack_params({path: np.asarray(array) for path, array in adapters.items()})
    for path, a in layers.items():
        linear, _, name = path.rpartition("/")
        if name == "lora_a":
            _, layer, inner = linear.split("/", 2)
            yield (int(layer), inner), (a.astype(np.float32), layers[f"{linear}/lora_b"].astype(np.float32))


def _fused(
    projections: list[Projection], held: list[tuple[np.ndarray, np.ndarray] | None], rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [n * rank, inputs] and B [outputs, n * rank] of a module that consists of n projections.

    Each projection has an A of its own, and so a block of the rank of its own. Where all have the same A, it is stored
    once. held: lora_a and lora_b of each projection; None for one without an adapter.
    """
    outputs, inputs = projections[0].tensor
    present = [pair for pair in held if pair is not None]
    shared = len(present) == len(held) and all(np.array_equal(pair[0], present[0][0]) for pair in present)
    blocks = 1 if shared else len(projections)
    a, b = np.zeros((blocks * rank, inputs), np.float32), np.zeros((outputs, blocks * rank), np.float32)
    for index, (projection, pair) in enumerate(zip(projections, held, strict=True)):
        if pair is None:
            continue
        start = 0 if shared else index * rank
        a[start : start + rank, projection.columns] = pair[0].reshape(-1, rank).T
        b[projection.rows, start : start + rank] = pair[1].reshape(rank, -1).T
    return a, b


def _weights(config: ModelConfig, table: tensors.Table) -> set[str]:
    """The names of all published modules with a matrix."""
    specs = {path: spec for path, spec in parameter_specs(_plain(config)).items() if spec.role in _MODULES}
    parts = [parts_of(config, table, path, spec.shape) for path, spec in specs.items()]
    return {part.name.removesuffix(".weight") for nested in parts for part in leaves_of(nested)}


def _targets(config: ModelConfig, modules: Modules, everything: set[str]) -> tuple[list[str], list[str]]:
    """Returns target_modules and target_parameters. They hold the last parts of the modules' names, or longer names
    where the last parts would match other modules too.

    In a model with experts, PEFT takes gate_proj, up_proj and down_proj in target_modules for the experts' matrices,
    wherever they are. There, other MLPs are named by their weights in target_parameters.
    """
    inner = {name: name.split(".", 3)[3] for name in modules}
    by_weight = {
        name
        for name, projections in modules.items()
        if config.mixture.experts and projections[0].path.startswith("mlp/")
    }
    by_name = set(modules) - by_weight
    ends = {name.rpartition(".")[2] for name in by_name}
    precise = {name for name in everything if name.rpartition(".")[2] in ends} == by_name
    return (
        sorted(ends if precise else {inner[name] for name in by_name}),
        sorted({f"{inner[name]}.weight" for name in by_weight}),
    )


def _multiples(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """Returns, for each module whose rank isn't `rank`, how many times `rank` it is. Modules are named by as few
    regular expressions as possible."""
    by_end: dict[str, set[int]] = {}
    for name, size in ranks.items():
        by_end.setdefault(name.rpartition(".")[2], set()).add(size // rank)
    found: dict[str, int] = {}
    for name, size in ranks.items():
        end = name.rpartition(".")[2]
        if by_end[end] != {1}:
            found[end if len(by_end[end]) == 1 else re.escape(name)] = size // rank
    return found


# reading


def load_adapter(folder: Path, base: Described, most_rank: int | None = None) -> Adapter:
    """Reads an adapter that `save_adapter` or PEFT wrote: its settings, and its factors in float32 by their paths in
    the unstacked layout.

    All projections get the largest rank; smaller factors are padded with zeros. A projection without an adapter gets
    zeros where the same projection of another layer has one. most_rank: the largest rank of a projection, beyond which
    nothing is read; None is any. Raises ConfigError, naming the field or the tensor, for anything with which PEFT would
    compute another adapter, and for numbers that a model's dtypes can't hold.
    """
    config = _plain(base.config)
    settings = AdapterSettings.load(folder / ADAPTER_CONFIG)
    files = TensorFiles(folder, ADAPTER_FILE)
    modules = adaptable_modules(config, _table(base))
    found: dict[tuple[int, str], Factors] = {}
    for name in _stored_modules(files, modules):
        projections = modules[name]
        key = settings.key_of(name, projections[0].layer)
        module_rank = settings.rank_of(key)
        if most_rank is not None and module_rank > most_rank * len(projections):
            raise ConfigError(
                f"{folder / ADAPTER_CONFIG}: {name} has rank {module_rank}; the most is {most_rank}, "
                "which engine.adapter_rank says where engine.max_adapters says how many places there are"
            )
        a, b = _stored_pair(files, name, projections[0].tensor, module_rank)
        for projection, factors in zip(
            projections, _split(projections, a, b, settings.scale_of(key), settings.rank), strict=True
        ):
            found[projection.layer, projection.path] = factors
    used = {path for (_, path), factors in found.items() if factors.a.any() or factors.b.any()}
    paths = sorted(used or {path for _, path in found})
    rank = max(factors.rank for (_, path), factors in found.items() if path in paths)
    alpha = settings.alpha if rank == settings.rank and not settings.rank_stabilized else settings.scale * rank
    lora = LoraConfig(rank, float(alpha), "|".join(paths))
    ours: dict[str, np.ndarray] = {}
    for projection in (
        projection for projections in modules.values() for projection in projections if projection.path in paths
    ):
        linear = f"blocks/{projection.layer}/{projection.path}"
        with np.errstate(over="ignore", invalid="ignore"):
            pair = _padded(projection, found.get((projection.layer, projection.path)), rank, settings.scale)
        _check_holds(files, linear, pair, lora.scale)
        ours[f"{linear}/lora_a"], ours[f"{linear}/lora_b"] = pair
    return Adapter(lora, ours)


def _check_holds(files: TensorFiles, linear: str, pair: tuple[np.ndarray, np.ndarray], scale: float) -> None:
    """Raises ConfigError for factors that are infinite in bfloat16, b times the scale: in a product of all adapters'
    factors, zero times them is no number, and that would be a sum of everybody's."""
    a, b = (float(np.abs(factor).max(initial=0)) for factor in pair)
    most = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    if not (a <= most and b <= most and b * scale <= most):
        raise ConfigError(
            f"{files.folder / ADAPTER_FILE}: the factors of {linear} reach {a} and {b}, and {b * scale} with their "
            f"scale; at most {most} can be computed with"
        )


def _stored_modules(files: TensorFiles, modules: Modules) -> list[str]:
    """The names of the modules that the file adapts. Raises ConfigError for a module that can't be adapted, or that
    lacks one of its two tensors."""
    halves: dict[str, set[str]] = {}
    for tensor in files.tensors:
        match = _STORED.fullmatch(tensor)
        if match is None or match[1] not in modules:
            layers = 1 + max(each.layer for projections in modules.values() for each in projections)
            if (found := re.search(r"\.layers\.(\d+)\.", tensor)) and int(found[1]) >= layers:
                raise ConfigError(
                    f"{files.folder / ADAPTER_FILE}: the tensor {tensor} is of layer {found[1]}, and the model has "
                    f"layers 0 to {layers - 1}: it is an adapter of another model"
                )
            kind = "of an embedding or the head " if re.search(r"embed_tokens|lm_head", tensor) else ""
            raise ConfigError(
                f"{files.folder / ADAPTER_FILE}: the tensor {tensor} {kind}is no part of an adapter that is supported; "
                "only lora_A and lora_B of projections in attention, and in MLPs that are not experts, are"
            )
        halves.setdefault(match[1], set()).add(match[2])
    for name, sides in halves.items():
        if len(sides) < 2:
            missing = "B" if "A" in sides else "A"
            raise ConfigError(
                f"{files.folder / ADAPTER_FILE}: the tensor base_model.model.{name}.lora_{missing}.weight is missing"
            )
    if not halves:
        raise ConfigError(f"{files.folder / ADAPTER_FILE} holds no tensor")
    return list(halves)


def _stored_pair(files: TensorFiles, module: str, tensor: tuple[int, int], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B of a module in float32. Raises ConfigError for another shape, or numbers that are not finite."""
    pair = []
    for side, shape in (("A", (rank, tensor[1])), ("B", (tensor[0], rank))):
        name = f"base_model.model.{module}.lora_{side}.weight"
        if (found := files.tensors[name].shape) != shape:
            raise ConfigError(
                f"{files.folder / ADAPTER_FILE}: {name} has the shape {list(found)}, and the base model and "
                f"{ADAPTER_CONFIG} make it {list(shape)}"
            )
        array = files.copy(name).astype(np.float32)
        if not np.isfinite(array).all():
            raise ConfigError(f"{files.folder / ADAPTER_FILE}: {name} holds numbers that are not finite")
        pair.append(array)
    return pair[0], pair[1]


def _split(projections: list[Projection], a: np.ndarray, b: np.ndarray, scale: float, rank: int) -> list[Factors]:
    """Returns the adapters of the projections that a module consists of. Each has its rows of B and all of A. Where the
    projections were adapted separately, each has its block of both, which is how `_fused` stores them."""
    blocks = [slice(index * rank, (index + 1) * rank) for index in range(len(projections))]
    whole = [slice(None)] * len(projections)
    apart = len(projections) > 1 and len(a) == len(projections) * rank
    for projection, block in zip(projections, blocks, strict=True):
        theirs = b[projection.rows]
        apart = apart and not np.delete(theirs, np.arange(theirs.shape[1])[block], axis=1).any()
    taken = blocks if apart else whole
    return [
        Factors(a[block][:, projection.columns].T, b[projection.rows][:, block].T, scale)
        for projection, block in zip(projections, taken, strict=True)
    ]


def _padded(projection: Projection, factors: Factors | None, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns lora_a and lora_b, padded to `rank`. They are to be multiplied by `scale` instead of the adapter's own
    scale."""
    a = np.zeros((len(projection.columns), rank), np.float32)
    b = np.zeros((rank, len(projection.rows)), np.float32)
    if factors is not None:
        a[:, : factors.rank] = factors.a
        b[: factors.rank] = factors.b if factors.scale == scale else factors.b * np.float32(factors.scale / scale)
    return a.reshape(*projection.inputs, rank), b.reshape(rank, *projection.outputs)
