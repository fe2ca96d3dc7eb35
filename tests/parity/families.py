"""Golden folders as model folders: what every comparison with transformers starts from."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import save_file

from isthmus.model.config import ModelConfig
from isthmus.model.transformer import Params, abstract_params
from isthmus.model.weights.huggingface.families import Family, read_config
from isthmus.model.weights.huggingface.files import TensorFiles
from isthmus.model.weights.huggingface.load import PublishedSource
from isthmus.model.weights.load import load_params
from tests.parity.weights import family_tensors

GOLDEN = Path(os.environ.get("ISTHMUS_GOLDEN", Path(__file__).parent / "golden"))
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/manifest.json"))


def others_slow(*chosen: str) -> list[Any]:
    """All families, those that aren't `chosen` marked slow: every way in which families differ is in one of these."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def golden(family: str) -> dict[str, np.ndarray]:
    """What transformers computed."""
    return dict(np.load(GOLDEN / family / "golden.npz"))


def gradient_norms(family: str) -> dict[str, float]:
    """L2 norm of every tensor's gradient, by its published name."""
    norms: dict[str, float] = json.loads((GOLDEN / family / "grad_norms.json").read_text())
    return norms


@cache
def published(family: str) -> Path:
    """A folder as it is published: config.json and model.safetensors."""
    folder = Path(mkdtemp(prefix=f"isthmus-{family}-"))
    shutil.copyfile(GOLDEN / family / "config.json", folder / "config.json")
    save_file(family_tensors(GOLDEN / family), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(family: str, mesh: Mesh, *, stacked: bool = False) -> tuple[Family, ModelConfig, Params]:
    folder = published(family)
    kind, config = read_config(folder / "config.json")
    source = PublishedSource(TensorFiles(folder), kind, config, mesh)
    return kind, config, load_params(source, abstract_params(config, mesh, stacked=stacked))
