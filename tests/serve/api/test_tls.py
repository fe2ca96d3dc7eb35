"""TLS: nobody on the way reads the token or the text."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from isthmus.benchmarks.load import Target, run_load, server_facts
from isthmus.benchmarks.workload import PlannedRequest
from isthmus.client import Client
from isthmus.errors import ConfigError, Unavailable
from isthmus.serve.api.config import ServeConfig
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import ISTHMUS, PATIENCE, PROMPT, SERVING, ApiClient, RunningServer, check_health

TOKEN = "correct horse battery staple"


@dataclass(frozen=True)
class Pair:
    cert: Path
    key: Path


def self_signed(folder: Path, name: str = "server") -> Pair:
    """A certificate for the loopback that is its own authority."""
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*words, "-keyout", pair.key, "-out", pair.cert], check=True, capture_output=True, timeout=PATIENCE)
    return pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return self_signed(folder)


@pytest.fixture(scope="module")
def token_file(folder: Path) -> Path:
    path = folder / "token.txt"
    path.write_text(TOKEN)
    return path


@pytest.fixture(scope="module")
def encrypted(start_server: StartServer, pair: Pair, token_file: Path) -> RunningServer:
    """Beyond loopback, with a token."""
    return start_server(host="0.0.0.0", auth_token_file=token_file, tls_cert=pair.cert, tls_key=pair.key)


def test_a_client_that_trusts_the_server_talks_to_it(encrypted: RunningServer, pair: Pair) -> None:
    with ApiClient(encrypted.address, token=TOKEN, tls_ca=pair.cert) as client:
        assert check_health(client.channel) == SERVING
        assert client.generate(PROMPT, max_tokens=3, ignore_eos=True).token_ids


def _clients(encrypted: RunningServer, folder: Path) -> Iterator[ApiClient]:
    yield ApiClient(encrypted.address, token=TOKEN)
    yield ApiClient(encrypted.address, token=TOKEN, tls_ca=self_signed(folder, "another").cert)


def test_plain_text_and_an_unknown_authority_get_nothing(encrypted: RunningServer, folder: Path) -> None:
    for client in _clients(encrypted, folder):
        with client, pytest.raises(grpc.RpcError) as failure:
            client.generate(PROMPT, max_tokens=1, timeout=PATIENCE)
        assert failure.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_handshake_that_fails_says_what_to_change(encrypted: RunningServer, pair: Pair, folder: Path) -> None:
    """TLS libraries have words for it, of which none is an option."""
    other = self_signed(folder, "stranger").cert
    elsewhere = encrypted.address.replace("127.0.0.1", "127.0.0.2")
    for address, authority, said in (
        (encrypted.address, None, r"does it need tls_ca \(--tls-ca\)\?"),
        (encrypted.address, other, r"tls_ca \(--tls-ca\) isn't the authority"),
        (elsewhere, pair.cert, "certificate doesn't name this host"),
    ):
        with Client(address, token=TOKEN, tls_ca=authority) as client, pytest.raises(Unavailable, match=said):
            client.generate(PROMPT, max_tokens=1, timeout=PATIENCE)


def test_tls_to_a_server_without_it_says_so(server: RunningServer, pair: Pair) -> None:
    with Client(server.address, tls_ca=pair.cert) as client, pytest.raises(Unavailable, match="may not need tls_ca"):
        client.generate(PROMPT, max_tokens=1, timeout=PATIENCE)


def test_the_command_line_talks_tls(encrypted: RunningServer, pair: Pair, token_file: Path) -> None:
    words = [ISTHMUS, "generate", PROMPT, "--address", encrypted.address, "--max-tokens", "5"]
    words += ["--auth-token-file", token_file, "--tls-ca", pair.cert]
    done = subprocess.run(words, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT) and len(done.stdout) > len(PROMPT) + 1


def test_the_benchmark_talks_tls(encrypted: RunningServer, pair: Pair) -> None:
    """A server beyond loopback, which `isthmus bench serve --address` is for, has it."""
    target = Target(encrypted.address, TOKEN, str(pair.cert), timeout=PATIENCE)
    with Client(encrypted.address, token=TOKEN, tls_ca=pair.cert) as client:
        assert server_facts(client)["context_length"] == encrypted.engine.config.context_length
    answer = asyncio.run(run_load(target, [PlannedRequest(0.0, [5, 6, 7], 3, 1)]))
    assert [(outcome["error"], outcome["tokens"]) for outcome in answer["outcomes"]] == [(None, 3)]


def test_a_certificate_and_its_key_go_together(model_folder: Path, pair: Pair, folder: Path) -> None:
    """gRPC alone says no more than that it can't listen on the port."""
    other = self_signed(folder, "other")
    (folder / "empty.pem").write_text("")
    for fields, said in (
        ({"tls_cert": pair.cert}, "tls_key"),
        ({"tls_key": pair.key}, "tls_cert"),
        ({"tls_cert": pair.cert, "tls_key": other.key}, "mismatch"),
        ({"tls_cert": pair.key, "tls_key": pair.cert}, "tls_cert"),
        ({"tls_cert": folder / "empty.pem", "tls_key": pair.key}, "empty.pem"),
        ({"tls_cert": folder / "nowhere.pem", "tls_key": pair.key}, "nowhere.pem"),
    ):
        with pytest.raises(ConfigError, match=r"tls_(cert|key)") as error:
            config = ServeConfig(model=model_folder, **fields)
            config.validate()
            config.read_tls()
        assert said in str(error.value).lower()


def test_a_key_with_a_passphrase_is_refused_instead_of_asked_for(model_folder: Path, pair: Pair, folder: Path) -> None:
    """OpenSSL would ask at the terminal, and a service would hang."""
    locked = folder / "locked.key"
    words = ["openssl", "ec", "-aes128", "-passout", "pass:secret", "-in", pair.key, "-out", locked]
    subprocess.run(words, check=True, capture_output=True, timeout=PATIENCE)
    with pytest.raises(ConfigError, match="passphrase"):
        ServeConfig(model=model_folder, tls_cert=pair.cert, tls_key=locked).read_tls()


def test_what_others_asked_is_told_to_nobody(start_server: StartServer) -> None:
    """Whether a prompt was in the cache is whether somebody has sent it."""
    server = start_server(report_cached_tokens=False)
    with server.client() as client:
        for _ in range(2):
            answer = client.generate(PROMPT * 10, max_tokens=1)
            assert answer.cached_prompt_tokens == 0
        assert server.engine.load().counters.cached_prompt_tokens > 0, "the cache is used"
        server.engine.scheduler.counters.recalled_tokens = server.engine.scheduler.counters.accepted_recalled_tokens = 7
        load = client.load()
        assert load.cached_prompt_tokens == load.pages_cached == 0
        assert load.recalled_tokens == load.accepted_recalled_tokens == 0, "what earlier answers foretold, neither"


def test_credentials_are_given_once() -> None:
    with pytest.raises(ValueError, match="tls_ca"):
        ApiClient(credentials=grpc.ssl_channel_credentials(), tls_ca="ca.pem")


def test_a_file_that_is_no_certificate_is_said(tmp_path: Path) -> None:
    """Every call would end as UNAVAILABLE, as if the server were at fault."""
    (tmp_path / "key").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match=r"^tls_ca: .* is not a PEM file"):
        ApiClient(tls_ca=tmp_path / "key")
