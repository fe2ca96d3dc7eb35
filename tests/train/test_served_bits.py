"""With the CPU's kernels, training computes what serving computes: a policy and its learner don't drift apart."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.checks.networks import NETWORKS
from isthmus.model.config import LatentConfig, LoraConfig, MixtureConfig, ModelConfig
from isthmus.model.execution import Execution
from isthmus.model.ops.cpu import library
from isthmus.model.ops.kernels import choose
from isthmus.model.ops.operation import Setting
from isthmus.model.ops.sampling import Filters, sample
from isthmus.model.parameter import Dtype
from isthmus.model.transformer import Params, abstract_params, parameter_specs
from isthmus.model.weights.checkpoint import Checkpoints, CheckpointSource
from isthmus.model.weights.load import load_params
from isthmus.model.weights.packing import pack_params
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.predictions import score
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling
from isthmus.train.data import Batch
from isthmus.train.step import Trainer, gradients, log_probabilities, multiplied
from tests.support import as_kept, narrowest_dtype, random_params, relative_error


@pytest.fixture(autouse=True)
def kernels() -> None:
    if reason := library.why_not():
        pytest.skip(reason)


DENSE = dataclasses.replace(NETWORKS["dense"], layers=2, context_length=64)
KINDS: dict[str, ModelConfig] = {
    "dense": DENSE,
    "windows": dataclasses.replace(DENSE, windows=(9, 0)),
    "experts": dataclasses.replace(DENSE, mixture=MixtureConfig(experts=8, per_token=3, dim=64, shared_dim=32)),
    "latent": dataclasses.replace(
        DENSE, kv_heads=1, head_dim=48, latent=LatentConfig(32, query_rank=32, rope_dim=16, nope_dim=32, value_dim=32)
    ),
    "scaled": dataclasses.replace(
        DENSE, embedding_scale=11.3, logit_soft_cap=30.0, attention_soft_cap=20.0, norm_placement="both"
    ),
    "adapter": dataclasses.replace(DENSE, lora=LoraConfig(8, 5.3)),
    "biases": dataclasses.replace(DENSE, attention_bias=True, mlp_bias=True, qk_norm="head", tie_embeddings=False),
}
LENGTHS = ((40, 23), (2, 35))
"""Of the documents of each sequence of a batch; what is left is padding"""


def trained(config: ModelConfig, dtype: Dtype, wish: str = "cpu") -> Execution:
    setting = Setting(config, dtype, "cpu", takes_gradients=True)
    return Execution(dtype, kernels=choose(wish, setting))


@cache
def batch_of(vocab: int) -> tuple[Batch, list[tuple[list[int], int, slice]]]:
    """A batch of [sequences, seq], and each document's tokens, its sequence and where its targets lie in that."""
    rng = np.random.default_rng(0)
    shape = (len(LENGTHS), 64)
    tokens, targets, positions, segments = (np.full(shape, fill, np.int32) for fill in (0, 0, 0, -1))
    documents = []
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for number, length in enumerate(lengths):
            text, end = rng.integers(0, vocab, length + 1), begin + length
            tokens[row, begin:end], targets[row, begin:end] = text[:-1], text[1:]
            positions[row, begin:end], segments[row, begin:end] = np.arange(length), number
            documents.append((text.tolist(), row, slice(begin, end)))
            begin = end
    return Batch(tokens, targets, positions, segments, (segments >= 0).astype(np.float32)), documents


ENGINE = EngineConfig(
    max_sequences=1,
    context_length=64,
    pages=9,
    page_size=8,
    block_size=16,
    prefill_tokens=64,
    draft_rows=0,
    steps_per_launch=1,
    prefix_cache=False,
)


def served_by(config: ModelConfig, dtype: Dtype, mesh: Mesh) -> Served:
    engine = ENGINE.resolve(config)
    return Served(config, engine, config.vocab_size, Execution(dtype)).with_kernels("cpu", mesh)


