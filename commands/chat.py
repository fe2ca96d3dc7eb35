"""`isthmus generate --chat`: reads turns from standard input and prints answers as they come."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from isthmus.errors import RequestError

PROMPT = "> "


Answer = Generator[str, None, None]


def chat(complete: Callable[[Sequence[Mapping[str, str]]], Answer], first: str | None, system: str | None) -> None:
    """Holds a conversation until standard input ends or a line is /exit.

    complete: streams the answer to a conversation; closing its generator ends the request. first: the first message,
    sent before any line is read. system: the system message with which the conversation begins, also after /reset.

    At a terminal, an error is printed and the turn that failed is forgotten; otherwise the error is raised.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        print("Ctrl-D or /exit ends, /reset starts anew, Ctrl-C stops an answer.", file=sys.stderr)
    start: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    history = list(start)
    for line in _turns(first, interactive):
        if line == "/exit":
            return
        if line == "/reset":
            history = list(start)
            continue
        if interactive and re.fullmatch(r"/[a-z]+", line):
            print(f"{line} is no command: /exit ends, /reset starts anew", file=sys.stderr)
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
    """Yields what the user says: `first`, then each line of standard input that isn't blank."""
    if first is not None:
        yield first
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() line editing
    while True:
        try:
            line = input(PROMPT if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:  # Ctrl-C was meant for an answer that has just ended
            if not interactive:
                raise
            print()
            continue
        if line:
            yield line


def _answer(pieces: Answer) -> str:
    """Prints the pieces and returns them as one text. Ctrl-C ends the answer at what was printed until then."""
    said = []
    try:
        with contextlib.suppress(KeyboardInterrupt):
            for piece in pieces:
                said.append(piece)
                print(piece, end="", flush=True)
    except Exception:
        if said:  # the error message begins on a new line
            print(flush=True)
        raise
    pieces.close()
    print(flush=True)
    return "".join(said)
