"""Nothing that a request brings may hold up the others: the event loop, which every stream hangs on, is measured while
the largest requests come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from isthmus import generate_request
from isthmus.serve.api.inference import MOST_AT_ONCE
from isthmus.serve.api.wire import MAX_NUMBERS_BYTES
from isthmus.serve.prepare.request import MAX_TOKENS
from isthmus.v1 import control_pb2
from isthmus.v1 import inference_pb2 as pb
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import MANY, NETWORK, PATIENCE, PROMPT, ApiClient, RunningServer, collect, wait_for

HOLD_SECONDS = 0.020
"""The longest that anything may keep the loop or the interpreter"""
HOLD_TURNS = 500_000
"""Turns of an empty loop, which take as long as HOLD_SECONDS only where a machine is slow"""
TRIES = 30
"""The best counts: other processes of the machine can only make it longer"""

INVALID, OK = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OK
INFERENCE, CONTROL = "/isthmus.v1.InferenceService/", "/isthmus.v1.ControlService/"
MIB = 1 << 20
ENDLESS = {"style": "endless"}
PROSE = "Nothing in it may keep the loop for longer than that. "


def _template_arguments(entries: int) -> bytes:
    request = pb.GenerateRequest()
    request.prompt.messages.messages.add(role="user", content="a")
    request.prompt.messages.template_arguments_json = json.dumps({f"{i}": i for i in range(entries)})
    return request.SerializeToString()


def _endless() -> bytes:
    return generate_request([{"role": "user", "content": "a"}], template_arguments=ENDLESS).SerializeToString()


def _prompt(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Prompt(**fields))


def _of_messages(body: bytes) -> bytes:
    """A GenerateRequest whose messages are `body`."""
    prompt = pb.Prompt(messages=pb.Messages()).SerializeToString()[:1] + _varint(len(body)) + body
    return pb.GenerateRequest(prompt=pb.Prompt()).SerializeToString()[:1] + _varint(len(prompt)) + prompt


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _chat(turns: int, content: str) -> bytes:
    messages = [pb.ChatMessage(role="user", content=content)] * turns
    return pb.GenerateRequest(prompt=pb.Prompt(messages=pb.Messages(messages=messages))).SerializeToString()


CASES: dict[str, tuple[str, Callable[[], bytes], grpc.StatusCode, str]] = {
    "a prompt of 4 MB": (
        INFERENCE + "Generate",
        lambda: _prompt(text=(PROSE * 80_000)[:4_000_000]).SerializeToString(),
        INVALID,
        "prompt.text",
    ),
    "a prompt of 8 MB": (
        INFERENCE + "Generate",
        lambda: _prompt(text="é" * (4 * MIB)).SerializeToString(),
        INVALID,
        "prompt.text",
    ),
    "a prompt that might fit, and doesn't": (
        INFERENCE + "Generate",
        lambda: _prompt(text=("a b c " * MIB)[: 12 * NETWORK.context_length]).SerializeToString(),
        INVALID,
        "prompt.text",
    ),
    "a prompt of a million ids": (
        INFERENCE + "Generate",
        lambda: _prompt(token_ids=pb.TokenIds(ids=[1] * MAX_NUMBERS_BYTES)).SerializeToString(),
        INVALID,
        "prompt.token_ids.ids",
    ),
    "a prompt of ids of two bytes": (
        INFERENCE + "Generate",
        lambda: _prompt(token_ids=pb.TokenIds(ids=[200] * (MAX_NUMBERS_BYTES // 2))).SerializeToString(),
        INVALID,
        "prompt.token_ids.ids",
    ),
    "more ids than are parsed": (
        INFERENCE + "Generate",
        lambda: _prompt(token_ids=pb.TokenIds(ids=[1] * (2 * MAX_NUMBERS_BYTES))).SerializeToString(),
        INVALID,
        "prompt.token_ids.ids",
    ),
    "ids in every list": (
        INFERENCE + "Generate",
        lambda: pb.GenerateRequest(
            prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1] * MAX_NUMBERS_BYTES)),
            stop=pb.StopConditions(token_ids=[1] * MAX_NUMBERS_BYTES),
            resume_token_ids=[1] * MAX_NUMBERS_BYTES,
        ).SerializeToString(),
        INVALID,
        "",
    ),
    "a million ids to stop at": (
        INFERENCE + "Generate",
        lambda: pb.GenerateRequest(
            prompt=pb.Prompt(text="a"), stop=pb.StopConditions(token_ids=[1] * MAX_NUMBERS_BYTES)
        ).SerializeToString(),
        INVALID,
        "stop.token_ids",
    ),
    "ids in many rows": (
        INFERENCE + "Generate",
        lambda: _prompt(token_ids=pb.TokenIds(ids=[1] * MIB)).SerializeToString() * 12,
        INVALID,
        "prompt.token_ids.ids",
    ),
    "a thousand messages of 3 kB": (
        INFERENCE + "Generate",
        lambda: _chat(1024, PROSE * 60),
        INVALID,
        "prompt.messages",
    ),
    "a thousand messages of 50 B": (INFERENCE + "Generate", lambda: _chat(1024, PROSE), INVALID, "prompt.messages"),
    "a template without an end": (INFERENCE + "Generate", _endless, INVALID, "prompt.messages"),
    "two million empty messages": (
        INFERENCE + "Generate",
        lambda: _of_messages(b"\x0a\x00" * (2 * MIB)),
        INVALID,
        "prompt.messages",
    ),
    "200,000 template arguments": (
        INFERENCE + "Generate",
        lambda: _template_arguments(200_000),
        INVALID,
        "prompt.messages.template_arguments_json",
    ),
    "7 million unknown fields": (INFERENCE + "Generate", lambda: b"\x78\x01" * (7 * MIB), INVALID, "GenerateRequest"),
    "4 MB to tokenize": (
        INFERENCE + "Tokenize",
        lambda: pb.TokenizeRequest(text=(PROSE * 80_000)[:4_000_000]).SerializeToString(),
        INVALID,
        "text",
    ),
    "400 kB to tokenize": (
        INFERENCE + "Tokenize",
        lambda: pb.TokenizeRequest(text=(PROSE * 80_000)[: 400 << 10]).SerializeToString(),
        OK,
        "",
    ),
    "a million ids to detokenize": (
        INFERENCE + "Detokenize",
        lambda: pb.DetokenizeRequest(token_ids=[1] * MAX_NUMBERS_BYTES).SerializeToString(),
        INVALID,
        "token_ids",
    ),
    "the most ids to detokenize": (
        INFERENCE + "Detokenize",
        lambda: pb.DetokenizeRequest(token_ids=[65] * MAX_TOKENS).SerializeToString(),
        OK,
        "",
    ),
    "a million empty ids to cancel": (
        CONTROL + "Cancel",
        lambda: control_pb2.CancelRequest(request_ids=[""] * MIB).SerializeToString(),
        INVALID,
        "",
    ),
    "bytes that are no message": (INFERENCE + "Generate", lambda: b"\xff" * (8 * MIB), INVALID, ""),
}


def test_nothing_is_left_for_the_first_request_to_make(start_server: StartServer) -> None:
    """The vocabulary's lengths alone take 0.7 s for Gemma's, on the loop; they were made for the first text."""
    made = vars(start_server().server.session.model.tokenizer)
    assert {"_lengths", "_detokenizer", "_with_special_tokens"} <= made.keys()


class Heartbeat:
    """How late the loop comes back to a coroutine that sleeps for a millisecond. What the machine gave to others in
    that time doesn't count: a gap is no longer than the processor time that this process took in it."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server

    def longest_gap(self, work: Callable[[], object]) -> float:
        """Seconds, while `work` runs."""
        gaps, beating = [0.0], True

        async def beat() -> None:
            last = time.perf_counter(), time.process_time()
            while beating:
                await asyncio.sleep(0.001)
                now = time.perf_counter(), time.process_time()
                gaps.append(min(now[0] - last[0] - 0.001, now[1] - last[1]))
                last = now

        beats = asyncio.run_coroutine_threadsafe(beat(), self._server._loop)
        try:
            work()
        finally:
            beating = False
            beats.result(PATIENCE)
        return max(gaps)


