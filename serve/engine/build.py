"""Builds an engine, compiled and ready, from a model folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from isthmus.errors import ConfigError
from isthmus.model.config import LoraConfig
from isthmus.model.device.hardware import check_dtype, default_dtype, free_memory
from isthmus.model.device.memory import release_heap
from isthmus.model.execution import Execution
from isthmus.model.ops.operation import AUTO
from isthmus.model.parameter import Dtype
from isthmus.model.sharding import MeshShape, build_mesh, check_divisible, named_sharding
from isthmus.model.transformer import Params, abstract_params, parameter_specs
from isthmus.model.weights.folder import ModelFolder, open_adapters, open_folder
from isthmus.model.weights.hub import FolderOptions
from isthmus.model.weights.packing import Packing, pack_params
from isthmus.model.weights.quantization import SCHEMES, quantize_params, weight_bytes
from isthmus.serve.engine.adapters import residents
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.engine import Engine, Sink
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.programs import Compiled, Served, abstract_like, compile_steps

PROGRAM_BYTES = 300 << 20
"""Bytes of main memory that compiling, the programs and a step's temporaries take beside weights and cache (measured
with 135M parameters, float32: 270 MB). It matters in a container that has little."""


def open_model(
    path: Path,
    dtype: Dtype | Literal["auto"] = "auto",
    *,
    merge_adapter: bool = False,
    quantize: str = "none",
    adapters: Mapping[str, Path] | None = None,
    options: FolderOptions | None = None,
) -> ModelFolder:
    """Opens a model folder as serving runs it. dtype: float32, bfloat16, or auto, which is bfloat16 except on CPU.
    merge_adapter: an adapter's folder becomes a model without adapters when its parameters are loaded. quantize: a name
    of model/weights/quantization.py's SCHEMES; matrices become integers when they are loaded. adapters: folders of
    LoRA adapters of the model, by the names that requests call them.

    Raises ConfigError if the folder isn't a model's, or if one that is quantized already is to be quantized.
    """
    folder = open_folder(path, options)
    if quantize != "none" and folder.config.quantization:
        raise ConfigError(
            f"quantize={quantize}: leave it out; {path} is quantized already, by "
            + ", ".join(folder.config.quantization)
        )
    dtype = default_dtype() if dtype == "auto" else dtype
    check_dtype(dtype)
    folder = dataclasses.replace(folder.keeping(SCHEMES[quantize]), execution=Execution(dtype))
    folder = folder.with_config(lora=LoraConfig()) if merge_adapter and folder.adapter else folder
    return open_adapters(folder, adapters, options) if adapters else folder


def with_places(model: ModelFolder, engine: EngineConfig) -> ModelFolder:
    """The folder with places in its network for the adapters that the engine is to have, as `EngineConfig.max_adapters`
    says. Raises ConfigError for adapters that don't fit into them."""
    given, places = list(model.adapters.values()), engine.max_adapters or len(model.adapters)
    if not places:
        return model
    engine.resolve(model.config)
    if model.adapter is not None or model.config.lora.rank:
        raise ConfigError(
            f"adapters: {model.name} is an adapter itself: serve its base model, and give it among the adapters"
        )
    if len(given) > places:
        raise ConfigError(f"engine.max_adapters={places} has no place for {len(given)} adapters")
    if engine.max_adapters:
        for name, adapter in model.adapters.items():
            if adapter.lora.rank > engine.adapter_rank:
                raise ConfigError(
                    f"adapters: {name} has rank {adapter.lora.rank}; the most is "
                    f"engine.adapter_rank={engine.adapter_rank}"
                )
        config, rank = model.config, engine.adapter_rank
        targets = {path for kind in config.layer_kinds for path in config.projections(kind)}
    else:
        rank = max(adapter.lora.rank for adapter in given)
        targets = {path for adapter in given for path in adapter.lora.targets.split("|")}
    return model.with_config(lora=LoraConfig(rank, float(rank), "|".join(sorted(targets)), adapters=places))


