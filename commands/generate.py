"""`isthmus generate`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import grpc
import tyro

from isthmus.client import Client, read_token
from isthmus.commands.chat import chat
from isthmus.errors import ConfigError, InvalidRequest, RequestError
from isthmus.model.process.cleaning import interrupts_raised
from isthmus.model.weights.hub import FolderOptions
from isthmus.protocol import Model
from isthmus.serve.engine.config import EngineConfig
from isthmus.types import Messages, SamplingParams

if TYPE_CHECKING:
    from isthmus.llm import LLM

ALONE = EngineConfig(max_sequences=1, prefill_tokens=256)
"""The engine of a single sequence"""
HELP = """Completes a prompt and prints the text as it comes.

examples:
  isthmus generate "def __init__(self"
  isthmus generate "import " --model runs/mine --max-tokens 64 --temperature 0.7
  isthmus generate --chat --model models/some-instruct --system "Answer in one sentence."

Without --model it calls the server at --address; with it, it runs the model folder in this process. With --chat it
talks until Ctrl-D: Ctrl-C stops an answer, /reset forgets what was said, /exit ends. Lines piped in are turns."""

Complete = Callable[[str | Messages], Generator[str, None, None]]
"""The text that a model goes on with, as it comes. Closing the generator ends the request."""


@dataclass(frozen=True)
class GenerateConfig:
    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """The text to go on from, or the first message of a chat; - reads standard input"""
    address: str = "127.0.0.1:50051"
    """HOST:PORT of a running server, which is asked where no --model is given"""
    auth_token_file: Path | None = None
    tls_ca: Path | None = None
    """The server runs with --tls-cert: the certificate, in PEM, of who signed its, or its own if that is self-signed"""
    model: Path | None = None
    """A model folder to run here, without a server; or Org/Name, in the local Hugging Face cache"""
    folder: Annotated[FolderOptions, tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction] = field(
        default_factory=FolderOptions
    )
    merge_adapter: bool = False
    """With an adapter as --model: add it to the weights once, instead of computing it in every step"""
    quantize: Literal["none", "int8", "int6", "int5", "int4"] = "none"
    """Keep the matrices of --model as integers, which are made when they are loaded"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights, activations and KV cache of --model; auto is bfloat16, and float32 on CPU"""
    mesh: str = ""
    """Devices to split --model over, as in isthmus serve"""
    kernels: str = "auto"
    """What computes --model, as in isthmus serve"""
    compilation_cache: Path | None = None
    """Where compiled programs are kept; default ~/.cache/isthmus/xla"""
    engine: EngineConfig = field(default_factory=lambda: ALONE)
    """Sizes of the engine that runs --model"""
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

    def sampling(self) -> SamplingParams:
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
        return SamplingParams(**{name: getattr(self, name) for name in names})

    def complete(self, model: Model, prompt: str | Messages) -> Generator[str, None, None]:
        """The text as it comes."""
        parsed = self.parse_special and isinstance(prompt, str)
        with closing(model.stream(prompt, self.sampling(), parse_special=parsed)) as deltas:
            for delta in deltas:
                yield delta.text

    def read_token(self) -> str | None:
        """Raises ConfigError when the file can't be read."""
        try:
            return None if self.auth_token_file is None else read_token(self.auth_token_file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"auth_token_file: {error}") from None

    def validate(self) -> None:
        """Raises ConfigError."""
        if self.prompt is None and not self.chat:
            raise ConfigError("a prompt is missing: isthmus generate PROMPT, or isthmus generate --chat")
        if self.system is not None and not self.chat:
            raise ConfigError("--system is for --chat")
        if self.parse_special and self.chat:
            raise ConfigError("--parse-special is for a prompt: in a chat a special token is always one")
        if self.model is None and self.folder != FolderOptions():
            raise ConfigError("--base, --ignore-field and --download are for --model")
        for name in _OF_A_FOLDER:
            if self.model is None and getattr(self, name) != getattr(_DEFAULT, name):
                raise ConfigError(f"--{name.replace('_', '-')} is for --model")
        if self.model is None and not re.fullmatch(r"(?!https?:)\S+:\d{1,5}", self.address):
            raise ConfigError(f"address={self.address!r} must be HOST:PORT, such as 127.0.0.1:50051")
        if self.model is None and not 1 <= int(self.address.rpartition(":")[2]) <= 65535:  # gRPC takes it modulo 2^16
            raise ConfigError(f"address={self.address!r} must have a port of 1 to 65535")
        for name, bits in (("max_tokens", 32), ("top_k", 32), ("seed", 64)):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1 << bits:
                raise ConfigError(f"{name}={value} must be 0 to {(1 << bits) - 1}")


_DEFAULT = GenerateConfig()
_OF_A_FOLDER = ("merge_adapter", "quantize", "dtype", "mesh", "kernels", "compilation_cache", "engine")


def _open(config: GenerateConfig) -> Client | LLM:
    """The server, or the model in this process. Raises ConfigError and CheckpointError."""
    if config.model is None:
        return Client(config.address, token=config.read_token(), tls_ca=config.tls_ca)
    from isthmus.llm import LLM
    from isthmus.model.sharding import MeshShape

    return LLM(
        config.model,
        dtype=config.dtype,
        quantize=config.quantize,
        mesh=MeshShape.parse(config.mesh),
        kernels=config.kernels,
        engine=config.engine,
        merge_adapter=config.merge_adapter,
        base=config.folder.base,
        ignore_field=config.folder.ignore_field,
        download=config.folder.download,
        compilation_cache=config.compilation_cache,
        progress=True,
    )


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


def _reason(error: RequestError, address: str) -> str:
    """What a server's answer says, and what to do. Every status of ours has details, in the metadata that ends a
    call."""
    code, hint = error.code, ""
    if isinstance(call := error.__cause__, grpc.RpcError):
        code = call.code().name
        if not call.trailing_metadata():
            hint = _HINTS.get(code, "")
    return f"{address}: {code}: {error}{hint}"


_HINTS = {
    "UNAVAILABLE": "; is a server running there? isthmus serve --model DIR",
    "UNIMPLEMENTED": "; is it another server's port?",
}


def main(argv: Sequence[str]) -> int:
    config = tyro.cli(GenerateConfig, args=list(argv), description=HELP, prog="isthmus generate")
    from isthmus.model.weights.checkpoint import CheckpointError

    try:
        config.validate()
        prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
        with _open(config) as model:
            complete = partial(config.complete, model)
            if config.chat:
                with interrupts_raised() if sys.stdin.isatty() else nullcontext():
                    chat(complete, prompt, config.system)
            else:
                _print(prompt or "", complete, config.parse_special)
    except RequestError as error:
        here = config.model is not None
        print(f"isthmus generate: {error if here else _reason(error, config.address)}", file=sys.stderr)
        return 2 if here and isinstance(error, InvalidRequest) else 1
    except BrokenPipeError:  # nobody reads any more: commands/main.py ends the process
        raise
    except (ConfigError, CheckpointError, OSError, ValueError) as error:
        print(f"isthmus generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0
