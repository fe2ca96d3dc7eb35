"""The comparison with other servers: its requests, its HTTP client, and the report from a made-up record."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tyro

from isthmus.benchmarks import peer_servers
from isthmus.benchmarks.comparison import with_comparison
from isthmus.benchmarks.http_api import APIS, HttpError, post
from isthmus.benchmarks.load import Outcome, Target, closed_loop, load_figures, run_load, send
from isthmus.benchmarks.machine import describe
from isthmus.benchmarks.peer_servers import COMPLETIONS, PROMPTS, PeerServersBench, plan, served_of_engine, sizes
from isthmus.benchmarks.processes import BenchError
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.report import write_report
from isthmus.benchmarks.stacks import STACKS, Installed, Sizes, Start
from isthmus.benchmarks.workload import PlannedRequest
from isthmus.commands import bench as command
from isthmus.model.config import ModelConfig
from isthmus.serve.api.config import ServeConfig

PLANNED = PlannedRequest(0.0, [1, 2], 3, 0)


def _outcome(**changes: Any) -> dict[str, Any]:
    outcome = Outcome(0.0, 0.0, 0.5, 2.0, 4, 3, [0.5, 1.0])
    return dataclasses.asdict(dataclasses.replace(outcome, **changes))


def test_every_server_gets_the_same_requests_and_each_repetition_others() -> None:
    bench = PeerServersBench(seconds=20.0)
    assert plan(bench, 2.0, 0, 1000) == plan(bench, 2.0, 0, 1000)
    assert plan(bench, 2.0, 0, 1000) != plan(bench, 2.0, 1, 1000)
    closed = plan(bench, 0.0, 0, 1000)
    assert len(closed) == bench.requests and {request.at for request in closed} == {0.0}
    for request in (*closed, *plan(bench, 5.0, 0, 1000)):
        assert PROMPTS[0] <= len(request.prompt) <= PROMPTS[1]
        assert COMPLETIONS[0] <= request.max_tokens <= COMPLETIONS[1]
        assert len(request.prompt) + request.max_tokens <= sizes(bench).context
        assert all(10 <= token < 1000 for token in request.prompt)
    assert list(bench.loads) == ["closed32", "rate0.5", "rate1", "rate2"]
    assert "closed0" not in dataclasses.replace(bench, streams=0).loads


def test_repetitions_are_pooled() -> None:
    answer = {"outcomes": [_outcome()], "seconds": 2.0, "cpu_seconds": 0.5}
    figures = load_figures(answer, answer)
    assert figures["completed"] == 2 and figures["output_tokens_per_second"] == 2.0


async def _serve_once(answer: bytes, body: dict[str, Any]) -> tuple[list[bytes], bytes]:
    """The lines that `post` gives for that answer, and what the server was sent."""
    got = b""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        got = await reader.readuntil(b"\r\n\r\n")
        for at in range(0, len(answer), 7):  # chunks never end where a line does
            writer.write(answer[at : at + 7])
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return [line async for line in post(address, "/x", body)], got


def test_http_answers_are_read_however_they_are_cut() -> None:
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:\r\n9\r\n 1\ndata: \r\n2\r\n2\n\r\n0\r\n\r\n"
    )
    lines, sent = asyncio.run(_serve_once(chunked, {"a": 1}))
    assert lines == [b"data: 1", b"data: 2", b""]
    assert sent.startswith(b"POST /x HTTP/1.1\r\n") and b"Content-Length: 8\r\n" in sent
    plain = b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\ndata: 1\nrest"
    assert asyncio.run(_serve_once(plain, {}))[0] == [b"data: 1", b"rest"]
    with pytest.raises(HttpError, match="400: b'why'"):
        asyncio.run(_serve_once(b"HTTP/1.1 400 No\r\nServer: x\r\n\r\nwhy", {}))


def _stream(events: list[dict[str, Any]], kind: str) -> Outcome:
    """What a client sees of a server that sends these events."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        writer.write(f"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n{lines}data: [DONE]\n\n".encode())
        await writer.drain()
        writer.close()

    async def run() -> Outcome:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            answer = await run_load(Target(address, timeout=10.0, engine=kind, model="m"), [PLANNED])
            return Outcome(**answer["outcomes"][0])

    return asyncio.run(run())


def test_tokens_are_counted_as_each_server_tells_them() -> None:
    vllm = _stream([{"choices": [{"token_ids": [1]}]}, {"choices": [{"token_ids": [2, 3]}]}, {"choices": []}], "vllm")
    assert (vllm.tokens, vllm.messages, len(vllm.gaps), vllm.error) == (3, 2, 1, None)
    llama = _stream([{"tokens": [1]}, {"tokens": [3]}, {"stop": True, "tokens": [], "tokens_predicted": 3}], "llama")
    assert (llama.tokens, llama.messages) == (3, 2), "text held back is counted at the end"
    failed = _stream([{"error": {"code": 500}}], "llama")
    assert failed.error is not None and "500" in failed.error
    assert APIS["llama"].tokens({"content": "x"}) == (0, None) and APIS["vllm"].tokens({}) == (0, None)


