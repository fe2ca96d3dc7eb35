"""From a model folder to an engine that is compiled and ready."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from model.checkpoint import load_params
from model.config import ConfigError, Dtype, ModelConfig
from model.hardware import check_dtype, default_dtype
from model.sharding import MeshShape, build_mesh, check_divisible
from model.tokenizer import Tokenizer
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine, Sink
from serve.engine.executor import Executor


@dataclass(frozen=True)
class Model:
    """What a model folder says, before any array is read."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def open_model(folder: Path, dtype: str = "auto") -> Model:
    """Reads config.json and tokenizer.json. dtype: float32, bfloat16, or auto, which is bfloat16 except on CPU.

    Raises ConfigError when the folder isn't a model's.
    """
    config = ModelConfig.load(folder / "config.json")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    if dtype == "auto":
        dtype = default_dtype()
    check_dtype(dtype)
    # A scan copies each layer's weights out of the stack every step: serving unrolls.
    config = dataclasses.replace(config, dtype=cast(Dtype, dtype), scan_layers=False, remat="none")
    return Model(folder, config, tokenizer)


def build_executor(
    model: Model, engine: EngineConfig, mesh: MeshShape, tick: Callable[[str], None] = lambda text: None
) -> Executor:
    """Loads the newest checkpoint and compiles every bucket; tick(what) before each part. Raises ConfigError."""
    engine = engine.resolve(model.config)
    check_divisible(model.config, mesh)
    devices = build_mesh(mesh)
    tick("loading parameters")
    params = load_params(model.folder, model.config, devices, model.config.dtype)
    executor = Executor(model.config, engine, params, devices, model.tokenizer.vocab_size)
    todo = len(engine.buckets)
    tick(f"compiling {todo} programs")
    done = iter(range(1, todo + 1))
    executor.compile(lambda bucket: tick(f"compiled {next(done)}/{todo} programs ({bucket.tokens} tokens)"))
    return executor


def build_engine(
    model: Model,
    engine: EngineConfig,
    mesh: MeshShape,
    sink: Sink,
    tick: Callable[[str], None] = lambda text: None,
) -> Engine:
    """As build_executor, with the engine around it; not started."""
    return Engine(build_executor(model, engine, mesh, tick), sink)
