"""The command `isthmus generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import grpc
import tyro

from isthmus.client import Client, check_target, read_token
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
"""The sizes of an engine for a single sequence"""
HELP = """Completes a prompt and prints the text as it comes.

examples:
  isthmus generate "def __init__(self"
  isthmus generate "import " --model runs/mine --max-tokens 64 --temperature 0.7
  isthmus generate --chat --model models/some-instruct --system "Answer in one sentence."

Without --model it calls the server at --address; with --model it runs the model in this process. --chat holds a
conversation until Ctrl-D or /exit: Ctrl-C stops an answer, /reset starts anew. Each line that is piped in is a turn."""

Complete = Callable[[str | Messages], Generator[str, None, None]]
"""Streams the text that continues a prompt or answers a conversation. Closing the generator ends the request."""


@dataclass(frozen=True)
class GenerateConfig:
    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """The text to continue, or the first message of a chat; - reads standard input"""
    address: str = "127.0.0.1:50051"
    """HOST:PORT of the running server to call if --model isn't given"""
    auth_token_file: Path | None = None
    """File with the auth token that the server asks for"""
    tls_ca: Path | None = None
    """For a server with --tls-cert: PEM file with the certificate of the authority that signed the server's, or with
    the server's own if it is self-signed"""
    adapter: str = ""
    """Compute with this one of the server's adapters, by its name there"""
    model: Path | None = None
    """Run a model without a server: a model folder, a GGUF file, or Org/Name from the local Hugging Face cache"""
    folder: Annotated[FolderOptions, tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction] = field(
        default_factory=FolderOptions
    )
    merge_adapter: bool = False
    """If --model is an adapter, add it to the base model's weights once instead of computing it in every step"""
    quantize: Literal["none", "int8", "int6", "int5", "int4"] = "none"
    """Keep the matrices of --model as integers of so many bits, quantized while loading"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights, activations and KV cache of --model; auto is bfloat16, and float32 on CPU"""
    mesh: str = ""
    """Devices to split --model over, such as tp=2; isthmus serve --help says more"""
    kernels: str = "auto"
    """Kernels that compute --model: auto, reference, or a name such as cpu; isthmus serve --help says more"""
    compilation_cache: Path | None = None
    """Folder in which compiled programs are kept; by default ~/.cache/isthmus/xla"""
    engine: EngineConfig = field(default_factory=lambda: ALONE)
    """Sizes of the engine that runs --model"""
    chat: bool = False
    """Hold a conversation, using the model's chat template"""
    system: str | None = None
    """System message of a chat, which tells the model how to answer"""
    max_tokens: int | None = None
    """Most tokens to generate; by default 256, or what is left of the context if that is less"""
    temperature: float | None = None
    """0 is greedy. Without it, as without top_p, top_k and min_p, the model's generation_config.json decides (greedy,
    unless it sets do_sample); what that leaves open is temperature 1 and no filters"""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probabilities sum to at least this; 1 is off"""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0 is off"""
    min_p: float | None = None
    """Keep tokens that are at least this fraction as likely as the likeliest; 0 is off"""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End the text before this string; may be given several times"""
    parse_special: bool = False
    """Read a special token that the prompt spells out, such as <|im_start|>, as that token instead of as text"""
    seed: int | None = None
    """The same seed draws the same text again; by default each run has another"""

    def sampling(self) -> SamplingParams:
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed")
        return SamplingParams(**{name: getattr(self, name) for name in names})

    def complete(self, model: Model, prompt: str | Messages) -> Generator[str, None, None]:
        """Yields the text as it comes."""
        parsed = self.parse_special and isinstance(prompt, str)
        with closing(model.stream(prompt, self.sampling(), model=self.adapter, parse_special=parsed)) as deltas:
            for delta in deltas:
                yield delta.text

    def read_token(self) -> str | None:
        """The auth token; None without a file. Raises ConfigError if the file can't be read."""
        try:
            return None if self.auth_token_file is None else read_token(self.auth_token_file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"auth_token_file: {error}") from None

    def validate(self) -> None:
        """Raises ConfigError for settings that are out of range or don't go together."""
        if self.prompt is None and not self.chat:
            raise ConfigError(
                "a prompt is missing: isthmus generate PROMPT, - to read it from standard input, or --chat"
            )
        if self.system is not None and not self.chat:
            raise ConfigError("--system needs --chat")
        if self.parse_special and self.chat:
            raise ConfigError("--parse-special can't be given with --chat, which always reads special tokens as such")
        if self.model is None and self.folder != FolderOptions():
            raise ConfigError("--base, --ignore-field and --download need --model")
        for name in _OF_A_FOLDER:
            if self.model is None and getattr(self, name) != getattr(_DEFAULT, name):
                raise ConfigError(f"--{name.replace('_', '-')} needs --model")
        if self.model is None:
            check_target(self.address, "address")
        elif self.adapter:
            raise ConfigError("--adapter is one of a server's; --model may be an adapter's folder itself")
        for name, bits in (("max_tokens", 32), ("top_k", 32), ("seed", 64)):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1 << bits:
                raise ConfigError(f"{name}={value} must be 0 to {(1 << bits) - 1}")


_DEFAULT = GenerateConfig()
_OF_A_FOLDER = ("merge_adapter", "quantize", "dtype", "mesh", "kernels", "compilation_cache", "engine")


def _open(config: GenerateConfig) -> Client | LLM:
    """Opens a client of the server, or the model in this process. Raises ConfigError and CheckpointError."""
    if config.model is None:
        token = config.read_token()
        try:
            return Client(config.address, token=token, tls_ca=config.tls_ca)
        except OSError as error:
            raise ConfigError(f"tls_ca: {error}") from None
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
    """Prints the prompt and what follows it, both at once, so that a call that fails at first prints nothing."""
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
        if not unsaid:  # the error message begins on a new line
            print(flush=True)
        raise
    print(unsaid)


def _reason(error: RequestError, address: str) -> str:
    """The error of a call as a message."""
    code = error.__cause__.code().name if isinstance(error.__cause__, grpc.RpcError) else error.code
    return f"{address}: {code}: {error}"


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
        return 2 if isinstance(error, InvalidRequest) else 1
    except BrokenPipeError:  # standard output was closed; commands/main.py ends the process
        raise
    except (ConfigError, CheckpointError, OSError, ValueError) as error:
        print(f"isthmus generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0
