"""Generates the Python code of protos/ into isthmus/: run by the package's build, and by `make protos`.

Generated code is never committed, because protobuf refuses at import what a newer or much older generator made.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # `make protos` needs only grpcio-tools
    BuildHookInterface = object  # type: ignore[assignment,misc]

ROOT = Path(__file__).resolve().parent


def generate() -> list[Path]:
    """Compiles every .proto under protos/ and returns the files written."""
    import grpc_tools
    from grpc_tools import protoc

    include = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted((ROOT / "protos").rglob("*.proto"))
    flags = [f"--{kind}={ROOT}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    code = protoc.main(["protoc", f"-I{ROOT / 'protos'}", f"-I{include}", *flags, *map(str, sources)])
    if code != 0:
        raise RuntimeError(f"protoc failed with exit status {code}")
    return sorted((ROOT / "isthmus" / "v1").glob("*_pb2*.py*"))


class CustomBuildHook(BuildHookInterface):  # type: ignore[misc,valid-type]
    """Hatchling calls this before it collects a wheel's files, also for an editable installation."""

    def initialize(self, version: str, build_data: dict) -> None:
        generate()


if __name__ == "__main__":
    for path in generate():
        print(path.relative_to(ROOT), file=sys.stderr)
