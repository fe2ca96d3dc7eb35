"""What lies under a file's name in a stranger's folder can't hang, fill memory or end in a traceback; and what is
written appears whole."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.errors import ConfigError
from isthmus.model.process.files import appearing, read_bytes, read_json, replace_file
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.huggingface.files import INDEX, SINGLE, TensorFiles
from tests.model.weights.huggingface.folders import write_folder

READ = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    INDEX,
    SINGLE,
)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # a socket's address has room for 107 bytes
        server.bind(path.name)


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)  # without a byte on the disk


def nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "blobs" / "gone")


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a named pipe": (pipe, "is a named pipe, not a file"),
    "a folder": (Path.mkdir, "is a folder, not a file"),
    "a device": (endless, "is a device, not a file"),
    "a socket": (bound_socket, "is a socket, not a file"),
    "a pointer": (pointer, "is a Git LFS pointer .*git lfs pull"),
    "a dangling link": (nowhere, "is a link to .*blobs/gone, which does not exist"),
    "3 GB": (huge, "has more than .* MiB"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READ)
def test_only_files_of_a_sane_size_are_read(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe waits for ever, /dev/zero never ends, and a pointer is what a clone without git-lfs leaves behind."""
    monkeypatch.chdir(tmp_path)
    put, message = KINDS[kind]
    folder = write_folder(tmp_path / "model", "llama3")
    if name == "special_tokens_map.json":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    if name == INDEX:
        (folder / SINGLE).unlink()  # which goes before it
    (folder / name).unlink(missing_ok=True)
    put(folder / name)
    if (name, kind) == (SINGLE, "3 GB"):
        message = "is not a whole safetensors file"  # which may be of any size, and is mapped
    with pytest.raises(ConfigError, match=message) as error:
        open_folder(folder)
        TensorFiles(folder)
    assert name in str(error.value)


def test_what_json_brings_can_be_printed(tmp_path: Path) -> None:
    """Half a surrogate pair is JSON and no text: printing it in an error is a second error, a traceback."""
    path = tmp_path / "some.json"
    path.write_text('{"name": "\\ud83d\\ude00"}')
    assert read_json(path) == {"name": "\U0001f600"}
    for half in ('{"name": "\\ud83d"}', '{"\\uDE00": 1}', '{"a": [{"b": "x\\ud800x"}]}'):
        path.write_text(half)
        with pytest.raises(ConfigError, match=r"some\.json can't be read as JSON"):
            read_json(path)


def test_a_limit_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1024)
    assert read_bytes(path, 1024) == b"x" * 1024
    with pytest.raises(ConfigError, match="has more than"):
        read_bytes(path, 1023)


def test_two_that_write_to_one_name_do_not_mix(tmp_path: Path) -> None:
    """One writes into its own folder whatever the other does, and the later one is told; a folder of somebody else's
    stays as it was, whatever it is called."""
    (tmp_path / "new.partial").mkdir()
    with contextlib.ExitStack() as other:
        with appearing(tmp_path / "new") as first:
            second = other.enter_context(appearing(tmp_path / "new"))
            first.mkdir()
            second.mkdir()
            (first / "a").touch()
            (second / "b").touch()
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
        with pytest.raises(ConfigError, match="made by somebody else"):
            other.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.partial"]


def test_a_file_has_the_mode_of_any_new_one(tmp_path: Path) -> None:
    """safetensors makes files that only their owner may read; a server of another user, or in a container, must be able
    to read a model that was exported."""

    def private(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)

    (tmp_path / "plain").touch()
    for _ in range(2):  # also where it replaces one
        replace_file(tmp_path / "written", private)
        assert (tmp_path / "written").stat().st_mode == (tmp_path / "plain").stat().st_mode
