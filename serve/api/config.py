"""What a server is started with. The command line is generated from this class."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from isthmus.client import read_token
from isthmus.errors import ConfigError
from isthmus.model.sharding import MeshShape
from isthmus.model.weights.hub import FolderOptions
from isthmus.serve.engine.config import EngineConfig

MAX_SECONDS = 1_000_000
"""gRPC counts milliseconds in 31 bits"""


@dataclass(frozen=True)
class ServeConfig:
    """Serves a model over gRPC."""

    model: Path
    """A model folder: as `isthmus train` writes it, as Hugging Face publishes it, or a LoRA adapter's; or Org/Name,
    which the local Hugging Face cache has"""
    folder: Annotated[FolderOptions, tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction] = field(
        default_factory=FolderOptions
    )
    merge_adapter: bool = False
    """Add an adapter to the model's weights once, instead of computing it in every step"""
    quantize: Literal["none", "int8", "int6", "int5", "int4"] = "none"
    """Keep matrices as integers, made when they are loaded; `isthmus convert --quantize` also says what it costs"""
    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs --auth-token-file and --tls-cert, or --insecure"""
    port: int = 50051
    """0 takes a free one"""
    auth_token_file: Path | None = None
    """Every call but health must carry this file's content as `authorization: Bearer …`"""
    tls_cert: Path | None = None
    """Serve over TLS with this certificate, in PEM, followed by those that lead to its authority"""
    tls_key: Path | None = None
    """The certificate's private key, in PEM, without a passphrase"""
    insecure: bool = False
    """Listen beyond loopback without a token, or without TLS: whoever reaches the port may use it, and whoever is on
    the way may read all, the token too"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of weights, activations and KV cache; auto is bfloat16, and float32 on CPU"""
    kernels: str = "auto"
    """What computes: auto takes this machine's own kernels wherever they can run; reference takes none; the name of
    kernels, such as cpu, takes those, or ends where they can't run"""
    mesh: str = ""
    """Devices to split the model over, as tp=2; in ep=2,tp=2, ep splits the experts of a mixture; empty is one"""
    drain_seconds: float = 30.0
    """How long requests in flight may go on after SIGTERM; a second signal ends it at once"""
    stall_seconds: float = 60.0
    """Health says NOT_SERVING while a step of the engine takes longer; on a slow machine a big model's may"""
    keepalive_seconds: float = 30.0
    """A client that is silent for so long is asked whether it is there; without an answer in 10 s its requests end"""
    report_cached_tokens: bool = False
    """Tell how much of a prompt the prefix cache knew. It tells callers what others have asked: only for those who
    trust one another"""
    compilation_cache: Path | None = None
    """Where compiled programs are kept; default ~/.cache/isthmus/xla"""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def validate(self) -> None:
        """Raises ConfigError naming the field."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} must be 0 to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together: a certificate and its private key")
        self._check_reach()
        if not 0 <= self.drain_seconds < float("inf"):
            raise ConfigError(f"drain_seconds={self.drain_seconds} must be 0 or more")
        if self.mesh_shape.data > self.mesh_shape.ep:
            raise ConfigError(f"mesh={self.mesh}: dp and fsdp split a batch of training; serving has tp and ep")
        for name in ("stall_seconds", "keepalive_seconds"):
            if not 1 <= getattr(self, name) <= MAX_SECONDS:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 to {MAX_SECONDS}")

    @property
    def mesh_shape(self) -> MeshShape:
        """How many devices each kind of parallelism takes. Raises ConfigError."""
        return MeshShape.parse(self.mesh)

    def _check_reach(self) -> None:
        if _is_loopback(self.host) or self.insecure:
            return
        if self.auth_token_file is None:
            raise ConfigError(
                f"host={self.host} is not loopback: give --auth-token-file and --tls-cert, "
                "or --insecure if everyone there may use it"
            )
        if self.tls_cert is None:
            raise ConfigError(
                f"host={self.host} is not loopback, and without TLS the token travels in plain text: give --tls-cert "
                "and --tls-key, or --insecure if what is in front does TLS or everyone on the way may read it"
            )

    def read_tls(self) -> tuple[bytes, bytes] | None:
        """The private key and the certificate, None without TLS. Raises ConfigError when they can't be used."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        try:
            pair = self.tls_key.read_bytes(), self.tls_cert.read_bytes()
            # gRPC would say no more than that it can't listen.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, self.tls_key, _no_passphrase)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise ConfigError(
                f"tls_cert={self.tls_cert}, tls_key={self.tls_key} must be a certificate and its key in PEM: {error}"
            ) from None
        return pair

    def read_token(self) -> str | None:
        """The auth token. Raises ConfigError when the file can't be read or is empty."""
        if self.auth_token_file is None:
            return None
        try:
            return read_token(self.auth_token_file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"auth_token_file: {error}") from None


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase; `openssl pkey` writes it without")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
