"""Starting, stopping and breaking: a real `isthmus serve`, a model that gives NaN, and an engine that dies."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import jax
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from isthmus import generate_request
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.transformer import Params
from isthmus.serve.api.config import ServeConfig
from isthmus.serve.api.server import Server
from isthmus.serve.engine.build import open_model
from isthmus.v1 import inference_pb2 as pb
from isthmus.v1 import inference_pb2_grpc
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import (
    ENGINE,
    ISTHMUS,
    LONG,
    NOT_SERVING,
    PATIENCE,
    SERVING,
    ApiClient,
    RunningServer,
    ServeProcess,
    check_health,
    collect,
    compilation_cache_in,
    details,
    idle,
    save_model,
    varied_params,
    wait_for,
)
from tests.support import on_host

PROMPT = "def main(argv):\n    return "


@pytest.fixture
def serve(model_folder: Path, cache_folder: Path) -> Iterator[Callable[..., ServeProcess]]:
    """serve(*more arguments) starts `isthmus serve`."""
    started: list[ServeProcess] = []

    def start(*arguments: str, model: Path = model_folder) -> ServeProcess:
        sizes = [
            "--engine.max-sequences",
            str(ENGINE.max_sequences),
            "--engine.prefill-tokens",
            str(ENGINE.prefill_tokens),
        ]
        common = ["--model", str(model), "--port", "0", "--compilation-cache", str(cache_folder), *sizes]
        started.append(ServeProcess(*common, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def _health_changes(channel: grpc.Channel) -> Iterator[int]:
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    return (answer.status for answer in watch)


def _refused(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as failure:
        call()
    return failure.value.code()


def test_sigterm_lets_everybody_finish(serve: Callable[..., ServeProcess]) -> None:
    """Serving, calling it from another process, then SIGTERM amid streams: none is lost, nothing new is begun."""
    process = serve()
    address = process.address()
    completed = subprocess.run(
        [ISTHMUS, "generate", PROMPT, "--address", address, "--max-tokens", "20", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.startswith(PROMPT) and len(completed.stdout) > len(PROMPT) + 5

    tokens, streams = 1500, 6
    options = {"max_tokens": tokens, "ignore_eos": True}
    with ApiClient(address) as client, ApiClient(address) as watcher, ThreadPoolExecutor(streams) as pool:
        alone = client.generate(PROMPT, seed=0, **options)
        health = _health_changes(watcher.channel)
        assert next(health) == SERVING
        under_way = [threading.Event() for _ in range(streams)]

        def read(seed: int) -> tuple[int, ...]:
            ids: list[int] = []
            for event in client.stream(PROMPT, seed=seed, **options):
                ids.extend(event.delta.token_ids)
                if ids:
                    under_way[seed].set()
            assert event.finished.finish_reason == pb.FINISH_REASON_LENGTH
            return tuple(ids)

        reading = [pool.submit(read, seed) for seed in range(streams)]
        assert all(event.wait(PATIENCE) for event in under_way)
        load = client.load()
        assert load.running == streams, "the test is slower than its streams"
        assert load.recompilations == 0, "a step was compiled while serving"
        process.process.send_signal(signal.SIGTERM)
        assert next(health) == NOT_SERVING, "health must say so before the port closes"
        assert _refused(lambda: client.generate(PROMPT, max_tokens=1)) == grpc.StatusCode.UNAVAILABLE
        drawn = [future.result() for future in reading]
    assert drawn[0] == alone.token_ids
    assert [len(ids) for ids in drawn] == [tokens] * streams
    assert process.wait() == 0, process.printed
    assert "drained" in process.printed and "Traceback" not in process.printed
    with ApiClient(address) as client:
        assert _refused(lambda: client.load(timeout=PATIENCE)) == grpc.StatusCode.UNAVAILABLE


def test_sigterm_while_it_loads_ends_it(serve: Callable[..., ServeProcess], tmp_path: Path) -> None:
    """Ctrl-C during a long compilation is not a crash."""
    process = serve("--compilation-cache", str(tmp_path / "empty"), "--port", str(port := _free_port()))
    with ApiClient(f"127.0.0.1:{port}") as client:
        grpc.channel_ready_future(client.channel).result(PATIENCE)
        assert check_health(client.channel) == NOT_SERVING
        process.process.send_signal(signal.SIGTERM)
        assert process.wait() == 143, process.printed
    assert "Traceback" not in process.printed and "SERVING on" not in process.printed


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_port_that_is_taken_is_said(serve: Callable[..., ServeProcess]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = serve("--port", str(port))
        assert process.wait() == 2
    assert f"port={port}" in process.printed and "taken" in process.printed
    assert "Traceback" not in process.printed


def test_two_servers_never_share_a_port(start_server: StartServer, server: RunningServer) -> None:
    """With SO_REUSEPORT the kernel would split the traffic between them, silently."""
    from isthmus.errors import ConfigError

    with pytest.raises(ConfigError, match="port="):
        start_server(port=server.server.port, load=False)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: None, "config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "tokenizer.json"),
        (lambda folder: (folder / "config.json").write_text('{"dimension": 1}'), "dimension"),
        (lambda folder: (folder / "config.json").write_text("[1, 2"), "config.json"),
    ],
    ids=["empty", "no tokenizer", "unknown field", "no JSON"],
)
def test_a_folder_that_is_no_model_is_said(
    tmp_path: Path, spoil: Callable[[Path], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from isthmus.commands.serve import main

    spoil(tmp_path)
    assert main(["--model", str(tmp_path), "--port", "0", "--compilation-cache", str(tmp_path / "programs")]) == 2
    assert said in capsys.readouterr().out


def test_a_model_folder_without_parameters_is_said(
    serve: Callable[..., ServeProcess], model_folder: Path, tmp_path: Path
) -> None:
    """A run that ended before its first checkpoint."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    process = serve(model=tmp_path)
    assert process.wait() == 2
    assert "checkpoint" in process.printed and "Traceback" not in process.printed


