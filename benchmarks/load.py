"""The load generator, a process of its own (`python -m isthmus.benchmarks.load`). It sends requests to a server when
they are due, over gRPC to ours and over HTTP to others (http_api.py).

In an open loop a request is sent at its time, whether or not earlier ones have ended. Its latencies count from that
time, even if it was sent later, so that a server that stalls can't hide it. In a closed loop a fixed number of requests
is in flight, and latencies count from the sending.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import grpc
import uvloop

from isthmus.benchmarks.figures import summarize
from isthmus.benchmarks.http_api import APIS, HttpError, completion
from isthmus.benchmarks.processes import Child
from isthmus.benchmarks.protocol import answer
from isthmus.benchmarks.workload import PlannedRequest
from isthmus.client import Client, bearer, generate_request, tls_credentials
from isthmus.v1 import control_pb2, inference_pb2, inference_pb2_grpc

CONNECT_SECONDS = 30.0
"""How long a server may take to accept a connection"""

Stream = Callable[[PlannedRequest], AsyncIterator[tuple[int, int | None]]]
"""Sends a request. Yields for each message of the answer how many tokens it carries, and how many the whole completion
has, or None where the message doesn't say"""


@dataclass
class Outcome:
    """One request as its client saw it. Times are in seconds since it was due, unless they say otherwise."""

    due: float
    """When it was due, in seconds since the start"""
    lag: float = 0.0
    """How late it was sent"""
    first: float | None = None
    """When the first token came"""
    end: float = 0.0
    """When the stream ended"""
    tokens: int = 0
    messages: int = 0
    """How many messages carried tokens: fewer than `tokens` when the server put several into one"""
    gaps: list[float] = field(default_factory=list)
    """Seconds between one message with tokens and the next"""
    error: str | None = None
    """The gRPC status's name, or what went wrong over HTTP"""


@dataclass(frozen=True)
class Target:
    """A server, and how it is called."""

    address: str
    token: str | None = None
    tls_ca: str | None = None
    """A file with the certificate to trust, as isthmus.Client takes it"""
    temperature: float = 1.0
    """Temperature for a server of ours; the others are asked to be greedy"""
    timeout: float = 600.0
    """Deadline of a request, in seconds"""
    engine: str = "isthmus"
    """The server's engine, by its name in stacks.py"""
    model: str = ""
    """The model's name in a request; a server of ours needs none"""


@contextlib.asynccontextmanager
async def _opened(target: Target) -> AsyncIterator[Stream]:
    """Connects to the target, and yields the function that sends a request to it."""
    if target.engine != "isthmus":
        yield lambda planned: completion(APIS[target.engine], target.address, target.model, planned, target.timeout)
        return
    credentials = None if target.tls_ca is None else tls_credentials(target.tls_ca)
    async with (
        grpc.aio.insecure_channel(target.address)
        if credentials is None
        else grpc.aio.secure_channel(target.address, credentials)
    ) as channel:
        await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
        yield partial(_grpc_stream, inference_pb2_grpc.InferenceServiceStub(channel), target)


def _grpc_stream(
    stub: inference_pb2_grpc.InferenceServiceStub, target: Target, planned: PlannedRequest
) -> AsyncIterator[tuple[int, int | None]]:
    message = generate_request(
        planned.prompt,
        max_tokens=planned.max_tokens,
        temperature=target.temperature,
        seed=planned.seed,
        ignore_eos=True,
    )
    request = inference_pb2.GenerateStreamRequest(request=message)

    async def deltas() -> AsyncIterator[tuple[int, int | None]]:
        async for event in stub.GenerateStream(request, timeout=target.timeout, metadata=bearer(target.token)):
            if event.WhichOneof("event") == "delta":
                yield len(event.delta.token_ids), None

    return deltas()


