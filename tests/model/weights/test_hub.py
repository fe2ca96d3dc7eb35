"""Naming a model: a folder, a name in the local Hugging Face cache, or neither, which is then said."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import tyro
from jax.sharding import Mesh
from safetensors.numpy import save_file

from isthmus.commands.generate import GenerateConfig
from isthmus.errors import ConfigError
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.hub import FolderOptions, is_hub_name
from isthmus.quality.convert import ConvertConfig
from isthmus.serve.api.config import ServeConfig
from tests.model.process.test_files import KINDS
from tests.model.weights.huggingface.folders import write_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "hub"
    root.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tries to reach it here fails, and is not slow."""

    def connect(*_: Any) -> None:
        raise AssertionError("the network")

    monkeypatch.setattr(socket.socket, "connect", connect)


def put(root: Path, name: str, family: str) -> Path:
    """A model as the cache keeps it: a folder of links to blobs, named by the commit that refs/main holds."""
    repository = root / f"models--{name.replace('/', '--')}"
    made = write_folder(root / "made", family)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for file in made.iterdir():
        blob = repository / "blobs" / hashlib.sha1(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    made.rmdir()
    return snapshot


def adapter(folder: Path, base: str | None, **fields: Any) -> Path:
    """A LoRA adapter of llama3's first query projection."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 40)).astype(np.float32), rng.standard_normal((48, 4)).astype(np.float32)
    tensors = {f"{QUERY}.lora_A.weight": a, f"{QUERY}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    return folder


def test_a_name_in_the_cache_is_a_folder(cache: Path) -> None:
    snapshot = put(cache, "Org/Name-1.5B", "llama3")
    folder = open_folder(Path("Org/Name-1.5B"))
    assert folder.path.resolve() == snapshot.resolve() and folder.config.layers == 5
    assert folder.name == "Name-1.5B"  # and not that of a commit
    write_folder(Path("Org/Name-1.5B"), "qwen2")  # a folder of that name is meant first
    assert open_folder(Path("Org/Name-1.5B")).config.attention_bias


def test_a_name_that_is_nowhere_says_where_it_was_looked_for(cache: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Org/Other: .*the Hugging Face cache \(.*hub\) doesn't have it; download=True"
    ):
        open_folder(Path("Org/Other"))
    Path("runs/mine").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"runs/mien: there is no such folder or GGUF file.*; runs holds mine, and download=True"
    ):
        open_folder(Path("runs/mien"))
    for name in ("nowhere", "a/b/c", "../a/b", "Org/..", "x" * 5000, "a\0b/c"):
        with pytest.raises(ConfigError, match="there is no such folder or GGUF file"):
            open_folder(Path(name))


def test_a_repository_of_gguf_files_says_which_to_name(cache: Path) -> None:
    """It has no config.json, and which of its files is meant isn't clear."""
    snapshot = cache / "models--Org--Name-GGUF" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "name-q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"Org/Name-GGUF: .*holds GGUF files of it: name one, as .*name-q8_0\.gguf"):
        open_folder(Path("Org/Name-GGUF"))


NAMES = ("Org/Name", "meta-llama/Llama-3.2-1B", "a/b.c_d-e")
NO_NAMES = ("Org", "./Org/Name", "Org/Name/x", "../Name", "Org/..", "Org/a--b", "/Name", "", "Org/", "a\0b/c")


def test_what_a_name_looks_like() -> None:
    """Nothing else is put into the name of a folder in the cache."""
    assert all(map(is_hub_name, NAMES)) and not any(map(is_hub_name, NO_NAMES))


def test_an_adapter_of_a_name_finds_its_base_in_the_cache(cache: Path, mesh: Mesh) -> None:
    """PEFT writes down the name that the model was loaded by."""
    folder = adapter(Path("adapter"), "Org/Name")
    with pytest.raises(ConfigError, match=r"base_model_name_or_path='Org/Name' isn't here.*--base FOLDER\) says where"):
        open_folder(folder)
    put(cache, "Org/Name", "llama3")
    opened = open_folder(folder)
    assert opened.adapter == folder and opened.config.lora.rank == 4
    elsewhere = write_folder(Path("elsewhere"), "llama3", rms_norm_eps=0.25)
    for base in ("elsewhere", None, "Org/Name", "no/such/folder"):
        opened = open_folder(adapter(folder, base), FolderOptions(base=elsewhere))
        assert opened.path == elsewhere and opened.config.norm_eps == 0.25
    assert open_folder(adapter(folder, "elsewhere")).path == elsewhere  # from where the command runs
    write_folder(folder / "elsewhere", "llama3", rms_norm_eps=0.5)
    assert open_folder(folder).config.norm_eps == 0.5  # beside the adapter


def test_an_adapter_of_a_revision_is_not_laid_over_another(cache: Path) -> None:
    """The base model's maker may have published another since; PEFT says which one an adapter was trained on."""
    main, other = put(cache, "Org/Name", "llama3"), "f" * 40
    for revision in (other, "v1"):
        with pytest.raises(ConfigError, match=f"Org/Name at revision {revision}: there is no such folder.*--base"):
            open_folder(adapter(Path("adapter"), "Org/Name", revision=revision))
    older = shutil.copytree(main, main.parent / other)
    (cache / "models--Org--Name" / "refs" / "v1").write_text(other)
    for revision in (other, "v1"):
        assert open_folder(adapter(Path("adapter"), "Org/Name", revision=revision)).path == older
    for revision in ("main", "", None):
        assert open_folder(adapter(Path("adapter"), "Org/Name", revision=revision)).path == main
    for revision in (7, "../../other", "/tmp"):
        with pytest.raises(ConfigError, match=r"revision=.* must name a branch"):
            open_folder(adapter(Path("adapter"), "Org/Name", revision=revision))


def test_a_base_that_is_none(cache: Path) -> None:
    folder = adapter(Path("adapter"), None)
    plain = write_folder(Path("plain"), "llama3")
    with pytest.raises(ConfigError, match="plain is no adapter"):
        open_folder(plain, FolderOptions(base=plain))
    with pytest.raises(ConfigError, match="other is an adapter itself"):
        open_folder(folder, FolderOptions(base=adapter(Path("other"), None)))
    with pytest.raises(ConfigError, match="nowhere: there is no such folder"):
        open_folder(folder, FolderOptions(base=Path("nowhere")))
    with pytest.raises(ConfigError, match=r"base_model_name_or_path=None must name .*--base FOLDER"):
        open_folder(folder)


def test_a_folder_that_is_both(cache: Path, mesh: Mesh) -> None:
    """transformers adapts the model that lies beside the adapter; taking it for the bare model was another model."""
    both = write_folder(Path("both"), "llama3")
    bare = open_folder(both).load_params(mesh)
    adapter(both, "Org/Name")
    folder = open_folder(both)
    assert (folder.path, folder.adapter, folder.config.lora.rank) == (both, both, 4)
    assert len(folder.warnings) == 1 and "an adapter beside the model" in folder.warnings[0]
    merged = folder.load_params(mesh, merge_adapter=True)
    tensors = adapter_product(both)
    kernel = np.asarray(bare["blocks/0/attention/query/kernel"])
    got = np.asarray(merged["blocks/0/attention/query/kernel"])
    np.testing.assert_allclose(got, kernel + tensors.reshape(kernel.shape), rtol=1e-5, atol=1e-5)
    # Only what PEFT copies beside an adapter: the model is where the adapter says.
    (both / "model.safetensors").unlink()
    put(cache, "Org/Name", "llama3")
    assert open_folder(both).path.name == COMMIT


def adapter_product(folder: Path) -> np.ndarray:
    """alpha / r * (B A)^T: [inputs, outputs]."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    return 2 * (tensors[f"{QUERY}.lora_B.weight"] @ tensors[f"{QUERY}.lora_A.weight"]).T


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "3 GB"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapters_files_are_files(name: str, kind: str, cache: Path) -> None:
    make, message = KINDS[kind]
    base = write_folder(Path("base"), "llama3")
    folder = adapter(cache.parent / "adapter", str(base.resolve()))
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(ConfigError, match=message):
        open_folder(folder)


def gguf(path: Path) -> Path:
    (path / "model-q4.gguf").write_bytes(b"GGUF\3\0\0\0")
    return path / "model-q4.gguf"


def only_gguf(path: Path) -> Path:
    gguf(path)
    return path


def two_gguf(path: Path) -> Path:
    gguf(path).rename(path / "model-q8.gguf")
    return only_gguf(path)


def one_file(path: Path) -> Path:
    return write_folder(path / "m", "llama3") / "model.safetensors"


def root_of_the_cache(path: Path) -> Path:
    put(path / "hub", "Org/Name", "llama3")
    return path / "hub"


def home_of_the_cache(path: Path) -> Path:
    return root_of_the_cache(path).parent


def one_model_of_the_cache(path: Path) -> Path:
    return root_of_the_cache(path) / "models--Org--Name"


def empty(path: Path) -> Path:
    (path / "empty").mkdir()
    return path / "empty"


def dangling(path: Path) -> Path:
    (path / "link").symlink_to(path / "gone")
    return path / "link"


NOT_FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "GGUF": (gguf, r"model-q4\.gguf: its header goes on beyond its end: it is cut short, or damaged"),
    "a folder of GGUF": (only_gguf, r"model-q4\.gguf: its header goes on beyond its end"),
    "a folder of GGUFs": (two_gguf, r"holds several GGUF files: name one of them, as .*/model-q4\.gguf"),
    "a file": (one_file, r"model\.safetensors is a file; name the folder that it is in, .*/m"),
    "a cache": (root_of_the_cache, "is a Hugging Face cache, of several models: name one of them, as Org/Name"),
    "a cache's home": (home_of_the_cache, "is a Hugging Face cache"),
    "a cache's model": (one_model_of_the_cache, "of Org/Name: name the model Org/Name, or a folder in .*snapshots"),
    "an empty folder": (empty, r"has no config\.json and no adapter_config\.json: is it a model or an adapter"),
    "a dangling link": (dangling, "is a link that leads nowhere"),
}


@pytest.mark.parametrize("kind", NOT_FOLDERS)
def test_what_is_no_model_folder_is_called_what_it_is(kind: str, cache: Path, tmp_path: Path) -> None:
    """The commonest mistakes, each of which ended in "Not a directory" or "config.json does not exist"."""
    make, message = NOT_FOLDERS[kind]
    with pytest.raises(ConfigError, match=message):
        open_folder(make(tmp_path))


# Fetching


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that has llama3 as Org/Name, and the paths that it was asked for."""
    folder = write_folder(tmp_path / "published", "llama3")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            path, _, _ = self.path.partition("?")
            file = folder / path.rpartition("/")[2]
            headers, status = {"X-Repo-Commit": COMMIT}, 200
            names = sorted(each.name for each in folder.iterdir())
            if path == "/api/models/Org/Name/revision/main":
                data = json.dumps(
                    {"id": "Org/Name", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
                ).encode()
            elif path.startswith("/api/models/Org/Name/tree/"):
                listed = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": n} for n in names]
                data = json.dumps(listed).encode()
            elif path.startswith("/Org/Name/resolve/") and file.is_file():
                data = file.read_bytes()
                headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            else:
                data, status = b"{}", 404
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


FIND = """
import sys
from pathlib import Path
from isthmus.errors import ConfigError
from isthmus.model.weights.hub import find_folder
for word in sys.argv[1:]:
    name, download, _ = word.partition("+")
    try:
        folder = find_folder(Path(name), download=bool(download))
        print(*sorted(file.name for file in folder.iterdir()), flush=True)
    except ConfigError as error:
        print("refused:", error, flush=True)
"""


def find(address: str, home: Path, *words: str) -> list[str]:
    """A line a name: what its folder holds. A name that ends in + may be downloaded."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", FIND, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.splitlines()


def test_only_download_reaches_the_network(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """Who names a model that isn't here must not find that a server reached out for it unasked; and a pickle is never
    fetched."""
    address, asked = hub
    (line,) = find(address, tmp_path / "home", "Org/Name")
    assert "download=True (--download) fetches it" in line and str(tmp_path / "home") in line and not asked
    fetched, missing = find(address, tmp_path / "home", "Org/Name+", "Org/Other+")
    assert fetched == "config.json model.safetensors tokenizer.json"
    assert missing.startswith("refused: Org/Other can't be downloaded: ")
    assert asked and not any(path.endswith(".bin") for path in asked)
    asked.clear()
    assert find(address, tmp_path / "home", "Org/Name") == [fetched] and not asked


@pytest.mark.parametrize("config", [ServeConfig, ConvertConfig, GenerateConfig])
def test_every_command_that_opens_a_folder_says_how(config: type) -> None:
    words = ["--base", "there", "--ignore-field", "a", "--ignore-field", "b", "--download"]
    model = ["in", "out"] if config is ConvertConfig else ["--model", "in"]
    read = tyro.cli(config, args=[*model, *words])
    assert read.folder == FolderOptions(Path("there"), ("a", "b"), True)
