"""A real server on a thread of this process, and the model folders that it serves."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import jax
import numpy as np
import uvloop
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from jax.experimental.compilation_cache import compilation_cache

from isthmus import Client, Completion, generate_request
from isthmus.model.config import ModelConfig
from isthmus.model.device.compilation import enable_compilation_cache
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.transformer import Params
from isthmus.model.weights.checkpoint import Checkpoints
from isthmus.proto import response_of
from isthmus.serve.api.config import ServeConfig
from isthmus.serve.api.server import Server
from isthmus.serve.engine.build import open_model
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.executor import Launched
from isthmus.serve.engine.plan import StepPlan
from isthmus.v1 import inference_pb2 as pb
from isthmus.v1 import inference_pb2_grpc
from tests.support import on_host, random_params

PATIENCE = 60.0
"""Seconds that anything may take before a test calls it stuck."""

NETWORK = ModelConfig(
    vocab_size=512,
    dim=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp_dim=128,
    context_length=16_384,
    tie_embeddings=False,
)
ENGINE = EngineConfig(max_sequences=8, prefill_tokens=64)
PROMPT = "def main(argv):\n    return "
LONG = 16_000
"""Tokens of a generation that is still going on when a test has something to say about it, many seconds long though
several steps are launched at once and each may take several guesses"""
MANY = 4000
"""Tokens of a generation that a test reads to its end"""
CHAT_TEMPLATE = """\
{% if style is defined and style == 'endless' %}
    {%- set n = namespace(a=[1]) %}{% for i in range(64) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}
{%- endif %}
{% for message in messages %}
    {%- if message.role == 'critic' %}{{ raise_exception('there are no critics here') }}{% endif %}
    {{- bos_token ~ message.role ~ ': ' ~ message.content ~ '\\n' }}
{%- endfor %}
{%- if style is defined %}{{ style ~ '\\n' }}{% endif %}
{%- if add_generation_prompt %}{{ bos_token }}assistant:{% endif %}
"""
"""With `style` 'endless' it is a program that takes as long as it may"""
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

ISTHMUS = Path(sys.executable).with_name("isthmus")
REPOSITORY = Path(__file__).parents[3]

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str) -> T:
    """The first true value of `condition`. Fails after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.002)
    return value


# Models


def train_tokenizer() -> Tokenizer:
    texts = [inspect.getsource(module) for module in (typing, inspect, threading)]
    return Tokenizer.train(texts, NETWORK.vocab_size)


def byte_token(tokenizer: Tokenizer, byte: int) -> int:
    """The id that stands for one byte alone."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    letter = chr(byte) if byte in printable else chr(256 + others.index(byte))
    token = tokenizer._inner.token_to_id(letter)
    assert token is not None, f"the tokenizer has no token for byte {byte:#x}"
    return token


def save_model(folder: Path, tokenizer: Tokenizer, params: Params) -> Path:
    """A model folder as training leaves one."""
    folder.mkdir(parents=True)
    NETWORK.save(folder / "config.json")
    tokenizer.save(folder / "tokenizer.json")
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, params, {"count": np.zeros((), np.int32)}, {"step": 1})
    checkpoints.close()
    return folder


def varied_params() -> Params:
    """Parameters whose generations are far from repetitive."""
    return random_params(NETWORK, build_mesh(MeshShape()), stacked=True)


def scripted_params(follows: dict[int, int]) -> Params:
    """Parameters of a model that, greedily, goes from each token to the one that `follows` it, whatever came before:
    its blocks add nothing, and the head's column of a token points where its predecessors' embeddings do."""
    params = on_host(varied_params())
    embedding = params["embedding"]
    head = np.zeros_like(params["head"])
    for token, successor in follows.items():
        head[:, successor] += embedding[token]
    silent = {path: x * 0 for path, x in params.items() if {"out", "down"} & set(path.split("/"))}
    logits = embedding @ head
    wrong = [t for t, successor in follows.items() if logits[t].argmax() != successor]
    assert not wrong, "the script's tokens are too alike"
    scale = np.ones_like(params["norm/scale"])
    return jax.tree.map(jax.numpy.asarray, {**params, **silent, "norm/scale": scale, "head": head})


def cycle(tokens: list[int]) -> dict[int, int]:
    return dict(zip(tokens, tokens[1:] + tokens[:1], strict=True))


# Servers


@contextmanager
def compilation_cache_in(folder: Path) -> Iterator[None]:
    """Compiled programs are shared through `folder` inside, and JAX is as before outside."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    enable_compilation_cache(folder)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


