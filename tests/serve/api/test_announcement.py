"""What `isthmus serve` says when it is ready: what it costs, what was cut, and nothing of what was asked for."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from isthmus.commands.serve import announce
from isthmus.quality import costs
from isthmus.quality.costs import FILE, MeasuredCost
from isthmus.serve.engine import build
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import ENGINE, NETWORK, RunningServer

SMALL = dataclasses.replace(ENGINE, max_sequences=1, prefill_tokens=32, draft_rows=0, steps_per_launch=1)
MEMORY = "as many as memory has room for"


def said(server: RunningServer) -> str:
    console = Console(file=io.StringIO(), soft_wrap=True)
    announce(server.server, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_context_that_was_asked_for_is_not_news(start_server: StartServer) -> None:
    """It was blamed on memory."""
    server = start_server(engine=dataclasses.replace(SMALL, context_length=256))
    assert MEMORY not in said(server) and "quantize" not in said(server)


def test_a_context_that_was_cut_is(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    room = NETWORK.parameters * 4 + 2 * 1000 * SMALL.kv_bytes_per_token(NETWORK, "float32")
    monkeypatch.setattr(build, "free_memory", lambda device: build.PROGRAM_BYTES + room)
    text = said(start_server(engine=SMALL))
    assert MEMORY in text and f"of the model's {NETWORK.context_length} tokens" in text


def test_the_kernels_that_run_are_told(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without a compiler is several times slower than it could be, and its reference is said to be slow only
    where kernels were wanted."""
    text = said(start_server(engine=SMALL, kernels="reference"))
    assert "kernels: reference\n" in text and "slower than it could be" not in text
    text = said(start_server(engine=SMALL))
    assert "kernels: cpu\n" in text or ("kernels: reference\n" in text and "slower than it could be, without" in text)


def test_integers_made_while_loading_are_said_to_cost(start_server: StartServer) -> None:
    """And where it is measured how much: nothing here knows."""
    text = said(start_server(engine=SMALL, quantize="int8"))
    assert "--quantize int8 rounds while loading" in text and "TARGET --quantize int8 measures by how much" in text


def test_what_integers_cost_known_models_is_told(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dtype that serves; another one costs something else."""
    cost = {"kl": 0.00412, "kl_error": 0.0001, "ratio": 1.003, "ratio_error": 0.0005, "top1": 0.96, "tokens": 6120}
    float32, bfloat16 = ({**cost, "dtype": dtype, "cache_dtype": dtype} for dtype in ("float32", "bfloat16"))
    table = {"int8": {"float32": {"small-1b": float32}, "bfloat16": {"other-1b": bfloat16}}}
    monkeypatch.setattr(costs, "_table", lambda: table)
    text = said(start_server(engine=SMALL, quantize="int8", dtype="float32"))
    assert "KL divergences in float32, in nats per token: 0.0041 ± 0.0002 on small-1b\n" in text
    assert "other-1b" not in text and "TARGET --quantize int8 measures" in text


def test_a_quantized_folder_tells_what_was_measured(start_server: StartServer) -> None:
    """Of itself; and where nothing was, that."""
    server = start_server(engine=SMALL)
    assert "quality.json" not in said(server)
    model = server.server.session.model
    server.server.session.model = model.with_config(quantization=(".*=int8",))
    try:
        assert "no valid quality.json" in said(server)
        MeasuredCost(
            0.05, 0.001, 1.02, None, 0.9, 16320, "bfloat16", "int8", "int4", "prose.txt", 10.2, 10.0, 64, "cpu",
            "2026-01-02",
        ).save(model.path)  # fmt: skip
        text = said(server)
        kept = json.loads((model.path / FILE).read_text())
        (model.path / FILE).write_text(json.dumps({**kept, "tokens": "many"}))
        assert "no valid quality.json" in said(server), "nothing depends on it"
    finally:
        server.server.session.model = model
        (model.path / FILE).unlink(missing_ok=True)
    assert "int4: KL 0.05 ± 0.002 nats per token" in text and "perplexity +2.00%" in text and "of prose.txt" in text
    assert "2026-01-02" in text and "in bfloat16 with a cache in int8" in text
