"""A comparison that was measured in pieces: each piece is one run with both sides in it, and no ratio crosses two runs.

A piece holds `rates`, tokens a second by cell, stack and repetition: {"decode8": {"llama-q8_0": [...]}}.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isthmus.benchmarks.record import Record
from isthmus.benchmarks.stacks import CLASSES, STACKS, Stack
from isthmus.benchmarks.statistics import median
from isthmus.errors import ConfigError

Piece = dict[str, Any]


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The order of a turn: each begins one further, and every second one goes backwards, so that nobody always runs
    after the same other."""
    start = turn % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if turn % 2 else order


def compare(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """A row for each cell and class that Isthmus and a peer of the class ran in one piece.

    Of each peer the newest piece with both counts. `ratio` is of medians, `low` and `high` are the extremes of a
    repetition's own; the row's peer is the one that Isthmus does worst against.
    """
    rows = []
    for cell in cells(pieces):
        for weights in CLASSES:
            pairs = [
                pair
                for ours in _of(weights, ours=True)
                for theirs in _of(weights, ours=False)
                if (pair := _newest_pair(pieces, cell, ours.name, theirs.name)) is not None
            ]
            if pairs:
                worst = min(pairs, key=lambda pair: pair["ratio"])
                rows.append({"cell": cell, "class": weights, **worst, "pairs": pairs})
    return rows


def cells(pieces: Sequence[Piece]) -> list[str]:
    """Every piece's cells, in the order they came."""
    return list(dict.fromkeys(cell for piece in pieces for cell in piece["rates"]))


def _of(weights: str, *, ours: bool) -> list[Stack]:
    return [s for s in STACKS.values() if s.weights == weights and (s.engine == "isthmus") == ours]


def _newest_pair(pieces: Sequence[Piece], cell: str, ours: str, theirs: str) -> dict[str, Any] | None:
    for piece in reversed(pieces):
        rates = piece["rates"].get(cell, {})
        if rates.get(ours) and rates.get(theirs):
            return _pair(ours, theirs, rates[ours], rates[theirs])
    return None


def _pair(ours: str, theirs: str, rates: list[float], peer_rates: list[float]) -> dict[str, Any]:
    each = [rate / peer for rate, peer in zip(rates, peer_rates, strict=False)]
    return {
        "ours": ours,
        "peer": theirs,
        "rate": median(rates),
        "peer_rate": median(peer_rates),
        "ratio": median(rates) / median(peer_rates),
        "low": min(each),
        "high": max(each),
        "repeats": len(each),
    }


def newest(pieces: Sequence[Piece], key: str = "rates") -> dict[str, dict[str, Any]]:
    """What the newest piece with a value for it says, by cell and stack; stacks in the order of the table."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells(pieces):
        values: dict[str, Any] = {}
        for piece in pieces:
            values.update({name: value for name, value in piece[key].get(cell, {}).items() if value not in ([], None)})
        found[cell] = {name: values[name] for name in STACKS if name in values}
    return found


def errors(pieces: Sequence[Piece]) -> list[tuple[str, str, str]]:
    """(stack, where, message) of what failed and has not worked in a later piece."""
    left: dict[tuple[str, str], str] = {}
    for piece in pieces:
        for name in piece["stacks"]:
            left.pop((name, "load"), None)
        for cell, rates in piece["rates"].items():
            for name in rates:
                left.pop((name, cell), None)
        for name, places in piece["errors"].items():
            left.update({(name, where): message for where, message in places.items()})
    return [(name, where, message) for (name, where), message in left.items()]


def merged(record: Record, folder: Path) -> Record:
    """`record`, its piece added to those of the file that it would replace.

    Raises ConfigError when that file is of another machine.
    """
    path = folder / f"{record.stem}.json"
    if not path.is_file():
        return record
    before = Record.load(path)
    for name in ("device", "cores", "platform"):
        old, new = getattr(before.machine, name), getattr(record.machine, name)
        if old != new:
            raise ConfigError(f"merge: {path} is of another machine: {name} {old}, not {new}")
    pieces = [*before.figures["pieces"], *record.figures["pieces"]]
    return dataclasses.replace(record, figures={**record.figures, **with_comparison(pieces)})


def with_comparison(pieces: list[Piece]) -> dict[str, Any]:
    """The figures of a record."""
    return {"pieces": pieces, "compared": compare(pieces)}


def label(cell: str) -> str:
    """A cell in words."""
    for prefix, words in (("prefill", "prompt of {} tokens"), ("decode", "decode, {} sequences")):
        if cell.startswith(prefix):
            return words.format(cell.removeprefix(prefix)).replace(" 1 sequences", " 1 sequence")
    for prefix, words in (("closed", "{} streams"), ("rate", "{} requests/s")):
        if cell.startswith(prefix):
            return words.format(cell.removeprefix(prefix))
    return cell
