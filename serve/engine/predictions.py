"""A model's predictions for tokens that are known, computed as in serving: by a step's forward pass over the paged
cache, with the same kernels, dtypes and integers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isthmus.model.config import ModelConfig
from isthmus.model.ops.operation import AUTO
from isthmus.model.sharding import MeshShape, build_mesh, use_mesh
from isthmus.model.transformer import Params, bind, parameter_specs
from isthmus.model.weights.folder import ModelFolder
from isthmus.model.weights.packing import Packing
from isthmus.serve.engine.build import abstract_served, load_served
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.plan import empty_plan
from isthmus.serve.engine.programs import Served, forward
from isthmus.serve.engine.state import State, empty_state


def predictions(
    folder: ModelFolder, cache_dtype: str, windows: np.ndarray, first: int, *, kernels: str = AUTO
) -> Iterator[np.ndarray]:
    """Yields for each window the logits, float32[size - 1 - first, vocab], of what comes after its tokens from index
    `first` to the last but one, given the tokens before them in the window.

    windows: token ids, int32[n, size]. folder: from `open_model`; it is read before the first window. cache_dtype: as
    in EngineConfig. kernels: as in `isthmus.model.ops.kernels.choose`.
    """
    engine, mesh = _engine(folder.config, cache_dtype, windows.shape[1]), build_mesh(MeshShape())
    served = Served(folder.config, engine, folder.tokenizer.vocab_size, folder.execution).with_kernels(kernels, mesh)
    abstract = abstract_served(folder, mesh) if served.execution.kernels.packs_weights else None
    packing = None if abstract is None else Packing(parameter_specs(folder.config), abstract)
    return score(served, mesh, load_served(folder, mesh, packing), windows, first)


def score(served: Served, mesh: Mesh, params: Params, windows: np.ndarray, first: int) -> Iterator[np.ndarray]:
    """Yields what `predictions` does. params: from `load_served`. served: with kernels chosen, and with an engine whose
    last bucket has room for a whole window."""
    engine = served.engine
    bucket = engine.buckets[-1]
    with use_mesh(mesh):
        state = empty_state(served.abstract_state(mesh), served.execution.kernels.paged_attention)
        state = state._replace(tables=state.tables.at[0].set(1 + jnp.arange(engine.pages_per_sequence)))
        span = range(first, windows.shape[1] - 1)
        step = jax.jit(partial(_logits, served, bucket, span), donate_argnums=1)
        for tokens in windows:
            state, logits = step(params, state, _plan(bucket, engine, tokens, served.model.rope_switch))
            yield np.asarray(logits)


def _engine(config: ModelConfig, cache_dtype: str, size: int) -> EngineConfig:
    """An engine for a single sequence, which computes a whole window in one step, in blocks of the default size."""
    default = EngineConfig()
    page, block = default.page_size, default.block_size
    whole = -(-size // block) * block
    engine = EngineConfig(
        max_sequences=1, context_length=size, pages=1 + whole // page, prefill_tokens=whole, prefix_cache=False,
        cache_dtype=cache_dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    return engine.resolve(config)


def _logits(
    served: Served,
    bucket: Bucket,
    span: range,
    params: Params,
    state: State,
    packed: jax.Array,
) -> tuple[State, jax.Array]:
    model = bind(served.model, served.execution, params)
    hidden, state = forward(model, served.engine, bucket, state, packed)
    return state, model.logits(hidden[bucket.rows + span.start : bucket.rows + span.stop])


def _plan(bucket: Bucket, engine: EngineConfig, tokens: np.ndarray, rope_switch: int) -> np.ndarray:
    """A packed step that computes a whole prompt in the first slot. tokens: int32, the prompt's ids."""
    packed, arrays = empty_plan(engine, bucket)
    prompt = slice(bucket.rows, bucket.rows + len(tokens))
    arrays.tokens[prompt] = tokens
    arrays.positions[prompt] = np.arange(len(tokens))
    arrays.slots[bucket.rows :] = 0
    arrays.uses_long_rope[bucket.rows :] = 0 < rope_switch < len(tokens)
    return packed
