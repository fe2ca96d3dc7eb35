"""`python -m train`, the same as `isthmus train`."""

from __future__ import annotations

import sys

from model.signals import stop_at_once


def _train() -> int:
    from train.cli import main

    return main()


if __name__ == "__main__":
    stop_at_once()  # before all else is imported

    from model.process import run

    sys.exit(run(_train))