class RunningServer:
    """A Server on an event loop and a thread of its own."""

    def __init__(self, config: ServeConfig, cache: Path, *, load: bool = True) -> None:
        """load: whether to make the model ready. Raises what the server raises."""
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._thread.start()
        self._stopped = False
        self.config = config
        try:
            self.server = self.on_loop(self._start())
        except BaseException:
            self._end_loop()
            raise
        self.address = f"127.0.0.1:{self.server.port}"
        if load:
            with compilation_cache_in(cache):
                self.on_loop(self.server.load())

    async def _start(self) -> Server:
        server = Server(
            self.config, open_model(self.config.model, self.config.dtype, adapters=self.config.adapter_folders)
        )
        await server.start()
        return server

    def on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=3 * PATIENCE)

    @property
    def engine(self) -> Engine:
        assert self.server.session.engine is not None
        return self.server.session.engine

    def client(self, **options: Any) -> ApiClient:
        return ApiClient(self.address, **options)

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self.on_loop(self.server.stop())
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)


class Held:
    """A server whose engine stands still in its next launch until it is let go."""

    def __init__(self, server: RunningServer) -> None:
        self.entered, self._go = threading.Event(), threading.Event()
        executor = server.engine.executor
        self._launch: Callable[[StepPlan], Launched] = executor.launch
        executor.launch = self._hold  # type: ignore[method-assign]

    def _hold(self, plan: StepPlan) -> Launched:
        self.entered.set()
        assert self._go.wait(3 * PATIENCE)
        return self._launch(plan)

    def let_go(self) -> None:
        self._go.set()


class ServeProcess:
    """`isthmus serve`, and what it has printed."""

    def __init__(self, *arguments: str, command: Sequence[str] = (str(ISTHMUS), "serve")) -> None:
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            env={**os.environ, "COLUMNS": "1000"},
        )
        self.printed = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line

    def address(self) -> str:
        """Once it says that it is ready."""

        def ready() -> re.Match[str] | None:
            assert self.process.poll() is None, f"it ended: {self.printed}"
            return re.search(r"^SERVING on (\S+)$", self.printed, re.MULTILINE)

        return wait_for(ready, "the line that says it is ready").group(1)

    def wait(self) -> int:
        """The exit status, with everything printed."""
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def kill(self) -> None:
        self.process.kill()
        self.wait()


def idle(client: ApiClient) -> bool:
    load = client.load()
    return load.running == load.waiting == load.pages_in_use == 0


def check_health(channel: grpc.Channel, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE).status


# Calls


class ApiClient(Client):
    """A client of the API as it is on the wire: its errors are gRPC's own, and its streams events."""

    def generate(self, prompt: Any, *, timeout: float | None = None, **options: Any) -> Completion:
        """options: as generate_request takes."""
        message = generate_request(prompt, **options)
        answer = self._inference.Generate(message, timeout=timeout, metadata=self._metadata)
        return response_of(answer)

    def stream(
        self, prompt: Any, *, timeout: float | None = None, **options: Any
    ) -> Generator[pb.GenerateStreamResponse, None, None]:
        """Started, Deltas, Finished, as they come. Closing the iterator cancels the request."""
        message = pb.GenerateStreamRequest(request=generate_request(prompt, **options))
        call = self._inference.GenerateStream(message, timeout=timeout, metadata=self._metadata)
        try:
            yield from call
        finally:
            call.cancel()

    def _call(self, method: Callable[..., T], request: Any, kind: type[T], timeout: float | None) -> T:
        return method(request, timeout=timeout, metadata=self._metadata)


@dataclass(frozen=True)
class Streamed:
    """Everything that one stream gave."""

    started: pb.Started
    deltas: tuple[pb.Delta, ...]
    finished: pb.Finished

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for delta in self.deltas for token in delta.token_ids)


def collect(events: Iterable[pb.GenerateStreamResponse]) -> Streamed:
    """Reads a stream to its end and holds it to its order: Started, Deltas, Finished."""
    kinds, values = [], []
    for event in events:
        kind = event.WhichOneof("event")
        kinds.append(kind)
        values.append(getattr(event, kind))
    assert kinds == ["started", *["delta"] * (len(kinds) - 2), "finished"]
    return Streamed(values[0], tuple(values[1:-1]), values[-1])


def begin(client: ApiClient, **options: Any) -> Any:
    """A long stream that has given its first tokens."""
    events = client.stream(PROMPT, **{"max_tokens": LONG, "ignore_eos": True, **options})
    assert next(events).WhichOneof("event") == "started"
    assert next(events).WhichOneof("event") == "delta"
    return events


def raw_stub(client: ApiClient) -> inference_pb2_grpc.InferenceServiceStub:
    """For messages that `ApiClient` would not build."""
    return inference_pb2_grpc.InferenceServiceStub(client.channel)


def details(error: grpc.RpcError, kind: type[T]) -> T:
    """The google.rpc detail of this kind that came with the status. Fails when there is none."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no google.rpc status with {error}"
    for detail in status.details:
        message = kind()
        if detail.Unpack(message):
            return message
    raise AssertionError(f"no {kind.__name__} with {error}")


def blamed_fields(error: grpc.RpcError) -> list[str]:
    return [v.field for v in details(error, error_details_pb2.BadRequest).field_violations]
