"""`isthmus generate`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from isthmus.model.process.cleaning import interrupts_raised
from isthmus.model.weights.hub import FolderOptions

if TYPE_CHECKING:
    import grpc

HELP = """Completes a prompt and prints the text as it comes.

examples:
  isthmus generate "def __init__(self"
  isthmus generate "import " --model runs/mine --max-tokens 64 --temperature 0.7
  isthmus generate --chat --model models/some-instruct --system "Answer in one sentence."

Without --model it calls the server at --address; with it, it runs the model folder in this process. With --chat it
talks until Ctrl-D: Ctrl-C stops an answer, /reset forgets what was said, /exit ends. Lines piped in are turns."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
Complete = Callable[[Prompt], Generator[str, None, None]]
"""The text that a model goes on with, as it comes. Closing the generator ends the request."""


@dataclass(frozen=True)
class GenerateConfig:
    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """The text to go on from, or the first message of a chat; - reads standard input"""
    address: str = "127.0.0.1:50051"
    """Of a running server"""
    auth_token_file: Path | None = None
    tls_ca: Path | None = None
    """The server runs with --tls-cert: the certificate, in PEM, of who signed its, or its own if that is self-signed"""
    model: Path | None = None
    """A model folder to run here, without a server; or Org/Name, in the local Hugging Face cache"""
    folder: Annotated[FolderOptions, tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction] = field(
        default_factory=FolderOptions
    )
    kernels: str = "auto"
    """For --model: what computes, as in isthmus serve"""
    chat: bool = False
    """Talk, with the model's chat template"""
    system: str | None = None
    """What a chat begins with: how the model is to answer"""
    max_tokens: int | None = None
    temperature: float | None = None
    """0 is greedy. What isn't given here is as the model's makers recommend (generation_config.json: greedy, unless it
    asks for do_sample), and where they recommend nothing: temperature 1, and the filters off"""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    parse_special: bool = False
    """A special token spelt out in the prompt, as <|im_start|>, is that token; otherwise it is text"""
    seed: int | None = None
    """The same seed draws the same text"""

    def options(self) -> dict[str, Any]:
        """As generate_request takes them."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "parse_special", "seed")
        return {name: getattr(self, name) for name in names}

    def read_token(self) -> str | None:
        """Raises ConfigError when the file can't be read."""
        from isthmus.client import read_token
        from isthmus.errors import ConfigError

        try:
            return None if self.auth_token_file is None else read_token(self.auth_token_file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"auth_token_file: {error}") from None

    def validate(self) -> None:
        """Raises ConfigError."""
        from isthmus.errors import ConfigError

        if self.prompt is None and not self.chat:
            raise ConfigError("a prompt is missing: isthmus generate PROMPT, or isthmus generate --chat")
        if self.system is not None and not self.chat:
            raise ConfigError("--system is for --chat")
        if self.parse_special and self.chat:
            raise ConfigError("--parse-special is for a prompt: in a chat a special token is always one")
        if self.model is None and (self.folder != FolderOptions() or self.kernels != "auto"):
            raise ConfigError("--base, --ignore-field, --download and --kernels are for --model")
        if self.model is None and not re.fullmatch(r"(?!https?:)\S+:\d{1,5}", self.address):
            raise ConfigError(f"address={self.address!r} must be HOST:PORT, such as 127.0.0.1:50051")
        for name, bits in (("max_tokens", 32), ("top_k", 32), ("seed", 64)):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1 << bits:
                raise ConfigError(f"{name}={value} must be 0 to {(1 << bits) - 1}")


@contextmanager
def _on_server(config: GenerateConfig) -> Iterator[Complete]:
    from isthmus.client import Client

    with Client(config.address, token=config.read_token(), tls_ca=config.tls_ca) as client:

        def complete(prompt: Prompt) -> Generator[str, None, None]:
            for event in client.stream(prompt, **config.options()):
                if event.WhichOneof("event") == "delta":
                    yield event.delta.text

        yield complete