def test_a_completion_that_is_cut_short_has_failed() -> None:
    async def tokens(planned: PlannedRequest, count: int) -> AsyncIterator[tuple[int, int | None]]:
        for _ in range(count):
            yield 1, None

    whole, short = (asyncio.run(send(partial(tokens, count=count), PLANNED, 0.0)) for count in (3, 2))
    assert whole.error is None and short.error == "2 tokens of 3"


def test_a_closed_loop_keeps_its_streams_busy_and_sends_all() -> None:
    flying, most, sent = 0, 0, []

    async def stream(request: PlannedRequest) -> AsyncIterator[tuple[int, int | None]]:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0)
        sent.append(request.seed)
        flying -= 1
        yield 3, None

    planned = [dataclasses.replace(PLANNED, seed=seed) for seed in range(10)]
    outcomes = asyncio.run(closed_loop(stream, planned, 4))
    assert most == 4 and sorted(sent) == list(range(10)) and len(outcomes) == 10
    assert all(outcome.error is None for outcome in outcomes)


def test_all_servers_are_started_for_as_much(tmp_path: Path) -> None:
    for path in ("peers", "vllm", "bin/llama-server", "m-q8_0.gguf"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    installed = Installed(tmp_path / "peers", tmp_path / "vllm", tmp_path)
    config = ModelConfig(vocab_size=10, layers=2, kv_heads=3, head_dim=4)

    def server(name: str) -> list[str]:
        start = Start(STACKS[name], tmp_path / "m", config, Sizes(32, 384), installed)
        return start.command(start.engine.server, 1234)

    ours = tyro.cli(ServeConfig, args=server("isthmus-int8")[4:])
    assert (ours.quantize, ours.dtype, ours.port, ours.engine.pages) == ("int8", "bfloat16", 1234, 1 + 32 * 24)
    assert (ours.engine.max_sequences, ours.engine.context_length, ours.engine.prefix_cache) == (32, 384, False)
    assert tyro.cli(ServeConfig, args=server("isthmus-bf16")[4:]).quantize == "none"
    llama = server("llama-q8_0")
    assert llama[llama.index("-c") + 1] == str(32 * 384) and llama[llama.index("-np") + 1] == "32"
    assert server("vllm-f32")[-1] == str((32 * 3 + 1) * 128 * 2 * 2 * 3 * 4 * 4)
    with pytest.raises(BenchError, match=r"m-q4_0\.gguf does not exist; make_gguf\.py"):
        server("llama-q4_0")


def test_wrong_settings_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in (
        (["--stacks", "transformers-bf16"], "stacks"),
        (["--rates", "0"], "rates"),
        (["--requests", "3"], "requests"),
        (["--model", "nowhere"], "model"),
    ):
        assert command.main(["peer-servers", *words]) == 2
        assert named in capsys.readouterr().out


def test_the_report_shows_latencies_and_what_serving_costs(tmp_path: Path) -> None:
    figures = load_figures({"outcomes": [_outcome()], "seconds": 2.0, "cpu_seconds": 0.5})
    rates = {"closed32": {"isthmus-bf16": [90.0], "llama-bf16": [60.0]}}
    piece = {
        "limits": [{"bandwidth": 1e10, "flops": 1e11}],
        "stacks": {"isthmus-bf16": {"version": "v1", "seconds": 7.25}, "llama-bf16": {"version": "v2", "seconds": 1.5}},
        "errors": {},
        "rates": rates,
        "served": {"closed32": {name: figures for name in rates["closed32"]}},
        "engine": {"isthmus-bf16": {"closed": [100.0], "decode": [180.0]}},
        "streams": 32,
    }
    piece["served_of_engine"] = served_of_engine(piece)
    assert piece["served_of_engine"] == {"isthmus-bf16": {"closed": 0.9, "decode": 0.5}}
    record = Record("peer-servers", "m", describe(), {}, with_comparison([piece]))
    record.save(tmp_path)
    assert "took" not in peer_servers.notes(record), "nobody is blamed without a figure"
    assert {path.name for path in write_report(tmp_path)} == {"README.md", "cpu-peer-servers-m.png"}
    text = (tmp_path / "README.md").read_text()
    assert "| 32 streams | 16 bits | 90 | llama-bf16 | 60 | 1.50 |" in text
    assert "| 32 streams | llama-bf16 | 2 | 0 | 500 / 500 | 750 / 995 |" in text
    assert "90.0% of its engine's throughput with the same requests, 50.0%" in text
    assert "passed: isthmus-bf16 7.2 s, llama-bf16 1.5 s" in text
