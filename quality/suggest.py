"""After the gate refused a quantized model: the coarsest rules that it would not refuse."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from isthmus.model.config import ModelConfig
from isthmus.model.weights.quantization import SCHEMES, formats
from isthmus.quality.compare import passes
from isthmus.quality.divergence import Quality

SAMPLE = 8
"""Windows that tell which kind of matrix loses most"""

Measure = Callable[[Sequence[str], int | None], Quality]
"""What rules cost over so many windows, or over all"""


def coarsest(config: ModelConfig, rules: Sequence[str]) -> int:
    """The fewest bits of the integers that rules make; 8 where they make none."""
    return min((each.bits for each in formats(config, rules).values()), default=8)


def suggestion(
    config: ModelConfig, refused: Sequence[str], measure: Measure, say: Callable[[str, Quality], None]
) -> tuple[str, Quality] | None:
    """What to give to --quantize instead of rules that were refused, and what it costs; say(rules, cost) of each that
    is tried. None: nothing that was tried passes."""
    for name in candidates(config, refused, measure):
        rules = rules_of(name)
        quality = measure(rules, None)
        say(name, quality)
        if passes(quality, coarsest(config, rules)):
            return name, quality
    return None


def rules_of(quantize: str) -> tuple[str, ...]:
    """Of the name of a scheme, or of rules joined by commas."""
    return SCHEMES.get(quantize) or tuple(rule.strip() for rule in quantize.split(","))


def candidates(config: ModelConfig, refused: Sequence[str], measure: Measure) -> Iterator[str]:
    """Other schemes of as many bits or more, fewest first; then int8 without the kind of matrix that loses most by it,
    the two, and so on."""
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
    """A pattern for each kind of matrix: those that have the same place in every layer."""
    return list(dict.fromkeys(re.sub(r"^blocks/\d+/", ".*/", path) for path in formats(config, SCHEMES["int8"])))