async def send(stream: Stream, planned: PlannedRequest, start: float) -> Outcome:
    """Waits until the request is due, `planned.at` seconds after `start`, sends it, and reads its stream to the end. A
    completion that has not as many tokens as asked for has failed."""
    outcome, due = Outcome(planned.at), start + planned.at
    messages = stream(planned)
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    outcome.lag = time.perf_counter() - due
    last, total = due, None
    try:
        async for tokens, said in messages:
            total = total if said is None else said
            if not tokens:
                continue
            now = time.perf_counter()
            if outcome.first is None:
                outcome.first = now - due
            else:
                outcome.gaps.append(now - last)
            last = now
            outcome.tokens += tokens
            outcome.messages += 1
    except grpc.RpcError as error:
        outcome.error = error.code().name
    except (HttpError, OSError, ValueError, EOFError, TimeoutError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.tokens = outcome.tokens if total is None else total
    outcome.end = time.perf_counter() - due
    if outcome.error is None and outcome.tokens != planned.max_tokens:
        outcome.error = f"{outcome.tokens} tokens of {planned.max_tokens}"
    return outcome


async def open_loop(stream: Stream, planned: list[PlannedRequest]) -> list[Outcome]:
    """Sends each request at its time."""
    start = time.perf_counter() + 0.05
    return list(await asyncio.gather(*(send(stream, request, start) for request in planned)))


async def closed_loop(stream: Stream, planned: list[PlannedRequest], streams: int) -> list[Outcome]:
    """Keeps `streams` requests in flight: the next one is sent when another has ended."""
    start = time.perf_counter()
    waiting = iter(planned)
    outcomes: list[Outcome] = []

    async def one_after_another() -> None:
        for request in waiting:
            outcomes.append(await send(stream, replace(request, at=time.perf_counter() - start), start))

    await asyncio.gather(*(one_after_another() for _ in range(streams)))
    return outcomes


async def run_load(target: Target, planned: list[PlannedRequest], streams: int = 0) -> dict[str, Any]:
    """Sends all requests. streams: how many a closed loop keeps in flight; 0 is an open loop. Returns `outcomes`,
    `seconds` from the first due time to the last end, and `cpu_seconds`, this process's processor time meanwhile."""
    async with _opened(target) as stream:
        cpu = time.process_time()
        outcomes = await (closed_loop(stream, planned, streams) if streams else open_loop(stream, planned))
        cpu = time.process_time() - cpu
    first = min(outcome.due for outcome in outcomes)
    seconds = max(outcome.due + outcome.end for outcome in outcomes) - first
    return {"outcomes": [asdict(outcome) for outcome in outcomes], "seconds": seconds, "cpu_seconds": cpu}


def server_facts(client: Client) -> dict[str, Any]:
    """What a benchmark needs to know about one of our servers."""
    model, server = client.model_info(timeout=30), client.server_info(timeout=30)
    return {
        **{name: getattr(model, name) for name in ("name", "parameters", "vocab_size", "context_length")},
        **{name: getattr(server, name) for name in ("max_sequences", "page_size")},
        "dtype": control_pb2.Dtype.Name(model.dtype).removeprefix("DTYPE_").lower(),
        "platform": control_pb2.Platform.Name(server.platform).removeprefix("PLATFORM_").lower(),
        "devices": list(server.devices),
        "pages": server.pages_total,
    }


def server_counters(client: Client) -> dict[str, Any]:
    """What one of our servers has counted since it started."""
    load = client.load(timeout=30)
    names = ("steps", "completion_tokens", "cached_prompt_tokens", "preemptions", "recompilations")
    return {name: getattr(load, name) for name in names}


class LoadGenerator:
    """The question that the load generator's process answers."""

    def load(self, target: dict[str, Any], requests: list[dict[str, Any]], streams: int) -> dict[str, Any]:
        """Runs run_load. target: the fields of Target. requests: those of PlannedRequest."""
        return uvloop.run(run_load(Target(**target), [PlannedRequest(**request) for request in requests], streams))


def ask_load(child: Child, target: Target, planned: list[PlannedRequest], streams: int = 0) -> dict[str, Any]:
    """Returns what run_load returns in the load generator's process. Raises BenchError."""
    return child.ask("load", target=asdict(target), requests=as_json(planned), streams=streams)


def as_json(planned: list[PlannedRequest]) -> list[dict[str, Any]]:
    """Requests as JSON, to be sent to a process."""
    return [asdict(request) for request in planned]


def load_figures(*answers: dict[str, Any]) -> dict[str, Any]:
    """Throughput, latencies and failures in all results of run_load. Failed requests count as failures, and in
    send_lag."""
    outcomes = [outcome for answer in answers for outcome in answer["outcomes"]]
    seconds, cpu = (sum(answer[name] for answer in answers) for name in ("seconds", "cpu_seconds"))
    whole = [o for o in outcomes if o["error"] is None]
    tokens = sum(o["tokens"] for o in whole)
    samples = {
        "ttft": [o["first"] for o in whole if o["first"] is not None],
        "itl": [gap for o in whole for gap in o["gaps"]],
        "tpot": [sum(o["gaps"]) / (o["tokens"] - 1) for o in whole if o["tokens"] > 1],
        "e2e": [o["end"] for o in whole],
        "send_lag": [o["lag"] for o in outcomes],
    }
    return {
        "requests": len(outcomes),
        "completed": len(whole),
        "failures": dict(Counter(o["error"] for o in outcomes if o["error"] is not None)),
        "seconds": seconds,
        "requests_per_second": len(whole) / seconds,
        "output_tokens": tokens,
        "output_tokens_per_second": tokens / seconds,
        "tokens_per_message": tokens / max(1, sum(o["messages"] for o in whole)),
        "client_cpu_share": cpu / seconds,
        **{name: summarize(values) for name, values in samples.items()},
    }


if __name__ == "__main__":
    answer(LoadGenerator())
