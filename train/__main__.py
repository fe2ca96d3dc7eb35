"""`python -m train`, the same as `isthmus train`."""

from __future__ import annotations

import sys

from model.memory import keep_heap

if __name__ == "__main__":
    keep_heap()
    from train.cli import main

    sys.exit(main())
