"""Adapters that are loaded and unloaded while a model runs, the same from a model here and over a server."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isthmus import (
    LLM,
    AdapterInfo,
    AsyncClient,
    Client,
    ConfigError,
    FailedPrecondition,
    InvalidRequest,
    Model,
    ModelNotFound,
)
from tests.library.conftest import OpenModel
from tests.library.test_adapters import folders
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import ENGINE, PROMPT, RunningServer

__all__ = ["folders"]

ROOMY = dataclasses.replace(ENGINE, max_adapters=2, adapter_rank=4, max_sequences=2, draft_rows=2, max_waiting=30)


@pytest.fixture(scope="module")
def root(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters' folders."""
    root = tmp_path_factory.mktemp("root")
    for name, folder in folders.items():
        shutil.copytree(folder, root / name)
    return root


@pytest.fixture(scope="module")
def roomy(open_model: OpenModel) -> Iterator[LLM]:
    with open_model(engine=ROOMY) as llm:
        yield llm


@pytest.fixture(scope="module")
def roomy_server(start_server: StartServer, root: Path) -> RunningServer:
    return start_server(engine=ROOMY, adapter_root=root)


@dataclasses.dataclass
class Subject:
    model: Model
    where: Callable[[str], str]
    """What its path is of an adapter in the root"""


@pytest.fixture(params=["LLM", "Client"])
def subject(request: pytest.FixtureRequest, root: Path) -> Iterator[Subject]:
    """Without adapters, before and after."""
    if request.param == "LLM":
        llm = request.getfixturevalue("roomy")
        yield Subject(llm, lambda name: str(root / name))
        clear(llm)
        return
    with Client(request.getfixturevalue("roomy_server").address) as client:
        yield Subject(client, lambda name: name)
        clear(client)


def clear(model: Model) -> None:
    for info in model.list_adapters():
        if not info.unloading:
            model.unload_adapter(info.name)


def text(model: Model, name: str) -> str:
    return model.generate(PROMPT, model=name, max_tokens=20, temperature=0).text


def test_an_adapter_comes_and_goes(subject: Subject, open_model: OpenModel, folders: dict[str, Path]) -> None:
    """Whoever adds a customer's adapter must not restart the model for all others."""
    model, plain = subject.model, text(subject.model, "")
    assert model.list_adapters() == []
    with open_model(engine=ROOMY, adapters=folders) as given:
        want = {name: text(given, name) for name in folders}
        known = given.list_adapters()
    loaded = [model.load_adapter(name, subject.where(name)) for name in folders]
    assert loaded == known == model.list_adapters()
    first = AdapterInfo("code", 2, ("attention/query", "attention/value"), loaded[1].key, 0)
    assert loaded[1] == first and len(first.key) == 64
    assert {name: text(model, name) for name in folders} == want and plain not in want.values()
    assert model.load_adapter("poems", subject.where("poems")) == loaded[0], "it may be repeated"
    with pytest.raises(FailedPrecondition, match=r"engine\.max_adapters"):
        model.load_adapter("more", subject.where("poems"))
    assert model.unload_adapter("code") == dataclasses.replace(first, unloading=True)
    with pytest.raises(ModelNotFound, match="'code' is not here; this is 'varied' with the adapters 'poems'"):
        text(model, "code")
    with pytest.raises(ModelNotFound, match="no adapter 'code' is loaded") as unknown:
        model.unload_adapter("code")
    assert unknown.value.field == "name"
    model.load_adapter("more", subject.where("code"))
    assert text(model, "more") == want["code"] and text(model, "") == plain


def test_asyncio_has_the_same_calls(roomy: LLM, roomy_server: RunningServer, root: Path) -> None:
    async def play() -> list[list[object]]:
        async with AsyncClient(roomy_server.address) as client:
            return [
                [
                    await model.list_adapters(),
                    await model.load_adapter("poems", path),
                    (await model.generate(PROMPT, model="poems", max_tokens=8, temperature=0)).text,
                    await model.list_adapters(),
                    await model.unload_adapter("poems"),
                    await model.list_adapters(),
                ]
                for model, path in ((roomy.aio, root / "poems"), (client, "poems"))
            ]

    here, there = asyncio.run(play())
    assert here == there and here[0] == [] == here[-1]


