"""Every family's numbers are those of transformers in torch: through training's forward pass and through the engine.

The golden files are tiny random models with every peculiar feature of their family on; make_golden.py made them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.model.config import ModelConfig
from isthmus.model.execution import DEFAULT_EXECUTION, Execution
from isthmus.model.sharding import use_mesh
from isthmus.model.transformer import Params, bind
from isthmus.model.weights.huggingface.families import read_config
from isthmus.model.weights.huggingface.load import leaves_of, parts_of
from isthmus.model.weights.layout import is_stacked
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import End, Request
from isthmus.serve.engine.pooling import Pooling
from isthmus.serve.engine.programs import Served, forward_step
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.engine.scheduler import Scheduler
from isthmus.train.data import Batch
from isthmus.train.step import gradients, long_sequences, packed_attention
from tests.parity.families import FAMILIES, GOLDEN, golden, gradient_norms, load, others_slow
from tests.serve.engine.harness import only_tokens, stale_state, with_tables
from tests.support import packed_params, relative_error

TOLERANCE = 2e-5
"""Relative, of a sequence's logits together (Euclidean); float32 in another order of operations moves them by 5e-6."""
SCORE_TOLERANCE = 3e-5
"""Absolute, of a log-probability; float32 in another order of operations moves them by 1.4e-5."""
GREEDY = Sampling(temperature=0)


