"""Checks the address that a server listens on before gRPC gets it. gRPC itself prints what goes wrong as its C++ code
words it, and doesn't tell its caller the reason."""

from __future__ import annotations

import errno
import os
import socket

from isthmus.errors import ConfigError

_REASONS = {
    errno.EADDRINUSE: "it is taken, perhaps by another server; --port 0 takes a free one",
    errno.EACCES: "it is reserved by the system; take one above 1023",
    errno.EADDRNOTAVAIL: "this machine has no such address",
}


def target(host: str, port: int) -> str:
    """The address as gRPC reads it. Raises ConfigError naming what can't be listened on, and why."""
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not the name of a host"
        raise ConfigError(f"host={host} can't be listened on: {reason}") from None
    failed = [_bind(family, kind, protocol, address) for family, kind, protocol, _, address in found]
    # One address of a name may be of a kind that this machine lacks, such as IPv6; that is no reason to fail.
    refused = [number for number in failed if number in (errno.EADDRINUSE, errno.EACCES)]
    if refused or all(failed):
        number = (refused or failed)[0]
        raise ConfigError(
            f"port={port} on host={host} can't be listened on: {_REASONS.get(number, os.strerror(number))}"
        )
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind(family: int, kind: int, protocol: int, address: tuple) -> int:
    """The errno of binding an address as gRPC does; 0 if that works."""
    try:
        with socket.socket(family, kind, protocol) as listener:
            if os.name != "nt":  # on Windows it would take over a port in use
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return error.errno or errno.EINVAL
    return 0
