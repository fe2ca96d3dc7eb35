"""Looks for the coarsest rules that the gate would accept, after it has refused a quantized model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from isthmus.model.config import ModelConfig
from isthmus.model.weights.quantization import SCHEMES, formats
from isthmus.quality.compare import passes
from isthmus.quality.divergence import Quality

SAMPLE = 8
"""Number of windows on which each kind of matrix is tried, to find out which loses most"""

Measure = Callable[[Sequence[str], int | None], Quality]
"""Measures the quality of rules over a number of windows; None means over all"""


def coarsest(config: ModelConfig, rules: Sequence[str]) -> int:
    """The fewest bits of the integers that the rules make; 8 if they make none."""
    return min((each.bits for each in formats(config, rules).values()), default=8)


def suggestion(
    config: ModelConfig, refused: Sequence[str], measure: Measure, say: Callable[[str, Quality], None]
) -> tuple[str, Quality] | None:
    """What to give to --quantize instead of the refused rules, and its quality; None if nothing that was tried passes.
    say(quantize, quality) is called for each that is tried."""
    for name in candidates(config, refused, measure):
        rules = rules_of(name)
        quality = measure(rules, None)
        say(name, quality)
        if passes(quality, coarsest(config, rules)):
            return name, quality
    return None


def rules_of(quantize: str) -> tuple[str, ...]:
    """The rules that `quantize` means, which is the name of a scheme, or rules joined by commas."""
    return SCHEMES.get(quantize) or tuple(rule.strip() for rule in quantize.split(","))


def candidates(config: ModelConfig, refused: Sequence[str], measure: Measure) -> Iterator[str]:
    """Other schemes with as many bits or more, those with the fewest first. Then int8 without the kind of matrix that
    loses most by it, without the two kinds that lose most, and so on."""
    schemes = [(coarsest(config, rules), name) for name, rules in SCHEMES.items() if rules and rules != tuple(refused)]
    yield from (name for bits, name in sorted(schemes) if bits >= coarsest(config, refused))
    every = kinds(config)
    if len(every) < 2:
        return
    alone = {kind: measure((f"{kind}=int8",), SAMPLE).kl for kind in every}
    worst = sorted(every, key=lambda kind: -alone[kind])
    for count in range(1, len(worst)):
        yield f"{'|'.join(worst[:count])}=none,.*=int8"


def kinds(config: ModelConfig) -> list[str]:
    """A pattern for each kind of matrix; matrices with the same place in their layers are of one kind."""
    return list(dict.fromkeys(re.sub(r"^blocks/\d+/", ".*/", path) for path in formats(config, SCHEMES["int8"])))
