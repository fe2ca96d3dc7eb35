"""The load generator, a process of its own (`python -m isthmus.benchmarks.load`): it sends requests over gRPC when they
are due.

Open loop: a request is sent at its time whatever became of the ones before, and its latencies count from that time, not
from when the generator got round to it, so that a server that stalls can't hide it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc

from isthmus.benchmarks.child import answer
from isthmus.benchmarks.workload import PlannedRequest
from isthmus.client import bearer, generate_request, tls_credentials
from isthmus.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc


@dataclass
class Outcome:
    """One request as its client saw it; seconds since it was due, unless said otherwise."""

    due: float
    """Since the start"""
    lag: float = 0.0
    """How late it was sent"""
    first: float | None = None
    """To the first token"""
    end: float = 0.0
    """To the end of the stream"""
    tokens: int = 0
    messages: int = 0
    """That carried tokens: fewer than tokens when the server put several into one"""
    gaps: list[float] = field(default_factory=list)
    """Between one message with tokens and the next"""
    error: str | None = None
    """Name of the gRPC status"""


@dataclass(frozen=True)
class Target:
    """A server, and how it is called."""

    address: str
    token: str | None = None
    tls_ca: str | None = None
    """As isthmus.Client's"""
    temperature: float = 1.0
    timeout: float = 600.0
    """Deadline of a request, in seconds"""


def _channel(target: Target) -> grpc.aio.Channel:
    if target.tls_ca is None:
        return grpc.aio.insecure_channel(target.address)
    return grpc.aio.secure_channel(target.address, tls_credentials(target.tls_ca))


async def send(
    stub: inference_pb2_grpc.InferenceServiceStub, target: Target, planned: PlannedRequest, start: float
) -> Outcome:
    """Waits until the request is due and streams it to its end."""
    outcome = Outcome(planned.at)
    due = start + planned.at
    message = generate_request(
        planned.prompt,
        max_tokens=planned.max_tokens,
        temperature=target.temperature,
        seed=planned.seed,
        ignore_eos=True,
    )
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    outcome.lag = time.perf_counter() - due
    request = inference_pb2.GenerateStreamRequest(request=message)
    call = stub.GenerateStream(request, timeout=target.timeout, metadata=bearer(target.token))
    last = due
    try:
        async for event in call:
            if event.WhichOneof("event") != "delta" or not event.delta.token_ids:
                continue
            now = time.perf_counter()
            if outcome.first is None:
                outcome.first = now - due
            else:
                outcome.gaps.append(now - last)
            last = now
            outcome.tokens += len(event.delta.token_ids)
            outcome.messages += 1
    except grpc.RpcError as error:
        outcome.error = error.code().name
    outcome.end = time.perf_counter() - due
    return outcome


async def run_load(target: Target, planned: list[PlannedRequest]) -> dict[str, Any]:
    """Sends them all. seconds: from the first due time to the last end; cpu_seconds: of this process meanwhile."""
    async with _channel(target) as channel:
        await channel.channel_ready()
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        start, cpu = time.perf_counter() + 0.05, time.process_time()
        outcomes = await asyncio.gather(*(send(stub, target, request, start) for request in planned))
        cpu = time.process_time() - cpu
    first = min(outcome.due for outcome in outcomes)
    seconds = max(outcome.due + outcome.end for outcome in outcomes) - first
    return {"outcomes": [asdict(outcome) for outcome in outcomes], "seconds": seconds, "cpu_seconds": cpu}


async def server_facts(target: Target) -> dict[str, Any]:
    """What the benchmark needs to know of a server."""
    async with _channel(target) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        metadata = bearer(target.token)
        model = await stub.GetModelInfo(control_pb2.GetModelInfoRequest(), metadata=metadata, timeout=30)
        server = await stub.GetServerInfo(control_pb2.GetServerInfoRequest(), metadata=metadata, timeout=30)
    return {
        "name": model.name,
        "parameters": model.parameters,
        "vocab_size": model.vocab_size,
        "context_length": model.context_length,
        "dtype": model.dtype,
        "platform": server.platform,
        "devices": list(server.devices),
        "max_sequences": server.max_sequences,
        "pages": server.pages_total,
        "page_size": server.page_size,
    }


async def server_load(target: Target) -> dict[str, Any]:
    """The server's own counters."""
    async with _channel(target) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        load = await stub.GetLoad(control_pb2.GetLoadRequest(), metadata=bearer(target.token), timeout=30)
    names = ("steps", "completion_tokens", "cached_prompt_tokens", "preemptions", "recompilations")
    return {name: getattr(load, name) for name in names}


def main() -> None:
    import uvloop

    def load(target: dict[str, Any], requests: list[dict[str, Any]]) -> dict[str, Any]:
        return uvloop.run(run_load(Target(**target), [PlannedRequest(**request) for request in requests]))

    answer(
        {
            "load": load,
            "facts": lambda target: uvloop.run(server_facts(Target(**target))),
            "counters": lambda target: uvloop.run(server_load(Target(**target))),
        }
    )


if __name__ == "__main__":
    main()
