"""Loading a network's parameters: a source reads one or a few at a time, and each passes through transforms (merging,
quantizing, packing) as soon as it is there, so that a model needn't fit into memory before it is made smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from isthmus.model.ops.linear import Weight
from isthmus.model.transformer import Params

Transform = Callable[[str, Weight], Weight | None]
"""(path, parameter) to what takes its place, called from several threads; None keeps nothing of it here"""
OnProgress = Callable[[int], None]
"""Called with the bytes read since the last call, from several threads"""

READERS = 2
"""Reads at once: while what one has read is turned in memory, the other waits for the disk"""


@dataclass(frozen=True)
class Read:
    """A part of a source that is read in one go."""

    nbytes: int
    """How much is read; 0 is not known"""
    run: Callable[[], Params]
    """Gives parameters by their paths; called once, from any thread"""


class Source(Protocol):
    """Where a network's parameters come from."""

    @property
    def nbytes(self) -> int:
        """Bytes that reading all of it takes; 0 is not known."""
        ...

    def reads(self, abstract: Params) -> Iterable[Read]:
        """What to run to have every parameter of `abstract`: shapes with the dtype and the sharding that each is to
        have, in one layout. Raises ConfigError or CheckpointError for a source that doesn't hold them, as the reads
        themselves do."""
        ...


def load_params(
    source: Source,
    abstract: Params,
    transforms: Sequence[Transform] = (),
    on_progress: OnProgress = lambda size: None,
) -> Params:
    """The parameters as `abstract` describes them, changed by the transforms in their order. What a transform keeps
    nothing of is left out. Raises what the source raises."""

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
