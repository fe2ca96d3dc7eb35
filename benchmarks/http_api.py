"""The HTTP servers of other engines: how each is asked for a completion and how it answers, and a client that streams.

Every server is sent token ids, and completes greedily, past any end of text and without a prefix cache.
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
    """How one kind of server is asked for a completion."""

    path: str
    """The path to which a request for a completion is POSTed"""
    body: Callable[[PlannedRequest, str], Json]
    """Returns the JSON of a request to the model of that name"""
    tokens: Callable[[Json], tuple[int, int | None]]
    """Returns how many tokens an event carries, and how many the whole completion has, or None if it doesn't say"""
    version: tuple[str, str]
    """The path that tells the software's version, and the field of its JSON"""


def _llama_body(planned: PlannedRequest, model: str) -> Json:
    """A request to llama-server's own API. One sampler that leaves a single token is its cheapest way to be greedy."""
    body = {"prompt": planned.prompt, "n_predict": planned.max_tokens, "top_k": 1, "samplers": ["top_k"]}
    return {**body, "ignore_eos": True, "stream": True, "cache_prompt": False, "return_tokens": True}


def _llama_tokens(event: Json) -> tuple[int, int | None]:
    """llama-server holds back incomplete characters and never lists their tokens; the last event counts all tokens."""
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
    """The server answered with an error, or not with HTTP."""


def get(address: str, path: str) -> bytes | None:
    """The body of the answer to a GET; None without success, also when the server says nothing for 5 s."""
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
    """Yields what `api.tokens` says of each event of a streamed completion. Raises HttpError, OSError, ValueError,
    EOFError, and TimeoutError after `timeout` seconds."""
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
    """Yields the lines of the answer to a POST of JSON, as they come. Raises HttpError, OSError."""
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
    """Yields the parts of an answer in HTTP's chunked encoding."""
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _unframed(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yields the parts of an answer that ends with the connection."""
    while part := await reader.read(1 << 16):
        yield part