def test_a_stream_in_flight_goes_on_to_its_end(subject: Subject) -> None:
    """Unloading an adapter must not cut the answers that people are reading."""
    model = subject.model
    model.load_adapter("poems", subject.where("poems"))
    whole = text(model, "poems")
    stream = model.stream(PROMPT, model="poems", max_tokens=20, temperature=0)
    said = next(stream).text
    model.unload_adapter("poems")
    assert said + "".join(delta.text for delta in stream) == whole


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", "a\0", "varied"])
def test_names_that_could_mislead_are_refused(subject: Subject, name: str) -> None:
    """In logs and lists, or in place of the model itself."""
    with pytest.raises(InvalidRequest) as refused:
        subject.model.load_adapter(name, subject.where("poems"))
    assert refused.value.field == "name" and subject.model.list_adapters() == []


def test_a_folder_that_holds_no_adapter_changes_nothing(subject: Subject, root: Path) -> None:
    """A damaged upload must be told from a missing one, and end nothing."""
    model = subject.model
    cut = shutil.copytree(root / "poems", root / "cut", dirs_exist_ok=True) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    (root / "nothing").mkdir(exist_ok=True)
    for path, kind in (("cut", InvalidRequest), ("nothing", InvalidRequest), ("absent", ModelNotFound), ("", None)):
        with pytest.raises(kind or InvalidRequest) as refused:
            model.load_adapter("poems", subject.where(path) if path else "")
        assert refused.value.field == "path" and (kind is None or type(refused.value) is kind)
    assert model.list_adapters() == []
    with pytest.raises(InvalidRequest, match="path: must be a path, not int"):
        model.load_adapter("poems", 3)  # type: ignore[arg-type]


def test_no_path_leads_out_of_the_root(roomy_server: RunningServer, root: Path, tmp_path: Path) -> None:
    """Whoever may call the server must not read, or find out, what else is on its disk."""
    outside = shutil.copytree(root / "poems", tmp_path / "outside")
    (root / "link").symlink_to(outside)
    (root / "circle").symlink_to(root / "circle")
    linked = shutil.copytree(root / "poems", root / "linked")
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    pipe = shutil.copytree(root / "poems", root / "pipe")
    (pipe / "adapter_config.json").unlink()
    os.mkfifo(pipe / "adapter_config.json")
    (root / "inner").symlink_to(root / "poems")
    with Client(roomy_server.address) as client:
        for path in (
            str(root / "poems"),
            "/etc",
            "../root",
            "poems/..",
            "poems/../poems",
            ".",
            "./",
            "a\0b",
            "x" * 5000,
        ):
            with pytest.raises(InvalidRequest) as refused:
                client.load_adapter("poems", path)
            assert refused.value.field == "path", path
        for path in ("link", "circle", "poems/adapter_config.json", "link/nothing", "x" * 300):
            with pytest.raises(ModelNotFound, match="there is no folder"):
                client.load_adapter("poems", path)
        for path in ("linked", "pipe"):
            with pytest.raises(InvalidRequest, match="no links out of the root"):
                client.load_adapter("poems", path)
        assert client.list_adapters() == []
        (root / "empty").mkdir()
        with pytest.raises(InvalidRequest) as refused:
            client.load_adapter("poems", "empty")
        assert str(root) not in str(refused.value)
        assert client.load_adapter("poems", "inner").name == "poems"
        client.unload_adapter("poems")


def test_without_a_root_nobody_may(server: RunningServer) -> None:
    """An operator who has not asked for it must not have to think of it."""
    with Client(server.address) as client:
        assert client.list_adapters() == []
        for call in (lambda: client.load_adapter("poems", "poems"), lambda: client.unload_adapter("poems")):
            with pytest.raises(FailedPrecondition, match="--adapter-root"):
                call()
        info = client.server_info()
        assert (info.max_adapters, info.adapter_rank) == (0, 0)


def test_a_model_without_places_says_what_makes_some(llm: LLM, root: Path, roomy_server: RunningServer) -> None:
    with pytest.raises(FailedPrecondition, match=r"engine\.max_adapters makes some"):
        llm.load_adapter("poems", root / "poems")
    with Client(roomy_server.address) as client:
        info = client.server_info()
        assert (info.max_adapters, info.adapter_rank) == (2, 4)


def test_wrong_settings_are_refused(start_server: StartServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter_root: engine\.max_adapters=0 makes no places"):
        start_server(adapter_root=tmp_path)
    with pytest.raises(ConfigError, match=r"adapter_root=.*absent must be a folder"):
        start_server(adapter_root=tmp_path / "absent", engine=ROOMY)
