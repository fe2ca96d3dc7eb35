"""Small networks of each kind with random weights: what a model computes in another order, one of them does, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from isthmus.checks.crowd import Guest
from isthmus.model.config import ModelConfig
from isthmus.model.config_parts import LatentConfig, LoraConfig, MixtureConfig
from isthmus.model.execution import Execution
from isthmus.model.ops.operation import AUTO
from isthmus.model.ops.rounding import narrowed
from isthmus.model.parameter import INIT_STD, Dtype
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.transformer import Params, abstract_params, parameter_specs
from isthmus.model.weights.lora import Adapter
from isthmus.model.weights.quantization import SCHEMES, quantize_params
from isthmus.model.weights.random import init_params
from isthmus.serve.engine.adapters import KEY_BYTES, Resident
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.programs import Served

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
    "adapters": replace(_DENSE, lora=LoraConfig(8, 8.0, adapters=4)),
}
"""By the name of what is special about each"""
FREE_PLACES = 2
"""Of those for adapters: what is loaded there changes while requests run"""
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


def small_params(config: ModelConfig) -> Params:
    """A network's random weights, float32."""
    made = init_params(config, 0, build_mesh(MeshShape()))
    for path in made:
        if path.endswith("/lora_b"):  # a fresh adapter adds nothing
            made[path] = INIT_STD * jax.random.normal(jax.random.key(len(path)), made[path].shape)
    return {path: x * SPREAD if x.ndim > 1 else x for path, x in made.items()}


def small_executor(config: ModelConfig, numbers: Numbers, engine: EngineConfig, kernels: str = AUTO) -> Executor:
    """An executor of a network with random weights, warmed up. engine: its cache's dtype is replaced by that of
    `numbers`. Raises ConfigError."""
    mesh = build_mesh(MeshShape())
    engine = replace(engine, cache_dtype=numbers.cache_dtype).resolve(config)
    served = Served(config, engine, config.vocab_size, Execution(numbers.dtype)).with_kernels(kernels, mesh)
    kept = abstract_params(config, mesh, dtype=numbers.dtype)
    params = {path: narrowed(x, kept[path].dtype) for path, x in small_params(config).items()}
    if rules := SCHEMES[numbers.quantize]:
        quantize_params(config, params, rules)
    numbered = range(1, config.lora.adapters + 1 - FREE_PLACES)
    adapters = {
        f"adapter {place}": Resident(f"adapter {place}", place, bytes([place] * KEY_BYTES)) for place in numbered
    }
    executor = Executor(served, params, mesh, adapters)
    executor.warm_up()
    return executor


def guests(config: ModelConfig, seed: int) -> list[Guest]:
    """Adapters of random weights, ranks and scales, more than there are free places for; none for a network without
    places."""
    rng, made = np.random.default_rng(seed), []
    for number in range(2 * FREE_PLACES + 1 if config.lora.adapters else 0):
        rank = int(rng.integers(1, config.lora.rank + 1))
        lora = replace(config.lora, rank=rank, alpha=float(rng.uniform(0.5, 2)) * rank, adapters=0)
        shapes = {path: spec.shape for path, spec in parameter_specs(replace(config, lora=lora)).items()}
        factors = {
            path: (SPREAD * INIT_STD * rng.standard_normal(shape)).astype(np.float32)
            for path, shape in sorted(shapes.items())
            if path.endswith(("/lora_a", "/lora_b"))
        }
        made.append(Guest(f"guest {number}", Adapter(lora, factors)))
    return made
