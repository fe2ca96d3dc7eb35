"""Loads a network's parameters. A source reads one or a few at a time, and each passes through transforms (merging,
quantizing, packing) as soon as it is read. So a model needn't fit into memory before it is made smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from isthmus.model.ops.linear import Weight
from isthmus.model.transformer import Params

Transform = Callable[[str, Weight], Weight | None]
"""Takes a path and its parameter, and returns what replaces the parameter. None leaves the parameter out of the result.
Called from several threads"""
OnProgress = Callable[[int], None]
"""Called with the bytes read since the last call, from several threads"""

READERS = 2
"""How many reads run at once: while one of them transposes what it has read, the other waits for the disk"""


@dataclass(frozen=True)
class Read:
    """A part of a source that is read in one call."""

    nbytes: int
    """The number of bytes that are read; 0 means unknown"""
    run: Callable[[], Params]
    """Returns parameters by their paths; called once, from any thread"""


class Source(Protocol):
    """Where a network's parameters come from."""

    @property
    def nbytes(self) -> int:
        """The number of bytes that reading everything takes; 0 means unknown."""
        ...

    def reads(self, abstract: Params) -> Iterable[Read]:
        """Returns the reads that together give every parameter in `abstract`. abstract: the shape, dtype and sharding
        that each parameter is to have, in one layout. Both this call and the reads raise ConfigError or CheckpointError
        for a source that doesn't hold the parameters."""
        ...


def load_params(
    source: Source,
    abstract: Params,
    transforms: Sequence[Transform] = (),
    on_progress: OnProgress = lambda size: None,
) -> Params:
    """Loads the parameters that `abstract` describes, and applies the transforms in order. A parameter for which a
    transform returns None is left out. Raises what the source raises."""

    def read(part: Read) -> Params:
        kept: Params = {}
        for path, weight in part.run().items():
            changed: Weight | None = weight
            for transform in transforms:
                if changed is not None:
                    changed = transform(path, changed)
            if changed is not None:
                kept[path] = changed
        on_progress(part.nbytes)
        return kept

    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as readers:
        todo = [readers.submit(read, part) for part in source.reads(abstract)]
        try:
            return {path: weight for each in todo for path, weight in each.result().items()}
        finally:
            readers.shutdown(cancel_futures=True)
