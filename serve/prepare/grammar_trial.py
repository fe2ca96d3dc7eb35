"""Compiles a grammar in a process that the system ends when it takes too long, too much memory, or breaks: llguidance
can't be interrupted, and not everything that it does is counted against its limits. It takes the grammar from standard
input, and writes why it is refused, if it is. It is run by its path and imports nothing of the package.

    grammar_trial.py SECONDS BYTES STACK LIMITS     LIMITS: LLParserLimits' arguments, as JSON
"""

from __future__ import annotations

import json
import random
import resource
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

STEPS = 16
"""Bytes of a random text that are tried, because some grammars only then turn out to be too large"""


def main(seconds: int, memory: int, stack: int, limits: dict[str, Any]) -> None:
    grammar = sys.stdin.buffer.read().decode()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    threading.stack_size(stack)
    thread = threading.Thread(target=_try, args=(grammar, LLParserLimits(**limits)))
    thread.start()
    thread.join()


def _try(grammar: str, limits: LLParserLimits) -> None:
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits)
    dice = random.Random(0)
    for _ in range(STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = matcher.compute_logit_bias()
        matcher.consume_token(dice.choice([token for token, bias in enumerate(mask) if bias]))
    sys.stdout.write(matcher.get_error())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
