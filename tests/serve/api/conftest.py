"""One tokenizer, one network, three sets of parameters, and a server that most tests share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.model.text.tokenizer import END_OF_TEXT, Tokenizer
from isthmus.serve.api.config import ServeConfig
from tests.serve.api.harness import (
    CHAT_TEMPLATE,
    ENGINE,
    ApiClient,
    RunningServer,
    idle,
    save_model,
    train_tokenizer,
    varied_params,
    wait_for,
)

StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Compiled programs, for all servers of all test processes."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "programs"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A model that writes varied nonsense."""
    return save_model(tmp_path_factory.mktemp("models") / "varied", tokenizer, varied_params())


@pytest.fixture(scope="session")
def start_server(model_folder: Path, cache_folder: Path) -> Iterator[StartServer]:
    """start_server(load=True, **fields of ServeConfig) -> RunningServer; stopped at the end of the session."""
    started: list[RunningServer] = []

    def start(*, load: bool = True, **fields: Any) -> RunningServer:
        common = {"model": model_folder, "port": 0, "engine": ENGINE, "drain_seconds": 0.0}
        config = ServeConfig(**{**common, "report_cached_tokens": True, **fields})
        started.append(RunningServer(config, cache_folder, load=load))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server: StartServer) -> RunningServer:
    return start_server()


@pytest.fixture(scope="session")
def chat_server(
    start_server: StartServer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> RunningServer:
    folder = save_model(tmp_path_factory.mktemp("models") / "chat", tokenizer, varied_params())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": END_OF_TEXT}}))
    return start_server(model=folder)


@pytest.fixture
def client(server: RunningServer) -> Iterator[ApiClient]:
    """Of the shared server, idle when the test begins and, unless the test broke something, soon after it ends."""
    with server.client() as client:
        wait_for(lambda: idle(client), "an idle server before the test")
        yield client
