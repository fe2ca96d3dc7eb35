"""The load generator for any server, a process of its own (`python -m isthmus.benchmarks.peer_load`).

The same requests to `isthmus serve` over gRPC, to llama-server and to vLLM's over HTTP, as token ids, streamed, greedy
and past any end of text. Open loop: a request is sent at its time, and its latencies count from that. Closed loop: so
many are in flight, and latencies count from the sending.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, replace
from typing import Any

import grpc

from isthmus.benchmarks import load
from isthmus.benchmarks.child import answer
from isthmus.benchmarks.load import Outcome, Target
from isthmus.benchmarks.workload import PlannedRequest
from isthmus.v1 import inference_pb2_grpc

Send = Callable[[PlannedRequest, float], Awaitable[Outcome]]


class HttpError(RuntimeError):
    """An answer that is no success, or none of HTTP."""


async def post(address: str, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """The lines of the answer to a POST of JSON, as they come. Raises HttpError, OSError."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status = (await reader.readline()).split()
        headers = (await reader.readuntil(b"\r\n\r\n")).lower()
        pieces = chunks(reader) if b"transfer-encoding: chunked" in headers else whole(reader)
        if len(status) < 2 or status[1] != b"200":
            text = b"".join([piece async for piece in pieces])
            raise HttpError(f"HTTP {status[1].decode() if len(status) > 1 else '?'}: {text[:200]!r}")
        left = b""
        async for piece in pieces:
            *lines, left = (left + piece).split(b"\n")
            for line in lines:
                yield line
        yield left
    finally:
        writer.close()


async def chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Of HTTP's chunked encoding."""
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def whole(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(1 << 16):
        yield piece


async def events(lines: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of server-sent events."""
    async for line in lines:
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield json.loads(data)


def llama_body(planned: PlannedRequest, model: str) -> tuple[str, dict[str, Any]]:
    """llama-server's own completion; one sampler that leaves a single token is the cheapest greedy."""
    body = {"prompt": planned.prompt, "n_predict": planned.max_tokens, "top_k": 1, "samplers": ["top_k"]}
    return "/completion", {**body, "ignore_eos": True, "stream": True, "cache_prompt": False, "return_tokens": True}


def vllm_body(planned: PlannedRequest, model: str) -> tuple[str, dict[str, Any]]:
    body = {"model": model, "prompt": planned.prompt, "max_tokens": planned.max_tokens, "temperature": 0}
    return "/v1/completions", {**body, "ignore_eos": True, "stream": True, "return_token_ids": True}


def llama_tokens(event: dict[str, Any]) -> tuple[int, int | None]:
    """(tokens that the event carries, of the whole completion where it says so): text that is no whole character yet
    is held back, and its tokens are never listed."""
    total = event.get("tokens_predicted") if event.get("stop") else None
    return len(event.get("tokens") or ()), total


def vllm_tokens(event: dict[str, Any]) -> tuple[int, int | None]:
    return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ())), None


HTTP = {"llama": (llama_body, llama_tokens), "vllm": (vllm_body, vllm_tokens)}


async def send_http(kind: str, target: Target, model: str, planned: PlannedRequest, start: float) -> Outcome:
    """Waits until the request is due and streams it to its end."""
    make, count = HTTP[kind]
    outcome = Outcome(planned.at)
    due = start + planned.at
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    outcome.lag = time.perf_counter() - due
    last, total = due, None
    try:
        async with asyncio.timeout(target.timeout):
            async for event in events(post(target.address, *make(planned, model))):
                if "error" in event:
                    raise HttpError(str(event["error"])[:200])
                tokens, said = count(event)
                total = said if said is not None else total
                if tokens:
                    now = time.perf_counter()
                    if outcome.first is None:
                        outcome.first = now - due
                    else:
                        outcome.gaps.append(now - last)
                    last = now
                    outcome.tokens += tokens
                    outcome.messages += 1
    except (HttpError, OSError, ValueError, EOFError, TimeoutError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.tokens = outcome.tokens if total is None else total
    outcome.end = time.perf_counter() - due
    return outcome


def checked(outcome: Outcome, planned: PlannedRequest) -> Outcome:
    """A completion that is not as long as asked has failed."""
    if outcome.error is None and outcome.tokens != planned.max_tokens:
        outcome.error = f"{outcome.tokens} tokens of {planned.max_tokens}"
    return outcome


async def open_loop(send: Send, planned: list[PlannedRequest]) -> list[Outcome]:
    start = time.perf_counter() + 0.05
    return list(await asyncio.gather(*(send(request, start) for request in planned)))


async def closed_loop(send: Send, planned: list[PlannedRequest], streams: int) -> list[Outcome]:
    """The next one is sent when another has ended."""
    start = time.perf_counter()
    waiting = iter(planned)
    outcomes: list[Outcome] = []

    async def stream() -> None:
        for request in waiting:
            outcomes.append(await send(replace(request, at=time.perf_counter() - start), start))

    await asyncio.gather(*(stream() for _ in range(streams)))
    return outcomes


async def run_load(
    kind: str, target: Target, model: str, planned: list[PlannedRequest], streams: int
) -> dict[str, Any]:
    """kind: isthmus, llama or vllm. streams: of a closed loop; 0 is open. As benchmarks.load.run_load answers."""
    cpu = time.process_time()
    async with grpc.aio.insecure_channel(target.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def send(request: PlannedRequest, start: float) -> Outcome:
            if kind == "isthmus":
                return checked(await load.send(stub, target, request, start), request)
            return checked(await send_http(kind, target, model, request, start), request)

        outcomes = await (closed_loop(send, planned, streams) if streams else open_loop(send, planned))
    first = min(outcome.due for outcome in outcomes)
    seconds = max(outcome.due + outcome.end for outcome in outcomes) - first
    cpu = time.process_time() - cpu
    return {"outcomes": [asdict(outcome) for outcome in outcomes], "seconds": seconds, "cpu_seconds": cpu}


def main() -> None:
    import uvloop

    def handle(kind: str, target: dict[str, Any], model: str, requests: list[dict[str, Any]], streams: int) -> dict:
        planned = [PlannedRequest(**request) for request in requests]
        return uvloop.run(run_load(kind, Target(**target), model, planned, streams))

    answer({"load": handle})


if __name__ == "__main__":
    main()
