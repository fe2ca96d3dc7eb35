"""What this process may use of the machine: CPUs by affinity and quota, memory by every limit that is set for it.

A container sees all CPUs and memory of the machine. What it may use is set in its control group, of version 1 or 2, and
in the groups above that (https://docs.kernel.org/admin-guide/cgroup-v2.html, …/cgroup-v1/memory.html). Imports nothing
heavy, because it is used before jax is imported.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_UNLIMITED = 1 << 60
"""A limit from this on is none: version 1 writes "no limit" as the largest multiple of the page size"""


def usable_cpus(root: Path = _ROOT) -> int:
    """How many threads can run at once: the CPUs that the process may run on, or its quota of CPU time, rounded up, if
    that is less."""
    cpus = _affinity()
    quotas = [quota for group in _groups("cpu", root) if (quota := _quota(group)) is not None]
    return max(1, min([cpus, *(math.ceil(quota) for quota in quotas)]))


def has_quota() -> bool:
    """Whether the process may run on more CPUs than its quota of CPU time is worth."""
    return usable_cpus() < _affinity()


def free_main_memory(root: Path = _ROOT) -> int:
    """Bytes of main memory that this process can still take: the least of what the machine, its control groups and its
    own limit on addresses (ulimit -v) leave. Memory that only caches files counts as free."""
    left = [_left_of(group) for group in _groups("memory", root)]
    everything = (_machine_memory(root), _left_of_addresses(root), *left)
    return max(0, min(size for size in everything if size is not None))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine_memory(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # not Linux


def _left_of_addresses(root: Path) -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _text(root / "proc/self/statm").split()
    if limit == resource.RLIM_INFINITY or not used:
        return None
    return limit - int(used[0]) * os.sysconf("SC_PAGE_SIZE")


def _quota(group: Path) -> float | None:
    """CPU time that a control group may use, in CPUs; None means that it has no limit."""
    values = _text(group / "cpu.max").split()  # version 2: "max 100000" or "150000 100000"
    if not values:
        values = [*_text(group / "cpu.cfs_quota_us").split(), *_text(group / "cpu.cfs_period_us").split()]
    try:
        quota, period = map(int, values)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _left_of(group: Path) -> int | None:
    """Bytes that a control group can still take; None means that it has no limit."""
    limits = [_number(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    known = [limit for limit in limits if limit is not None and limit < _UNLIMITED]
    if not known:
        return None
    version2 = (group / "memory.max").exists()
    used = _number(group / ("memory.current" if version2 else "memory.usage_in_bytes")) or 0
    stat = dict(line.split()[:2] for line in _text(group / "memory.stat").splitlines() if len(line.split()) == 2)
    # Version 1's limit is for a group and all below it; so are only those of its counts that are called "total_…".
    files = ("active_file", "inactive_file") if version2 else ("total_active_file", "total_inactive_file")
    return min(known) - max(0, used - sum(int(stat.get(name, 0)) for name in files))


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, its own first, then those above it."""
    paths = _memberships(root)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, separator, after = line.partition(" - ")
        if not separator:
            continue
        kind, options = after.split()[0], after.split()[-1].split(",")
        path = paths.get("" if kind == "cgroup2" else controller)
        if path is None or not (kind == "cgroup2" or (kind == "cgroup" and controller in options)):
            continue
        top, folder = (_unescaped(field) for field in before.split()[3:5])
        # A container may see its own group alone, mounted as the root, while its path is the one on the host.
        inside = PurePosixPath(path).relative_to(top) if PurePosixPath(path).is_relative_to(top) else PurePosixPath()
        parts = () if ".." in inside.parts else inside.parts
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(folder.lstrip("/"), *parts[:depth])


def _memberships(root: Path) -> dict[str, str]:
    """The path of this process's group for each controller; that of version 2 has the key ""."""
    paths: dict[str, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, membership = line.partition(":")
        controllers, _, path = membership.partition(":")
        paths |= dict.fromkeys(controllers.split(","), path)
    return paths


def _unescaped(field: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None
