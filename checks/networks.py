"""Small networks of each kind with random weights: what a model computes in another order, one of them does, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax

from isthmus.model.config import ModelConfig
from isthmus.model.config_parts import LatentConfig, LoraConfig, MixtureConfig
from isthmus.model.execution import Execution
from isthmus.model.ops.operation import AUTO
from isthmus.model.ops.rounding import narrowed
from isthmus.model.parameter import INIT_STD, Dtype
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.transformer import abstract_params
from isthmus.model.weights.quantization import SCHEMES, quantize_params
from isthmus.model.weights.random import init_params
from isthmus.serve.engine.adapters import KEY_BYTES, Resident
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.executor import Executor, Served

_DENSE = ModelConfig(vocab_size=199, dim=64, layers=3, heads=4, kv_heads=2, head_dim=32, mlp_dim=96, context_length=192)
_EXPERTS = MixtureConfig(experts=8, per_token=2, dim=64, shared_dim=32)
NETWORKS: dict[str, ModelConfig] = {
    "dense": _DENSE,
    "windows": replace(_DENSE, windows=(24, 24, 0)),
    "experts": replace(_DENSE, mixture=_EXPERTS),
    "latent attention": replace(
        _DENSE,
        kv_heads=1,
        head_dim=48,
        latent=LatentConfig(rank=32, query_rank=32, rope_dim=16, nope_dim=32, value_dim=32),
    ),
    "adapters": replace(_DENSE, lora=LoraConfig(8, 8.0, adapters=3)),
}
"""By the name of what is special about each"""
SPREAD = 4.0
"""Random matrices are made larger by this, so that attention and the head have something to choose from"""


@dataclass(frozen=True)
class Numbers:
    """What a network computes with."""

    dtype: Dtype = "float32"
    quantize: str = "none"
    """A name of model/weights/quantization.py's SCHEMES"""
    cache_dtype: Any = "model"

    def __str__(self) -> str:
        weights = self.dtype if self.quantize == "none" else f"{self.quantize} weights, {self.dtype}"
        return weights if self.cache_dtype == "model" else f"{weights}, {self.cache_dtype} cache"


def small_executor(config: ModelConfig, numbers: Numbers, engine: EngineConfig, kernels: str = AUTO) -> Executor:
    """An executor of a network with random weights, warmed up. engine: its cache's dtype is replaced by that of
    `numbers`. Raises ConfigError."""
    mesh = build_mesh(MeshShape())
    engine = replace(engine, cache_dtype=numbers.cache_dtype).resolve(config)
    served = Served(config, engine, config.vocab_size, Execution(numbers.dtype)).with_kernels(kernels, mesh)
    made, kept = init_params(config, 0, mesh), abstract_params(config, mesh, dtype=numbers.dtype)
    for path in made:
        if path.endswith("/lora_b"):  # a fresh adapter adds nothing
            made[path] = INIT_STD * jax.random.normal(jax.random.key(len(path)), made[path].shape)
    params = {path: narrowed(x * SPREAD if x.ndim > 1 else x, kept[path].dtype) for path, x in made.items()}
    if rules := SCHEMES[numbers.quantize]:
        quantize_params(config, params, rules)
    numbered = range(1, config.lora.adapters + 1)
    adapters = {
        f"adapter {place}": Resident(f"adapter {place}", place, bytes([place] * KEY_BYTES)) for place in numbered
    }
    executor = Executor(served, params, mesh, adapters)
    executor.warm_up()
    return executor
