"""What a server is started with. The command line is generated from this class."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from model.config import ConfigError
from serve.engine.config import EngineConfig


@dataclass(frozen=True)
class ServeConfig:
    """Serves a model over gRPC."""

    model: Path
    """A model folder: as `isthmus train` writes it, as Hugging Face publishes it, or a LoRA adapter's"""
    merge_adapter: bool = False
    """Of an adapter's folder: add it to the model's weights once, instead of computing it in every step"""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Keep matrices as integers, made when they are loaded; `isthmus convert --quantize` also says what it costs"""
    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs --auth-token-file or --insecure"""
    port: int = 50051
    """0 takes a free one"""
    auth_token_file: Path | None = None
    """Every call but health must carry this file's content as `authorization: Bearer …`"""
    insecure: bool = False
    """Listen beyond loopback without a token: whoever reaches the port may use it"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights, activations and KV cache; auto is bfloat16, and float32 on CPU"""
    tp: int = 1
    """Devices to split the model over"""
    ep: int = 1
    """Devices to split the experts over, times tp"""
    drain_seconds: float = 30.0
    """How long requests in flight may go on after SIGTERM"""
    compilation_cache: Path | None = None
    """Where compiled programs are kept; default ~/.cache/isthmus/xla"""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def validate(self) -> None:
        """Raises ConfigError naming the field."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} must be 0 to 65535")
        if not _is_loopback(self.host) and self.auth_token_file is None and not self.insecure:
            raise ConfigError(
                f"host={self.host} is not loopback: give --auth-token-file, or --insecure if everyone there may use it"
            )
        if not 0 <= self.drain_seconds < float("inf"):
            raise ConfigError(f"drain_seconds={self.drain_seconds} must be 0 or more")
        for name in ("tp", "ep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")

    def read_token(self) -> str | None:
        """The auth token. Raises ConfigError when the file can't be read or is empty."""
        if self.auth_token_file is None:
            return None
        try:
            token = self.auth_token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"auth_token_file: {error}") from None
        if not token or not token.isascii() or not token.isprintable():
            raise ConfigError(f"auth_token_file: {self.auth_token_file} must hold one line of printable ASCII")
        return token


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