def told(config: ModelConfig, dtype: Dtype, params: Params, mesh: Mesh, texts: list[list[int]]) -> list[np.ndarray]:
    """What a draw tells of each token of the texts but the first, by the serving side's forward pass over each text
    alone. params: as serving keeps them."""
    packed = pack_params(parameter_specs(config), dict(params))
    windows = np.zeros((len(texts), 64), np.int32)
    for window, text in zip(windows, texts, strict=True):
        window[: len(text)] = text
    rows = 63
    ones, zeros = np.ones(rows, np.float32), np.zeros(rows, np.float32)
    filters = Filters(*map(jnp.asarray, (ones, np.zeros(rows, np.int32), ones, zeros)))
    uniform, judged = np.zeros((rows, 2), np.float32), np.zeros(rows, np.int32)
    found = []
    for window, text, logits in zip(
        windows, texts, score(served_by(config, dtype, mesh), mesh, packed, windows, 0), strict=True
    ):
        given = [jnp.asarray(x) for x in (uniform, judged, window[1:])]
        drawn = sample(jnp.asarray(logits), filters, *given, config.vocab_size, 1, implementation="cpu")
        found.append(np.asarray(drawn.log_probability)[: len(text) - 1])
    return found


@pytest.mark.parametrize("dtype", ["float32", "narrowest"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_gives_a_token_the_bits_that_serving_tells(kind: str, dtype: str, mesh: Mesh) -> None:
    """Else the ratio of two policies that are one is not 1. It holds in the pass that a gradient is taken of."""
    config, numbers = KINDS[kind], narrowest_dtype() if dtype == "narrowest" else "float32"
    params, execution = random_params(config, mesh), trained(config, numbers)
    batch, documents = batch_of(config.vocab_size)

    def loss(rounded: Params) -> tuple[jax.Array, jax.Array]:
        mine, _ = log_probabilities(config, execution, rounded, batch)
        return (mine * batch.weights).sum(), mine

    step = jax.jit(lambda params: jax.value_and_grad(loss, has_aux=True)(multiplied(config, execution, params)))
    (_, mine), _ = step(params)
    theirs = told(config, numbers, as_kept(config, mesh, params, numbers), mesh, [text for text, _, _ in documents])
    for (_, row, place), want in zip(documents, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(mine)[row, place], want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_references(kind: str, mesh: Mesh) -> None:
    """A wrong one would train, only worse."""
    config = KINDS[kind]
    params = jax.tree.map(lambda x: x if x.ndim == 1 else 0.4 * x, random_params(config, mesh))
    batch = jax.tree.map(lambda x: x[None], batch_of(config.vocab_size)[0])
    mine, want = (
        jax.jit(partial(gradients, config, trained(config, "float32", wish)))(params, batch)
        for wish in ("cpu", "reference")
    )
    assert abs(float(mine.loss) - float(want.loss)) < 1e-5
    assert relative_error(mine.grads, want.grads) < 1e-4


def test_what_was_trained_is_served_with_the_trainers_bits(mesh: Mesh, tmp_path: Path) -> None:
    """Through a checkpoint, after steps with the kernels, in the narrowest dtype."""
    config, dtype = DENSE, narrowest_dtype()
    batch, documents = batch_of(config.vocab_size)
    trainer = Trainer(config, optax.adamw(1e-3), mesh, trained(config, dtype))
    state = trainer.init(0)
    losses = []
    for _ in range(3):
        state, metrics = trainer.step(state, jax.tree.map(lambda x: x[None], batch))
        losses.append(float(metrics.loss))
    assert losses == sorted(losses, reverse=True)
    rounded = multiplied(config, trainer.execution, state.params)
    mine, _ = jax.jit(partial(log_probabilities, config, trainer.execution))(rounded, batch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state.params, None, {})
    checkpoints.close()
    kept = load_params(CheckpointSource(tmp_path, config, mesh), abstract_params(config, mesh, dtype=dtype))
    executor = Executor(served_by(config, dtype, mesh), kept, mesh)
    executor.warm_up()
    for text, row, place in documents:
        scoring = Arrival(Request("r", text, Sampling(logprobs=0), 0, scored_from=1))
        play(executor, [scoring])
        assert scoring.end is not None
        want = [each.token for each in scoring.end.prompt_logprobs]
        np.testing.assert_array_equal(np.asarray(mine)[row, place], np.float32(want))


def test_a_loss_that_is_no_number_stays_none(mesh: Mesh) -> None:
    """A run that diverges must show it."""
    params = random_params(DENSE, mesh)
    params["norm/scale"] = params["norm/scale"] * np.nan
    batch, _ = batch_of(DENSE.vocab_size)
    mine, _ = log_probabilities(DENSE, trained(DENSE, "float32"), params, batch)
    assert np.isnan(np.asarray(mine)[batch.weights > 0]).all()
