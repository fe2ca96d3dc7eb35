"""What the process takes from the system and gives back."""

import subprocess
import sys

import pytest

HELD = """
import gc
from pathlib import Path
from isthmus.model.device.memory import keep_heap, release_heap

def held():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 // 10**6

keep_heap()
before = held()
blocks = [bytearray(b"x") * 10**6 for _ in range(200)]
last = bytearray(b"x") * 10**6  # above them, so that they aren't the heap's end
del blocks
gc.collect()
kept = held()
release_heap()
print(before, kept, held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's heap is kept")
def test_a_server_gives_back_what_loading_took() -> None:
    """With the heap kept, what files were read into would stay the server's: 1.7 GB of a 1B model in int8."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    before, kept, released = map(int, done.stdout.split())
    assert kept - before > 180, "keep_heap keeps"
    assert released - before < 20, done.stdout
