"""Folders of compiled programs: what lies there is run, so nobody else may have put it there; one can do without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import pytest

from isthmus.commands.main import main
from isthmus.errors import ConfigError
from isthmus.model.device.compilation import enable_compilation_cache
from isthmus.model.ops.cpu import library
from isthmus.model.process.cache_folder import CacheError, open_cache
from tests.serve.api.harness import PATIENCE

ROOT = Path(library.__file__).parents[4]


def make_file(path: Path) -> None:
    path.write_text("a file")


def make_dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nothing")


def make_shared(path: Path, mode: int = 0o777) -> None:
    path.mkdir()
    path.chmod(mode)


def make_foreign(path: Path) -> None:
    path.mkdir()
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    os.chown(path, 12345, 12345)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (make_file, "is not a folder"),
    "in a file": (lambda path: make_file(path.parent), "can't be made"),
    "leads nowhere": (make_dangling, "can't be made"),
    "everybody's": (make_shared, "mode 0777"),
    "a group's": (lambda path: make_shared(path, 0o770), "chmod go-w"),
    "a sticky one": (lambda path: make_shared(path, 0o1777), "others can write"),
    "another user's": (make_foreign, "uid 12345"),
}


@pytest.fixture(params=REFUSED)
def refused(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder that programs must not be read from, and a part of the reason."""
    make, said = REFUSED[request.param]
    path = tmp_path / "above" / "programs"
    if request.param != "in a file":
        path.parent.mkdir()
    make(path)
    return path, said


def state(path: Path) -> tuple[int, ...]:
    """What must not change of it."""
    found = path.lstat()
    return found.st_mode, found.st_uid, found.st_gid, found.st_ino


def test_a_folder_of_others_is_refused_and_left_as_it_is(refused: tuple[Path, str]) -> None:
    """Its mode was set to 0700: naming a shared folder locked everybody else out of it."""
    path, said = refused
    existing = path if os.path.lexists(path) else path.parent
    before = state(existing)
    with pytest.raises(CacheError, match=said):
        open_cache(path)
    assert state(existing) == before


def test_a_new_folder_is_the_users_alone(tmp_path: Path) -> None:
    assert open_cache(tmp_path / "a" / "b") is None
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o711])
def test_a_folder_that_others_can_not_write_to_is_taken(tmp_path: Path, mode: int) -> None:
    make_shared(tmp_path / "programs", mode)
    before = state(tmp_path / "programs")
    assert open_cache(tmp_path / "programs") is None
    assert state(tmp_path / "programs") == before


# Whole commands

CALL = """
import os, sys
os.umask(0o022)
import jax
from isthmus.model.device.compilation import compilations, enable_compilation_cache
from pathlib import Path
print(enable_compilation_cache(*map(Path, sys.argv[1:])))
print(jax.jit(lambda x: x + 1)(1))
"""


def call(*arguments: object, **environment: str | None) -> list[str]:
    """Compiles a program with a cache that is named, or the user's; what that printed."""
    merged = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", CALL, *map(str, arguments)],
        cwd=ROOT,
        env={name: value for name, value in merged.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    return done.stdout.splitlines()


def test_programs_are_kept(tmp_path: Path) -> None:
    assert call(HOME=str(tmp_path)) == ["None", "2"]
    assert list((tmp_path / ".cache/isthmus/xla").iterdir())


def test_a_program_that_was_cut_short_is_compiled_again(tmp_path: Path) -> None:
    """By a crash, or a disk that was full: JAX must neither run the half of it nor complain each time."""
    folder = tmp_path / "programs"
    assert call(folder) == ["None", "2"]
    for path in folder.iterdir():
        os.truncate(path, path.stat().st_size // 2)
    assert call(folder) == ["None", "2"]


@pytest.mark.parametrize("home", ["refused", "a file", "no folder"])
def test_without_a_home_to_keep_them_in_programs_are_compiled_all_the_same(tmp_path: Path, home: str) -> None:
    """A container runs as any user, with a home that isn't there: that costs time, and is said."""
    if home == "refused":
        (tmp_path / ".cache/isthmus").mkdir(parents=True)
        make_shared(tmp_path / ".cache/isthmus/xla")
    elif home == "a file":
        (tmp_path / ".cache").touch()
    said, value = call(HOME="/dev/null" if home == "no folder" else str(tmp_path))
    assert value == "2" and "not kept for the next start" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_user_whom_the_system_does_not_know_has_no_home() -> None:
    """docker run --user 54321: no HOME, and no line in /etc/passwd to take one from."""
    code = """
import os
from isthmus.model.process.cache_folder import CacheError, user_cache
os.environ.pop("HOME", None)
os.setuid(54321)
try:
    user_cache("xla")
except CacheError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert "set HOME" in done.stdout, done.stderr


def test_a_named_folder_that_can_not_be_used_is_an_error(refused: tuple[Path, str]) -> None:
    """Whoever names one relies on it."""
    path, said = refused
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(ConfigError, match=f"compilation_cache: .*{said}"):
        enable_compilation_cache(path)
    assert jax.config.jax_compilation_cache_dir == before


def test_a_server_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["serve", "--model", "m", "--compilation-cache", str(tmp_path / "file")]) == 2
    assert "is not a folder" in capsys.readouterr().out


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    return disk


def test_disks_that_are_full_or_read_only_cost_only_time(small_disk: Path) -> None:
    """Mounted like a container's root; and filled up by others while a server compiles."""
    try:
        assert call(small_disk / "programs") == ["None", "2"]
        kept = {path.name for path in (small_disk / "programs").iterdir()}
        (small_disk / "ballast").write_bytes(bytes(100))
        with suppress(OSError), (small_disk / "ballast").open("ab", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
        said, value = call(small_disk / "programs")
        assert value == "2" and "No space left" in said and "not kept" in said
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        said, value = call(small_disk / "programs")
        assert value == "2" and "Read-only" in said
        assert {path.name for path in (small_disk / "programs").iterdir()} == kept
    finally:
        subprocess.run(["umount", "-l", str(small_disk)], check=True)


def test_kernels_of_others_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library in a folder that anybody can write to is anybody's code."""
    folder = tmp_path / ".cache/isthmus/kernels"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(library, "shared_folder", lambda: tmp_path / "shared")
    name = f"{library._native_name()}-{library._source_key()}.so"
    (folder / name).touch()
    assert [found.path.name for found in library.find()] == [name]
    folder.chmod(0o777)
    assert library.find() == []
    with pytest.raises(library.KernelError, match="others can write"):
        library.build(folder)
    assert folder.stat().st_mode & 0o777 == 0o777


def test_shared_kernels_can_be_read_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built into an image by root, they are for whoever runs there."""
    if library.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(library, "shared_folder", lambda: tmp_path / "share" / "kernels")
    monkeypatch.setattr(library, "_compile", lambda compiler, target, flags, work: _touch(work / "kernels.so"))
    made = library.build(library.shared_folder())
    assert made.path.stat().st_mode & 0o444 == 0o444
    assert made.path.parent.stat().st_mode & 0o777 == 0o755


def _touch(path: Path) -> Path:
    path.touch()
    return path
