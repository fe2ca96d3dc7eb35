"""`make parity [SEED=N]`: golden files of a new seed, made now by transformers in .venv-peers, and compared with."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PEERS_PYTHON = HERE.parents[1] / ".venv-peers" / "bin" / "python"


def main(argv: list[str]) -> int:
    """Returns pytest's exit status."""
    seed = int(argv[0]) if argv else secrets.randbelow(1 << 31)
    if not PEERS_PYTHON.exists():
        print("no .venv-peers: run `make peers`", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        print(f"seed {seed}: the same models again with `make parity SEED={seed}`", flush=True)
        made = [PEERS_PYTHON, HERE / "make_golden.py", "--out", folder, "--seed", str(seed)]
        if subprocess.run(list(map(str, made))).returncode:
            return 1
        compare = [sys.executable, "-m", "pytest", "-n", "2", str(HERE / "test_families.py")]
        return subprocess.run(compare, env={**os.environ, "ISTHMUS_GOLDEN": folder}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
