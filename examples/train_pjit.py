"""Trains with jax.jit over a mesh, in one file to copy and edit: python examples/train_pjit.py TEXT OUT [STEPS [MESH]]

The result is a model folder: isthmus.LLM(OUT), or isthmus serve --model OUT. MESH is, for example, dp=2,fsdp=2,tp=2.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax

from isthmus.model.config import ModelConfig
from isthmus.model.execution import Execution
from isthmus.model.sharding import MeshShape, build_mesh, named_sharding, use_mesh
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.transformer import Params, bind
from isthmus.model.weights.checkpoint import Checkpoints
from isthmus.model.weights.random import init_params
from isthmus.train.step import packed_attention

BATCH, SEQ = 8, 64
EXECUTION = Execution(scan_layers=True)  # one body for all layers, with stacked parameters, as in a checkpoint


def batches(tokens: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """int32[BATCH, SEQ + 1]: windows of the text, at random."""
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(tokens) - SEQ - 1, BATCH)
        yield np.stack([tokens[start : start + SEQ + 1] for start in starts])


def loss(config: ModelConfig, params: Params, batch: jax.Array) -> jax.Array:
    """The mean loss of int32[BATCH, SEQ + 1], in nats per token."""
    tokens, targets = batch[:, :-1], batch[:, 1:]
    positions = jax.numpy.broadcast_to(jax.numpy.arange(SEQ), tokens.shape)
    model = bind(config, EXECUTION, params)
    hidden, _ = model(tokens, positions, packed_attention(jax.numpy.zeros_like(tokens)), None)
    return optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), targets).mean()


def main(text: Path, out: Path, steps: int, shape: str) -> None:
    corpus = text.read_text()
    tokenizer = Tokenizer.train([corpus], vocab_size=512)
    config = ModelConfig(
        vocab_size=512, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=128, context_length=256
    )  # fmt: skip
    mesh = build_mesh(MeshShape.parse(shape))
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10 + 1, steps))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: optax.OptState, batch: jax.Array) -> tuple[Params, optax.OptState, jax.Array]:
        value, grads = jax.value_and_grad(partial(loss, config))(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    with use_mesh(mesh):  # parameters and the optimizer's state are created in their shards
        params = init_params(config, seed=0, mesh=mesh, stacked=True)
        state = jax.jit(optimizer.init)(params)
        data = batches(np.array(tokenizer.encode(corpus), np.int32), seed=0)
        for number, batch in zip(range(1, steps + 1), data, strict=False):
            params, state, value = step(params, state, jax.device_put(batch, named_sharding(mesh, "batch", None)))
            value.block_until_ready()
            if number % 20 == 0 or number == steps:
                print(f"step {number}: {value:.3f} nats per token")
    out.mkdir(parents=True, exist_ok=True)
    config.save(out / "config.json")
    tokenizer.save(out / "tokenizer.json")
    checkpoints = Checkpoints(out)
    checkpoints.save(steps, params, None, {"step": steps})
    checkpoints.close()


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 5:
        sys.exit(f"usage: python {sys.argv[0]} TEXT OUT [STEPS [MESH]]")
    words = dict(enumerate(sys.argv))
    main(Path(words[1]), Path(words[2]), int(words.get(3, 200)), words.get(4, ""))
