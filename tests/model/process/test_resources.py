"""What a process may use of the machine, from the files that Linux shows it: those of containers of both versions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest

from isthmus.model.process import resources
from isthmus.model.process.resources import free_main_memory, usable_cpus
from tests.serve.api.harness import PATIENCE

MB = 1 << 20
ROOT = Path(resources.__file__).parents[1]
UNLIMITED = "9223372036854771712"
"""As version 1 writes it, with pages of 4 kB"""
V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {top} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}"


def tree(root: Path, cgroup: str, mounts: str, **files: str) -> Path:
    """A machine with 64 GB free, and files of its control groups."""
    content = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts, "proc/self/statm": "1000 1 1 1 0 1 0"}
    content["proc/meminfo"] = "MemTotal: 131072000 kB\nMemAvailable:   67108864 kB\n"
    for path, text in {**content, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n")
    return root


def v2(root: Path, path: str, groups: dict[str, dict[str, str]], top: str = "/") -> Path:
    """groups: files by group, below where version 2 is mounted."""
    files = {f"sys/fs/cgroup{group}/{name}": text for group, each in groups.items() for name, text in each.items()}
    return tree(root, f"0::{path}", V2.replace(" / ", f" {top} ", 1), **files)


def v1(root: Path, path: str, groups: dict[str, dict[str, str]], top: str = "/") -> Path:
    """groups: files by "/controller/group"."""
    files = {f"sys/fs/cgroup{group}/{name}": text for group, each in groups.items() for name, text in each.items()}
    mounts = "\n".join(V1.format(name=name, top=top) for name in ("cpu,cpuacct", "memory"))
    return tree(root, f"5:cpu,cpuacct:{path}\n4:memory:{path}\n1:name=systemd:/\n0::/", mounts, **files)


def on_cpus(count: int) -> mock._patch:
    return mock.patch.object(os, "sched_getaffinity", lambda process: set(range(count)))


FREE = 65536 * MB
USED = {
    "memory.current": str(700 * MB),
    "memory.stat": f"anon {500 * MB}\nactive_file {150 * MB}\ninactive_file {20 * MB}",
}
"""530 MB of it are no file's"""
USED_V1 = {
    "memory.usage_in_bytes": str(700 * MB),
    "memory.stat": f"cache 1\ninactive_file 7\ntotal_active_file {150 * MB}\ntotal_inactive_file {20 * MB}",
}


@pytest.mark.parametrize(
    "path, groups, left",
    [
        ("/", {"/": {"memory.max": str(900 * MB), **USED}}, 370 * MB),  # a container with a namespace of its own
        ("/a/b", {"/a/b": {"memory.max": "max"}, "/a": {"memory.max": str(900 * MB), **USED}}, 370 * MB),
        ("/a/b", {"/a/b": {"memory.max": str(600 * MB), **USED}, "/a": {"memory.max": str(900 * MB), **USED}}, 70 * MB),
        ("/a", {"/a": {"memory.max": "max", "memory.high": str(800 * MB), **USED}}, 270 * MB),
        ("/a", {"/a": {"memory.max": str(500 * MB), **USED}}, 0),
        ("/a", {"/a": {"memory.max": str(900 * MB), "memory.current": str(700 * MB)}}, 200 * MB),
        ("/a", {"/a": {"memory.max": "max", **USED}}, FREE),
        ("/a", {"/a": {"memory.max": str(1 << 50), **USED}}, FREE),
        ("/a", {"/b": {"memory.max": str(900 * MB), **USED}}, FREE),
        ("/../host/a", {"/": {"memory.max": str(900 * MB), **USED}}, 370 * MB),
        ("/a", {}, FREE),
        ("/a", {"/a": {"memory.max": "what?", "memory.stat": "a b c"}}, FREE),
    ],
)  # fmt: skip
def test_memory_that_version_2_leaves(tmp_path: Path, path: str, groups: dict, left: int) -> None:
    """A server in 900 MB that counts the machine's claims 3 GB of cache, and is killed amid an answer."""
    assert free_main_memory(v2(tmp_path, path, groups)) == left


@pytest.mark.parametrize(
    "path, groups, top, left",
    [
        ("/docker/1", {"/memory/docker/1": {"memory.limit_in_bytes": str(900 * MB), **USED_V1}}, "/", 370 * MB),
        ("/docker/1", {"/memory/": {"memory.limit_in_bytes": str(900 * MB), **USED_V1}}, "/docker/1", 370 * MB),
        ("/docker/1/in", {"/memory/in": {"memory.limit_in_bytes": str(900 * MB), **USED_V1}}, "/docker/1", 370 * MB),
        ("/docker/1", {"/memory/": {"memory.limit_in_bytes": str(900 * MB), **USED_V1}}, "/", 370 * MB),
        ("/docker/1", {"/memory/docker/1": {"memory.limit_in_bytes": UNLIMITED, **USED_V1}}, "/", FREE),
    ],
)  # fmt: skip
def test_memory_that_version_1_leaves(tmp_path: Path, path: str, groups: dict, top: str, left: int) -> None:
    assert free_main_memory(v1(tmp_path, path, groups, top)) == left


