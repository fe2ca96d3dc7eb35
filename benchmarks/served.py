"""How far a model's predictions, as `isthmus serve` computes them, are from those of a file of llama.cpp's: the paged
cache, the kernels, the dtypes and the integers that serve, over the same tokens and with llama.cpp's definition."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.perplexity import LEAST_LOG_PROBABILITY, BaseLogits, Divergence
from model.config import ConfigError, ModelConfig
from model.folder import ModelFolder
from model.matrices import Packing, place_matrices
from model.ops.attention import Cache
from model.quantization import SCHEMES, weight_bytes
from model.sharding import MeshShape, build_mesh, use_mesh
from model.transformer import Params, bind
from serve.engine.build import abstract_served, open_model
from serve.engine.config import Bucket, EngineConfig
from serve.engine.executor import abstract_cache, forward, uses_kernels
from serve.engine.plan import plan_size, split_plan

ROWS = 32
"""Tokens whose distributions are compared at once: a vocabulary of 262k takes 34 MB each time it is copied"""


@dataclass(frozen=True)
class Quality(Divergence):
    """What a model lost, and what it takes."""

    kl_window_error: float
    """Standard error of the mean KL divergence, windows taken as independent; 0 of a single one"""
    bytes: int
    """Of weights, as serving keeps them"""


def measure(
    model: Path,
    quantize: str | Sequence[str],
    dtype: str,
    cache_dtype: str,
    base: Path,
    tick: Callable[[], None] = lambda: None,
) -> Quality:
    """Runs the model of a folder over a base file's tokens; tick() after each window.

    quantize: a scheme of model/quantization.py, or rules; "none" for a folder that is quantized already, or is to be
    measured in `dtype`. dtype and cache_dtype: as serving takes them. Raises ConfigError.
    """
    folder = _open(model, quantize, dtype)
    size = weight_bytes(folder.config, folder.quantize or folder.config.quantization)
    file = BaseLogits.open(base)
    if file.vocab != folder.config.vocab_size:
        raise ConfigError(f"base: {base} has a vocabulary of {file.vocab}, {model} of {folder.config.vocab_size}")
    if file.n_ctx > folder.config.context_length:
        raise ConfigError(f"base: {base} has windows of {file.n_ctx}, {model} takes {folder.config.context_length}")
    gathered = _Gathered()
    for window, logits in enumerate(_predictions(folder, _engine(cache_dtype, file.n_ctx), file)):
        gathered.add(file.log_probabilities(window), logits, file.targets(window))
        tick()
    return gathered.quality(size)


def _open(model: Path, quantize: str | Sequence[str], dtype: str) -> ModelFolder:
    if not isinstance(quantize, str):
        return dataclasses.replace(open_model(model, dtype), quantize=tuple(quantize))
    if quantize in SCHEMES:
        return open_model(model, dtype, quantize=quantize)
    return _open(model, quantize.split(","), dtype)


def _engine(cache_dtype: str, n_ctx: int) -> EngineConfig:
    """Of a single sequence, whose whole window is one step; blocks as served."""
    default = EngineConfig()
    page, block = default.page_size, default.block_size
    whole = -(-n_ctx // block) * block
    return EngineConfig(
        max_sequences=1, context_length=n_ctx, pages=1 + whole // page, prefill_tokens=whole, prefix_cache=False,
        cache_dtype=cache_dtype,  # type: ignore[arg-type]
    )  # fmt: skip


def _predictions(folder: ModelFolder, engine: EngineConfig, file: BaseLogits) -> Iterator[np.ndarray]:
    """float32[predicted, vocab] of logits for each window."""
    config, mesh = folder.config, build_mesh(MeshShape())
    engine = engine.resolve(config)
    kernels = uses_kernels(engine, mesh)
    params = _params(folder, mesh, kernels)
    bucket = engine.buckets[-1]
    span = range(file.first, file.n_ctx - 1)
    with use_mesh(mesh):
        cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_cache(config, engine, mesh))
        step = jax.jit(partial(_logits, config, engine, bucket, kernels, span), donate_argnums=1)
        for tokens in windows(folder, file):
            cache, logits = step(params, cache, plan(bucket, engine, tokens, config.rope_switch))
            yield np.asarray(logits)


def _params(folder: ModelFolder, mesh: jax.sharding.Mesh, kernels: bool) -> Params:
    """As serving keeps them."""
    dtype = folder.config.dtype
    if not kernels:
        return folder.load_params(mesh, dtype)
    abstract = abstract_served(folder, mesh)
    assert abstract is not None, "kernels run on one device"
    packing = Packing(folder.config, abstract)
    return packing.finish(folder.load_params(mesh, dtype, keep=packing.put))


def _logits(
    config: ModelConfig,
    engine: EngineConfig,
    bucket: Bucket,
    kernels: bool,
    span: range,
    params: Params,
    cache: Cache,
    packed: jax.Array,
) -> tuple[Cache, jax.Array]:
    model = bind(config, place_matrices(params))
    arrays = split_plan(packed, bucket, engine.pages_per_sequence)
    hidden, cache = forward(model, engine, bucket, kernels, cache, arrays)
    return cache, model.logits(hidden[bucket.rows + span.start : bucket.rows + span.stop])


def windows(folder: ModelFolder, file: BaseLogits) -> np.ndarray:
    """int32[windows, n_ctx]: the file's tokens as llama.cpp gives them to the model: where the text began with a token
    that the tokenizer puts there, every window does."""
    tokens = file.tokens.copy()
    if folder.tokenizer.encode("")[:1] == [int(tokens[0, 0])]:
        tokens[:, 0] = tokens[0, 0]
    return tokens


def plan(bucket: Bucket, engine: EngineConfig, tokens: np.ndarray, rope_switch: int) -> np.ndarray:
    """A step that computes a whole prompt, int32[at most the bucket's blocks], in the pages after the null page."""
    packed = np.zeros(plan_size(bucket, engine.pages_per_sequence), np.int32)
    arrays = split_plan(packed, bucket, engine.pages_per_sequence)
    arrays.positions[:] = -1
    prompt = slice(bucket.rows, bucket.rows + len(tokens))
    arrays.tokens[prompt] = tokens
    arrays.positions[prompt] = np.arange(len(tokens))
    arrays.tables[bucket.rows :] = 1 + np.arange(engine.pages_per_sequence)
    arrays.long[bucket.rows :] = 0 < rope_switch < len(tokens)
    return packed


class _Gathered:
    """Sums over windows, as llama-perplexity makes them."""

    def __init__(self) -> None:
        self._kl: list[np.ndarray] = []
        self._same: list[np.ndarray] = []
        self._nats: list[np.ndarray] = []
        self._base_nats: list[np.ndarray] = []

    def add(self, want: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> None:
        """want: float32[tokens, vocab] of log-probabilities; targets: int32[tokens], what came."""
        got = np.concatenate([log_softmax(logits[row : row + ROWS]) for row in range(0, len(logits), ROWS)])
        parts = range(0, len(want), ROWS)
        self._kl.append(np.concatenate([kl_divergence(want[row : row + ROWS], got[row : row + ROWS]) for row in parts]))
        self._same.append(want.argmax(axis=1) == got.argmax(axis=1))
        row = np.arange(len(targets))
        self._nats.append(-got[row, targets])
        self._base_nats.append(-want[row, targets])

    def quality(self, size: int) -> Quality:
        kl = np.concatenate(self._kl)
        by_window = [float(each.mean()) for each in self._kl]
        return Quality(
            tokens=len(kl),
            kl=float(kl.mean()),
            kl_error=standard_error(kl),
            top1=float(np.concatenate(self._same).mean()),
            perplexity=math.exp(float(np.concatenate(self._nats).mean())),
            base_perplexity=math.exp(float(np.concatenate(self._base_nats).mean())),
            kl_window_error=standard_error(by_window),
            bytes=size,
        )


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Of their mean."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32[tokens, vocab]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def kl_divergence(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """float64[tokens] in nats, of log-probabilities float32[tokens, vocab]; what the original gives less than e^-16
    doesn't count."""
    counted = want > LEAST_LOG_PROBABILITY
    return np.where(counted, np.exp(want) * (want - got), 0).sum(axis=1, dtype=np.float64)