def batch_of(tokens: Any, lengths: Any) -> Batch:
    """Documents packed one a row: tokens int32[rows, seq], what is past a row's length being padding."""
    tokens = np.asarray(tokens, np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    inside = positions < np.asarray(lengths)[:, None]
    segments = np.where(inside, 0, -1).astype(np.int32)
    return Batch(tokens, np.roll(tokens, -1, 1), np.where(inside, positions, 0), segments, inside.astype(np.float32))


@lru_cache(maxsize=64)
def _logits(config: ModelConfig) -> Any:
    def run(params: Params, batch: Batch) -> jax.Array:
        model = bind(config, Execution(scan_layers=any(map(is_stacked, params))), params)
        attend, uses_long_rope = packed_attention(batch.segments), long_sequences(config, batch)
        hidden, _ = model(batch.tokens, batch.positions, attend, None, uses_long_rope)
        return model.logits(hidden)

    return jax.jit(run)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_computes_the_logits_of_transformers(family: str, mesh: Mesh) -> None:
    """A model that was downloaded would otherwise be another model here; rows are ragged and lie in one batch."""
    want = golden(family)
    _, config, params = load(family, mesh)
    got = np.asarray(_logits(config)(params, batch_of(want["tokens"], want["lengths"])))
    for row, length in enumerate(want["lengths"]):
        assert relative_error(got[row, :length], want["logits"][row, :length]) <= TOLERANCE, f"length {length}"


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma3", "gpt_oss", "qwen3_moe", "smollm3"])
def test_scanned_layers_are_the_same_network(family: str, mesh: Mesh) -> None:
    """The stacked layout that accelerators train with must put every layer's kind where it belongs."""
    want = golden(family)
    _, config, params = load(family, mesh, stacked=True)
    got = np.asarray(_logits(config)(params, batch_of(want["tokens"][-1:], want["lengths"][-1:])))
    assert relative_error(got[0], want["logits"][-1]) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_an_older_folder_is_read_as_the_same_model(family: str) -> None:
    """Most folders on the hub were written before transformers 5, which names and nests things otherwise."""
    new, old = (read_config(GOLDEN / family / name)[1] for name in ("config.json", "config_v4.json"))
    assert new == old


def engine_for(config: ModelConfig) -> EngineConfig:
    """Short of pages, so that requests are preempted; two programs, so that compiling doesn't take minutes."""
    sizes = {
        "max_sequences": 4,
        "page_size": 4,
        "block_size": 8,
        "prefill_tokens": 16,
        "pages": 50,
        "draft_rows": 0,
        "steps_per_launch": 1,
    }
    engine = EngineConfig(**sizes).resolve(config)
    engine.__dict__["buckets"] = (Bucket(4, 0, 8), Bucket(4, 2, 8, 2))
    return engine


def run_logged(
    config: ModelConfig, params: Params, mesh: Mesh, requests: list[Request], kernels: str, ends: dict[Request, End]
) -> Iterator[tuple]:
    """Runs `requests` through scheduler and paged attention; yields (sequence, position, logits) of every sample, and
    notes how each ended in `ends`.

    What is drawn is the next of the tokens in request.reply_to, as long as there are any, and the likeliest after that.
    """
    engine = engine_for(config)
    params = packed_params(config, params) if kernels == "auto" else params
    served = Served(config, engine, config.vocab_size).with_kernels(kernels, mesh)

    programs = {b: jax.jit(partial(forward_step, served, b), donate_argnums=1) for b in engine.buckets}
    scheduler = Scheduler(engine, config.rope_switch)
    for request in requests:
        scheduler.add(request)
    state = stale_state(served, mesh)
    while (plan := scheduler.plan()) is not None:
        with use_mesh(mesh):
            state, logits, hidden = programs[plan.bucket](params, with_tables(state, plan), plan.packed)
        rows = np.asarray(logits)
        drawn = rows.argmax(axis=1)
        for row, sequence in plan.samples:
            length, given = len(sequence.tokens), sequence.request.reply_to
            yield sequence, length - 1, rows[row]
            if length < len(given):
                drawn[row] = given[length]
        events = scheduler.commit(plan, only_tokens(drawn), hidden=np.asarray(hidden))
        ends |= {event.request: event.end for event in events if event.end is not None}
        scheduler.check()
    assert scheduler.idle and scheduler.counters.preemptions > 0


@pytest.mark.parametrize("kernels", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family", others_slow("deepseek_v3", "gemma3", "gpt_oss", "llama3", "mixtral", "olmo2", "phi4", "smollm3")
)
def test_the_engine_computes_what_transformers_does(family: str, kernels: str, mesh: Mesh) -> None:
    """Chunked prompts, pages, windows, sinks, shared latents and preemptions are other ways to the same logits, to the
    same embeddings, and to the same 64 tokens of greedy text, for requests that run together."""
    want = golden(family)
    _, config, params = load(family, mesh)
    requests = []
    for row, length in enumerate(want["lengths"]):
        tokens = want["tokens"][row, :length].tolist()
        for prompt in sorted({1, max(1, length // 3), max(1, length - 2)}):
            requests.append(Request(f"{row}.{prompt}", tokens[:prompt], GREEDY, length - prompt + 1, reply_to=tokens))
    texts = [
        Request(f"text {row}", want["prompts"][row, :length].tolist(), GREEDY, 64, reply_to=())
        for row, length in enumerate(want["prompt_lengths"])
    ]
    pooled = {
        (row, pooling): Request(
            f"{pooling.name} {row}", want["tokens"][row, :length].tolist(), GREEDY, 0, pooling=pooling
        )
        for row, length in enumerate(want["lengths"])
        for pooling in Pooling
    }
    seen: dict[str, dict[int, np.ndarray]] = {request.id: {} for request in requests + texts}
    generated: dict[str, list[int]] = {}
    ends: dict[Request, End] = {}
    together = [*requests, *texts, *pooled.values()]
    for sequence, position, logits in run_logged(config, params, mesh, together, kernels, ends):
        seen[sequence.request.id][position] = logits
        generated[sequence.request.id] = sequence.tokens
    for request in requests:
        row, length = int(request.id.split(".")[0]), len(request.reply_to)
        # While a sequence grows over longrope's switch it turns as a short one; transformers' row is whole, and long.
        at = [position for position in seen[request.id] if same_rope(config, position, length)]
        got = np.stack([seen[request.id][position] for position in at])
        assert relative_error(got, want["logits"][row, at]) <= TOLERANCE, request.id
    for row, request in enumerate(texts):
        assert generated[request.id][len(request.prompt) :] == want["generated"][row].tolist(), request.id
    for (row, pooling), request in pooled.items():
        state = want[{Pooling.MEAN: "mean_state", Pooling.LAST: "last_state"}[pooling]][row]
        assert relative_error(ends[request].embedding, state) <= TOLERANCE, request.id


def same_rope(config: ModelConfig, position: int, length: int) -> bool:
    """Whether a token computed as the last of its sequence turns as in a sequence of `length` tokens."""
    return (position + 1 > config.rope_switch) == (length > config.rope_switch)


@pytest.mark.parametrize("family", ["gpt_oss", "phi3", "deepseek_v3"])
def test_greedy_text_comes_out_of_the_whole_engine(family: str, mesh: Mesh) -> None:
    """With the sampler on the device and a step in flight, and beside requests that nobody compares. Log-probabilities
    of given tokens are those of transformers, too."""
    want = golden(family)
    _, config, params = load(family, mesh)
    served = Served(config, engine_for(config), config.vocab_size).with_kernels("auto", mesh)
    executor = Executor(served, params, mesh)
    executor.warm_up()
    rng = random.Random(0)
    arrivals = []
    for row, length in enumerate(want["prompt_lengths"]):
        request = Request(f"{row}", want["prompts"][row, :length].tolist(), GREEDY, 64)
        noise = Request(f"noise{row}", [rng.randrange(config.vocab_size) for _ in range(20)], GREEDY, 30)
        arrivals += [Arrival(request, step=3 * row), Arrival(noise, step=5 * row)]
    given = [want["tokens"][row, :length].tolist() for row, length in enumerate(want["lengths"])]
    scored = [
        Arrival(Request(f"given{row}", tokens, Sampling(logprobs=3), 0, scored_from=1), step=4 * row)
        for row, tokens in enumerate(given)
        if len(tokens) > 1
    ]
    play(executor, arrivals + scored)
    for arrival in scored:
        row, tokens = int(arrival.request.id[5:]), list(arrival.request.prompt)
        assert arrival.end is not None and len(arrival.end.prompt_logprobs) == len(tokens) - 1
        for position, told in enumerate(arrival.end.prompt_logprobs):
            if same_rope(config, position, len(tokens)):
                own = log_softmax(want["logits"][row, position])
                assert told.token == pytest.approx(own[tokens[position + 1]], abs=SCORE_TOLERANCE)
                assert told.top == pytest.approx(np.sort(own)[::-1][:3], abs=SCORE_TOLERANCE)
    for row in range(len(want["prompt_lengths"])):
        assert arrivals[2 * row].completion == want["generated"][row].tolist(), f"prompt {row}"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


@pytest.mark.parametrize("family", others_slow("deepseek_v3", "gemma3", "gpt_oss", "llama3"))
def test_gradients_are_those_of_torch(family: str, mesh: Mesh) -> None:
    """A wrong gradient trains quietly into a worse model; dense layers, routers and experts are compared by tensor."""
    want = golden(family)
    kind, config, params = load(family, mesh)
    tokens = want["train_tokens"]
    inputs = batch_of(tokens[:, :-1], [tokens.shape[1] - 1] * len(tokens))
    batch = Batch(*(np.asarray(x)[None] for x in inputs._replace(targets=tokens[:, 1:].astype(np.int32))))
    loss, grads, _ = jax.jit(partial(gradients, config, DEFAULT_EXECUTION))(params, batch)
    assert abs(float(loss) - want["loss"]) <= 1e-5 * want["loss"]
    squares = sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(grads))
    assert abs(squares**0.5 - want["grad_norm"]) <= 1e-4 * want["grad_norm"]

    sums: dict[str, float] = {}
    for path, grad in grads.items():
        parts = list(leaves_of(parts_of(config, kind.table(config), path, grad.shape)))
        for part, values in zip(parts, np.asarray(grad, np.float64) if len(parts) > 1 else [grad], strict=True):
            sums[part.name] = sums.get(part.name, 0.0) + float((np.asarray(values, np.float64) ** 2).sum())
    norms = gradient_norms(family)
    for name, norm in norms.items():
        assert abs(sums[name] ** 0.5 - norm) <= 1e-4 * norm + 1e-6 * float(want["grad_norm"]), name
