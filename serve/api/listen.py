"""The address that a server listens on, looked at before gRPC is given it: that prints what goes wrong there itself, as
it comes from C++, and says no reason to its caller."""

from __future__ import annotations

import errno
import os
import socket

from isthmus.errors import ConfigError

_REASONS = {
    errno.EADDRINUSE: "it is taken, perhaps by another server; --port 0 takes a free one",
    errno.EACCES: "it is the system's; take one above 1023",
    errno.EADDRNOTAVAIL: "this machine has no such address",
}


def target(host: str, port: int) -> str:
    """As gRPC reads an address. Raises ConfigError naming what can't be listened on, and why."""
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no name of a host"
        raise ConfigError(f"host={host} can't be listened on: {reason}") from None
    failed = [_bind(family, kind, protocol, address) for family, kind, protocol, _, address in found]
    # One address of a name may be of a kind that this machine lacks, IPv6 say: that is no reason to fail.
    refused = [number for number in failed if number in (errno.EADDRINUSE, errno.EACCES)]
    if refused or all(failed):
        number = (refused or failed)[0]
        raise ConfigError(
            f"port={port} on host={host} can't be listened on: {_REASONS.get(number, os.strerror(number))}"
        )
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind(family: int, kind: int, protocol: int, address: tuple) -> int:
    """The errno of binding as gRPC does; 0 where that works."""
    try:
        with socket.socket(family, kind, protocol) as listener:
            if os.name != "nt":  # there it would take over a port in use
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return error.errno or errno.EINVAL
    return 0
