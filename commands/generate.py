"""`isthmus generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

HELP = """Completes a prompt and prints the text as it comes.

examples:
  isthmus generate "def __init__(self"
  isthmus generate "import " --model runs/mine --max-tokens 64 --temperature 0.7

Without --model it calls the server at --address; with it, it runs the model folder in this process."""


@dataclass(frozen=True)
class GenerateConfig:
    prompt: Annotated[str, tyro.conf.Positional]
    """The text to go on from; - reads standard input"""
    address: str = "127.0.0.1:50051"
    """Of a running server"""
    auth_token_file: Path | None = None
    model: Path | None = None
    """A model folder to run here, without a server"""
    max_tokens: int | None = None
    temperature: float = 0.8
    """0 is greedy"""
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    """The same seed draws the same text"""

    def options(self) -> dict[str, Any]:
        """As generate_request takes them."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
        return {name: getattr(self, name) for name in names}


def _from_server(config: GenerateConfig, prompt: str) -> Iterator[str]:
    from isthmus.client import Client

    token = config.auth_token_file.read_text().strip() if config.auth_token_file else None
    with Client(config.address, token=token) as client:
        for event in client.stream(prompt, **config.options()):
            if event.WhichOneof("event") == "delta":
                yield event.delta.text


def _from_folder(config: GenerateConfig, folder: Path, prompt: str) -> Iterator[str]:
    """Through the same validation and engine as a server's, of one sequence."""
    from queue import SimpleQueue

    from isthmus.client import generate_request
    from model.compilation import enable_compilation_cache
    from model.sharding import MeshShape
    from serve.api.validation import build_request, prompt_ids
    from serve.engine.build import build_engine, open_model
    from serve.engine.config import EngineConfig
    from serve.engine.request import FinishReason, Output

    enable_compilation_cache()
    model = open_model(folder)
    message = generate_request(prompt, **config.options())
    request = build_request(message, prompt_ids(message, model.tokenizer), model.tokenizer, model.config.context_length)
    outputs: SimpleQueue[Output] = SimpleQueue()

    def take(batch: list[Output]) -> None:
        for output in batch:
            outputs.put(output)

    size = EngineConfig(max_sequences=1, prefill_tokens=256)
    engine = build_engine(model, size, MeshShape(), take)
    engine.start()
    try:
        engine.submit(request)
        stream = model.tokenizer.stream()
        while True:
            output = outputs.get()
            stops = output.finish_reason in (FinishReason.EOS, FinishReason.STOP_TOKEN)
            if output.token is not None and not stops:
                yield stream.push([output.token])
            if output.finish_reason is not None:
                yield stream.flush()
                return
    finally:
        engine.close()


def main(argv: Sequence[str]) -> int:
    import grpc

    config = tyro.cli(GenerateConfig, args=list(argv), description=HELP, prog="isthmus generate")
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    from model.checkpoint import CheckpointError
    from model.config import ConfigError
    from serve.engine.request import InvalidRequest

    try:
        pieces = _from_folder(config, config.model, prompt) if config.model else _from_server(config, prompt)
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except grpc.RpcError as error:
        hint = (
            "; is a server running there? isthmus serve --model DIR"
            if error.code() == grpc.StatusCode.UNAVAILABLE
            else ""
        )
        print(
            f"\nisthmus generate: {config.address}: {error.code().name}: {error.details()}{hint}",
            file=sys.stderr,
        )
        return 1
    except (ConfigError, CheckpointError, InvalidRequest, OSError, ValueError) as error:
        print(f"\nisthmus generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0
