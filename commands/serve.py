"""`isthmus serve`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

import tyro
from rich.console import Console

from model.checkpoint import CheckpointError
from model.compilation import enable_compilation_cache
from model.config import ConfigError
from serve.api.config import ServeConfig
from serve.api.logs import bound_logs
from serve.api.server import Server
from serve.engine.build import open_model

HELP = """Serves a model folder over gRPC, with continuous batching on a paged KV cache.

examples:
  isthmus serve --model runs/mine
  isthmus serve --model runs/mine --host 0.0.0.0 --auth-token-file token.txt --tls-cert cert.pem --tls-key key.pem
  isthmus serve --model runs/mine --engine.max-sequences 64 --engine.pages 4096

Health (grpc.health.v1) says SERVING once every program is compiled. SIGTERM drains, a second one ends it at once."""


async def serve(config: ServeConfig, console: Console) -> int:
    """Serves until told to stop. Raises ConfigError, CheckpointError, and CancelledError when told while loading."""
    config.validate()
    enable_compilation_cache(config.compilation_cache)
    model = open_model(
        config.model,
        config.dtype,
        merge_adapter=config.merge_adapter,
        quantize=config.quantize,
        options=config.folder,
    )
    for warning in model.warnings:
        console.print(warning, style="yellow", markup=False)
    server = Server(config, model)
    await server.start()
    loading = asyncio.current_task()
    assert loading is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, loading.cancel)
    with console.status("loading") as status:
        show = status.update if console.is_terminal else (lambda text: None)
        await server.load(show)
    engine = server.session.engine
    assert engine is not None
    pages = engine.config.pages - 1
    console.print(
        f"{model.name}: {model.config.parameters / 1e6:.1f}M parameters, {model.config.dtype}; "
        f"{len(engine.config.buckets)} programs in {engine.executor.compile_seconds:.1f} s, "
        f"warm-up {engine.executor.warmup_seconds:.1f} s; {pages} pages of {engine.config.page_size} tokens, "
        f"{pages * engine.config.page_size * engine.config.kv_bytes_per_token(model.config) / 1e6:.0f} MB",
        highlight=False,
    )
    if reason := engine.executor.without_kernels:
        console.print(f"slower than it could be, without CPU kernels: {reason}", style="yellow", markup=False)
    if engine.config.context_length < model.config.context_length:
        console.print(
            f"context: {engine.config.context_length} of the model's {model.config.context_length} tokens, "
            "what memory has room for; --engine.context-length sets it",
            highlight=False,
        )
    for setting in model.generation.ignored:
        console.print(f"generation_config.json: {setting} is not supported and has no effect", style="yellow")
    console.print(f"SERVING on {config.host}:{server.port}", highlight=False)
    if not await server.run():
        why = (
            "hangs in a step, and is left behind"
            if engine.error is None
            else "has ended on an error; see the log above"
        )
        console.print(f"isthmus serve: the engine {why}", style="red")
        return 1
    console.print("drained")
    return 0


def main(argv: Sequence[str]) -> int:
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    bound_logs()
    console = Console(soft_wrap=True)
    config = tyro.cli(ServeConfig, args=list(argv), description=HELP, prog="isthmus serve")
    try:
        if status := _run(serve(config, console)):
            sys.stdout.flush()
            os._exit(status)  # an engine that hangs would keep the process
        return 0
    except (ConfigError, CheckpointError) as error:
        console.print(f"isthmus serve: {error}", style="red", markup=False)
        return 2
    except (asyncio.CancelledError, KeyboardInterrupt):
        console.print("stopped while loading")
        sys.stdout.flush()
        os._exit(0)  # a compilation is still running, and can't be joined or interrupted


def _run(work: Coroutine[Any, Any, int]) -> int:
    """On uvloop, which streams about twice as many messages a second as asyncio's own loop, where it exists."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
