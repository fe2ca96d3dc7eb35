"""`python -m train`, the same as `isthmus train`."""

from __future__ import annotations

import sys

from model.process import run


def _train() -> int:
    from train.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run(_train))
