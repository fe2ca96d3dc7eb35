"""The command `isthmus serve`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import tyro
from rich.console import Console

from isthmus.errors import ConfigError
from isthmus.model.device.compilation import enable_compilation_cache
from isthmus.model.ops.kernels import announcement, fallbacks
from isthmus.model.process.progress import Display, working
from isthmus.model.process.signals import end_at_once
from isthmus.model.weights.checkpoint import CheckpointError
from isthmus.model.weights.folder import ModelFolder
from isthmus.quality.costs import FILE, known, margin, measured
from isthmus.serve.api.config import ServeConfig
from isthmus.serve.api.logs import bound_logs
from isthmus.serve.api.server import Server
from isthmus.serve.engine.build import open_model
from isthmus.serve.engine.executor import Executor

HELP = """Serves a model folder over gRPC, with continuous batching on a paged KV cache.

examples:
  isthmus serve --model runs/mine
  isthmus serve --model runs/mine --host 0.0.0.0 --auth-token-file token.txt --tls-cert cert.pem --tls-key key.pem
  isthmus serve --model runs/mine --adapters poems=runs/poems code=runs/code
  isthmus serve --model runs/mine --adapter-root adapters --engine.max-adapters 8
  isthmus serve --model runs/mine --engine.max-sequences 64 --engine.pages 4096

Health (grpc.health.v1) says SERVING once every program is compiled. SIGTERM drains the server; a second one ends it."""


async def serve(config: ServeConfig, console: Console) -> int:
    """Serves until told to stop. Raises ConfigError and CheckpointError."""
    config.validate()
    if warning := enable_compilation_cache(config.compilation_cache):
        console.print(warning, style="yellow", markup=False)
    model = open_model(
        config.model,
        config.dtype,
        merge_adapter=config.merge_adapter,
        quantize=config.quantize,
        adapters=config.adapter_folders,
        options=config.folder,
    )
    for warning in model.remarks:
        console.print(warning, style="yellow", markup=False)
    server = Server(config, model)
    await server.start()
    try:
        with working(console, "loading") as show:
            await server.load(show)
    except Exception:
        await server.stop()
        raise
    announce(server, console)
    if not await server.run():
        engine = server.session.engine
        hangs = engine is not None and engine.error is None
        why = "hangs in a step; the process ends without it" if hangs else "has ended on an error; see the log above"
        console.print(f"isthmus serve: the engine {why}", style="red")
        return 1
    console.print("drained")
    return 0


def announce(server: Server, console: Console) -> None:
    """Prints what a server that is ready runs, how long its start took, and what may come as a surprise."""
    config, model, engine = server.config, server.session.model, server.session.engine
    assert engine is not None
    pages = engine.config.pages - 1
    token_bytes = engine.config.kv_bytes_per_token(model.config, model.execution.dtype)
    console.print(
        f"{model.name}: {model.config.parameters / 1e6:.1f}M parameters, {model.execution.dtype}; "
        f"{len(engine.config.buckets)} programs in {engine.executor.compile_seconds:.1f} s, "
        f"warm-up {engine.executor.warmup_seconds:.1f} s; {pages} pages of {engine.config.page_size} tokens, "
        f"{pages * engine.config.page_size * token_bytes / 1e6:.0f} MB",
        highlight=False,
    )
    for name, adapter in model.adapters.items():
        console.print(f"adapter {name}: rank {adapter.lora.rank}", highlight=False, markup=False)
    _announce_kernels(engine.executor, config.kernels, console)
    for line in _costs(config, model):
        console.print(line, style="yellow", markup=False)
    if not config.engine.context_length and engine.config.context_length < model.config.context_length:
        console.print(
            f"context: {engine.config.context_length} of the model's {model.config.context_length} tokens, "
            "as many as memory has room for; --engine.context-length sets it",
            highlight=False,
        )
    for setting in model.generation.ignored:
        console.print(f"generation_config.json: {setting} is not supported and has no effect", style="yellow")
    console.print(f"SERVING on {config.host}:{server.port}", highlight=False)


def _announce_kernels(executor: Executor, wish: str, console: Console) -> None:
    """Prints which implementation each operation takes, and why a kernel that was wanted can't run."""
    kernels, setting = executor.served.execution.kernels, executor.served.setting(executor.mesh)
    console.print(announcement(kernels, setting), highlight=False)
    for fallback in fallbacks(kernels, setting, wish):
        console.print(f"slower than it could be, {fallback}", style="yellow", markup=False)


def _costs(config: ServeConfig, model: ModelFolder) -> Iterator[str]:
    """Says what quantizing costs in quality, and on which text or models that was measured."""
    dtype = model.execution.dtype
    if model.config.quantization:
        if (cost := measured(model.path)) is None:
            yield f"what its integers cost isn't known: {model.path} has no valid {FILE} from isthmus convert"
            return
        yield (
            f"{cost.quantize}: {cost.text()}, measured on {cost.date} over {cost.tokens:,} tokens of {cost.source}, in "
            f"{cost.dtype} with a cache in {cost.cache_dtype}"
        )
    elif config.quantize != "none":
        costs = known(config.quantize, dtype)
        told = ", ".join(f"{cost.kl:.2g}{margin(cost.kl_error)} on {name}" for name, cost in costs.items())
        fitted = "" if config.quantize == "int8" else ", and fits the integers so that less is lost"
        yield (
            f"--quantize {config.quantize} rounds while loading, which changes what the model says; isthmus convert "
            f"{config.model} TARGET --quantize {config.quantize} measures by how much{fitted}"
            + (f". Known KL divergences in {dtype}, in nats per token: {told}" if told else "")
        )


def main(argv: Sequence[str]) -> int:
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    bound_logs()
    console = Display(soft_wrap=True)
    config = tyro.cli(ServeConfig, args=list(argv), description=HELP, prog="isthmus serve")
    try:
        if status := _run(serve(config, console)):
            end_at_once(status)  # an engine that hangs would keep the process alive
        return 0
    except (ConfigError, CheckpointError) as error:
        console.print(f"isthmus serve: {error}", style="red", markup=False)
        return 2


def _run(work: Coroutine[Any, Any, int]) -> int:
    """Runs `work` on uvloop if it is installed. It streams about twice as many messages a second as asyncio's loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)
