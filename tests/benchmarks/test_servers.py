"""Servers of benchmarks are ready when their health check passes, and leave nothing behind."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from isthmus.benchmarks.http_api import get
from isthmus.benchmarks.processes import BenchError
from isthmus.benchmarks.servers import free_port, grpc_health, http_health, running_server

LOADING_TWICE = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if Handler.asked > 2 else 503)
        self.end_headers()
        self.wfile.write(str(Handler.asked).encode())

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""A server that says twice that it isn't ready, as llama-server does while it loads"""


def test_a_server_is_ready_when_it_says_so(tmp_path: Path) -> None:
    """Requests to one that still loads would be counted as failed, and its start as faster than it is."""
    port = free_port()
    command = [sys.executable, "-c", LOADING_TWICE, str(port)]
    with running_server(command, port, http_health, tmp_path / "log") as server:
        assert get(server.address, "/") == b"4", "it was asked until it was ready, and no more"
        assert server.cpu_seconds() > 0
    assert get(server.address, "/") is None
    with pytest.raises(ProcessLookupError):
        os.killpg(server.session, 0)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(BenchError, match="ended before it served:\nno such model"),
        running_server(command, free_port(), http_health, tmp_path / "log"),
    ):
        raise AssertionError("it never served")


def test_ours_is_asked_by_grpc_health() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    said = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(said, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    said.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert not grpc_health(address)
    said.set("", health_pb2.HealthCheckResponse.SERVING)
    assert grpc_health(address)
    server.stop(None).wait()
    assert not grpc_health(address)
