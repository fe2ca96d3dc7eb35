"""The same models as the server's tests have, opened here, and a server beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus import LLM
from tests.serve.api.conftest import cache_folder, chat_server, model_folder, server, start_server, tokenizer
from tests.serve.api.harness import ENGINE, compilation_cache_in

__all__ = ["cache_folder", "chat_server", "model_folder", "server", "start_server", "tokenizer"]

OpenModel = Callable[..., LLM]


@pytest.fixture(scope="session")
def open_model(model_folder: Path, cache_folder: Path) -> OpenModel:
    """open_model(path=the varied model, **options of LLM) -> LLM"""

    def open_model(path: Path = model_folder, **options: Any) -> LLM:
        with compilation_cache_in(cache_folder):
            return LLM(path, **{"engine": ENGINE, "progress": False, **options})

    return open_model


@pytest.fixture(scope="session")
def llm(open_model: OpenModel) -> Iterator[LLM]:
    """That most tests share."""
    with open_model() as llm:
        yield llm
