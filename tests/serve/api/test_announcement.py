"""What `isthmus serve` says when it is ready: what it costs, what was cut, and nothing of what was asked for."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from commands.serve import announce
from serve.engine import build
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import ENGINE, NETWORK, RunningServer

SMALL = dataclasses.replace(ENGINE, max_sequences=1)
MEMORY = "what memory has room for"


def said(server: RunningServer) -> str:
    console = Console(file=io.StringIO(), soft_wrap=True)
    announce(server.server, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_context_that_was_asked_for_is_not_news(start_server: StartServer) -> None:
    """It was blamed on memory."""
    server = start_server(engine=dataclasses.replace(SMALL, context_length=256))
    assert MEMORY not in said(server) and "quantize" not in said(server)


def test_a_context_that_was_cut_is(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    room = NETWORK.parameters * 4 + 2 * 1000 * SMALL.kv_bytes_per_token(NETWORK)
    monkeypatch.setattr(build, "free_memory", lambda device: build.PROGRAM_BYTES + room)
    text = said(start_server(engine=SMALL))
    assert MEMORY in text and "of the model's 4096 tokens" in text


def test_integers_made_while_loading_are_said_to_cost(start_server: StartServer) -> None:
    """And where it is measured how much: nothing here knows."""
    text = said(start_server(engine=SMALL, quantize="int8"))
    assert "--quantize int8 changes what the model says" in text and "isthmus convert --quantize int8" in text