def test_memory_of_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert free_main_memory(tree(tmp_path, "", "")) == FREE
    (tmp_path / "proc/self/cgroup").unlink()
    (tmp_path / "proc/self/mountinfo").unlink()
    assert free_main_memory(tmp_path) == FREE


def test_addresses_that_a_shell_limits() -> None:
    """ulimit -v: what is mapped beyond it fails, however much memory there is."""
    code = """
import resource
from pathlib import Path
from isthmus.model.process.resources import free_main_memory
before = free_main_memory()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), resource.RLIM_INFINITY))
print(before > (350 << 20), 290 << 20 < free_main_memory() <= 300 << 20)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "True True\n", done.stderr


@pytest.mark.parametrize(
    "path, groups, cpus",
    [
        ("/", {"/": {"cpu.max": "200000 100000"}}, 2),
        ("/a", {"/a": {"cpu.max": "150000 100000"}}, 2),
        ("/a", {"/a": {"cpu.max": "10000 100000"}}, 1),
        ("/a", {"/a": {"cpu.max": "max 100000"}}, 64),
        ("/a/b", {"/a/b": {"cpu.max": "max 100000"}, "/a": {"cpu.max": "300000 100000"}}, 3),
        ("/a/b", {"/a/b": {"cpu.max": "400000 100000"}, "/a": {"cpu.max": "800000 100000"}}, 4),
        ("/a", {"/a": {"cpu.max": "9900000 100000"}}, 64),
        ("/a", {"/a": {"cpu.max": ""}}, 64),
        ("/a", {}, 64),
    ],
)  # fmt: skip
def test_cpus_of_version_2(tmp_path: Path, path: str, groups: dict, cpus: int) -> None:
    """--cpus=2 on 64 cores: 63 threads that watch for work use up the time of the two that have some."""
    with on_cpus(64):
        assert usable_cpus(v2(tmp_path, path, groups)) == cpus


@pytest.mark.parametrize("quota, cpus", [("250000", 3), ("-1", 64), ("50000", 1)])
def test_cpus_of_version_1(tmp_path: Path, quota: str, cpus: int) -> None:
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"}
    with on_cpus(64):
        assert usable_cpus(v1(tmp_path, "/docker/1", {"/cpu,cpuacct/": files}, "/docker/1")) == cpus


def test_cpus_by_affinity_alone(tmp_path: Path) -> None:
    """taskset, or a container's cpuset."""
    with on_cpus(3):
        assert usable_cpus(tree(tmp_path, "", "")) == 3
        assert usable_cpus(v2(tmp_path, "/", {"/": {"cpu.max": "800000 100000"}})) == 3


# A real group

COUNT = """
import os, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
from isthmus.model.process.command import run

def count():
    import jax
    import numpy as np
    from isthmus.model.ops.cpu import library
    from isthmus.model.ops.cpu.packed import pack
    jax.jit(lambda x: x @ x)(np.ones((300, 300), np.float32)).block_until_ready()
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    before = len(names)
    if library.why_not() is None:
        pack(np.ones((600, 600), np.float32), 600)
    workers = len(os.listdir("/proc/self/task")) - before
    print(names.count("tf_XLAEigen"), workers)
    return 0

run(count)
"""


@contextmanager
def real_group(controller: str, **files: int) -> Iterator[Path]:
    """A control group of this machine with these files' values. Skips the test where none can be made."""
    base = Path("/sys/fs/cgroup")
    folder = (base / controller if (base / controller).is_dir() else base) / f"isthmus-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        for name, value in files.items():
            file = folder / name.replace("__", ".")
            if not file.exists():
                pytest.skip(f"{file} is not there")
            file.write_text(str(value))
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs to be kept from one")
def test_no_more_threads_than_a_quota_has_time_for() -> None:
    """XLA's and the kernels' own: two CPUs to run on, the time of one."""
    with real_group("cpu", cpu__cfs_quota_us=100_000) as group:
        done = subprocess.run(
            [sys.executable, "-c", COUNT, str(group)],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": ""},  # of the tests: many devices, with threads each
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert done.returncode == 0 and done.stdout.split() == ["1", "0"], done.stdout + done.stderr


def test_a_real_limit_is_seen() -> None:
    with real_group("memory", memory__limit_in_bytes=700 * MB) as group:
        code = f"""
import os
open("{group}/cgroup.procs", "w").write(str(os.getpid()))
from isthmus.model.process.resources import free_main_memory
print(free_main_memory() >> 20)
held = bytearray(b"x") * (200 << 20)
print(free_main_memory() >> 20)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    before, after = map(int, done.stdout.split())
    assert 600 < before <= 700 and 180 < before - after < 220
