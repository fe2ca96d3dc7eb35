"""Random weights of a tiny published checkpoint, from names, shapes and a seed: the same in both environments."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np


def random_tensors(manifest: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """float32 tensors for {published name: shape}; each depends on the seed, its name, its shape and the family alone.

    The family shows in the names: Gemma has `pre_feedforward_layernorm` (its norms multiply by 1 + w), a tied head has
    no `lm_head.weight`, a sigmoid router has an `e_score_correction_bias`.
    """
    return {name: _tensor(name, tuple(shape), seed, manifest) for name, shape in manifest.items()}


def family_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a golden folder, as its manifest.json describes them."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return random_tensors(manifest["tensors"], manifest["seed"])


def _tensor(name: str, shape: tuple[int, ...], seed: int, names: dict[str, list[int]]) -> np.ndarray:
    noise = np.random.default_rng([seed, *name.encode()]).standard_normal(shape)
    return (_offset(name, names) + _scale(name, shape, names) * noise).astype(np.float32)


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def _is_gemma(names: dict[str, list[int]]) -> bool:
    return any("pre_feedforward_layernorm" in name for name in names)


def _is_tied(names: dict[str, list[int]]) -> bool:
    return "lm_head.weight" not in names


def _offset(name: str, names: dict[str, list[int]]) -> float:
    if not _is_norm(name):
        return 0.0
    mean = 0.0 if _is_tied_final_norm(name, names) else 1.0
    return mean - 1.0 if _is_gemma(names) else mean


def _is_tied_final_norm(name: str, names: dict[str, list[int]]) -> bool:
    """Of either sign: a tied head would otherwise prefer the token that was just read, and greedy text repeat it."""
    return name == "model.norm.weight" and _is_tied(names)


def _scale(name: str, shape: tuple[int, ...], names: dict[str, list[int]]) -> float:
    if _is_norm(name):
        return 1.0 if _is_tied_final_norm(name, names) else 0.2
    if name.endswith("e_score_correction_bias"):
        return 0.1
    if name.endswith("sinks"):
        return 1.0
    if name.endswith("bias"):
        return 0.3
    if name.endswith("embed_tokens.weight"):
        return _embedding_scale(shape[1], names)
    if len(shape) == 3:  # gpt-oss stacks its experts as [experts, in, out]
        return 1.5 / math.sqrt(shape[1])
    if name.endswith((".gate.weight", ".router.weight")):
        # A sigmoid router saturates where a softmax router is still clear.
        return (1.5 if name.replace(".weight", ".e_score_correction_bias") in names else 3.0) / math.sqrt(shape[1])
    return 1.5 / math.sqrt(shape[1])


def _embedding_scale(dim: int, names: dict[str, list[int]]) -> float:
    if _is_gemma(names):  # multiplies by sqrt(dim), and is the head too
        return 2.0 / math.sqrt(dim)
    return 0.5 if _is_tied(names) else 1.0
