"""The settings of a server, from which its command line is generated."""

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
"""Most seconds for a setting that gRPC counts in milliseconds, in 31 bits"""


@dataclass(frozen=True)
class ServeConfig:
    """Serves a model over gRPC."""

    model: Path
    """A model folder, as `isthmus train` writes it or as Hugging Face publishes it; a LoRA adapter's folder; a GGUF
    file; or Org/Name from the local Hugging Face cache"""
    folder: Annotated[FolderOptions, tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction] = field(
        default_factory=FolderOptions
    )
    adapters: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=FOLDER")] = ()
    """LoRA adapters of the model, each as NAME=FOLDER: a request whose `model` is NAME is computed with it"""
    adapter_root: Path | None = None
    """Folder from whose subfolders clients may load adapters into the places that --engine.max-adapters makes, and
    unload them; without it nobody may. Whoever may call the server may do so"""
    merge_adapter: bool = False
    """If --model is an adapter, add it to the base model's weights once instead of computing it in every step"""
    quantize: Literal["none", "int8", "int6", "int5", "int4"] = "none"
    """Keep matrices as integers, quantized while loading; `isthmus convert --quantize` also measures what that costs"""
    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs --auth-token-file and --tls-cert, or --insecure"""
    port: int = 50051
    """Port to listen on; 0 takes a free one"""
    auth_token_file: Path | None = None
    """File with an auth token, which every call but health must carry as `authorization: Bearer TOKEN`"""
    tls_cert: Path | None = None
    """PEM file to serve TLS with: the certificate, followed by those that lead to its authority"""
    tls_key: Path | None = None
    """PEM file with the certificate's private key, without a passphrase"""
    insecure: bool = False
    """Listen beyond loopback without a token or without TLS: anyone who reaches the port can use the server, and anyone
    on the network between can read everything, including the token"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of weights, activations and KV cache; auto is bfloat16, and float32 on CPU"""
    kernels: str = "auto"
    """Kernels that compute the model: auto takes those for this machine wherever they can run; reference takes none; a
    name, such as cpu, takes those kernels, and is an error where they can't run. Single operations may differ, after
    commas, as in auto,linear=reference"""
    mesh: str = ""
    """Devices to split the model over, such as tp=2, or ep=2,tp=2, where ep splits a mixture's experts; empty is one"""
    drain_seconds: float = 30.0
    """Seconds that requests in flight may go on after SIGTERM; a second signal ends the server at once"""
    stall_seconds: float = 60.0
    """Health says NOT_SERVING once a step of the engine takes more seconds; give more to big models on slow machines"""
    keepalive_seconds: float = 30.0
    """Seconds of silence after which a client is pinged; if it doesn't answer in 10 s, its requests end"""
    report_cached_tokens: bool = False
    """Tell callers how much of a prompt the prefix cache held, and so what others have asked; only for callers who
    trust one another"""
    compilation_cache: Path | None = None
    """Folder in which compiled programs are kept; by default ~/.cache/isthmus/xla"""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def validate(self) -> None:
        """Raises ConfigError naming the field."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} must be 0 to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together: a certificate and its private key")
        self._check_reach()
        if self.adapter_root is not None and not self.engine.max_adapters:
            raise ConfigError("adapter_root: engine.max_adapters=0 makes no places for adapters to be loaded into")
        if not 0 <= self.drain_seconds < float("inf"):
            raise ConfigError(f"drain_seconds={self.drain_seconds} must be 0 or more")
        if self.mesh_shape.data > self.mesh_shape.ep:
            raise ConfigError(f"mesh={self.mesh}: dp and fsdp split a batch of training; serving has tp and ep")
        for name in ("stall_seconds", "keepalive_seconds"):
            if not 1 <= getattr(self, name) <= MAX_SECONDS:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 to {MAX_SECONDS}")

    @property
    def adapter_folders(self) -> dict[str, Path]:
        """The folders of `adapters` by their names. Raises ConfigError."""
        folders: dict[str, Path] = {}
        for each in self.adapters:
            name, equals, folder = each.partition("=")
            if not (name and equals and folder):
                raise ConfigError(f"adapters: {each!r} must be NAME=FOLDER")
            if name in folders:
                raise ConfigError(f"adapters: {name!r} is there twice")
            folders[name] = Path(folder)
        return folders

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
                "and --tls-key, or --insecure if a proxy in front does TLS or anyone on the way may read it"
            )

    def read_tls(self) -> tuple[bytes, bytes] | None:
        """The private key and the certificate, in PEM; None without TLS. Raises ConfigError if they can't be used."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        try:
            pair = self.tls_key.read_bytes(), self.tls_cert.read_bytes()
            # gRPC itself would only say that it can't listen.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, self.tls_key, _no_passphrase)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise ConfigError(
                f"tls_cert={self.tls_cert}, tls_key={self.tls_key} must be a certificate and its key in PEM: {error}"
            ) from None
        return pair

    def read_token(self) -> str | None:
        """The auth token; None without a file. Raises ConfigError if the file can't be read or doesn't hold one."""
        if self.auth_token_file is None:
            return None
        try:
            return read_token(self.auth_token_file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"auth_token_file: {error}") from None


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase; `openssl pkey` writes it without one")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