def test_draining_too_long_ends_what_is_left(start_server: StartServer) -> None:
    """SIGTERM must end the process even when a client never stops reading; another server may take the request."""
    server = start_server(drain_seconds=0.1)
    with server.client() as client:
        streams = [client.stream(PROMPT, max_tokens=LONG, ignore_eos=True) for _ in range(ENGINE.max_sequences + 2)]
        for events in streams:
            next(events)
        server.stop()
        for events in streams:
            with pytest.raises(grpc.RpcError) as failure:
                list(events)
            assert failure.value.code() == grpc.StatusCode.UNAVAILABLE, "CANCELLED is what no client asks again for"
            assert details(failure.value, error_details_pb2.RetryInfo)


# A model that gives NaN for one token

POISON = 300
"""A token id whose embedding is NaN"""


@pytest.fixture(scope="module")
def poisoned(
    start_server: StartServer, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> RunningServer:
    params: Params = on_host(varied_params())
    embedding, head = np.array(params["embedding"]), np.array(params["head"])
    embedding[POISON] = np.nan
    head[:, POISON] = 0
    params = jax.tree.map(jax.numpy.asarray, {**params, "embedding": embedding, "head": head})
    return start_server(model=save_model(tmp_path_factory.mktemp("models") / "poisoned", tokenizer, params))


@pytest.mark.parametrize("prompt", [[POISON], [1, 2, POISON, 3], [*range(1, 200), POISON, *range(1, 100)]], ids=len)
def test_logits_that_are_not_finite_end_one_request_alone(poisoned: RunningServer, prompt: list[int]) -> None:
    """Others get the same bytes as alone, and those who take over its pages get none of its NaN."""
    healthy = {"max_tokens": 800, "temperature": 0, "ignore_eos": True}
    with poisoned.client() as client:
        alone = client.generate(PROMPT, **healthy)
        assert POISON not in alone.token_ids
        with ThreadPoolExecutor(3) as pool:
            beside = [pool.submit(collect, client.stream(PROMPT, **healthy)) for _ in range(3)]
            wait_for(lambda: client.load().running == 3, "the healthy streams")
            for _ in range(5):
                for call in (client.generate, lambda p, **options: list(client.stream(p, **options))):
                    with pytest.raises(grpc.RpcError) as failure:
                        call(prompt, max_tokens=100)
                    assert failure.value.code() == grpc.StatusCode.INTERNAL
                    assert details(failure.value, error_details_pb2.ErrorInfo).reason == "NON_FINITE_LOGITS"
            assert [stream.result().token_ids for stream in beside] == [alone.token_ids] * 3
        assert client.generate(PROMPT, **healthy).token_ids == alone.token_ids
        wait_for(lambda: idle(client), "its pages")
        assert check_health(client.channel) == SERVING


# An engine that dies


async def _engine_dies(config: ServeConfig, cache: Path) -> None:
    server = Server(config, open_model(config.model))
    await server.start()
    try:
        with compilation_cache_in(cache):
            await server.load()
        running = asyncio.create_task(server.run())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            await _calls_of_an_engine_that_dies(server, channel)
        assert await asyncio.wait_for(running, PATIENCE) is False, "run() must tell that it was no clean end"
    finally:
        await server.stop()


async def _calls_of_an_engine_that_dies(server: Server, channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = generate_request(PROMPT, max_tokens=LONG, ignore_eos=True)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    assert (await watch.read()).status == SERVING
    streams = [
        stub.GenerateStream(pb.GenerateStreamRequest(request=request), timeout=PATIENCE)
        for _ in range(ENGINE.max_sequences + 3)  # some of them wait
    ]
    for stream in streams:
        assert (await stream.read()).WhichOneof("event") == "started"
    unary = stub.Generate(request, timeout=PATIENCE)
    engine = server.session.engine
    assert engine is not None
    while engine.in_flight <= len(streams):
        await asyncio.sleep(0.001)
    jax.tree.leaves(engine.executor.params)[0].delete()  # as a device that is lost would leave it

    async def rest(stream: grpc.aio.UnaryStreamCall) -> None:
        while await stream.read() is not grpc.aio.EOF:
            pass

    for end in (*map(rest, streams), unary):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await end
        assert failure.value.code() == grpc.StatusCode.INTERNAL
    assert (await watch.read()).status == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError):  # of which kind depends on how far the server has shut down
        await stub.Generate(request, timeout=PATIENCE)


def test_an_engine_that_dies_takes_nobody_with_it_unheard(model_folder: Path, cache_folder: Path) -> None:
    """Every call in flight gets an error instead of hanging, health tells, and the process can end."""
    config = ServeConfig(model=model_folder, port=0, engine=ENGINE, drain_seconds=PATIENCE)
    asyncio.run(_engine_dies(config, cache_folder))
