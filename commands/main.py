"""`isthmus COMMAND …`: finds the command's module, so that only what it needs is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from isthmus.model.process.signals import stop_at_once

COMMANDS = {
    "train": ("isthmus.commands.train", "train a transformer on text"),
    "serve": ("isthmus.commands.serve", "serve a model folder over gRPC"),
    "convert": (
        "isthmus.commands.convert",
        "convert a model folder from or to Hugging Face's layout",
    ),
    "generate": ("isthmus.commands.generate", "complete a prompt, on a running server or on a model folder"),
    "kernels": ("isthmus.commands.kernels", "compile the CPU's kernels ahead of time, or list them"),
    "check": (
        "isthmus.commands.check",
        "prove on this machine that a request gets the same bits whatever is around it",
    ),
    "bench": ("isthmus.commands.bench", "measure a step, a server or training against the hardware's limits"),
    "demo": ("isthmus.commands.demo", "train a small model on Python's own source, serve it and call it"),
}

MEANT = {
    "chat": "; isthmus generate --chat holds a conversation",
    "quality": "; isthmus bench quality measures what integers cost",
    "determinism": "; isthmus check determinism is meant",
}
"""What is said to words that are no commands, and are often taken for some"""


def near(word: str, names: Iterable[str]) -> str:
    """What is added to the message that there is no such name as `word`: the name that is most like it, if any is."""
    import difflib

    found = difflib.get_close_matches(word, names, 1)
    return f"; did you mean {found[0]}?" if found else ""


def usage() -> str:
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: isthmus COMMAND [options]", "", *lines, "", "isthmus COMMAND --help says more."])


def main(argv: list[str] | None = None) -> int:
    """Returns the process's exit status: 0 done, 1 failed, 2 asked for something that can't work, 130 interrupted.

    argv: the words after `isthmus`. None takes the process's own, and this process must then run nothing else.
    """
    if argv is None:
        stop_at_once()  # before anything else is imported

        from isthmus.model.process.command import run

        return run(lambda: main(sys.argv[1:]))
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"isthmus {version('isthmus')}")
        return 0
    if words[0] not in COMMANDS:
        said = f"there is no command {words[0]!r}{MEANT.get(words[0]) or near(words[0], COMMANDS)}"
        print(f"isthmus: {said}\n\n{usage()}", file=sys.stderr)
        return 2
    import importlib

    return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
