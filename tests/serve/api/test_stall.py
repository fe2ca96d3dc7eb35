"""A step of the engine that doesn't end: health says so, callers are sent elsewhere, and the process still ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import (
    ENGINE,
    LONG,
    NOT_SERVING,
    PATIENCE,
    PROMPT,
    SERVING,
    ApiClient,
    Held,
    ServeProcess,
    begin,
    check_health,
    collect,
    details,
    wait_for,
)

STALL_SECONDS = 1.0


def refusal(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as failure:
        call()
    return failure.value


def test_health_follows_a_step_that_takes_too_long(start_server: StartServer) -> None:
    """Else a load balancer goes on sending requests to a server whose device hangs."""
    server = start_server(stall_seconds=STALL_SECONDS)
    with server.client() as client:
        alone = client.generate(PROMPT, max_tokens=200, seed=1, ignore_eos=True)
        events = client.stream(PROMPT, max_tokens=200, seed=1, ignore_eos=True)
        assert check_health(client.channel) == SERVING
        held = Held(server)
        started = next(events)
        assert held.entered.wait(PATIENCE)
        wait_for(lambda: check_health(client.channel) == NOT_SERVING, "NOT_SERVING")
        assert server.engine.busy_seconds < STALL_SECONDS + 2
        refused = refusal(lambda: client.generate(PROMPT, max_tokens=1))
        assert refused.code() == grpc.StatusCode.UNAVAILABLE and details(refused, error_details_pb2.RetryInfo)
        assert client.load().running + client.load().waiting == 1, "what it is can still be asked"
        held.let_go()
        wait_for(lambda: check_health(client.channel) == SERVING, "SERVING again")
        streamed = collect([started, *events])
        assert streamed.token_ids == alone.token_ids
        assert client.generate(PROMPT, max_tokens=1).token_ids


def test_a_step_that_hangs_does_not_hold_up_the_shutdown(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers are told to ask another server, whether they ran or waited."""
    monkeypatch.setattr("isthmus.serve.api.server.CLOSE_SECONDS", 0.2)
    server = start_server()
    with server.client() as client:
        running = begin(client)
        held = Held(server)
        assert held.entered.wait(PATIENCE)
        waiting = client.stream(PROMPT, max_tokens=LONG, ignore_eos=True)
        next(waiting)
        try:
            assert server.on_loop(server.server.stop()) is False, "it must say that the engine is left behind"
            for events in (running, waiting):
                refused = refusal(lambda e=events: list(e))
                assert refused.code() == grpc.StatusCode.UNAVAILABLE
                assert details(refused, error_details_pb2.RetryInfo)
        finally:
            held.let_go()


STALLING_SERVE = """
import sys, time
from isthmus.serve.engine.executor import Executor

launch = Executor.launch

def stall(self, plan):
    time.sleep(3600 if plan.samples else 0)  # the warm-up draws for nobody
    return launch(self, plan)

Executor.launch = stall
from isthmus.commands.serve import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def stalling(model_folder: Path, cache_folder: Path) -> Iterator[Callable[..., ServeProcess]]:
    """stalling(*more arguments) starts `isthmus serve` whose device hangs at the first request."""
    started: list[ServeProcess] = []
    sizes = ["--engine.max-sequences", ENGINE.max_sequences, "--engine.prefill-tokens", ENGINE.prefill_tokens]
    common = ["--model", model_folder, "--port", "0", "--compilation-cache", cache_folder, *sizes]

    def start(*arguments: str) -> ServeProcess:
        words = [*map(str, common), *arguments]
        started.append(ServeProcess(*words, command=(sys.executable, "-c", STALLING_SERVE)))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def _hang(client: ApiClient) -> Any:
    events = client.stream(PROMPT, max_tokens=2)
    assert next(events).WhichOneof("event") == "started"
    wait_for(lambda: client.load().running == 1, "its first step")  # else a shutdown may still come before it
    return events


def test_sigterm_ends_a_server_whose_device_hangs(stalling: Callable[..., ServeProcess]) -> None:
    """The status tells a supervisor that it was no clean end."""
    process = stalling("--drain-seconds", "0")
    with ApiClient(process.address()) as client:
        events = _hang(client)
        process.process.send_signal(signal.SIGTERM)
        assert refusal(lambda: list(events)).code() == grpc.StatusCode.UNAVAILABLE
        assert process.wait() == 1, process.printed
    assert "hangs" in process.printed and "Traceback" not in process.printed


@pytest.mark.parametrize("second", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_second_signal_ends_it_at_once(stalling: Callable[..., ServeProcess], second: signal.Signals) -> None:
    """Whoever asks twice doesn't want to wait for the hour that calls may still take."""
    process = stalling("--drain-seconds", "3600")
    with ApiClient(process.address()) as client:
        events = _hang(client)
        process.process.send_signal(signal.SIGTERM)
        wait_for(lambda: check_health(client.channel) == NOT_SERVING, "the first signal")
        process.process.send_signal(second)
        assert process.wait() == 128 + second, process.printed
        assert refusal(lambda: list(events)).code() == grpc.StatusCode.UNAVAILABLE
    assert "Traceback" not in process.printed
