"""`isthmus generate --chat`: turns read from standard input, answers printed as they come."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from isthmus.errors import RequestError

PROMPT = "> "


Answer = Generator[str, None, None]


def chat(complete: Callable[[Sequence[Mapping[str, str]]], Answer], first: str | None, system: str | None) -> None:
    """Talks until standard input ends. complete: the answer to a conversation; closing it ends the request.

    first: what is said before any line. system: what the conversation begins with, whenever it begins anew.

    At a terminal an answer that fails is reported and its turn forgotten; otherwise its error is raised.
    """
    interactive = sys.stdin.isatty()
    start: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    history = list(start)
    for line in _turns(first, interactive):
        if line == "/exit":
            return
        if line == "/reset":
            history = list(start)
            continue
        asked = [*history, {"role": "user", "content": line}]
        try:
            answer = _answer(complete(asked))
        except RequestError as error:
            if not interactive:
                raise
            print(error, file=sys.stderr)
        else:
            history = [*asked, {"role": "assistant", "content": answer}]


def _turns(first: str | None, interactive: bool) -> Iterator[str]:
    """What is said, without blank lines."""
    if first is not None:
        yield first
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then edits lines
    while True:
        try:
            line = input(PROMPT if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:  # meant for an answer that has just ended
            if not interactive:
                raise
            print()
            continue
        if line:
            yield line


def _answer(pieces: Answer) -> str:
    """Prints the pieces; Ctrl-C ends them, and what was printed is the answer."""
    said = []
    try:
        with contextlib.suppress(KeyboardInterrupt):
            for piece in pieces:
                said.append(piece)
                print(piece, end="", flush=True)
    except Exception:
        if said:  # what is said next begins a line
            print(flush=True)
        raise
    pieces.close()
    print(flush=True)
    return "".join(said)
