"""Hadamard matrices, which spread what is large in a vector over all of it."""

from __future__ import annotations

from functools import cache

import numpy as np


@cache
def hadamard(size: int) -> np.ndarray:
    """float32[size, size] of 1 and -1 (Sylvester's), symmetric; its square is size times the identity. size: a power of
    two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
