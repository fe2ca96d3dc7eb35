"""What the README and docs/ hold: code blocks, the commands in them, and the options that their text names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
RUN = ("sh", "python")
"""Languages of blocks that run. Of the others, text is what a command printed and json is checked to be JSON."""
LANGUAGES = (*RUN, "text", "json", "dockerfile")

_FENCE = re.compile(r"^```(\w*)$")
_NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")
_END_OF_COMMAND = re.compile(r"^([|&;<>]|\d>)")


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: str
    """Its file's path in the repository"""
    line: int
    """The number of its first line of code"""
    language: str
    code: str
    not_run: str
    """Why no test runs it; empty where one does"""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """The pages for users and contributors, as paths in the repository."""
    return [
        "README.md",
        "CONTRIBUTING.md",
        *sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md")),
    ]


def blocks(page: str) -> list[Block]:
    """The code blocks of a page, in order."""
    found: list[Block] = []
    lines = (REPOSITORY / page).read_text().splitlines()
    start = 0
    while (opening := _next_fence(lines, start)) is not None:
        closing = lines.index("```", opening + 1)
        language = _FENCE.fullmatch(lines[opening])
        reason = _NOT_RUN.fullmatch(lines[opening - 1]) if opening else None
        assert language is not None
        code = "\n".join(lines[opening + 1 : closing])
        found.append(Block(page, opening + 2, language[1], code, reason[1] if reason else ""))
        start = closing + 1
    return found


def _next_fence(lines: list[str], start: int) -> int | None:
    return next((at for at in range(start, len(lines)) if lines[at].startswith("```")), None)


def statements(code: str) -> list[str]:
    """The lines of a shell block, each with those that continue it; without blank lines and those of comments only."""
    joined = re.sub(r"\\\n\s*", "", code)
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def isthmus_calls(code: str) -> Iterator[list[str]]:
    """The arguments of each `isthmus …` in a shell block or a Dockerfile."""
    for statement in statements(code):
        words = shlex.split(statement, comments=True)
        for at, word in enumerate(words):
            if word == "isthmus":
                yield _to_end_of_command(words[at + 1 :])


def make_targets(code: str) -> Iterator[str]:
    """The targets that a shell block has make build."""
    for statement in statements(code):
        words = shlex.split(statement, comments=True)
        if "make" in words[:1]:
            yield from (word for word in words[1:] if "=" not in word and not word.startswith("-"))


def _to_end_of_command(words: list[str]) -> list[str]:
    end = next((at for at, word in enumerate(words) if _END_OF_COMMAND.match(word)), len(words))
    return words[:end]


def named_options(page: str) -> set[str]:
    """The long options that are named in a page, outside of its blocks."""
    text = re.sub(r"^```.*?^```$", "", (REPOSITORY / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    inline = " ".join(re.findall(r"`([^`\n]+)`", text))
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[\w]", inline))


def relative_links(page: str) -> set[str]:
    """The targets of links to files of the repository, without what follows a #."""
    targets = re.findall(r"\]\(([^)\s]+)\)", (REPOSITORY / page).read_text())
    return {target.partition("#")[0] for target in targets if "://" not in target} - {""}
