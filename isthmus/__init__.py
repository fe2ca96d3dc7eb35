"""One Flax transformer, trained with jax.jit over a mesh and served with continuous batching on a paged KV cache.

Names are imported when they are first used, so that importing one of them costs only what that one needs: a `Client`
needs no jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.adapters import AdapterInfo
    from isthmus.aio import AsyncClient
    from isthmus.client import Client, generate_request
    from isthmus.errors import (
        BatchError,
        Cancelled,
        ConfigError,
        DeadlineExceeded,
        DuplicateRequest,
        FailedPrecondition,
        InvalidRequest,
        ModelNotFound,
        Overloaded,
        RequestError,
        RequestFailed,
        Unauthenticated,
        Unavailable,
    )
    from isthmus.forms import Choices, Grammar, JsonObject, JsonSchema, Regex
    from isthmus.llm import LLM, AsyncLLM
    from isthmus.model.sharding import MeshShape
    from isthmus.protocol import AsyncModel, Model
    from isthmus.scores import Embedding, Score
    from isthmus.serve.engine.config import EngineConfig
    from isthmus.train.config import TrainConfig
    from isthmus.train.loop import train
    from isthmus.types import Completion, Delta, FinishReason, SamplingParams, TokenLogprobs

_HOME = {
    "isthmus.adapters": ("AdapterInfo",),
    "isthmus.aio": ("AsyncClient",),
    "isthmus.client": ("Client", "generate_request"),
    "isthmus.errors": (
        "BatchError",
        "Cancelled",
        "ConfigError",
        "DeadlineExceeded",
        "DuplicateRequest",
        "FailedPrecondition",
        "InvalidRequest",
        "ModelNotFound",
        "Overloaded",
        "RequestError",
        "RequestFailed",
        "Unauthenticated",
        "Unavailable",
    ),
    "isthmus.forms": ("Choices", "Grammar", "JsonObject", "JsonSchema", "Regex"),
    "isthmus.llm": ("LLM", "AsyncLLM"),
    "isthmus.model.sharding": ("MeshShape",),
    "isthmus.protocol": ("AsyncModel", "Model"),
    "isthmus.scores": ("Embedding", "Score"),
    "isthmus.serve.engine.config": ("EngineConfig",),
    "isthmus.train.config": ("TrainConfig",),
    "isthmus.types": ("Completion", "Delta", "FinishReason", "SamplingParams", "TokenLogprobs"),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # imported by __getattr__
    "LLM",
    "AdapterInfo",
    "AsyncClient",
    "AsyncLLM",
    "AsyncModel",
    "BatchError",
    "Cancelled",
    "Choices",
    "Client",
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "Delta",
    "DuplicateRequest",
    "Embedding",
    "EngineConfig",
    "FailedPrecondition",
    "FinishReason",
    "Grammar",
    "InvalidRequest",
    "JsonObject",
    "JsonSchema",
    "MeshShape",
    "Model",
    "ModelNotFound",
    "Overloaded",
    "Regex",
    "RequestError",
    "RequestFailed",
    "SamplingParams",
    "Score",
    "TokenLogprobs",
    "TrainConfig",
    "Unauthenticated",
    "Unavailable",
    "generate_request",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":  # a package that can be called, as train/__init__.py explains
        return importlib.import_module("isthmus.train")
    if name not in _MODULES:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
