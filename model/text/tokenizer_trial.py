"""`python model/text/tokenizer_trial.py FILE SECONDS`: encodes texts for which a bad regular expression takes for ever.

The patterns come as a JSON list on standard input. Exits with GAVE_UP if the library gives up on a text or takes
quadratic time. A signal ends it if it takes too long or too much memory. Imports nothing of this project.
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
"""Limit for the address space, in bytes"""
GAVE_UP = 3
SHORT, LONG = 1 << 10, 12 << 10
"""Characters of the texts: exponential and cubic time show in short ones, quadratic time in long ones"""
SLOW = 0.03
"""Seconds above which a long text may take quadratic time; ordinary patterns take a tenth of this"""
_USUAL = "aA1 \n\t.'é漢"


def characters(patterns: Iterable[str]) -> list[str]:
    """Some characters that any text has, and those that the patterns name; at most 24."""
    return list(dict.fromkeys(_USUAL + "".join(patterns)))[:24]


def runs(some: list[str]) -> Iterator[str]:
    """Runs of one character and of two in turn, each with and without an end that doesn't match them."""
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
    except Exception:  # the caller reads the file again, and says what is wrong with it
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
    """Sets a limit, but not above the one that the process has already."""
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
