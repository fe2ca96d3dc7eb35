"""The HTTP servers of other engines: how each is asked for a completion and read, as data, and a client that streams.

All are sent token ids and complete greedily, past any end of text and without a prefix cache.
"""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from isthmus.benchmarks.workload import PlannedRequest

Json = dict[str, Any]


@dataclass(frozen=True)
class HttpApi:
    """One server's dialect."""

    path: str
    """What a completion is POSTed to"""
    body: Callable[[PlannedRequest, str], Json]
    """The JSON that asks for a request of the model of that name"""
    tokens: Callable[[Json], tuple[int, int | None]]
    """How many tokens a server-sent event carries, and how many the whole completion has where the event says so"""
    version: tuple[str, str]
    """The path that tells the software's version, and the field of its JSON"""


def _llama_body(planned: PlannedRequest, model: str) -> Json:
    """llama-server's own completion; one sampler that leaves a single token is the cheapest greedy."""
    body = {"prompt": planned.prompt, "n_predict": planned.max_tokens, "top_k": 1, "samplers": ["top_k"]}
    return {**body, "ignore_eos": True, "stream": True, "cache_prompt": False, "return_tokens": True}


def _llama_tokens(event: Json) -> tuple[int, int | None]:
    """Text that is no whole character yet is held back, and its tokens are never listed: the last event counts all."""
    return len(event.get("tokens") or ()), event.get("tokens_predicted") if event.get("stop") else None


def _vllm_body(planned: PlannedRequest, model: str) -> Json:
    body = {"model": model, "prompt": planned.prompt, "max_tokens": planned.max_tokens, "temperature": 0}
    return {**body, "ignore_eos": True, "stream": True, "return_token_ids": True}


def _vllm_tokens(event: Json) -> tuple[int, int | None]:
    return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ())), None


APIS = {
    "llama": HttpApi("/completion", _llama_body, _llama_tokens, ("/props", "build_info")),
    "vllm": HttpApi("/v1/completions", _vllm_body, _vllm_tokens, ("/version", "version")),
}
"""By the engine's name in stacks.py"""


class HttpError(RuntimeError):
    """An answer that is no success, or none of HTTP."""


def get(address: str, path: str) -> bytes | None:
    """The body of a GET's answer, if that is a success; blocks for at most 5 s."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.read() if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


async def completion(
    api: HttpApi, address: str, model: str, planned: PlannedRequest, timeout: float
) -> AsyncIterator[tuple[int, int | None]]:
    """What `api.tokens` says of each event of a streamed completion. Raises HttpError, OSError, ValueError, EOFError,
    and TimeoutError after `timeout` seconds."""
    async with asyncio.timeout(timeout), aclosing(post(address, api.path, api.body(planned, model))) as lines:
        async for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise HttpError(str(event["error"])[:200])
            yield api.tokens(event)


async def post(address: str, path: str, body: Json) -> AsyncGenerator[bytes, None]:
    """The lines of the answer to a POST of JSON, as they come. Raises HttpError, OSError."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status = (await reader.readline()).split()
        chunked = b"transfer-encoding: chunked" in (await reader.readuntil(b"\r\n\r\n")).lower()
        parts = _chunks(reader) if chunked else _unframed(reader)
        if len(status) < 2 or status[1] != b"200":
            text = b"".join([part async for part in parts])
            raise HttpError(f"HTTP {status[1].decode() if len(status) > 1 else '?'}: {text[:200]!r}")
        left = b""
        async for part in parts:
            *lines, left = (left + part).split(b"\n")
            for line in lines:
                yield line
        yield left
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The parts of an answer in HTTP's chunked encoding."""
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _unframed(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The parts of an answer that ends with the connection."""
    while part := await reader.read(1 << 16):
        yield part
