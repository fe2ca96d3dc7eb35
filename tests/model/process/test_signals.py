"""The ways in which a process ends: whatever it leaves, temporary folders aren't among it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, threading
from pathlib import Path
from isthmus.model.process.cleaning import cleaning, remove
from isthmus.model.process.signals import end_at_once
folder = Path(sys.argv[1])
folder.mkdir()
threading.Thread(target=threading.Event().wait).start()  # a thread that hangs
with cleaning(lambda: 1 / 0), cleaning(lambda: remove(folder)):
    print("half a line", end="")
    end_at_once(7)
"""


def test_an_end_at_once_cleans_up_and_keeps_its_status(tmp_path: Path) -> None:
    """A server whose engine hangs ends so: in a container that restarts it, what is left would fill the disk. What one
    clean-up raises doesn't keep the others from their work."""
    folder = tmp_path / "left"
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (7, "half a line", "")
    assert not folder.exists()
