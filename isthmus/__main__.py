"""`python -m isthmus`, the same as `isthmus`."""

import sys

from isthmus.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
