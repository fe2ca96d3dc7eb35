"""Adapters by name, from the library and over a server: one model, several voices, in one batch."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isthmus import LLM, AsyncClient, Client, ConfigError, Model, ModelNotFound
from isthmus.commands.main import main
from isthmus.model.config import LoraConfig
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.huggingface.adapters import save_adapter
from isthmus.model.weights.lora import split
from tests.library.conftest import OpenModel
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import NETWORK, PROMPT, RunningServer
from tests.support import random_params

LORAS = {"poems": LoraConfig(4, 8.0), "code": LoraConfig(2, 4.0, "attention/(query|value)")}
VARIED = "varied"
"""The base model's name"""


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of random numbers."""
    made: dict[str, Path] = {}
    for seed, (name, lora) in enumerate(LORAS.items(), 1):
        config = dataclasses.replace(NETWORK, lora=lora)
        _, adapter = split(config, random_params(config, build_mesh(MeshShape()), seed))
        made[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapter(made[name], open_folder(model_folder), config, adapter)
    return made


@pytest.fixture(scope="module")
def adapted(open_model: OpenModel, folders: dict[str, Path]) -> Iterator[LLM]:
    with open_model(adapters=folders) as llm:
        yield llm


@pytest.fixture(scope="module")
def adapted_server(start_server: StartServer, folders: dict[str, Path]) -> RunningServer:
    return start_server(adapters=tuple(f"{name}={folder}" for name, folder in folders.items()))


@pytest.fixture(params=["LLM", "Client"])
def model(request: pytest.FixtureRequest, adapted: LLM) -> Iterator[Model]:
    if request.param == "LLM":
        yield adapted
        return
    with Client(request.getfixturevalue("adapted_server").address) as client:
        yield client


def text(model: Model, name: str, prompt: str = PROMPT) -> str:
    return model.generate(prompt, model=name, max_tokens=20, temperature=0).text


def test_an_adapter_says_what_its_folder_says(model: Model, llm: LLM, open_model: OpenModel, folders: dict) -> None:
    """And a question without one what the model says."""
    for name, folder in folders.items():
        with open_model(folder) as alone:
            assert text(model, name) == text(alone, name) != text(llm, "")
    assert text(model, "") == text(model, VARIED) == text(llm, "")


def test_the_shell_asks_for_one_by_its_name(adapted_server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", PROMPT, "--address", adapted_server.address, "--max-tokens", "20", "--temperature", "0"]
    with Client(adapted_server.address) as client:
        for name in ("", *LORAS):
            assert main([*words, "--adapter", name]) == 0
            assert capsys.readouterr().out == f"{PROMPT}{text(client, name)}\n"
    assert main([*words, "--adapter", "nobody"]) == 2
    assert "'nobody' is not here" in capsys.readouterr().err


def test_many_at_once_get_their_own(model: Model) -> None:
    """Whoever asks for one adapter must not hear another one's, however full the server is."""
    names = ["poems", "", "code", VARIED]
    prompts = [f"# {index}\n{PROMPT}" for index in range(6)]
    alone = {name: [text(model, name, prompt) for prompt in prompts] for name in names}
    with ThreadPoolExecutor(len(names)) as threads:
        asked = [threads.submit(model.generate, prompts, model=name, max_tokens=20, temperature=0) for name in names]
        together = [each.result() for each in asked]
    assert [[each.text for each in some] for some in together] == [alone[name] for name in names]


def test_streams_of_all_adapters_run_beside_each_other(adapted_server: RunningServer) -> None:
    names = ["poems", "", "code"] * 3
    compiled = adapted_server.engine.executor.recompilations

    async def ask() -> list[str]:
        async with AsyncClient(adapted_server.address) as client:
            asked = [client.generate(PROMPT, model=name, max_tokens=20, temperature=0) for name in names]
            return [each.text for each in await asyncio.gather(*asked)]

    with Client(adapted_server.address) as client:
        alone = {name: text(client, name) for name in names}
    assert asyncio.run(ask()) == [alone[name] for name in names]
    assert len(set(alone.values())) == 3
    assert adapted_server.engine.executor.recompilations == compiled


def test_scores_and_embeddings_are_the_adapters(model: Model) -> None:
    """What isn't generated is computed with it, too."""
    scores = [model.score(PROMPT, ["x"], model=name)[0].logprob for name in ("", *LORAS)]
    vectors = [tuple(model.embed(PROMPT, model=name).values) for name in ("", *LORAS)]
    assert len(set(scores)) == len(set(vectors)) == 3


def test_another_adapters_prefix_is_not_read(model: Model) -> None:
    prompt = PROMPT * 8
    for name in ("poems", "code", ""):
        first, second = (
            model.generate(prompt, model=name, max_tokens=4, temperature=0, cache_salt="prefixes") for _ in range(2)
        )
        assert first.cached_prompt_tokens == 0 < second.cached_prompt_tokens
        assert first.text == second.text


def test_an_unknown_name_is_refused(model: Model) -> None:
    """A typing error must not be answered by another model; what there is, is said."""
    with pytest.raises(ModelNotFound, match="'poem' is not here; this is 'varied' with the adapters 'poems', 'code'"):
        model.generate(PROMPT, model="poem")


def test_wrong_settings_are_refused(open_model: OpenModel, start_server: StartServer, folders: dict) -> None:
    with pytest.raises(ConfigError, match=r"adapters: poems=.* has no config"):
        open_model(adapters={"poems": folders["poems"].parent})
    for given, match in (("poems", "must be NAME=FOLDER"), ("=folder", "must be NAME=FOLDER"), ("a=", "NAME=FOLDER")):
        with pytest.raises(ConfigError, match=match):
            start_server(adapters=(given,))
    with pytest.raises(ConfigError, match="'a' is there twice"):
        start_server(adapters=("a=x", "a=y"))
