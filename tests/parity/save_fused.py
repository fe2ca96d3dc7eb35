"""Run by the peers' Python: transformers writes the models in FOLDERs anew, to OUT, as it has them in memory: all
experts of a layer in one tensor.

    python tests/parity/save_fused.py OUT FOLDER...
"""

from __future__ import annotations

import argparse
from pathlib import Path

from check_export import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    for folder in args.folders:
        load(folder).save_pretrained(args.out / folder.name, save_original_format=False)


if __name__ == "__main__":
    main()
