"""The command line as a newcomer meets it: help that teaches, and mistakes that are named."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands.main import COMMANDS, main

ISTHMUS = Path(sys.executable).with_name("isthmus")
WITHOUT_ARGUMENTS = {"demo"}
"""Commands whose plain use needs no example."""


def test_the_installed_command_lists_every_command() -> None:
    """In a process of its own, as after `pip install`."""
    done = subprocess.run([ISTHMUS, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    for name, (_, text) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", done.stdout, re.MULTILINE)


def test_the_list_of_commands_is_quick() -> None:
    """Help must not import JAX first: it takes seconds."""
    code = "import sys; from commands.main import main; main(['--help']); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_client_needs_no_jax() -> None:
    """Other programs import it."""
    code = "import sys; import isthmus, isthmus.v1; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["False"], done.stderr


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_a_command_shows_how_it_is_used(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: isthmus {name}" in said
    if name not in WITHOUT_ARGUMENTS:
        assert "examples:" in said and re.search(rf"^\W*isthmus {name} (?!\[)", said, re.MULTILINE), "no example"


def test_without_a_command_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: isthmus COMMAND" in capsys.readouterr().out


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"isthmus {version('isthmus')}\n"


@pytest.mark.parametrize("name", ["tain", "../serve", "--port", ""])
def test_an_unknown_command_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    said = capsys.readouterr().err
    assert repr(name) in said and "usage: isthmus COMMAND" in said


@pytest.mark.parametrize("words", [["train", "text"], ["serve", "--model", "folder"], ["generate", "prompt"]])
def test_an_unknown_option_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "--no-such-option", "1"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "--no-such-option" in captured.err + captured.out


def test_train_without_data_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path / "out")]) == 2
    assert "data" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_serve_without_a_model_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "--model" in captured.err + captured.out


def test_generate_says_what_to_do_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--address", "127.0.0.1:1"]) == 1
    said = capsys.readouterr().err
    assert "127.0.0.1:1" in said and "isthmus serve" in said


def test_generate_from_a_folder_that_is_no_model_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_every_command_that_is_listed_exists() -> None:
    for module, _ in COMMANDS.values():
        assert callable(importlib.import_module(module).main)
