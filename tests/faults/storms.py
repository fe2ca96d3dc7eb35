"""What the storms share: requests of many kinds, how a call ended, and a server to turn them on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_status import rpc_status

from isthmus import generate_request
from isthmus.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from isthmus.v1 import inference_pb2 as pb
from tests.serve.api.harness import PATIENCE, ServeProcess, collect

StartServing = Callable[..., ServeProcess]
OK = "OK"


@dataclass(frozen=True)
class End:
    """How a call ended, and what had come until then."""

    code: str
    detail: str = ""
    """The kinds of google.rpc detail that came with the status"""
    message: str = ""
    text: str = ""
    token_ids: tuple[int, ...] = ()

    @property
    def how(self) -> str:
        """The code with the kinds of its details."""
        return f"{self.code} {self.detail}".strip()

    @property
    def answer(self) -> tuple[str, tuple[int, ...]]:
        return self.text, self.token_ids

    def begins(self, whole: End) -> bool:
        """Whether what came is how `whole` begins."""
        return whole.text.startswith(self.text) and whole.token_ids[: len(self.token_ids)] == self.token_ids


OnEvent = Callable[[Any, int], Awaitable[None]]
"""on_event(call, tokens so far), after every event of a stream"""


class Caller:
    """A connection of its own."""

    def __init__(self, address: str, *options: tuple[str, int]) -> None:
        options = ("grpc.use_local_subchannel_pool", 1), *options
        self.channel = grpc.aio.insecure_channel(address, options=options)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self._control = control_pb2_grpc.ControlServiceStub(self.channel)

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def unary(self, request: pb.GenerateRequest, timeout: float = PATIENCE) -> End:
        call = self._inference.Generate(request, timeout=timeout)
        try:
            response = await call
        except grpc.aio.AioRpcError:
            return await ended(call)
        (choice,) = response.choices
        return End(OK, text=choice.text, token_ids=tuple(choice.token_ids))

    async def stream(
        self, request: pb.GenerateRequest, timeout: float = PATIENCE, on_event: OnEvent | None = None
    ) -> End:
        """The stream, held to its order; on_event may cancel the call."""
        call = self._inference.GenerateStream(pb.GenerateStreamRequest(request=request), timeout=timeout)
        events = []
        tokens = 0
        try:
            async for event in call:
                events.append(event)
                tokens += len(event.delta.token_ids)
                if on_event is not None:
                    await on_event(call, tokens)
        except grpc.aio.AioRpcError:
            pass
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
        end = await ended(call)
        if end.code == OK:
            whole = collect(events)
            return End(OK, text=whole.text, token_ids=whole.token_ids)
        text = "".join(event.delta.text for event in events)
        return End(end.code, end.detail, end.message, text, tuple(i for event in events for i in event.delta.token_ids))

    async def cancel(self, request_id: str) -> bool:
        """Whether it was in flight."""
        request = control_pb2.CancelRequest(request_ids=[request_id])
        return bool((await self._control.Cancel(request, timeout=PATIENCE)).cancelled_request_ids)


async def ended(call: Any) -> End:
    """The status of a call that is over."""
    code = (await call.code()).name
    if code == OK:
        return End(OK)
    message = await call.details()
    status = None if call.cancelled() else await rpc_status.aio.from_call(call)
    kinds = [] if status is None else [detail.type_url.split(".")[-1] for detail in status.details]
    return End(code, " ".join(kinds), message or "")


def requests(rng: random.Random, count: int, longest: int) -> list[pb.GenerateRequest]:
    """Greedy and sampled ones; up to `longest` tokens, those of the prompt included. Many prompts begin alike, and many
    have the same pages behind different ones."""
    blocks = [rng.choices(range(1, 256), k=32) for _ in range(4)]
    made = []
    for index in range(count):
        beginning = [token for block in rng.choices(blocks, k=rng.randrange(5)) for token in block]
        prompt = [*beginning[: rng.choice([40, 80, 130])], *rng.choices(range(1, 256), k=rng.randrange(1, 40))]
        sampling: dict[str, Any] = {"temperature": 0}
        if index % 3:
            sampling = {
                "temperature": rng.uniform(0.5, 1.5),
                "top_p": rng.choice([None, 0.8, 0.95]),
                "top_k": rng.choice([None, 5, 50]),
                "min_p": rng.choice([None, 0.02]),
                "seed": rng.getrandbits(64),
            }
        max_tokens = rng.randrange(1, longest - len(prompt))
        made.append(generate_request(prompt, max_tokens=max_tokens, ignore_eos=index % 5 > 0, **sampling))
    return made


async def one_by_one(address: str, asked: Sequence[pb.GenerateRequest]) -> list[End]:
    """What each is answered by a server that has nothing else to do."""
    async with Caller(address) as caller:
        ends = [await caller.unary(request) for request in asked]
    assert {end.how for end in ends} == {OK}
    return ends


def resident_bytes(process: ServeProcess) -> int:
    """Memory that a server has now."""
    (line,) = (
        line for line in Path(f"/proc/{process.process.pid}/status").read_text().splitlines() if line[:6] == "VmRSS:"
    )
    return 1024 * int(line.split()[1])
