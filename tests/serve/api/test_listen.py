"""Addresses that can and can't be listened on: the reason is said, once, by us."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.errors import ConfigError
from isthmus.serve.api.listen import target
from tests.serve.api.harness import PATIENCE


@pytest.mark.parametrize(
    "host, address",
    [
        *(("127.0.0.1", "127.0.0.1:0"), ("0.0.0.0", "0.0.0.0:0"), ("localhost", "localhost:0")),
        *(("::", "[::]:0"), ("[::]", "[::]:0")),
    ],
)
def test_free_ports_are_as_grpc_reads_them(host: str, address: str) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    assert target(host, 0) == address


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_in_use_is_said(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port} .* taken.*--port 0"):
            target(host, port)
    target(host, port)


@pytest.mark.parametrize(
    "host, said",
    [
        ("192.0.2.1", "no such address"),  # a network for documentation
        ("no-such-host.invalid", "host=no-such-host.invalid"),
        ("a..b", "not the name of a host"),
        ("x" * 70, "not the name of a host"),
    ],
)
def test_a_host_that_is_not_this_machine_is_said(host: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        target(host, 50051)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen on every port")
def test_a_port_of_the_system_is_said() -> None:
    with pytest.raises(ConfigError, match="above 1023"):
        target("127.0.0.1", 1)


def test_a_server_on_a_taken_port_prints_one_line(model_folder: Path) -> None:
    """gRPC's own, straight from C++, told nobody what to do."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "isthmus.commands.main", "serve", "--model", str(model_folder), "--port", str(port)],
            env={**os.environ, "COLUMNS": "1000"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert done.returncode == 2 and done.stderr == ""
    assert [f"port={port}" in line for line in done.stdout.splitlines()] == [True]
