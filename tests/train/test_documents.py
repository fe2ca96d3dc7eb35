"""What is read of what a user points at: by what a file is, however it was named; and what isn't read is said."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from isthmus.errors import ConfigError
from isthmus.train import documents
from isthmus.train.documents import read_documents
from isthmus.train.files import Reading


def read(*paths: Path, reading: Reading | None = None) -> dict[str, str]:
    found = list(read_documents([str(path) for path in paths], reading))
    assert len({document.name for document in found}) == len(found)
    return {document.name: document.text for document in found}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


LINES = b'{"text": "one\\ntwo", "id": 3}\n\n{"text": ""}\n{"text": "drei \xc3\xbc"}\n'
ARRAY = b'[{"text": "one\\ntwo"}, {"text": "drei \xc3\xbc"}]'
CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
TEXTS = ["one\ntwo", "drei ü"]

FILES: dict[str, tuple[bytes, list[str]]] = {
    "a.txt": (b"plain", ["plain"]),
    "noext": (b"plain", ["plain"]),
    "code.py": (b"x = {}\n", ["x = {}\n"]),
    "bom.txt": (b"\xef\xbb\xbfplain", ["plain"]),
    "wide.txt": ("größer 😀".encode("utf-16"), ["größer 😀"]),
    "wide-be.txt": (b"\xfe\xff" + "größer".encode("utf-16-be"), ["größer"]),
    "packed.txt.gz": (gzip.compress(b"plain"), ["plain"]),
    "packed-bom.md.GZ": (gzip.compress(b"\xef\xbb\xbfplain"), ["plain"]),
    "c.jsonl": (LINES, TEXTS),
    "C.JSONL": (LINES, TEXTS),
    "c.ndjson": (LINES, TEXTS),
    "c.jsonl.gz": (gzip.compress(LINES), TEXTS),
    "bom.jsonl": (b"\xef\xbb\xbf" + LINES, TEXTS),
    "joined.jsonl": (LINES + b"\xef\xbb\xbf" + b'{"text": "last"}', [*TEXTS, "last"]),
    "crlf.jsonl": (LINES.replace(b"\n", b"\r\n"), TEXTS),
    "wide.jsonl": (LINES.decode().encode("utf-16"), TEXTS),
    "array.json": (ARRAY, TEXTS),
    "Array.JSON": (b"\xef\xbb\xbf" + ARRAY, TEXTS),
    "array.json.gz": (gzip.compress(ARRAY), TEXTS),
    "one.json": (b'{\n  "text": "plain"\n}\n', ["plain"]),
    "lines.json": (LINES, TEXTS),
    "chat.json": (json.dumps([CHAT, CHAT]).encode(), [json.dumps(CHAT)] * 2),
    "two.dots.v1.jsonl": (LINES, TEXTS),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_the_same_documents_named_or_found(name: str, tmp_path: Path) -> None:
    """Found in a folder, a .jsonl was learnt as raw JSON; with a byte order mark it was refused."""
    data, want = FILES[name]
    folder = write(tmp_path / "corpus", {f"sub/{name}": data})
    for paths in ([folder / "sub" / name], [folder], [folder / "sub"]):
        reading = Reading()
        assert list(read(*paths, reading=reading).values()) == want
        assert (reading.files, reading.skipped) == (1, {})


OTHERS: dict[str, tuple[bytes, str, str]] = {
    # name: content, the reason in a folder, what is said where it was named
    "empty.txt": (b"", "empty", "empty"),
    "bom.txt": (b"\xef\xbb\xbf", "empty", "empty"),
    "empty.jsonl": (b"\n\n", "empty", "empty"),
    "empty.json": (b"[]", "empty", "empty"),
    "image.png": (b"\x89PNG\0\0", "binary", "binary"),
    "wide-no-bom.txt": ("plain".encode("utf-16-le"), "binary", "binary"),
    "utf32.txt": ("plain".encode("utf-32"), "binary", "binary"),
    "latin.txt": (b"caf\xe9", "not UTF-8 text", "not UTF-8 text"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', "no documents", r"latin\.jsonl:1 is not a UTF-8 JSON object"),
    "image.jsonl": (b"\x89PNG\0\0", "no documents", r"image\.jsonl:1 is not a UTF-8 JSON object"),
    "package.json": (b'{"name": "x"}', "no documents", r'package\.json is not an object with a string in "text"'),
    "broken.json": (b'{"text": ', "not JSON", "not JSON: Expecting value"),
    "deep.json": (b"[" * 200_000, "not JSON", "not JSON"),
    "numbers.json": (b"[1, 2]", "no documents", r"numbers\.json\[0\] is not an object"),
    "other.jsonl": (b'{"body": 1}\n{"body": 2}\n', "no documents", r"other\.jsonl:1 is not an object"),
    "tar.gz": (gzip.compress(b"a\0b"), "binary", "binary"),
    "cut.txt.gz": (gzip.compress(os.urandom(1000))[:-20], "damaged", "damaged: its compressed data"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-9], "damaged", "damaged: its compressed data"),
    "no.jsonl.gz": (LINES, "damaged", "damaged: its compressed data"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_without_documents_is_said_in_a_folder_and_refused_where_named(name: str, tmp_path: Path) -> None:
    """What was named must be read or refused; what was left out of a folder must be seen to be."""
    data, reason, refusal = OTHERS[name]
    folder, reading = write(tmp_path / "corpus", {name: data, "a.txt": b"first"}), Reading()
    assert list(read(folder, reading=reading).values()) == ["first"]
    ((given, names),) = reading.skipped.items()
    assert given.startswith(reason) and names == [f"corpus/{name}"] and reading.files == 1
    with pytest.raises(ConfigError, match=refusal) as error:
        read(folder / name)
    assert str(folder / name) in str(error.value)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with what folders have in them."""
    files: dict[str, bytes] = {
        "a.txt": b"first",
        "sub/b.md": "zweitens, größer".encode(),
        "sub/deep/c": b"third",
        "empty.txt": b"",
        "image.png": b"\x89PNG\0\0",
        "latin.txt": b"caf\xe9",
        ".git/config": b"hidden",
        ".env": b"hidden",
        "sub/.cache": b"hidden",
        "node_modules/x.js": b"not ours",
        "large.txt": b"x" * 40,
        "large.bin": b"\0" * 40,
        "large.txt.gz": gzip.compress(b"x" * 40),
        "large.jsonl": b'{"text": "a line"}\n' * 4,
    }
    root = write(tmp_path / "corpus", files)
    (root / "link.txt").symlink_to(root / "a.txt")
    (root / "round").symlink_to(root)
    os.mkfifo(root / "pipe")
    return root


