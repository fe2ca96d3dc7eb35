"""What a measurement was taken on: the machine, the software, its limits, and how busy it was."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from isthmus.model.device import hardware
from isthmus.model.device.hardware import Limits
from isthmus.model.process.resources import usable_cpus

VECTORS = {"avx512_bf16": "AVX-512 with BF16", "avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}
"""Vector instructions that make a difference in speed, by Linux's names, best first"""


@dataclass(frozen=True)
class Machine:
    """What a run was measured on, for those who read its figures later."""

    platform: str
    """JAX's name of the backend: cpu, gpu or tpu"""
    device: str
    """The processor's or accelerator's name"""
    devices: int
    cores: int
    """Host cores that this process may use"""
    memory_bytes: int
    """Memory of the host"""
    operating_system: str
    python: str
    jax: str
    commit: str
    """Commit of the working folder; '+' means uncommitted changes, empty means no git"""
    date: str
    """UTC, ISO 8601"""
    load: float
    """Processes that wanted a core, averaged over the minute before the run; well above 0 means that others ran, too"""


def describe(kind: str = "", devices: Sequence[str] = ()) -> Machine:
    """Describes this machine. kind, devices: the platform and the devices' names, as a server on this machine tells
    them; by default, those of JAX in this process."""
    if not kind:
        kind, devices = jax.default_backend(), [device.device_kind for device in jax.devices()]
    return Machine(
        platform=kind,
        device=cpu_name() if kind == "cpu" else devices[0],
        devices=len(devices),
        cores=usable_cpus(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        operating_system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        jax=jax.__version__,
        commit=git_commit(Path.cwd()),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        load=round(os.getloadavg()[0], 2),
    )


def cpu_name() -> str:
    """The processor's name and its widest vectors, as Linux knows them, because clouds use one name for several
    processors; on other systems, the name that Python knows."""
    try:
        return name_of(Path("/proc/cpuinfo").read_text().splitlines())
    except OSError:
        return platform.processor() or platform.machine()


def name_of(cpuinfo: Iterable[str]) -> str:
    """The processor's name in the lines of /proc/cpuinfo."""
    fields = {key.strip(): value.split() for key, _, value in (line.partition(":") for line in cpuinfo)}
    flags = fields.get("flags") or fields.get("Features") or []
    name = " ".join(fields.get("model name") or [platform.machine()])
    vectors = next((text for flag, text in VECTORS.items() if flag in flags), "")
    return f"{name} ({vectors})" if vectors else name


def git_commit(folder: Path) -> str:
    """Short hash of HEAD, with '+' when tracked files differ from it; empty outside git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def measure_limits(dtype: str, devices: int = 1) -> Limits:
    """Peak and bandwidth of this machine, measured now (about two seconds) or from the data sheet."""
    hardware.peak_flops.cache_clear()
    return hardware.limits(dtype, devices)


def better(first: Limits, second: Limits) -> Limits:
    """The higher of both limits. Another process can only make a limit look lower than it is."""
    return Limits(max(first.flops, second.flops), max(first.bandwidth, second.bandwidth), first.source)


def limits_of_any_dtype() -> dict[str, float]:
    """The machine's limits, measured now: `bandwidth`, bytes/s, and `flops`, FLOP/s of a matrix product in the faster
    of float32 and bfloat16."""
    limits = [measure_limits(dtype) for dtype in ("float32", "bfloat16")]
    return {"bandwidth": max(x.bandwidth for x in limits), "flops": max(x.flops for x in limits)}
