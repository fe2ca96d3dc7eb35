"""`python model/text/tokenizer_trial.py FILE SECONDS`: encodes texts that a bad regular expression takes for ever over.

The patterns come as a JSON list on standard input. Exits with GAVE_UP where the library gives up on a text, or takes
quadratic time, and is ended by a signal when it takes too long or too much memory. Imports nothing of this project.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

MEMORY = 8 << 30
"""Bytes of address space"""
GAVE_UP = 3
SHORT, LONG = 1 << 10, 12 << 10
"""Characters: what takes exponential or cubic time shows in the short ones, quadratic time in the long ones"""
SLOW = 0.03
"""Seconds for a long text; others take a tenth"""
_USUAL = "aA1 \n\t.'é漢"


def characters(patterns: Iterable[str]) -> list[str]:
    """Some that any text has, and those that the patterns name."""
    return list(dict.fromkeys(_USUAL + "".join(patterns)))[:24]


def runs(some: list[str]) -> Iterator[str]:
    """Of one character and of two in turn, with an end that doesn't go with them."""
    for end in ("", "\0!"):
        yield from (text * SHORT + end for text in some)
        yield from ("".join(pair) * (SHORT // 4) + end for pair in itertools.permutations(some, 2))


def is_quadratic(tokenizer: Tokenizer, character: str) -> bool:
    """Whether four times the text takes much more than four times as long."""

    def seconds(length: int) -> float:
        began = time.process_time()
        tokenizer.encode(character * length + "\0!")
        return time.process_time() - began

    return all((long := seconds(LONG)) > SLOW and long > 9 * seconds(LONG // 4) for _ in range(2))


def main(path: str, seconds: str) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_AS, MEMORY)
    patterns = json.load(sys.stdin)
    _allow(60)  # reading the file already normalizes its added tokens
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception:  # the caller reads it again, and says what is wrong with it
        return 0
    tokenizer.no_truncation()
    tokenizer.no_padding()
    used = resource.getrusage(resource.RUSAGE_SELF)
    _allow(int(used.ru_utime + used.ru_stime) + 1 + int(seconds))
    some = characters(patterns)
    try:
        if any(is_quadratic(tokenizer, character) for character in some):
            return GAVE_UP
        for text in runs(some):
            tokenizer.encode(text)
        return 0
    except BaseException:  # the library panics where its regular expressions give up
        return GAVE_UP


def _allow(seconds: int) -> None:
    _limit(resource.RLIMIT_CPU, seconds)


def _limit(what: int, most: int) -> None:
    """Within what the process was allowed already."""
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
