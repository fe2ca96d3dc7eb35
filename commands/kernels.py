"""The command `isthmus kernels`."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from isthmus.model.ops.cpu import library
from isthmus.model.ops.cpu.library import KernelError
from isthmus.model.process.cache_folder import CacheError
from isthmus.model.process.progress import working

HELP = """Compiles the CPU kernels ahead of time, or lists those that have been compiled.

Serving on CPU compiles them at first use, which takes some seconds, and keeps them in ~/.cache/isthmus/kernels.
In a container, where that folder may be empty or read-only and a compiler missing, build them into the image.

examples:
  isthmus kernels build                             for this machine and user
  isthmus kernels build --shared --march x86-64-v3  for every user of this Python, on any x86 CPU with AVX2
  isthmus kernels list                              those that have been compiled, and whether they run here"""


@dataclass(frozen=True)
class Build:
    """Compiles the kernels."""

    march: str = "native"
    """The CPU to compile for, as the compiler's -march: native, or the least capable one to run the kernels on, such as
    x86-64-v3 (AVX2), x86-64-v4 (AVX-512), sapphirerapids (bfloat16 and int8 products, too), armv8.2-a+dotprod"""
    shared: bool = False
    """Put the kernels into this Python environment instead of the user's cache folder"""


@dataclass(frozen=True)
class List:
    """Lists the compiled kernels of this version on this machine."""


Command = Annotated[Build, tyro.conf.subcommand("build")] | Annotated[List, tyro.conf.subcommand("list")]


def build(config: Build, console: Console) -> int:
    folder = library.shared_folder() if config.shared else library.user_folder()
    with working(console, "compiling the kernels"):
        made = library.build(folder, config.march)
    console.print(f"{made.path}", highlight=False)
    if not made.runs_here:
        console.print(f"compiled for {config.march}: this machine, {platform.machine()}, can't run it", style="yellow")
    return 0


def show(console: Console) -> int:
    """Returns 1 when this machine has no library that it can run."""
    found = library.find()
    table = Table("for", "runs here")
    table.add_column("file", overflow="fold")
    for each in found:
        table.add_row(
            "this machine" if each.target.startswith("native") else each.target,
            "yes" if each.runs_here else "no",
            str(each.path),
        )
    console.print(table)
    if any(each.runs_here for each in found):
        return 0
    compiler = library.find_compiler()
    what = f"serving will compile them with {compiler}" if compiler else "and there is no C++ compiler: install g++"
    console.print(f"no kernels for this machine yet: {what}")
    return 1


def main(argv: Sequence[str]) -> int:
    """Returns the process's exit status."""
    console = Console(soft_wrap=True)
    command = tyro.cli(Command, args=list(argv), description=HELP, prog="isthmus kernels")  # type: ignore[arg-type]
    try:
        return build(command, console) if isinstance(command, Build) else show(console)
    except (KernelError, CacheError) as error:
        console.print(f"isthmus kernels: {error}", style="red", markup=False)
        return 2
