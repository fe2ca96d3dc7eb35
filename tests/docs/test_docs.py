"""The README and docs/ are what a reader types. Every code block runs, on small models; what can't run parses."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tyro

from isthmus.commands.main import COMMANDS, main
from tests.docs.pages import (
    LANGUAGES,
    REPOSITORY,
    RUN,
    Block,
    blocks,
    isthmus_calls,
    make_targets,
    named_options,
    pages,
    relative_links,
)
from tests.docs.reader import copy_of, reader, write_files

MADE_BY_PAGE = {
    "README.md": ("runs",),
    "docs/training.md": ("runs",),
    "docs/fine-tuning.md": ("runs", "chats.jsonl"),
    "docs/many-devices.md": ("runs",),
}
"""What a reader of a page doesn't have when they begin, because the page makes it."""
QUICK = ("README.md",)
"""Pages that `make test` has time for."""
OF_OTHER_PROGRAMS = {"--http2-prior-knowledge", "--protocol", "--local-dir"}


def runs(block: Block) -> bool:
    return block.language in RUN and not block.not_run


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks(page)]


COMMAND_TYPES = {
    "convert": "ConvertConfig",
    "demo": "DemoConfig",
    "generate": "GenerateConfig",
    "kernels": "Command",
    "serve": "ServeConfig",
    "train": "TrainConfig",
}
"""What the command line of isthmus.commands.NAME is made from. Each of bench's subcommands has a type of its own."""


def command_type(name: str, *rest: str) -> tuple[Any, list[str]]:
    """What the command line of `isthmus NAME …` is made from, and the arguments that it parses."""
    module = importlib.import_module(f"isthmus.commands.{name}")
    if name == "bench":
        return module.NAMED[rest[0]], list(rest[1:])
    if name == "check":
        assert rest[0] == module.CHECK
        return module.Determinism, list(rest[1:])
    return getattr(module, COMMAND_TYPES[name]), list(rest)


def help_of(*words: str) -> str:
    """What `isthmus WORDS --help` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        main([*words, "--help"])
    return said.getvalue()


def options_of(*words: str) -> set[str]:
    """The long options of a command and of its subcommands."""
    said = help_of(*words)
    first_columns = [re.split(r" {2,}", line)[0] for line in re.findall(r"^[│ ]+(-.*)", said, re.MULTILINE)]
    mine = set(re.findall(r"--[a-z][\w.-]*", " ".join(first_columns)))
    subcommands = re.match(r"usage: isthmus \w+ \[-h\] \{([\w,-]+)\}", said)
    return mine.union(*(options_of(*words, name) for name in subcommands[1].split(","))) if subcommands else mine


@pytest.fixture(scope="session")
def known_options() -> set[str]:
    """The long options of all commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")  # so narrow, options stand in one column
        return set().union(*(options_of(name) for name in COMMANDS))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    write_files(folder)
    return folder


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page in QUICK else [pytest.mark.slow])
        for page in pages()
        if any(map(runs, blocks(page)))
    ],
)
def test_a_page_does_what_it_says(page: str, files: Path, tmp_path: Path) -> None:
    """A reader who types a page from its first block to its last must meet no error."""
    (tmp_path / "programs").mkdir()
    folder = copy_of(files, tmp_path / "reader", MADE_BY_PAGE.get(page, ()))
    with reader(folder, tmp_path / "programs") as one:
        for block in filter(runs, blocks(page)):
            one.run(block)


@pytest.mark.parametrize("block", [block for block in all_blocks() if block.language in ("sh", "dockerfile")], ids=str)
def test_commands_have_options_that_exist(block: Block) -> None:
    """A renamed flag must be renamed in the pages, too; also where a block isn't run, or is run by the slow tests."""
    for words in isthmus_calls(block.code):
        made_from, arguments = command_type(*words)
        tyro.cli(made_from, args=arguments, prog=f"isthmus {words[0]}")


def test_make_targets_exist() -> None:
    """The first thing that a newcomer types is make."""
    known = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for block in all_blocks():
        if block.language == "sh":
            assert set(make_targets(block.code)) <= set(known), block


@pytest.mark.parametrize("page", pages())
def test_options_named_in_the_text_exist(page: str, known_options: set[str]) -> None:
    """A page that tells of an option which is gone sends its reader to an error."""
    assert named_options(page) - known_options - OF_OTHER_PROGRAMS == set()


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_files(page: str) -> None:
    """A reader follows them."""
    for target in relative_links(page):
        assert ((REPOSITORY / page).parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", pages())
def test_blocks_are_of_a_language_that_is_checked(page: str) -> None:
    """A block of another language would be run by nobody."""
    for block in blocks(page):
        assert block.language in LANGUAGES, block
        if block.language == "json":
            json.loads(block.code)