def fit_memory(engine: EngineConfig, model: ModelFolder, mesh: MeshShape, free: int | None) -> EngineConfig:
    """Resolves `engine`. If its default number of pages doesn't fit into `free` bytes of a device, there are fewer, and
    the context is shorter unless one was asked for. free: None is unknown, and keeps the default. Raises ConfigError if
    not even that fits."""
    config, dtype = model.config, model.execution.dtype
    resolved = engine.resolve(config)
    if engine.pages or free is None:
        return resolved
    left = free - weight_bytes(config, dtype, model.quantize or config.quantization) // (mesh.tp * mesh.ep)
    heads = 1 if config.latent.rank else mesh.tp
    page_bytes = engine.kv_bytes_per_token(config, dtype) * engine.page_size // heads
    share = 0.5 if jax.default_backend() == "cpu" else 0.8  # other processes use main memory, too
    affordable = int(left * share) // page_bytes
    if affordable >= resolved.pages:
        return resolved
    context = resolved.context_length
    if not engine.context_length:
        context = min(context, (affordable - 1) * engine.page_size)
    if context < 2 or affordable < 1 + -(-context // engine.page_size):
        asked = (
            f"engine.context_length={context}"
            if engine.context_length
            else f"memory for {config.context_length} tokens"
        )
        raise ConfigError(
            f"{asked}: {free / 1e9:.2f} GB are free, and after the model's {(free - left) / 1e9:.2f} GB there is room "
            f"for {max(affordable, 0) * engine.page_size} tokens of KV cache; fewer bits take less (dtype, quantize)"
        )
    return dataclasses.replace(engine, pages=affordable, context_length=context).resolve(config)


def _room(device: jax.Device) -> int | None:
    """Bytes of a device for weights and cache; None if they aren't known."""
    free = free_memory(device)
    return free if free is None or device.platform != "cpu" else max(0, free - PROGRAM_BYTES)


def abstract_served(model: ModelFolder, mesh: Mesh) -> Params | None:
    """Shapes, dtypes and shardings of the parameters before any is read. None for integers over several devices, whose
    shardings XLA decides only when they are made."""
    rules = model.quantize or model.config.quantization
    plain = abstract_params(model.config, mesh, dtype=model.execution.dtype)
    if not rules:
        return plain

    def quantized(params: Params) -> Params:
        made = dict(params)
        quantize_params(model.config, made, rules)
        return made

    return _on_one_device(jax.eval_shape(quantized, plain), mesh) if mesh.size == 1 else None


def _on_one_device(params: Params, mesh: Mesh) -> Params:
    whole = named_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)


def build_executor(
    model: ModelFolder,
    engine: EngineConfig,
    mesh: MeshShape,
    on_progress: Callable[[str], None] = lambda text: None,
    *,
    kernels: str = AUTO,
) -> Executor:
    """Loads the newest checkpoint and compiles every bucket meanwhile. on_progress: called with a text as either goes
    on, from any thread. kernels: as in `isthmus.model.ops.kernels.choose`. Raises ConfigError."""
    model = with_places(model, engine)
    check_divisible(model.config, mesh)
    devices = build_mesh(mesh)
    engine = fit_memory(engine, model, mesh, _room(devices.devices.flat[0]))
    served = Served(model.config, engine, model.tokenizer.vocab_size, model.execution).with_kernels(kernels, devices)
    cancelled = False
    done = count(1)

    def compile_all(params: Params) -> Compiled:
        return compile_steps(served, devices, params, compiled)

    def compiled(bucket: Bucket) -> None:
        if cancelled:
            raise CancelledError
        on_progress(f"compiled {next(done)}/{len(engine.buckets)} programs ({bucket.tokens} tokens)")

    abstract = abstract_served(model, devices)
    packing = None
    if abstract is not None and served.execution.kernels.packs_weights:
        specs = parameter_specs(model.config)
        packing = Packing(specs, abstract)
        abstract = _on_one_device(jax.eval_shape(lambda params: pack_params(specs, dict(params)), abstract), devices)
    with ThreadPoolExecutor(1, "compile") as worker:
        ready = None if abstract is None else worker.submit(compile_all, abstract)
        try:
            params = load_served(model, devices, packing, on_progress)
            executor = Executor(served, params, devices, residents(model.adapters))
        except BaseException:
            cancelled = True
            raise
        programs = compile_all(abstract_like(executor.params)) if ready is None else ready.result()
    release_heap()
    on_progress("warming up")
    executor.warm_up(programs)
    return executor


def load_served(
    model: ModelFolder,
    mesh: Mesh,
    packing: Packing | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Params:
    """The parameters as serving keeps them. Each matrix is quantized and packed as soon as it is read, so that the
    model as it was before needn't fit into memory."""
    on_progress("loading parameters")
    total, read = model.nbytes, 0

    def show(size: int) -> None:
        nonlocal read
        read += size
        on_progress(f"loading parameters: {read / 1e9:.2f} of {total / 1e9:.2f} GB")

    transforms = () if packing is None else (packing,)
    params = model.load_params(mesh, model.execution.dtype, show, transforms=transforms)
    return params if packing is None else packing.finish(params)


def build_engine(
    model: ModelFolder,
    engine: EngineConfig,
    mesh: MeshShape,
    sink: Sink,
    on_progress: Callable[[str], None] = lambda text: None,
    *,
    kernels: str = AUTO,
) -> Engine:
    """An engine, not started, whose executor `build_executor` builds from the same arguments. sink: as in Engine."""
    return Engine(build_executor(model, engine, mesh, on_progress, kernels=kernels), sink)
