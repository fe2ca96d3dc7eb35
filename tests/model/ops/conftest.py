"""What the tests of the CPU's kernels share."""

from __future__ import annotations

import pytest

from isthmus.model.ops.cpu import library


@pytest.fixture(scope="session")
def kernels() -> library.Library:
    """The compiled kernels."""
    if library.find_compiler() is None and not library.find():
        pytest.skip("there is no C++ compiler")
    return library.load()