def hold_seconds() -> float:
    """HOLD_SECONDS, or on a machine that is too slow for them what it takes for HOLD_TURNS."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        for _ in range(HOLD_TURNS):
            pass
        taken.append(time.process_time() - start)
    return max(HOLD_SECONDS, min(taken))


@pytest.fixture(scope="module")
def heartbeat(chat_server: RunningServer) -> Heartbeat:
    return Heartbeat(chat_server)


def send(client: ApiClient, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    """Bytes as they are, so that building and reading messages takes nothing of this process."""
    try:
        client.channel.unary_unary(method)(data, timeout=PATIENCE)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return OK, ""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_request_holds_up_the_others(case: Any, chat_server: RunningServer, heartbeat: Heartbeat) -> None:
    method, build, code, said = case
    data = build()
    gaps = []

    def call() -> None:
        with chat_server.client() as client:
            answer = send(client, method, data)
        assert answer[0] == code and answer[1].startswith(said), answer

    hold = hold_seconds()
    while len(gaps) < TRIES and min(gaps, default=1.0) >= hold:
        gaps.append(heartbeat.longest_gap(call))
    assert min(gaps) < hold, f"the loop stood still for {min(gaps) * 1000:.0f} ms, not {hold * 1000:.0f}"


def test_a_client_that_has_not_read_for_long_is_served_in_parts(server: RunningServer, client: ApiClient) -> None:
    """Thousands of tokens that are decoded in a row hold up the loop as any other work does."""
    options = {"max_tokens": MANY, "seed": 1, "ignore_eos": True}
    alone = client.generate(PROMPT, **options)
    events = client.stream(PROMPT, **options)
    first = [next(events), next(events)]
    (sequence,) = server.engine.scheduler.running
    asyncio.run_coroutine_threadsafe(_stand_still(lambda: len(sequence.completion) > 4 * MOST_AT_ONCE), server._loop)
    streamed = collect([*first, *events])
    assert streamed.token_ids == alone.token_ids and streamed.text == alone.text
    assert MOST_AT_ONCE / 2 < max(len(delta.token_ids) for delta in streamed.deltas) <= MOST_AT_ONCE


async def _stand_still(until: Callable[[], bool]) -> None:
    """Keeps the loop from everything else, so that tokens pile up."""
    wait_for(until, "the tokens that pile up")