def test_a_folder_says_all_that_it_left_out(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte that was skipped without a word is missed after the training."""
    monkeypatch.setattr(documents, "MAX_TEXT_BYTES", 30)
    reading, found = Reading(), {}
    for document in read_documents([str(corpus)], reading):
        found[document.name] = document.text
    lines = {f"corpus/large.jsonl:{line}": "a line" for line in range(1, 5)}
    texts = {"corpus/a.txt": "first", "corpus/sub/b.md": "zweitens, größer", "corpus/sub/deep/c": "third"}
    assert found == texts | lines and list(found) == sorted(found)
    assert {reason: sorted(names) for reason, names in reading.skipped.items()} == {
        "hidden": ["corpus/.env", "corpus/.git", "corpus/sub/.cache"],
        "linked": ["corpus/link.txt", "corpus/round"],
        "packages or caches": ["corpus/node_modules"],
        "no regular file": ["corpus/pipe"],
        "empty": ["corpus/empty.txt"],
        "binary": ["corpus/image.png", "corpus/large.bin"],
        "not UTF-8 text": ["corpus/latin.txt"],
        "larger than 0 MiB: name it on its own": ["corpus/large.txt", "corpus/large.txt.gz"],
    }
    assert read(corpus / "large.txt") == {str(corpus / "large.txt"): "x" * 40}
    assert str(reading).startswith(
        "4 files read, 13 entries skipped: 2 binary (corpus/image.png, corpus/large.bin), 1 empty ("
    )
    assert "3 hidden (" in str(reading) and ", …)" in str(reading)


def test_one_is_not_many() -> None:
    reading = Reading(files=1)
    assert str(reading) == "1 file read"
    reading.skip("a.png", "binary")
    assert str(reading) == "1 file read, 1 entry skipped: 1 binary (a.png)"


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    """A name in Latin-1, from an old archive, must not end the run."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / os.fsdecode(b"caf\xe9.txt")).write_text("first")
    assert read(tmp_path / "corpus") == {"corpus/caf\\udce9.txt": "first"}


@pytest.mark.parametrize("line", [0, 1, 999])
@pytest.mark.parametrize(
    "wrong",
    [
        *("{", "[1]", '"text"', '{"body": 1}', '{"text": 3}', '{"text": null}', "7", r'{"text": "\ud800"}'),
        *('{"messages": []}', '{"messages": "hi"}', '{"messages": ["hi"]}', '{"messages": [{"content": "hi"}]}'),
        *('{"messages": [{"role": "user"}]}', '{"messages": [{"role": "user", "content": 3}]}'),
        r'{"messages": [{"role": "user", "content": "\udc00"}]}',
        '{"text": "a", "messages": [{"role": "user", "content": "hi"}]}',
    ],
)
def test_a_wrong_line_is_named(wrong: str, line: int, tmp_path: Path) -> None:
    """In a file of a million lines the number is the message; what comes after documents is refused in folders too."""
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "fine"}\n' * line + wrong + "\n")
    for paths in [path], [tmp_path]:
        if line or paths == [path]:
            with pytest.raises(ConfigError, match=rf"c\.jsonl:{line + 1} "):
                read(*paths)


def vanishing(paths: Iterable[Path]) -> list[Path]:
    """The second of the files is deleted between being listed and being read."""
    found = sorted(paths)
    found[1].unlink()
    return found


def test_a_file_that_vanishes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders change while they are read."""
    folder, reading = write(tmp_path / "corpus", {"a": b"1", "b": b"2", "c.jsonl": LINES}), Reading()
    inner = documents.files_in
    monkeypatch.setattr(documents, "files_in", lambda *arguments: vanishing(inner(*arguments)))
    assert list(read(folder, reading=reading).values()) == ["1", *TEXTS]
    assert reading.skipped == {"unreadable: No such file or directory": ["corpus/b"]}


UNREADABLE = Path("/proc/self/mem")


@pytest.mark.skipif(not UNREADABLE.is_file(), reason="no file that can't be read")
def test_a_file_that_cannot_be_read_is_named() -> None:
    """One that even root can't read, on a disk that fails or in /proc: no traceback."""
    with pytest.raises(ConfigError, match="/proc/self/mem: unreadable: Input/output error"):
        read(UNREADABLE)


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.txt", "does not exist"), ("absent.jsonl", "does not exist"), ("pipe", "neither a file nor a folder")],
)
def test_a_path_that_is_no_file_is_named(name: str, message: str, tmp_path: Path) -> None:
    """A path that was named must be read or refused, never skipped; a pipe would be waited for, and empty on resume."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path / name)
    assert name in str(error.value)
