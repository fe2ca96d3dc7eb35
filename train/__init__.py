"""data → step → loop. The package is also the function that runs them: `from isthmus import train; train(config)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from isthmus.train.config import TrainConfig
    from isthmus.train.loop import Report

if __name__ != "isthmus.train":
    raise ImportError("this folder is the package isthmus.train: import it by that name")


class _Train(ModuleType):
    def __call__(self, config: TrainConfig, console: Console | None = None) -> Report:
        """Does what isthmus.train.loop.train does."""
        from isthmus.train import loop

        return loop.train(config, console)


sys.modules[__name__].__class__ = _Train