@contextmanager
def _on_folder(config: GenerateConfig, folder: Path) -> Iterator[Complete]:
    """Through the same validation and engine as a server's, of one sequence."""
    from queue import SimpleQueue

    from rich.console import Console

    from isthmus.client import generate_request
    from isthmus.model.device.compilation import enable_compilation_cache
    from isthmus.model.process.progress import working
    from isthmus.model.sharding import MeshShape
    from isthmus.serve.api.validation import build_request, prompt_ids
    from isthmus.serve.engine.build import build_engine, open_model
    from isthmus.serve.engine.config import EngineConfig
    from isthmus.serve.engine.request import FinishReason, Output

    console = Console(stderr=True, soft_wrap=True)
    if warning := enable_compilation_cache():
        console.print(warning, style="yellow", markup=False)
    model = open_model(folder, options=config.folder)
    for warning in model.remarks:
        console.print(warning, style="yellow", markup=False)

    def take(batch: list[Output]) -> None:
        for output in batch:
            output.request.handle.put(output)

    def complete(prompt: Prompt) -> Generator[str, None, None]:
        message = generate_request(prompt, **config.options())
        ids = prompt_ids(message, model.tokenizer, model.chat, engine.config.context_length)
        request = build_request(message, ids, model.tokenizer, engine.config.context_length, model.generation)
        outputs: SimpleQueue[Output] = SimpleQueue()
        request.handle = outputs
        engine.submit(request)
        stream = model.tokenizer.stream(ids)
        try:
            while True:
                output = outputs.get()
                stops = output.finish_reason in (FinishReason.EOS, FinishReason.STOP_TOKEN)
                if output.token is not None and not stops:
                    yield stream.push([output.token])
                if output.finish_reason is not None:
                    yield stream.flush()
                    return
        finally:
            engine.cancel(request)

    with working(console, "loading") as show:
        sizes = EngineConfig(max_sequences=1, prefill_tokens=256)
        engine = build_engine(model, sizes, MeshShape(), take, show, kernels=config.kernels)
    engine.start()
    try:
        yield complete
    finally:
        engine.close()


def _print(prompt: str, complete: Complete, parse_special: bool) -> None:
    """The prompt comes with the first of what follows it: a call that fails has printed nothing."""
    from isthmus.model.text.tokenizer import looks_special

    if not parse_special and (spelt := looks_special(prompt)):
        print(
            f"isthmus generate: {spelt} in the prompt is taken for text; if the model's special token is meant, give "
            "--parse-special, or --chat to have the model's template write it",
            file=sys.stderr,
        )
    unsaid = prompt
    try:
        for piece in complete(prompt):
            print(unsaid + piece, end="", flush=True)
            unsaid = ""
    except Exception:
        if not unsaid:  # what is said next begins a line
            print(flush=True)
        raise
    print(unsaid)


def _hint(error: grpc.RpcError) -> str:
    """What to do. Every status that a server of ours sends has details, in the metadata that ends a call."""
    import grpc

    if error.trailing_metadata():
        return ""
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return "; is a server running there? isthmus serve --model DIR"
    if error.code() == grpc.StatusCode.UNIMPLEMENTED:
        return "; is it another server's port?"
    return ""


def main(argv: Sequence[str]) -> int:
    import grpc

    config = tyro.cli(GenerateConfig, args=list(argv), description=HELP, prog="isthmus generate")
    from isthmus.commands.chat import chat
    from isthmus.errors import ConfigError
    from isthmus.model.weights.checkpoint import CheckpointError
    from isthmus.serve.engine.request import InvalidRequest

    try:
        config.validate()
        prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
        with _on_folder(config, config.model) if config.model else _on_server(config) as complete:
            if config.chat:
                with interrupts_raised() if sys.stdin.isatty() else nullcontext():
                    chat(complete, prompt, config.system)
            else:
                _print(prompt or "", complete, config.parse_special)
    except grpc.RpcError as error:
        reason = f"{error.code().name}: {error.details()}{_hint(error)}"
        print(f"isthmus generate: {config.address}: {reason}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # nobody reads any more: commands/main.py ends the process
        raise
    except (ConfigError, CheckpointError, InvalidRequest, OSError, ValueError) as error:
        print(f"isthmus generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0
